"""The built-in verifiers, case by case, and the laws they share."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.metadata import EntryPoint, distributions
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.core.answers import ANSWER_MAX, GYM_NO_JSON, GYM_RUNS_TEXT, last_number, same_number
from stillhouse.core.verifiers import BUILT_IN, VerifierInfo, collect, problem_of, verifiers
from stillhouse.trainer.verify.builtin import LOADERS
from stillhouse.trainer.verify.gym import ARITHMETIC
from stillhouse.trainer.verify.judges import Item, Judges
from stillhouse.trainer.verify.reading import Verifier, final_answer
from tests import acme

RIGHT = {
    "exact": [
        ("Paris", " Paris\n"),
        ("New  York", "New\tYork"),
        ("caf\u00e9", "cafe\u0301"),
        ("42", "<think>is it 41?</think> 42"),
        ("42", "I think <answer>41</answer>, no, <answer> 42 </answer>."),
    ],
    "numeric": [
        ("42", "6 * 7 = 42."),
        ("1000", "1,000 apples"),
        ("1,000,000", "1e6"),
        ("1000", "1{,}000"),
        ("0.5", "1/2"),
        ("1/3", "0.3333333"),
        ("3/4", r"$\frac{3}{4}$"),
        ("-3/4", r"-\dfrac{ 3 }{ 4 }"),
        ("50%", "50 %"),
        ("50", r"about 50\%"),
        ("0.5", "50%"),
        ("50%", "0.5"),
        ("-5", "it is \u22125"),
        ("-5", "-$5.00"),
        ("-5", "$-5"),
        ("5", "10-5"),
        ("5", "10 - 5"),
        ("2", "- 2 apples"),
        ("1234.5", "$1,234.50"),
        ("18", "#### 18"),
        ("72 + 6 = 78\n#### 78", "It costs \u00a378."),
        ("0.1", ".1"),
        ("0", "-0.0"),
        ("7", "<think>8</think>7"),
        ("7", "<answer>7</answer> of 8"),
        ("123456789012345678901", "123456789012345678901"),
    ],
    "regex": [
        ("b+", "abbc"),
        (r"(?i)\bparis\b", "It is PARIS."),
        (r"(?m)^second$", "first\nsecond"),
        (r"</think>\s*yes", "<think>no</think> yes"),
    ],
    "math": [
        ("1/2", r"so $\frac{1}{2}$"),
        ("1/2", r"\boxed{0.5}"),
        (r"\frac{1}{2}", "The answer is 0.5"),
        ("0.5", r"\boxed{\dfrac12}"),
        (r"\{1,2\}", r"\boxed{\{2, 1\}}"),
        (r"$\{1,3\} \cup \{2,4\}$", "${1,2,3,4}$"),
        ("10 cm", r"\boxed{10\text{ cm}}"),
        (r"10\text{ cm}", "it is 10 cm"),
        ("90^\\circ", r"\boxed{90}"),
        ("x^2+2x+1", "$(x+1)^2$"),
        ("2x+1", r"\boxed{1+2x}"),
        (r"\frac{\sqrt{2}}{2}", r"$\frac{1}{\sqrt{2}}$"),
        ("(1,2)", r"\boxed{(1, 2)}"),
        ("[0,1)", r"\boxed{[0, 1)}"),
        ("x=5", r"\boxed{5}"),
        ("5", r"\boxed{x=5}"),
        ("1,000", r"\boxed{1000}"),
        ("50%", r"\boxed{50\%}"),
        (r"3\frac12", r"\boxed{3\frac{1}{2}}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}"),
        ("42", "first 5, then 42"),
        ("42", r"\boxed{41}, no: \boxed{42}"),
        ("2", r"the final answer is $3$, I mean \boxed{2}"),
        ("12", r"<think>\boxed{3}</think> 12"),
        ("A", r"\boxed{A}"),
    ],
}
WRONG = {
    "exact": [("Paris", "paris"), ("Paris", "Paris."), ("42", "It is 42"), ("42", ""), ("", "x")],
    "numeric": [
        ("42", "42 and not 41"),
        ("42", "none"),
        ("5", "-5"),
        ("12345678", "12345679"),
        ("123456789012345678901", "123456789012345678902"),
        ("12.50", "12.51"),
        ("0.5", "5%"),
        ("3", "1e9999"),
        ("3", "1/0"),
        ("1", "<answer></answer> 1"),
    ],
    "regex": [("b{3}", "abbc"), ("^b", "abc"), ("^second$", "first\nsecond")],
    "math": [
        ("42", r"\boxed{41}"),
        ("42", r"\boxed{42} or rather \boxed{41}"),
        ("42", "42 is not it, but 41"),
        ("42", r"$42$, so \boxed{??}"),
        ("42", r"\boxed{42, 41}"),
        ("42", r"\boxed{\{41,42\}}"),
        ("1/2", "none"),
        ("1/3", r"\boxed{0.33}"),
        ("x^2", "$x^3$"),
        ("2x+1", r"\boxed{1}"),
        ("(1,2)", r"\boxed{(2,1)}"),
        ("10 cm", r"\boxed{12 cm}"),
        ("A", r"\boxed{B}"),
        ("42", ""),
    ],
}


@pytest.fixture(scope="module")
def loaded() -> dict[str, Verifier]:
    """All but reasoning_gym, whose guard cannot be taken off again: it is tried in a process of its own below."""
    return {name: loader() for name, loader in LOADERS.items() if name != "reasoning_gym"}


def cases(table: dict[str, list[tuple[str, str]]]) -> list[Any]:
    return [pytest.param(name, *case, id=f"{name}: {case}") for name, rows in table.items() for case in rows]


@pytest.mark.parametrize(("name", "answer", "text"), cases(RIGHT))
def test_right(loaded: dict[str, Verifier], name: str, answer: str, text: str) -> None:
    assert loaded[name](text, answer, {})[0] == 1.0


@pytest.mark.parametrize(("name", "answer", "text"), cases(WRONG))
def test_wrong(loaded: dict[str, Verifier], name: str, answer: str, text: str) -> None:
    reward, note = loaded[name](text, answer, {})
    assert reward == 0.0
    assert note


@pytest.mark.parametrize("name", ["exact", "numeric", "math"])
def test_white_space_and_an_earlier_thought_change_nothing(loaded: dict[str, Verifier], name: str) -> None:
    for table, reward in ((RIGHT, 1.0), (WRONG, 0.0)):
        for answer, text in table[name]:
            for same in (f"\n {text}\t ", f"<think> 77 or $78$ </think>{text}" if text else text):
                assert loaded[name](same, f" {answer}\n", {})[0] == reward, (answer, same)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.fractions())
def test_a_number_is_itself_and_no_other(number: Any) -> None:
    read = last_number(f"So it is {number}.")
    if read is None:  # no float holds it
        assert abs(number) > 1e300
        return
    again = last_number(str(number))
    assert again is not None
    assert same_number(read, again)
    other = last_number(str(2 * number + 1)) if number != -1 else None
    assert other is None or not same_number(read, other)


@given(st.text(min_size=1))
@settings(max_examples=50)
def test_an_answer_is_right_for_itself(text: str) -> None:
    if "<answer>" not in text and "</think>" not in text:
        assert LOADERS["exact"]()(text, text, {})[0] == 1.0


def test_a_student_in_a_loop_is_judged_at_once(loaded: dict[str, Verifier]) -> None:
    """Without a limit math-verify needs 18 s for a quarter of the first."""
    started = time.monotonic()
    for text in ("1 " * 80_000, r"\boxed{7}" + " 1" * 80_000, "$" * 160_000, r"\boxed{" * 20_000):
        assert loaded["math"](text, "42", {})[0] == loaded["numeric"](text, "42", {})[0] == 0.0
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("plain", "plain"),
        ("<think>a</think>b</think>c", "c"),
        ("<answer>a</answer> <answer>b</answer>", "b"),
        ("<answer>a <answer>b</answer>", "b"),
        ("</answer> a", "</answer> a"),
        ("a <answer>b", "a <answer>b"),
        ("<answer>a</answer></think>b", "b"),
    ],
)
def test_where_the_final_answer_stands(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(("name", "answer"), [("numeric", "none"), ("regex", "("), ("math", "$$")])
def test_an_answer_that_cannot_be_used_is_no_wrong_text(loaded: dict[str, Verifier], name: str, answer: str) -> None:
    with pytest.raises(ValueError, match=r"answer"):
        loaded[name]("1", answer, {})


GYM_ENTRY = {"question": "1 + 1 =", "answer": "2", "metadata": {"source_dataset": "chain_sum", "source_index": 0}}


@pytest.mark.parametrize(
    ("name", "answer", "problem"),
    [
        ("exact", "x", ""),
        ("math", "x", ""),
        ("numeric", "#### 18", ""),
        ("regex", r"\d+", ""),
        ("reasoning_gym", json.dumps(GYM_ENTRY), ""),
        ("maths", "x", "unknown verifier 'maths'; there are exact, math, numeric, reasoning_gym, regex"),
        ("exact", None, "verifier 'exact' needs the row's 'answer', which is missing or empty"),
        ("math", " ", "verifier 'math' needs the row's 'answer', which is missing or empty"),
        ("exact", "x" * 300_000, "verifier 'exact': the answer has 300000 characters, at most 262144 are allowed"),
        ("numeric", "none", "verifier 'numeric': there is no number in the answer 'none'"),
        ("regex", "(", "verifier 'regex': the answer is not a regular expression of Python: missing )"),
        ("regex", "(" * 900, "verifier 'regex': the answer is not a regular expression of Python"),
        ("regex", "a" * 1_001, "verifier 'regex': the answer, a regular expression, has 1001 characters"),
        ("reasoning_gym", "2", "verifier 'reasoning_gym': the entry needs 'answer' and 'metadata'"),
        ("reasoning_gym", "[" * 200_000, "verifier 'reasoning_gym': the answer must be an entry"),
        ("reasoning_gym", "{", "verifier 'reasoning_gym': the answer must be an entry"),
    ],
)
def test_rows_that_can_never_be_judged(name: str, answer: str | None, problem: str) -> None:
    found = problem_of(name, answer)
    assert found.startswith(problem)
    assert bool(found) == bool(problem)


def test_answers_to_verifiers_of_other_packages_have_a_limit_too() -> None:
    known = {"acme": VerifierInfo("acme", "Does what the text says.", False, "acme 1.2")}
    assert problem_of("acme", "x" * ANSWER_MAX, known) == ""
    assert "262145 characters, at most 262144" in problem_of("acme", "x" * (ANSWER_MAX + 1), known)


def test_names_and_loaders_agree() -> None:
    assert [info.name for info in BUILT_IN] == list(LOADERS)
    assert list(verifiers())[: len(BUILT_IN)] == list(LOADERS)
    assert all(info.needs_answer and info.about.endswith(".") for info in BUILT_IN)


def test_verifiers_of_other_packages(tmp_path: Path) -> None:
    for folder, name in (("one", "acme-verifiers"), ("two", "other")):
        (tmp_path / folder).mkdir()
        acme.install(tmp_path / folder, name=name)
    group = [p for d in distributions(path=[str(tmp_path / "one")]) for p in d.entry_points]
    alone = collect(group)
    assert alone["acme"].source == "acme-verifiers 1.2"
    assert (alone["acme"].needs_answer, alone["acme"].problem) == (False, "")
    assert alone["exact"] == BUILT_IN[0], "a name of ours stays ours"
    both = collect([*group, *(p for d in distributions(path=[str(tmp_path / "two")]) for p in d.entry_points)])
    assert both["acme"].problem == "both acme-verifiers 1.2 and other 1.2 bring it; uninstall one"
    assert "not of the form" in collect([EntryPoint("a b", "x:y", "g")])["a b"].problem


async def test_reasoning_gym_judges_its_tasks() -> None:
    import reasoning_gym

    names = ("chain_sum", "countdown", "puzzle24", "word_sorting", "prime_factorization", "n_queens")
    entries = {name: reasoning_gym.create_dataset(name, size=1, seed=7)[0] for name in names}
    entries["planted"] = entries["prime_factorization"] | {"answer": "its scorer cannot read this"}
    harmful = "__import__('os').system('true')"
    items = [
        Item("reasoning_gym", text, json.dumps(entry))
        for entry in entries.values()
        for text in (f"<think>17</think> so <answer>{entry['answer']}</answer>", "no idea", harmful, "9**9**9**9")
    ]
    judges = Judges(timeout_s=30, workers=1)
    try:
        verdicts = await judges.judge(items)
    finally:
        await judges.close()
    of = {name: verdicts[4 * index : 4 * index + 4] for index, name in enumerate(entries)}
    assert {v.failure for v in [*of["n_queens"], *of["planted"]]} == {"exception"}
    assert "runs texts as Python code" in of.pop("n_queens")[0].note
    assert "invalid literal" in of.pop("planted")[0].note
    for name, (right, *wrong) in of.items():
        assert (right.reward, right.note) == (1.0, "right"), name
        assert max(verdict.reward for verdict in wrong) < 0.1, name
        assert {verdict.failure for verdict in wrong} == {""}, name


LOOK = """
import json, reasoning_gym
from reasoning_gym.factory import DATASETS
from stillhouse.trainer.verify.gym import CodeGuard

guard = CodeGuard()
found = set()
for name in sorted(set(DATASETS) - {"composite"}):
    entry = json.loads(json.dumps(reasoning_gym.create_dataset(name, size=1, seed=3)[0]))
    score = reasoning_gym.get_score_answer_fn(name)
    for text in (entry["answer"], "[1]", "7", "zz", "[['Q']]", "1+1"):
        try:
            with guard.watch(name):
                score(answer=text, entry=entry)
        except Exception as error:
            if "runs texts as Python code" in str(error):
                found.add(name)
print(chr(10) + json.dumps(sorted(found)))  # a scorer prints, too
"""


@pytest.mark.full
def test_the_list_of_scorers_that_run_text_is_complete() -> None:
    answer = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, check=True, timeout=60)
    assert set(json.loads(answer.stdout.splitlines()[-1])) == GYM_RUNS_TEXT | ARITHMETIC


@pytest.mark.parametrize("name", sorted(GYM_RUNS_TEXT | GYM_NO_JSON))
def test_datasets_that_are_refused(name: str) -> None:
    assert f"'{name}'" in problem_of("reasoning_gym", json.dumps({"answer": "1", "metadata": {"source_dataset": name}}))
