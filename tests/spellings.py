"""Tokenizers of the kinds that models come with, trained on the spot."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|end|>", "<|turn|>")
END_ID = 0
"""Of every tokenizer here that is trained."""
TEXTS = (
    "The quick brown fox jumps over the lazy dog. It's 12:30, and the other foxes are sleeping there.",
    "Die Würde des Menschen ist unantastbar; naïve cafés, déjà vu, Ærøskøbing, łódź.",
    "日本語の文章と中文的句子。 한국어 문장입니다. Привет, мир! Γειά σου Κόσμε. שלום עולם.",
    "def f(x):\n\tif x == 1:\n        return [x, y]\n\n    # 1234567890 -- ok  😀 👩‍👩‍👧 🇩🇪",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}: {{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
)
"""Of the models with these tokenizers: another than that of tests/tiny.py."""
OTHER_TEXTS = (
    "the then them these those other others another mother brother the the quick quickly",
    "return returns returned x == y  if  for  while \n\n\n    \t\t the end. The End. 😀😀 été ete\u0301 日本 本日",
)


def byte_level(path: Path, texts: tuple[str, ...] = TEXTS, size: int = 400, nfc: bool = False) -> Path:
    """As GPT-2, Llama 3 and, with `nfc`, Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    tokenizer.save(str(path))
    return path


def sentencepiece(path: Path, texts: tuple[str, ...] = TEXTS, size: int = 300, prefix: bool = True) -> Path:
    """As Llama 2 and Mistral, without `prefix` as Gemma: blanks are ▁, what has no token is spelled in bytes."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    trained.train_from_iterator([text[: len(text) // 2] for text in texts], trainer)
    document = json.loads(trained.to_str())
    vocab = document["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    merges = [tuple(merge) for merge in document["model"]["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True))
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])  # type: ignore[arg-type]
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(path))
    return path


def as_pretrained(path: Path) -> PreTrainedTokenizerFast:
    """A tokenizer for `tests.tiny.make_tiny_model`."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        eos_token=SPECIAL_TOKENS[END_ID],
        pad_token=SPECIAL_TOKENS[END_ID],
        additional_special_tokens=[SPECIAL_TOKENS[1]],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
