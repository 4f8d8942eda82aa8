"""Artifacts of a job, honest unless told otherwise: real journals, manifests, openings and ledgers; no services.

A case of `CASES` writes what one of the seeded bugs would leave, and names the rules that the oracle must find broken.
"""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.core.blobs import Artifacts, append_jsonl, sealed, write_json
from stillhouse.core.queue.jobs import JobRecord, final_document
from stillhouse.core.spec import JobSpec
from stillhouse.core.tensors import floats_tensor, from_tensor, ids_tensor
from stillhouse.trainer import manifests
from stillhouse.trainer.journal import encode, read_step
from stillhouse.trainer.ledger import Ledger
from stillhouse.trainer.mix import Passes
from stillhouse.trainer.prompts import sample_seed
from stillhouse.v1 import journal_pb2, rollout_pb2
from tests.cluster import job_spec

STEPS, PER_STEP, SIZE, STALENESS, COMMIT_EVERY, ROWS = 6, 2, 2, 1, 2, 5
JOB_ID = "job_0123456789"


class Job:
    """Writes a job's artifacts step by step, as its trainers would."""

    def __init__(self, root: Path, *, stage_steps: Sequence[int] = (STEPS,), **changes: Any) -> None:
        spec = job_spec(
            stages__0__schedule={
                "steps": STEPS,
                "prompts_per_step": PER_STEP,
                "group_size": SIZE,
                "max_staleness": STALENESS,
            },
            checkpoint={"every_steps": COMMIT_EVERY},
            seed=7,
            **{"stages__0__loss": {"objective": "policy_gradient"}, **changes},
        )
        stage = spec["stages"][0]
        spec["stages"] = [
            {**stage, "name": f"stage-{index}", "schedule": {**stage["schedule"], "steps": steps}}
            for index, steps in enumerate(stage_steps)
        ]
        self.spec = JobSpec.model_validate(spec)
        self.artifacts = Artifacts(root).job(JOB_ID)
        seeds = [span.order_seed(self.spec.seed) for span in self.spec.spans()]
        self.orders = [Passes(range(ROWS), f"{seed}/pass", shuffle=True) for seed in seeds]
        self.epoch = 0
        self.step = 0
        """Steps in the learner."""
        self.ledger = Ledger()
        self.base: manifests.ManifestRef | None = None
        """What the epoch opened from."""
        self.last: manifests.ManifestRef | None = None
        self.record = JobRecord(id=JOB_ID, status="queued", spec=self.spec.model_dump(mode="json"), created_at=1.0)
        write_json(self.artifacts.job_json, sealed({"id": JOB_ID, "spec": self.record.spec}))
        self.event("job.status", status="queued")

    def open(self, epoch: int = 0) -> None:
        """Claim the job: open an epoch and bring the learner to where it starts."""
        was, self.epoch = self.record.step, epoch or self.epoch + 1
        opening = manifests.open_epoch(self.artifacts, self.epoch, f"trainer-{self.epoch}")
        self.base = opening.base
        self.restore(self.base)
        for ref in opening.replay:
            self.train(ref.step, read_step(self.artifacts.journal(ref.epoch, ref.step)).scores)
        for status in ("validating", "starting", "running"):
            self.event("job.status", status=status, epoch=self.epoch)
        if self.epoch > 1:
            self.event("job.rewound", **{"from": was, "to": self.step, "epoch": self.epoch})
        self.set(status="running", epoch=self.epoch)

    def restore(self, base: manifests.ManifestRef | None) -> None:
        self.last, self.step, self.ledger = base, 0, Ledger()
        if base is not None:
            manifest = manifests.verify(self.artifacts, base)
            self.step, self.ledger = manifest["step"], Ledger(**manifest["ledger"])

    def run(self, until: int) -> None:
        """Train up to a step; commit when due."""
        while self.step < until:
            scores = self.journal(self.step)
            self.train(self.step, scores)
            if self.step % COMMIT_EVERY == 0 or self.step in [span.stop_step for span in self.spec.spans()]:
                self.commit()

    def journal(
        self,
        step: int,
        scores: Sequence[rollout_pb2.Score] | None = None,
        groups: Iterable[int] = (),
        next_group: int = 0,
        planned: Sequence[str] = (),
        stage: int | None = None,
    ) -> list[rollout_pb2.Score]:
        """Write the journal of a step."""
        consumed = list(groups) or list(range(step * PER_STEP, (step + 1) * PER_STEP))
        written = list(scores) if scores is not None else self.scores(step, consumed)
        plan: dict[str, list[str]] = {"main": list(planned)} if planned else {}
        for score in written if not planned else ():
            if score.WhichOneof("result") != "failed":
                plan.setdefault(score.rollout.teacher, []).append(score.rollout.sample_id)
        header = journal_pb2.StepHeader(
            schema_version=1,
            job_id=JOB_ID,
            epoch=self.epoch,
            step=step,
            groups=consumed,
            num_samples=len(written),
            next_group=next_group or (step + 1) * PER_STEP,
            stage=self.spec.span_at(step).index if stage is None else stage,
            micro_batches=[journal_pb2.MicroBatchPlan(teacher=name, sample_ids=ids) for name, ids in plan.items()],
            written_at=time.time(),
        )
        path = self.artifacts.journal(self.epoch, step)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(header, written))
        return written

    def train(self, step: int, scores: Sequence[rollout_pb2.Score]) -> None:
        """One step of the learner, its ledger, its metric."""
        scored = [score.rollout for score in scores if score.WhichOneof("result") != "failed"]
        self.ledger.add(step, [(rollout.sample_id, from_tensor(rollout.completion_ids)) for rollout in scored])
        self.step = step + 1
        append_jsonl(self.artifacts.metrics, [{"epoch": self.epoch, "step": self.step, "values": {"loss/total": 1.0}}])
        self.set(step=self.step)

    def commit(self, value: float = 0.0, *, is_zombie: bool = False, stage: int | None = None) -> manifests.ManifestRef:
        """Commit the learner's state; `value` is added to one of its weights. A zombie is fenced off right after."""
        facts = {
            "job_id": JOB_ID,
            "next_group": self.step * PER_STEP,
            "stage": self.spec.span_at(max(0, self.step - 1)).index if stage is None else stage,
            "parent": self.last.as_json() if self.last else None,
            "spec_sha256": manifests.spec_sha256(self.spec.model_dump(mode="json")),
            "usage": {},
            "ledger": self.ledger.as_json(),
            "threads": 1,
        }

        def state(folder: Path) -> None:
            weights = np.arange(24, dtype=np.float32) + self.step
            weights[7] += value
            save_tensors(folder / "model.safetensors", {"w": weights.reshape(4, 6)})
            save_tensors(folder / "optimizer.safetensors", {"w/exp_avg": weights * 0.5})
            write_json(folder / "state.json", {"schema_version": 1, "policy_version": self.step})

        self.last = manifests.commit(self.artifacts, self.epoch, self.step, facts, state)
        if not is_zombie:
            self.set(committed_step=self.step)
            self.event("checkpoint.saved", step=self.step)
            self.clean_up()
        return self.last

    def clean_up(self) -> None:
        """Keep the newest two checkpoints and what the epoch opened from."""
        refs = manifests.list_manifests(self.artifacts)
        for ref in refs[:-2]:
            if ref != self.base:
                shutil.rmtree(ref.folder(self.artifacts))

    def finish(self, status: str = "succeeded", error: dict[str, Any] | None = None, *, export: bool = True) -> None:
        """Export and end."""
        if status == "succeeded" and export and self.last is not None:
            folder = self.artifacts.export(self.epoch)
            folder.mkdir()
            shutil.copyfile(self.last.folder(self.artifacts) / "model.safetensors", folder / "model.safetensors")
        self.set(status=status, error=error, finished_at=time.time())
        write_json(self.artifacts.root / "final.json", sealed(final_document(self.record)))
        self.event("job.status", status=status)

    def scores(self, step: int, groups: Iterable[int] = (), **changes: Any) -> list[rollout_pb2.Score]:
        """The scores of a step's groups."""
        planned = list(groups) or list(range(step * PER_STEP, (step + 1) * PER_STEP))
        return [self.score(group, index, step, **changes) for group in planned for index in range(SIZE)]

    def score(
        self, group: int, index: int, step: int, *, version: int | None = None, seed: int = -1
    ) -> rollout_pb2.Score:
        version = self.spec.span_at(step).oldest_version(step) if version is None else version
        row = self.row(group)
        seed = seed if seed >= 0 else sample_seed(self.spec.seed, str(group), index)
        num_tokens = 1 + seed % 5
        rollout = rollout_pb2.Rollout(
            schema_version=1,
            job_id=JOB_ID,
            epoch=self.epoch,
            sample_id=f"{group}/{index}",
            purpose=rollout_pb2.PURPOSE_TRAIN,
            group=group,
            index=index,
            teacher="main",
            prompt_ids=ids_tensor([1, row]),
            completion_ids=ids_tensor([(seed + position) % 97 for position in range(num_tokens)]),
            rollout_logprobs=floats_tensor([-1.0] * num_tokens),
            finish_reason=rollout_pb2.FINISH_REASON_STOP,
            spans=[rollout_pb2.Span(first_token=0, policy_version=version, epoch=self.epoch)],
            seed=seed,
            row=row,
            weights_sha256=f"{self.epoch}-{version}",
        )
        sampled = rollout_pb2.SampledScore(teacher_logprobs=floats_tensor([-2.0] * num_tokens))
        return rollout_pb2.Score(schema_version=1, rollout=rollout, sampled=sampled)

    def row(self, group: int) -> int:
        span = self.spec.span_at(group // PER_STEP)
        return int(self.orders[span.index][group - span.first_group])  # type: ignore[arg-type]

    def set(self, **fields: Any) -> None:
        values = {name: getattr(self.record, name) for name in JobRecord.__dataclass_fields__}
        self.record = JobRecord(**{**values, **fields})

    def event(self, kind: str, **data: Any) -> None:
        append_jsonl(self.artifacts.events, [{"id": "1-0", "type": kind, "message": "", "data": data}])


def save_tensors(path: Path, tensors: dict[str, np.ndarray], dtype: str = "F32") -> None:
    """A safetensors file."""
    header, position = {}, 0
    for name, array in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(array.tobytes() for array in tensors.values()))


