"""The live screen of `stillhouse watch`.

job_3f9c0a12b4d5e6f70819  quickstart
✓ queued  ✓ validating  ✓ starting  ● running  ○ succeeded
━━━━━━━━━━━━━━━━━━━━━━━━━━━╺━━━━━━━━━━━  step 24/36  ETA 1m12s  6.1 s a step

reverse KL   1.31      █▆▅▄▃▃▂▂▁▁▁▁  2.94 at step 1
...
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from stillhouse.cli import held_out
from stillhouse.cli.console import count, duration, number, printable, sparkline
from stillhouse.cli.follow import Picture
from stillhouse.cli.views import KL, REWARD, STAGES, outcome, stage_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.text import Text

LIFE: Final = ("queued", "validating", "starting", "running", "succeeded")
"""Statuses of a job that goes well, in order."""
SIDEWAYS: Final = {"stalled": "running", "pausing": "running", "paused": "running", "resuming": "running"}
"""Statuses in place of another."""
ENDS: Final = ("succeeded", "failed", "cancelled")
COLOURS: Final = {
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
    "cancelling": "yellow",
    "stalled": "yellow",
    "paused": "yellow",
    "pausing": "yellow",
}
MAX_TEACHERS: Final = 8
"""Teachers with a curve of their own: the screen has an end."""
REFRESH_PER_S: Final = 4
"""A person sees a resize at once; the numbers are polled once a second."""
GAUGE_WIDTH: Final = 12
"""Columns of the fullest queue."""


class LiveView:
    """A screen that stays in place, and fits the terminal as it is now."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._console = console
        self._picture = Picture()
        self._live = Live(self, console=console, refresh_per_second=REFRESH_PER_S, transient=True)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        yield screen(self._picture, options.max_width)
        if not self._picture.is_terminal:
            yield Text("Ctrl-C leaves the job running", "dim")

    def show(self, picture: Picture) -> None:
        self._picture = picture
        if picture.is_terminal:
            self._live.stop()  # it was transient: leave the last picture and the outcome on the terminal
            self._console.print(screen(picture, self._console.width))
            self._console.print(outcome(picture), markup=False)


def screen(picture: Picture, width: int) -> RenderableType:
    """The live picture: header, phases, bar, a row per thing to know."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    if not picture.job:
        return Text(_offline(picture) or "asking the gateway ...")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for label, text in _rows(picture, max(10, min(60, width - 44))):
        grid.add_row(label, text)
    head = Text.assemble((str(picture.job.get("id", "")), "bold"), "  ", printable(_name(picture)))
    parts: list[RenderableType] = [head, phases(picture), _progress(picture, width), Text(""), grid]
    parts += [Text(f"! {printable(warning)}", style="yellow") for warning in picture.warnings]
    if offline := _offline(picture):
        parts.append(Text(offline, style="red"))
    return Group(*parts)


def phases(picture: Picture) -> Text:
    """`✓ queued  ✓ validating  ● starting  ○ running  ○ succeeded`, with what goes on in the one that is on."""
    from rich.text import Text

    status = picture.status
    is_over = status in ENDS
    known = SIDEWAYS.get(status, status)
    place = LIFE.index(known) if known in LIFE else (LIFE.index("succeeded") if is_over else LIFE.index("running"))
    line = Text()
    for index, name in enumerate(LIFE):
        if index < place:
            line.append(f"✓ {name}  ", "dim green")
        elif index == place:
            sign = {"failed": "✗", "succeeded": "✓"}.get(status, "●")
            line.append(f"{sign} {status}", f"bold {COLOURS.get(status, 'cyan')}")
            line.append(f" {_phase(picture)}" if _phase(picture) else "", "cyan").append("  ")
        else:
            line.append(f"○ {name}  ", "dim")
    line.rstrip()
    return line


def _progress(picture: Picture, width: int) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    total, step_s = picture.total_steps, picture.last("time/step_s")
    facts = [f"step {picture.step}/{total or '?'}", stage_of(picture)]
    if not picture.is_terminal:
        facts.append(f"ETA {duration(picture.progress.get('eta_s'))}")
    facts.append(f"{number(step_s, 3)} s a step" if step_s is not None else "")
    line = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=total or 1, completed=picture.step, width=max(10, min(50, width - 44)))
    line.add_row(bar, "  ".join(filter(None, facts)))
    return line


def _rows(picture: Picture, width: int) -> Iterator[tuple[str, RenderableType]]:
    from rich.text import Text

    for label, key in _curves(picture):
        curve = picture.curve(key)
        yield label, _curve(curve, width)
    for label, text in held_out.facts([picture.evaluations[step] for step in sorted(picture.evaluations)]):
        yield label, Text(text)
    yield "tokens/s", _speeds(picture)
    if picture.queues:
        yield "queues", _queues(picture.queues)
    mismatch, staleness = picture.last("mismatch/logprob_abs_mean"), picture.last("staleness/max")
    checks = (
        f"mismatch {number(mismatch, 2)}   staleness {number(staleness)}   loss {number(picture.last('loss/total'))}"
    )
    yield "checks", Text(checks)
    if picture.job.get("status_message"):
        yield "note", Text(printable(str(picture.job["status_message"])), COLOURS.get(picture.status, ""))


def _curves(picture: Picture) -> Iterator[tuple[str, str]]:
    """(label, metric): the mean, each teacher's where there are several, rewards."""
    yield "reverse KL", KL
    newest = picture.points.get(max(picture.points, default=0), {})
    prefix = KL.removesuffix("mean")
    teachers = sorted(name for name in newest if name.startswith(prefix) and name != KL)
    if len(teachers) > 1:
        for name in teachers[:MAX_TEACHERS]:
            yield f"  {name.removeprefix(prefix)}", name
    if picture.last(REWARD) is not None:
        yield "reward", REWARD


