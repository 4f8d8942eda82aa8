"""python -m tests.chaos.sim --seeds 0:1000 [--plant BUG] [-v]"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections import Counter

from tests.chaos.sim.run import simulate


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs seeds of the simulation; one JSON line each, then a summary.")
    parser.add_argument("--seeds", default="0:100", help="FIRST:END, or one seed")
    parser.add_argument("--plant", default="", help="name of a bug of tests/chaos/bugs.py")
    parser.add_argument("-v", "--verbose", action="store_true", help="print every event")
    parser.add_argument("-q", "--quiet", action="store_true", help="print failing seeds only")
    options = parser.parse_args()
    plant = None
    if options.plant:
        from tests.chaos.sim.plants import PLANTS

        plant = PLANTS[options.plant]
    first, _, end = options.seeds.partition(":")
    seeds = range(int(first), int(end) if end else int(first) + 1)
    kills: Counter[str] = Counter()
    visits: Counter[str] = Counter()
    failed = []
    started = time.perf_counter()
    for seed in seeds:
        verdict = simulate(seed, plant, is_verbose=options.verbose)
        kills.update(verdict.kills)
        visits.update(verdict.visits)
        if options.verbose:
            print("\n".join(verdict.lines))
        if verdict.violations:
            failed.append(seed)
        if verdict.violations or not options.quiet:
            print(verdict.line(), flush=True)
        if seed % 20 == 0:
            gc.collect()
    seconds = time.perf_counter() - started
    print(f"{len(seeds)} seeds in {seconds:.1f} s ({len(seeds) / seconds:.1f}/s); kills {dict(kills)}")
    print(f"failpoints {dict(sorted(visits.items()))}")
    for seed in failed:
        bug = f" --plant {options.plant}" if options.plant else ""
        print(f"FAILED, again by: PYTHONHASHSEED=0 python -m tests.chaos.sim --seeds {seed}{bug} -v")
    print(f"violations in {len(failed)} of {len(seeds)} seeds")
    return 1 if failed else 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # sets of names have the same order in every run
        command = [sys.executable, "-m", "tests.chaos.sim", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "PYTHONHASHSEED": "0"})
    sys.exit(main())
