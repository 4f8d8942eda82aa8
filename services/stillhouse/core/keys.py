"""API keys of the REST interface: made once, shown once, kept as hashes.

The file is a JSON list of {name, sha256, created_at, owner, scopes, limits}. A plain sha256 is enough: a key is 256
random bits, which nobody can guess from a hash. Services re-read the file when it changes, so adding or removing a key
needs no restart.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from stillhouse.core.blobs import locked, sha256_bytes, write_json
from stillhouse.core.errors import ConfigError, ConflictError, SpecError

KEY_PREFIX = "stillhouse_"
"""Makes a leaked key recognisable to scanners and people."""
KEY_BYTES = 32
"""256 random bits."""
SCOPES: Final = ("read", "write", "admin")
"""What a key may do, each with all before it: look; submit and change; see everybody's objects and manage keys."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as the file knows it."""

    name: str
    """Of the key itself."""
    sha256: str
    created_at: float
    owner: str = ""
    """Whose jobs and files it makes and sees; several keys may have one owner. In files from before there were owners
    it is the name."""
    scopes: tuple[str, ...] = SCOPES
    """What it may do. Keys from before there were scopes keep what they could: everything."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """Of its owner's use, instead of the settings' limits of the same names."""


def hash_key(key: str) -> str:
    """What the file stores of a key."""
    return sha256_bytes(key.encode())


def load_keys(path: Path) -> list[ApiKey]:
    """All keys; a missing file means none.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        return [_read(entry) for entry in json.loads(path.read_bytes())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"the file of API keys {path} cannot be read: {error}; restore it or delete it") from None


def _read(entry: dict[str, Any]) -> ApiKey:
    key = ApiKey(**{**entry, "scopes": tuple(entry.get("scopes", SCOPES))})
    if not set(key.scopes) <= set(SCOPES):
        raise ValueError(f"key '{key.name}' has scopes {key.scopes}, there are {SCOPES}")
    return key if key.owner else ApiKey(**{**asdict(key), "owner": key.name})


def create_key(
    path: Path,
    name: str,
    *,
    owner: str = "",
    scopes: Iterable[str] = ("write",),
    limits: Mapping[str, float] | None = None,
) -> str:
    """Add a key and return it in plain: it is not stored and cannot be shown again.

    `owner`: default is the name. `scopes` bring those below them.

    Raises:
        SpecError: a name or scope is not usable.
        ConflictError: the name is taken.
    """
    check_name("name", name)
    check_name("owner", owner or name)
    wanted = set(scopes)
    if not wanted or not wanted <= set(SCOPES):
        raise SpecError(f"scopes {sorted(wanted)}: choose from {', '.join(SCOPES)}", param="scopes")
    with locked(_lock(path)):
        keys = load_keys(path)
        if any(key.name == name for key in keys):
            raise ConflictError(f"there is a key named '{name}' already; remove it first or choose another name")
        plain = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
        granted = SCOPES[: max(SCOPES.index(scope) for scope in wanted) + 1]
        key = ApiKey(name, hash_key(plain), round(time.time(), 3), owner or name, granted, dict(limits or {}))
        write_json(path, [asdict(key) for key in [*keys, key]], mode=0o600)
    return plain


def check_name(param: str, name: str) -> None:
    """Refuse what could be mistaken in logs and lists.

    Raises:
        SpecError: says what is allowed.
    """
    if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}", name):
        raise SpecError(f"{param} '{name}': use 1-64 letters, digits, dots, dashes or underscores", param=param)


def remove_key(path: Path, name: str, *, keeps_an_admin: bool = False) -> bool:
    """Revoke a key; False if there is none of that name.

    Raises:
        ConflictError: with `keeps_an_admin`, if nobody could manage keys any more.
    """
    with locked(_lock(path)):
        keys = load_keys(path)
        left = [key for key in keys if key.name != name]
        if len(left) == len(keys):
            return False
        if keeps_an_admin and not any("admin" in key.scopes for key in left):
            raise ConflictError(f"'{name}' is the last key with the scope admin; make another one first")
        write_json(path, [asdict(key) for key in left], mode=0o600)
    return True


def _lock(path: Path) -> Path:
    """Replicas and commands change the file, and none may undo what another did."""
    return path.with_name(f"{path.name}.lock")
