"""Who may call: `Authorization: Bearer stillhouse_...`, compared in constant time with the hashes in the keys file."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from stillhouse.core.config import Settings
from stillhouse.core.errors import AuthError, ForbiddenError
from stillhouse.core.keys import SCOPES, ApiKey, hash_key, load_keys

OPEN_PATHS: Final = frozenset({"/healthz", "/readyz", "/metrics", "/openapi.json", "/docs"})
"""Everything else needs a key, also what does not exist: a new route is closed until it is listed here."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request."""

    owner: str
    """Whose objects it makes and sees; '' where authentication is off."""
    scopes: tuple[str, ...] = SCOPES
    key: str = ""
    """Name of the key."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """Of the key, instead of the settings'."""

    def may_see(self, owner: str) -> bool:
        """Objects of others do not exist for a caller, unless it administers the deployment."""
        return "admin" in self.scopes or owner == self.owner

    def require(self, scope: str) -> None:
        """Refuse a caller without a scope.

        Raises:
            ForbiddenError: says what the key has and what is needed.
        """
        if scope not in self.scopes:
            raise ForbiddenError(
                f"this needs a key with the scope '{scope}', and '{self.key}' has {', '.join(self.scopes)}; use "
                f"another key, or let an administrator make one: stillhouse keys create NAME --scope {scope}"
            )


class KeyStore:
    """The keys file, read afresh when it changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._keys: list[ApiKey] = []

    def find(self, key: str) -> ApiKey | None:
        """What is known of a key, None if it is not known."""
        self._refresh()
        digest = hash_key(key)
        found = None
        for entry in self._keys:  # all of them, so that the time does not tell where a match is
            if hmac.compare_digest(entry.sha256, digest):
                found = entry
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
    """Finds out who sends a request."""

    def __init__(self, settings: Settings) -> None:
        self._store = KeyStore(settings.keys_path()) if settings.auth == "keys" else None

    def caller(self, path: str, authorization: str) -> Caller:
        """Who calls; nobody in particular where no key is needed.

        Raises:
            AuthError: the key is missing or wrong.
        """
        if self._store is None or path in OPEN_PATHS:
            return Caller("")
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthError("an API key is needed: send the header 'Authorization: Bearer stillhouse_...'")
        entry = self._store.find(key.strip())
        if entry is None:
            raise AuthError("this API key is not known (any more); check it, or ask for a new one")
        return Caller(entry.owner, entry.scopes, entry.name, entry.limits)
