"""Prepares the volumes of a compose deployment, once: folders, secrets, the first API key. Runs as root, before all.

    /secrets/redis-users.acl   users of the queue server
             redis-password    what the services send it
             internal-token    credential of calls between services
    /var/lib/stillhouse/api-keys.json   hashed API keys
                        api-key         the first key in plain, for its owner to read
                        client.json     address and key for commands inside the containers

What exists stays, so that `up` after `down` finds the same keys. Nothing of it is printed.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
from pathlib import Path
from typing import Final

from stillhouse.core.blobs import write_atomic, write_json
from stillhouse.core.config import load_settings
from stillhouse.core.errors import StillhouseError
from stillhouse.core.keys import create_key, hash_key, load_keys, remove_key

UID: Final = 10001
KEY_NAME: Final = "compose"
SECRETS: Final = Path("/secrets")
HOME: Final = Path("/var/lib/stillhouse")
DATA: Final = Path("/data")
GATEWAY: Final = "http://gateway:8470"
COMMANDS: Final = "+@all -@admin -@dangerous +info"
"""Of the queue server: no configuration, no flush, no debugging."""


def main() -> None:
    """Prepare everything; exits with 2 and the reason where a value of .env cannot work."""
    try:
        check_environment(dict(os.environ))
        make_secrets()
        make_key()
    except (StillhouseError, OSError) as error:
        sys.exit(f"setup: {getattr(error, 'message', error)}")
    for folder in (SECRETS, HOME, DATA):
        own(folder)
    print("setup: done")


def check_environment(environ: dict[str, str]) -> None:
    """Refuse values of .env before any service starts with them."""
    load_settings({name: value for name, value in environ.items() if name != "STILLHOUSE_HOME"})


def make_secrets() -> None:
    """Passwords, as files that only their user can read."""
    for name in ("redis-password", "internal-token"):
        if not (SECRETS / name).is_file():
            write_atomic(SECRETS / name, secrets.token_urlsafe(32).encode(), mode=0o600)
    # The server replays its log as the default user: switched off, it would drop every script's writes at a restart. It
    # has a password that nobody knows instead.
    digest = hashlib.sha256((SECRETS / "redis-password").read_bytes().strip()).hexdigest()
    nobody = hashlib.sha256(secrets.token_bytes(32)).hexdigest()
    users = f"user default on #{nobody} ~* &* +@all\nuser stillhouse on #{digest} ~sh:* &* {COMMANDS}\n"
    write_atomic(SECRETS / "redis-users.acl", users.encode(), mode=0o600)


def make_key() -> None:
    """The first API key, once; kept as long as the gateway knows its hash."""
    keys, plain = HOME / "api-keys.json", HOME / "api-key"
    key = plain.read_text().strip() if plain.is_file() else ""
    if hash_key(key) not in {entry.sha256 for entry in load_keys(keys)}:
        remove_key(keys, KEY_NAME)  # its plain text is lost, so nobody can use it
        key = create_key(keys, KEY_NAME, scopes=["admin"])
        write_atomic(plain, f"{key}\n".encode(), mode=0o600)
    write_json(HOME / "client.json", {"url": GATEWAY, "api_key": key}, mode=0o600)


def own(folder: Path) -> None:
    """Give a volume to the user that the services run as; one that is theirs already is left alone."""
    for path in (folder, *folder.iterdir()):
        if path.stat().st_uid != UID:
            os.chown(path, UID, UID)


if __name__ == "__main__":
    main()
