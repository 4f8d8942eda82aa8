"""The finished student as a folder that transformers, vLLM and others load: weights, tokenizer, model card."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.core.errors import ConflictError

COPIED_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)
"""Files that training does not change, byte for byte from the student."""

_LABELS: Final = {
    "student": "Student",
    "init_from": "Began with the weights of",
    "teachers": "Teacher(s)",
    "recipe": "Began with the values of the recipe",
    "objective": "Objective",
    "on_policy_fraction": "Share of the prompts that the student answered itself",
    "steps": "Optimizer steps",
    "adapter": "Low-rank adapter, merged here and by itself in adapter/",
    "ema_decay": "Weights are their moving average over the steps, with decay",
    "data_sha256": "Training data (sha256)",
    "heldout_reverse_kl_before": "Held-out KL(student || teacher) before, nats per token",
    "heldout_reverse_kl_after": "Held-out KL(student || teacher) after, nats per token",
    "heldout_accuracy_before": "Held-out accuracy before, by the rows' verifiers",
    "heldout_accuracy_after": "Held-out accuracy after",
    "heldout_by_teacher": "Held-out by teacher",
    "job_id": "Job",
}
"""Known keys of a card, in the order they are shown."""
_UNLISTED: Final = ("license", "off_policy_source", "stages")
"""Keys that the text takes up."""


def export_model(
    model: PreTrainedModel,
    weights: Iterable[tuple[str, np.ndarray, str]],
    source_dir: Path,
    folder: Path,
    card: Mapping[str, Any],
) -> Path:
    """Write the student with `weights` (`Parameters.state_arrays`) to the new or empty `folder`; gives `folder`.

    `card` fills the model card: `stages` (a list: name, and what of `_LABELS` belongs to a stage), the other keys of
    `_LABELS`, `license` (a note on the student's licence), and any others, which are listed under their own names.

    Raises:
        ConflictError: the folder holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConflictError(f"{folder} is not empty; export into a new folder")
    save_model(model, weights, source_dir, folder)
    (folder / "README.md").write_text(model_card(card))
    return folder


def save_model(
    model: PreTrainedModel, weights: Iterable[tuple[str, np.ndarray, str]], source_dir: Path, folder: Path
) -> None:
    """Write the model with `weights`, and of `source_dir` what training does not change."""
    model.save_pretrained(folder, state_dict={name: _tensor(array, dtype) for name, array, dtype in weights})
    for name in COPIED_FILES:
        if (source_dir / name).is_file():
            shutil.copyfile(source_dir / name, folder / name)


def _tensor(array: np.ndarray, dtype: str) -> Tensor:
    return torch.from_numpy(array).view(torch.bfloat16) if dtype == "bfloat16" else torch.from_numpy(array)


def model_card(card: Mapping[str, Any]) -> str:
    """The text of README.md."""
    stages = list(card.get("stages") or [card])
    how, tags = _trainings(stages)
    card = {**card, **stages[0]} if len(stages) == 1 else card
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["stillhouse", *tags]}
    known = [(label, card[key]) for key, label in _LABELS.items() if card.get(key) is not None]
    others = [(key, value) for key, value in card.items() if key not in (*_LABELS, *_UNLISTED, "name")]
    phases = [(f"Stage {_of(stage)}", _without_name(stage)) for stage in stages] if len(stages) > 1 else []
    rows = "\n".join(f"| {_cell(label)} | {_cell(value)} |" for label, value in known + phases + others)
    student, teachers = card.get("student", "Student"), card.get("teachers", "its teacher")
    title = f"{student} distilled from {_cell(teachers)}" if teachers else f"{student}, trained on"
    note = card.get("license") or (
        "The weights are derived from the student's; its licence applies, and the teacher's terms may "
        "restrict what models trained on its outputs are used for. Check both before you publish."
    )
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {title}

Trained with Stillhouse {version("stillhouse")}: {how}.

| | |
|---|---|
{rows}

## License

{note}
"""


def _trainings(stages: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """(what happened in a sentence, tags) of all stages."""
    told = [_training(stage) for stage in stages]
    tags = list(dict.fromkeys(tag for _, stage_tags in told for tag in stage_tags))
    if len(told) == 1:
        return told[0][0], tags
    parts = [f"{_of(stage)}: {text}" for stage, (text, _) in zip(stages, told, strict=True)]
    return f"in {len(stages)} stages; " + "; then ".join(parts), tags


def _of(stage: Mapping[str, Any]) -> str:
    return f"'{stage['name']}'"


def _without_name(stage: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in stage.items() if key != "name"}


def _training(card: Mapping[str, Any]) -> tuple[str, list[str]]:
    """(what happened in a sentence, tags) of a stage: `on_policy_fraction`, `off_policy_source` and objective."""
    share, objective = card.get("on_policy_fraction", 1.0), card.get("objective") or {}
    writer = "its teachers" if card.get("off_policy_source") == "teacher" else "the data"
    kind = objective.get("objective")
    if kind == "cross_entropy":
        return f"fine-tuned on completions by {writer}", ["distillation"] if "teachers" in writer else ["fine-tuning"]
    if kind == "policy_gradient" and objective.get("teacher_weight") == 0:
        return "the student wrote its own completions and learned from a verifier's verdicts on them", ["grpo"]
    judged = "the teacher judged every token of them, the student learned from that"
    judged += ", and from a verifier's verdicts" if objective.get("reward") else ""
    if share == 1:
        text = "on-policy distillation; the student wrote its own completions, " + judged
        return text, ["distillation", "on-policy-distillation"]
    if share == 0:
        return f"distillation on completions by {writer}; {judged}", ["distillation"]
    return (
        f"distillation on completions of which the student wrote {share:.0%} and {writer} the rest; {judged}",
        ["distillation", "on-policy-distillation"],
    )


def _cell(value: Any) -> str:
    """A value in a table, on one line."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_cell(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    return str(value).replace("|", "\\|").replace("\n", " ")
