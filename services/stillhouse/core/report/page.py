"""The report as one page of HTML that needs nothing else: light and dark, readable on a phone and on paper.

Everything that comes from users, models or services is escaped here, where it enters the page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Final

from stillhouse.core.report.charts import chart
from stillhouse.core.report.style import STYLE
from stillhouse.core.schemas.report import Comparison, Curve, Report, Shown

PANELS: Final = (
    ("Held-out reverse KL", "nats per token", "held_out/reverse_kl"),
    ("Held-out accuracy", "", "held_out/accuracy"),
    ("Held-out pass@k", "", "held_out/pass@"),
    ("Reverse KL(student || teacher) in training", "nats per token", "loss/reverse_kl"),
    ("Loss", "", "loss/total"),
    ("Reward", "mean of the step", "reward/mean"),
    ("Completion length", "tokens", "completion/length_mean"),
    ("Truncated completions", "share", "completion/truncated_fraction"),
    ("Throughput", "tokens per second", "tokens_per_s"),
    ("Staleness", "policy versions", "staleness"),
    ("Sampler-trainer mismatch", "mean |difference|, nats", "mismatch/logprob_abs_mean"),
    ("Student's entropy", "nats", "student/entropy"),
    ("Learning rate", "", "lr"),
)
"""(title, unit, what the names of its curves contain)."""
MEASURES: Final = {
    "reverse_kl": ("reverse KL to the teacher, nats per token", "less"),
    "accuracy": ("accuracy (greedy, by the verifier)", "more"),
    "teacher_nll_greedy": ("teacher's NLL of greedy texts, nats per token", "less"),
    "repeated_4grams": ("repeated 4-grams in greedy texts", "less"),
    "mean_length": ("mean length of sampled texts, tokens", ""),
    "truncated": ("truncated sampled texts, share", "less"),
    "ended": ("sampled texts that end by themselves, share", "more"),
}


def page(report: Report) -> str:
    """The page."""
    title = report.name or report.job_id
    parts = [
        _head(report, title),
        _section("What was asked", _pairs(report.asked)),
        _section("Before and after, on held-out prompts", _table(report.comparisons)),
        _section("Curves", _curves(report.curves)),
        _section("What it writes", "".join(map(_shown, report.samples))),
        _section("Warnings", _warnings(report)),
        _section("Usage and time", _usage(report)),
        _section(
            "How to load the student", f"<pre>{escape(report.load)}</pre>" if report.status == "succeeded" else ""
        ),
        _spec(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} - Stillhouse</title><style>{STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _head(report: Report, title: str) -> str:
    times = [f"created {_time(report.created_at)}"]
    if report.started_at and report.finished_at:
        times.append(f"ran {_duration(report.finished_at - report.started_at)}")
    best = report.best_checkpoint
    if best:
        times.append(
            f"best checkpoint {best['checkpoint']} (step {best['step']}, {best['metric']} {best['value']:.4g})"
        )
    early = report.early_stop
    if early:
        times.append(f"ended early after step {early['stop_step']}: {early['reason']} of {early['metric']}")
    message = f'<p class="bad">{escape(report.status_message)}</p>' if report.status_message else ""
    return (
        f'<h1>{escape(title)} <span class="badge {escape(report.status)}">{escape(report.status)}</span></h1>'
        f'<div class="dim">{" &middot; ".join(map(escape, [report.job_id, *times]))}</div>'
        f'<p class="lead">{escape(report.summary)}</p>{message}'
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _pairs(pairs: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in pairs.items())
    return f"<table>{rows}</table>" if rows else ""


def _table(compared: Sequence[Comparison]) -> str:
    if not compared:
        return ""
    has_domains = any(each.domain for each in compared)
    order = list(dict.fromkeys(each.measure for each in compared))
    rows = []
    for each in sorted(compared, key=lambda each: order.index(each.measure)):
        text, better = MEASURES.get(each.measure, (each.measure, "more" if each.measure.startswith("pass@") else ""))
        change = each.after - each.before
        is_better = change < 0 if better == "less" else change > 0
        kind = "" if not better or abs(change) < 1e-12 else "good" if is_better else "bad"
        domain = f"<td>{escape(each.domain or 'all')}</td>" if has_domains else ""
        rows.append(
            f'<tr><td>{escape(text)}</td>{domain}<td class="n">{each.before:.4g}</td>'
            f'<td class="n">{each.after:.4g}</td><td class="n {kind}">{change:+.3g}</td></tr>'
        )
    domain = "<th>domain</th>" if has_domains else ""
    head = (
        f'<tr><th>measure</th>{domain}<th class="n">before</th><th class="n">after</th><th class="n">change</th></tr>'
    )
    return f"<table>{head}{''.join(rows)}</table>"


def _curves(curves: Sequence[Curve]) -> str:
    figures = []
    for title, unit, part in PANELS:
        found = {_label(curve.name, part): curve for curve in curves if _is_of(curve.name, part)}
        if any(len(curve.steps) > 1 for curve in found.values()):
            figures.append(chart(title, unit, found))
    return f'<div class="grid">{"".join(figures)}</div>' if any(figures) else ""


def _is_of(name: str, part: str) -> bool:
    if part == "tokens_per_s":
        return name.endswith(part)
    return name == part or name.startswith((f"{part}/", part if part.endswith("@") else f"{part}/"))


def _label(name: str, part: str) -> str:
    rest = name.removesuffix("/tokens_per_s") if part == "tokens_per_s" else name.removeprefix(part).lstrip("/")
    return (f"pass@{rest}" if part.endswith("@") else rest) or "all"


def _shown(shown: Shown) -> str:
    texts = {"student before": shown.before, "student after": shown.after, "teacher": shown.teacher}
    cells = "".join(
        f'<div><b>{label}</b><div class="text">{escape(text) or "<span class=dim>(nothing)</span>"}</div></div>'
        for label, text in texts.items()
    )
    return f'<div class="prompt text">{escape(shown.prompt)}</div><div class="trio">{cells}</div>'


def _warnings(report: Report) -> str:
    checks = [f"pre-flight, {check['name']}: {check['message']} {check['fix']}" for check in report.preflight]
    items = "".join(f"<li>{escape(text)}</li>" for text in [*checks, *report.warnings])
    return f"<ul>{items}</ul>" if items else ""


def _usage(report: Report) -> str:
    rows = {name.replace("_", " "): f"{value:,.6g}" for name, value in report.usage.items() if value}
    total = sum(report.seconds.values())
    for phase, value in sorted(report.seconds.items(), key=lambda item: -item[1]):
        if value:
            rows[f"time: {phase}"] = f"{_duration(value)} ({value / total:.0%} of the steps)"
    return _pairs(rows)


def _spec(report: Report) -> str:
    text = json.dumps(report.spec, indent=2, ensure_ascii=False)
    return (
        f"<details><summary>The whole job, as accepted (without its rows)</summary><pre>{escape(text)}</pre></details>"
    )


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest:.0f} s" if minutes else f"{rest:.1f} s"
