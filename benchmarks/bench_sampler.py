"""Tokens per second of the sampler's transformers engine, next to `model.generate` of transformers, interleaved.

Both write the same requests: prompts of the quickstart, some samples of each, lengths drawn from a log-normal
distribution (ragged, as of a model that stops by itself) or all alike. `generate` gets batches of as many rows as the
engine writes at once, in order of arrival, padded on the left; a row that has its length is done, the batch ends with
its longest. It keeps no log-probabilities; the engine does. Tokens that were asked for count, nothing else.

    python benchmarks/bench_sampler.py MODEL                  # a folder; see examples/quickstart/prepare_smollm2.py
    python benchmarks/bench_sampler.py MODEL --cpu-seconds    # one thread's processor time, on a machine others use
    python benchmarks/bench_sampler.py tiny --rounds 1        # a random model, to see that it works
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
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from stillhouse.core.models import inspect_model
from stillhouse.core.worker import ComputeThread
from stillhouse.sampler.engines.base import SampleRequest
from stillhouse.sampler.engines.transformers import TransformersEngine

ROOT = Path(__file__).resolve().parent.parent
WANTED = 2.0
"""Ragged lengths: the engine's tokens per second over those of `generate`."""


def make_requests(folder: Path, args: argparse.Namespace, lengths: str) -> list[SampleRequest]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line)["prompt"] for line in (ROOT / "examples/quickstart/prompts.jsonl").open()]
    draws = np.random.default_rng(0)
    requests = []
    for number, text in enumerate(texts[: args.prompts]):
        messages = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for sample in range(args.samples):
            ragged = int(np.clip(draws.lognormal(np.log(args.mean) - 0.5, 1.0), 4, 4 * args.mean))
            count = ragged if lengths == "ragged" else args.mean
            requests.append(SampleRequest(f"{number}/{sample}", list(prompt), count, len(requests)))
    return requests


class Engine:
    """The engine as a sampler uses it, without end tokens: lengths are given."""

    def __init__(self, folder: Path, rows: int, threads: int) -> None:
        entry = inspect_model("model", folder)
        self._compute = ComputeThread("bench")
        self._engine = TransformersEngine(
            entry, "float32", self._compute, max_sequences=rows, threads=threads, device="cpu"
        )
        self._engine._decoder._model.end_ids = frozenset()

    def __call__(self, requests: Sequence[SampleRequest]) -> int:
        return asyncio.run(self._write(requests))

    async def _write(self, requests: Sequence[SampleRequest]) -> int:
        written = 0
        async for piece in self._engine.generate(requests):
            written += len(piece.ids)
        return written


class Lengths(StoppingCriteria):
    """Ends each row at its own length."""

    def __init__(self, prompt: int, counts: Sequence[int]) -> None:
        self._ends = torch.tensor([prompt + count for count in counts])

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return self._ends <= input_ids.shape[1]


class Generate:
    """`model.generate` on batches."""

    def __init__(self, folder: Path, rows: int) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._model.generation_config.eos_token_id = None
        self._rows = rows

    @torch.inference_mode()
    def __call__(self, requests: Sequence[SampleRequest]) -> int:
        for start in range(0, len(requests), self._rows):
            batch = requests[start : start + self._rows]
            longest = max(len(request.prompt_ids) for request in batch)
            padded = [[0] * (longest - len(request.prompt_ids)) + request.prompt_ids for request in batch]
            mask = [[0] * (longest - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in batch]
            counts = [request.max_tokens for request in batch]
            self._model.generate(
                input_ids=torch.tensor(padded), attention_mask=torch.tensor(mask), do_sample=True, temperature=1.0,
                top_k=0, top_p=1.0, max_new_tokens=max(counts), pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([Lengths(longest, counts)]),
            )  # fmt: skip
        return sum(request.max_tokens for request in requests)


def measure(
    contestants: dict[str, Callable[[Sequence[SampleRequest]], int]],
    requests: Sequence[SampleRequest],
    rounds: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Tokens per second in each round, and the ratio within it."""
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(rounds):
        order = list(contestants)
        random.Random(round_).shuffle(order)
        for name in order:
            started = clock()
            written = contestants[name](requests)
            speeds[name].append(written / (clock() - started))
        print(f"round {round_ + 1}/{rounds}: load {os.getloadavg()[0]:.1f}, {speeds}", file=sys.stderr, flush=True)
    each = [engine / generate for engine, generate in zip(speeds["engine"], speeds["generate"], strict=True)]
    counts = [request.max_tokens for request in requests]
    return {
        "requests": len(requests), "tokens": sum(counts), "mean": statistics.mean(counts), "longest": max(counts),
        "tokens_per_s": speeds, "ratio": statistics.median(each), "spread": [min(each), max(each)],
    }  # fmt: skip


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        found = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = found[0].split(":")[1].strip() if found else cpu
    return {
        "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "date": datetime.date.today().isoformat(), "load": os.getloadavg()[0], "model": Path(args.model).name,
        "sequences": args.sequences, "samples per prompt": args.samples,
        "clock": "processor time" if args.cpu_seconds else "time",
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    lines = [
        "# The sampler: tokens per second\n",
        "Made by benchmarks/bench_sampler.py; what is measured stands there.\n",
    ]
    lines += [", ".join(f"{key} {value}" for key, value in result["machine"].items()) + "\n"]
    lines += ["| lengths | tokens, mean, longest | engine | generate | ratio | spread |", "|---|---|---|---|---|---|"]
    for lengths, row in result["cases"].items():
        engine, generate = (statistics.median(row["tokens_per_s"][name]) for name in ("engine", "generate"))
        lines.append(
            f"| {lengths} | {row['tokens']:,}, {row['mean']:.0f}, {row['longest']} | {engine:.1f} | {generate:.1f} "
            f"| {row['ratio']:.2f} | {row['spread'][0]:.2f} to {row['spread'][1]:.2f} |"
        )
    lines.append(f"\nWanted for ragged lengths: {WANTED:g}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="folder of a model, or tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=4, help="per prompt")
    parser.add_argument("--mean", type=int, default=64, help="mean length, tokens")
    parser.add_argument("--sequences", type=int, default=32, help="written at once")
    parser.add_argument("--lengths", nargs="+", choices=["ragged", "equal"], default=["ragged", "equal"])
    parser.add_argument("--threads", type=int, default=0, help="0 = torch's choice")
    parser.add_argument("--cpu-seconds", action="store_true", help="processor time of one thread instead of time")
    parser.add_argument("--out", type=Path, default=None, help="results/NAME without ending")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_seconds else time.perf_counter
    if threads := 1 if args.cpu_seconds else args.threads:
        torch.set_num_threads(threads)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.model)
        if args.model == "tiny":
            sys.path.insert(0, str(ROOT))
            from tests.tiny import make_tiny_model

            folder = make_tiny_model(Path(temporary) / "tiny", max_position_embeddings=1024)
        contestants = {"engine": Engine(folder, args.sequences, threads), "generate": Generate(folder, args.sequences)}
        result: dict[str, Any] = {"machine": machine(args), "cases": {}}
        for contestant in contestants.values():  # threads and libraries start
            contestant(make_requests(folder, args, "equal")[:2])
        for lengths in args.lengths:
            requests = make_requests(folder, args, lengths)
            result["cases"][lengths] = measure(contestants, requests, args.rounds, clock)
            if args.out is not None:
                args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
                args.out.with_suffix(".md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
