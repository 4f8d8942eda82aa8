"""`python -m stillhouse.sampler`: one sampler process, configured by STILLHOUSE_* variables."""

from stillhouse.core.service import main
from stillhouse.sampler.app import build

if __name__ == "__main__":
    main("sampler", build)