def failed(score: rollout_pb2.Score, reason: str, service: str = "teacher") -> rollout_pb2.Score:
    score.failed.CopyFrom(rollout_pb2.Failure(reason=reason, message="", service=service, attempts=1))
    return score


def finished(root: Path) -> Job:
    """A job with a takeover that replayed a journal, and a sample that failed."""
    job = Job(root)
    job.open()
    scores = job.scores(0)
    job.train(0, job.journal(0, [failed(scores[0], "non_finite"), *scores[1:]]))
    job.run(3)
    job.open()
    job.run(STEPS)
    job.finish()
    return job


# -- the seeded bugs -------------------------------------------------------------------------------------------------


def ack_before_result(job: Job) -> None:
    """The sampler acknowledged sample 2/1 and died: nobody has it, the step was trained without it."""
    job.run(1)
    job.train(1, job.journal(1, [s for s in job.scores(1) if s.rollout.sample_id != "2/1"]))
    job.commit()
    job.run(STEPS)
    job.finish()


def train_before_journal(job: Job) -> None:
    """Step 2 was in the weights, and committed, before its journal was; then the machine died."""
    job.run(2)
    job.train(2, job.scores(2))
    job.commit()


def skip_fsync(job: Job) -> None:
    """After a power loss the journal of step 3 has its name and none of its bytes."""
    job.run(STEPS)
    job.finish()
    job.artifacts.journal(1, 3).write_bytes(b"")


