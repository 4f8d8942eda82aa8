"""How much of a text's probability its canonical tokenization misses, where all tokenizations can be summed up.

    python benchmarks/canonical_gap.py [--steps 600] [--texts 100]

A cross-tokenizer teacher scores one tokenization of a text, its tokenizer's own: log q(canonical) <= log q(text). Here
the teacher has about 60 tokens and texts have at most 14 letters, so that q(text) = the sum over every way to write the
text with its tokens can be had exactly. The gap log q(text) - log q(canonical), in nats, is printed for a teacher that
was trained on canonical tokenizations (as real models are) and for one with random weights, on texts of the corpus, of
the teacher itself and of a student that writes letters. It is also what the value of a reverse KL is too large by.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, trainers
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
MAX_LETTERS = 14
NUM_TOKENS = 60
END = 0


def corpus() -> list[str]:
    """Runs of words from the documents, of at most `MAX_LETTERS` lower-case letters and underscores for blanks."""
    words = re.findall(r"[a-z]+", " ".join(path.read_text().lower() for path in sorted((ROOT / "docs").glob("*.md"))))
    texts, line = [], ""
    for word in words:
        longer = f"{line}_{word}" if line else word
        if len(longer) > MAX_LETTERS:
            texts += [line] if line else []
            longer = word if len(word) <= MAX_LETTERS else ""
        line = longer
    return texts


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=NUM_TOKENS, special_tokens=["<end>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Writer:
    """A small language model over a vocabulary of its own."""

    def __init__(self, num_tokens: int, seed: int) -> None:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=num_tokens,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
        )
        self.model = LlamaForCausalLM(config)

    def train(self, sequences: Sequence[Sequence[int]], steps: int) -> float:
        """Fit to sequences that begin and end with END; gives the last loss, nats per token."""
        optimizer, draw, loss = torch.optim.AdamW(self.model.parameters(), lr=3e-3), random.Random(0), torch.zeros(())
        for _ in range(steps):
            batch = draw.sample(list(sequences), 64)
            loss = -self._logprobs(batch).sum() / sum(len(ids) - 1 for ids in batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    def _logprobs(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """[B] log-probability of what comes after the first token of each."""
        length = max(map(len, sequences))
        ids = torch.tensor([[*s, *[END] * (length - len(s))] for s in sequences])
        mask = torch.tensor([[t < len(s) for t in range(1, length)] for s in sequences])
        logits = self.model(input_ids=ids[:, :-1]).logits.log_softmax(-1)
        return (logits.gather(2, ids[:, 1:, None])[..., 0] * mask).sum(-1)

    @torch.inference_mode()
    def logprobs(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """[B] float64, nats."""
        return torch.cat([self._logprobs(sequences[i : i + 512]).double() for i in range(0, len(sequences), 512)])

    @torch.inference_mode()
    def write(self) -> list[int] | None:
        """One text's tokens, drawn at temperature 1; None = it found no end."""
        ids = [END]
        while len(ids) <= 2 * MAX_LETTERS:
            probabilities = self.model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
            ids.append(int(torch.multinomial(probabilities, 1)))
            if ids[-1] == END:
                return ids[1:-1]
        return None


def tokenizations(text: str, vocabulary: dict[str, int]) -> Iterator[list[int]]:
    """Every way to write a text."""
    if not text:
        yield []
    for size in range(1, len(text) + 1):
        if text[:size] in vocabulary:
            for rest in tokenizations(text[size:], vocabulary):
                yield [vocabulary[text[:size]], *rest]


def gaps(teacher: Writer, tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """([N] gap of each text, nats; [N] -log q(canonical); ways to write a text, on average)."""
    vocabulary, found, costs, ways = tokenizer.get_vocab(), [], [], 0
    for text in texts:
        every = [[END, *ids, END] for ids in tokenizations(text, vocabulary)]
        logprobs = teacher.logprobs(every)
        canonical = logprobs[every.index([END, *tokenizer.encode(text).ids, END])]
        found.append(logprobs.logsumexp(0) - canonical)
        costs.append(-canonical)
        ways += len(every)
    return torch.stack(found), torch.stack(costs), ways / len(texts)


def written(writer: Writer, pieces: dict[int, str], number: int) -> list[str]:
    """Texts that a model writes itself, of those short enough to be summed up."""
    texts: list[str] = []
    while len(texts) < number:
        ids = writer.write()
        text = "" if ids is None else "".join(pieces[i] for i in ids)
        if 0 < len(text) <= MAX_LETTERS:
            texts.append(text)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of the teacher")
    parser.add_argument("--texts", type=int, default=100, help="texts of each kind")
    args = parser.parse_args()
    lines = corpus()
    tokenizer = train_tokenizer(lines)
    pieces = {number: token for token, number in tokenizer.get_vocab().items()}
    letters = sorted({letter for line in lines for letter in line})
    teacher, blank, student = Writer(NUM_TOKENS, 0), Writer(NUM_TOKENS, 1), Writer(1 + len(letters), 2)
    loss = teacher.train([[END, *tokenizer.encode(line).ids, END] for line in lines], args.steps)
    student.train([[END, *(1 + letters.index(c) for c in line), END] for line in lines], args.steps // 6)
    print(f"{len(lines)} lines of the corpus; the teacher's loss after {args.steps} steps: {loss:.3f} nats/token\n")
    kinds = {
        "the corpus": random.Random(1).sample(lines, args.texts),
        "the teacher": written(teacher, pieces, args.texts),
        "a student of letters": written(student, dict(enumerate(["", *letters])), args.texts),
    }
    print("| teacher | texts of | ways to write one | -log q(canonical) | gap, mean | median | largest | per letter |")
    print("|---|---|---|---|---|---|---|---|")
    for who, model in (("trained", teacher), ("random weights", blank)):
        for whose, texts in kinds.items():
            gap, cost, ways = gaps(model, tokenizer, texts)
            share = float(gap.sum()) / sum(map(len, texts))
            numbers = [f"{float(x):.3f}" for x in (gap.mean(), gap.median(), gap.max(), share)]
            print(f"| {who} | {whose} | {ways:.0f} | {float(cost.mean()):.2f} | {' | '.join(numbers)} |")


if __name__ == "__main__":
    main()
