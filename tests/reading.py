"""Chat templates beside that of tests/tiny.py, and the definition of where a stop string ends a completion."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from tests.tiny import CHAT_TEMPLATE

THINKING = CHAT_TEMPLATE.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n{% if not enable_thinking %}<think></think>{% endif %}{% endif %}",
)
"""As Qwen3's: without thinking the prompt holds an empty thought."""
OTHER = (
    "<|endoftext|>{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""A teacher's, of another family; the same tokens."""


def slow_end(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str]) -> int | None:
    """The length of the shortest prefix of a completion whose text contains a stop string."""
    for number in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:number], skip_special_tokens=False)
        if any(stop in text for stop in stops):
            return number
    return None
