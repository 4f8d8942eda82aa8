"""Toys in place of models: what they compute follows from seeds, and the learner remembers all it was ever trained on.

The weights are a chain: every step mixes the samples into them, in order. Two learners have equal weights only if they
were trained on the same samples in the same order.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.core.blobs import Artifacts, staged_dir
from stillhouse.core.errors import NonFiniteError, NotFoundError
from stillhouse.core.failpoints import failpoint
from stillhouse.core.models import ModelEntry
from stillhouse.core.spec import JobSpec, StageSpan
from stillhouse.sampler.engines.base import Piece, SampleRequest
from stillhouse.teacher.engines.base import Head, Scored, ScoreItem, Unscored
from stillhouse.trainer.batch import TeacherHead, TrainSample
from stillhouse.trainer.packing import plan_micro_batches
from stillhouse.trainer.train import LearnerThread
from stillhouse.v1 import rollout_pb2

WIDTH = 4
VOCABULARY = 64
TOKEN_S = 0.004
"""Time that a toy sampler takes for a token, unless a run has slow ones."""
POISON = 13
"""One sample of so many makes a teacher's arithmetic overflow, but never the first of a group."""


def entry(name: str) -> ModelEntry:
    """A registered model without files."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    return ModelEntry(
        name=name,
        path="/nowhere",
        sha256=digest,
        tokenizer_sha256=hashlib.sha256(b"tokenizer").hexdigest(),
        architecture="Toy",
        vocab_size=VOCABULARY,
        tokenizer_size=VOCABULARY,
        max_sequence_length=512,
        hidden_size=WIDTH,
        num_layers=1,
        num_parameters=WIDTH,
        size_bytes=4 * WIDTH,
        has_chat_template=True,
        files={},
    )


class ToyModels:
    """`Models` with a student and two teachers, registered."""

    def __init__(self, artifacts: Artifacts) -> None:
        self.artifacts = artifacts
        self._entries = {name: entry(name) for name in ("student", "teacher", "second")}

    def get(self, name: str) -> ModelEntry:
        if name not in self._entries:
            raise NotFoundError(f"unknown model '{name}'")
        return self._entries[name]


class ToyRenderer:
    """`Renderer`: bytes as tokens."""

    def __init__(self, model_dir: Path) -> None:
        return

    def check(self, arguments: Mapping[str, Any]) -> None:
        return

    def ids(self, conversation: Sequence[Mapping[str, str]], arguments: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(byte % VOCABULARY for message in conversation for byte in message["content"].encode())

    def completion(self, text: str, stop_ids: Sequence[int]) -> tuple[int, ...]:
        return (*(byte % VOCABULARY for byte in text.encode()), stop_ids[0])

    def text(self, ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in ids)


def digest(*parts: Any) -> np.ndarray:
    """[8] float32 in [0, 1): follows from the parts."""
    raw = hashlib.sha256(repr(parts).encode()).digest()
    return (np.frombuffer(raw, dtype="<u4") / 2**32).astype(np.float32)


def toy_completion(seed: int, max_tokens: int) -> list[int]:
    """What a toy sampler writes."""
    return [(seed >> (index % 48)) % VOCABULARY for index in range(1 + seed % max_tokens)]


def toy_logprobs(model: str, completion_ids: Sequence[int]) -> np.ndarray:
    """[T] float32, nats: what a toy teacher says of tokens; each model says something else."""
    scale = VOCABULARY + sum(model.encode())
    return np.array([-float(token + 1) / scale for token in completion_ids], dtype=np.float32)


class ToySampler:
    """`sampler.engines.base.Engine`: tokens follow from the seed."""

    name = "toy"
    vocab_size = VOCABULARY
    max_sequence_length = 512
    max_sequences = 8

    def __init__(self, token_s: float = TOKEN_S) -> None:
        self.weights: Mapping[str, np.ndarray] = {}
        self._token_s = token_s
        self._tag = 0
        self._open: set[str] = set()
        self._aborted: set[str] = set()
        self._goes_on = asyncio.Event()
        self._goes_on.set()

    async def generate(self, requests: Sequence[SampleRequest], *, alone: bool = False) -> AsyncGenerator[Piece, None]:
        left = {request.key: (request, len(request.written)) for request in requests}
        self._open |= left.keys()
        try:
            while left:
                await asyncio.sleep(self._token_s)
                await self._goes_on.wait()
                for request, index in list(left.values()):
                    piece = self._piece(request, index)
                    left[request.key] = (request, index + 1)
                    if piece.finish_reason:
                        del left[request.key]
                    yield piece
        finally:
            self._open -= {request.key for request in requests}
            self._aborted -= {request.key for request in requests}

    def _piece(self, request: SampleRequest, index: int) -> Piece:
        whole = toy_completion(request.seed, request.max_tokens)
        is_last = index == len(whole) - 1
        reason = "abort" if request.key in self._aborted else "length" if is_last else ""
        return Piece(request.key, [whole[index]], [-1.0], self._tag, finish_reason=reason, sample_s=self._token_s)

    def abort(self, keys: Iterable[str]) -> int:
        found = self._open & set(keys)
        self._aborted |= found
        return len(found)

    async def pause(self) -> None:
        self._goes_on.clear()

    async def resume(self) -> None:
        self._goes_on.set()

    async def load_weights(self, arrays: Mapping[str, np.ndarray], dtypes: Mapping[str, int], tag: int) -> None:
        self.weights, self._tag = arrays, tag

    async def close(self) -> None:
        self._aborted |= self._open
        self._goes_on.set()


class ToyTeacher:
    """`teacher.engines.base.Engine`: scores follow from the tokens; some are NaN, which checks.py has to find."""

    def __init__(self, model: str) -> None:
        self._model = model

    vocab_size = VOCABULARY
    max_sequence_length = 512
    size_bytes = 4 * WIDTH

    def score(self, items: Sequence[ScoreItem]) -> list[Scored | Unscored]:
        return [self._score(item) for item in items]

    def _score(self, item: ScoreItem) -> Scored | Unscored:
        logprobs = toy_logprobs(self._model, item.completion_ids)
        if not item.key.endswith("/0") and sum(item.completion_ids) % POISON == (self._model == "second"):
            logprobs[-1] = np.nan
        hidden = None
        if item.kind == rollout_pb2.SCORE_KIND_HIDDEN:
            hidden = np.tile(logprobs[:, None], (1, WIDTH)).astype(np.float16)
        return Scored(item.key, logprobs, hidden=hidden)

    def head(self) -> Head:
        weight = np.ones((VOCABULARY, WIDTH), dtype=np.float32)
        data = weight.tobytes()
        sha256 = hashlib.sha256(data).hexdigest()
        return Head(sha256, "float32", (VOCABULARY, WIDTH), False, VOCABULARY, 1.0, 0.0, [memoryview(data)])


class ToyLearner:
    """What `LearnerThread` needs of a learner."""

    keeps_nan = False
    """For the planted bug."""

    def __init__(self, seed: int, span: StageSpan) -> None:
        self.weights = digest("init", seed)[:WIDTH]
        self.policy_version = 0
        self.trained: list[list[Any]] = []
        """[step, sample id, stage, teacher] of everything behind the weights, in order of samples."""
        self.begin_stage(span)

    def begin_stage(self, span: StageSpan) -> None:
        """Weights go on, the moment begins anew."""
        self.span = span
        self.micro_batch_tokens = span.stage.schedule.micro_batch_tokens
        self.has_teacher = span.stage.loss.payload() != "none"
        self.moment = np.zeros(WIDTH, dtype=np.float32)

    def plan(self, samples: Sequence[TrainSample], heads: Mapping[str, TeacherHead]) -> list[list[int]]:
        return plan_micro_batches(samples, self.micro_batch_tokens)

    def step(
        self, samples: Sequence[TrainSample], heads: Mapping[str, TeacherHead], plan: Sequence[Sequence[int]]
    ) -> dict[str, float]:
        weights, moment, trained = self.weights, self.moment, []
        for batch in plan:
            for index in batch:
                sample = samples[index]
                signal = sample.teacher_logprobs if sample.hidden is None else sample.hidden.astype(np.float32)
                signal = signal if self.has_teacher else np.zeros(1, dtype=np.float32)
                moment = 0.5 * moment + digest(sample.sample_id, sample.completion_ids.tolist(), signal.tolist())[:4]
                weights = 0.5 * weights + moment
                if not np.isfinite(signal).all():
                    weights = weights * np.float32(np.nan)
                trained.append([self.policy_version, sample.sample_id, self.span.index, sample.teacher])
            failpoint("trainer.mid_backward")
        if not np.isfinite(weights).all() and not self.keeps_nan:
            raise NonFiniteError(f"step {self.policy_version}: the toy's weights are not finite")
        self.weights, self.moment = weights.astype(np.float32), moment.astype(np.float32)
        self.trained += sorted(trained, key=in_order)
        self.policy_version += 1
        lag = [self.policy_version - 1 - s.oldest_policy_version for s in samples if s.is_on_policy] or [0]
        return {"tokens/trained": float(sum(s.num_loss_tokens for s in samples)), "staleness/max": float(max(lag))}

    def skip(self) -> dict[str, float]:
        self.policy_version += 1
        return {"step/skipped": 1.0}

    def state_arrays(self) -> list[tuple[str, np.ndarray, str]]:
        return [("w", self.weights.copy(), "float32")]

    def save(self, folder: Path) -> None:
        write_safetensors(folder / "model.safetensors", self.weights)
        state = {"policy_version": self.policy_version, "trained": self.trained, "moment": self.moment.tolist()}
        (folder / "state.json").write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        self.weights = read_safetensors(folder / "model.safetensors")
        state = json.loads((folder / "state.json").read_text())
        self.policy_version, self.trained = state["policy_version"], state["trained"]
        self.moment = np.array(state["moment"], dtype=np.float32)


class ToyLearnerThread(LearnerThread):
    """`LearnerThread` around a toy: everything that does not need torch is the real class."""

    async def load(self, model_dir: Path, spec: JobSpec, threads: int, span: StageSpan) -> dict[str, Any]:
        def build() -> ToyLearner:
            return ToyLearner(spec.seed, span)

        self._learner = await self.call(build)
        return {"parameters": WIDTH, "learning_parameters": WIDTH, "packing": False, "packing_reason": "a toy"}

    async def export(self, source_dir: Path, folder: Path, card: dict[str, Any]) -> None:
        def write() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            with staged_dir(folder) as staged:
                write_safetensors(staged.path / "model.safetensors", self._learner.weights)

        await self.call(write)


def in_order(item: Sequence[Any]) -> list[Any]:
    """Sorts what one step was trained on: by group, index and teacher."""
    return [*(int(part) for part in item[1].split("/")), item[3]]


def write_safetensors(path: Path, weights: np.ndarray) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": list(weights.shape), "data_offsets": [0, weights.nbytes]}})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + weights.tobytes())


def read_safetensors(path: Path) -> np.ndarray:
    data = path.read_bytes()
    return np.frombuffer(data[8 + int.from_bytes(data[:8], "little") :], dtype="<f4").copy()
