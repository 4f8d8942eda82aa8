"""Models in memory: loaded on demand, verified once, least recently used first out when the budget is full."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stillhouse.core.errors import ConflictError, EngineStartError, OverloadedError
from stillhouse.core.metrics import BUDGET_BYTES, MODEL_BYTES, MODEL_LOAD_SECONDS, MODEL_LOADS
from stillhouse.core.models import ModelEntry, ModelRegistry, verify_files
from stillhouse.core.tensors import DTYPE_NAMES, dtype_name, itemsize
from stillhouse.teacher.engines.base import Engine
from stillhouse.teacher.schedule import ModelKey, Stream
from stillhouse.v1 import teacher_pb2, weights_pb2
from stillhouse.v1.rollout_pb2 import TeacherTask

LoadEngine = Callable[[ModelEntry, str], Engine]
"""(registered model, dtype) -> engine."""
DEFAULT_DTYPE: Final = "float32"
"""Where a request does not say."""
READ_BYTES: Final = 8 << 20
"""Part of a file that is read ahead at once."""


@dataclass(slots=True)
class Resident:
    """A model in memory."""

    key: ModelKey
    entry: ModelEntry
    dtype: str
    engine: Engine
    size_bytes: int
    weights: weights_pb2.WeightsRef | None = None
    """Of a model that follows a student: the average in the engine; None = registered or half-loaded weights."""

    @property
    def sha256(self) -> str:
        """Of the weights in the engine."""
        return self.entry.sha256 if self.weights is None else self.weights.sha256

    def message(self) -> teacher_pb2.LoadedModel:
        """As GetInfo and EnsureModel tell it."""
        return teacher_pb2.LoadedModel(
            model=self.entry.name,
            model_sha256=self.entry.sha256,
            dtype=DTYPE_NAMES[self.dtype],
            size_bytes=self.size_bytes,
            vocab_size=self.engine.vocab_size,
            max_sequence_length=self.engine.max_sequence_length,
            tokenizer_sha256=self.entry.tokenizer_sha256,
        )


class ModelPool:
    """Engines by model and dtype. `get` belongs to the compute thread, which makes it safe without locks."""

    def __init__(self, registry: ModelRegistry, load_engine: LoadEngine, budget_bytes: int) -> None:
        self._registry = registry
        self._load_engine = load_engine
        self._residents: OrderedDict[ModelKey, Resident] = OrderedDict()
        self._verified: set[str] = set()
        self._loads: dict[str, teacher_pb2.ModelLoads] = {}
        self.budget_bytes = budget_bytes
        BUDGET_BYTES.set(budget_bytes)

    def get(self, task: TeacherTask, keep: Collection[ModelKey] = ()) -> tuple[Resident, float]:
        """The model of a task, loaded if it is not in memory, and the seconds that this took (0 = it was there). Models
        of `keep` leave last.

        Raises:
            NotFoundError: not registered here.
            ConflictError: registered with another hash.
            SpecError: its files changed since.
            OverloadedError: it does not fit the budget even alone.
            EngineStartError: its files cannot be read, or the engine does not start with it.
        """
        entry, key = self._entry(task)
        load_s = 0.0
        if key not in self._residents:
            started = time.monotonic()
            self._make_room(entry, model_bytes(entry, key[1]), keep)
            engine = self._read(entry, key[1])
            self._residents[key] = Resident(key, entry, key[1], engine, model_bytes(entry, key[1]))
            load_s = time.monotonic() - started
            self._count(entry, load_s)
        self._residents.move_to_end(key)
        return self._residents[key], load_s

    def stream(self, name: str, task: TeacherTask) -> Stream:
        """A stream of rollouts with the model that scores them. Raises what `get` does about the registry."""
        entry, key = self._entry(task)
        return Stream(name, task.job_id, key, model_bytes(entry, key[1]))

    def fits(self, size_bytes: int, keep: Collection[ModelKey]) -> bool:
        """Whether a model of that size has room beside the models `keep`."""
        kept = sum(resident.size_bytes for key, resident in list(self._residents.items()) if key in keep)
        return kept + size_bytes <= self.budget_bytes

    def read_ahead(self, task: TeacherTask) -> None:
        """Verify the files of a model that is needed soon, or read them: the load then finds them in the page cache.
        For a thread of its own; what is wrong with the model is said by `get`.
        """
        entry, _ = self._entry(task)
        if entry.sha256 not in self._verified:
            self._verify(entry)
            return
        for path in sorted(Path(entry.path).glob("*.safetensors")):
            with path.open("rb", buffering=0) as stream:
                buffer = bytearray(READ_BYTES)
                while stream.readinto(buffer):
                    pass

    def residents(self) -> list[Resident]:
        """Models in memory, least recently used first."""
        return list(self._residents.values())

    def loads(self) -> list[teacher_pb2.ModelLoads]:
        """How often each model was loaded, and how long that took."""
        return list(self._loads.values())

    def _entry(self, task: TeacherTask) -> tuple[ModelEntry, ModelKey]:
        """The registered model of a task, and what it is known by here."""
        entry = self._registry.get(task.model)
        if task.model_sha256 and entry.sha256 != task.model_sha256:
            raise ConflictError(
                f"model '{task.model}' is registered with sha256 {entry.sha256[:12]}, asked for "
                f"{task.model_sha256[:12]}; it was registered again after the job was accepted"
            )
        owner = task.job_id if task.follows_student else ""
        return entry, (entry.sha256, dtype_name(task.dtype) if task.dtype else DEFAULT_DTYPE, owner)

    def _read(self, entry: ModelEntry, dtype: str) -> Engine:
        try:
            self._verify(entry)
            return self._load_engine(entry, dtype)
        except OSError as error:  # to a worker it would look like a queue server that is gone
            raise EngineStartError(f"model '{entry.name}' cannot be read from {entry.path}: {error}") from error

    def _verify(self, entry: ModelEntry) -> None:
        if entry.sha256 not in self._verified:
            verify_files(entry)
            self._verified.add(entry.sha256)

    def _make_room(self, entry: ModelEntry, size_bytes: int, keep: Collection[ModelKey]) -> None:
        if size_bytes > self.budget_bytes:
            raise OverloadedError(
                f"model '{entry.name}' needs {size_bytes / 2**30:.2f} GiB, this teacher has "
                f"{self.budget_bytes / 2**30:.2f}; raise STILLHOUSE_TEACHER_MEMORY_GIB"
            )
        leaving = sorted(self._residents, key=lambda key: key in keep)  # stable: least recently used first in each half
        while sum(resident.size_bytes for resident in self._residents.values()) + size_bytes > self.budget_bytes:
            self._residents.pop(leaving.pop(0)).engine.close()

    def _count(self, entry: ModelEntry, load_s: float) -> None:
        loads = self._loads.setdefault(
            entry.sha256, teacher_pb2.ModelLoads(model=entry.name, model_sha256=entry.sha256)
        )
        loads.loads += 1
        loads.load_s += load_s
        MODEL_LOADS.labels(entry.name).inc()
        MODEL_LOAD_SECONDS.observe(load_s)
        MODEL_BYTES.set(sum(resident.size_bytes for resident in self._residents.values()))


def model_bytes(entry: ModelEntry, dtype: str) -> int:
    """Memory of a model: its parameters, and the float32 copy of the head that scoring uses."""
    weights = entry.num_parameters * itemsize(DTYPE_NAMES[dtype])
    return weights if dtype == "float32" else weights + 4 * entry.vocab_size * entry.hidden_size
