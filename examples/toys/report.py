"""What the runs of the examples leave behind: results.json, curves.png and tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

Json = dict[str, Any]

FEW_DOMAINS: Final = 4
"""Up to so many domains have a line each in `measured`; of more, it has the mean."""
KL: Final = "loss/reverse_kl"
COLOURS: Final = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#8C564B", "#999999", "#B8B000", "#5E3C99"),
)
"""Those of Okabe and Ito, told apart by colour-blind readers, and four more; black is the mean."""


def summarise(results: Json, facts: Json) -> Json:
    """What results.json holds: facts of the run, `measured` for readers in a hurry, and each job in full."""
    jobs = [_job(one) for one in results["jobs"]]
    return {
        "example": results["example"],
        **facts,
        "seed": jobs[0]["seed"],
        "seconds": round(sum(job["seconds"] for job in jobs), 1),
        "measured": [line for job in jobs for line in _measured(job, job["file"] if len(jobs) > 1 else "")],
        "complaints": results["complaints"],
        "jobs": jobs,
    }


def _job(one: Json) -> Json:
    job, domains = one["job"], {name: _normalised(share) for name, share in one["accuracy"].items()}
    scores = [share["normalised"] for share in domains.values() if "normalised" in share]
    start, end = (datetime.fromisoformat(job[name]) for name in ("created_at", "finished_at"))
    shown = ("step", "reverse_kl", "by_teacher", "accuracy", "num_tokens")
    return {
        "file": one["file"],
        "name": job["name"],
        "seed": job["spec"]["seed"],
        "steps": job["progress"]["step"],
        "seconds": round((end - start).total_seconds(), 1),
        "held_out": [{key: point[key] for key in shown if key in point} for point in one["evaluations"]],
        "domains": domains,
        **({"normalised": round(fmean(scores), 4)} if scores else {}),
        "costs": costs(job, one["metrics"]),
    }


def _normalised(share: Json) -> Json:
    """With the score of MOPD: 0 = the student at the start, 1 = the teacher (arXiv:2606.30406)."""
    rounded = {key: round(value, 4) for key, value in share.items()}
    room = share.get("teacher", share["before"]) - share["before"]
    return rounded | ({"normalised": round((share["after"] - share["before"]) / room, 4)} if room > 0 else {})


def costs(job: Json, metrics: list[Json]) -> Json:
    """What the teachers' side did."""
    usage, heads = job["usage"], [point["values"].get("heads/loaded") or 0.0 for point in metrics]
    scored = int(usage["scored_tokens"])
    return {
        "sampled_tokens": int(usage["sampled_tokens"]),
        "scored_tokens": scored,
        "model_loads": int(usage["model_loads"]),
        "model_loads_per_step": round(usage["model_loads"] / max(len(metrics), 1), 2),
        "head_loads_per_step": round(fmean(heads), 2) if heads else 0,
        "score_bytes_per_token": round(usage["score_bytes"] / scored, 1) if scored else 0,
    }


def _measured(job: Json, file: str) -> Iterator[Json]:
    def line(what: str, before: Any, after: Any) -> Json:
        known = {} if before is None else {"before": before}
        return {"what": f"{file}: {what}" if file else what, **known, "after": after}

    first, last = job["held_out"][0] if job["held_out"] else {}, job["held_out"][-1] if job["held_out"] else {}
    if first:
        yield line("held-out reverse KL, nats/token", round(first["reverse_kl"], 4), round(last["reverse_kl"], 4))
    domains = job["domains"]
    if len(domains) > FEW_DOMAINS:
        means = [round(fmean(share[key] for share in domains.values()), 4) for key in ("before", "after")]
        yield line(f"accuracy, mean of {len(domains)} domains", *means)
        yield line(
            "accuracy of the worst domain", *(min(s[key] for s in domains.values()) for key in ("before", "after"))
        )
    else:
        for name, share in domains.items():
            yield line(f"accuracy, {name}", share["before"], share["after"])
    if "normalised" in job:
        yield line("normalised score (0 = student, 1 = teachers)", None, job["normalised"])
    told = job["costs"]
    if told["model_loads"]:
        yield line("loads of teachers a step, while scoring", None, told["model_loads_per_step"])
    if told["head_loads_per_step"]:
        yield line("heads brought to the trainer's device a step", None, told["head_loads_per_step"])
    if told["scored_tokens"]:
        yield line("bytes of scores a token", None, told["score_bytes_per_token"])


