"""`stillhouse score`: texts judged by a registered model, over REST."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from stillhouse.cli.console import EXIT_USAGE, CliError, number, print_error, print_table, say
from stillhouse.core.spec_score import MAX_ALTERNATIVES, MAX_ITEMS, MAX_TOKENS

SHOWN: Final = 60
"""Characters of a text in the table."""


def read_items(texts: Sequence[str], file: Path | None, prompt: str) -> list[dict[str, Any]]:
    """What to score: the texts of the command line, then those of a file."""
    items: list[dict[str, Any]] = [{"prompt": prompt, "text": text} for text in texts]
    if file is not None:
        try:
            lines = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CliError(f"cannot read {file}: {error}", exit_code=EXIT_USAGE) from None
        # not splitlines(): it also splits at U+2028 and others that JSON strings may hold
        numbered = enumerate(lines.split("\n"), start=1)
        items += [_item(line, f"{file} line {n}", prompt) for n, line in numbered if line.strip()]
    if not items:
        raise CliError("nothing to score", fix="give --text or --file", exit_code=EXIT_USAGE)
    return items


def _item(line: str, where: str, prompt: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CliError(f"{where} is not JSON: {error}", exit_code=EXIT_USAGE) from None
    if isinstance(value, str):
        return {"prompt": prompt, "text": value}
    if isinstance(value, dict):
        return value
    raise CliError(
        f"{where} is a JSON {type(value).__name__}",
        fix='write a string or {"prompt": "...", "text": "..."}',
        exit_code=EXIT_USAGE,
    )


def score(model: str, items: Sequence[dict[str, Any]], *, as_json: bool, **options: Any) -> None:
    """Print the scores. Exit code 1 if a text has none."""
    found = []
    for answer in _answers(model, items, **options):
        found.append(answer)
        if as_json:
            say(json.dumps(answer, ensure_ascii=False))
    if not as_json:
        _show(found, options["top_k"])
    failed = [answer for answer in found if answer["error"]]
    for answer in failed:
        print_error(f"text {answer['index']}: {answer['error']['message']}")
    if failed:
        raise SystemExit(1)


def _answers(model: str, items: Sequence[dict[str, Any]], **options: Any) -> Iterator[dict[str, Any]]:
    """One a text, numbered through; as many requests as it takes."""
    from stillhouse.client.client import Client

    start = 0
    with Client() as client:
        for batch in batches(items, options["top_k"]):
            for answer in client.score(model, batch, **options)["data"]:
                yield answer.to_dict() | {"index": start + answer["index"]}
            start += len(batch)


def batches(items: Sequence[dict[str, Any]], top_k: int) -> Iterator[list[dict[str, Any]]]:
    """Items that one request certainly takes: a token is at least a byte. What is too long alone goes alone."""
    limit = min(MAX_TOKENS, MAX_ALTERNATIVES // max(1, top_k))
    batch: list[dict[str, Any]] = []
    filled = 0
    for item in items:
        size = len(json.dumps(item, ensure_ascii=False).encode())
        if batch and (len(batch) == MAX_ITEMS or filled + size > limit):
            yield batch
            batch, filled = [], 0
        batch.append(item)
        filled += size
    yield batch


def _show(answers: Sequence[dict[str, Any]], top_k: int) -> None:
    if top_k == 0:
        rows = [
            (_index(a), str(a["num_tokens"]), _logprob(a["logprob"]), number(a["perplexity"]), _text(a))
            for a in answers
        ]
        print_table((">text", ">tokens", ">log-prob", ">perplexity", "begins"), rows)
        return
    rows = [row for answer in answers if not answer["error"] for row in _token_rows(answer)]
    print_table((">text", "token", ">log-prob", "likeliest"), rows)


def _index(answer: dict[str, Any]) -> str:
    return str(answer["index"])


def _text(answer: dict[str, Any]) -> str:
    return repr("".join(answer["tokens"])[:SHOWN])


def _token_rows(answer: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    columns = ("tokens", "logprobs", "top_tokens", "top_logprobs")
    for token, logprob, top, values in zip(*(answer[name] for name in columns), strict=True):
        likeliest = "  ".join(f"{word!r} {number(value, 3)}" for word, value in zip(top, values, strict=True))
        yield _index(answer), repr(token), _logprob(logprob), likeliest


def _logprob(value: float | None) -> str:
    """null stands for minus infinity."""
    return "-inf" if value is None else number(value)
