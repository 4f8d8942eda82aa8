"""The learner's state on disk, bit for bit: safetensors for arrays, JSON for the rest, never pickle.

    model.safetensors       weights in the precision the optimizer sees (float32 masters of a bfloat16 student);
                            those of the adapter alone where only that learns
    optimizer.safetensors   `{parameter}/{slot}` of AdamW
    average.safetensors     moving average of these weights, where the job keeps one
    followed.safetensors    the one that its teachers follow
    state.json              policy version, random states, versions

Several ranks write a part of each tensor file (shards.py), the first of them the rest. Hashes, the manifest and
atomicity are the caller's (trainer/manifests.py); here are only the contents.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from stillhouse.core.blobs import read_json, write_json
from stillhouse.core.errors import CorruptError
from stillhouse.trainer import shards
from stillhouse.trainer.shards import Share

WEIGHTS: Final = "model"
OPTIMIZER: Final = "optimizer"
AVERAGE: Final = "average"
FOLLOWED: Final = "followed"
STATE_FILE: Final = "state.json"
SCHEMA_VERSION: Final = 1


def save_state(
    folder: Path,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, Any],
    share: Share,
    *,
    averages: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write a learner's state, or the share of it that is here; `weights` are the very tensors of the optimizer.

    `averages` are those that the job keeps, by name of the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards.write(folder, WEIGHTS, weights, share)
    for stem, average in averages.items():
        shards.write(folder, stem, average, share)
    slots = {
        f"{name}/{slot}": value
        for name, tensor in weights.items()
        for slot, value in optimizer.state.get(tensor, {}).items()
    }
    shards.write(folder, OPTIMIZER, slots, share)
    if share.rank == 0:
        state = {"schema_version": SCHEMA_VERSION, "torch": torch.__version__, "random": random_states(), **facts}
        write_json(folder / STATE_FILE, state)


def load_state(
    folder: Path,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    share: Share,
    *,
    averages: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Any]:
    """Restore what `save_state` wrote, in whatever shares, into the same tensors; gives the facts.

    Random states are set, too.

    Raises:
        CorruptError: a file is missing, unreadable, or belongs to another model or version.
    """
    state = read_facts(folder)
    slots = shards.read(folder, OPTIMIZER, share)
    load_weights(folder, weights, share)
    for stem, average in averages.items():
        _copy(folder, stem, average, share)
    optimizer.state.clear()
    for key, value in slots.items():
        name, _, slot = key.rpartition("/")
        if name not in weights:
            raise CorruptError(f"{folder}: the optimizer holds '{key}', which the student does not have")
        optimizer.state[weights[name]][slot] = value.to(weights[name].device)
    restore_random_states(state["random"])
    return state


def read_facts(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint.

    Raises:
        CorruptError: another version wrote it.
    """
    state = read_json(folder / STATE_FILE)
    if state.get("schema_version") != SCHEMA_VERSION:
        raise CorruptError(
            f"{folder / STATE_FILE} has version {state.get('schema_version')}, this program reads {SCHEMA_VERSION}"
        )
    return state


def load_weights(folder: Path, weights: Mapping[str, Tensor], share: Share) -> None:
    """Copy the weights of a checkpoint into `weights`, the share that is here.

    Raises:
        CorruptError: names, shapes or element types differ.
    """
    _copy(folder, WEIGHTS, weights, share)


@torch.no_grad()
def _copy(folder: Path, stem: str, weights: Mapping[str, Tensor], share: Share) -> None:
    loaded = shards.read(folder, stem, share)
    expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in loaded.items()}
    if expected != found:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise CorruptError(
            f"{folder}: '{stem}' does not fit the student: {odd[0]} is {found.get(odd[0])} in the file and "
            f"{expected.get(odd[0])} in the model ({len(odd)} tensors differ); was the job's student changed?"
        )
    for name, tensor in weights.items():
        tensor.copy_(loaded[name])


def random_states() -> dict[str, Any]:
    """The states of all global random generators, as JSON values."""
    version, keys, gauss_next = random.getstate()
    _, numpy_keys, position, has_gauss, cached = np.random.get_state()  # type: ignore[misc]
    states: dict[str, Any] = {
        "python": [version, list(keys), gauss_next],
        "numpy": [np.asarray(numpy_keys).tolist(), int(position), int(has_gauss), float(cached)],  # type: ignore[arg-type]
        "torch": _text(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        states["cuda"] = [_text(state) for state in torch.cuda.get_rng_state_all()]
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Undo of `random_states`."""
    version, keys, gauss_next = states["python"]
    random.setstate((version, tuple(keys), gauss_next))
    numpy_keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state(("MT19937", np.asarray(numpy_keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes_tensor(states["torch"]))
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state_all([_bytes_tensor(text) for text in states["cuda"]])


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes_tensor(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.uint8).copy())