def tables(summary: Json) -> list[Table]:
    """What the command shows at the end."""
    made = [_table("Measured", ("", "before", "after"), _rows(summary["measured"], ("what", "before", "after")))]
    for job in summary["jobs"]:
        rows = [{"name": name, **share} for name, share in job["domains"].items()]
        columns = ("name", "before", "after", "teacher", "normalised")
        made.append(_table(f"Right greedy answers, {job['file']}", columns, _rows(rows, columns)))
        made.append(_table(f"Costs, {job['file']}", ("", "value"), [(k, str(v)) for k, v in job["costs"].items()]))
    return made


def _rows(lines: Iterable[Json], keys: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [
        tuple(f"{v:.3f}" if isinstance(v := line.get(key, ""), float) else str(v) for key in keys) for line in lines
    ]


def _table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column("" if column == "name" else column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table


def draw(summary: Json, jobs: list[Json], target: Path) -> None:
    """A row of three panels for each job: held-out KL, KL of the training steps, right answers."""
    figure = Figure(figsize=(13, 4.2 * len(jobs)), dpi=90, layout="constrained")
    for one, job, axes in zip(jobs, summary["jobs"], figure.subplots(len(jobs), 3, squeeze=False), strict=True):
        _held_out(axes[0], job)
        _training(axes[1], one["metrics"])
        _answers(axes[2], job)
    figure.suptitle(f"{summary['command']}   {summary['machine']}, {summary['date']}", fontsize=11)
    figure.savefig(target, pil_kwargs={"optimize": True})


def _held_out(axes: Axes, job: Json) -> None:
    points = job["held_out"]
    if not points:
        axes.set_axis_off()
        return
    steps = [point["step"] for point in points]
    names = list(points[0].get("by_teacher", {}))
    for name, colour in zip(names, _colours(names), strict=True):
        values = [point["by_teacher"].get(name, {}).get("reverse_kl") for point in points]
        axes.plot(steps, values, "-", color=colour, label=name, linewidth=1.3)
    axes.plot(steps, [point["reverse_kl"] for point in points], "o-", color="black", label="all", linewidth=2)
    _tidy(axes, f"{job['file']}: held-out reverse KL", "step", "nats per token")


def _training(axes: Axes, metrics: list[Json]) -> None:
    names = sorted({key for point in metrics for key in point["values"] if key.startswith(f"{KL}/")} - {f"{KL}/mean"})
    steps = [point["step"] for point in metrics]
    for name, colour in zip(names, _colours(names), strict=True):
        values = [point["values"].get(name) for point in metrics]
        axes.plot(steps, values, color=colour, label=name.removeprefix(f"{KL}/"), linewidth=0.9, alpha=0.8)
    means = [point["values"].get(f"{KL}/mean") for point in metrics]
    if not any(mean is not None for mean in means):  # no stage asks a teacher
        axes.set_axis_off()
        return
    axes.plot(steps, means, color="black", label="all", linewidth=1.6)
    _tidy(axes, "reverse KL of the training steps", "step", "nats per token")


def _answers(axes: Axes, job: Json) -> None:
    """Shares of right answers: over the steps where they were judged in between, else before and after."""
    judged = [point for point in job["held_out"] if "accuracy" in point]
    if len(judged) <= 2:
        _bars(axes, job["domains"])
        return
    names = [name for name, part in judged[0]["by_teacher"].items() if "accuracy" in part]
    for name, colour in zip(names, _colours(names), strict=True):
        values = [point["by_teacher"][name]["accuracy"] for point in judged]
        axes.plot([point["step"] for point in judged], values, "o-", color=colour, label=name, linewidth=1.6)
        if "teacher" in job["domains"].get(name, {}):
            axes.axhline(job["domains"][name]["teacher"], color=colour, linewidth=0.9, linestyle=":")
    axes.set_ylim(0, 1.25)  # room for the legend above the curves
    _tidy(axes, "right greedy answers (dotted: teacher)", "step", "share")


def _bars(axes: Axes, domains: dict[str, Json]) -> None:
    bars = (("before", "#bbbbbb"), ("after", COLOURS[0]), ("teacher", COLOURS[4]))
    for offset, (key, colour) in enumerate(bars):
        places = [index + 0.27 * (offset - 1) for index in range(len(domains))]
        axes.bar(places, [share.get(key, 0.0) for share in domains.values()], 0.25, color=colour, label=key)
    axes.set_xticks(range(len(domains)), list(domains), rotation=30 if len(domains) > FEW_DOMAINS else 0)
    axes.set_ylim(0, 1.25)  # room for the legend above full bars
    _tidy(axes, "right greedy answers, held-out words", "", "share")


def _colours(names: Iterable[str]) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index, _ in enumerate(names)]


def _tidy(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False, ncols=2)
