"""Runs inside vLLM's processes, which import it before they make the model: they end with the teacher."""

from __future__ import annotations

import os

from stillhouse.core.vllm_child import enter


class Extension:
    """What vLLM adds to its worker class."""

    def stillhouse_pid(self) -> int:
        return os.getpid()


enter()
