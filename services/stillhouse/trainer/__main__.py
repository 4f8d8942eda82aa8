"""`python -m stillhouse.trainer`: settings come from the environment (core/config.py).

Started by hand it is the service, or starts what is: torchrun for several ranks, a node for several nodes. Under
torchrun rank 0 is the service, the others follow it.
"""

import os
import sys

from stillhouse.core.config import load_settings
from stillhouse.core.errors import StillhouseError
from stillhouse.core.launch import Launch, torchrun
from stillhouse.core.service import main
from stillhouse.trainer import follow, node
from stillhouse.trainer.app import build


def start() -> None:
    """What this process is to be."""
    launch = Launch.read()
    if launch.rank > 0:
        follow.main(launch)
    elif "RANK" in os.environ:  # torchrun started it, or another tool that says the same
        main("trainer", build)
    else:
        try:
            settings = load_settings()
        except StillhouseError as error:
            sys.exit(f"stillhouse trainer: {error.message}")
        if settings.trainer_nodes > 1:
            node.main(settings)
        elif settings.trainer_ranks > 1:
            command = torchrun(settings.trainer_ranks, settings.drain_s)
            os.execv(command[0], command)
        else:
            main("trainer", build)


if __name__ == "__main__":
    start()
