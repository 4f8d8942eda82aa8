"""The process of a rank that follows: it runs what rank 0 says, until rank 0 lets it go."""

from __future__ import annotations

import os
import signal
import sys

from stillhouse.core import telemetry
from stillhouse.core.config import load_settings
from stillhouse.core.errors import StillhouseError
from stillhouse.core.failpoints import install_from_environment
from stillhouse.core.launch import Launch
from stillhouse.core.parent import die_with_parent


def main(launch: Launch) -> None:
    """Entry of the process.

    consumes:     commands of rank 0
    waits for:    the next one, IDLE_TIMEOUT at most
    produces:     answers
    unblocked by: rank 0, or its death, which closes the connection
    """
    # torchrun passes a request to stop to all ranks: rank 0 commits with the help of the others and then lets them go
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)
    try:
        settings = load_settings()
    except StillhouseError as error:
        sys.exit(f"stillhouse trainer, rank {launch.rank}: {error.message}")
    log = telemetry.setup_logging(settings, "trainer", f"{settings.instance or 'trainer'}/{launch.rank}")
    install_from_environment("follower", log)
    try:
        _follow(log)
        return
    except Exception as error:  # the one place of the process that catches everything
        log.error("follower ends, and with it all ranks of this trainer", error=f"{type(error).__name__}: {error}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # not sys.exit: that may wait for ranks that will never come


def _follow(log) -> None:
    from stillhouse.trainer.ranks import Part, Ranks

    ranks = Ranks.join()
    part = Part()
    log.info("follows rank 0", rank=ranks.rank, ranks=ranks.size, pid=os.getpid())
    while (command := ranks.receive(0)).facts["do"] != "end":
        ranks.send(0, part.run(command))
    ranks.leave()
    log.info("stopped")
