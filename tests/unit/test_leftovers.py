"""Files in the making that a killed process leaves."""

from __future__ import annotations

import os
from pathlib import Path

from stillhouse.core.blobs import remove_temporaries


def test_only_old_temporaries_go(tmp_path: Path) -> None:
    folder = tmp_path / "epochs" / "1" / "manifests"
    staged = folder / "tmp.00000003.26180ff7"
    staged.mkdir(parents=True)
    (staged / ".manifest.json.984e5b61.tmp").write_text("{")
    (staged / "model.safetensors").write_text("half")
    (tmp_path / ".opened.json.1234abcd.tmp").write_text("{")
    kept = [folder / "00000002-abcdef12" / "manifest.json", tmp_path / "job.json", tmp_path / ".final.json.9.tmp"]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    os.utime(kept[-1], (2e9, 2e9))
    assert remove_temporaries(tmp_path, until=1.9e9) >= 2
    left = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted(kept)
    assert remove_temporaries(tmp_path, until=1.9e9) == 0
