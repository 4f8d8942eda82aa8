"""What happened in a job, as text: events, logs, metrics, evaluations, dead letters."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final

from stillhouse.cli import held_out
from stillhouse.cli.console import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    CliError,
    local_time,
    number,
    print_json,
    print_json_line,
    print_table,
    printable,
    say,
)
from stillhouse.client.client import Client
from stillhouse.core.schemas import Event, LogLine, MetricPoint

USUAL: Final = (
    "loss/reverse_kl/mean",
    "reward/mean",
    "loss/total",
    "lr",
    "mismatch/logprob_abs_mean",
    "staleness/max",
    "sample/tokens_per_s",
    "score/tokens_per_s",
    "train/tokens_per_s",
)
"""Metrics of a table unless others are named; those that a job has."""
RETRIED: Final = 1000
"""Letters in one request."""


def show_events(job_id: str, *, is_followed: bool, as_json: bool) -> None:
    """Events as lines; followed, until the job ends."""
    with Client() as client:
        source = client.jobs.stream_events if is_followed else client.jobs.events
        _print_lines(source(job_id), _event, as_json=as_json)


def _event(event: Event) -> str:
    level = "" if event.level == "info" else f"{event.level.upper()} "
    return f"{local_time(event.created_at)}  {event.type:<20} {level}{event.message}"


def show_logs(job_id: str, *, service: str, tail: int, is_followed: bool, as_json: bool) -> None:
    """Lines of the services' logs; followed, until the job ends."""
    with Client() as client:
        lines = client.jobs.logs(job_id, service=service, tail=tail, follow=is_followed)
        _print_lines(lines, _log_line, as_json=as_json)


def _log_line(line: LogLine) -> str:
    level = "" if line.level == "info" else f"{line.level.upper()} "
    exception = str(line.data.get("exception", ""))
    data = " ".join(f"{key}={value}" for key, value in line.data.items() if key != "exception")
    text = f"{local_time(line.created_at)}  {line.service}/{line.instance:<12} {level}{line.message}"
    return "\n".join(filter(None, (f"{text}  {data}".rstrip(), exception)))


def _print_lines(items: Iterable[Any], text_of: Any, *, as_json: bool) -> None:
    try:
        for item in items:
            if as_json:
                print_json_line(item)
            else:
                say(printable(text_of(item)))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def show_metrics(
    job_id: str, names: Sequence[str], *, step_from: int, step_to: int | None, points: int, as_json: bool
) -> None:
    """A row per point; `all` lists the names that there are."""
    if list(names) == ["all"]:
        _show_names(job_id, as_json=as_json)
        return
    with Client() as client:
        found = client.jobs.metrics(
            job_id, names=names, step_from=step_from, step_to=step_to, resolution=points if not as_json else None
        )
    if as_json:
        for point in found:
            print_json_line(point)
        return
    if not found:
        say(f"{job_id} has no finished step there")
        return
    shown = names or [name for name in USUAL if any(name in point.values for point in found)]
    unknown = [name for name in shown if not any(name in point.values for point in found)]
    if unknown:
        raise CliError(
            f"no point has the metric '{unknown[0]}'",
            fix=f"stillhouse metrics {job_id} --names all",
            exit_code=EXIT_USAGE,
        )
    print_table((">step", *(f">{name}" for name in shown)), [_point(point, shown) for point in found])


def _show_names(job_id: str, *, as_json: bool) -> None:
    with Client() as client:
        last = client.jobs.metrics(job_id, resolution=1)
    values = last[-1].values if last else {}
    if as_json:
        print_json(sorted(values))
    else:
        print_table(("metric", ">mean of all steps"), [(name, number(values[name])) for name in sorted(values)])


def _point(point: MetricPoint, names: Sequence[str]) -> list[str]:
    first = point.get("first_step") or point.step
    steps = str(point.step) if first == point.step else f"{first}-{point.step}"
    return [steps, *(number(point.values.get(name)) for name in names)]


def show_evaluations(job_id: str, *, as_json: bool) -> None:
    """A table of held-out measures."""
    with Client() as client:
        found = client.jobs.evaluations(job_id)
    if as_json:
        print_json(found)
    elif found:
        held_out.print_evaluations(found)
    else:
        say(f"{job_id} has no evaluation; a job with `evaluation.data` has")


def show_dead_letters(job_id: str, *, as_json: bool) -> None:
    """A table of the samples that were given up."""
    with Client() as client:
        letters = client.jobs.dead_letters(job_id)
    if as_json:
        print_json(letters)
        return
    if not letters:
        say(f"{job_id} has given up no sample")
        return
    rows = []
    for letter in letters:
        step = "-" if letter.step is None else str(letter.step)
        who = f"{letter.service} ({letter.attempts}x)"
        rows.append((letter.id, step, str(letter.row), letter.teacher, letter.reason, who, letter.message))
    print_table(("sample", ">step", ">row", "teacher", "reason", "given up by", "message"), rows)


def retry_dead_letters(job_id: str, ids: Sequence[str], *, as_json: bool) -> None:
    """Put samples on their queues again; exit code 1 if one could not be."""
    with Client() as client:
        wanted = list(ids) or [letter.id for letter in client.jobs.dead_letters(job_id)]
        answers = []
        for start in range(0, len(wanted), RETRIED):
            answers += client.jobs.retry_dead_letters(job_id, wanted[start : start + RETRIED])
    if as_json:
        print_json(answers)
    elif not answers:
        say(f"{job_id} has given up no sample")
    else:
        print_table(("sample", "", "why not"), [_retried(answer) for answer in answers])
    if not all(answer.is_retried for answer in answers):
        sys.exit(EXIT_FAILED)


def _retried(answer: Any) -> tuple[str, str, str]:
    return answer.id, "tried again" if answer.is_retried else "not tried", answer.message
