"""The bugs of tests/chaos/bugs.py, put into the real classes for one run. Nothing else of the product is changed."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Final
from unittest import mock

from redis.exceptions import ResponseError

from stillhouse.core.blobs import JobArtifacts
from stillhouse.core.queue import job_scripts, scripts
from stillhouse.core.queue.streams import Entry, WorkQueue
from stillhouse.core.spec import StageSpan
from stillhouse.sampler.student import Student
from stillhouse.teacher import scoring
from stillhouse.teacher import worker as teacher_worker
from stillhouse.trainer import lead, loop, manifests, run
from stillhouse.trainer.ends import End
from stillhouse.trainer.lead import Lead
from stillhouse.trainer.run import Run
from stillhouse.trainer.scored import PendingGroup, ScoredGroup, ScoredSample, busy_seconds
from stillhouse.trainer.start import Start
from tests.chaos.sim.toys import ToyLearner
from tests.chaos.sim.world import World

Plant = Callable[[World], AbstractContextManager[None]]


def replaced(*patches: tuple[Any, str, Any]) -> Plant:
    """Other attributes for the time of a run."""

    @contextmanager
    def plant(world: World) -> Iterator[None]:
        with ExitStack() as stack:
            for owner, name, value in patches:
                stack.enter_context(mock.patch.object(owner, name, value))
            yield

    return plant


def without(script: str, *lines: str) -> str:
    """A script without some of its lines; they must be there."""
    for line in lines:
        assert line in script, f"the script has changed, plant the bug anew: {line}"
        script = script.replace(line, "")
    return script


# -- ack_before_result -------------------------------------------------------------------------------------------------

_claim = WorkQueue.claim


async def _claim_and_ack(self: WorkQueue, *args: Any, **kwargs: Any) -> list[Entry]:
    entries = await _claim(self, *args, **kwargs)
    await self.ack_delete(entries)
    return entries


# -- train_before_journal ----------------------------------------------------------------------------------------------

_commit_if_due = Run.commit_if_due


async def _prepare_only(self: Any, step: int, groups: Sequence[ScoredGroup], next_group: int) -> None:
    samples = self.stage.samples([sample for group in groups for sample in group.scored], step)
    self._batch = (samples, await self.learner.plan(samples, self.heads))
    self._busy = busy_seconds([sample for group in groups for sample in group.scored])
    self._planted = (step, groups, next_group)


async def _journal_after_all(self: Any, step: int) -> None:
    await _commit_if_due(self, step)
    done, groups, next_group = self._planted
    await self._write_journal(
        done,
        [sample.score for group in groups for sample in group.samples],
        groups=[group.group for group in groups],
        next_group=next_group,
        micro_batches=run.micro_batch_plans(*self._batch),
    )


# -- skip_fsync --------------------------------------------------------------------------------------------------------


@contextmanager
def _skip_fsync(world: World) -> Iterator[None]:
    world.disk.skips_fsync = True
    yield


# -- trim_streams ------------------------------------------------------------------------------------------------------

_XADD: Final = "redis.call('XADD', KEYS[3], '*', 'p', ARGV[3])"
_XADD_TRIMMED: Final = "redis.call('XADD', KEYS[3], 'MAXLEN', '2', '*', 'p', ARGV[3])"

# -- no_fencing --------------------------------------------------------------------------------------------------------

_CHECK_CLOSED: Final = "if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return 'CLOSED' end"
_CHECK_EPOCH: Final = "if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then return 'EPOCH' end"
_CHECK_HOLDER: Final = (
    "if redis.call('HGET', KEYS[2], 'epoch') ~= ARGV[3] then return 0 end",
    "if holder and holder ~= ARGV[1] then return 0 end",
)

# -- no_version_check --------------------------------------------------------------------------------------------------

_ensure = Student.ensure


async def _any_version(self: Student, scope: Any, *, at_least: int = 0, exactly: int | None = None) -> None:
    if self.weights is None or self.weights_job != scope.job_id:
        await _ensure(self, scope, at_least=at_least, exactly=exactly)


# -- cursor_last_yielded -----------------------------------------------------------------------------------------------

_start = Run.start


async def _start_after_what_was_in_flight(self: Any, group: int, min_policy_version: int) -> Any:
    is_resumed = self.opening.base is not None or self.opening.replay
    span = self.stage.span
    skipped = span.prompts_per_step * (span.max_staleness + 1) if is_resumed else 0
    return await _start(self, group + skipped, min_policy_version)


# -- reseed_after_restore ----------------------------------------------------------------------------------------------

_make_group = run.make_group


def _fresh_seeds(prompt: Any, *, epoch: int, seeds: Sequence[int], **fields: Any) -> Any:
    return _make_group(prompt, epoch=epoch, seeds=[seed // epoch for seed in seeds], **fields)


# -- early_cleanup -----------------------------------------------------------------------------------------------------


def _keep_only_the_newest(artifacts: JobArtifacts, *_: Any, **__: Any) -> int:
    refs = manifests.list_manifests(artifacts)
    for ref in refs[:-1]:
        shutil.rmtree(ref.folder(artifacts))
    return len(refs) - 1


# -- no_dedup ----------------------------------------------------------------------------------------------------------

_MARK_ADD: Final = "if redis.call('HSETNX', KEYS[2], ARGV[2], 1) == 0 then return 'DUP' end"
_MARK: Final = "if redis.call('HSETNX', KEYS[2], ARGV[2], 1) == 1 then"


_take = PendingGroup.take


def _waits_for_all(self: PendingGroup, answer: ScoredSample) -> bool:
    return True


def _take_twice(self: PendingGroup, answer: ScoredSample) -> ScoredSample | None:
    if answer.sample_id not in self.arrived and answer.teacher not in self.answers.get(answer.sample_id, {}):
        return _take(self, answer)
    self.arrived[f"{answer.sample_id} {len(self.arrived)}"] = answer
    if len(self.arrived) == len(self.wanted):
        self._complete()
    return answer


async def _none_marked(self: Any, scope: Any, marks: Sequence[str]) -> set[str]:
    return set()


# -- group_at_dollar ---------------------------------------------------------------------------------------------------


async def _claim_from_now_on(self: Any, names: Sequence[str], group: str, *args: Any, **kwargs: Any) -> list[Entry]:
    for name in names:
        try:
            await self._redis._do("XGROUP", "CREATE", name, group, "$", "MKSTREAM")
        except ResponseError:
            continue
    return await _claim(self, names, group, *args, **kwargs)


_CREATE_GROUP: Final = "local ok = redis.pcall('XGROUP', 'CREATE', KEYS[3], ARGV[2], '0', 'MKSTREAM')"

# -- silent_exit -------------------------------------------------------------------------------------------------------

_work = Lead._work


async def _always_well(self: Lead) -> Any:
    end = await _work(self)
    return End("succeeded") if end.status == lead.CRASHED else end


# -- swallowed_error ---------------------------------------------------------------------------------------------------

_make_failure = teacher_worker.make_failure


def _no_reason(rollout: Any, instance: str, reason: str, message: str, attempts: int) -> Any:
    return _make_failure(rollout, instance, "", "", attempts)


# -- replay_twice ------------------------------------------------------------------------------------------------------

_train = Run._train


async def _train_last_twice(self: Any, step: int, samples: Any, plan: Any) -> dict[str, float]:
    metrics = await _train(self, step, samples, plan)
    is_replay = self.opening.replay and step == self.opening.replay[-1].step
    return await _train(self, step, samples, plan) if is_replay else metrics


# -- out_of_order ------------------------------------------------------------------------------------------------------


class _FirstDone(deque[Any]):
    """Takes what has arrived first."""

    def popleft(self) -> Any:
        for position, future in enumerate(self):
            if future.done():
                del self[position]
                return future
        return super().popleft()


# -- stage_not_drained -------------------------------------------------------------------------------------------------


def _of_the_stage_before(self: StageSpan, step: int) -> int:
    return max(0, step - self.max_staleness)


# -- stage_lost_at_restore ---------------------------------------------------------------------------------------------

_load_student = Start._load_student


async def _stay_in_the_stage_that_ended(self: Any, *args: Any) -> Any:
    with mock.patch.object(self.learner, "begin_stage", mock.AsyncMock()):
        return await _load_student(self, *args)


# -- wrong_teachers ----------------------------------------------------------------------------------------------------

_take = PendingGroup.take


def _first_word_ends(self: PendingGroup, answer: ScoredSample) -> ScoredSample | None:
    self.wanted = {**self.wanted, answer.sample_id: [answer.teacher]}
    return _take(self, answer)


PLANTS: Final[dict[str, Plant]] = {
    "ack_before_result": replaced((WorkQueue, "claim", _claim_and_ack)),
    "train_before_journal": replaced((Run, "write", _prepare_only), (Run, "commit_if_due", _journal_after_all)),
    "skip_fsync": _skip_fsync,
    "trim_streams": replaced(
        (scripts, "ADD", scripts.ADD.replace(_XADD, _XADD_TRIMMED)),
        (scripts, "HAND_OVER", scripts.HAND_OVER.replace(_XADD, _XADD_TRIMMED)),
    ),
    "no_fencing": replaced(
        (scripts, "OPEN_STREAM", without(scripts.OPEN_STREAM, _CHECK_CLOSED)),
        (scripts, "ADD", without(scripts.ADD, _CHECK_CLOSED)),
        (scripts, "HAND_OVER", without(scripts.HAND_OVER, _CHECK_CLOSED)),
        (job_scripts, "UPDATE", without(job_scripts.UPDATE, _CHECK_EPOCH)),
        (job_scripts, "RENEW", without(job_scripts.RENEW, *_CHECK_HOLDER)),
    ),
    "no_version_check": replaced((Student, "ensure", _any_version)),
    "cursor_last_yielded": replaced((Run, "start", _start_after_what_was_in_flight)),
    "reseed_after_restore": replaced((run, "make_group", _fresh_seeds)),
    "keep_nan": replaced((scoring, "checked", lambda _, results: results), (ToyLearner, "keeps_nan", True)),
    "early_cleanup": replaced((run, "retain", _keep_only_the_newest)),
    "no_dedup": replaced(
        (scripts, "ADD", without(scripts.ADD, _MARK_ADD)),
        (scripts, "HAND_OVER", scripts.HAND_OVER.replace(_MARK, "if true then")),
        (WorkQueue, "marked", _none_marked),
        (PendingGroup, "waits_for", _waits_for_all),
        (PendingGroup, "take", _take_twice),
    ),
    "group_at_dollar": replaced(
        (scripts, "OPEN_STREAM", scripts.OPEN_STREAM.replace(_CREATE_GROUP, "local ok = 1")),
        (WorkQueue, "claim", _claim_from_now_on),
    ),
    "silent_exit": replaced((Lead, "_work", _always_well)),
    "swallowed_error": replaced((teacher_worker, "make_failure", _no_reason)),
    "replay_twice": replaced((Run, "_train", _train_last_twice)),
    "out_of_order": replaced((loop, "deque", _FirstDone)),
    "stage_not_drained": replaced((StageSpan, "oldest_version", _of_the_stage_before)),
    "stage_lost_at_restore": replaced((Start, "_load_student", _stay_in_the_stage_that_ended)),
    "wrong_teachers": replaced((PendingGroup, "take", _first_word_ends)),
}
"""Name of a bug of BUGS -> what puts it in."""
