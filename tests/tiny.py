"""Tiny random models with a real tokenizer, so that every service can run for real in milliseconds.

All of them share one tokenizer (256 bytes and four special tokens) unless given another: any can teach any other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
"""Their ids are 0..3; the bytes follow."""
EOS_ID = 2
PAD_ID = 3
TOKENIZER_SIZE = len(SPECIAL_TOKENS) + 256
INIT_STD = 0.4
"""Large, so that logits have a standard deviation of about 2 and models of different seeds disagree by nats."""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_model(
    folder: Path,
    *,
    seed: int = 0,
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 4,
    max_position_embeddings: int = 256,
    tie: bool = True,
    vocab_pad: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """Save a random float32 Llama and its tokenizer to `folder`, as `save_pretrained` does; gives `folder`.

    The embedding has `vocab_pad` rows more than the tokenizer has tokens; equal arguments give equal bytes.
    """
    tokenizer = make_tokenizer(max_position_embeddings) if tokenizer is None else tokenizer
    ends: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer) + vocab_pad,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_position_embeddings,
        initializer_range=INIT_STD,
        tie_word_embeddings=tie,
        bos_token_id=None,
        **ends,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer(max_length: int = 256) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer of all tiny models: one token per UTF-8 byte, ChatML-like template."""
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())):
        vocabulary[byte] = len(SPECIAL_TOKENS) + index
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL_TOKENS[EOS_ID],
        pad_token=SPECIAL_TOKENS[PAD_ID],
        additional_special_tokens=[SPECIAL_TOKENS[0], SPECIAL_TOKENS[1]],
        model_max_length=max_length,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
