"""`stillhouse report`: what a job was, cost and reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from stillhouse.cli.console import (
    EXIT_USAGE,
    CliError,
    count,
    number,
    print_facts,
    print_json,
    print_table,
    printable,
    say,
    size,
    to_json,
)
from stillhouse.client.client import Client

SAMPLES: Final = 3
"""Held-out texts shown; the page has more."""


def report(job_id: str, output: Path | None, *, as_json: bool) -> None:
    """Print the report, or write it."""
    if output is not None and output.suffix not in (".html", ".json"):
        raise CliError(f"{output}: which form?", fix="end the name with .html or .json", exit_code=EXIT_USAGE)
    with Client() as client:
        if output is not None and output.suffix == ".html":
            _write(output, client.jobs.report_html(job_id))
            return
        found = client.jobs.report(job_id).to_dict()
    if output is not None:
        _write(output, to_json(found))
    elif as_json:
        print_json(found)
    else:
        _show(found)
        say(f"\nas a page: stillhouse report {job_id} -o report.html")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror}", exit_code=EXIT_USAGE) from None
    say(f"{path}: {size(path.stat().st_size)}")


def _show(found: Any) -> None:
    """The sentence, what was asked, before and after, what looks odd, and what was written."""
    say(printable(found["summary"]))
    say("")
    print_facts((label, str(text)) for label, text in found["asked"].items())
    if found["comparisons"]:
        say("\nheld out")
        rows = [
            (one["measure"], one["domain"] or "all", number(one["before"]), number(one["after"]))
            for one in found["comparisons"]
        ]
        print_table(("measure", "of", ">before", ">after"), rows)
    for check in found["preflight"]:
        say(printable(f"! {check['name']}: {check['message']}"))
    for warning in found["warnings"]:
        say(printable(f"! {warning}"))
    for shown in found["samples"][:SAMPLES]:
        say("")
        print_facts((name, shown[name].strip()) for name in ("prompt", "before", "after", "teacher"))
    if found["usage"]:
        say("")
        print_facts([("cost", ", ".join(f"{name} {count(value)}" for name, value in found["usage"].items() if value))])
