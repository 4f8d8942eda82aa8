"""What a trainer needs in memory for a job, and what it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from stillhouse.core.estimate import WORDS, learning_parameters, score_bytes, tokens_in_flight
from stillhouse.core.models import ModelEntry
from stillhouse.core.schemas import Check
from stillhouse.core.spec import JobSpec, StageSpec

ACTIVATIONS: Final = 17
"""Numbers of the model's width that a decoder layer keeps per token for the backward pass (arXiv:2205.05198, without
the attention's own matrix)."""
CHECKPOINTED: Final = 2
"""And with activation checkpointing: what goes in, and what is computed again, shared by all layers."""
PROMPT_TOKENS: Final = 512
"""What prompts are taken to have, at most."""
ROLLOUT_BYTES: Final = 16
"""A completion token on its way, without its score."""
HOST: Final = ("published weights", "samples in flight")
"""What lies in the host's memory also where the student is on a GPU; of several ranks in that of rank 0."""
WHAT: Final = {
    "all": "the student, its optimizer, activations and samples in flight",
    "device": "the student, its optimizer and activations",
    "host": "published weights and samples in flight",
}
"""Room.holds -> in words."""
GIB: Final = 1 << 30


@dataclass(frozen=True)
class Room:
    """Memory that a process here can still take."""

    num_bytes: int
    source: str
    """What says so."""
    holds: Literal["all", "device", "host"] = "all"
    """Which parts of a need lie there."""

    def has(self, name: str) -> bool:
        """Whether a part of a need lies there."""
        return self.holds == "all" or (self.holds == "host") == (name in HOST)


def needed(spec: JobSpec, student: ModelEntry, teachers: Mapping[str, ModelEntry]) -> dict[str, int]:
    """Bytes by what they are for; of several stages the most. One that counts too little is better than one that
    refuses what fits: work space of kernels is left out."""
    word = WORDS[spec.student.dtype]
    weights, learning = word * student.num_parameters, 4 * learning_parameters(spec, student)
    stages = spec.stages
    most: dict[str, int] = {
        "weights": weights,
        "float32 master weights": learning if word < 4 or spec.student.lora else 0,
        "gradients": learning,
        "optimizer": 2 * learning,
        "averages": learning * any(stage.optimizer.ema_decay for stage in stages)
        + 4 * student.num_parameters * (spec.ema_of_student() is not None),
        "published weights": weights * max(stage.schedule.max_staleness + 1 for stage in stages),
        "teachers' heads": max(_heads(stage, teachers) for stage in stages),
        "samples in flight": max(
            tokens_in_flight(stage) * (ROLLOUT_BYTES + score_bytes(stage, teachers)) for stage in stages
        ),
        "activations": max(_activations(spec, stage, student) for stage in stages),
    }
    return {name: number for name, number in most.items() if number}


def _heads(stage: StageSpec, teachers: Mapping[str, ModelEntry]) -> int:
    if stage.loss.payload() != "hidden":
        return 0
    return max((4 * entry.vocab_size * entry.hidden_size for entry in teachers.values()), default=0)


def _activations(spec: JobSpec, stage: StageSpec, student: ModelEntry) -> int:
    per_layer = CHECKPOINTED if spec.student.activation_checkpointing else ACTIVATIONS
    numbers = (per_layer * student.num_layers + ACTIVATIONS) * student.hidden_size
    schedule = stage.schedule
    step = schedule.prompts_per_step * schedule.group_size * (stage.sampling.max_tokens + PROMPT_TOKENS)
    return WORDS[spec.student.dtype] * numbers * min(schedule.micro_batch_tokens, step)


def available(limit_gib: float) -> list[Room]:
    """Where the student will be; then, if that is a GPU, the host. `limit_gib`: of the first, by settings; 0 = none."""
    limit = (int(limit_gib * GIB) if limit_gib else None, "the setting trainer_memory_gib")
    device, host = _device(), [_machine(), _container()]
    if device[0] is None:
        return [_least([*host, limit], "all")]
    return [_least([device, limit], "device"), _least(host, "host")]


def _least(found: Sequence[tuple[int | None, str]], holds: Literal["all", "device", "host"]) -> Room:
    number, what = min((number, what) for number, what in found if number is not None)
    return Room(number, what, holds)


def _device() -> tuple[int | None, str]:
    if not Path("/dev/nvidia0").exists():
        return None, ""
    import torch

    free, _ = torch.cuda.mem_get_info() if torch.cuda.is_available() else (None, None)
    return free, "the GPU's free memory"


def _machine() -> tuple[int | None, str]:
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    kib = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    return None if kib is None else kib << 10, "the machine's available memory"


def _container() -> tuple[int | None, str]:
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if not limit.is_file() or limit.read_text().strip() == "max":
        return None, ""
    stat = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
    cached = next((int(line.split()[1]) for line in stat if line.startswith("inactive_file ")), 0)
    return int(limit.read_text()) - int(used.read_text()) + cached, "the container's limit"


def split_by_ranks(parts: Mapping[str, int], num_ranks: int) -> dict[str, int]:
    """What one of several ranks needs: weights and what belongs to them is split, the rest is not."""
    split = ("weights", "float32 master weights", "gradients", "optimizer", "averages")
    return {name: number // num_ranks if name in split else number for name, number in parts.items()}


def memory(parts: Mapping[str, int], rooms: Sequence[Room], num_ranks: int = 1) -> Check:
    """The trainer has room for the job: for its weights surely, for everything probably. Of several rooms the check of
    the one that is short, else of the first."""
    parts = split_by_ranks(parts, num_ranks)
    checks = [_fits({name: parts[name] for name in parts if room.has(name)}, room) for room in rooms]
    return min(checks, key=lambda check: ("error", "warning", "ok").index(check.verdict))


def _fits(parts: Mapping[str, int], room: Room) -> Check:
    total, has = sum(parts.values()), room.num_bytes
    least = total - parts.get("activations", 0) - parts.get("samples in flight", 0)
    evidence = {"needed_bytes": total, "available_bytes": has, "available_by": room.source, "parts": dict(parts)}
    message = (
        f"the trainer needs about {total / GIB:.2f} GiB for {WHAT[room.holds]}, and has {has / GIB:.2f} GiB "
        f"({room.source})"
    )
    if total <= has:
        return Check(name="memory", verdict="ok", message=message, evidence=evidence)
    biggest = max(parts, key=lambda name: parts[name])
    fix = f"most is {biggest}, {parts[biggest] / GIB:.2f} GiB: student.lora, student.dtype: bfloat16, "
    fix += "student.activation_checkpointing, a smaller micro_batch_tokens, max_staleness or max_tokens, or more memory"
    verdict = "error" if least > has else "warning"
    return Check(name="memory", verdict=verdict, message=f"too little memory: {message}", evidence=evidence, fix=fix)
