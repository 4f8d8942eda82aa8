"""`stillhouse report`: what a job was, cost and reached."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stillhouse.cli.console import EXIT_USAGE, CliError, print_facts, print_json, say, size
from stillhouse.client.client import Client


def report(job_id: str, output: Path | None, *, as_json: bool) -> None:
    """Print the report, or write it."""
    if output is not None and output.suffix not in (".html", ".json"):
        raise CliError(f"{output}: which form?", fix="end the name with .html or .json", exit_code=EXIT_USAGE)
    with Client() as client:
        if output is not None and output.suffix == ".html":
            _write(output, client.jobs.report_html(job_id))
            return
        found = client.jobs.report(job_id)
    if output is not None:
        _write(output, json.dumps(found, indent=1, ensure_ascii=False))
    elif as_json:
        print_json(found)
    else:
        print_facts(_facts(found))
        say(f"\nas a page: stillhouse report {job_id} -o report.html")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror}", exit_code=EXIT_USAGE) from None
    say(f"{path}: {size(path.stat().st_size)}")


def _facts(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in document.items():
        yield name, str(value)
