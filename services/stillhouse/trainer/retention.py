"""Which checkpoints stay: the newest, the best, and whatever a claim may need to start from."""

from __future__ import annotations

import shutil

from stillhouse.core.blobs import JobArtifacts
from stillhouse.core.failpoints import failpoint
from stillhouse.trainer.manifests import ManifestRef, list_manifests


def retain(artifacts: JobArtifacts, keep_last: int, base: ManifestRef | None) -> int:
    """Delete all but the newest checkpoints; never the one that this epoch opened from. Returns how many went.

    Two are kept at least: the newest may turn out to be damaged on disk.
    """
    keep = set(list_manifests(artifacts)[-max(keep_last, 2) :])
    if base is not None:
        keep.add(base)
    gone = [ref for ref in list_manifests(artifacts) if ref not in keep]
    for ref in gone:
        shutil.rmtree(ref.folder(artifacts), ignore_errors=True)
        failpoint("trainer.retaining", ref.name)
    return len(gone)
