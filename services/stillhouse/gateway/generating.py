"""Completions for people who want to see what a model says: tokens here, texts from a sampler.

    request -> the model it means -> rendered and tokenized (in a thread) -> a sampler writes -> texts

The samplers are those of the jobs: those that serve none are asked first, and few requests run at once. A model that a
request names sits beside the student in the sampler's memory. Nothing is stored.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from typing import Final, Literal

from tokenizers import Tokenizer

from stillhouse.core import chat
from stillhouse.core.checkpoints import EXPORT, Models, exported, locate, parse
from stillhouse.core.errors import AuthError, ConflictError, DeadlineError, OverloadedError, UnavailableError
from stillhouse.core.explain import Finding
from stillhouse.core.models import ModelEntry, end_ids
from stillhouse.core.queue.registry import ServiceInfo
from stillhouse.core.schemas import GeneratedText, Generation, GenerationUsage
from stillhouse.core.service import Context
from stillhouse.core.spec_generate import GenerateRequest
from stillhouse.core.tensors import DTYPE_NAMES, from_tensor, ids_list, ids_tensor, itemsize
from stillhouse.core.vocabulary import tokenizer_of
from stillhouse.gateway.deps import Caller, own_job
from stillhouse.gateway.problems import InvalidError
from stillhouse.gateway.scoring import Slots, in_turn, stranger
from stillhouse.v1 import rollout_pb2, sampler_pb2, sampler_pb2_grpc

GENERATE_S: Final = 85.0
"""Time for a sampler to load the model and to write; it goes on loading, so that whoever asks again finds it further.
Less than our client waits for an answer."""
MAX_RUNNING: Final = 2
"""Requests that samplers work on at once for one gateway: a sampler writes them beside the samples of its job."""
_FINISH: Final[dict[int, Literal["stop", "length", "abort"]]] = {
    rollout_pb2.FINISH_REASON_STOP: "stop",
    rollout_pb2.FINISH_REASON_LENGTH: "length",
    rollout_pb2.FINISH_REASON_ABORT: "abort",
}


async def generate(ctx: Context, slots: Slots, caller: Caller, request: GenerateRequest) -> Generation:
    """The answer to a request.

    Raises:
        NotFoundError: no such model, job or checkpoint, or another owner's.
        ConflictError: the checkpoint is no model yet.
        InvalidError, SpecError: the model cannot read this, or it is too long for it.
        UnavailableError: no sampler is there.
        OverloadedError: too many requests run, or the model is too large.
        DeadlineError: it took longer than GENERATE_S.
    """
    if reference := parse(request.model):
        await own_job(ctx, caller, reference[0])
    entry = await asyncio.to_thread(find, ctx.models, request.model)
    _check_size(ctx, entry, request)
    tokenizer = await asyncio.to_thread(tokenizer_of, entry)
    text, prompt_ids = await asyncio.to_thread(read_prompt, tokenizer, entry, request)
    seed = secrets.randbelow(2**32) if request.seed is None else request.seed
    with slots:
        parts, sampler = await _written(ctx, _question(entry, prompt_ids, request, seed))
    data = await asyncio.to_thread(lambda: [_text(tokenizer, part) for part in parts])
    return Generation(
        model=entry.name,
        model_sha256=entry.sha256,
        prompt=text,
        seed=seed,
        sampler=sampler,
        data=data,
        usage=GenerationUsage(
            prompt_tokens=len(prompt_ids), completion_tokens=sum(completion.num_tokens for completion in data)
        ),
    )


# -- the model ---------------------------------------------------------------------------------------------------------


def find(models: Models, name: str) -> ModelEntry:
    """The entry of a registered model or a checkpoint. A finished student becomes a model here: it is one already, and
    is only hashed. What its trainer committed on the way has to be made one, which needs torch.

    Raises:
        NotFoundError: says what there is.
        ConflictError: the checkpoint is no model yet; says how it becomes one.
    """
    if not parse(name):
        return models.get(name)
    found = locate(models.artifacts, name)
    entry = models.made(found)
    if entry is not None:
        return entry
    job_id, _, checkpoint = found.partition("/")
    folder = exported(models.artifacts.job(job_id)) if checkpoint == EXPORT else None
    if folder is None:
        raise ConflictError(
            f"checkpoint '{found}' is no model yet: `stillhouse models add NAME {found}` on the gateway's machine "
            "makes one of it, and so does a job that names it as a teacher or in init_from",
            param="model",
        )
    return models.register(found, folder)


def _check_size(ctx: Context, entry: ModelEntry, request: GenerateRequest) -> None:
    """A model beyond the budget might take the memory that the sampler's job needs."""
    needs_gib = entry.num_parameters * itemsize(DTYPE_NAMES[request.dtype]) / 2**30
    budget_gib = ctx.settings.teacher_memory_gib
    if needs_gib > budget_gib:
        raise OverloadedError(
            f"'{entry.name}' needs {needs_gib:.3g} GiB in {request.dtype}, and samplers have {budget_gib:g} GiB for "
            "models beside their student; take dtype bfloat16, or raise teacher_memory_gib",
            param="model",
        )