def trim_streams(job: Job) -> None:
    """The stream of prompts was trimmed: group 3 never came back, step 1 took the next one."""
    job.run(1)
    job.train(1, job.journal(1, groups=[2, 4], next_group=5))
    job.commit()


def no_fencing(job: Job) -> None:
    """The trainer of epoch 1 went on after epoch 2 had opened, and epoch 3 builds on what it committed."""
    job.run(2)
    job.open()
    job.run(3)
    zombie = manifests.list_manifests(job.artifacts)[0]
    job.epoch, newest = 1, job.epoch
    job.restore(zombie)
    job.run(4)
    base = job.last
    assert base is not None
    job.epoch = newest + 1
    document = {"schema_version": 1, "epoch": job.epoch, "trainer": "t", "opened_at": time.time(), "replay": []}
    write_json(job.artifacts.epoch(job.epoch) / "opened.json", sealed({**document, "opened_from": base.as_json()}))
    job.run(STEPS)
    job.finish()


def no_version_check(job: Job) -> None:
    """A sampler that missed the news wrote step 4 with the weights of version 1."""
    job.run(4)
    job.train(4, job.journal(4, job.scores(4, version=4 - STALENESS - 2)))
    job.run(STEPS)
    job.finish()


def cursor_last_yielded(job: Job) -> None:
    """The takeover went on after the last group that had been handed out: groups 6 and 7 were in flight."""
    job.run(3)
    job.open()
    job.train(3, job.journal(3, groups=[8, 9], next_group=10))
    job.commit()


def reseed_after_restore(job: Job) -> None:
    """After the takeover the samples are drawn with new seeds."""
    job.run(3)
    job.open()
    scores = [job.score(group, index, 3, seed=12345 + group + index) for group in (6, 7) for index in range(SIZE)]
    job.train(3, job.journal(3, scores))
    job.run(STEPS)
    job.finish()


