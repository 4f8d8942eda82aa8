"""Time and memory of the loss: ours, TRL 1.16.0's chunked loss, and the four matrix products that neither can avoid.

Time is that of forward and backward with gradients of hidden states and head, float32. In every round all contestants
run once, in a random order, so that a busy machine hurts them alike; ratios are taken within a round, and their median
counts. Memory is measured in a process of its own per case: the highest resident set (VmHWM) since the inputs exist,
less the inputs, and the allocator's own record, from which the growth with the rows is taken.

    python benchmarks/bench_loss.py                   # both vocabularies, 7 rounds; half an hour on two cores
    python benchmarks/bench_loss.py --quick           # small sizes, to see that it works
    python benchmarks/bench_loss.py --cpu-seconds     # one thread's processor time, for a machine that others use
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from environment import TRL

if __name__ == "__main__":
    TRL.enter()

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import loss_problem
import loss_report
import torch
from torch.profiler import ProfilerActivity, profile

BETAS = (0.0, 0.5, 1.0)
SIZES = {"small": (49_152, 576), "large": (151_936, 1_024)}
QUICK = {"small": (4_096, 64), "large": (8_192, 96)}
ROWS, MEMORY_ROWS = 2_048, (2_048, 4_096)
MEMORY_DEADLINE_S = 1_200
"""Of one process that measures memory."""


def measure_time(
    vocab: int, width: int, rows: int, rounds: int, clock: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """Seconds of each contestant in each round so far, after each round."""
    problem = loss_problem.Problem(rows, vocab, width)
    contestants = {"products": loss_problem.products(problem)}
    for beta in BETAS:
        contestants[f"ours {beta:g}"] = loss_problem.ours(problem, beta)
        contestants[f"trl {beta:g}"] = loss_problem.trl(problem, beta)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    loss_problem.ours(problem, 1.0)()  # threads and libraries start
    for round_ in range(rounds):
        order = list(contestants)
        random.Random(round_).shuffle(order)
        for name in order:
            problem.clear()
            start = clock()
            contestants[name]()
            seconds[name].append(clock() - start)
        print(f"V={vocab} round {round_ + 1}/{rounds}: load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
        yield {"vocab": vocab, "width": width, "rows": rows, "seconds": seconds, "ratios": ratios(seconds)}


def ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median, least and largest of the ratios within a round."""
    found = {}
    for beta in (f"{beta:g}" for beta in BETAS):
        for other in (f"trl {beta}", "products"):
            pairs = zip(seconds[f"ours {beta}"], seconds[other], strict=True)
            each = [ours / theirs for ours, theirs in pairs]
            found[f"ours {beta} / {other}"] = {
                "median": statistics.median(each),
                "min": min(each),
                "max": max(each),
            }
    return found


def measure_memory(who: str, beta: float, vocab: int, width: int, rows: int) -> dict[str, Any]:
    """Bytes above the inputs at the worst moment, in a process of its own."""
    case = json.dumps([who, beta, vocab, width, rows])
    run = subprocess.run(
        [sys.executable, __file__, "--memory-of", case],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=MEMORY_DEADLINE_S,
    )
    print(f"memory of {case}", file=sys.stderr, flush=True)
    return json.loads(run.stdout)


def memory_of(who: str, beta: float, vocab: int, width: int, rows: int) -> dict[str, Any]:
    """The measurement itself."""
    make = {"ours": loss_problem.ours, "trl": loss_problem.trl}[who]
    make(loss_problem.Problem(8, 256, width), beta)()  # threads and libraries start
    problem = loss_problem.Problem(rows, vocab, width)
    run = make(problem, beta)
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident set so far
    before = _resident_bytes("VmRSS")
    run()
    resident = _resident_bytes("VmHWM") - before
    problem.clear()
    allocated = allocated_bytes(run) if who == "ours" else None
    gradients = 4 * width * (rows + vocab)
    return {
        "who": who, "beta": beta, "vocab": vocab, "width": width, "rows": rows,
        "resident": resident - gradients, "allocated": None if allocated is None else allocated - gradients,
        "share_of_naive": (resident - gradients) / (24 * rows * vocab),
    }  # fmt: skip


def _resident_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}; memory is measured on Linux only")


def allocated_bytes(run: Any) -> int:
    """Most bytes that tensors held at once, by the allocator's record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = peak = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        found = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = found[0].split(":")[1].strip() if found else cpu
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "trl": TRL.packages[0], "date": datetime.date.today().isoformat(), "load": os.getloadavg()[0],
        "command": " ".join(["python", "benchmarks/bench_loss.py", *sys.argv[1:]]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's choice")
    parser.add_argument("--out", type=Path, default=None, help="results/NAME without ending")
    parser.add_argument("--memory-of", type=json.loads, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--cpu-seconds", action="store_true", help="processor time of one thread instead of time")
    parser.add_argument("--rows", type=int, default=0, help="rows where time is measured; 0 = 2,048")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_seconds else time.perf_counter
    if args.cpu_seconds:
        args.threads = 1
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of is not None:
        print(json.dumps(memory_of(*args.memory_of)))
        return
    result: dict[str, Any] = {"machine": machine(), "time": [], "memory": []}
    scale = 8 if args.quick else 1
    for size in args.sizes:
        vocab, width = (QUICK if args.quick else SIZES)[size]
        if not args.no_time:
            finished = list(result["time"])
            for so_far in measure_time(vocab, width, args.rows or ROWS // scale, args.rounds, clock):
                result["time"] = [*finished, so_far]
                loss_report.write(result, args.out)
        if not args.no_memory:
            cases = [("ours", beta, rows // scale) for beta in (1.0, 0.5) for rows in MEMORY_ROWS]
            for who, beta, rows in [*cases, ("trl", 1.0, MEMORY_ROWS[-1] // scale)]:
                result["memory"].append(measure_memory(who, beta, vocab, width, rows))
        loss_report.write(result, args.out)
    print(loss_report.text(result))


if __name__ == "__main__":
    main()
