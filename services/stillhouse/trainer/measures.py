"""What a held-out evaluation says: of all prompts together, of each teacher's, and before beside after."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, NamedTuple

COMPARED: Final = (
    "reverse_kl",
    "accuracy",
    "pass_at_k",
    "teacher_nll_greedy",
    "repeated_4grams",
    "mean_length",
    "truncated",
    "ended",
)
"""Measures that a job's result shows before and after training."""
TOLD: Final = ("reverse_kl", "accuracy", "pass_at_k", "mean_length", "truncated", "num_prompts")
"""Measures of each teacher that events tell."""


class Kl(NamedTuple):
    """KL(student || teacher) on one held-out completion."""

    teacher: str
    total: float
    """Summed over its tokens, nats."""
    num_tokens: int
    share: float = 1.0
    """Of the completion in means over completions; those of a mixture's teachers add up to 1."""
    row: int | None = None
    """Row of its prompt; None = it is the only completion of one."""


class Text(NamedTuple):
    """What a held-out completion is like, without a look at what it says."""

    teachers: Collection[str]
    length: int
    """Tokens."""
    is_truncated: bool
    """It reached max_tokens."""
    has_ended: bool
    """By an end token of the student; else cut, or at a stop string."""


class Tries(NamedTuple):
    """Completions sampled of one prompt that were judged."""

    teachers: Collection[str]
    number: int
    right: int
    """Those with a reward of 1 or more."""


def pass_at_k(number: int, right: int, k: int) -> float:
    """Chance that one of `k` completions is right, of `number` sampled ones of which `right` are; unbiased.

    1 - C(n - c, k) / C(n, k). Source: Chen et al., Evaluating Large Language Models Trained on Code (2021), section
    2.1, Eq. 1.
    """
    return 1 - math.comb(number - right, k) / math.comb(number, k)


def measures(
    kls: Sequence[Kl],
    rewards: Sequence[tuple[Collection[str], float]],
    texts: Sequence[Text] = (),
    tries: Sequence[Tries] = (),
    ks: Sequence[int] = (),
) -> dict[str, Any]:
    """Measures of all prompts, and in `by_teacher` of each teacher's; `rewards` = (teachers, reward) of those that were
    judged."""

    def of(name: str) -> dict[str, Any]:
        own = [kl._replace(share=1.0) for kl in kls if kl.teacher == name]
        return {
            **_measures(own, [value for owners, value in rewards if name in owners]),
            **_text_measures([text for text in texts if name in text.teachers]),
            **_pass_at_k([each for each in tries if name in each.teachers], ks),
        }

    by_teacher = {name: of(name) for name in sorted({kl.teacher for kl in kls})}
    found = _measures(kls, [value for _, value in rewards])
    return {**found, **_text_measures(texts), **_pass_at_k(tries, ks), "by_teacher": by_teacher}


def _measures(kls: Sequence[Kl], rewards: Sequence[float]) -> dict[str, Any]:
    rows = len({kl.row for kl in kls if kl.row is not None})
    found: dict[str, Any] = {"num_prompts": rows or round(sum(kl.share for kl in kls)) or len(rewards)}
    if kls:
        num_tokens = sum(kl.share * kl.num_tokens for kl in kls)
        total = sum(kl.share * kl.total for kl in kls)
        found |= {"reverse_kl": total / max(num_tokens, 1), "num_tokens": round(num_tokens)}
    if rewards:
        found |= {"accuracy": sum(rewards) / len(rewards), "num_judged": len(rewards)}
    return found


def _text_measures(texts: Sequence[Text]) -> dict[str, Any]:
    if not texts:
        return {}
    return {
        "mean_length": sum(text.length for text in texts) / len(texts),
        "truncated": sum(text.is_truncated for text in texts) / len(texts),
        "ended": sum(text.has_ended for text in texts) / len(texts),
    }


