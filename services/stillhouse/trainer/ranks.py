"""Several processes, one trainer: rank 0 serves and decides, the others follow. Each has a part of the student.

    rank 0                                            every other rank
    RankedEngine.train(batches) ----- command ----->  follow(): Part.run(command)
        runs its own part, too  <----- answer ------

A command is said to all ranks and run by all of them; rank 0 has every answer before it says the next. Commands and
answers are a piece of JSON and arrays, as bytes; nothing is pickled. Each rank gets its own micro-batches only, and
every teacher's head once.

An error in reading or writing files is an answer: all ranks are still in step. Any other error, and any death, leaves
the ranks out of step; then the process ends, with it (torchrun) all others, and the job goes on from its last
checkpoint.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist

from stillhouse.core import errors
from stillhouse.core.errors import StillhouseError
from stillhouse.core.spec import EmaSpec, StageSpec, StudentSpec
from stillhouse.trainer.batch import RowMeasures, TeacherHead, Update
from stillhouse.trainer.export import export_model
from stillhouse.trainer.packing import MicroBatch
from stillhouse.trainer.sharded import ShardedEngine
from stillhouse.trainer.student import Packing

IDLE_TIMEOUT: Final = timedelta(days=30)
"""How long a follower waits for a command: a trainer may be idle for weeks. If rank 0 dies, the wait ends at once."""
PASS_TIMEOUT: Final = timedelta(minutes=30)
"""How long ranks wait for each other within a pass; rank 0's own watch (setting hang_s) is usually shorter."""
HEADER_BYTES: Final = 8
ANSWERED: Final = ("open", "save", "load")
"""Commands whose errors are answers: no rank waits for another in them."""


class RanksLostError(RuntimeError):
    """Not a `StillhouseError`: those are the job's fault and fail it."""


@dataclass(frozen=True, eq=False)
class Message:
    """A command or an answer."""

    facts: dict[str, Any]
    """JSON."""
    arrays: dict[str, Any]

    @classmethod
    def of(cls, value: Any, **facts: Any) -> Message:
        """A dataclass of arrays and JSON values."""
        assert is_dataclass(value)
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        arrays = {name: part for name, part in parts.items() if isinstance(part, np.ndarray)}
        return cls({**{name: part for name, part in parts.items() if name not in arrays}, **facts}, arrays)


