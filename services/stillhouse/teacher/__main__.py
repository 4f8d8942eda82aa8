"""`python -m stillhouse.teacher`: one teacher process, configured by STILLHOUSE_* variables."""

from stillhouse.core.service import main
from stillhouse.teacher.app import build

if __name__ == "__main__":
    main("teacher", build)
