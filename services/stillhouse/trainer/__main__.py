"""`python -m stillhouse.trainer`: settings come from the environment (core/config.py).

Under torchrun rank 0 is the service, the others follow it.
"""

from stillhouse.core.launch import Launch
from stillhouse.core.service import main
from stillhouse.trainer import follow
from stillhouse.trainer.app import build

if __name__ == "__main__":
    launch = Launch.read()
    if launch.rank == 0:
        main("trainer", build)
    else:
        follow.main(launch)