# -- tokens ------------------------------------------------------------------------------------------------------------


def read_prompt(tokenizer: Tokenizer, entry: ModelEntry, request: GenerateRequest) -> tuple[str, list[int]]:
    """(text, [P] token ids) of what the model reads.

    Raises:
        SpecError: its chat template refuses the conversation, or there is none.
        InvalidError: prompt and completion are longer than its longest sequence.
    """
    if request.prompt is not None:
        text, param = request.prompt, "prompt"
        ids = tokenizer.encode(text).ids
    else:
        param = "messages"
        text = chat.render(entry, request.conversation(), request.chat_template_kwargs)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
    room = entry.max_sequence_length - len(ids)
    if not ids:
        raise InvalidError([Finding(param, f"'{entry.name}' reads nothing in it", "write something")])
    if room < request.max_tokens:
        message = f"{len(ids)} tokens and max_tokens {request.max_tokens} are more than the max_sequence_length "
        fix = f"shorten it, or lower max_tokens to {room}" if room > 0 else "shorten it"
        raise InvalidError([Finding(param, message + f"{entry.max_sequence_length} of '{entry.name}'", fix)])
    return text, ids


def _question(
    entry: ModelEntry, prompt_ids: list[int], request: GenerateRequest, seed: int
) -> sampler_pb2.GenerateRequest:
    sampling = rollout_pb2.SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=request.max_tokens,
        stop_token_ids=end_ids(entry),
    )
    return sampler_pb2.GenerateRequest(
        model=entry.name,
        prompt_ids=ids_tensor(prompt_ids),
        sampling=sampling,
        seeds=[seed + index for index in range(request.n)],
        dtype=DTYPE_NAMES[request.dtype],
    )


# -- the sampler -------------------------------------------------------------------------------------------------------


async def _written(
    ctx: Context, question: sampler_pb2.GenerateRequest
) -> tuple[list[sampler_pb2.GenerateResponse], str]:
    """(completions in the order of their seeds, who wrote them). A sampler that is gone is replaced by the next."""
    failure: UnavailableError | None = None
    for info in idle_first(await ctx.registry.services("sampler"), question.model):
        peer = ctx.peers.get(info.address, sampler_pb2_grpc.SamplerServiceStub, f"sampler {info.instance}")
        try:
            parts = {part.index: part async for part in peer.stream("Generate", question, timeout_s=GENERATE_S)}
        except DeadlineError:
            raise DeadlineError(
                f"{info.instance} did not load '{question.model}' and write {len(question.seeds)} x "
                f"{question.sampling.max_tokens} tokens within {GENERATE_S:g} s; ask for less, or try again when it "
                "has less to do"
            ) from None
        except AuthError:  # not the caller's, who has shown a key
            raise stranger(info) from None
        except UnavailableError as error:
            failure = error
            continue
        if len(parts) == len(question.seeds):
            return [parts[index] for index in sorted(parts)], info.instance
        failure = UnavailableError(f"{info.instance} stopped in the middle of a text; try again")
    raise failure or UnavailableError(
        "no sampler service answers, and they write; `stillhouse up` starts one, `stillhouse services` shows what runs"
    )


def idle_first(samplers: list[ServiceInfo], model: str) -> list[ServiceInfo]:
    """Samplers in the order in which to ask them: without a job first; then for one model always the same, which has
    it loaded."""
    return sorted(in_turn(samplers, model), key=lambda info: bool(info.job_id))


# -- the answer --------------------------------------------------------------------------------------------------------


def _text(tokenizer: Tokenizer, part: sampler_pb2.GenerateResponse) -> GeneratedText:
    ids = ids_list(part.completion_ids)
    logprob = float(from_tensor(part.rollout_logprobs).astype("float64").sum())
    return GeneratedText(
        index=part.index,
        text=tokenizer.decode(ids, skip_special_tokens=True),
        token_ids=ids,
        num_tokens=len(ids),
        finish_reason=_FINISH[part.finish_reason],
        logprob=logprob if math.isfinite(logprob) else None,
    )
