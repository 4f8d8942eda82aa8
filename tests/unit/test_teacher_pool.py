"""What a teacher has in memory, remembers and believes: pool, cache, checks of results. Its engines do as told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stillhouse.core.errors import ConflictError, EngineStartError, NotFoundError, OverloadedError, SpecError
from stillhouse.core.models import ModelRegistry, inspect_model
from stillhouse.core.tensors import DTYPE_NAMES
from stillhouse.core.worker import ComputeThread
from stillhouse.teacher.accounts import MAX_JOBS, Accounts
from stillhouse.teacher.ahead import ReadAhead
from stillhouse.teacher.cache import ENTRY_BYTES, ScoreCache
from stillhouse.teacher.engines.base import Scored, ScoreItem, Unscored
from stillhouse.teacher.pool import ModelPool, Resident
from stillhouse.teacher.scoring import Scorer
from stillhouse.v1 import rollout_pb2 as pb
from stillhouse.v1 import weights_pb2
from tests.tiny import make_tiny_model

MIB = 1 << 20


@pytest.fixture
def registry(tmp_path: Path) -> ModelRegistry:
    made = ModelRegistry(tmp_path / "models.yaml")
    for number, name in enumerate("abc"):
        made.add(inspect_model(name, make_tiny_model(tmp_path / name, seed=number)))
    return made


class FakeEngine:
    """Gives what it is told to give, and counts."""

    vocab_size, max_sequence_length, size_bytes = 10, 10, 0

    def __init__(self, path: Path | None = None) -> None:
        if path is not None:
            path.read_bytes()
        self.poison = ""
        self.is_closed = False
        self.change: Callable[[Scored], Scored] = lambda scored: scored
        self.keys: list[str] = []

    def score(self, items: Sequence[ScoreItem]) -> list[Scored | Unscored]:
        if any(item.key == self.poison for item in items):
            raise RuntimeError("boom")
        self.keys += [item.key for item in items]
        return [self.change(right(item)) for item in items]

    def head(self) -> Any:
        return SimpleNamespace(sha256="head")

    def load_weights(self, arrays: Any, dtypes: Any) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.is_closed = True


def right(item: ScoreItem) -> Scored:
    """An answer of the right shapes."""
    tokens = len(item.completion_ids)
    made = Scored(item.key, np.full(tokens, -1.0, np.float32))
    if item.kind == pb.SCORE_KIND_HIDDEN:
        return replace(made, hidden=np.ones((tokens, 4), np.float16))
    if item.kind == pb.SCORE_KIND_TOPK:
        shape = (tokens, item.top_k)
        lists = {"topk_ids": np.ones(shape, np.int32), "topk_logprobs": np.full(shape, -1.0, np.float16)}
        return replace(made, tail_logprobs=np.full(tokens, -np.inf, np.float32), **lists)
    return made


def item(key: str, kind: pb.ScoreKind = pb.SCORE_KIND_SAMPLED, **fields: Any) -> ScoreItem:
    return ScoreItem(key, [4, 5], [6, 7, 8], kind, top_k=2, **fields)


def task(model: str, **fields: Any) -> pb.TeacherTask:
    return pb.TeacherTask(model=model, **fields)


def make_pool(registry: ModelRegistry, num_models: float) -> tuple[ModelPool, list[str]]:
    """A pool with room for so many of the tiny models, and the list of what it loaded."""
    loads: list[str] = []

    def load(entry: Any, dtype: str) -> FakeEngine:
        loads.append(f"{entry.name}:{dtype}")
        return FakeEngine()

    return ModelPool(registry, load, int(num_models * 4 * registry.get("a").num_parameters)), loads


async def make_scorer(registry: ModelRegistry, cache_bytes: int = MIB) -> tuple[Scorer, Resident, FakeEngine]:
    scorer = Scorer(ComputeThread("test"), make_pool(registry, 3)[0], ScoreCache(cache_bytes))
    resident, _ = await scorer.model(task("a"))
    assert isinstance(resident.engine, FakeEngine)
    return scorer, resident, resident.engine


async def scores(scorer: Scorer, resident: Resident, items: list[ScoreItem], **options: Any) -> list[Scored | Unscored]:
    results: dict[int, Scored | Unscored] = {}
    async for batch in scorer.batches(resident, items, budget=64, job_id="job", **options):
        results |= dict(zip(batch.indices, batch.results, strict=True))
    return [results[index] for index in range(len(items))]


def test_the_pool_keeps_what_was_used_last(registry: ModelRegistry) -> None:
    pool, loads = make_pool(registry, 2)
    for name in ("a", "b", "a", "c", "a", "b"):
        pool.get(task(name))
    assert loads == ["a:float32", "b:float32", "c:float32", "b:float32"]
    assert [resident.entry.name for resident in pool.residents()] == ["a", "b"]
    assert {count.model: count.loads for count in pool.loads()} == {"a": 1, "b": 2, "c": 1}


def test_models_at_work_leave_last(registry: ModelRegistry) -> None:
    pool, _ = make_pool(registry, 2)
    first, second = (pool.get(task(name))[0] for name in "ab")
    size = pool.stream("s", task("c")).size_bytes
    assert pool.fits(size, {first.key})
    assert not pool.fits(size, {first.key, second.key})
    pool.get(task("c"), keep={first.key})
    assert [one.engine.is_closed for one in (first, second)] == [False, True]  # type: ignore[attr-defined]
    assert [resident.entry.name for resident in pool.residents()] == ["a", "c"]


def test_the_pool_refuses_what_it_must(registry: ModelRegistry) -> None:
    pool, loads = make_pool(registry, 0.9)
    with pytest.raises(OverloadedError, match="TEACHER_MEMORY_GIB"):
        pool.get(task("a"))
    with pytest.raises(NotFoundError):
        pool.get(task("nobody"))
    with pytest.raises(ConflictError):
        pool.get(task("a", model_sha256="0" * 64))
    assert not loads


def test_the_pool_refuses_changed_files(registry: ModelRegistry) -> None:
    pool, loads = make_pool(registry, 3)
    with (Path(registry.get("b").path) / "model.safetensors").open("ab") as stream:
        stream.write(b"x")
    ahead = ReadAhead(pool)
    ahead.start(task("b"), pool.stream("s", task("b")).model)  # finds it first, and leaves it to the load to say so
    ahead.join(10)
    with pytest.raises(SpecError, match="changed since it was registered"):
        pool.get(task("b", dtype=DTYPE_NAMES["float32"]))
    assert not loads


def test_files_that_cannot_be_read_are_no_trouble_of_the_queue(registry: ModelRegistry) -> None:
    pool = ModelPool(registry, lambda entry, _: FakeEngine(Path(entry.path) / "config.json"), 1 << 30)
    pool.read_ahead(task("a"))
    (Path(registry.get("a").path) / "config.json").unlink()
    with pytest.raises(EngineStartError, match=r"'a' cannot be read from .*config\.json"):
        pool.get(task("a"))
    pool.get(task("b"))


def test_files_are_verified_once_and_ahead(registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, _ = make_pool(registry, 1)
    verified: list[str] = []
    monkeypatch.setattr("stillhouse.teacher.pool.verify_files", lambda entry: verified.append(entry.name))
    ahead = ReadAhead(pool)
    for _ in range(2):
        ahead.start(task("b"), pool.stream("s", task("b")).model)
        ahead.join(10)
    assert verified == ["b"]
    pool.get(task("b"))
    assert verified == ["b"], "the load found it done"


async def test_a_poisonous_sample_fails_alone(registry: ModelRegistry) -> None:
    scorer, resident, engine = await make_scorer(registry)
    engine.poison = "2"
    results = await scores(scorer, resident, [item(str(number)) for number in range(4)])
    assert [type(result).__name__ for result in results] == ["Scored", "Scored", "Unscored", "Scored"]
    assert isinstance(results[2], Unscored)
    assert results[2].reason == "teacher_error"
    assert scorer.scored_tokens == 9


BROKEN: dict[str, tuple[pb.ScoreKind, Callable[[Scored], Scored], str]] = {
    "nan": (pb.SCORE_KIND_SAMPLED, lambda s: replace(s, teacher_logprobs=s.teacher_logprobs * np.nan), "non_finite"),
    "inf": (pb.SCORE_KIND_SAMPLED, lambda s: replace(s, teacher_logprobs=s.teacher_logprobs * -np.inf), "non_finite"),
    "short": (pb.SCORE_KIND_SAMPLED, lambda s: replace(s, teacher_logprobs=s.teacher_logprobs[1:]), "wrong_length"),
    "hidden lost": (pb.SCORE_KIND_HIDDEN, lambda s: replace(s, hidden=None), "wrong_length"),
    "hidden short": (pb.SCORE_KIND_HIDDEN, lambda s: replace(s, hidden=s.hidden[:2]), "wrong_length"),  # type: ignore[index]
    "hidden inf": (pb.SCORE_KIND_HIDDEN, lambda s: replace(s, hidden=s.hidden * -np.inf), "non_finite"),  # type: ignore[operator]
    "other k": (pb.SCORE_KIND_TOPK, lambda s: replace(s, topk_ids=s.topk_ids[:, :1]), "wrong_length"),  # type: ignore[index]
    "tail nan": (pb.SCORE_KIND_TOPK, lambda s: replace(s, tail_logprobs=s.tail_logprobs * np.nan), "non_finite"),  # type: ignore[operator]
    "other key": (pb.SCORE_KIND_SAMPLED, lambda s: replace(s, key="x"), "teacher_error"),
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_wrong_answer_of_an_engine_is_a_failure_with_a_reason(registry: ModelRegistry, name: str) -> None:
    kind, change, reason = BROKEN[name]
    scorer, resident, engine = await make_scorer(registry)
    wanted = [item(str(number), kind) for number in range(3)]
    assert all(isinstance(result, Scored) for result in await scores(scorer, resident, wanted, is_exact=True))
    engine.change = lambda scored: change(scored) if scored.key == "1" else scored
    results = await scores(scorer, resident, wanted, is_exact=True)
    assert [getattr(result, "reason", "scored") for result in results] == ["scored", reason, "scored"]


async def test_an_answer_too_few_is_nobodys(registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, resident, engine = await make_scorer(registry)
    monkeypatch.setattr(engine, "score", lambda items: [right(one) for one in items][:1])
    results = await scores(scorer, resident, [item("0"), item("1")])
    assert [type(result).__name__ for result in results] == ["Scored", "Scored"], "alone, each has its own"
    monkeypatch.setattr(engine, "score", lambda _: [])
    results = await scores(scorer, resident, [item("2", temperature=0.5)])
    assert isinstance(results[0], Unscored)
    assert "asked for 1" in results[0].message


async def test_a_sample_that_comes_again_costs_nothing(registry: ModelRegistry) -> None:
    scorer, resident, engine = await make_scorer(registry)
    wanted = item("1", pb.SCORE_KIND_HIDDEN)
    (first,) = await scores(scorer, resident, [wanted])
    (again,) = await scores(scorer, resident, [replace(wanted, key="other")])
    assert isinstance(first, Scored)
    assert isinstance(again, Scored)
    assert again.key == "other"
    assert again.hidden is first.hidden
    assert (engine.keys, scorer.cache.hits) == (["1"], 1)
    (account,) = scorer.accounts.messages()[-1:]
    assert (account.job_id, account.scored_tokens, account.cached_tokens) == ("job", 3, 3)


async def test_whatever_changes_the_score_is_another_key(registry: ModelRegistry) -> None:
    scorer, resident, engine = await make_scorer(registry)
    base = item("base", pb.SCORE_KIND_TOPK)
    others = [
        replace(base, key="prompt", prompt_ids=[4, 9]),
        replace(base, key="split", prompt_ids=[4], completion_ids=[5, 6, 7, 8]),
        replace(base, key="tokens", completion_ids=[6, 7, 9]),
        replace(base, key="kind", kind=pb.SCORE_KIND_SAMPLED),
        replace(base, key="k", top_k=3),
        replace(base, key="temperature", temperature=0.5),
        replace(base, key="half", half=False),
    ]
    await scores(scorer, resident, [base])
    await scores(scorer, resident, others)
    assert sorted(engine.keys) == sorted(["base", *(other.key for other in others)])
    other, _ = await scorer.model(task("b"))
    await scores(scorer, other, [base])
    for one in (resident, other):  # the same tensors, registered with another configuration
        one.weights = weights_pb2.WeightsRef(sha256="average")
        await scores(scorer, one, [base])
    assert scorer.cache.hits == 0


async def test_exact_scores_neither_come_from_the_cache_nor_go_there(registry: ModelRegistry) -> None:
    scorer, resident, engine = await make_scorer(registry)
    for is_exact in (True, False, True):
        await scores(scorer, resident, [item("1")], is_exact=is_exact)
    assert engine.keys == ["1"] * 3


def test_the_cache_keeps_to_its_budget() -> None:
    size = ENTRY_BYTES + 4 * 25
    cache = ScoreCache(10 * size)
    made = [replace(item(str(number)), completion_ids=[number] * 25) for number in range(20)]
    for number, one in enumerate(made, start=1):
        cache.keep(("m", "float32"), one, right(one))
        assert cache.size_bytes == min(number, 10) * size
        assert cache.find(("m", "float32"), made[0]), "what is used stays"
    assert [bool(cache.find(("m", "float32"), one)) for one in made] == [True] + [False] * 10 + [True] * 9
    large = replace(item("large"), completion_ids=[1] * (size // 4))
    cache.keep(("m", "float32"), large, right(large))
    assert cache.find(("m", "float32"), large) is None, "more than an eighth of the cache"
    off = ScoreCache(0)
    off.keep(("m", "float32"), made[0], right(made[0]))
    assert off.find(("m", "float32"), made[0]) is None


def test_accounts_forget_the_oldest_job() -> None:
    accounts = Accounts()
    for number in range(MAX_JOBS + 1):
        accounts.scored(f"job-{number}", 1, 0.5)
        accounts.loaded("job-1", 0.1)
    assert len(accounts.messages()) == MAX_JOBS
    assert "job-0" not in {account.job_id for account in accounts.messages()}
    assert accounts.messages()[-1].model_loads > MAX_JOBS / 2
