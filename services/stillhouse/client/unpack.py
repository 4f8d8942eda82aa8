"""Downloaded checkpoints: a tar from the network becomes a folder, without trusting the names in it."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from pathlib import Path

from stillhouse.core.blobs import read_json, sha256_file
from stillhouse.core.errors import CorruptError, SpecError


def check_target(target: Path) -> None:
    """Refuse to overwrite.

    Raises:
        SpecError: there is something at `target`.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise SpecError(f"{target} exists already; choose another place or remove it", param="target")


def is_file_target(target: Path) -> bool:
    """`something.tar` keeps the tar as it is; anything else is a folder for its files."""
    return target.suffix == ".tar"


def place(tar: Path, target: Path) -> Path:
    """Move a complete download to `target`: as it is, or its files without their common top folder.

    Raises:
        CorruptError: it is not a tar, names files outside its folder, or they are not what their manifest says.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_file_target(target):
        return Path(shutil.move(tar, target))
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with tarfile.open(tar) as archive:
            for member in archive:
                _, _, inside = member.name.partition("/")
                if not member.isfile() or not inside or ".." in inside.split("/") or "" in member.name.split("/"):
                    raise CorruptError(f"the download holds '{member.name}', which is not a file in a folder")
                _write(archive, member, staging / inside)
        _verify(staging)
        if target.is_dir():
            target.rmdir()  # empty, see check_target
        staging.chmod(0o755)
        return staging.rename(target)
    except (tarfile.TarError, FileExistsError, NotADirectoryError) as error:
        raise CorruptError(f"the download is not usable: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """The bytes of a plain file and nothing else of it: Python 3.11.2, Debian 12's, has no extraction filters."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = archive.extractfile(member)
    assert source is not None, "a plain file has bytes"
    with source, path.open("xb") as sink:
        shutil.copyfileobj(source, sink)


def _verify(folder: Path) -> None:
    """Checkpoints bring a manifest with the hashes of their files; the finished student is a plain model folder."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return
    for name, entry in read_json(manifest)["files"].items():
        found = sha256_file(folder / name) if (folder / name).is_file() else "no such file"
        if found != entry["sha256"]:
            raise CorruptError(
                f"{name} came as {found[:12]}, its manifest says {entry['sha256'][:12]}; download it again"
            )
