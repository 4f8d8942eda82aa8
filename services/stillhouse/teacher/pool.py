"""Models in memory: loaded on demand, verified once, least recently used first out when the budget is full."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from stillhouse.core.errors import ConflictError, OverloadedError
from stillhouse.core.models import ModelEntry, ModelRegistry, verify_files
from stillhouse.core.telemetry import MODEL_LOADS
from stillhouse.core.tensors import DTYPE_NAMES, dtype_name, itemsize
from stillhouse.teacher.engines.base import Engine
from stillhouse.v1 import teacher_pb2

LoadEngine = Callable[[ModelEntry, str], Engine]
"""(registered model, dtype) -> engine."""
DEFAULT_DTYPE: Final = "float32"
"""Where a request does not say."""


@dataclass(frozen=True, slots=True)
class Resident:
    """A model in memory."""

    entry: ModelEntry
    dtype: str
    engine: Engine
    size_bytes: int

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
    """Engines by (model hash, dtype). `get` belongs to the compute thread, which makes it safe without locks."""

    def __init__(self, registry: ModelRegistry, load_engine: LoadEngine, budget_bytes: int) -> None:
        self._registry = registry
        self._load_engine = load_engine
        self._residents: OrderedDict[tuple[str, str], Resident] = OrderedDict()
        self._verified: set[str] = set()
        self.budget_bytes = budget_bytes

    def get(self, model: str, model_sha256: str, dtype: int) -> Resident:
        """The model, loaded if it is not in memory.

        Raises:
            NotFoundError: not registered here.
            ConflictError: registered with another hash.
            SpecError: its files changed since.
            OverloadedError: it does not fit the budget even alone.
        """
        entry = self._registry.get(model)
        if model_sha256 and entry.sha256 != model_sha256:
            raise ConflictError(
                f"model '{model}' is registered with sha256 {entry.sha256[:12]}, asked for {model_sha256[:12]}; "
                "it was registered again after the job was accepted"
            )
        name = dtype_name(dtype) if dtype else DEFAULT_DTYPE
        key = (entry.sha256, name)
        if key not in self._residents:
            self._make_room(entry, _size_bytes(entry, name))
            if entry.sha256 not in self._verified:
                verify_files(entry)
                self._verified.add(entry.sha256)
            engine = self._load_engine(entry, name)
            self._residents[key] = Resident(entry, name, engine, _size_bytes(entry, name))
            MODEL_LOADS.labels(entry.name).inc()
        self._residents.move_to_end(key)
        return self._residents[key]

    def residents(self) -> list[Resident]:
        """Models in memory, least recently used first."""
        return list(self._residents.values())

    def _make_room(self, entry: ModelEntry, size_bytes: int) -> None:
        if size_bytes > self.budget_bytes:
            raise OverloadedError(
                f"model '{entry.name}' needs {size_bytes / 2**30:.2f} GiB, this teacher has "
                f"{self.budget_bytes / 2**30:.2f}; raise STILLHOUSE_TEACHER_MEMORY_GIB"
            )
        while sum(resident.size_bytes for resident in self._residents.values()) + size_bytes > self.budget_bytes:
            self._residents.popitem(last=False)


def _size_bytes(entry: ModelEntry, dtype: str) -> int:
    """Memory of a model: its parameters, and the float32 copy of the head that scoring uses."""
    weights = entry.num_parameters * itemsize(DTYPE_NAMES[dtype])
    return weights if dtype == "float32" else weights + 4 * entry.vocab_size * entry.hidden_size
