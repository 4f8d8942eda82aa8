"""Continuous batching: a step gives each running completion one token; those that end make room for those that wait.

Axes: B rows in a forward pass, Q tokens of each, V vocab. Row i of the cache belongs to the i-th running completion.
Synchronous, for one thread.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from stillhouse.core.errors import ENGINE_ERRORS
from stillhouse.sampler.engines.base import SampleRequest
from stillhouse.sampler.engines.cache import BLOCK
from stillhouse.sampler.engines.draw import Distributions, uniforms
from stillhouse.sampler.engines.model import Model
from stillhouse.sampler.engines.rows import Call, Row

PREFILL_TOKENS: Final = 512
"""Prompt tokens per forward pass: bounds its memory, and the time without a beat."""


@dataclass(frozen=True, slots=True)
class _Prefix:
    """A context that was read, for others who want the same one."""

    context: tuple[int, ...]
    logits_1V: Tensor
    """Of the token that follows."""
    states: list[Tensor]
    """`RowCache.snapshot`."""


class Decoder:
    """Writes with one model.

    Life of a request:  waiting -> running -> ended      moved by `_admit` and `_take`
                        running -> waiting               by `_put_back`: no memory left, or its batch failed
    """

    def __init__(self, model: Model, max_sequences: int, beat: Callable[[], None]) -> None:
        self._model = model
        self._max_sequences = max_sequences
        self._beat = beat
        self._cache = model.cache
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []
        self._order = itertools.count()
        self._prefix: _Prefix | None = None
        self._tag = 0
        self.prefilled_tokens = 0
        """Context tokens read by forward passes so far: what samples share is counted once."""

    @property
    def is_busy(self) -> bool:
        return bool(self._running or self._waiting)

    @torch.inference_mode()
    def run(self, calls: Iterable[Call], seconds: float) -> None:
        """Let calls enter, then take steps for so long, one at least; the calls' pieces are what came of it."""
        until = time.perf_counter() + seconds
        self._drop()
        for call in calls:
            self._enter(call)
        while self.is_busy:
            self._step()
            if time.perf_counter() >= until:
                break
        for row in self._running:
            row.flush(self._tag)

    @torch.inference_mode()
    def load_weights(self, arrays: Mapping[str, np.ndarray[Any, Any]], dtypes: Mapping[str, int], tag: int) -> None:
        """Later tokens are written by these weights, from what is in the cache."""
        self._model.load(arrays, dtypes)
        self._tag, self._prefix = tag, None

    def close(self, calls: Iterable[Call]) -> None:
        """End everything as aborted, and these calls, too."""
        rows = [*self._running, *self._waiting]
        rows += [self._row(request, call) for call in calls for request in call.requests]
        for row in rows:
            row.flush(self._tag, "abort")

    def _enter(self, call: Call) -> None:
        if call.is_alone:
            self._cache.clear()
            self._prefix = None
        for request in call.requests:
            row = self._row(request, call)
            problem = self._model.problem(request)
            if problem:
                row.fail(*problem)
            elif reason := row.end(self._model.end_ids):
                row.flush(self._tag, reason)  # another sampler came to the end, and no further
            else:
                self._waiting.append(row)

    def _row(self, request: SampleRequest, call: Call) -> Row:
        room = self._model.max_sequence_length - len(request.prompt_ids)
        max_tokens = max(0, min(request.max_tokens, room))
        draws = uniforms(request.seed, max_tokens)
        return Row(request, call, next(self._order), draws, max_tokens, list(request.written))

    def _drop(self) -> None:
        """End what nobody waits for, and what was aborted before its turn came."""
        for row in [row for row in self._running if row.call.is_closed]:
            self._remove(row)
        for row in self._waiting:
            if row.is_aborted and not row.call.is_closed:
                row.flush(self._tag, "abort")
        self._waiting = deque(row for row in self._waiting if not (row.is_aborted or row.call.is_closed))

    def _step(self) -> None:
        started = time.perf_counter()
        self._make_room()
        if rows := list(self._running):
            try:
                ids = [[row.ids[-1]] for row in rows]
                logits = self._forward(ids, [[row.length - 1] for row in rows], first=0)
                self._take(rows, logits, started)
            except ENGINE_ERRORS as error:
                self._blame(rows, error)
        self._admit()

    def _admit(self) -> None:
        """Let completions start, in order of arrival; those of one context share what is read."""
        while members := self._next():
            started = time.perf_counter()
            try:
                logits = self._read(members[0].context, len(members))
                self._running += members
                self._take(members, logits.expand(len(members), -1), started)
            except ENGINE_ERRORS as error:
                self._blame(members, error)

    def _next(self) -> list[Row]:
        """Take the first that wait for the same context, as many as have room."""
        members: list[Row] = []
        while self._waiting and self._has_room(self._waiting[0], members):
            members.append(self._waiting.popleft())
        return members

    def _has_room(self, row: Row, members: list[Row]) -> bool:
        rows = len(self._running) + len(members)
        if rows == 0:
            return True
        if rows == self._max_sequences or row.is_suspect or (self._running + members)[0].is_suspect:
            return False
        if members and row.context != members[0].context:
            return False
        longest = max(other.length for other in [*self._running, row])
        return self._cache.fits(rows + 1, longest + BLOCK)

    def _read(self, context: tuple[int, ...], count: int) -> Tensor:
        """[1, V] logits of what follows the context, which is then in the next `count` rows of the cache."""
        first = len(self._running)
        end = first + count
        # all rows count: where room is short, the rectangle keeps no column more
        self._cache.reserve(end, max([len(context) + 1, *(row.length for row in self._running)]))
        if self._prefix is not None and self._prefix.context == context:
            self._cache.restore(first, end, self._prefix.states)
            return self._prefix.logits_1V
        logits = self._prefill(context, first)
        self._prefix = None
        if count > 1 or (self._waiting and self._waiting[0].context == context):
            self._prefix = _Prefix(context, logits, self._cache.snapshot(first, len(context)))
            self._cache.restore(first + 1, end, self._prefix.states)
        return logits

    def _prefill(self, context: Sequence[int], row: int) -> Tensor:
        for start in range(0, len(context), PREFILL_TOKENS):
            part = list(context[start : start + PREFILL_TOKENS])
            logits = self._forward([part], [list(range(start, start + len(part)))], row)
            self.prefilled_tokens += len(part)
        return logits

    def _forward(self, ids_BQ: list[list[int]], positions_BQ: list[list[int]], first: int) -> Tensor:
        """[B, V] logits of what follows the last token of each row, rows counted from `first`."""
        self._beat()
        return self._model.forward(ids_BQ, positions_BQ, first)

    def _take(self, rows: list[Row], logits_BV: Tensor, started: float) -> None:
        """Draw the next token of rows, which then go on or end."""
        requests = [row.request for row in rows]
        distributions = Distributions.of(logits_BV, requests)
        ids_B = distributions.draw(requests, [row.uniform for row in rows])
        ids, logprobs = ids_B.tolist(), distributions.logprobs(ids_B).tolist()
        _record(rows, distributions)
        elapsed = (time.perf_counter() - started) / len(rows)
        for row, token, logprob in zip(rows, ids, logprobs, strict=True):
            row.ids.append(token)
            row.logprobs.append(logprob)
            row.sample_s += elapsed
        for row in rows:  # all have their token now, as `_remove` supposes
            self._end(row)

    def _end(self, row: Row) -> None:
        """Let a completion go if its last token was the last one."""
        if not np.isfinite(row.logprobs[-1]):
            message = f"log-probability {row.logprobs[-1]} at token {len(row.ids) - 1}: the weights are broken"
            row.fail("non_finite", message)
            self._cache.wipe(self._running.index(row))
            self._remove(row)
        elif reason := row.end(self._model.end_ids):
            row.flush(self._tag, reason)
            self._remove(row)

    def _remove(self, row: Row) -> None:
        """Free a row of the cache; the last one takes its place."""
        index = self._running.index(row)
        last = self._running.pop()
        if last is not row:
            self._cache.move(len(self._running), index, last.length - 1)
            self._running[index] = last

    def _make_room(self) -> None:
        """Have room for one more token of each; the youngest go back until there is."""
        while len(self._running) > 1:
            longest = max(row.length for row in self._running)
            if self._cache.fits(len(self._running), longest):
                return
            self._put_back([max(self._running, key=lambda row: row.order)])

    def _put_back(self, rows: list[Row]) -> None:
        """Let running completions wait again; later they go on from their tokens."""
        for row in sorted(rows, key=lambda row: row.order, reverse=True):
            row.flush(self._tag)
            if row in self._running:
                self._remove(row)
            self._waiting.appendleft(row)

    def _blame(self, rows: list[Row], error: Exception) -> None:
        """One of these made a forward pass fail. It is found by letting each go on without neighbours."""
        if len(rows) == 1 and not set(self._running) - set(rows):
            rows[0].fail("engine_error", f"{type(error).__name__}: {error}")
            if rows[0] in self._running:
                self._remove(rows[0])
            return
        for row in rows:
            row.is_suspect = True
        self._put_back(rows)


def _record(rows: Sequence[Row], distributions: Distributions) -> None:
    """Add to each row what its request wants to know of the distribution that its last token was drawn from; to all
    rows or, where the memory does not suffice, to none.
    """
    most = max(row.request.record_top_k for row in rows)
    ids_BK = distributions.likeliest(most).int().cpu().numpy() if most else None
    entropies_B = distributions.entropies().tolist() if any(row.request.record_entropies for row in rows) else None
    for index, row in enumerate(rows):
        if ids_BK is not None and row.request.record_top_k:
            row.target_ids.append(ids_BK[index, : row.request.record_top_k].copy())
        if entropies_B is not None and row.request.record_entropies:
            row.entropies.append(entropies_B[index])
