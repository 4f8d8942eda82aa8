"""`python -m stillhouse.trainer`: settings come from the environment (core/config.py)."""

from stillhouse.core.service import main
from stillhouse.trainer.app import build

if __name__ == "__main__":
    main("trainer", build)
