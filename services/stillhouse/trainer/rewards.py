"""Outcome rewards: each completion of the student is judged once, before its step is journalled.

    scored -> judged (text and row to a verifier) -> reward and note in the score, hence in the journal -> advantage

A replay takes the journal's rewards: nothing is judged twice. Verifiers run in processes of their own (trainer/verify).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from stillhouse.core.spec import RewardSpec
from stillhouse.core.tensors import ids_list
from stillhouse.trainer.outcome import group_advantages
from stillhouse.trainer.prompts import Prompt
from stillhouse.trainer.scored import ScoredSample
from stillhouse.trainer.verify.judges import Item, Verdict


class Judge(Protocol):
    """Verdicts on completions, in the order of the items."""

    async def load(self, rows: Mapping[str, int]) -> None: ...

    async def judge(self, items: Sequence[Item]) -> list[Verdict]: ...

    async def close(self) -> None: ...


@dataclass(frozen=True)
class Rewards:
    """Judges the samples of one job."""

    spec: RewardSpec
    prompts: Sequence[Prompt]
    judges: Judge
    text: Callable[[Sequence[int]], str]
    """Completion ids -> text without special tokens."""
    race: Callable[[Awaitable[Any]], Awaitable[Any]]
    """Ends the wait when the job is asked to stop."""

    async def load(self) -> None:
        """Load the verifiers that rows name: what is not installed should cost no sample.

        Raises:
            VerifierError: one cannot be loaded.
        """
        names = Counter(prompt.source.verifier or self.spec.verifier or "" for prompt in self.prompts)
        await self.race(self.judges.load(names))

    async def judge(self, samples: Sequence[ScoredSample]) -> list[str]:
        """Fill in the rewards of a step's samples; gives what went wrong with verdicts, a line each.

        Raises:
            VerifierError: a verifier does not work.
        """
        items = [make_item(sample, self.prompts, self.text, self.spec.verifier) for sample in samples]
        verdicts = await self.race(self.judges.judge(items))
        for sample, verdict in zip(samples, verdicts, strict=True):
            sample.score.reward, sample.score.reward_note = verdict.reward, verdict.note
        return [
            f"sample {sample.sample_id}: {verdict.note}"
            for sample, verdict in zip(samples, verdicts, strict=True)
            if verdict.failure
        ]


def make_item(
    sample: ScoredSample, prompts: Sequence[Prompt], text: Callable[[Sequence[int]], str], verifier: str | None
) -> Item:
    """A completion to judge, beside its row; `verifier` if the row names none."""
    rollout = sample.score.rollout
    row = prompts[rollout.row].source
    return Item(
        verifier=row.verifier or verifier or "",
        text=text(ids_list(rollout.completion_ids)),
        answer=row.answer,
        row=row.model_dump(mode="json", exclude_none=True),
    )


def outcomes(samples: Sequence[ScoredSample], spec: RewardSpec) -> dict[str, float]:
    """Sample id -> advantage of its reward within its group; samples that failed are not among them."""
    advantages: dict[str, float] = {}
    for group in _groups(samples).values():
        rewards = np.array([sample.score.reward for sample in group])
        values = group_advantages(rewards, spec.normalise)
        advantages |= {sample.sample_id: float(value) for sample, value in zip(group, values, strict=True)}
    return advantages


def reward_metrics(samples: Sequence[ScoredSample], teachers: Collection[str] = ()) -> dict[str, float]:
    """The rewards of a step, also of each of several teachers; a group without spread teaches nothing."""
    rewards = np.array([sample.score.reward for sample in samples])
    flat = [not _spread(group).any() for group in _groups(samples).values()]
    names = np.array([sample.score.rollout.teacher for sample in samples])
    present = sorted(set(teachers).intersection(names.tolist())) if len(teachers) > 1 else []
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/zero_spread_groups": float(sum(flat)),
        **{f"reward/mean/{name}": float(rewards[names == name].mean()) for name in present},
    }


def _spread(group: Sequence[ScoredSample]) -> np.ndarray:
    return group_advantages(np.array([sample.score.reward for sample in group]), "mean")


def _groups(samples: Sequence[ScoredSample]) -> Mapping[int, list[ScoredSample]]:
    groups: dict[int, list[ScoredSample]] = {}
    for sample in samples:
        groups.setdefault(sample.score.rollout.group, []).append(sample)
    return groups
