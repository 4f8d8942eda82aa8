"""Where the gateway is, and who asks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stillhouse.core.errors import ConfigError, UnavailableError


@dataclass(frozen=True, slots=True)
class Target:
    """A gateway and the key for it."""

    url: str
    api_key: str = ""

    def options(self) -> dict[str, Any]:
        """Arguments for an httpx client."""
        headers = {"User-Agent": f"stillhouse-python/{version('stillhouse')}"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        # a proxy of the environment has no business with our own machine
        is_local = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        return {"base_url": self.url, "headers": headers, "trust_env": not is_local}

    def unreachable(self, error: Exception) -> UnavailableError:
        """The error for a gateway that does not answer."""
        reason = str(error) or type(error).__name__
        return UnavailableError(f"the gateway at {self.url} does not answer: {reason}; is it running?")

    def __repr__(self) -> str:
        return f"Target({self.url!r})"  # keys do not belong into logs


def find_target(url: str | None, api_key: str | None, environ: Mapping[str, str] | None = None) -> Target:
    """From the arguments, else STILLHOUSE_URL and STILLHOUSE_API_KEY, else what `stillhouse up` wrote on this machine.

    The key of that file is only used with the address of that file: it must not travel to somebody else's server.

    Raises:
        ConfigError: no address is known.
    """
    env = os.environ if environ is None else environ
    file = Path(env.get("STILLHOUSE_HOME", "~/.stillhouse")).expanduser() / "client.json"
    try:
        local = json.loads(file.read_bytes())
    except FileNotFoundError:
        local = {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}; delete it and run `stillhouse up`") from None
    local_url = str(local.get("url", "")).rstrip("/")
    chosen = (url or env.get("STILLHOUSE_URL") or local_url).rstrip("/")
    if not chosen:
        raise ConfigError("no gateway is known: start one with `stillhouse up`, or set STILLHOUSE_URL")
    if urlsplit(chosen).scheme not in ("http", "https"):
        raise ConfigError(f"the address '{chosen}' must start with http:// or https://")
    key = api_key if api_key is not None else env.get("STILLHOUSE_API_KEY")
    if key is None:
        key = str(local.get("api_key", "")) if chosen == local_url else ""
    return Target(chosen, key)
