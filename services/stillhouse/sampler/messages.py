"""Between the queue's messages and the engine's: prompt groups in, rollouts and failures out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from stillhouse.core import tracing
from stillhouse.core.errors import WireError
from stillhouse.core.queue import keys
from stillhouse.core.queue.streams import Scope
from stillhouse.core.rollouts import SCHEMA_VERSION, blank_rollout, rollout_mark, sample_id, score_mark
from stillhouse.core.tensors import floats_tensor, from_tensor, ids_list, ids_tensor
from stillhouse.sampler.engines.base import SampleRequest
from stillhouse.sampler.generation import Completion
from stillhouse.v1 import rollout_pb2 as pb
from stillhouse.v1 import weights_pb2

FINISH_REASONS: Final[dict[str, pb.FinishReason]] = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORT,
}


@dataclass(frozen=True, slots=True)
class Source:
    """Who makes a rollout."""

    instance: str
    tokenizer_sha256: str


def make_request(key: str, prompt_ids: list[int], sampling: pb.SamplingParams, seed: int) -> SampleRequest:
    """A request to the engine.

    Raises:
        WireError: a stop string is empty.
    """
    if "" in sampling.stop:
        raise WireError("an empty stop string would end every completion before it begins; leave it out")
    return SampleRequest(
        key=key,
        prompt_ids=prompt_ids,
        max_tokens=sampling.max_tokens,
        seed=seed,
        temperature=sampling.temperature,
        # 0 is what an unset field reads as; a nucleus without mass has no other meaning
        top_p=sampling.top_p or 1.0,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        stop_token_ids=tuple(sampling.stop_token_ids),
        stop=tuple(sampling.stop),
        record_top_k=sampling.record_top_k,
        record_entropies=sampling.record_entropies,
    )


def group_requests(group: pb.PromptGroup) -> dict[int, SampleRequest]:
    """One request per sample of the group, by index."""
    prompt_ids = ids_list(group.prompt_ids)
    return {
        index: make_request(sample_id(group, index), prompt_ids, group.sampling, seed)
        for index, seed in zip(group.sample_indices, group.seeds, strict=True)
    }


def make_rollout(group: pb.PromptGroup, index: int, completion: Completion, source: Source) -> pb.Rollout:
    """A finished sample, as the teacher reads it; a span per set of weights that wrote some of it."""
    rollout = blank_rollout(group, index)
    rollout.completion_ids.CopyFrom(ids_tensor(completion.completion_ids))
    rollout.rollout_logprobs.CopyFrom(floats_tensor(completion.rollout_logprobs))
    if completion.target_ids is not None:
        rollout.target_ids.CopyFrom(ids_tensor(completion.target_ids))
    if completion.entropies is not None:
        rollout.entropies.CopyFrom(floats_tensor(completion.entropies))
    rollout.finish_reason = FINISH_REASONS[completion.finish_reason]
    for first_token, weights in completion.spans:
        rollout.spans.add(first_token=first_token, policy_version=weights.policy_version, epoch=weights.epoch)
    rollout.tokenizer_sha256 = source.tokenizer_sha256
    rollout.weights_sha256 = completion.spans[-1][1].sha256 if completion.spans else ""
    rollout.sampler = source.instance
    rollout.sample_s = completion.sample_s
    # whoever scores it has to do with who wrote it; where that is not traced, with who asked for it
    rollout.traceparent = tracing.traceparent() or group.traceparent
    return rollout


def make_partial(index: int, completion: Completion, start: int, end: int) -> pb.PartialCompletion:
    """The tokens start .. end - 1 of a completion that is being written."""
    partial = pb.PartialCompletion(
        index=index,
        first_token=start,
        completion_ids=ids_tensor(completion.completion_ids[start:end]),
        rollout_logprobs=floats_tensor(completion.rollout_logprobs[start:end]),
        sample_s=completion.sample_s,
    )
    target_ids, entropies = completion.recorded(start, end)
    if target_ids is not None:
        partial.target_ids.CopyFrom(ids_tensor(target_ids))
    if entropies is not None:
        partial.entropies.CopyFrom(floats_tensor(entropies))
    ends = [first for first, _ in completion.spans[1:]] + [end]
    for (first, weights), after in zip(completion.spans, ends, strict=True):
        if max(first, start) < min(after, end):
            version = {"policy_version": weights.policy_version, "epoch": weights.epoch}
            partial.spans.add(first_token=max(first, start), **version)
    return partial


def resumed(request: SampleRequest, partials: Iterable[pb.PartialCompletion]) -> Completion:
    """A completion that another sampler has begun, to be written on.

    Raises:
        WireError: the parts do not follow each other.
    """
    completion = Completion(request)
    for partial in partials:
        if partial.first_token != len(completion.completion_ids):
            have = len(completion.completion_ids)
            raise WireError(f"{request.key}: a part begins at token {partial.first_token}, after {have} tokens")
        for span in partial.spans:
            weights = weights_pb2.WeightsRef(epoch=span.epoch, policy_version=span.policy_version)
            completion.write_with(weights, span.first_token)
        completion.take(
            ids_list(partial.completion_ids),
            from_tensor(partial.rollout_logprobs).tolist(),
            from_tensor(partial.target_ids) if partial.HasField("target_ids") else None,
            from_tensor(partial.entropies) if partial.HasField("entropies") else None,
        )
        completion.sample_s = partial.sample_s
    completion.request = replace(request, written=tuple(completion.completion_ids))
    return completion


def make_failure(
    group: pb.PromptGroup, index: int, instance: str, reason: str, message: str, attempts: int
) -> pb.Score:
    """The end of a sample that could not be written: it goes straight to `scored`."""
    rollout = blank_rollout(group, index)
    rollout.sampler = instance
    failure = pb.Failure(reason=reason, message=message, service="sampler", attempts=attempts)
    return pb.Score(schema_version=SCHEMA_VERSION, rollout=rollout, failed=failure)


def destination(rollout: pb.Rollout, scope: Scope) -> tuple[str, str, bytes]:
    """(stream, mark, message) of a finished sample: to its teacher, or to its end if no teacher is asked."""
    if rollout.score.kind == pb.SCORE_KIND_NONE:
        score = pb.Score(schema_version=SCHEMA_VERSION, rollout=rollout, none=pb.NoScore())
        mark = score_mark(rollout.sample_id, rollout.teacher, rollout.attempt)
        return keys.scored(scope.job_id, scope.epoch), mark, score.SerializeToString()
    stream = keys.rollouts(scope.job_id, scope.epoch, rollout.teacher)
    return stream, rollout_mark(rollout.sample_id, rollout.teacher, rollout.attempt), rollout.SerializeToString()


def content(completion: Completion) -> str:
    """What makes a rollout too large, and what to do about it."""
    size = f"it holds {len(completion.completion_ids)} tokens"
    if completion.target_ids is None:
        return f"{size}; lower sampling.max_tokens"
    likeliest = completion.target_ids.shape[1]
    return f"{size} with the ids of the {likeliest} likeliest at each; lower loss.k or sampling.max_tokens"
