"""How this process was started: by itself, or as one of several ranks by torchrun; and how torchrun is started."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from stillhouse.core.config import Settings
from stillhouse.core.errors import ConfigError


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


def torchrun(ranks: int, drain_s: float, *options: str) -> tuple[str, ...]:
    """The command that starts `ranks` processes of a trainer here, and ends all of them when one dies."""
    options = (*(options or ("--standalone",)), f"--nproc-per-node={ranks}", f"--shutdown-timeout={math.ceil(drain_s)}")
    return (sys.executable, "-m", "torch.distributed.run", *options, "-m", "stillhouse.trainer")


def ranks_per_node(settings: Settings) -> int:
    """How many of a trainer's ranks run on each of its nodes.

    Raises:
        ConfigError: they cannot be shared out evenly.
    """
    ranks, nodes = settings.trainer_ranks, settings.trainer_nodes
    if ranks % nodes:
        raise ConfigError(
            f"the setting trainer_ranks is {ranks}, and trainer_nodes {nodes}: each node runs as many ranks as the "
            f"others; set STILLHOUSE_TRAINER_RANKS to a multiple of {nodes} (all ranks of all nodes)",
            param="trainer_ranks",
        )
    return ranks // nodes


def node_number(settings: Settings, environ: Mapping[str, str], host: str) -> int:
    """Number of this node: the setting, else the index of a Kubernetes job's pod, else the end of the host's name.

    Raises:
        ConfigError: nothing says it, or there are not so many nodes.
    """
    name = re.search(r"(\d+)$", host.partition(".")[0])
    number, source = settings.trainer_node, "the setting trainer_node"
    if number is None and (index := environ.get("JOB_COMPLETION_INDEX", "")).isdecimal():
        number, source = int(index), "JOB_COMPLETION_INDEX"
    if number is None and name is not None:
        number, source = int(name[1]), f"the host name '{host}'"
    if number is None:
        raise ConfigError(
            f"which of the {settings.trainer_nodes} nodes of the trainer is this? The host name '{host}' does not end "
            "in a number; set STILLHOUSE_TRAINER_NODE to 0 on the first, 1 on the second ...",
            param="trainer_node",
        )
    if number >= settings.trainer_nodes:
        raise ConfigError(
            f"{source} says that this is node {number}, and trainer_nodes is {settings.trainer_nodes}: nodes are "
            f"0 to {settings.trainer_nodes - 1}",
            param="trainer_node",
        )
    return number
