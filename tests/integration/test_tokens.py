"""Which tokens train, in whole jobs: what the metrics count is what the journal says, ends of completions included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stillhouse.core.spec import TokensSpec
from stillhouse.core.tensors import ids_list
from stillhouse.trainer.journal import read_step
from stillhouse.trainer.masks import mask_tokens
from stillhouse.trainer.scored import ScoredSample
from stillhouse.trainer.train import to_sample
from stillhouse.v1 import rollout_pb2 as pb
from tests.cluster import Cluster, job_spec
from tests.tiny import EOS_ID, SPECIAL_TOKENS

STOP_IDS = tuple(range(100, 150))
"""Many, so that about half of the completions end before max_tokens."""
STEPS = 2


@pytest.mark.parametrize(
    ("tokens", "loss"),
    [
        ({}, {"objective": "full_vocabulary"}),
        (
            {
                "drop_truncated": True,
                "mask_special": True,
                "select": {"by": "entropy", "fraction": 0.5},
                "horizon": {"start": 2, "end": 6, "steps": 1},
            },
            {"objective": "full_vocabulary"},
        ),
        ({"select": {"by": "kl", "fraction": 0.25}}, {"objective": "policy_gradient"}),
    ],
    ids=["all", "few", "kl"],
)
async def test_what_trains_follows_from_the_journal(
    deployment: Cluster, tokens: dict[str, Any], loss: dict[str, Any]
) -> None:
    """Hence a replay, which reads no more than the journal and the step's number, trains the same tokens."""
    schedule = {"steps": STEPS, "prompts_per_step": 3, "group_size": 4, "max_staleness": 0}
    job_id = await deployment.submit(
        job_spec(
            stages__0__tokens=tokens,
            stages__0__loss=loss,
            stages__0__schedule=schedule,
            stages__0__sampling={"max_tokens": 8, "temperature": 0.9, "stop_token_ids": STOP_IDS},
        )
    )
    record = await deployment.ended(job_id)
    assert record.status == "succeeded", record.error
    points = [point["values"] for point in await deployment.ctx.jobs.metrics(job_id)]
    ends = []
    for step, values in enumerate(points):
        scores = read_step(deployment.ctx.artifacts.job(job_id).journal(1, step)).scores
        given = [to_sample(ScoredSample(score), 1.0, 0.9) for score in scores]
        masked = mask_tokens(given, TokensSpec.model_validate(tokens), step, range(len(SPECIAL_TOKENS)))
        trained, all_tokens = (sum(s.num_loss_tokens for s in samples) for samples in (masked, given))
        assert values["tokens/trained"] == trained > 0
        assert values["tokens/selected_fraction"] == pytest.approx(trained / all_tokens)
        assert (trained < all_tokens) == bool(tokens)
        for score, sample in zip(scores, masked, strict=True):
            is_stopped = score.rollout.finish_reason == pb.FINISH_REASON_STOP
            assert is_stopped == (ids_list(score.rollout.completion_ids)[-1] in (EOS_ID, *STOP_IDS))
            assert score.rollout.HasField("entropies") == (tokens.get("select", {}).get("by") == "entropy")
            ends.append(bool(sample.loss_mask[-1]) and is_stopped)
    assert len(points) == STEPS
    assert np.any(ends), "the token that ends a completion is part of it, and trains"
