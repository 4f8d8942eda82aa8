"""Make a model with another tokenizer of one that is there: its vocabulary without the last merges.

    python examples/cross_tokenizer/cut_vocabulary.py MODEL OUT [--tokens 8192]

The tokens that are left keep their ids and embeddings; rare words become several tokens. Works for byte-level BPE
models whose ids follow the order of the merges, as SmolLM2's do; others are refused.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def cut_tokenizer(source: Path, out: Path, tokens: int) -> None:
    """Write the tokenizer without the ids from `tokens` on."""
    document = json.loads((source / "tokenizer.json").read_text())
    model = document["model"]
    made = [model["vocab"]["".join(merge)] for merge in model["merges"]]
    if made != sorted(made) or any(token["id"] >= tokens for token in document["added_tokens"]):
        raise SystemExit(
            f"{source}: the ids of its tokens do not follow the order of its merges, or its special tokens "
            "come last; cutting them off would leave holes"
        )
    model["merges"] = [merge for merge, number in zip(model["merges"], made, strict=True) if number < tokens]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < tokens}
    (out / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copy(source / name, out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens that are left")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    cut_tokenizer(args.model, args.out, args.tokens)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.resize_token_embeddings(args.tokens)
    model.save_pretrained(args.out)
    print(f"{args.out}: {args.tokens} tokens, {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
