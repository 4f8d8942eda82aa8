"""How many held-out prompts the student answers right: its completions, judged by the rows' verifiers.

Processes are started for an evaluation and gone after it. Whatever goes wrong with a verifier costs its rows the
accuracy, never the job: nothing is trained on these verdicts.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.core.errors import StillhouseError
from stillhouse.core.spec import EvaluationSpec
from stillhouse.trainer.prompts import Prompt
from stillhouse.trainer.rewards import make_item
from stillhouse.trainer.scored import ScoredSample
from stillhouse.trainer.verify.judges import Judges, Verdict


@dataclass(frozen=True)
class Accuracy:
    """Judges the held-out completions of one job."""

    spec: EvaluationSpec
    prompts: Sequence[Prompt]
    text: Callable[[Sequence[int]], str]
    """Completion ids -> text without special tokens."""
    race: Callable[[Awaitable[Any]], Awaitable[Any]]
    """Ends the wait when the job is asked to stop."""
    warn: Callable[[str], Awaitable[None]]
    """Tells people what could not be judged."""

    async def judge(self, samples: Sequence[ScoredSample]) -> dict[str, Verdict]:
        """Verdicts by sample id, of rows that have a verifier; without those of a verifier that does not work."""
        items = {sample.sample_id: make_item(sample, self.prompts, self.text, self.spec.verifier) for sample in samples}
        verdicts: dict[str, Verdict] = {}
        judges = Judges(timeout_s=self.spec.verdict_timeout_s)
        try:
            for name in sorted({item.verifier for item in items.values() if item.verifier}):
                chosen = {sample_id: item for sample_id, item in items.items() if item.verifier == name}
                try:
                    found = await self.race(judges.judge(list(chosen.values())))
                except (StillhouseError, OSError) as error:
                    await self.warn(f"{len(chosen)} held-out completions are not judged: {error}")
                    continue
                verdicts |= dict(zip(chosen, found, strict=True))
        finally:
            await judges.close()
        if failed := [verdict.note for verdict in verdicts.values() if verdict.failure]:
            await self.warn(
                f"{len(failed)} of {len(verdicts)} held-out completions got no verdict and count as wrong; {failed[0]}"
            )
        return verdicts
