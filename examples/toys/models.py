"""Small models for the toy tasks, trained from scratch: one base, and experts that begin as the base.

A model is a folder as transformers writes it: a Llama of 0.3M parameters in safetensors and a tokenizer with one token
per character, so `stillhouse models add` takes it. Each is made once: a folder that exists is left as it is, and a new
one appears under its name when it is complete.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from toys import tasks

logging.disable_progress_bar()  # models of a megabyte need none

Row = tasks.Row

END, PAD = "<|end|>", "<|pad|>"
ROLES: Final = ("<|system|>", "<|user|>", "<|assistant|>")
THOUGHT: Final = ("<think>", "</think>")
"""Ordinary tokens: verifiers look for the answer behind the last of them."""
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
"""As Qwen3's: without thinking, an empty thought stands before the answer."""
MAX_LENGTH: Final = 128
"""Tokens of prompt and completion: the longest of the tasks has 30, so there is room for hints and thoughts."""
HIDDEN, LAYERS, HEADS = 96, 3, 4
BATCH: Final = 64
"""Rows per step."""
BASE_STEPS, EXPERT_STEPS = (450, 160), (80, 30)
"""In full, and where `short`."""
CARE: Final = 0.3
"""Share of right answers in what the base learns from: it then solves about so many itself."""


def base(folder: Path, *, seed: int = 0, short: bool = False) -> Path:
    """The model that all others begin as: it has all skills, but little care which one is asked for."""
    if folder.is_dir():
        return folder
    steps = BASE_STEPS[short]
    model, tokenizer = _new_model(seed), make_tokenizer()
    skilled = [row | {"completion": row["answer"]} for row in tasks.careless_rows(BATCH * steps // 4, seed, care=1.0)]
    _fit(model, _encode(tokenizer, skilled), steps=steps, lr=3e-3, seed=seed)
    careless = tasks.careless_rows(BATCH * steps // 4, seed + 1, care=CARE)
    _fit(model, _encode(tokenizer, careless), steps=steps // 4, lr=1e-3, seed=seed)
    return _save(model, tokenizer, folder)


def expert(source: Path, folder: Path, task: str, *, seed: int = 0, short: bool = False) -> Path:
    """A model that does one task well and has not seen the others since it was `source`."""
    steps = EXPERT_STEPS[short]
    return train(source, folder, tasks.rows(task, 2_000, seed), steps=steps, seed=seed)


def train(source: Path, folder: Path, rows: Sequence[Row], *, steps: int, lr: float = 1e-3, seed: int = 0) -> Path:
    """The model in `source`, fine-tuned on rows: on their `completion`, or `answer` if they have none.

    A row is read as a teacher reads it: `teacher_prompt` comes before `messages` and `prompt`.
    """
    if folder.is_dir():
        return folder
    model, tokenizer = load(source)
    _fit(model, _encode(tokenizer, rows), steps=steps, lr=lr, seed=seed)
    return _save(model, tokenizer, folder)


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Model and tokenizer of a folder."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def accuracy(folder: Path, rows: Sequence[Row], *, as_teacher: bool = False) -> list[bool]:
    """For each row, whether the model's greedy answer (what stands behind its last thought) is right."""
    model, tokenizer = load(folder)
    prompts = [_prompt(tokenizer, row, as_teacher=as_teacher) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
    is_right = [False] * len(rows)
    for _, same_length in groupby(order, key=lambda index: len(prompts[index])):  # so that nothing needs padding
        indices = list(same_length)
        ids = torch.tensor([prompts[index] for index in indices])
        room = MAX_LENGTH - ids.shape[1]
        written: Any = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False)
        for index, completion in zip(indices, written[:, ids.shape[1] :], strict=True):
            text = tokenizer.decode(completion, skip_special_tokens=True)
            is_right[index] = text.rpartition(THOUGHT[1])[2].strip() == rows[index]["answer"]
    return is_right


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, hence per character of ASCII; any text comes back as it was."""
    special = (END, PAD, *ROLES)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*special, *THOUGHT, *alphabet))}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in THOUGHT])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        model_max_length=MAX_LENGTH,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _new_model(seed: int) -> LlamaForCausalLM:
    ends: dict[str, Any] = {"eos_token_id": 0, "pad_token_id": 1}  # END and PAD
    config = LlamaConfig(
        vocab_size=len(make_tokenizer()),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # for texts of 30 tokens, not of thousands
        initializer_range=HIDDEN**-0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        **ends,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
    model.generation_config = GenerationConfig(**ends)
    return model


def _prompt(tokenizer: PreTrainedTokenizerFast, row: Row, *, as_teacher: bool) -> list[int]:
    """[P] what is read before a row's completion."""
    told = row.get("teacher_prompt") if as_teacher else None
    messages = told or row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    arguments = row.get("chat_template_kwargs", {})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **arguments)[
        "input_ids"
    ]


Sample = tuple[list[int], int]
"""Token ids of prompt and completion, and where the completion begins."""


def _encode(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> list[Sample]:
    samples = []
    for row in rows:
        prompt = _prompt(tokenizer, row, as_teacher=True)
        text = row.get("completion", row["answer"])
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        samples.append(([*prompt, *ids, tokenizer.eos_token_id], len(prompt)))
    return samples


def _fit(model: LlamaForCausalLM, samples: Sequence[Sample], *, steps: int, lr: float, seed: int) -> None:
    """Minimise the cross-entropy of the completions' tokens: AdamW, a tenth of the steps warm-up, then cosine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for models as small as these, several only wait for each other
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 10)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warmup), eta_min=0.05 * lr)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, cosine], [warmup])
    for batch in _batches(samples, steps, seed):
        ids, is_trained = _pad(batch)
        logits = model(input_ids=ids).logits[:, :-1]  # causal, padded on the right: no mask is needed
        loss = cross_entropy(logits[is_trained[:, 1:]], ids[:, 1:][is_trained[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    torch.set_num_threads(threads)


def _batches(samples: Sequence[Sample], steps: int, seed: int) -> Iterator[list[Sample]]:
    draw = random.Random(seed)
    for _ in range(steps):
        yield draw.sample(samples, min(BATCH, len(samples)))


def _pad(batch: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] token ids, and [B, T] which of them are of completions."""
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.ones(len(batch), longest, dtype=torch.long)
    is_trained = torch.zeros(len(batch), longest, dtype=torch.bool)
    for number, (sample, start) in enumerate(batch):
        ids[number, : len(sample)] = torch.tensor(sample)
        is_trained[number, start : len(sample)] = True
    return ids, is_trained


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Write model and tokenizer; the folder has its name only when it is complete."""
    begun = folder.with_name(f"{folder.name}.begun")
    shutil.rmtree(begun, ignore_errors=True)
    model.save_pretrained(begun)
    tokenizer.save_pretrained(begun)
    begun.rename(folder)
    return folder
