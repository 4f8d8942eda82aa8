"""Tokens per second of a teacher, next to a bare batched forward pass of the same model on the same batches.

Ours is everything a teacher does but the queue server: rollouts as serialized messages in, scores as serialized
messages out, through the compute thread, with all checks and accounts; the score cache is off. Bare is what nobody can
do without: padded ids that are there already, the base model, the head on completion rows only, all rows of a batch in
one product, log-softmax in float32, the numbers asked for on the host. Batches are the same: planned by length within
`--budget` padded tokens. Both run once a round, in a random order; ratios are taken within a round. Completion tokens
count, nothing else. Token ids are random, which costs what text costs.

    python benchmarks/bench_teacher.py MODEL                  # a folder; see examples/quickstart/prepare_smollm2.py
    python benchmarks/bench_teacher.py MODEL --cpu-seconds    # processor time of one thread, on a machine others use
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from stillhouse.core.models import ModelRegistry, inspect_model
from stillhouse.core.queue.streams import Scope
from stillhouse.core.tensors import ids_tensor
from stillhouse.core.worker import ComputeThread
from stillhouse.teacher.batching import plan_batches
from stillhouse.teacher.blobstore import BlobStore
from stillhouse.teacher.cache import ScoreCache
from stillhouse.teacher.engines.base import Scored
from stillhouse.teacher.engines.transformers import TransformersEngine
from stillhouse.teacher.messages import blob_key, make_item, make_score
from stillhouse.teacher.pool import ModelPool, Resident
from stillhouse.teacher.scoring import Scorer
from stillhouse.v1 import rollout_pb2 as pb

ROOT = Path(__file__).resolve().parent.parent
WANTED = 0.93
"""Our tokens per second over those of the bare forward pass."""
KINDS = {"sampled": pb.SCORE_KIND_SAMPLED, "hidden": pb.SCORE_KIND_HIDDEN}


def make_rollouts(args: argparse.Namespace, vocab_size: int, kind: pb.ScoreKind) -> list[bytes]:
    """Groups of samples with ragged lengths: log-normal, as of a model that stops by itself."""
    draws, rollouts = np.random.default_rng(0), []
    for group in range(args.prompts):
        prompt = ids_tensor(draws.integers(10, vocab_size, draws.integers(20, 80)))
        for index in range(args.samples):
            length = int(np.clip(draws.lognormal(np.log(args.mean) - 0.5, 1.0), 4, 4 * args.mean))
            completion = ids_tensor(draws.integers(10, vocab_size, length))
            fields: dict[str, Any] = {"prompt_ids": prompt, "completion_ids": completion}
            rollout = pb.Rollout(sample_id=f"{group}/{index}", score=pb.ScoreSpec(kind=kind), **fields)
            rollouts.append(rollout.SerializeToString())
    return rollouts


class Bare:
    """The forward pass alone."""

    def __init__(self, folder: Path, rollouts: Sequence[bytes], budget: int) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        items = [make_item(pb.Rollout.FromString(rollout)) for rollout in rollouts]
        self.num_tokens = sum(len(item.completion_ids) for item in items)
        self._is_hidden = items[0].kind == pb.SCORE_KIND_HIDDEN
        self._batches = []
        for batch in plan_batches([item.length for item in items], budget):
            ids = torch.zeros(len(batch), max(items[index].length for index in batch), dtype=torch.long)
            places = torch.zeros_like(ids, dtype=torch.bool)
            for row, index in enumerate(batch):
                item = items[index]
                ids[row, : item.length] = torch.tensor([*item.prompt_ids, *item.completion_ids])
                places[row, len(item.prompt_ids) - 1 : item.length - 1] = True
            wanted = torch.tensor([token for index in batch for token in items[index].completion_ids])
            self._batches.append((ids, places, wanted))

    @torch.inference_mode()
    def __call__(self) -> np.ndarray:
        found = []
        for ids, places, wanted in self._batches:
            hidden = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state[places]
            logits = torch.nn.functional.linear(hidden, self._model.get_output_embeddings().weight)
            found.append(torch.log_softmax(logits, -1).gather(1, wanted[:, None])[:, 0].numpy())
            if self._is_hidden:
                hidden.half().numpy()
        return np.sort(np.concatenate(found))


class Ours:
    """A teacher without its queue."""

    def __init__(self, folder: Path, home: Path, rollouts: Sequence[bytes], budget: int) -> None:
        registry = ModelRegistry(home / "models.yaml")
        registry.add(inspect_model("teacher", folder))
        pool = ModelPool(registry, lambda entry, dtype: TransformersEngine(entry, dtype, threads=0), 1 << 40)
        self._scorer = Scorer(ComputeThread("bench"), pool, ScoreCache(0))
        self._blobs = BlobStore("bench", 1 << 34, home)
        self._rollouts, self._budget = rollouts, budget
        self._resident: Resident | None = None

    def __call__(self) -> np.ndarray:
        return asyncio.run(self._score())

    async def _score(self) -> np.ndarray:
        rollouts = [pb.Rollout.FromString(rollout) for rollout in self._rollouts]
        resident, _ = await self._scorer.model(pb.TeacherTask(model="teacher"))
        await self._scorer.head(resident)
        items, found = [make_item(rollout) for rollout in rollouts], []
        async for batch in self._scorer.batches(resident, items, budget=self._budget, job_id="bench"):
            for index, result in zip(batch.indices, batch.results, strict=True):
                assert isinstance(result, Scored), result
                scope, rollout = Scope("bench", 1), rollouts[index]
                score = make_score(rollout, items[index], result, batch, scope, self._blobs, "bench")
                score.SerializeToString()
                self._blobs.release(blob_key(score))
                found.append(result.teacher_logprobs)
        return np.sort(np.concatenate(found))


def measure(args: argparse.Namespace, folder: Path, kind: str, clock: Callable[[], float]) -> dict[str, Any]:
    entry = inspect_model("teacher", folder)
    rollouts = make_rollouts(args, entry.tokenizer_size, KINDS[kind])
    bare = Bare(folder, rollouts, args.budget)
    with tempfile.TemporaryDirectory() as home:
        contestants = {"bare": bare, "ours": Ours(folder, Path(home), rollouts, args.budget)}
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        answers = {name: run() for name, run in contestants.items()}  # libraries start, models load
        np.testing.assert_allclose(answers["ours"], answers["bare"], atol=2e-3)
        for round_ in range(args.rounds):
            for name in random.Random(round_).sample(list(contestants), 2):
                start = clock()
                contestants[name]()
                seconds[name].append(clock() - start)
            ratio = seconds["bare"][-1] / seconds["ours"][-1]
            done = f"{kind} round {round_ + 1}/{args.rounds}: ours / bare {ratio:.3f}, load {os.getloadavg()[0]:.1f}"
            print(done, file=sys.stderr, flush=True)
    ratios = [theirs / ours for theirs, ours in zip(seconds["bare"], seconds["ours"], strict=True)]
    return {
        "kind": kind,
        "samples": len(rollouts),
        "completion_tokens": bare.num_tokens,
        "seconds": seconds,
        "tokens_per_s": {name: bare.num_tokens / statistics.median(times) for name, times in seconds.items()},
        "ratio": {"median": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)},
    }


def table(found: dict[str, Any]) -> str:
    lines = [
        f"# Teacher, {found['date']}",
        "",
        f"`{found['command']}`: {found['machine']}, threads: {found['threads']}, load {found['load']:.1f}, "
        f"torch {found['torch']}, {'processor' if found['cpu_seconds'] else 'wall'} time. What is compared: see "
        "[bench_teacher.py](../bench_teacher.py).",
        "",
        "| kind | samples | completion tokens | bare, tokens/s | ours, tokens/s | ours / bare (least to largest) |",
        "|---|---|---|---|---|---|",
    ]
    for case in found["cases"]:
        speed, ratio = case["tokens_per_s"], case["ratio"]
        spread = f"{ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['largest']:.3f})"
        lines.append(
            f"| {case['kind']} | {case['samples']} | {case['completion_tokens']} | {speed['bare']:.1f} | "
            f"{speed['ours']:.1f} | {spread} |"
        )
    return "\n".join([*lines, "", f"Wanted: {WANTED} at least."]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4, help="of each prompt")
    parser.add_argument("--mean", type=int, default=64, help="mean length of the completions")
    parser.add_argument("--budget", type=int, default=2048, help="padded tokens of a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-seconds", action="store_true")
    parser.add_argument("--out", type=Path, help="results/NAME without ending: writes NAME.json and NAME.md")
    args = parser.parse_args()
    logging.disable_progress_bar()
    if args.cpu_seconds:
        torch.set_num_threads(1)
    clock = time.process_time if args.cpu_seconds else time.perf_counter
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["bench_teacher.py", args.model.name, *sys.argv[2:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "cpu_seconds": args.cpu_seconds,
        "cases": [measure(args, args.model, kind, clock) for kind in KINDS],
    }
    print(table(found))
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(found))
    return 0 if all(case["ratio"]["median"] >= WANTED for case in found["cases"]) else 1


if __name__ == "__main__":
    sys.exit(main())
