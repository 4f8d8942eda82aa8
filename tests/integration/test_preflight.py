"""A live pre-flight on real services: what it finds in good jobs, and in those that are really broken."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from redis import Redis
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stillhouse.core.blobs import unsealed
from stillhouse.core.models import inspect_model
from stillhouse.core.schemas import Check, Preflight
from stillhouse.sampler.engines.transformers import TransformersEngine as SamplerEngine
from stillhouse.teacher.engines.base import Scored, ScoreItem, Unscored
from stillhouse.teacher.engines.transformers import TransformersEngine as TeacherEngine
from tests.cluster import Cluster, cluster, job_spec
from tests.tiny import CHAT_TEMPLATE, PAD_ID, TOKENIZER_SIZE, make_tiny_model, make_tokenizer

pytestmark = pytest.mark.asyncio(loop_scope="module")
SETTINGS: dict[str, Any] = {"preflight_prompts": 4, "preflight_tokens": 24, "preflight_wait_s": 20}
ENDING = [*range(100, 164)]
"""Stop tokens, a quarter of all: random models soon write one."""


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that is the student, moved a little."""
    folder = make_tiny_model(tmp_path_factory.mktemp("near") / "near", seed=1)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(5)
    moved = {name: weight + 0.05 * weight.std() * torch.randn_like(weight) for name, weight in weights.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def made(tmp_path_factory: pytest.TempPathFactory, valkey_url: str, near: Path) -> AsyncIterator[Cluster]:
    """One deployment for all tests of this page: pre-flights leave nothing behind."""
    home = tmp_path_factory.mktemp("preflight")
    async with _deployment(home, _database(valkey_url, 1), near, "sampler", "teacher", "trainer") as made:
        yield made


@pytest.fixture
def other_database(valkey_url: str) -> str:
    """For deployments of their own, whose jobs no other trainer takes."""
    return _database(valkey_url, 2)


def _database(url: str, number: int) -> str:
    client = Redis.from_url(own := f"{url.removesuffix('/0')}/{number}")
    client.flushdb()
    client.close()
    return own


@asynccontextmanager
async def _deployment(home: Path, url: str, near: Path, *roles: str, **settings: Any) -> AsyncIterator[Cluster]:
    async with cluster(home, url, *roles, **SETTINGS, **settings) as made:
        made.add_model("student", seed=1)
        made.models.add(inspect_model("teacher", near))
        yield made


def spec(**changes: Any) -> dict[str, Any]:
    sampling = {"max_tokens": 24, "stop_token_ids": ENDING, **changes.pop("sampling", {})}
    loss = {"objective": "policy_gradient"}
    return job_spec(**{"stages__0__sampling": sampling, "stages__0__loss": loss, **changes})


async def look(made: Cluster, job: dict[str, Any]) -> Preflight:
    """The report of a live pre-flight."""
    job_id = await made.submit(job, "preflight")
    record = await made.ended(job_id)
    assert (record.status, record.step) == ("succeeded", 0), record.error
    assert record.result is not None
    report = Preflight.model_validate(record.result["preflight"])
    assert report.is_live
    assert unsealed(made.ctx.artifacts.job(job_id).preflight) == report.model_dump(mode="json")
    return report


def odd(report: Preflight) -> dict[str, str]:
    """Name -> verdict of what is not ok."""
    return {check.name: check.verdict for check in report.checks if check.verdict != "ok"}


def named(report: Preflight, name: str, verdict: str = "") -> Check:
    """The (first) check of that name."""
    return next(check for check in report.checks if check.name == name and check.verdict in (verdict or check.verdict,))


def add_broken(made: Cluster, name: str, spoil: Callable[[Path], None], **options: Any) -> None:
    """Register a tiny model after something was done to its folder."""
    folder = make_tiny_model(made.settings.home / "models" / name, seed=2, **options)
    spoil(folder)
    made.models.add(inspect_model(name, folder))


# -- good jobs -------------------------------------------------------------------------------------------------------


async def test_a_good_job_passes_everything_and_is_counted(made: Cluster) -> None:
    report = await look(made, spec())
    assert report.verdict == "ok", odd(report)
    assert odd(report) == {}
    probed = {"sampler_gap", "temperature", "truncation", "uniform", "repeats", "replicas", "initial_kl", "overlap"}
    assert {check.name for check in report.checks} == probed | {
        *("trainer", "models", "heads", "lineage", "sampling", "memory"),
        *("tokenizers", "ends", "prompts", "verifiers", "chat_template"),
    }
    assert named(report, "sampler_gap").evidence["mean_nats"] < 1e-4
    assert 1e-3 < named(report, "initial_kl").evidence["reverse_kl_nats"] < 1
    assert report.estimate is not None
    sampled = report.estimate.sampled_tokens
    assert sampled.at_most == 4 * 3 * 24
    assert sampled.expected is not None
    assert 12 <= sampled.expected < sampled.at_most
    assert report.estimate.seconds is not None
    assert report.estimate.seconds > 0


async def test_a_real_job_is_looked_at_too_and_keeps_the_report(made: Cluster) -> None:
    job_id = await made.submit(spec(stages__0__schedule={"steps": 1, "prompts_per_step": 2}))
    assert (await made.ended(job_id)).status == "succeeded"
    report = Preflight.model_validate(unsealed(made.ctx.artifacts.job(job_id).preflight))
    assert (report.verdict, report.is_live) == ("ok", False), odd(report)
    assert {"memory", "chat_template", "sampler_gap", "initial_kl"} <= {check.name for check in report.checks}
    kinds = {event["type"] for event in await made.ctx.jobs.events(job_id)}
    assert "preflight.warning" not in kinds


async def test_the_student_as_its_own_teacher_has_no_distance(made: Cluster) -> None:
    report = await look(made, spec(teachers={"main": {"model": "student"}}))
    assert odd(report) == {"initial_kl": "warning"}
    check = named(report, "initial_kl")
    assert abs(check.evidence["reverse_kl_nats"]) < 1e-6
    assert "the teacher is the student itself" in check.fix
    assert named(report, "overlap").evidence["share"] == 1


async def test_what_is_not_there_is_skipped_with_the_reason(tmp_path: Path, other_database: str, near: Path) -> None:
    async with _deployment(tmp_path, other_database, near, "trainer") as made:
        report = await look(made, spec())
        assert report.verdict == "ok"
        skipped = {check.name: check.message for check in report.checks if check.verdict == "skipped"}
        assert skipped.keys() == {
            *("sampler_gap", "temperature", "truncation", "uniform", "repeats", "replicas", "initial_kl", "overlap")
        }
        assert "no sampler answers" in skipped["sampler_gap"]
        assert "no teacher service answers" in skipped["uniform"]


# -- what it catches -------------------------------------------------------------------------------------------------


async def test_an_other_tokenizer(made: Cluster) -> None:
    def spoil(folder: Path) -> None:
        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
        tokenizer.save_pretrained(folder)

    add_broken(made, "other", spoil, vocab_pad=4)
    report = await look(made, spec(teachers={"main": {"model": "other"}}))
    check = named(report, "tokenizers")
    assert check.verdict == "error"
    assert "special token 260 is nothing for 'student' and '<|new|>' for 'other'" in check.message
    assert named(report, "initial_kl").verdict == "skipped"


async def test_the_same_vocabulary_with_other_merges(made: Cluster) -> None:
    for name, merges in (("student2", [("t", "h")]), ("merged", [("h", "e")])):
        add_broken(made, name, lambda folder: None, tokenizer=_with_merges(merges))
    assert made.models.get("student2").tokenizer_sha256 == made.models.get("merged").tokenizer_sha256
    report = await look(made, spec(student={"model": "student2"}, teachers={"main": {"model": "merged"}}))
    check = named(report, "tokenizers")
    assert check.verdict == "error"
    assert "the vocabularies are equal, but 'The quick brown fox doesn't jump" in check.message.replace('"', "'")


def _with_merges(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with two tokens more, of which only those of `merges` are ever made."""
    vocabulary = dict(make_tokenizer().get_vocab()) | {"th": TOKENIZER_SIZE, "he": TOKENIZER_SIZE + 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **special)


async def test_an_other_chat_template(made: Cluster) -> None:
    def spoil(folder: Path) -> None:
        template = folder / "chat_template.jinja"
        template.write_text(template.read_text().replace("assistant\n", "model\n"))

    add_broken(made, "chatty", spoil)
    check = named(await look(made, spec(teachers={"main": {"model": "chatty"}})), "chat_template")
    assert check.verdict == "warning"
    assert "assis" in check.evidence["student"]
    assert "model" in check.evidence["teacher"]
    assert "their chat templates differ" in check.message


async def test_a_missing_end(made: Cluster) -> None:
    def spoil(folder: Path) -> None:
        for name in ("config.json", "generation_config.json"):
            path = folder / name
            path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": None}))

    add_broken(made, "endless", spoil)
    report = await look(made, spec(student={"model": "endless"}))
    check = named(report, "ends")
    assert check.verdict == "error"
    assert "'endless' names no end-of-sequence token" in check.message


async def test_a_padded_head(made: Cluster) -> None:
    made.add_model("padded", seed=2, vocab_pad=12)
    check = named(await look(made, spec(teachers={"main": {"model": "padded"}})), "heads")
    assert check.verdict == "warning"
    assert f"'padded' has {TOKENIZER_SIZE + 12} rows, the student's {TOKENIZER_SIZE}" in check.message
    assert check.evidence["teacher main"]["padding_rows"] == 12


async def test_a_uniform_teacher(made: Cluster) -> None:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = torch.zeros_like(weights["lm_head.weight"])
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    add_broken(made, "flat", spoil, tie=False)
    check = named(await look(made, spec(teachers={"main": {"model": "flat"}})), "uniform")
    assert check.verdict == "error"
    assert check.evidence["mean_logprob"] == pytest.approx(-math.log(TOKENIZER_SIZE), abs=1e-3)
    assert "which is -ln 260: it knows nothing" in check.message


async def test_a_teacher_replica_that_is_not_deterministic(made: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second teacher process whose engine adds noise, as a faulty device does."""
    await made.start("teacher", "teacher-noisy")
    try:
        await _check_noisy(made, monkeypatch)
    finally:
        await made.stop("teacher-noisy")


async def _check_noisy(made: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0)
    honest = TeacherEngine.score
    engines: list[TeacherEngine] = []

    def noisy(self: TeacherEngine, items: Sequence[ScoreItem]) -> list[Scored | Unscored]:
        scored = honest(self, items)
        if self not in engines:
            engines.append(self)
        if engines.index(self) == 0:  # instances are asked in order of their names: teacher-0 first
            return scored
        for each in scored:
            assert isinstance(each, Scored)
            each.teacher_logprobs[:] += noise.normal(0, 0.1, each.teacher_logprobs.shape).astype(np.float32)
        return scored

    monkeypatch.setattr(TeacherEngine, "score", noisy)
    report = await look(made, spec())
    check = named(report, "repeats", "error")
    assert "teacher 'main' in teacher-noisy is not deterministic" in check.message
    assert named(report, "repeats", "ok").evidence["instance"] == "teacher-0"
    check = named(report, "replicas")
    assert check.verdict == "error"
    assert "teacher-noisy (not deterministic, " in check.message
    assert "compared with teacher-0" in check.message
    assert named(report, "initial_kl").verdict == "ok", "measured with the steady one"


async def test_a_sampler_that_ignores_the_temperature(made: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    _ignore_temperature(monkeypatch)
    report = await look(made, spec(sampling={"temperature": 0.7}))
    check = named(report, "temperature")
    assert check.verdict == "error"
    assert "records log-probabilities of temperature 1, the job samples at 0.7" in check.message
    assert check.evidence["left_nats"] < 1e-4
    assert named(report, "sampler_gap").verdict in ("warning", "error")
    monkeypatch.undo()
    assert named(await look(made, spec(sampling={"temperature": 0.7})), "temperature").verdict == "ok"


def _ignore_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = SamplerEngine.generate

    def faulty(self: SamplerEngine, requests: Sequence[Any], *, alone: bool = False) -> Any:
        return honest(self, [replace(request, temperature=1.0) for request in requests], alone=alone)

    monkeypatch.setattr(SamplerEngine, "generate", faulty)


async def test_too_little_memory_in_the_trainer_refuses_the_job(
    tmp_path: Path, other_database: str, near: Path
) -> None:
    async with _deployment(tmp_path, other_database, near, "trainer", trainer_memory_gib=1e-5) as made:
        check = named(await look(made, spec()), "memory")
        assert check.verdict == "error"
        assert check.evidence["needed_bytes"] > check.evidence["available_bytes"] == int(1e-5 * 2**30)
        job_id = await made.submit(spec())
        record = await made.ended(job_id)
        assert record.status == "failed"
        assert record.error is not None
        assert "too little memory" in record.error["message"]
        report = Preflight.model_validate(unsealed(made.ctx.artifacts.job(job_id).preflight))
        assert odd(report) == {"memory": "error"}


async def test_too_little_memory_in_a_teacher_names_both_numbers(
    tmp_path: Path, other_database: str, near: Path
) -> None:
    roles = ("teacher", "trainer")
    async with _deployment(tmp_path, other_database, near, *roles, teacher_memory_gib=1e-5) as made:
        check = named(await look(made, spec()), "memory", "error")
        assert "too little memory in teacher-0: model 'teacher' needs 0.00 GiB" in check.message
        assert check.param == "teachers.main.model"


# -- other suspicions ------------------------------------------------------------------------------------------------


async def test_texts_that_do_not_end_and_a_teacher_from_afar_are_warnings(made: Cluster) -> None:
    made.add_model("far", seed=9)
    job = spec(sampling={"max_tokens": 6, "stop_token_ids": [PAD_ID]}, teachers={"main": {"model": "far"}})
    report = await look(made, job)
    assert odd(report) == {"truncation": "warning", "initial_kl": "warning", "overlap": "warning"}
    assert named(report, "truncation").evidence == {"truncated": 4, "completions": 4, "tokens": 6, "max_tokens": 6}
