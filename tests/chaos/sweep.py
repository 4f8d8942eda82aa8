"""`make chaos`: every failpoint with every action, then random kills, on real processes, judged by the oracle.

    python -m tests.chaos.sweep [--seed N] [--kills N] [--cells all|diagonal|none] [--points PREFIX] ...

The seed is printed first; a run with the same seed has the same cells in the same order. Each cell is one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.chaos.cells import Cell, all_cells, diagonal, run_cell
from tests.chaos.harness import Chaos, deployment
from tests.chaos.kills import random_kills

TRIES = 3
"""Runs of a cell whose point is not reached: whether a drain or a retry comes by is a matter of time."""


def run_cells(chaos: Chaos, cells: Sequence[tuple[str, str]], seed: int, results: Path) -> list[Cell]:
    """Run cells one after the other; each is appended to `results` as it ends."""
    done = []
    for point, action in cells:
        started = time.monotonic()
        for attempt in range(TRIES):
            cell = run_cell(chaos, point, action, seed + 1_000_003 * attempt)
            if cell.is_hit or cell.violations:
                break
        done.append(cell)
        write(results, cell, round(time.monotonic() - started, 1))
    return done


def write(results: Path, cell: Cell, seconds: float) -> None:
    """Append a cell to the results and say how it went."""
    append(results, {**cell.as_json(), "seconds": seconds})
    verdict = "VIOLATED" if cell.violations else "ok" if cell.is_hit else "NOT REACHED"
    recovery = f"recovery {cell.recovery_s:.1f} s" if cell.recovery_s is not None else ""
    print(f"{cell.point:28} {cell.action:6} {verdict:12} {cell.status:10} {recovery:16} {seconds:.1f} s", flush=True)
    for violation in cell.violations:
        print(f"    {violation}", flush=True)


def append(results: Path, line: dict[str, Any]) -> None:
    with results.open("a") as stream:
        stream.write(json.dumps({"commit": commit(), **line}) + "\n")


def commit() -> str:
    """Short name of the code under test; a copy without its history is told by CHAOS_COMMIT."""
    if given := os.environ.get("CHAOS_COMMIT"):
        return given
    shown = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return shown.stdout.strip()


def table(cells: Sequence[Cell]) -> str:
    """Cells, reached, violations and recovery times by service and by action."""
    lines = [f"{'':18} cells reached violated   recovery s: p50   p95   max"]
    services = sorted({cell.point.partition(".")[0] for cell in cells})
    groups: list[tuple[str, list[Cell]]] = [
        (service, [cell for cell in cells if cell.point.partition(".")[0] == service]) for service in services
    ]
    groups += [(action, [cell for cell in cells if cell.action == action]) for action in ("kill", "stop", "raise")]
    for name, group in [*groups, ("all", list(cells))]:
        times = sorted(cell.recovery_s for cell in group if cell.recovery_s is not None)
        shown = f"{quantile(times, 0.5):5.1f} {quantile(times, 0.95):5.1f} {times[-1]:5.1f}" if times else ""
        reached = sum(cell.is_hit for cell in group)
        violated = sum(bool(cell.violations) for cell in group)
        lines.append(f"{name:18} {len(group):5} {reached:7} {violated:8} {'':16}{shown}")
    return "\n".join(lines)


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    if len(ordered) < 2:
        return ordered[0]
    return statistics.quantiles(ordered, n=100, method="inclusive")[round(100 * share) - 1]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    env: Any = os.environ.get
    parser.add_argument("--seed", type=int, default=int(env("CHAOS_SEED") or random.SystemRandom().randrange(10**6)))
    parser.add_argument("--kills", type=int, default=int(env("CHAOS_KILLS") or 50), help="random kills after the cells")
    parser.add_argument("--cells", choices=("all", "diagonal", "none"), default="all")
    parser.add_argument("--points", default="", help="only points that begin so; several with commas")
    parser.add_argument("--part", default="1/1", help="run part i of n of the cells: 2/3")
    parser.add_argument("--out", type=Path, default=env("CHAOS_RESULTS") and Path(env("CHAOS_RESULTS")))
    parser.add_argument("--home", type=Path, help="folder of the deployment; kept. Default: a temporary one")
    options = parser.parse_args(arguments)
    print(f"seed {options.seed}, commit {commit()}", flush=True)
    home = options.home or Path(tempfile.mkdtemp(prefix="chaos."))
    results = options.out or Path(tempfile.gettempdir()) / f"chaos-{options.seed}.jsonl"

    chosen = {"all": all_cells, "diagonal": diagonal, "none": lambda _: []}[options.cells](options.seed)
    chosen = [cell for cell in chosen if cell[0].startswith(tuple(options.points.split(",")))]
    part, parts = (int(number) for number in options.part.split("/"))
    with deployment(home) as chaos:
        cells = run_cells(chaos, chosen[part - 1 :: parts], options.seed, results)
        kills = random_kills(chaos, options.kills, options.seed) if options.kills else None
    if cells:
        print(table(cells))
    bad = [cell for cell in cells if cell.is_bad]
    if kills:
        print(kills.text())
        append(results, {"point": "random kills", **asdict(kills)})
    print(f"seed {options.seed}, results in {results}")
    if options.home is None and not bad and not (kills and kills.violations):
        shutil.rmtree(home, ignore_errors=True)
    else:
        print(f"artifacts and logs in {home}")
    return 1 if bad or (kills and kills.violations) else 0


if __name__ == "__main__":
    sys.exit(main())