def _curve(values: list[float], width: int) -> Text:
    from rich.text import Text

    known = [value for value in values if math.isfinite(value)]
    line = Text(f"{number(known[-1] if known else None):<9}", "bold")
    line.append(sparkline(values, width), "cyan")
    return line.append(f"  {number(known[0])} at first" if len(known) > 1 else "", "dim")


def _speeds(picture: Picture) -> Text:
    """Of the three stages; the one that the others wait for in colour, with the word."""
    from rich.text import Text

    progress = picture.progress
    # a finished job has no progress any more: what its last step measured
    speeds = progress.get("tokens_per_s") or {stage: picture.last(f"{stage}/tokens_per_s") for stage in STAGES}
    roles = dict(zip(STAGES, ("sampler", "teacher", "trainer"), strict=True))
    bottleneck = str(progress.get("bottleneck") or "")
    line = Text()
    for stage in STAGES:
        line.append(f"{stage} {count(speeds.get(stage))}", "yellow" if roles[stage] == bottleneck else "")
        line.append("   ")
    return line.append(f"bottleneck: {bottleneck}" if bottleneck else "", "yellow")


def _queues(queues: Any) -> Text:
    """A gauge per role: what is in work, then what waits."""
    from rich.text import Text

    line = Text()
    largest = max((queue.waiting + queue.in_work for queue in queues), default=0)
    for queue in queues:
        scale = GAUGE_WIDTH / max(largest, GAUGE_WIDTH)
        work, wait = round(queue.in_work * scale), round(queue.waiting * scale)
        line.append(f"{queue.role}{f' {queue.model}' if queue.model else ''} ", "dim")
        line.append("█" * work, "cyan").append("░" * wait, "cyan")
        line.append(f" {queue.in_work} in work, {queue.waiting} waiting   ")
    return line


def _phase(picture: Picture) -> str:
    phase = str(picture.progress.get("phase") or "")
    return "" if phase == picture.status or picture.is_terminal else phase


def _name(picture: Picture) -> str:
    return str(picture.job.get("name") or (picture.job.get("spec") or {}).get("name") or "")


def _offline(picture: Picture) -> str:
    if picture.offline_since is None:
        return ""
    return f"the gateway has not answered for {duration(time.monotonic() - picture.offline_since)}; trying again"
