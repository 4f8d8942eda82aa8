"""Completions that vLLM writes, as the sampler sees them. No vLLM here."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from stillhouse.sampler.engines.base import Piece, SampleRequest, failed
from stillhouse.sampler.engines.vllm_wire import unpack_notes

ENDS: Final = ("stop", "length", "abort")
"""vLLM's finish reasons that are ours, too."""


class Clock:
    """Time shared out evenly among the completions that run at the moment."""

    def __init__(self) -> None:
        self._share_s = 0.0
        self._num_running = 0
        self._seen = time.perf_counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        """One more completion runs."""
        self.read()
        self._num_running += 1
        try:
            yield
        finally:
            self.read()
            self._num_running -= 1

    def read(self) -> float:
        """Seconds that a completion would have got that ran from the start."""
        now = time.perf_counter()
        self._share_s += (now - self._seen) / max(1, self._num_running)
        self._seen = now
        return self._share_s


class Row:
    """One completion: turns what vLLM reports, all tokens so far each time, into pieces."""

    def __init__(self, request: SampleRequest, name: str, clock: Clock) -> None:
        self.request = request
        self.name = name
        """What vLLM calls it."""
        self.is_aborted = False
        self.is_inside = False
        """vLLM has it."""
        self.is_turned_away = False
        """What vLLM reports is to be dropped; it enters again."""
        self.num_seen = 0
        """Tokens so far."""
        self._clock = clock
        self._read_s = clock.read()

    def take(self, output: Any) -> list[Piece]:
        """Pieces of the tokens that are new in a `RequestOutput`, one per set of weights; the last may be the end."""
        part = output.outputs[0]
        first, last = self.num_seen, len(part.token_ids)
        self.num_seen = last
        end = part.finish_reason or ""
        if not end and self.is_aborted:
            end = "abort"
        pieces = self._pieces(part.logprobs, first, last) if last > first else []
        for piece in pieces:
            if not np.isfinite(piece.logprobs).all():
                return [
                    failed(self.request, "non_finite", f"log-probabilities {piece.logprobs}: the weights are broken")
                ]
        if end and end not in ENDS:
            return [failed(self.request, "engine_error", f"vLLM ended it with '{end}' after {last} tokens")]
        if end:
            pieces = pieces or [Piece(self.request.key, [], [])]
            pieces[-1] = replace(pieces[-1], finish_reason=end)
        return pieces

    def _pieces(self, flat: Any, first: int, last: int) -> list[Piece]:
        """Tokens `first` to `last` of vLLM's FlatLogprobs, as our sampler filled it (vllm_worker.py)."""
        width = 1 + self.request.record_top_k
        span = slice(first * width, last * width)
        ids_NW = np.asarray(flat.token_ids[span], dtype=np.int32).reshape(-1, width)
        logprobs = flat.logprobs[span][::width]
        tags, entropies = unpack_notes(flat.ranks[span][::width])
        now_s, before_s = self._clock.read(), self._read_s
        self._read_s = now_s
        cuts = [0, *(np.flatnonzero(np.diff(tags)) + 1).tolist(), last - first]
        return [
            Piece(
                self.request.key,
                ids_NW[start:stop, 0].tolist(),
                logprobs[start:stop],
                int(tags[start]),
                ids_NW[start:stop, 1:] if width > 1 else None,
                entropies[start:stop] if self.request.record_entropies else None,
                sample_s=(now_s - before_s) * (stop - start) / (last - first),
            )
            for start, stop in pairwise(cuts)
        ]


def end_ids(folder: Path) -> frozenset[int]:
    """Token ids that end a completion: generation_config.json's, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        found = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()
