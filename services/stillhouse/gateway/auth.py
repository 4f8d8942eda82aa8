"""Who may call: `Authorization: Bearer stillhouse_...`, compared in constant time with the hashes in the keys file."""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import Final

from stillhouse.core.config import Settings
from stillhouse.core.errors import AuthError
from stillhouse.core.keys import ApiKey, hash_key, load_keys

OPEN_PATHS: Final = frozenset({"/healthz", "/readyz", "/metrics", "/openapi.json", "/docs"})
"""Everything else needs a key, also what does not exist: a new route is closed until it is listed here."""


class KeyStore:
    """The keys file, read afresh when it changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._keys: list[ApiKey] = []

    def owner(self, key: str) -> str | None:
        """Name of the key, None if it is not known."""
        self._refresh()
        digest = hash_key(key)
        found = None
        for entry in self._keys:  # all of them, so that the time does not tell where a match is
            if hmac.compare_digest(entry.sha256, digest):
                found = entry.name
        return found

    def _refresh(self) -> None:
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            self._stamp, self._keys = None, []
            return
        stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if stamp != self._stamp:
            self._keys, self._stamp = load_keys(self._path), stamp


class Authenticator:
    """Names the caller of a request."""

    def __init__(self, settings: Settings) -> None:
        self._store = KeyStore(settings.keys_path()) if settings.auth == "keys" else None

    def owner(self, path: str, authorization: str) -> str:
        """Name of the caller's key; '' where no key is needed.

        Raises:
            AuthError: the key is missing or wrong.
        """
        if self._store is None or path in OPEN_PATHS:
            return ""
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthError("an API key is needed: send the header 'Authorization: Bearer stillhouse_...'")
        owner = self._store.owner(key.strip())
        if owner is None:
            raise AuthError("this API key is not known (any more); check it, or ask for a new one")
        return owner
