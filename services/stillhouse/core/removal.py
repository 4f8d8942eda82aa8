"""Deleting a folder that somebody may just be about to need: at once for every reader, and for good in the end.

It is moved out of sight first, then looked at who needs it, and moved back if anybody does. Who comes to need it says
so first and then looks whether it is there: one of both sees the other.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from stillhouse.core.blobs import fsync_dir
from stillhouse.core.failpoints import failpoint

GONE: Final = "tmp.gone."
"""Begins the name of what is being deleted."""


def remove(folder: Path, is_needed: Callable[[], bool]) -> bool:
    """Delete a folder; False = it is needed, or is gone already. A process that dies here leaves a folder GONE..."""
    doomed = folder.with_name(f"{GONE}{folder.name}.{secrets.token_hex(4)}")
    if not put_aside({folder: doomed}, is_needed):
        return False
    fsync_dir(folder.parent)
    failpoint("trainer.retaining", folder.name)
    shutil.rmtree(doomed, ignore_errors=True)
    return True


def put_aside(paths: Mapping[Path, Path], is_needed: Callable[[], bool]) -> bool:
    """Move what is there out of sight, and back if it is needed after all; False = nothing is out of sight."""
    moved = [(path, aside) for path, aside in paths.items() if _moved(path, aside)]
    if moved and is_needed():
        for path, aside in reversed(moved):
            aside.rename(path)
        return False
    return bool(moved)


def _moved(path: Path, aside: Path) -> bool:
    try:
        path.rename(aside)
    except FileNotFoundError:  # another process was faster
        return False
    return True
