"""What a student wrote, in the teacher's tokens: spans are exact, complete and as short as possible, whatever the text.

The oracle knows no tables: it lets the tokenizers decode themselves, prefix by prefix, and compares strings.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from stillhouse.core.errors import SpecError
from stillhouse.core.models import inspect_model
from stillhouse.core.spelling import PROBE, Spelling, spelling_of
from stillhouse.teacher.engines.base import Spans
from stillhouse.teacher.spans import retokenize
from tests.spellings import END_ID, OTHER_TEXTS, TEXTS, byte_level, sentencepiece
from tests.tiny import make_tiny_model

KINDS = ("bytes", "other bytes", "nfc", "pieces", "pieces with prefix")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    made = [
        byte_level(folder / "bytes.json"),
        byte_level(folder / "other.json", OTHER_TEXTS, 330),
        byte_level(folder / "nfc.json", OTHER_TEXTS, 350, nfc=True),
        sentencepiece(folder / "pieces.json", prefix=False),
        sentencepiece(folder / "prefix.json", OTHER_TEXTS),
    ]
    return dict(zip(KINDS, made, strict=True))


@pytest.fixture(scope="module")
def spellings(paths: dict[str, Path]) -> dict[str, Spelling]:
    return {kind: Spelling(path) for kind, path in paths.items()}


words = st.sampled_from(
    [w for text in (*TEXTS, *OTHER_TEXTS) for w in text.split(" ")] + ["  ", "\n", "<|end|>", "e\u0301"]
)
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.lists(words, max_size=8).map(" ".join),
    st.text("aehrt \n\u0301é😀", max_size=20),
)
pairs = st.sampled_from(list(itertools.product(KINDS, KINDS)))


def spelled(spelling: Spelling, ids: list[int]) -> bytes:
    return b"".join(spelling.spell(ids))


def pieces(spelling: Spelling, ids: list[int], ends: list[int]) -> list[bytes]:
    """Bytes of each span."""
    parts = spelling.spell(ids)
    return [b"".join(parts[start:end]) for start, end in itertools.pairwise([0, *ends])]


@settings(deadline=None, max_examples=80)
@given(texts, st.sampled_from(KINDS))
def test_tokens_spell_what_the_tokenizer_decodes(
    spellings: dict[str, Spelling], paths: Any, text: str, kind: str
) -> None:
    ids = spellings[kind].write(text)
    decoded = Tokenizer.from_file(str(paths[kind])).decode(ids, skip_special_tokens=False)
    assert spelled(spellings[kind], ids).decode() == decoded
    if kind != "nfc":
        assert decoded == text or kind == "pieces with prefix"


@settings(deadline=None, max_examples=120)
@given(texts, pairs)
def test_spans_are_exact_complete_and_as_short_as_possible(
    spellings: dict[str, Spelling], text: str, pair: tuple[str, str]
) -> None:
    student, teacher = (spellings[kind] for kind in pair)
    text = spelled(student, student.write(text)).decode()  # as the student can write it
    ids = [*student.write(text), END_ID]
    teacher_ids, spans = retokenize(ids, student, teacher, end_token_id=7, is_cut=False)
    assert teacher_ids == [*teacher.write(text), 7]
    assert (spans.student_ends[-1], spans.teacher_ends[-1]) == (len(ids), len(teacher_ids)), "nothing is left out"
    for ends in (spans.student_ends, spans.teacher_ends):
        assert ends == sorted(set(ends))
        assert ends[0] > 0
    assert all(spans.is_canonical)
    mine = pieces(student, ids[:-1], spans.student_ends[:-1])
    theirs = pieces(teacher, teacher_ids[:-1], spans.teacher_ends[:-1])
    rewritten = spelled(teacher, teacher_ids[:-1]) != text.encode()
    if not rewritten:
        assert mine == theirs
        assert list(zip(*spans[:2], strict=True)) == shortest(student, teacher, ids, teacher_ids)
    else:
        assert pair[1] in ("nfc", "pieces with prefix"), "only these rewrite texts"
        assert sum(a != b for a, b in zip(mine, theirs, strict=True)) <= 1, "what is rewritten is one span"


def shortest(student: Spelling, teacher: Spelling, ids: list[int], teacher_ids: list[int]) -> list[tuple[int, int]]:
    """By brute force: every pair of prefixes that spell the same; of several the longest."""
    found: dict[bytes, tuple[int, int]] = {}
    for i in range(len(ids)):
        for j in range(len(teacher_ids)):
            prefix = spelled(student, ids[:i])
            if prefix and prefix == spelled(teacher, teacher_ids[:j]):
                found[prefix] = (i, j)
    return [*sorted(found.values()), (len(ids), len(teacher_ids))]


@settings(deadline=None, max_examples=80)
@given(texts, st.sampled_from(KINDS), st.sets(st.integers(0, 40), max_size=3))
def test_spans_that_the_students_tokenizer_writes_otherwise_are_marked(
    spellings: dict[str, Spelling], text: str, kind: str, places: set[int]
) -> None:
    """Some tokens are taken apart into bytes: exactly the spans with such a token are not canonical."""
    student, teacher = spellings["bytes"], spellings[kind]
    byte = {bytes(piece): number for number, piece in student._bytes.items() if len(piece) == 1}
    ids: list[int] = []
    broken: list[bool] = []
    for place, number in enumerate(student.write(text)):
        piece = student.spell([number])[0]
        is_broken = place in places and len(piece) > 1
        ids += [byte[piece[i : i + 1]] for i in range(len(piece))] if is_broken else [number]
        broken += [is_broken] * (len(piece) if is_broken else 1)
    _, spans = retokenize(ids, student, teacher, end_token_id=None, is_cut=False)
    bounds = itertools.pairwise([0, *spans.student_ends])
    assert spans.is_canonical == [not any(broken[start:end]) for start, end in bounds]


def test_of_the_last_word_of_a_cut_text_nobody_knows_how_it_is_written(spellings: dict[str, Spelling]) -> None:
    student = spellings["bytes"]
    broken = [student.write(letter)[0] for letter in "the fox the"]
    for is_cut, expected in ((False, False), (True, True)):
        _, spans = retokenize(broken, student, spellings["pieces"], end_token_id=None, is_cut=is_cut)
        last = spans.student_ends.index(10 if is_cut else 11) if is_cut else -1
        assert spans.is_canonical[last] == expected
        assert not spans.is_canonical[0]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 450), min_size=1, max_size=24), pairs, st.booleans())
def test_any_tokens_at_all_can_be_read(
    spellings: dict[str, Spelling], ids: list[int], pair: tuple[str, str], is_cut: bool
) -> None:
    """Tokens as a bad student strings them together: special ones, halves of characters, no UTF-8."""
    student, teacher = (spellings[kind] for kind in pair)
    raw = spelled(student, ids)
    text = raw.decode(errors="replace")
    teacher_ids, spans = retokenize(ids, student, teacher, end_token_id=None, is_cut=is_cut)
    if is_cut:
        # decoding bit by bit holds back what may still become a character
        text = _incremental(raw)
    assert teacher_ids == teacher.write(text)
    mine = _texts_of_prefixes(student, ids)
    theirs = [spelled(teacher, teacher_ids[:j]).decode(errors="replace") for j in range(len(teacher_ids) + 1)]
    for i, j in zip(*spans[:2], strict=True):
        if spelled(teacher, teacher_ids) == text.encode() and "\ufffd" not in theirs[j]:
            assert mine[i] == theirs[j]
    if text and not is_cut:
        assert spans.student_ends[-1] == len(ids)


def _incremental(raw: bytes) -> str:
    import codecs

    return codecs.getincrementaldecoder("utf-8")("replace").decode(raw)


def _texts_of_prefixes(spelling: Spelling, ids: list[int]) -> list[str]:
    return [spelled(spelling, ids[:i]).decode(errors="replace") for i in range(len(ids) + 1)]


def test_a_cut_completion_loses_half_a_character_and_its_last_span(spellings: dict[str, Spelling]) -> None:
    student, teacher = spellings["bytes"], spellings["other bytes"]
    whole = student.write("the fox 😀")
    while spelled(student, whole[:-1]).endswith("😀".encode()[:1]) is False and len(student.spell(whole)[-1]) > 1:
        whole = whole[:-1]
    ids = [*student.write("the fox "), *(student.write("😀")[:1])]
    teacher_ids, spans = retokenize(ids, student, teacher, end_token_id=None, is_cut=True)
    full, all_spans = retokenize(student.write("the fox "), student, teacher, end_token_id=None, is_cut=False)
    assert teacher_ids == full
    assert list(zip(*spans[:2], strict=True)) == list(zip(*all_spans[:2], strict=True))[:-1]


def test_no_span_ends_inside_of_bytes_that_are_no_character(spellings: dict[str, Spelling]) -> None:
    """Two bytes that begin a character and do not end it are one U+FFFD, which the teacher may write in three bytes."""
    student, teacher = spellings["bytes"], spellings["pieces"]
    byte = {bytes(piece): number for number, piece in student._bytes.items()}
    ids = [byte[b"\xf0"], byte[b"\x9f"], byte[b"z"]]
    teacher_ids, spans = retokenize(ids, student, teacher, end_token_id=None, is_cut=False)
    assert [teacher.spell([number])[0] for number in teacher_ids] == [b"\xef", b"\xbf", b"\xbd", b"z"]
    assert (spans.student_ends, spans.teacher_ends) == ([2, 3], [3, 4])
    assert spans.is_canonical == [False, True]


def test_what_the_teachers_tokenizer_rewrites_is_one_span_among_others(spellings: dict[str, Spelling]) -> None:
    student, teacher = spellings["bytes"], spellings["nfc"]
    ids = student.write("the e\u0301 the fox")
    teacher_ids, spans = retokenize(ids, student, teacher, end_token_id=None, is_cut=False)
    mine, theirs = pieces(student, ids, spans.student_ends), pieces(teacher, teacher_ids, spans.teacher_ends)
    assert b"".join(theirs).decode() == "the é the fox"
    assert [a == b for a, b in zip(mine, theirs, strict=True)].count(False) == 1
    assert mine[-1] == theirs[-1] != b"".join(mine), "spans begin again behind it"


def test_a_text_may_begin_without_the_blank_of_sentencepiece(spellings: dict[str, Spelling]) -> None:
    """Behind a line end of the prompt a word has none, at the beginning of a text it has; both are as usual."""
    student = spellings["pieces with prefix"]
    (letter,) = student.write("xt")[2:] or student.write("xt")[1:]
    assert student.write("t then")[0] != letter
    for ids in (student.write("t then"), [letter, *student.write("t then")[1:]]):
        _, spans = retokenize(ids, student, spellings["bytes"], end_token_id=None, is_cut=False)
        assert spans.is_canonical[0]


def test_the_end_is_the_teachers_end(spellings: dict[str, Spelling]) -> None:
    teacher_ids, spans = retokenize([END_ID], spellings["bytes"], spellings["pieces"], end_token_id=1, is_cut=False)
    assert (teacher_ids, spans) == ([1], Spans([1], [1], [True]))


def test_an_added_token_is_one_in_both_if_both_have_it(spellings: dict[str, Spelling]) -> None:
    student, teacher = spellings["bytes"], spellings["other bytes"]
    ids = student.write("<think>the")
    assert ids[0] == max(ids), "it is one token"
    teacher_ids, spans = retokenize(ids, student, teacher, end_token_id=None, is_cut=False)
    assert (spans.student_ends[0], spans.teacher_ends[0]) == (1, 1)
    pieces_ids, spans = retokenize(ids, student, spellings["pieces"], end_token_id=None, is_cut=False)
    assert spans.student_ends[0] == 1
    assert spans.teacher_ends[0] > 1, "spelled out where it is none"
    assert teacher_ids[0] != pieces_ids[0]


def test_special_tokens_in_a_text_are_never_special_to_the_teacher(spellings: dict[str, Spelling]) -> None:
    ids = [*spellings["bytes"].write("a"), END_ID, *spellings["bytes"].write("b")]
    for kind in KINDS:
        teacher_ids, _ = retokenize(ids, spellings["bytes"], spellings[kind], end_token_id=None, is_cut=False)
        assert not spellings[kind].special_ids & set(teacher_ids)
        assert spelled(spellings[kind], teacher_ids) == b"a<|end|>b"


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_that_write_ordinary_text_as_it_is_are_told_from_those_that_do_not(
    spellings: dict[str, Spelling], paths: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    assert spellings[kind].rewrites() == ""
    from tokenizers import normalizers

    lowering = Tokenizer.from_file(str(paths[kind]))
    before = [lowering.normalizer] if lowering.normalizer else []
    lowering.normalizer = normalizers.Sequence([*before, normalizers.Lowercase()])
    lowering.save(str(tmp_path / "lower.json"))
    assert f"as {PROBE.lower()!r}" in Spelling(tmp_path / "lower.json").rewrites()


def test_a_tokenizer_whose_tokens_are_no_pieces_of_text_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(SpecError, match="WordPiece"):
        Spelling(tmp_path / "tokenizer.json")


def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(SpecError, match="can read"):
        Spelling(path)
    path.write_text("{}")
    with pytest.raises(SpecError, match="can read"):
        Spelling(path)
    entry = inspect_model("m", make_tiny_model(tmp_path / "m"))
    (tmp_path / "m" / "tokenizer.json").unlink()
    with pytest.raises(SpecError, match=r"No such file.*models add m"):
        spelling_of(entry)
