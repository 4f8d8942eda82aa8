"""`stillhouse samples`: texts that a job trained on, token by token, by how much student and teacher disagree.

A token's difference is log p - log q in nats, p the student's probability as it drew the token, q the teacher's: above
0 the student liked it better and learns to write it less, below 0 the teacher did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from stillhouse.cli.console import console, number, print_json_line, print_table, printable, say
from stillhouse.client.client import Client
from stillhouse.core.schemas import Sample, SampleToken, TokenChoice

if TYPE_CHECKING:
    from rich.text import Text

SCALE: Final = (
    (3.0, "white on #b2182b", "> 3"),
    (1.0, "black on #ef8a62", "> 1"),
    (0.3, "black on #fddbc7", "> 0.3"),
    (-0.3, "", "0"),
    (-1.0, "black on #d1e5f0", "< -0.3"),
    (-3.0, "black on #67a9cf", "< -1"),
    (-math.inf, "white on #2166ac", "< -3"),
)
"""(lowest difference in nats, style, words): ColorBrewer's red-blue, which people with weak red-green vision tell apart
too. A factor of e in probability is 1 nat."""
MARKED_NATS: Final = 1.0
"""Without colours, tokens from here on stand in brackets with their difference."""
PROMPT_SHOWN: Final = 400
"""Characters of the end of a prompt."""
CHOICES: Final = 3
"""Alternatives of a token that are named."""


def show(job_id: str, *, step: int | None, teacher: str, limit: int, top: int, as_json: bool) -> None:
    """Print samples, newest step first."""
    with Client() as client:
        found = client.jobs.samples(job_id, step=step, teacher=teacher, top=max(top, CHOICES), limit=limit)
    if as_json:
        for sample in found:
            print_json_line(sample)
        return
    if not found:
        say(f"{job_id} has no such sample" if step or teacher else f"{job_id} has trained on nothing yet")
        return
    terminal = console()
    has_colours = terminal.is_terminal and terminal.color_system is not None and not terminal.no_color
    terminal.print(legend(has_colours))
    for sample in found:
        say("")
        terminal.print(_head(sample), soft_wrap=True)
        terminal.print(_prompt(sample), soft_wrap=True)
        terminal.print(text_of(sample, has_colours), soft_wrap=True)
        if disputed := _most_disputed(sample.tokens, top):
            columns = (">at", "token", ">student", ">teacher", ">difference", "the teacher's likeliest")
            print_table(columns, [_row(place, token) for place, token in disputed])


def legend(has_colours: bool) -> Text:
    """What the colours mean."""
    from rich.text import Text

    if not has_colours:
        return Text(f"[token +2.1] = log p(student) - log q(teacher) in nats, where it is {MARKED_NATS:g} and more")
    line = Text("the student likes it more ")
    for _, style, words in SCALE:
        line.append(f" {words} ", style)
    return line.append(" the teacher does;  log p - log q, nats")


def _head(sample: Sample) -> Text:
    from rich.text import Text

    facts = [f"sample {sample.id}", f"step {sample.step}", f"stage {sample.stage}" if sample.stage else ""]
    facts += [f"teacher {sample.teacher}" if sample.teacher else "", f"{sample.num_tokens} tokens"]
    facts += [f"{number(sample.kl, 3)} nats/token" if sample.kl is not None else ""]
    facts += [f"reward {number(sample.reward, 3)}" if sample.reward is not None else ""]
    facts += ["cut off at max_tokens" if sample.finish_reason == "length" else ""]
    facts += [f"written by: {sample.origin}" if sample.origin != "student" else ""]
    return Text("  ".join(filter(None, facts)), "bold")


def _prompt(sample: Sample) -> Text:
    from rich.text import Text

    text = sample.prompt
    shown = text if len(text) <= PROMPT_SHOWN else f"... {text[-PROMPT_SHOWN:]}"
    return Text(printable(shown).rstrip("\n"), "dim")


def text_of(sample: Sample, has_colours: bool) -> Text:
    """The completion, disputed tokens marked."""
    from rich.text import Text

    if sample.failure is not None:
        return Text(printable(f"no score: {sample.failure.message} ({sample.failure.reason})"), "yellow")
    line = Text()
    for text, difference in _pieces(sample):
        shown = printable(text)
        if difference is None:
            line.append(shown)
        elif has_colours:
            # a coloured line end would colour the rest of the terminal's line
            line.append(shown.replace("\n", "⏎") if shown.strip("\n") == "" else shown, _style(difference))
            line.append("\n" * shown.count("\n") if shown.strip("\n") == "" else "")
        elif abs(difference) >= MARKED_NATS:
            line.append(f"[{shown} {difference:+.1f}]")
        else:
            line.append(shown)
    return line


def _pieces(sample: Sample) -> list[tuple[str, float | None]]:
    """(text, difference) of each token; of each span where the teacher has another tokenizer."""
    if not sample.spans:
        return [(token.text, token.kl) for token in sample.tokens]
    pieces: list[tuple[str, float | None]] = []
    done = 0
    for span in sample.spans:
        pieces += [(token.text, None) for token in sample.tokens[done : span.first_token]]
        pieces.append((span.text, None if span.kl is None else span.kl / max(1, span.num_tokens)))
        done = span.first_token + span.num_tokens
    return pieces + [(token.text, None) for token in sample.tokens[done:]]


def _style(difference: float) -> str:
    return next(style for lowest, style, _ in SCALE if difference >= lowest)


def _most_disputed(tokens: Sequence[SampleToken], top: int) -> list[tuple[int, SampleToken]]:
    """(place, token) of the `top` largest differences, in the order of the text."""
    known = [(place, token) for place, token in enumerate(tokens) if token.kl is not None]
    largest = sorted(known, key=lambda pair: -abs(pair[1].kl or 0.0))[:top]
    return sorted(largest, key=lambda pair: pair[0])


def _row(place: int, token: SampleToken) -> tuple[str, ...]:
    likeliest = "  ".join(_choice(choice) for choice in token.top[:CHOICES])
    return (
        str(place),
        repr(token.text),
        _probability(token.student_logprob),
        _probability(token.teacher_logprob),
        "-" if token.kl is None else f"{token.kl:+.2f}",
        likeliest or "(not stored; loss.support: teacher stores them)",
    )


def _choice(choice: TokenChoice) -> str:
    return f"{choice.text!r} {_probability(choice.logprob)}"


def _probability(logprob: float | None) -> str:
    """Per cent, which people read faster than nats."""
    return "-" if logprob is None else f"{100 * math.exp(logprob):.3g}%"
