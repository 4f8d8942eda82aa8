"""The sampler as a service: real queue, real gRPC, a tiny student; the trainer is an honest fake with weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.core import service
from stillhouse.core.errors import ConflictError, NotFoundError, SpecError, UnimplementedError, WireError
from stillhouse.core.queue import keys
from stillhouse.core.rollouts import score_mark
from stillhouse.core.tensors import from_tensor, ids_list, ids_tensor
from stillhouse.core.vocabulary import tokenizer_of
from stillhouse.sampler import worker
from stillhouse.v1 import rollout_pb2 as pb
from stillhouse.v1 import sampler_pb2, weights_pb2
from tests.desk import (
    Desk,
    drain,
    full_logprobs,
    is_claimed,
    open_desk,
)
from tests.reading import slow_end
from tests.tiny import TOKENIZER_SIZE
from tests.waiting import wait_until


async def test_prompts_become_rollouts_of_the_published_weights(desk: Desk) -> None:
    ref = desk.publish(0)
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    planned = [await desk.plan(group, num_samples=3, traceparent="00-aa-bb-01") for group in range(4)]
    got = await desk.wait_for(*[f"{group}/{index}" for group in range(4) for index in range(3)])
    await wait_until(desk.is_drained, timeout_s=5, what="the prompts to leave the queue")
    student = desk.cluster.models.get("student")
    for group in planned:
        for index in group.sample_indices:
            rollout = got[f"{group.group_id}/{index}"]
            tokens = ids_list(rollout.completion_ids)
            assert 1 <= len(tokens) <= group.sampling.max_tokens
            is_truncated = rollout.finish_reason == pb.FINISH_REASON_LENGTH
            assert is_truncated == (len(tokens) == group.sampling.max_tokens and tokens[-1] != 2)
            np.testing.assert_allclose(
                from_tensor(rollout.rollout_logprobs), full_logprobs(desk.trainer.models[0], rollout), atol=1e-4
            )
            assert [(span.first_token, span.policy_version, span.epoch) for span in rollout.spans] == [
                (0, 0, desk.scope.epoch)
            ]
            assert (rollout.seed, rollout.row, rollout.traceparent) == (group.seeds[index], group.row, "00-aa-bb-01")
            assert (rollout.weights_sha256, rollout.tokenizer_sha256) == (ref.sha256, student.tokenizer_sha256)
            assert (rollout.sampler, rollout.attempt, rollout.teacher) == ("sampler-0", 0, "main")
            assert rollout.sample_s > 0
    assert len(desk.trainer.requests) == 1, "one pull serves all groups"


async def test_samples_that_no_teacher_is_asked_about_end_with_the_sampler(desk: Desk) -> None:
    desk.publish(0)
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    await desk.plan(0, score=pb.ScoreSpec(kind=pb.SCORE_KIND_NONE))
    await wait_until(desk.is_drained, timeout_s=20, what="the prompts to leave the queue")
    ended = await desk.failures()
    assert {name: score.WhichOneof("result") for name, score in ended.items()} == {"0/0": "none", "0/1": "none"}
    for score in ended.values():
        tokens = ids_list(score.rollout.completion_ids)
        assert len(tokens) == len(from_tensor(score.rollout.rollout_logprobs)) >= 1
        assert score.rollout.spans[0].policy_version == 0
    assert await desk.rollouts() == {}
    marks = await desk.queue.marked(desk.scope, [score_mark(name, "main") for name in ended])
    assert len(marks) == 2, "a second hand-over of the sample would be a duplicate"


async def test_a_sampler_that_missed_the_hint_pulls_at_the_claim(desk: Desk) -> None:
    desk.publish(0)
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    await desk.plan(0)
    await desk.wait_for("0/0", "0/1")
    ref = desk.publish(1)
    await desk.plan(1, min_policy_version=0)
    got = await desk.wait_for("1/0", "1/1")
    assert got["1/0"].spans[0].policy_version == 0, "allowed by the bound, and nobody said there is more"
    await desk.plan(2, min_policy_version=1)
    got = await desk.wait_for("2/0", "2/1")
    assert got["2/0"].spans[0].policy_version == 1
    assert got["2/0"].weights_sha256 == ref.sha256
    np.testing.assert_allclose(
        from_tensor(got["2/0"].rollout_logprobs), full_logprobs(desk.trainer.models[1], got["2/0"]), atol=1e-4
    )


async def test_a_sampler_that_cannot_load_the_student_says_why_and_tries_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "RETRY_S", 0.2)
    monkeypatch.setattr(service, "HEARTBEAT_S", 0.1)
    desk.publish(0)
    config = Path(desk.cluster.models.get("student").path) / "config.json"
    good = config.read_bytes()
    config.write_bytes(good + b" ")
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    await desk.plan(0)

    async def heartbeat() -> tuple[str, str, str]:
        info = await desk.cluster.ctx.registry.find("sampler", "sampler-0")
        return info.state, info.job_id, info.extra["problem"]

    async def says_why() -> bool:
        state, job_id, problem = await heartbeat()
        return (state, job_id) == ("idle", "") and "config.json changed since it was registered" in problem

    await wait_until(says_why, timeout_s=10, what="the sampler to say what is wrong")
    config.write_bytes(good)
    await desk.wait_for("0/0", "0/1")

    async def is_well() -> bool:
        return (await heartbeat())[1:] == (desk.scope.job_id, "")

    await wait_until(is_well, timeout_s=5, what="the sampler to say that it is well")


async def test_weights_that_do_not_exist_yet_are_waited_for(desk: Desk) -> None:
    desk.publish(0)
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    await desk.plan(0, min_policy_version=2)
    await wait_until(lambda: len(desk.trainer.requests) >= 2, timeout_s=10, what="the sampler to ask again")
    assert not await desk.rollouts()
    desk.publish(2)
    got = await desk.wait_for("0/0", "0/1")
    assert {rollout.spans[0].policy_version for rollout in got.values()} == {2}


async def test_a_hint_brings_newer_weights(desk: Desk) -> None:
    desk.publish(0)
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    await desk.plan(0)
    await desk.wait_for("0/0")
    peer = await desk.peer("sampler-0")
    request = sampler_pb2.SamplerServiceSyncWeightsRequest(job_id=desk.scope.job_id, weights=desk.publish(1))
    await peer.unary("SyncWeights", request, timeout_s=5)
    await desk.plan(1)
    got = await desk.wait_for("1/0")
    assert got["1/0"].spans[0].policy_version == 1
    for job_id, epoch in (("job_other0000", desk.scope.epoch), (desk.scope.job_id, desk.scope.epoch - 1)):
        foreign = weights_pb2.WeightsRef(epoch=epoch, policy_version=9)
        request = sampler_pb2.SamplerServiceSyncWeightsRequest(job_id=job_id, weights=foreign)
        with pytest.raises(ConflictError):
            await peer.unary("SyncWeights", request, timeout_s=5)


async def test_an_exact_version_is_used_even_if_newer_ones_exist(desk: Desk) -> None:
    for version in (0, 1, 2):
        desk.publish(version)
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    await desk.plan(0)
    assert (await desk.wait_for("0/0"))["0/0"].spans[0].policy_version == 2
    for group, version in ((1, 1), (2, 0), (3, 2)):
        await desk.plan(group, exact_policy_version_plus_one=version + 1)
    got = await desk.wait_for("1/1", "2/1", "3/1")
    assert [got[f"{group}/1"].spans[0].policy_version for group in (1, 2, 3)] == [1, 0, 2]


async def test_deterministic_groups_do_not_depend_on_who_else_is_there(desk: Desk) -> None:
    desk.publish(0)
    for group in range(4):
        await desk.plan(group, num_samples=3, exact_policy_version_plus_one=1, prompt_ids=[7] * (3 + group))
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    together = await desk.wait_for(*[f"{group}/2" for group in range(4)])
    await wait_until(desk.is_drained, timeout_s=5, what="the prompts to leave the queue")
    other = await open_desk(desk.cluster, desk.cluster.settings.home, desk.trainer)
    await desk.cluster.ctx.registry.release_sampler("sampler-0", desk.scope)
    desk.trainer.publish(other.scope, 0, desk.trainer.models[0])
    await other.lease("sampler-0")
    for group in (3, 1):
        await other.plan(group, num_samples=3, exact_policy_version_plus_one=1, prompt_ids=[7] * (3 + group))
    alone = await other.wait_for("3/0", "3/1", "3/2", "1/0", "1/1", "1/2")
    together = await desk.rollouts()
    for name, rollout in alone.items():
        assert rollout.rollout_logprobs == together[name].rollout_logprobs, "bit for bit"
        assert rollout.completion_ids == together[name].completion_ids


async def test_impossible_samples_end_as_failures_and_the_others_go_on(desk: Desk) -> None:
    desk.publish(0)
    await desk.plan(0, num_samples=2, prompt_ids=[5] * 64)
    await desk.plan(1, num_samples=2)
    await desk.plan(2, num_samples=1, sampling={"stop": [""]})
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    await desk.wait_for("1/0", "1/1")
    await wait_until(desk.is_drained, timeout_s=5, what="all groups to leave the queue")
    failures = await desk.failures()
    assert {name: score.failed.reason for name, score in failures.items()} == {
        "0/0": "too_long",
        "0/1": "too_long",
        "2/0": "bad_request",
    }
    assert failures["0/1"].failed.service == "sampler"
    assert ids_list(failures["0/1"].rollout.prompt_ids) == [5] * 64
    assert await desk.queue.length(keys.dead(desk.scope.job_id, desk.scope.epoch)) == 3


async def test_what_is_recorded_travels_with_the_rollout(desk: Desk) -> None:
    desk.publish(0)
    await desk.plan(0, num_samples=1, sampling={"record_top_k": 5, "record_entropies": True})
    await desk.plan(1, num_samples=1)
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    got = await desk.wait_for("0/0", "1/0")
    recorded, plain = got["0/0"], got["1/0"]
    num_tokens = len(ids_list(recorded.completion_ids))
    assert (list(recorded.target_ids.shape), list(recorded.entropies.shape)) == ([num_tokens, 5], [num_tokens])
    assert (from_tensor(recorded.target_ids).dtype, from_tensor(recorded.entropies).dtype) == (np.int32, np.float32)
    assert not plain.HasField("target_ids")
    assert not plain.HasField("entropies")


async def test_a_rollout_that_outgrows_its_entry_names_the_knobs(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillhouse.core.queue.streams.MAX_ENTRY_BYTES", 2000)
    desk.publish(0)
    await desk.plan(0, num_samples=1, sampling={"record_top_k": 200, "stop_token_ids": [], "max_tokens": 20})
    await desk.plan(1, num_samples=1)
    await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    await desk.wait_for("1/0")
    await wait_until(desk.is_drained, timeout_s=5, what="both groups to leave the queue")
    (failed,) = [score.failed for score in (await desk.failures()).values()]
    assert failed.reason == "too_large"
    for part in ("2000", "the 200 likeliest", "lower loss.k or sampling.max_tokens"):
        assert part in failed.message


async def test_generate_outside_the_queue(desk: Desk) -> None:
    desk.publish(0)
    await desk.cluster.start("sampler")
    peer = await desk.peer("sampler-0")
    request = sampler_pb2.GenerateRequest(
        model="teacher",
        prompt_ids=ids_tensor([5, 6, 7]),
        sampling=pb.SamplingParams(temperature=0.0, max_tokens=5),
        seeds=[1, 2],
    )
    frozen = [part async for part in peer.stream("Generate", request, timeout_s=20)]
    assert sorted(part.index for part in frozen) == [0, 1]
    assert ids_list(frozen[0].completion_ids) == ids_list(frozen[1].completion_ids), "greedy"
    assert not frozen[0].HasField("weights")
    probe = pb.Rollout(
        prompt_ids=request.prompt_ids, completion_ids=frozen[0].completion_ids, sampling=request.sampling
    )
    folder = Path(desk.cluster.models.get("teacher").path)
    np.testing.assert_allclose(from_tensor(frozen[0].rollout_logprobs), full_logprobs(folder, probe), atol=1e-4)
    request.model = ""
    with pytest.raises(ConflictError, match="serves no job"):
        await drain(peer, request)
    await desk.lease("sampler-0")

    async def answers() -> list[Any] | None:
        try:
            return await drain(peer, request)
        except ConflictError:
            return None

    [first, _] = await wait_until(answers, timeout_s=20, what="the student to be there")
    assert first.weights.policy_version == 0
    probe.completion_ids.CopyFrom(first.completion_ids)
    np.testing.assert_allclose(
        from_tensor(first.rollout_logprobs), full_logprobs(desk.trainer.models[0], probe), atol=1e-4
    )


async def test_stop_strings_end_rollouts_and_what_callers_ask_for(desk: Desk) -> None:
    """Both models write as without them, up to the token that completes one: with one seed the same draws."""
    desk.publish(0)
    await desk.plan(0, sampling={"max_tokens": 30})
    await desk.cluster.start("sampler")
    peer = await desk.peer("sampler-0")
    await desk.lease("sampler-0")
    plain = await desk.wait_for("0/0", "0/1")
    tokenizer = tokenizer_of(desk.cluster.models.get("student"))

    def stop_in(ids: list[int]) -> str:
        return next(char for char in tokenizer.decode(ids[3:], skip_special_tokens=False) if char != "\ufffd")

    whole = ids_list(plain["0/0"].completion_ids)
    stop = stop_in(whole)
    # group 0 with the same seeds and prompt, under other names
    fields: dict[str, Any] = {
        "prompt_ids": ids_list(plain["0/0"].prompt_ids),
        "sampling": {"max_tokens": 30, "stop": [stop]},
    }
    for group, exact in ((1, 0), (2, 1)):
        await desk.plan(group, seeds=[0, 1], exact_policy_version_plus_one=exact, **fields)
    got = await desk.wait_for("1/0", "1/1", "2/0", "2/1")
    for name in ("1/0", "2/0"):
        assert ids_list(got[name].completion_ids) == whole[: slow_end(tokenizer, whole, [stop])]
        assert got[name].finish_reason == pb.FINISH_REASON_STOP
        assert list(got[name].rollout_logprobs.shape) == list(got[name].completion_ids.shape)

    request = sampler_pb2.GenerateRequest(
        model="teacher",
        prompt_ids=ids_tensor([5, 6, 7]),
        sampling=pb.SamplingParams(temperature=1.0, max_tokens=30),
        seeds=[1, 2],
    )
    frozen = {part.index: ids_list(part.completion_ids) for part in await drain(peer, request)}
    request.sampling.stop.extend([stop_in(frozen[0]), "never there"])
    for part in await drain(peer, request):
        end = slow_end(tokenizer, frozen[part.index], request.sampling.stop)
        assert ids_list(part.completion_ids) == frozen[part.index][:end]
        assert part.index != 0 or (end is not None and part.finish_reason == pb.FINISH_REASON_STOP)


async def test_generate_refuses_what_it_cannot_do(desk: Desk) -> None:
    await desk.cluster.start("sampler")
    peer = await desk.peer("sampler-0")
    good = {
        "model": "teacher",
        "prompt_ids": ids_tensor([5]),
        "sampling": pb.SamplingParams(temperature=1.0, max_tokens=5),
        "seeds": [1],
    }
    assert len(await drain(peer, sampler_pb2.GenerateRequest(**good))) == 1
    for change, error in (
        ({"model": "nobody"}, NotFoundError),
        ({"prompt_ids": ids_tensor([5] * 256)}, WireError),
        ({"prompt_ids": ids_tensor([TOKENIZER_SIZE])}, WireError),
        ({"sampling": pb.SamplingParams(max_tokens=5, stop=[""])}, WireError),
        ({"sampling": pb.SamplingParams(max_tokens=5, record_top_k=2)}, UnimplementedError),
        ({"seeds": []}, SpecError),
    ):
        with pytest.raises(error):
            await drain(peer, sampler_pb2.GenerateRequest(**{**good, **change}))


async def test_pause_holds_work_and_resume_lets_it_go(desk: Desk) -> None:
    desk.publish(0)
    await desk.cluster.start("sampler")
    peer = await desk.peer("sampler-0")
    await peer.unary("Pause", sampler_pb2.PauseRequest(), timeout_s=5)
    await desk.lease("sampler-0")
    await desk.plan(0)
    info = await peer.unary("GetInfo", sampler_pb2.SamplerServiceGetInfoRequest(), timeout_s=5)
    assert (info.instance, info.engine, info.paused) == ("sampler-0", "transformers", True)
    assert not await is_claimed(desk)
    await peer.unary("Resume", sampler_pb2.ResumeRequest(), timeout_s=5)
    await desk.wait_for("0/0", "0/1")
    info = await peer.unary("GetInfo", sampler_pb2.SamplerServiceGetInfoRequest(), timeout_s=5)
    assert (info.job_id, info.model, info.paused) == (desk.scope.job_id, "student", False)
    assert (info.vocab_size, info.max_sequence_length) == (TOKENIZER_SIZE, 64)
    assert info.sampled_tokens > 0
    assert info.weights.policy_version == 0
    assert (await peer.unary("Abort", sampler_pb2.AbortRequest(), timeout_s=5)).aborted == 0


async def test_pinned_groups_keep_their_weights_beside_others_that_go_on(desk: Desk) -> None:
    """Version 1 is measured while version 2 comes: nothing pinned is written by another, nobody's weights go back."""
    desk.publish(0)
    ctx = await desk.cluster.start("sampler")
    await desk.lease("sampler-0")
    long = {"max_tokens": 60, "temperature": 9.0}
    await desk.plan(0, min_policy_version=0, sampling=long)
    desk.publish(1)
    for group in (1, 2, 3):
        await desk.plan(group, min_policy_version=1, pinned_policy_version_plus_one=2, sampling=long)
    await desk.plan(4, min_policy_version=1, sampling=long)
    desk.publish(2)
    await desk.plan(5, min_policy_version=2, sampling=long)
    await desk.plan(6, min_policy_version=1, pinned_policy_version_plus_one=2)
    got = await desk.wait_for(*[f"{group}/{index}" for group in range(7) for index in (0, 1)])
    versions = {name: [span.policy_version for span in rollout.spans] for name, rollout in got.items()}
    for group in (1, 2, 3, 6):
        assert versions[f"{group}/0"] == versions[f"{group}/1"] == [1]
    assert versions["5/0"] == versions["5/1"] == [2]
    assert all(found == sorted(found) for found in versions.values()), "weights went back under a completion"
    assert not ctx.stop.is_set()
