"""Table, plot, JSON and a short page of what bench_loss.py measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TIME_TARGETS = {"trl 0": 0.45, "trl 1": 0.45, "trl 0.5": 0.5}
PRODUCT_TARGETS = {49_152: 1.35, 151_936: 1.25}
MEMORY_TARGET = 0.04
"""Of 24 T V bytes, what a plain implementation holds at T rows."""
SLOPE_TARGET = 1.1
"""Of 4 D bytes a row."""


def text(result: dict[str, Any]) -> str:
    """Tables in Markdown."""
    machine = result["machine"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}, "
        f"{machine['trl']}, float32, {machine['date']}, load before the start {machine['load']:.1f}.",
        "",
        f"    {machine['command']}",
        "",
    ]
    if result["time"]:
        lines += _times(result["time"])
    if result["memory"]:
        lines += ["", *_memory(result["memory"])]
    return "\n".join(lines) + "\n"


def _times(cases: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| V, d, rows | ratio (rounds) | median | spread | wanted | met |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases:
        for name, ratio in case["ratios"].items():
            other = name.split(" / ")[1]
            limit = PRODUCT_TARGETS.get(case["vocab"]) if other == "products" else TIME_TARGETS[other]
            met = "" if limit is None else "yes" if ratio["median"] <= limit else "NO"
            rounds = len(case["seconds"]["products"])
            lines.append(
                f"| {case['vocab']:,}, {case['width']:,}, {case['rows']:,} | {name} ({rounds}) | {ratio['median']:.3f} "
                f"| {ratio['min']:.3f} to {ratio['max']:.3f} | {limit or '-'} | {met} |"
            )
    lines += ["", "| V | seconds, median of the rounds |", "|---|---|"]
    for case in cases:
        medians = (f"{name} {sorted(s)[len(s) // 2]:.2f}" for name, s in case["seconds"].items())
        lines.append(f"| {case['vocab']:,} | {', '.join(medians)} |")
    return lines


def _memory(cases: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Beyond inputs and both gradients; the wanted bound is for ours at the larger number of rows.",
        "",
        "| V, d, rows | who, beta | peak MiB, resident | allocated | of 24 T V bytes | wanted | met |",
        "|---|---|---|---|---|---|---|",
    ]
    most_rows = max(case["rows"] for case in cases)
    for case in cases:
        judged = case["who"] == "ours" and case["rows"] == most_rows
        allocated = "-" if case["allocated"] is None else f"{case['allocated'] / 2**20:.1f}"
        met = "" if not judged else "yes" if case["share_of_naive"] <= MEMORY_TARGET else "NO"
        lines.append(
            f"| {case['vocab']:,}, {case['width']:,}, {case['rows']:,} | {case['who']} {case['beta']:g} "
            f"| {case['resident'] / 2**20:.1f} | {allocated} | {case['share_of_naive']:.4f} "
            f"| {MEMORY_TARGET if judged else '-'} | {met} |"
        )
    return [*lines, "", *_slopes(cases)]


def _slopes(cases: list[dict[str, Any]]) -> list[str]:
    """Growth of everything but the inputs, hidden gradient included, by the allocator's record."""
    lines = ["| V, d | beta | bytes per further row, of 4 d | wanted | met |", "|---|---|---|---|---|"]
    ours = [case for case in cases if case["who"] == "ours"]
    for few, many in ((a, b) for a in ours for b in ours if a["rows"] < b["rows"]):
        if (few["vocab"], few["beta"]) == (many["vocab"], many["beta"]):
            own = (many["allocated"] - few["allocated"]) / (many["rows"] - few["rows"])
            slope = 1 + own / (4 * few["width"])
            met = "yes" if slope <= SLOPE_TARGET else "NO"
            lines.append(
                f"| {few['vocab']:,}, {few['width']:,} | {few['beta']:g} | {slope:.3f} | {SLOPE_TARGET} | {met} |"
            )
    return lines


def write(result: dict[str, Any], out: Path | None) -> None:
    """`out`.json, .md and .png; nothing without `out`."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    page = "# The loss: time and memory\n\nMade by benchmarks/bench_loss.py; what is measured and how stands there.\n\n"
    plot = f"![time and memory]({out.name}.png)\n\n" if result["time"] else ""
    out.with_suffix(".md").write_text(page + plot + text(result))
    if result["time"]:
        _plot(result["time"], out.with_suffix(".png"))


def _plot(cases: list[dict[str, Any]], path: Path) -> None:
    import matplotlib  # slow to import, and the processes that measure memory do not draw

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(cases), figsize=(5.5 * len(cases), 4), squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        names = list(case["seconds"])
        colours = ["tab:gray" if n == "products" else "tab:blue" if n.startswith("ours") else "tab:red" for n in names]
        for place, (name, colour) in enumerate(zip(names, colours, strict=True)):
            seconds = sorted(case["seconds"][name])
            axis.bar(place, seconds[len(seconds) // 2], color=colour)
            axis.plot([place] * len(seconds), seconds, "k.", markersize=3)
        axis.set_xticks(range(len(names)), [name.replace(" ", "\nbeta ") for name in names], fontsize=7)
        axis.set_title(f"V = {case['vocab']:,}, d = {case['width']:,}, {case['rows']:,} rows", fontsize=9)
        axis.set_ylabel("seconds, forward and backward")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
