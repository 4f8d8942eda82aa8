"""scripts/release-digests: an overlay whose images are pinned by digest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.k8s.rendered import render

ROOT = Path(__file__).resolve().parents[2]
OVERLAY = ROOT / "k8s" / "overlays" / "cpu-smoke"
NAMES = ("gateway", "cpu")


def digest(name: str) -> str:
    return "sha256:" + (name.encode().hex() * 64)[:64]


def release(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts" / "release-digests", *map(str, options)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def images(folder: Path) -> set[str]:
    return {one["image"] for pod in render(folder).pods() for one in pod.all_containers}


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    """As `docker buildx bake --metadata-file` writes it; services of compose share images, and there are warnings."""
    targets = {
        service: {
            "containerimage.digest": digest(name),
            "image.name": f"registry.example:5000/you/{name}:1.0,registry.example:5000/you/{name}:latest",
        }
        for service, name in {"gateway": "gateway", "sampler": "cpu", "teacher": "cpu"}.items()
    }
    path = tmp_path / "build.json"
    path.write_text(json.dumps({**targets, "buildx.build.warnings": []}))
    return path


def test_every_image_of_ours_has_registry_and_digest(tmp_path: Path, metadata: Path) -> None:
    work = release(OVERLAY, tmp_path / "release", "--metadata", metadata)
    assert work.returncode == 0, work.stderr
    before, after = images(OVERLAY), images(tmp_path / "release")
    ours = {image for image in before if image.startswith("stillhouse/")}
    assert {image.split("/")[1].split(":")[0] for image in ours} == set(NAMES)
    pinned = {f"registry.example:5000/you/{name}@{digest(name)}" for name in NAMES}
    assert after == (before - ours) | pinned
    assert "kubectl apply -k" in work.stdout


def test_one_without_digest_is_named(tmp_path: Path) -> None:
    work = release(OVERLAY, tmp_path / "release", "--image", f"you/gateway@{digest('gateway')}")
    assert work.returncode == 1
    assert "runs stillhouse/cpu, but the digests given are of: gateway" in work.stderr
    assert not (tmp_path / "release").exists()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("you/cpu:1.0", "is not NAME@sha256:"),
        ("you/cpu@sha256:12", "is not NAME@sha256:"),
        (f"others/gateway@{digest('others')}", "two images for gateway"),
    ],
)
def test_what_is_no_digest_is_refused(tmp_path: Path, metadata: Path, image: str, message: str) -> None:
    work = release(OVERLAY, tmp_path / "release", "--metadata", metadata, "--image", image)
    assert (work.returncode, message in work.stderr) == (1, True), work.stderr
