"""The toy world of the examples: tasks, tokenizer, models, prompts, and what run.py makes of a job file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.core.models import inspect_model
from stillhouse.core.spec import Row
from tests.examples import EXAMPLES, neighbours

NAMES = sorted(path.parent.name for path in EXAMPLES.glob("*/prepare.py"))
MODULES = ("run", "toys", "toys.tasks", "toys.models", "toys.report")


@pytest.fixture(scope="module")
def toys() -> Iterator[dict[str, Any]]:
    """Modules of examples/ by name, as run.py finds them."""
    with neighbours(EXAMPLES, MODULES) as modules:
        yield modules


@pytest.fixture(scope="module")
def base(toys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that has learned next to nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toys["toys.models"], "BASE_STEPS", (8, 8))
        return toys["toys.models"].base(tmp_path_factory.mktemp("toys") / "base")


ANSWERS = {
    "copy": "hbdaf",
    "digits": "71305",
    "ends": "hf",
    "left": "bdafh",
    "next": "icebg",
    "odd": "hdf",
    "reverse": "fadbh",
    "sort": "abdfh",
    "twice": "hhbbddaaff",
    "upper": "HBDAF",
}


def test_answers_are_right(toys: dict[str, Any]) -> None:
    tasks = toys["toys.tasks"]
    assert {task: tasks.row(task, "hbdaf")["answer"] for task in tasks.TASKS} == ANSWERS
    assert tasks.row("next", "jabcd")["answer"] == "abcde"  # after j comes a


def test_rows_are_rows_of_jobs_and_held_out_words_stay_out(toys: dict[str, Any]) -> None:
    tasks = toys["toys.tasks"]
    trained = [row for task in tasks.TASKS for row in tasks.rows(task, 300, seed=1)]
    trained += tasks.careless_rows(1_000, 1, care=0.3)
    held_out = [row for task in tasks.TASKS for row in tasks.rows(task, 100, seed=1, held_out=True)]
    words = [{row["prompt"].partition(": ")[2] for row in rows} for rows in (trained, held_out)]
    assert words[0].isdisjoint(words[1])
    assert len({row["prompt"] for row in held_out}) == len(held_out) == 1_000
    for row in (*trained[::100], *held_out[::100]):
        Row.model_validate(row)
    assert tasks.rows("sort", 5, seed=1) == tasks.rows("sort", 5, seed=1) != tasks.rows("sort", 5, seed=2)


def test_careless_rows_are_right_as_often_as_asked(toys: dict[str, Any]) -> None:
    rows = toys["toys.tasks"].careless_rows(2_000, 0, care=0.3)
    right = sum(row["completion"] == row["answer"] for row in rows) / len(rows)
    assert right == pytest.approx(0.3, abs=0.05)  # five standard deviations
    assert all(row["completion"] == row["answer"] for row in toys["toys.tasks"].careless_rows(100, 0, care=1.0))


@given(text=st.text())
@settings(max_examples=50)
def test_texts_come_back_from_their_tokens(toys: dict[str, Any], text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    tokenizer = tokenizer_of(toys)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    if text.isascii() and "<" not in text:
        assert len(ids) == len(text)


def tokenizer_of(toys: dict[str, Any]) -> Any:
    if "tokenizer" not in toys:
        toys["tokenizer"] = toys["toys.models"].make_tokenizer()
    return toys["tokenizer"]


def test_the_template_reads_systems_and_thoughts(toys: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(toys)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "copy: abcde"}]

    def read(**arguments: Any) -> str:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **arguments)

    asked = "<|system|>Be brief.<|end|><|user|>copy: abcde<|end|><|assistant|>"
    assert read() == read(enable_thinking=True) == asked
    assert read(enable_thinking=False) == f"{asked}<think></think>"
    thought = tokenizer("<think>ab</think>", split_special_tokens=True)["input_ids"]
    assert len(thought) == 4  # one token each, also in a text that is nobody's template
    assert tokenizer.decode(thought, skip_special_tokens=True) == "<think>ab</think>"  # verifiers see it


def test_models_are_what_stillhouse_takes(toys: dict[str, Any], base: Path) -> None:
    entry = inspect_model("base", base)
    assert entry.has_chat_template
    assert entry.vocab_size == entry.tokenizer_size
    assert 200_000 < entry.num_parameters < 1_000_000


def test_an_expert_learns_its_rows(toys: dict[str, Any], base: Path, tmp_path: Path) -> None:
    """Ten rows by heart; and what exists is not trained again."""
    models, tasks = toys["toys.models"], toys["toys.tasks"]
    rows = tasks.rows("sort", 10, seed=0)
    assert sum(models.accuracy(base, rows)) < 3
    learned = models.train(base, tmp_path / "learned", rows, steps=150, lr=3e-3)
    assert sum(models.accuracy(learned, rows)) > 7
    assert models.train(base, tmp_path / "learned", [], steps=150) == learned
    assert [path.name for path in tmp_path.iterdir()] == ["learned"]


@pytest.mark.parametrize("name", NAMES)
def test_committed_prompts_are_what_prepare_writes(toys: dict[str, Any], name: str, tmp_path: Path) -> None:
    example = toys["run"].Example.load(name)
    example.prepare.write_data(tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written
    assert written == {path.name: path.read_bytes() for path in example.folder.glob("*.jsonl")}


def test_a_shortened_job_is_smaller_and_a_job_before_gets_its_id(toys: dict[str, Any]) -> None:
    run = toys["run"]
    document = {
        "init_from": "job_placeholder",
        "teachers": {"a": {"model": "job_placeholder/ckpt_second"}, "b": {"model": "base"}},
        "stages": [{"schedule": {"steps": 100, "prompts_per_step": 4}, "optimizer": {"warmup_steps": 9}}],
        "evaluation": {"num_prompts": 100, "every_steps": 10},
    }
    stages = [{"name": name, "schedule": {"steps": 3}} for name in ("first", "second", "third")]
    before = [{"job": {"id": "job_1", "spec": {"stages": stages}}}]

    class Jobs:
        def checkpoints(self, job_id: str) -> list[dict[str, Any]]:
            assert job_id == "job_1"
            return [{"id": f"ckpt_{step}", "step": step} for step in (2, 3, 6, 9)]

    class Client:
        jobs = Jobs()

    filled = run.fill(document, Client(), before)
    assert filled["init_from"] == "job_1"
    assert filled["teachers"] == {"a": {"model": "job_1/ckpt_6"}, "b": {"model": "base"}}
    run.shorten(filled, {"steps": 8, "prompts_per_step": 16, "num_prompts": 40})
    assert filled["stages"][0] == {"schedule": {"steps": 8, "prompts_per_step": 4}, "optimizer": {"warmup_steps": 1}}
    assert filled["evaluation"] == {"num_prompts": 40, "every_steps": 0, "show": 0}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/results.json")), ids=lambda path: path.parent.name)
def test_committed_results_are_of_full_runs_that_kept_their_promises(path: Path) -> None:
    results = json.loads(path.read_text())
    assert results["command"] == f"python examples/run.py {path.parent.name}"
    assert results["complaints"] == []
    assert (path.parent / "curves.png").read_bytes().startswith(b"\x89PNG")
