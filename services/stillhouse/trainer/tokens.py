"""End-of-sequence and special tokens of a registered model, from its JSON files."""

from __future__ import annotations

from pathlib import Path

from stillhouse.core.blobs import read_json
from stillhouse.core.errors import PreflightError
from stillhouse.core.models import ModelEntry, end_ids


def stop_token_ids(entry: ModelEntry) -> list[int]:
    """Token ids that end a completion: generation_config.json first, then config.json.

    Raises:
        PreflightError: the model names none, so completions would never end.
    """
    if found := end_ids(entry):
        return found
    raise PreflightError(
        f"model '{entry.name}' names no end-of-sequence token; add eos_token_id to its generation_config.json"
    )


def special_token_ids(entry: ModelEntry) -> list[int]:
    """Ids that tokenizer.json marks as special: ends of turns, roles, padding; no words of a text."""
    added = read_json(Path(entry.path) / "tokenizer.json").get("added_tokens") or []
    return sorted({int(token["id"]) for token in added if token.get("special")})