class Ranks:
    """The processes that torchrun started together, and the way between rank 0 and the others."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.is_broken = False
        """The ranks are out of step: nothing may be sent any more."""
        self._control: Any = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)

    @classmethod
    def join(cls) -> Ranks:
        """Wait for the others. NCCL between GPUs, gloo between CPUs and for commands."""
        has_gpu = torch.cuda.is_available()
        if has_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout=PASS_TIMEOUT)
        return cls()

    def send(self, rank: int, message: Message) -> None:
        """A length, JSON, then every array as it lies in memory."""
        arrays = {name: np.ascontiguousarray(array) for name, array in message.arrays.items()}
        directory = [(name, array.dtype.str, array.shape) for name, array in arrays.items()]
        header = json.dumps([message.facts, directory]).encode()
        self._send(rank, np.frombuffer(len(header).to_bytes(HEADER_BYTES, "little"), dtype=np.uint8))
        self._send(rank, np.frombuffer(header, dtype=np.uint8))
        for array in arrays.values():
            if array.nbytes:
                self._send(rank, array.reshape(-1).view(np.uint8))

    def receive(self, rank: int) -> Message:
        """The next message of a rank."""
        length = int.from_bytes(self._receive(rank, np.empty(HEADER_BYTES, dtype=np.uint8)).tobytes(), "little")
        facts, directory = json.loads(self._receive(rank, np.empty(length, dtype=np.uint8)).tobytes())
        arrays = {name: np.empty(shape, dtype=dtype) for name, dtype, shape in directory}
        for array in arrays.values():
            if array.nbytes:
                self._receive(rank, array.reshape(-1).view(np.uint8))
        return Message(facts, arrays)

    def release(self) -> None:
        """Let the followers end."""
        if self.is_broken:
            return
        with suppress(RuntimeError):  # one has died while all were idle: torchrun ends the others
            for rank in range(1, self.size):
                self.send(rank, Message({"do": "end"}, {}))
        self.leave()

    def leave(self) -> None:
        """Take leave of the others."""
        dist.destroy_process_group()

    def _send(self, rank: int, data: np.ndarray) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the array is read-only is no matter: it is only read
            dist.send(torch.from_numpy(data), rank, group=self._control)

    def _receive(self, rank: int, data: np.ndarray) -> np.ndarray:
        dist.recv(torch.from_numpy(data), rank, group=self._control)
        return data


class Part:
    """What a rank does at a command: the same on all of them."""

    def __init__(self) -> None:
        self.engine: ShardedEngine | None = None
        self._heads: dict[str, TeacherHead] = {}
        """By sha256."""

    def run(self, command: Message) -> Message:
        """Run a command of rank 0; gives the answer to it."""
        values = {**command.facts, **command.arrays}
        do = values.pop("do")
        try:
            return getattr(self, f"_{do}")(values) or Message({}, {})
        except Exception as error:
            if do not in ANSWERED:
                raise
            text = f"{error.strerror} (os error {error.errno})" if isinstance(error, OSError) else str(error)
            return Message({"error": type(error).__name__, "message": text}, {})

    def _open(self, values: dict[str, Any]) -> Message:
        self._close(values)  # what an interrupted job has left
        self.engine = ShardedEngine(
            Path(values["model_dir"]),
            student=StudentSpec.model_validate(values["student"]),
            stage=StageSpec.model_validate(values["stage"]),
            seed=values["seed"],
            threads=values["threads"],
            ema=None if values["ema"] is None else EmaSpec.model_validate(values["ema"]),
            packings=values["packings"],
        )
        return Message({"vocab_size": self.engine.vocab_size, "loaded": self.engine.facts()}, {})

    def _begin_stage(self, values: dict[str, Any]) -> Message:
        self.opened().begin_stage(StageSpec.model_validate(values["stage"]))
        return Message(self.opened().facts(), {})

    def _close(self, _: dict[str, Any]) -> None:
        self.engine = None
        self._heads.clear()

    def _head(self, values: dict[str, Any]) -> None:
        self._heads[values["sha256"]] = TeacherHead(**values)

    def _train(self, values: dict[str, Any]) -> Message:
        heads = self._heads_of(values)
        return Message.of(self.opened().train([MicroBatch(**values)], heads)[0])

    def _exact_kl(self, values: dict[str, Any]) -> Message:
        heads, temperature = self._heads_of(values), values.pop("temperature")
        return Message({}, {"kl": self.opened().exact_kl([MicroBatch(**values)], heads, temperature)[0]})

    def _probe(self, values: dict[str, Any]) -> Message:
        values.pop("head")
        temperatures, top_k = values.pop("temperatures"), values.pop("top_k")
        return Message({}, self.opened().probe([MicroBatch(**values)], temperatures, top_k)[0])

    def _heads_of(self, values: dict[str, Any]) -> dict[str, TeacherHead]:
        sha256 = values.pop("head")
        return {} if sha256 is None else {values["teacher"]: self._heads[sha256]}

    def _clear_gradients(self, _: dict[str, Any]) -> None:
        self.opened().clear_gradients()

    def _gradient_norm(self, _: dict[str, Any]) -> Message:
        return Message({"norm": self.opened().gradient_norm()}, {})

    def _show_average(self, values: dict[str, Any]) -> None:
        self.opened().show_average(values["on"])

    def _hold(self, values: dict[str, Any]) -> None:
        self.opened().hold(values["on"])

    def _show_held(self, values: dict[str, Any]) -> None:
        self.opened().show_held(values["on"])

    def _update(self, values: dict[str, Any]) -> Message:
        return Message.of(self.opened().update(values["lr"]))

    def _move_followed(self, _: dict[str, Any]) -> None:
        self.opened().move_followed()

    def _state_arrays(self, _: dict[str, Any]) -> Message:
        return _message(self.opened().state_arrays())

    def _followed_arrays(self, _: dict[str, Any]) -> Message:
        return _message(self.opened().followed_arrays())

    def _save(self, values: dict[str, Any]) -> None:
        self.opened().save(Path(values["folder"]), values["facts"])

    def _load(self, values: dict[str, Any]) -> Message:
        return Message(self.opened().load(Path(values["folder"])), {})

    def opened(self) -> ShardedEngine:
        """This rank's engine."""
        assert self.engine is not None, "a command before 'open'"
        return self.engine


