"""`stillhouse completion`, and what the shell proposes: ids and names that the gateway knows.

A person waits for it with a finger on the tab key: the gateway has a second, and any trouble means no proposals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from stillhouse.cli.options import Proposals

DEADLINE_S: Final = 1.0
LIMIT: Final = 50
"""Proposals: more is no help."""
SHELLS: Final = ("bash", "zsh", "fish")
VARIABLE: Final = "_STILLHOUSE_COMPLETE"
"""Set by the scripts when they ask for proposals."""


def script(shell: str) -> str:
    """What makes a shell ask us."""
    from typer._completion_shared import get_completion_script

    return get_completion_script(prog_name="stillhouse", complete_var=VARIABLE, shell=shell)


def jobs(incomplete: str) -> Proposals:
    """(id, `status name`), newest first."""
    return _asked(
        "/v1/jobs", {"limit": LIMIT}, incomplete, lambda job: (job["id"], f"{job['status']} {job['name']}".strip())
    )


def checkpoints(job_id: str, incomplete: str) -> Proposals:
    """(id, `step 12`) of a job."""
    if not job_id.startswith("job_"):
        return []
    return _asked(
        f"/v1/jobs/{job_id}/checkpoints", {}, incomplete, lambda found: (found["id"], f"step {found['step']}")
    )


def models(incomplete: str) -> Proposals:
    """(name, architecture) of models, or jobs once it begins like one."""
    if incomplete.startswith("job_"):
        job_id, slash, checkpoint = incomplete.partition("/")
        if slash:
            return [(f"{job_id}/{name}", about) for name, about in checkpoints(job_id, checkpoint)]
        return jobs(incomplete)
    return _asked("/v1/models", {}, incomplete, lambda model: (model["id"], model["architecture"]))


def files(incomplete: str) -> Proposals:
    """(id, `12 rows`)."""
    return _asked("/v1/files", {"limit": LIMIT}, incomplete, lambda file: (file["id"], f"{file['num_rows']} rows"))


def _asked(
    path: str, params: dict[str, Any], incomplete: str, proposal: Callable[[dict[str, Any]], tuple[str, str]]
) -> Proposals:
    import httpx

    from stillhouse.client.target import find_target

    try:
        target = find_target(None, None)
        answer = httpx.Client(**target.options()).get(path, params=params, timeout=DEADLINE_S)
        found = [proposal(item) for item in answer.raise_for_status().json()["data"]]
    except Exception:  # an outermost edge: the shell shows what we print, and nobody asked for an error
        return []
    return [item for item in found if item[0].startswith(incomplete)]
