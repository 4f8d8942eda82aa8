"""What a replay takes from the journal when hidden states have to be scored again."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np

from stillhouse.core.tensors import floats_tensor, from_tensor, ids_tensor
from stillhouse.trainer.journal import JournalledStep
from stillhouse.trainer.run import Run
from stillhouse.trainer.scored import ScoredGroup, ScoredSample
from stillhouse.v1 import journal_pb2
from stillhouse.v1 import rollout_pb2 as pb


def hidden_score(index: int, logprob: float) -> pb.Score:
    rollout = pb.Rollout(sample_id=f"0/{index}", index=index, completion_ids=ids_tensor([5]))
    score = pb.Score(rollout=rollout)
    score.hidden.teacher_logprobs.CopyFrom(floats_tensor([logprob]))
    return score


class ScoresAgain:
    """An exchange whose teacher answers with other last bits, and knows nothing of verdicts."""

    async def rescore(self, group: int, scores: list[pb.Score]) -> Any:
        fresh = [ScoredSample(hidden_score(s.rollout.index, -1.5), hidden={"": np.zeros((1, 2))}) for s in scores]
        answer: asyncio.Future[ScoredGroup] = asyncio.get_running_loop().create_future()
        answer.set_result(ScoredGroup(group, fresh))
        return answer

    async def done(self, samples: list[ScoredSample]) -> None:
        pass


async def test_verdicts_and_log_probabilities_are_the_journals() -> None:
    scores = [hidden_score(0, -1.0), hidden_score(1, -2.0)]
    scores[0].reward, scores[0].reward_note = 1.0, "right"
    scores[1].reward = 0.25
    run: Any = SimpleNamespace(exchange=ScoresAgain())
    again = await Run._scored_again(run, JournalledStep(journal_pb2.StepHeader(step=3), scores))
    assert [sample.score.reward for sample in again] == [1.0, 0.25]
    assert [sample.score.reward_note for sample in again] == ["right", ""]
    assert [float(from_tensor(s.score.hidden.teacher_logprobs)[0]) for s in again] == [-1.0, -2.0]
    assert all(sample.hidden for sample in again)


async def test_a_sample_without_a_verdict_gets_none() -> None:
    run: Any = SimpleNamespace(exchange=ScoresAgain())
    again = await Run._scored_again(run, JournalledStep(journal_pb2.StepHeader(step=3), [hidden_score(0, -1.0)]))
    assert not again[0].score.HasField("reward")
