"""Named points in the code where tests make a process die, freeze, fail or find the disk full.

`failpoint("trainer.journalled")` does nothing unless a handler is installed, and only tests install one: the simulation
its own, the chaos tests the handler below, by the environment variable STILLHOUSE_TEST_FAILPOINTS. It names a folder:

    FOLDER/{point}.armed    JSON {"action": one of ACTIONS, "role", "match", "skip", "times"}
    FOLDER/{point}.hit      the same file once a process has taken it (renamed, so one process acts, once), with its pid

"role" restricts it to a kind of service, "match" to a detail that the point gives (a file name, a sample's id), "skip"
passes so many visits first, "times" arms it again until it has acted so often.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

ENVIRONMENT: Final = "STILLHOUSE_TEST_FAILPOINTS"

POINTS: Final = {
    "gateway.job_json_written": "job.json is durable, the record is not there yet",
    "gateway.record_written": "the record is there, the client has no answer",
    "gateway.cancel_requested": "the record says cancelling, nobody was told",
    "gateway.job_put_aside": "a deleted job's folder is out of the way, its record is still there",
    "gateway.pause_requested": "the record says pausing or paused, the wish is not durable yet",
    "gateway.resume_requested": "the record says resuming, the wish to pause is still on disk",
    "trainer.claimed": "the lease is taken, the epoch is not opened",
    "trainer.epoch_made": "the epoch's folder exists, opened.json does not",
    "trainer.epoch_opened": "opened.json is durable, nothing else is done",
    "trainer.planned": "a prompt group is on the queue, the loop does not know",
    "trainer.score_taken": "a score was taken from the queue and is not acknowledged",
    "trainer.journalled": "the step's journal is durable, its scores are still on the queue",
    "trainer.acknowledged": "journalled and acknowledged, not trained",
    "trainer.mid_backward": "between the micro-batches of a step",
    "trainer.stepped": "the optimizer has stepped, nothing is published",
    "trainer.published": "the weights' reference is durable, no sampler was told",
    "trainer.evaluated": "an evaluation is written, nothing has followed from it",
    "trainer.stop_recorded": "it is recorded that the job ends early, nobody has acted on it",
    "trainer.committing": "a checkpoint's state files are written, its manifest is not",
    "trainer.committed": "the checkpoint is durable, the record does not say so",
    "trainer.retaining": "between the deletions of old checkpoints",
    "trainer.stage_ended": "a stage's last checkpoint is durable, the next stage has not begun",
    "trainer.stage_begun": "the learner is in the next stage, nothing of it is planned",
    "trainer.replayed": "a journalled step is trained again, the rest of the replay is not",
    "trainer.exported": "the student is exported, the job has not ended",
    "trainer.ended": "the record says how the job ended, final.json does not",
    "trainer.stopping": "asked to cancel, pause or drain, nothing is committed yet",
    "trainer.paused": "the record says paused, nobody was told",
    "sampler.claimed": "a prompt group is claimed",
    "sampler.pulling": "weights are half fetched",
    "sampler.generating": "between two tokens",
    "sampler.sampled": "a completion is written, not handed over",
    "sampler.handed_over": "it is handed over, the sampler does not know",
    "sampler.draining": "asked to stop, claims are still held",
    "teacher.claimed": "rollouts are claimed",
    "teacher.scoring": "between load and forward pass",
    "teacher.scored": "scores are computed, not handed over",
    "teacher.handed_over": "a score is handed over, the teacher does not know",
    "teacher.serving": "a payload is half sent",
    "teacher.draining": "asked to stop, claims are still held",
    "disk.written": "a temporary file is written, not synced",
    "disk.synced": "it is synced, not renamed",
    "disk.renamed": "it is renamed, the folder is not synced",
}
"""Every point and the state it stands for."""

ACTIONS: Final = ("kill", "stop", "term", "exit", "raise", "no_space")
"""kill and stop as SIGKILL and SIGSTOP do, term = SIGTERM and go on, exit = end with code 0, raise = InjectedError,
no_space = OSError(ENOSPC)."""


class InjectedError(Exception):
    """What the action "raise" raises: an error that nobody expects, as a bug would."""


Handler = Callable[[str, str], None]
_handler: Handler | None = None


def failpoint(name: str, detail: str = "") -> None:
    """A point of POINTS is reached; `detail` says with what (a file name), where the name alone is too coarse."""
    if _handler is not None:
        _handler(name, detail)


def install(handler: Handler | None) -> None:
    """Let `handler(name, detail)` see every point; None = nobody."""
    global _handler
    _handler = handler


def install_from_environment(role: str, log: Any) -> None:
    """Arm this process by files, if the environment says so. Called by the mains of the services."""
    folder = os.environ.get(ENVIRONMENT)
    if folder:
        log.warning("failpoints are armed: this process is under test", folder=folder)
        install(FileHandler(Path(folder), role))


class FileHandler:
    """Acts on the files of a folder (see the module's text)."""

    def __init__(self, folder: Path, role: str) -> None:
        self._folder = folder
        self._role = role
        self._visits: dict[str, int] = {}

    def __call__(self, name: str, detail: str) -> None:
        if name not in POINTS:
            raise AssertionError(f"failpoint '{name}' is not in POINTS")
        armed = self._folder / f"{name}.armed"
        try:
            order = json.loads(armed.read_bytes())
        except OSError:
            return
        if order.get("role", self._role) != self._role or order.get("match", "") not in detail:
            return
        visit = self._visits[name] = self._visits.get(name, 0) + 1
        if visit <= order.get("skip", 0):
            return
        hit = self._folder / f"{name}.hit"
        try:
            armed.rename(hit)  # one process gets it
        except FileNotFoundError:
            return
        self._visits[name] = 0
        _replace(hit, {**order, "pid": os.getpid(), "role": self._role, "detail": detail})
        if order.get("times", 1) > 1:
            _replace(armed, {**order, "times": order["times"] - 1})
        act(order["action"], name)


def act(action: str, name: str) -> None:
    """Do to this process what a test asked for.

    Raises:
        InjectedError: "raise".
        OSError: "no_space", with errno ENOSPC.
    """
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            # to this thread: sent to the process, it may reach another one first, and this one runs on past the point
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "exit":
            os._exit(0)
        case "raise":
            raise InjectedError(f"injected at {name}")
        case "no_space":
            raise OSError(errno.ENOSPC, f"no space left on device, injected at {name}")
        case _:
            raise AssertionError(f"unknown action '{action}', known are {', '.join(ACTIONS)}")


def _replace(path: Path, document: dict[str, Any]) -> None:
    """Whole or not at all: the test waits for this file."""
    temp = path.with_suffix(".tmp")
    temp.write_text(json.dumps(document))
    temp.rename(path)
