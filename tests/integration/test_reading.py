"""Whole jobs in which teachers read otherwise than students, and texts end at stop strings."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stillhouse.core.models import inspect_model
from stillhouse.core.tensors import from_tensor, ids_list
from stillhouse.core.vocabulary import tokenizer_of
from stillhouse.trainer.journal import read_step
from stillhouse.v1 import rollout_pb2 as pb
from tests.cluster import Cluster, job_spec
from tests.reading import OTHER, THINKING, slow_end
from tests.tiny import EOS_ID, make_tiny_model

ONE_STEP = {"steps": 1, "prompts_per_step": 2, "group_size": 2, "max_staleness": 0}


def add_model(made: Cluster, name: str, template: str, *, seed: int) -> Path:
    """A tiny model with a template of its own."""
    folder = make_tiny_model(made.settings.home / "models" / name, seed=seed)
    (folder / "chat_template.jinja").write_text(template)
    made.models.add(inspect_model(name, folder))
    return folder


async def scores_of(made: Cluster, spec: dict[str, Any]) -> list[pb.Score]:
    """What the first step of a job trains on."""
    job_id = await made.submit(spec)
    record = await made.ended(job_id)
    assert record.status == "succeeded", record.error
    return list(read_step(made.ctx.artifacts.job(job_id).journal(1, 0)).scores)


@torch.no_grad()
def plain_logprobs(folder: Path, prompt: list[int], completion: list[int]) -> np.ndarray:
    """[T] by one forward pass over prompt and completion, nothing else."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1)[range(len(completion)), completion].numpy()


async def test_a_teacher_scores_the_completion_after_its_own_prompt(deployment: Cluster) -> None:
    """Its template, its system prompt, its arguments, and what only it may know."""
    teacher = add_model(deployment, "other", OTHER + "{% if enable_thinking %}{think}{% endif %}", seed=7)
    rows = [
        {"prompt": "why"},
        {"prompt": "how", "teacher_prompt": [{"role": "user", "content": "how? (thus)"}]},
    ]
    spec = job_spec(
        teachers={
            "main": {"model": "other", "system_prompt": "know", "chat_template_kwargs": {"enable_thinking": True}}
        },
        stages__0__data={"rows": rows},
        stages__0__loss={"objective": "policy_gradient"},
        stages__0__schedule=ONE_STEP,
    )
    expected = {
        0: "<|endoftext|>[system]know[user]why[assistant]{think}",
        1: "<|endoftext|>[user]how? (thus)[assistant]{think}",
    }
    tokenizer = tokenizer_of(deployment.models.get("other"))
    for score in await scores_of(deployment, spec):
        rollout = score.rollout
        prompt, theirs = ids_list(rollout.prompt_ids), ids_list(rollout.teacher_prompt_ids)
        assert tokenizer.decode(theirs, skip_special_tokens=False) == expected[rollout.row]
        completion, found = ids_list(rollout.completion_ids), from_tensor(score.sampled.teacher_logprobs)
        np.testing.assert_allclose(found, plain_logprobs(teacher, theirs, completion), atol=1e-4)
        control = plain_logprobs(teacher, prompt, completion)
        assert np.abs(found - control).max() > 0.01, "under the student's prompt it would say something else"


@pytest.mark.parametrize(
    ("thinks", "agrees"), [({}, True), ({"enable_thinking": True}, False)], ids=["same prompt", "other prompt"]
)
async def test_equal_models_agree_if_and_only_if_they_read_the_same(
    deployment: Cluster, thinks: dict[str, Any], agrees: bool
) -> None:
    """Equal weights as two registered models, each with its own renderer; the student's argument reaches both."""
    add_model(deployment, "thinker", THINKING, seed=3)
    add_model(deployment, "twin", THINKING + "{# of another family #}", seed=3)
    spec = job_spec(
        student={"model": "thinker"},
        teachers={"main": {"model": "twin", "chat_template_kwargs": thinks}},
        stages__0__data={"rows": [{"prompt": "why"}], "chat_template_kwargs": {"enable_thinking": False}},
        stages__0__schedule=ONE_STEP,
    )
    job_id = await deployment.submit(spec)
    assert (await deployment.ended(job_id)).status == "succeeded"
    (reverse_kl,) = await deployment.metric(job_id, "loss/reverse_kl/mean")
    assert (abs(reverse_kl) <= 1e-4) == agrees


async def test_texts_end_at_stop_strings_in_training_and_in_evaluation(deployment: Cluster) -> None:
    stops = list(string.ascii_lowercase[:16])
    spec = job_spec(
        stages__0__sampling={"max_tokens": 24, "stop": stops, "min_p": 0.001},
        stages__0__schedule={**ONE_STEP, "group_size": 4},
        evaluation={"data": {"rows": [{"prompt": "held out"}]}, "max_tokens": 24, "show": 1},
    )
    tokenizer = tokenizer_of(deployment.models.get("student"))
    stopped = 0
    for score in await scores_of(deployment, spec):
        ids = ids_list(score.rollout.completion_ids)
        end = slow_end(tokenizer, ids, stops)
        assert end in (None, len(ids))
        is_stopped = end is not None or ids[-1] == EOS_ID
        assert (score.rollout.finish_reason == pb.FINISH_REASON_STOP) == is_stopped
        stopped += end is not None
    assert stopped > 0, "or the case shows nothing"