def _pass_at_k(tries: Sequence[Tries], ks: Sequence[int]) -> dict[str, Any]:
    """Means over the prompts that have enough judged completions."""
    found: dict[str, float] = {}
    for k in ks:
        if enough := [each for each in tries if each.number >= k]:
            found[str(k)] = sum(pass_at_k(each.number, each.right, k) for each in enough) / len(enough)
    return {"pass_at_k": found} if found else {}


def change(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Two evaluations side by side: {measure: {before, after}}, and the same of each teacher in `by_teacher`."""
    found: dict[str, Any] = {
        name: {"before": before[name], "after": after[name]} for name in COMPARED if name in before and name in after
    }
    if "pass_at_k" in found:
        earlier, later = before["pass_at_k"], after["pass_at_k"]
        found["pass_at_k"] = {k: {"before": earlier[k], "after": later[k]} for k in earlier if k in later}
    earlier, later = before.get("by_teacher", {}), after.get("by_teacher", {})
    if common := [name for name in earlier if name in later]:
        found["by_teacher"] = {name: change(earlier[name], later[name]) for name in common}
    return found


def told(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the event of an evaluation says."""
    named = {name: result[name] for name in ("step", "averaged", *COMPARED) if name in result}
    of_each = {
        teacher: {name: found[name] for name in TOLD if name in found}
        for teacher, found in result["by_teacher"].items()
    }
    return {**named, "by_teacher": of_each}


def held_out_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The measures of an evaluation as metrics: held_out/reverse_kl, and with several teachers .../NAME."""
    parts = {"": result, **(result["by_teacher"] if len(result["by_teacher"]) > 1 else {})}
    found: dict[str, float] = {}
    for teacher, measured in parts.items():
        suffix = f"/{teacher}" if teacher else ""
        found |= {f"held_out/{name}{suffix}": measured[name] for name in COMPARED if name in measured}
        found.pop(f"held_out/pass_at_k{suffix}", None)
        found |= {f"held_out/pass@{k}{suffix}": value for k, value in measured.get("pass_at_k", {}).items()}
    return found


def sentence(result: Mapping[str, Any]) -> str:
    """The same for people."""
    parts = {"reverse_kl": "reverse KL {:.4f} nats/token", "accuracy": "accuracy {:.3f}"}
    told_of = [text.format(result[name]) for name, text in parts.items() if name in result]
    told_of += [f"pass@{k} {value:.3f}" for k, value in result.get("pass_at_k", {}).items() if k != "1"]
    text = f"step {result['step']}: held-out {', '.join(told_of) or 'measures: nothing could be judged'}"
    if len(result["by_teacher"]) > 1:
        text += f"; by teacher: {', '.join(_short(*item) for item in result['by_teacher'].items())}"
    return text + (" (moving average of the weights)" if result["averaged"] else "")


def _short(teacher: str, found: Mapping[str, Any]) -> str:
    accuracy = f" ({found['accuracy']:.3f} right)" if "accuracy" in found else ""
    return f"{teacher} {found['reverse_kl']:.4f}{accuracy}"


def card_facts(compared: Mapping[str, Any]) -> dict[str, Any]:
    """What the model card says of `change(before, after)`."""
    facts: dict[str, Any] = {}
    for name in ("reverse_kl", "accuracy"):
        if name in compared:
            facts |= {f"heldout_{name}_{when}": value for when, value in compared[name].items()}
    by_teacher = compared.get("by_teacher", {})
    if len(by_teacher) > 1:
        facts["heldout_by_teacher"] = {teacher: _both(found) for teacher, found in by_teacher.items()}
    return facts


def _both(found: Mapping[str, Any]) -> str:
    labels = {"reverse_kl": "KL", "accuracy": "accuracy"}
    pairs = [(label, found[name]) for name, label in labels.items() if name in found]
    return " and ".join(f"{label} {pair['before']:.3g} -> {pair['after']:.3g}" for label, pair in pairs)
