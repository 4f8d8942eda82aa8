"""API keys of the REST interface: made once, shown once, kept as hashes.

The file is a JSON list of {name, sha256, created_at}. A plain sha256 is enough: a key is 256 random bits, which nobody
can guess from a hash. Services re-read the file when it changes, so adding or removing a key needs no restart.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from stillhouse.core.blobs import sha256_bytes, write_json
from stillhouse.core.errors import ConfigError, ConflictError, SpecError

KEY_PREFIX = "stillhouse_"
"""Makes a leaked key recognisable to scanners and people."""
KEY_BYTES = 32
"""256 random bits."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as the file knows it."""

    name: str
    """Whose key; shown as the owner of jobs and in the access log."""
    sha256: str
    created_at: float


def hash_key(key: str) -> str:
    """What the file stores of a key."""
    return sha256_bytes(key.encode())


def load_keys(path: Path) -> list[ApiKey]:
    """All keys; a missing file means none.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        return [ApiKey(**entry) for entry in json.loads(path.read_bytes())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"the file of API keys {path} cannot be read: {error}; restore it or delete it") from None


def create_key(path: Path, name: str) -> str:
    """Add a key and return it in plain: it is not stored and cannot be shown again.

    Raises:
        SpecError: the name is not usable.
        ConflictError: the name is taken.
    """
    if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}", name):
        raise SpecError(f"key name '{name}': use 1-64 letters, digits, dots, dashes or underscores", param="name")
    keys = load_keys(path)
    if any(key.name == name for key in keys):
        raise ConflictError(f"there is a key named '{name}' already; remove it first or choose another name")
    plain = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    keys.append(ApiKey(name, hash_key(plain), round(time.time(), 3)))
    write_json(path, [asdict(key) for key in keys], mode=0o600)
    return plain


def remove_key(path: Path, name: str) -> bool:
    """Revoke a key; False if there is none of that name."""
    keys = load_keys(path)
    left = [key for key in keys if key.name != name]
    if len(left) < len(keys):
        write_json(path, [asdict(key) for key in left], mode=0o600)
    return len(left) < len(keys)
