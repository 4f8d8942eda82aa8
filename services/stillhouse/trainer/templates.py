"""Chat templates: conversations to tokens, as the student reads them and as each teacher does.

A teacher reads with its own template where it has one: under the student's it would judge texts that begin as it never
saw one begin, which adds a bias to every token (0.29 nats were measured with two such templates, tinker-cookbook #797).
Only prompts are rendered; completions are the student's tokens, whoever reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from stillhouse.core.errors import PreflightError
from stillhouse.core.models import ModelEntry
from stillhouse.trainer.tokens import end_ids

Conversation = Sequence[Mapping[str, str]]
Arguments = Mapping[str, Any]

PROBE: Final = "stillhouse"
"""Stands for what the assistant says when a template is looked at."""


class Renderer:
    """Applies the chat template of a model's tokenizer."""

    def __init__(self, model_dir: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)

    def ids(self, conversation: Conversation, arguments: Arguments | None = None) -> tuple[int, ...]:
        """[P] token ids of a conversation, up to where the assistant speaks.

        Raises:
            PreflightError: the template refuses the conversation, or the prompt begins with two BOS tokens.
        """
        ids = self._apply(conversation, arguments or {}, add_generation_prompt=True, tokenize=True)["input_ids"]
        bos = self._tokenizer.bos_token_id
        if bos is not None and list(ids[:2]) == [bos, bos]:
            raise PreflightError(
                f"its prompt begins with two BOS tokens ('{self._tokenizer.bos_token}', id {bos}); write it once, in "
                "the chat template and not in the messages"
            )
        return tuple(int(token) for token in ids)

    def completion(self, text: str, stop_ids: Sequence[int]) -> tuple[int, ...]:
        """[T] a given text as the assistant's turn: its tokens, and the token that ends the turn.

        It is tokenized apart from the prompt, as a model writes it; what looks like a special token in it is text.
        """
        ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return (*(int(token) for token in ids), self.end_of_turn(stop_ids))

    def end_of_turn(self, stop_ids: Sequence[int]) -> int:
        """The end-of-sequence token with which the chat template closes the assistant's turn, if it does with one."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        rendered = self._apply(turns, {}, tokenize=True)["input_ids"]
        closing = [int(token) for token in rendered if token in stop_ids]
        return closing[-1] if closing else stop_ids[0]

    def text(self, ids: Sequence[int]) -> str:
        """Completion ids as text, special tokens left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def spelt(self, ids: Sequence[int]) -> str:
        """Tokens as text, special ones included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def check(self, arguments: Arguments) -> None:
        """Prove that prompts end where the assistant speaks: what the template writes before its words is there.

        Raises:
            PreflightError: it is not; a model would first have to write the head of its own turn.
        """
        question = [{"role": "user", "content": "a"}]
        prompt = self._apply(question, arguments, add_generation_prompt=True, tokenize=False)
        if prompt != self._apply(question, arguments, tokenize=False):
            return  # it reads add_generation_prompt; how a thought begins it may write on one of both ways only
        answered = self._apply([*question, {"role": "assistant", "content": PROBE}], arguments, tokenize=False)
        head = answered.partition(PROBE)[0]
        if head.startswith(prompt) and head[len(prompt) :].strip():
            raise PreflightError(
                f"its chat template does not say where the assistant speaks: it ignores add_generation_prompt, but "
                f"writes {head[len(prompt) :]!r} before an answer; correct chat_template.jinja and register it again"
            )

    def _apply(self, conversation: Conversation, arguments: Arguments, **options: Any) -> Any:
        from jinja2 import TemplateError

        messages = [dict(message) for message in conversation]
        try:
            return self._tokenizer.apply_chat_template(messages, return_dict=True, **options, **arguments)
        except (TemplateError, TypeError, ValueError) as error:  # what templates raise, themselves or by accident
            raise PreflightError(f"its chat template refuses it: {error}") from None


def teacher_renderers(
    student: ModelEntry,
    teachers: Mapping[str, ModelEntry],
    renderer: Renderer,
    load: Callable[[Path], Renderer],
) -> dict[str, Renderer]:
    """How each teacher reads prompts: its own template; `renderer`, the student's, if it has none or the same files.

    Blocks while it reads tokenizers.
    """
    loaded = {_reading(student): renderer}
    for entry in teachers.values():
        if entry.has_chat_template and _reading(entry) not in loaded:
            loaded[_reading(entry)] = load(Path(entry.path))
    return {name: loaded.get(_reading(entry), renderer) for name, entry in teachers.items()}


def _reading(entry: ModelEntry) -> tuple[str | None, ...]:
    """What says how a model reads: models of one family mostly have the same files, and render the same."""
    return tuple(entry.files.get(name) for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"))


def check_ends(
    student: ModelEntry, teachers: Mapping[str, ModelEntry], renderers: Mapping[str, Renderer], stop_ids: Sequence[int]
) -> None:
    """Refuse a teacher that ends its turns with a token at which the student, which ends at `stop_ids`, would go on.

    The teacher judges the student's last token as it stands. One that ends turns otherwise teaches the student to write
    the other token, and that has to end a completion: else texts get longer and longer.

    Raises:
        PreflightError: names the token and the fix.
    """
    for name, entry in teachers.items():
        own = end_ids(entry)
        if not own or not entry.has_chat_template:
            continue
        with naming(f"teacher '{name}' ({entry.name})"):
            end = renderers[name].end_of_turn(own)
            if end not in stop_ids:
                raise PreflightError(
                    f"it ends its turns with token {end}, at which the student ({student.name}) goes on; that ends "
                    f"with {sorted(set(stop_ids))}. Add {end} to sampling.stop_token_ids"
                )


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Say in refusals what they are about."""
    try:
        yield
    except PreflightError as error:
        raise PreflightError(f"{what}: {error.message}") from None
