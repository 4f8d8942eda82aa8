"""Which tokens train: laws over drawn steps, with a slow oracle for the selection."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.core.errors import WireError
from stillhouse.core.models import inspect_model
from stillhouse.core.spec import HorizonSpec, StageSpec, TokensSpec
from stillhouse.trainer.batch import TrainSample
from stillhouse.trainer.masks import horizon, mask_tokens, token_metrics
from stillhouse.trainer.tokens import special_token_ids
from stillhouse.v1 import rollout_pb2 as pb
from tests.tiny import EOS_ID, SPECIAL_TOKENS, make_tiny_model

SPECIAL = tuple(range(len(SPECIAL_TOKENS)))
STOP, LENGTH = pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH


def sample(ids: list[int], reason: int = STOP, teacher: str = "a", index: int = 0, **fields: Any) -> TrainSample:
    rng = np.random.default_rng([index, *ids])
    values: dict[str, Any] = {
        "sample_id": f"{index}/0",
        "teacher": teacher,
        "prompt_ids": np.asarray([9], dtype=np.int32),
        "completion_ids": np.asarray(ids, dtype=np.int32),
        "loss_mask": np.ones(len(ids), dtype=np.uint8),
        "rollout_logprobs": rng.normal(-1, 1, len(ids)).astype(np.float32),
        "teacher_logprobs": rng.normal(-1, 1, len(ids)).astype(np.float32),
        "entropies": rng.choice([0.25, 0.5, 1.0, 2.0], len(ids)).astype(np.float32),
        "hidden": None,
        "weight": 1.0,
        "oldest_policy_version": 0,
        "finish_reason": reason,
    }
    return TrainSample(**{**values, **fields})


def masks(samples: list[TrainSample], step: int = 0, **tokens: Any) -> list[list[int]]:
    masked = mask_tokens(samples, TokensSpec.model_validate(tokens), step, SPECIAL)
    assert [m.sample_id for m in masked] == [s.sample_id for s in samples]
    return [m.loss_mask.tolist() for m in masked]


@st.composite
def steps(draw: st.DrawFn) -> list[TrainSample]:
    """Completions of special and plain tokens, by two teachers, some cut off, some with a mask of their own."""
    made = []
    for index in range(draw(st.integers(1, 6))):
        ids = draw(st.lists(st.integers(0, 8), min_size=1, max_size=9))
        reason, teacher = draw(st.sampled_from([STOP, LENGTH])), draw(st.sampled_from("ab"))
        own = np.asarray(draw(st.lists(st.integers(0, 1), min_size=len(ids), max_size=len(ids))), dtype=np.uint8)
        made.append(sample(ids, reason, teacher, index, loss_mask=own))
    return made


selections = st.builds(
    lambda by, percent: {"by": by, "fraction": percent / 100}, st.sampled_from(["entropy", "kl"]), st.integers(1, 100)
)
tokens_specs = st.fixed_dictionaries(
    {"drop_truncated": st.booleans(), "mask_special": st.booleans()},
    optional={
        "select": selections,
        "horizon": st.fixed_dictionaries({"start": st.integers(1, 9), "end": st.integers(1, 9), "steps": st.just(4)}),
    },
)


@given(steps(), tokens_specs, st.integers(0, 6))
def test_masks_only_take_away_and_are_the_same_each_time(samples: list[TrainSample], tokens: Any, step: int) -> None:
    before = [s.loss_mask.copy() for s in samples]
    found = masks(samples, step, **tokens)
    assert found == masks(samples, step, **tokens), "a replay masks as the first run did"
    for s, mask, own in zip(samples, found, before, strict=True):
        np.testing.assert_array_equal(s.loss_mask, own, "what came is left as it was")
        assert all(mask[t] <= own[t] for t in range(len(own)))
        if tokens["drop_truncated"] and s.finish_reason == LENGTH:
            assert not any(mask)
        if "horizon" in tokens:
            assert not any(mask[horizon(HorizonSpec(**tokens["horizon"]), step) :])


@given(steps())
def test_without_settings_every_token_trains(samples: list[TrainSample]) -> None:
    assert masks(samples) == [s.loss_mask.tolist() for s in samples]


@given(steps())
def test_special_tokens_train_only_where_they_end_the_completion(samples: list[TrainSample]) -> None:
    for s, mask in zip(samples, masks(samples, mask_special=True), strict=True):
        for t, token in enumerate(s.completion_ids):
            is_end = s.finish_reason == STOP and t == len(mask) - 1
            assert mask[t] == (s.loss_mask[t] and (is_end or token not in SPECIAL))


@given(steps(), tokens_specs, selections)
def test_selection_against_sorting_all_tokens(samples: list[TrainSample], tokens: Any, select: Any) -> None:
    """Of what the other settings leave, the most telling tokens of each teacher; ties go to the earlier one."""
    others = {key: value for key, value in tokens.items() if key != "select"}
    candidates, found = masks(samples, **others), masks(samples, **others, select=select)
    for teacher in "ab":
        scored = []
        for i, s in enumerate(samples):
            for t in range(len(s.completion_ids)):
                if s.teacher == teacher and candidates[i][t]:
                    log_r = float(s.teacher_logprobs[t]) - float(s.rollout_logprobs[t])
                    assert s.entropies is not None
                    worth = s.entropies[t] if select["by"] == "entropy" else math.exp(log_r) - 1 - log_r
                    scored.append((-float(worth), i, t))
        count = max(1, round(select["fraction"] * len(scored))) if scored else 0
        expected = {(i, t) for _, i, t in sorted(scored)[:count]}
        of_teacher = [i for i, s in enumerate(samples) if s.teacher == teacher]
        assert {(i, t) for i in of_teacher for t in np.flatnonzero(found[i])} == expected


def test_the_token_that_ends_a_completion_trains_and_others_like_it_do_not() -> None:
    ids = [5, EOS_ID, 6, EOS_ID]
    assert masks([sample(ids)], mask_special=True) == [[1, 0, 1, 1]]
    assert masks([sample(ids, LENGTH)], mask_special=True) == [[1, 0, 1, 0]], "it was cut off there, it did not end"


def test_the_horizon_moves_in_steps_from_start_to_end() -> None:
    assert [horizon(HorizonSpec(start=2, end=10, steps=4), step) for step in (0, 1, 2, 3, 4, 5)] == [2, 4, 6, 8, 10, 10]
    assert [horizon(HorizonSpec(start=9, end=3, steps=3), step) for step in (0, 1, 3, 8)] == [9, 7, 3, 3]
    assert horizon(HorizonSpec(start=1, end=32_768, steps=1_000_000), 1_000_000) == 32_768


def test_a_sample_without_what_selects_is_refused() -> None:
    select = {"by": "entropy", "fraction": 0.5}
    with pytest.raises(WireError, match="sample 0/0: no entropies"):
        masks([sample([5, 6], entropies=None)], select=select)
    unknown = np.asarray([-1.0, np.nan], dtype=np.float32)
    with pytest.raises(WireError, match="sample 0/0: token 1 has no kl"):
        masks([sample([5, 6], teacher_logprobs=unknown)], select={"by": "kl", "fraction": 0.5})


def test_without_a_teacher_there_is_no_kl_to_select_by() -> None:
    stage: dict[str, Any] = {
        "data": {"rows": [{"prompt": "hi"}]},
        "loss": {"objective": "policy_gradient", "teacher_weight": 0, "reward": {"verifier": "exact"}},
        "schedule": {"steps": 1, "group_size": 2},
        "tokens": {"select": {"by": "entropy", "fraction": 0.5}},
    }
    StageSpec.model_validate(stage)
    stage["tokens"] = {"select": {"by": "kl", "fraction": 0.5}}
    with pytest.raises(ValueError, match="select by entropy"):
        StageSpec.model_validate(stage)


def test_metrics_say_what_trains() -> None:
    samples = [
        sample([5] * 8, LENGTH),
        sample([5] * 8, index=1, teacher="b"),
        sample([5] * 4, index=2, is_filtered=True),
    ]
    spec = TokensSpec.model_validate({"drop_truncated": True, "horizon": {"start": 6, "end": 6, "steps": 1}})
    assert token_metrics(mask_tokens(samples, spec, 0), ("a", "b", "c")) == {
        "tokens/selected_fraction": 10 / 20,
        "completion/dropped_truncated": 1.0,
        "completion/filtered_fraction": 1 / 3,
        "tokens/share/a": 4 / 10,
        "tokens/share/b": 6 / 10,
        "tokens/share/c": 0.0,
    }
    one = token_metrics([replace(sample([5]), loss_mask=np.zeros(1, np.uint8))])
    assert (one["tokens/selected_fraction"], one["completion/dropped_truncated"]) == (0.0, 0.0)


def test_special_tokens_are_read_from_the_tokenizer(tmp_path: Path) -> None:
    assert special_token_ids(inspect_model("m", make_tiny_model(tmp_path / "m"))) == list(SPECIAL)