def keep_nan(job: Job) -> None:
    """A gradient was not finite, and the weights were committed anyway."""
    job.run(3)
    job.train(3, job.journal(3))
    job.commit(value=float("nan"))


def early_cleanup(job: Job) -> None:
    """Clean-up took the checkpoint that the running epoch opened from."""
    job.run(4)
    job.open()
    job.run(5)
    assert job.last is not None
    shutil.rmtree(job.last.folder(job.artifacts))


def no_dedup(job: Job) -> None:
    """A redelivered score was taken as one more sample."""
    job.run(2)
    scores = job.scores(2)
    job.train(2, job.journal(2, [*scores, scores[1]]))
    job.run(STEPS)
    job.finish()


def group_at_dollar(job: Job) -> None:
    """Group 0 was added before the consumer group existed: nobody ever saw it."""
    job.train(0, job.journal(0, groups=[1, 2], next_group=3))
    job.commit()


def silent_exit(job: Job) -> None:
    """The sampler's engine ended with exit code 0, and so did the job."""
    job.run(4)
    job.finish()


def swallowed_error(job: Job) -> None:
    """A sample failed and the job with it; what went wrong was caught and forgotten."""
    scores = job.scores(0)
    job.train(0, job.journal(0, [failed(scores[0], ""), *scores[1:]]))
    job.finish("failed")


def replay_twice(job: Job) -> None:
    """The takeover restored the weights of step 4 and trained step 3 on them again."""
    job.run(4)
    job.open()
    job.ledger.add(3, [])
    job.train(3, read_step(job.artifacts.journal(1, 3)).scores)
    job.step = 4
    job.run(STEPS)
    job.finish()


def out_of_order(job: Job) -> None:
    """Groups were trained as they completed: those of step 2 before those of step 1."""
    job.run(1)
    job.train(1, job.journal(1, groups=[4, 5], next_group=2))
    job.train(2, job.journal(2, groups=[2, 3], next_group=6))
    job.run(STEPS)
    job.finish()


def stage_not_drained(job: Job) -> None:
    """Groups of the second stage, which begins at step 4, were written before the last step of the first."""
    job.run(4)
    job.train(4, job.journal(4, job.scores(4, version=3)))
    job.run(STEPS)
    job.finish()


def stage_lost_at_restore(job: Job) -> None:
    """The takeover opened from the checkpoint at the end of the first stage, and its learner stayed in that."""
    job.run(4)
    job.open()
    for step in (4, 5):
        job.train(step, job.journal(step))
    job.commit(stage=0)
    job.finish()


TWO_STAGES = {"stage_not_drained", "stage_lost_at_restore"}
"""Bugs of jobs with two stages."""


def job_of(root: Path, bug: str) -> Job:
    """A job that the bug may hit."""
    return Job(root, stage_steps=(4, 2) if bug in TWO_STAGES else (STEPS,))


def wrong_teachers(job: Job) -> None:
    """A score on its way to the trainer was taken for that of another teacher."""
    job.run(2)
    scores = job.scores(2)
    scores[1].rollout.teacher = "somebody"
    job.train(2, job.journal(2, scores))
    job.run(STEPS)
    job.finish()


CASES: dict[str, tuple[Callable[[Job], None], set[str]]] = {
    "ack_before_result": (ack_before_result, {"complete"}),
    "train_before_journal": (train_before_journal, {"trained"}),
    "skip_fsync": (skip_fsync, {"journal"}),
    "trim_streams": (trim_streams, {"prefix", "complete"}),
    "no_fencing": (no_fencing, {"lineage"}),
    "no_version_check": (no_version_check, {"staleness"}),
    "cursor_last_yielded": (cursor_last_yielded, {"prefix", "complete"}),
    "reseed_after_restore": (reseed_after_restore, {"seed"}),
    "keep_nan": (keep_nan, {"non_finite"}),
    "early_cleanup": (early_cleanup, {"retention"}),
    "no_dedup": (no_dedup, {"duplicate"}),
    "group_at_dollar": (group_at_dollar, {"prefix", "complete"}),
    "silent_exit": (silent_exit, {"success"}),
    "swallowed_error": (swallowed_error, {"reason"}),
    "replay_twice": (replay_twice, {"ledger"}),
    "out_of_order": (out_of_order, {"prefix"}),
    "stage_not_drained": (stage_not_drained, {"stage"}),
    "stage_lost_at_restore": (stage_lost_at_restore, {"stage"}),
    "wrong_teachers": (wrong_teachers, {"teachers"}),
}
"""Bug -> (what it leaves, rules that must be among the broken ones)."""
