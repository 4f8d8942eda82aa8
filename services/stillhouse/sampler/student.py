"""The student in this sampler: its engine, whose weights are in it, and how newer ones get there.

Life of the weights:  none -> pulled for (job, epoch) -> replaced by newer ones        moved under a claim
They stay when the assignment ends: the next claim of the same job finds the model in memory.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from stillhouse.core.errors import AuthError, ConflictError, StaleWeightsError, StillhouseError, WeightsError
from stillhouse.core.failpoints import failpoint
from stillhouse.core.metrics import POLICY_VERSION, WEIGHT_PULL_SECONDS, WEIGHT_PULLS
from stillhouse.core.models import ModelEntry, verify_files
from stillhouse.core.pulls import Weights, fetch_weights, leader
from stillhouse.core.pulse import BULK
from stillhouse.core.queue.streams import Scope
from stillhouse.core.service import Context
from stillhouse.core.tasks import to_its_end
from stillhouse.core.tensors import DTYPE_NAMES, itemsize
from stillhouse.core.worker import ComputeThread
from stillhouse.sampler.engines.base import Engine, LoadEngine
from stillhouse.sampler.stops import StoppingEngine
from stillhouse.v1 import weights_pb2

PULL_WAIT_S: Final = 30.0
"""How long a sampler waits under its claims for weights that the trainer does not have yet; then it hands back."""
PULL_BACKOFF_S: Final = 0.1
"""First pause between two pulls; doubles up to 2 s."""

NAMES_KEPT: Final = 16
"""Sets of weights whose names are remembered: pieces on their way were written by the last one or two."""


@dataclass(slots=True, eq=False)
class _Guest:
    """A frozen model that callers use."""

    engine: Engine
    size_bytes: int
    num_users: int = 0
    has_left: bool = False
    """To be closed by its last user."""


class Student:
    """The engine of the job this sampler serves, and others for frozen models that callers name: guests."""

    def __init__(self, ctx: Context, compute: ComputeThread, load_engine: LoadEngine) -> None:
        self._ctx = ctx
        self._compute = compute
        self._load_engine = load_engine
        self._verified: set[str] = set()
        self._guests: OrderedDict[tuple[str, str], _Guest] = OrderedDict()
        """(hash of the model, dtype) -> guest; least recently used first."""
        self._guest_lock = asyncio.Lock()
        self._dtype = ""
        self._changing = asyncio.Lock()
        """Held while the model or its weights are replaced."""
        self._names: OrderedDict[int, weights_pb2.WeightsRef] = OrderedDict()
        """Policy tag -> the weights it stands for."""
        self._tag = 0
        self.engine: Engine | None = None
        self.entry: ModelEntry | None = None
        self.weights: weights_pb2.WeightsRef | None = None
        self.weights_job = ""
        self.hint: weights_pb2.WeightsRef | None = None
        """Newest weights heard of."""
        self.is_pinned = False
        """The weights must stay what they are: hints are not followed."""
        self.is_loading_guest = False

    async def load_model(self, model: str, dtype: str) -> None:
        """Have the architecture of a registered model in memory.

        Raises:
            NotFoundError: no such model.
            SpecError: its files changed since it was registered.
        """
        entry = self._ctx.models.get(model)
        if self.entry is not None and (self.entry.sha256, self._dtype) == (entry.sha256, dtype):
            return
        async with self._changing:
            engine, self.engine = self.engine, None
            self.entry = self.weights = None
            if engine is not None:
                await engine.close()  # leaves before the next one comes: both may not fit
            self.engine = await self._load(entry, dtype)
            self.entry, self._dtype = entry, dtype

    @asynccontextmanager
    async def guest(self, model: str, dtype: str = "float32") -> AsyncIterator[Engine]:
        """An engine with the registered weights of a model. Others stay loaded as far as the budget goes."""
        entry = self._ctx.models.get(model)
        key, size_bytes = (entry.sha256, dtype), entry.num_parameters * itemsize(DTYPE_NAMES[dtype])
        async with self._guest_lock:
            if key not in self._guests:
                # a caller who runs out of patience while it loads, and asks again, finds it here
                await to_its_end(self._welcome(key, entry, size_bytes))
            self._guests.move_to_end(key)
            guest = self._guests[key]
            guest.num_users += 1
        try:
            yield guest.engine
        finally:
            guest.num_users -= 1
            if guest.has_left and not guest.num_users:
                await guest.engine.close()

    async def _welcome(self, key: tuple[str, str], entry: ModelEntry, size_bytes: int) -> None:
        await self._make_room(size_bytes)
        self.is_loading_guest = True
        try:
            self._guests[key] = _Guest(await self._load(entry, key[1]), size_bytes)
        finally:
            self.is_loading_guest = False

    async def _make_room(self, size_bytes: int) -> None:
        """Have guests leave, least recently used first; one that is in use leaves when its last caller is served."""
        budget_bytes = self._ctx.settings.teacher_memory_gib * 2**30
        while self._guests and size_bytes + sum(guest.size_bytes for guest in self._guests.values()) > budget_bytes:
            _, guest = self._guests.popitem(last=False)
            guest.has_left = True
            if not guest.num_users:
                await guest.engine.close()

    async def close(self) -> None:
        """Close all engines."""
        for engine in [self.engine, *(guest.engine for guest in self._guests.values())]:
            if engine is not None:
                await engine.close()

    async def _load(self, entry: ModelEntry, dtype: str) -> Engine:
        if entry.sha256 not in self._verified:
            await self._compute.run(verify_files, entry, patience=BULK)
            self._verified.add(entry.sha256)
        return StoppingEngine(await self._load_engine(entry, dtype), entry)

    def name_of(self, tag: int) -> weights_pb2.WeightsRef | None:
        """The weights that a piece of the student's engine was written by."""
        return self._names.get(tag)

    def version(self, scope: Scope) -> int | None:
        """Policy version of the weights, if they are of this claim of this job."""
        if self.weights is None or self.weights_job != scope.job_id or self.weights.epoch != scope.epoch:
            return None
        return self.weights.policy_version

    async def ensure(self, scope: Scope, *, at_least: int = 0, exactly: int | None = None) -> None:
        """Have weights that the work allows, waiting until the trainer has them. A newer hint is followed if it can be.

        Raises:
            StaleWeightsError: it did not have them in time.
            AuthError: the trainer does not know this sampler; waiting cannot help.
        """
        # an exact version must be asked for under the lock: newer weights may be on their way into the engine
        if exactly is None and self._suits(scope, at_least, None):
            await self.follow(scope)
            return
        deadline = time.monotonic() + PULL_WAIT_S
        delay_s = PULL_BACKOFF_S
        problem = ""
        while True:
            async with self._changing:
                if self._suits(scope, at_least, exactly):
                    return
                try:
                    await self._pull(scope, exactly)
                    problem = f"the trainer has {self.version(scope)}"
                except AuthError:
                    raise
                except StillhouseError as error:
                    problem = error.message
                if self._suits(scope, at_least, exactly):
                    return
            wanted = f"exactly {exactly}" if exactly is not None else f"at least {at_least}"
            if time.monotonic() > deadline:
                raise StaleWeightsError(f"job {scope.job_id}: policy version {wanted} is needed; {problem}")
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, 2.0)

    async def settled(self) -> None:
        """Wait until a change of weights that has begun is over."""
        async with self._changing:
            return

    async def follow(self, scope: Scope) -> None:
        """Have the newest weights heard of, if they can be had; completions that run go on with them."""
        if not self._is_hinted(scope):
            return
        async with self._changing:
            if not self._is_hinted(scope):
                return
            try:
                await self._pull(scope, None)
            except StillhouseError as error:
                self._ctx.log.warning("newer weights not pulled", error=error.message)

    def _suits(self, scope: Scope, at_least: int, exactly: int | None) -> bool:
        version = self.version(scope)
        if version is None:
            return False
        return version == exactly if exactly is not None else version >= at_least

    def _is_hinted(self, scope: Scope) -> bool:
        hint, version = self.hint, self.version(scope)
        if self.is_pinned:
            return False
        return hint is not None and hint.epoch == scope.epoch and version is not None and hint.policy_version > version

    async def _pull(self, scope: Scope, exact_version: int | None) -> None:
        started = time.monotonic()
        trainer = await leader(self._ctx, scope.job_id)
        have = self.weights.sha256 if self.weights is not None else ""
        transfer = self._ctx.transfer

        def on_part() -> None:
            transfer.beat()
            failpoint("sampler.pulling")

        with transfer.work():
            weights = await fetch_weights(trainer, scope, exact_version, have, on_part)
        if weights.arrays:
            await self._replace(weights)
        self._names[self._tag] = weights.ref
        self.weights, self.weights_job = weights.ref, scope.job_id
        WEIGHT_PULLS.inc()
        WEIGHT_PULL_SECONDS.observe(time.monotonic() - started)
        POLICY_VERSION.labels("sampler", scope.job_id).set(weights.ref.policy_version)
        self._ctx.log.info(
            "weights pulled",
            job_id=scope.job_id,
            epoch=weights.ref.epoch,
            policy_version=weights.ref.policy_version,
            seconds=round(time.monotonic() - started, 3),
        )

    async def _replace(self, weights: Weights) -> None:
        """Put weights into the engine, between two tokens of what it writes."""
        engine, before = self.engine, self.weights
        if engine is None:
            raise ConflictError("the student is being replaced; try again")
        self.weights = None  # unnamed while they are being replaced
        self._tag += 1
        self._names[self._tag] = weights.ref
        while len(self._names) > NAMES_KEPT:
            self._names.popitem(last=False)
        try:
            await engine.pause()
            await engine.load_weights(weights.arrays, weights.dtypes, self._tag)
        except WeightsError:
            self._tag -= 1
            self.weights = before
            raise
        finally:
            await engine.resume()
