"""Stop strings end a completion at the token that a slow, obvious search finds, for tokenizers of three kinds."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from stillhouse.sampler.stops import INCOMPLETE, MAX_PENDING, StopMatcher
from tests.reading import slow_end
from tests.tiny import make_tokenizer

TEXT = "Observation: 12 apples.\n\nFinal answer: 3€ 😀😀 für Zoë </s>\n```\n"


def byte_level() -> Tokenizer:
    """A token per byte: every character of several bytes straddles tokens."""
    return make_tokenizer().backend_tokenizer


def merged() -> Tokenizer:
    """Byte-level BPE with merges of its own: tokens of several words' letters, and such as end within a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, "p€p€p€ 3\u20ac. a😀b😀"], trainer)
    return tokenizer


def pieces() -> Tokenizer:
    """SentencePiece's manner: spaces are part of tokens, the first one is left out, unknown characters are bytes."""
    words = ["▁", "▁Observation", ":", "▁1", "2", "▁apples", ".", "\n", "Final", "▁answer", "a", "b", "▁a", "s"]
    vocabulary = {
        token: index for index, token in enumerate(["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


TOKENIZERS = {"byte level": byte_level(), "merged": merged(), "pieces": pieces()}


def completions(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Texts, as a model writes them, mixed with arbitrary tokens, as a bad one does."""
    written = st.text(alphabet=sorted(set(TEXT)), max_size=12).map(lambda text: tokenizer.encode(text).ids)
    drawn = st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=8)
    return st.lists(st.one_of(written, drawn), max_size=4).map(
        lambda parts: [token for part in parts for token in part]
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, list[int], list[str]]:
    """(tokenizer, completion, stop strings): some are in the text, since they are cut out of it."""
    name = draw(st.sampled_from(sorted(TOKENIZERS)))
    ids = draw(completions(TOKENIZERS[name]))
    text = TOKENIZERS[name].decode(ids, skip_special_tokens=False)
    start = draw(st.integers(0, len(text)))
    found = text[start : start + draw(st.integers(1, 6))]
    other = draw(st.text(alphabet=sorted(set(TEXT)), min_size=1, max_size=3))
    return name, ids, [stop for stop in (found, other) if stop and INCOMPLETE not in stop]


@given(cases(), st.integers(1, 5))
@example(("merged", merged().encode("p€").ids, ["p"]), 1)
def test_a_completion_ends_where_the_slow_search_says(case: tuple[str, list[int], list[str]], size: int) -> None:
    """However the tokens come: one by one or several at once."""
    name, ids, stops = case
    if not stops:
        return
    matcher, end = StopMatcher(TOKENIZERS[name], stops), None
    for start in range(0, len(ids), size):
        within = matcher.feed(ids[start : start + size])
        if within is not None:
            end = start + within
            break
    assert end == slow_end(TOKENIZERS[name], ids, stops)


@pytest.mark.parametrize("length", [1, MAX_PENDING - 1, MAX_PENDING, MAX_PENDING + 1, 3 * MAX_PENDING + 2])
def test_bytes_that_are_no_text_neither_hide_a_stop_string_nor_pile_up(length: int) -> None:
    tokenizer = TOKENIZERS["byte level"]
    noise = tokenizer.encode("€").ids[:1] * length
    for stop in ("€", "€.", "."):
        ids = [*noise, *tokenizer.encode("€.").ids]
        matcher = StopMatcher(tokenizer, [stop])
        assert matcher.feed(ids) == slow_end(tokenizer, ids, [stop])
        assert len(matcher._pending) <= MAX_PENDING


def test_a_token_that_ends_within_a_character_still_completes_the_text_before_it() -> None:
    """Negative control of the oracle cases: waiting for whole characters would end one token later."""
    tokenizer = TOKENIZERS["merged"]
    ids = next(
        [token, *tokenizer.encode("b").ids]
        for token in range(tokenizer.get_vocab_size())
        if len(text := tokenizer.decode([token])) > 1 and text.endswith(INCOMPLETE) and text[0] != INCOMPLETE
    )
    stop = tokenizer.decode(ids[:1])[:-1].rstrip(INCOMPLETE)
    assert StopMatcher(tokenizer, [stop]).feed(ids) == 1
