"""`stillhouse validate`: what the gateway, and with --live the trainer, finds in a job before it trains."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from stillhouse.cli import jobfile
from stillhouse.cli.console import EXIT_FAILED, console, count, duration, print_json, printable, say, size
from stillhouse.cli.jobs import upload
from stillhouse.client.client import Client
from stillhouse.core.schemas import Check, Estimate, Preflight, Tokens

ORDER: Final = ("error", "warning", "skipped", "ok")
MARKS: Final = {
    "error": ("✗", "bold red"),
    "warning": ("!", "bold yellow"),
    "skipped": ("·", "dim"),
    "ok": ("✓", "green"),
}
"""(sign, style) of a verdict."""
SENTENCES: Final = {
    "ok": "nothing speaks against this job",
    "warning": "the job may run; see the warnings",
    "error": "this job would be refused",
}
WIDTH: Final = 100
EVIDENCE: Final = 300
"""Characters of one piece of evidence; --json has all."""


def validate(path: Path, *, is_live: bool, shows_all: bool, as_json: bool) -> None:
    """Check a job; ends the process with code 1 if it would be refused."""
    job_file = jobfile.load(path)
    with Client() as client:
        spec = upload(client, job_file, is_quiet=True)
        if is_live and not as_json:
            print("loading the models and probing them; this takes as long as starting the job", file=sys.stderr)
        report = client.jobs.validate(spec, live=is_live)
    if as_json:
        print_json(report)
    else:
        show(report, shows_all=shows_all)
    if report.verdict == "error":
        sys.exit(EXIT_FAILED)


def show(report: Preflight, *, shows_all: bool) -> None:
    """The report for people: what is wrong first."""
    by_verdict = {verdict: [check for check in report.checks if check.verdict == verdict] for verdict in ORDER}
    for verdict in ("error", "warning"):
        for check in by_verdict[verdict]:
            _show_check(check)
    if shows_all:
        for verdict in ("skipped", "ok"):
            for check in by_verdict[verdict]:
                _show_check(check)
    else:
        for verdict, words in (("skipped", "not looked at"), ("ok", "in order")):
            names = list(dict.fromkeys(check.name for check in by_verdict[verdict]))
            if names:
                _print_head(verdict, textwrap.fill(f"{words}: {', '.join(names)}", WIDTH, subsequent_indent="  "))
    if report.estimate is not None:
        say("")
        for line in _cost(report.estimate):
            say(line)
    kind = "live checks" if report.is_live else "what can be seen without loading models"
    say(f"\n{SENTENCES[report.verdict]} ({len(report.checks)} checks; {kind})")
    if not report.is_live and report.verdict != "error":
        say("`--live` loads the models and measures the rest")


def _show_check(check: Check) -> None:
    _print_head(check.verdict, f"{check.name}: {check.message}", check.param or "")
    for name, value in check.evidence.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        say(textwrap.indent(printable(f"{name}: {text[:EVIDENCE]}{' ...' if len(text) > EVIDENCE else ''}"), "      "))
    if check.fix:
        say(textwrap.indent(textwrap.fill(printable(f"fix: {check.fix}"), WIDTH), "    "))


def _print_head(verdict: str, text: str, param: str = "") -> None:
    from rich.text import Text

    sign, style = MARKS[verdict]
    line = Text.assemble((f"{sign} ", style), printable(text), (f"  ({param})" if param else "", "dim"))
    console().print(line, soft_wrap=True)


def _cost(estimate: Estimate) -> Sequence[str]:
    parts = [f"{name} {_tokens(getattr(estimate, f'{name}_tokens'))}" for name in ("sampled", "scored", "trained")]
    lines = [f"tokens      {', '.join(parts)}"]
    stored = ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in estimate.bytes.items())
    lines += [f"bytes       {stored}"] if stored else []
    lines += [f"time        {duration(estimate.seconds)}"] if estimate.seconds is not None else []
    return lines


def _tokens(tokens: Tokens) -> str:
    at_most = f"at most {count(tokens.at_most)}"
    return at_most if tokens.expected is None else f"about {count(tokens.expected)} ({at_most})"