class RankedEngine:
    """The student of all ranks, as the learner sees it (learner.Computes). Lives on rank 0."""

    def __init__(
        self,
        ranks: Ranks,
        model_dir: Path,
        *,
        student: StudentSpec,
        stage: StageSpec,
        seed: int,
        threads: int = 0,
        ema: EmaSpec | None = None,
        packings: Sequence[Packing] = (),
    ) -> None:
        self._ranks = ranks
        self._part = Part()
        self._sent: set[str] = set()
        self.num_ranks = ranks.size
        parts = {"student": student, "stage": stage, "ema": ema}
        specs = {name: None if part is None else part.model_dump(mode="json") for name, part in parts.items()}
        options = {"seed": seed, "threads": threads, "packings": list(packings)}
        answer = self._say("open", model_dir=str(model_dir), **options, **specs)[0]
        self.vocab_size: int = answer["vocab_size"]
        self._facts: dict[str, Any] = answer["loaded"]

    @property
    def packs(self) -> bool:
        return self._facts["packing"]

    def facts(self) -> dict[str, Any]:
        return {**self._facts, "ranks": self.num_ranks}

    def begin_stage(self, stage: StageSpec) -> None:
        self._facts = self._say("begin_stage", stage=stage.model_dump(mode="json"))[0]

    def train(self, batches: Sequence[MicroBatch], heads: Mapping[str, TeacherHead]) -> list[RowMeasures]:
        return [RowMeasures(**answer.facts | answer.arrays) for answer in self._distribute("train", batches, heads)]

    def exact_kl(
        self, batches: Sequence[MicroBatch], heads: Mapping[str, TeacherHead], temperature: float
    ) -> list[np.ndarray]:
        return [answer.arrays["kl"] for answer in self._distribute("exact_kl", batches, heads, temperature=temperature)]

    def probe(self, batches: Sequence[MicroBatch], temperatures: Sequence[float], top_k: int) -> list[dict[str, Any]]:
        asked = self._distribute("probe", batches, {}, temperatures=list(temperatures), top_k=top_k)
        return [answer.arrays for answer in asked]

    def clear_gradients(self) -> None:
        if not self._ranks.is_broken:  # else there is nothing left to save, and the first error to be told
            self._say("clear_gradients")

    def gradient_norm(self) -> float:
        return self._say("gradient_norm")[0]["norm"]

    def show_average(self, on: bool) -> None:
        self._say("show_average", on=on)

    def hold(self, on: bool) -> None:
        self._say("hold", on=on)

    def show_held(self, on: bool) -> None:
        self._say("show_held", on=on)

    def update(self, lr: float) -> Update:
        answers = [Update(**facts) for facts in self._say("update", lr=lr)]
        return Update(
            answers[0].norm,
            bad_gradients=_union(answer.bad_gradients for answer in answers),
            bad_weights=_union(answer.bad_weights for answer in answers),
        )

    def state_arrays(self) -> list[tuple[str, np.ndarray, str]]:
        return self._arrays("state_arrays")

    def move_followed(self) -> None:
        self._say("move_followed")

    def followed_arrays(self) -> list[tuple[str, np.ndarray, str]]:
        return self._arrays("followed_arrays")

    def _arrays(self, do: str) -> list[tuple[str, np.ndarray, str]]:
        own = self._run([Message({"do": do}, {})] * self.num_ranks)[0]
        return [(name, array, own.facts["dtypes"][name]) for name, array in own.arrays.items()]

    def export(self, source_dir: Path, folder: Path, card: Mapping[str, Any]) -> None:
        export_model(self._part.opened().model, self.state_arrays(), source_dir, folder, card)

    def save(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Every rank writes its rows; when this returns, all of them are durable."""
        self._say("save", folder=str(folder), facts=dict(facts))

    def load(self, folder: Path) -> dict[str, Any]:
        return self._say("load", folder=str(folder))[0]

    def close(self) -> None:
        """Free the student on all ranks."""
        if not self._ranks.is_broken:
            with suppress(RuntimeError):  # one has just died: the process ends soon
                self._say("close")

    def _distribute(
        self, do: str, batches: Sequence[MicroBatch], heads: Mapping[str, TeacherHead], **facts: Any
    ) -> list[Message]:
        """Each rank its own of at most `num_ranks` micro-batches; gives the answer to each.

        A rank without one runs the last with weights of zero: all must make the same calls, and it costs no time that
        the others do not need anyway.
        """
        for teacher in {batch.teacher for batch in batches} & heads.keys():
            self._send_head(heads[teacher])
        idle = replace(batches[-1], weights=np.zeros_like(batches[-1].weights))
        padded = [*batches, *[idle] * (self.num_ranks - len(batches))]
        digests = {teacher: head.sha256 for teacher, head in heads.items()}
        answers = self._run([Message.of(batch, do=do, head=digests.get(batch.teacher), **facts) for batch in padded])
        return answers[: len(batches)]

    def _send_head(self, head: TeacherHead) -> None:
        if head.sha256 not in self._sent:
            self._run([Message.of(head, do="head")] * self.num_ranks)
            self._sent.add(head.sha256)

    def _say(self, do: str, **facts: Any) -> list[dict[str, Any]]:
        """The same command to all; gives the facts of every answer."""
        return [answer.facts for answer in self._run([Message({"do": do, **facts}, {})] * self.num_ranks)]

    def _run(self, commands: Sequence[Message]) -> list[Message]:
        """Have each rank run its command; gives their answers, by rank.

        Raises:
            RanksLostError: the ranks are out of step since an earlier error, or one has died.
            Exception: the error that a rank answered.
        """
        if self._ranks.is_broken:
            raise RanksLostError("a rank of this trainer has died; its process ends, and the job is taken over")
        try:
            for rank, command in enumerate(commands[1:], start=1):
                self._ranks.send(rank, command)
            own = self._part.run(commands[0])
            answers = [own, *(self._ranks.receive(rank) for rank in range(1, self.num_ranks))]
        except BaseException:
            self._ranks.is_broken = True
            raise
        for rank, answer in enumerate(answers):
            if "error" in answer.facts:
                raise _error(rank, answer.facts["error"], answer.facts["message"])
        return answers


def _error(rank: int, name: str, message: str) -> Exception:
    """The error that a rank answered, as the class that it was if that is ours."""
    kind = getattr(errors, name, RuntimeError)
    is_ours = isinstance(kind, type) and issubclass(kind, StillhouseError)
    return kind(message) if is_ours else RuntimeError(f"rank {rank}: {name}: {message}")


def _message(arrays: list[tuple[str, np.ndarray, str]]) -> Message:
    return Message({"dtypes": {name: dtype for name, _, dtype in arrays}}, {name: array for name, array, _ in arrays})


def _union(lists: Iterable[list[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in lists for name in names))
