"""The finished student as a folder that transformers, vLLM and others load: weights, tokenizer, model card."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
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
    "teachers": "Teacher(s)",
    "objective": "Objective",
    "steps": "Optimizer steps",
    "adapter": "Low-rank adapter, merged here and by itself in adapter/",
    "ema_decay": "Weights are their moving average over the steps, with decay",
    "data_sha256": "Training data (sha256)",
    "heldout_reverse_kl_before": "Held-out KL(student || teacher) before, nats per token",
    "heldout_reverse_kl_after": "Held-out KL(student || teacher) after, nats per token",
    "job_id": "Job",
}
"""Known keys of a card, in the order they are shown."""


def export_model(
    model: PreTrainedModel,
    weights: Iterable[tuple[str, np.ndarray, str]],
    source_dir: Path,
    folder: Path,
    card: Mapping[str, Any],
) -> Path:
    """Write the student with `weights` (`Parameters.state_arrays`) to the new or empty `folder`; gives `folder`.

    `card` fills the model card: the keys of `_LABELS`, `license` (a note on the student's licence), and any others,
    which are listed under their own names.

    Raises:
        ConflictError: the folder holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConflictError(f"{folder} is not empty; export into a new folder")
    model.save_pretrained(folder, state_dict={name: _tensor(array, dtype) for name, array, dtype in weights})
    for name in COPIED_FILES:
        if (source_dir / name).is_file():
            shutil.copyfile(source_dir / name, folder / name)
    (folder / "README.md").write_text(model_card(card))
    return folder


def _tensor(array: np.ndarray, dtype: str) -> Tensor:
    return torch.from_numpy(array).view(torch.bfloat16) if dtype == "bfloat16" else torch.from_numpy(array)


def model_card(card: Mapping[str, Any]) -> str:
    """The text of README.md."""
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["stillhouse", "distillation", "on-policy-distillation"],
    }
    known = [(label, card[key]) for key, label in _LABELS.items() if card.get(key) is not None]
    others = [(key, value) for key, value in card.items() if key not in _LABELS and key != "license"]
    rows = "\n".join(f"| {_cell(label)} | {_cell(value)} |" for label, value in known + others)
    title = f"{card.get('student', 'Student')} distilled from {_cell(card.get('teachers', 'its teacher'))}"
    note = card.get("license") or (
        "The weights are derived from the student's; its licence applies, and the teacher's terms may "
        "restrict what models trained on its outputs are used for. Check both before you publish."
    )
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {title}

Trained by on-policy distillation with Stillhouse {version("stillhouse")}:
the student wrote its own completions, the teacher judged every token of them, the student learned from that.

| | |
|---|---|
{rows}

## License

{note}
"""


def _cell(value: Any) -> str:
    """A value in a table, on one line."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_cell(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    return str(value).replace("|", "\\|").replace("\n", " ")
