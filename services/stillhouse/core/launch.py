"""How this process was started: by itself, or as one of several ranks by torchrun."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Launch:
    """What torchrun says in the environment."""

    rank: int = 0
    """Number of this process among those started together."""
    size: int = 1
    """How many were started together."""
    is_by_torchrun: bool = False

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> Launch:
        env = os.environ if environ is None else environ
        return cls(int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), "TORCHELASTIC_RUN_ID" in env)

    def pid(self) -> int:
        """The process that a supervisor knows: torchrun, if that started this one."""
        return os.getppid() if self.is_by_torchrun else os.getpid()
