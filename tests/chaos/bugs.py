"""The seeded bugs: what an exactly-once system gets wrong, by name.

Each is planted twice: in artifacts as it would leave them, which the oracle must refuse (tests/unit/test_oracle.py),
and in the running simulation, whose oracle run must find it. A bug that nothing finds means that a clean run proves
little.
"""

from __future__ import annotations

from typing import Final

BUGS: Final[dict[str, str]] = {
    "ack_before_result": "A worker acknowledges a sample before its result is durable, so a crash loses the sample.",
    "train_before_journal": "The trainer steps before the step's journal is durable, so a crash leaves weights that "
    "rest on samples nobody recorded.",
    "skip_fsync": "Files are renamed into place without an fsync, so a power loss leaves them truncated or empty.",
    "trim_streams": "A stream is trimmed by length, so entries that nobody read are gone.",
    "no_fencing": "The trainer's writes are not fenced by epoch, so a zombie commits after a newer claim has opened.",
    "no_version_check": "Whatever version a sampler holds is accepted, so samples are older (or newer) than the bound.",
    "cursor_last_yielded": "The data cursor is what was last handed out, not what was consumed, so a resume skips the "
    "groups in flight.",
    "reseed_after_restore": "After a restore samples are drawn from a fresh seed, so they are not those of the job.",
    "keep_nan": "A non-finite value reaches the journal or a committed checkpoint.",
    "early_cleanup": "Clean-up deletes files that a recovery or the published result still needs.",
    "no_dedup": "A redelivered result is taken as a new one, so a sample is counted twice.",
    "group_at_dollar": "A consumer group is created at `$`, so what was added before it is never delivered.",
    "silent_exit": "A part that dies ends the job as succeeded, short of its steps or without an export.",
    "swallowed_error": "A failure is recorded without a reason, or hidden as if nothing had happened.",
    "replay_twice": "A takeover trains a journalled step again on weights that already contain it.",
    "out_of_order": "Steps or groups are trained in the order of arrival instead of the order of the plan.",
    "stage_not_drained": "Samples of a stage are written by weights from before it: the pipeline was not drained.",
    "stage_lost_at_restore": "A claim that opens from the checkpoint at a stage's end goes on in that stage, so the "
    "next one is trained by the settings and moments of the one before.",
    "wrong_teachers": "A sample ends with the words of other teachers than its row names: one of a mixture is missing, "
    "or somebody else has answered.",
}
