"""What `loss.per_teacher` does to a domain with short answers beside one with long ones: two jobs alike but for it.

The domains are toy tasks (examples/toys): `ends` answers with two letters, `echo` says a word six times. Each has a
teacher, an expert that began as the student does, and half of the prompts (`data.mix`); `echo` has ten times the
tokens. Held-out reverse KL and accuracy of each domain are taken every five steps, by the jobs themselves.

    python benchmarks/bench_balance.py [--steps 40] [--seeds 3] [--work runs/balance]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from run import deployment, follow
from toys import models, tasks

from stillhouse.client.client import Client
from stillhouse.core.models import ModelRegistry, inspect_model

DOMAINS: Final = {"ends": lambda word: word[0] + word[-1], "echo": lambda word: word * 6}
"""What each makes of a word."""
ROWS, HELD_OUT_ROWS = 400, 40
"""Of each domain."""


def rows(domain: str, count: int, seed: int, *, held_out: bool = False) -> list[dict[str, Any]]:
    """Rows of a domain, routed to its teacher."""
    words = [row["prompt"].partition(": ")[2] for row in tasks.rows("copy", count, seed, held_out=held_out)]
    return [
        {"prompt": f"{domain}: {word}", "answer": DOMAINS[domain](word), "verifier": "exact", "teacher": domain}
        for word in words
    ]


def make_models(folder: Path) -> None:
    """The student, which answers every other prompt as the other domain would, and an expert of each domain."""
    base = models.base(folder / "base", short=True)
    told = {"ends": "echo", "echo": "ends"}
    draw = random.Random(0)
    careless = [
        row | {"completion": DOMAINS[told[name] if draw.random() < 0.5 else name](row["prompt"].partition(": ")[2])}
        for name in DOMAINS
        for row in rows(name, 1000, seed=1)
    ]
    student = models.train(base, folder / "student", careless, steps=200)
    for name in DOMAINS:
        models.train(student, folder / name, rows(name, 1000, seed=2), steps=60)


def job(*, per_teacher: bool, seed: int, steps: int) -> dict[str, Any]:
    """One of the two jobs."""
    return {
        "name": f"balance per_teacher={per_teacher} seed={seed}",
        "seed": seed,
        "student": {"model": "student"},
        "teachers": {name: {"model": name} for name in DOMAINS},
        "stages": [
            {
                "data": {
                    "rows": [row for name in DOMAINS for row in rows(name, ROWS, seed=3)],
                    "mix": dict.fromkeys(DOMAINS, 1),
                },
                "sampling": {"max_tokens": 36},
                "loss": {"objective": "full_vocabulary", "per_teacher": per_teacher},
                "optimizer": {"lr": 3e-4, "warmup_steps": 2},
                "schedule": {"steps": steps, "prompts_per_step": 8},
            }
        ],
        "evaluation": {
            "data": {"rows": [row for name in DOMAINS for row in rows(name, HELD_OUT_ROWS, seed=4, held_out=True)]},
            "num_prompts": len(DOMAINS) * HELD_OUT_ROWS,
            "max_tokens": 36,
            "every_steps": 5,
            "show": 0,
        },
    }


def main() -> None:
    """Make the models, run the jobs, print what each domain came to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/balance"))
    options = parser.parse_args()
    folder, home = options.work.resolve() / "models", options.work.resolve() / "home"
    make_models(folder)
    results: list[dict[str, Any]] = []
    with deployment(home, {}):
        registry = ModelRegistry(home / "models.yaml")
        for name in ("student", *DOMAINS):
            registry.add(inspect_model(name, folder / name))
        entrance = json.loads((home / "client.json").read_text())
        with Client(entrance["url"], entrance["api_key"]) as client:
            for seed in range(options.seeds):
                for per_teacher in (False, True):
                    results.append(measure(client, per_teacher=per_teacher, seed=seed, steps=options.steps))
    (options.work / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def measure(client: Client, *, per_teacher: bool, seed: int, steps: int) -> dict[str, Any]:
    """Run a job; gives its held-out measures by step and domain."""
    ended = follow(client, client.jobs.create(job(per_teacher=per_teacher, seed=seed, steps=steps))["id"])
    if ended["status"] != "succeeded":
        raise SystemExit(f"job {ended['id']} {ended['status']}: {ended['error']}")
    shares = [point["values"]["tokens/share/ends"] for point in client.jobs.metrics(ended["id"])]
    found = {"per_teacher": per_teacher, "seed": seed, "share_of_ends": sum(shares) / len(shares)}
    found["evaluations"] = [
        {"step": each["step"], "by_teacher": each["by_teacher"]} for each in client.jobs.evaluations(ended["id"])
    ]
    print(f"per_teacher {per_teacher}, seed {seed}, ends has {found['share_of_ends']:.1%} of the tokens")
    for each in found["evaluations"]:
        parts = (f"{name} KL {m['reverse_kl']:.4f} right {m['accuracy']:.2f}" for name, m in each["by_teacher"].items())
        print(f"  step {each['step']:3}  {'   '.join(parts)}", flush=True)
    return found


if __name__ == "__main__":
    main()
