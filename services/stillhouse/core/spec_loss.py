"""The part of a job's format that says what is minimised: one class per family of objectives.

p is the student's distribution over the next token, q the teacher's, y the token that stands there.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from stillhouse.core.spec_base import Closed, Name

_NAIVE: Final = {
    "none": "dropping the tokens outside the support trains towards something else than the teacher: its gradient is "
    "not zero at p = q, the reverse form drives mass out of the support and the forward form drives all mass into it",
    "renormalised": "renormalising over the support leaves the mass on it free, and with k = 1 it has no signal at all",
    "clamp": "clamping the truncated sum at zero stops learning early, with wrong ratios on the support",
}
_NAIVE_NAMES: Final = {"naive": "none", "truncated": "none", "renormalized": "renormalised"}
_NO_LOSS: Final = {
    "k1": "its expected gradient is zero: it trains nothing; 'advantage' holds it fixed and is right",
    "k3": "its expected gradient is that of the forward KL(q || p), although its value estimates the reverse KL; for "
    "the forward KL take full_vocabulary or top_k",
}


Payload = Literal["none", "sampled", "spans", "top_k", "targets", "hidden"]
"""What a teacher is asked to send of each token; the kinds of rollout.proto."""


class Reduced(Closed):
    """What all objectives share: how the losses of tokens become the loss of a step, and what they need."""

    reduction: Literal["token_mean", "seq_mean_token_mean"] = "token_mean"
    """token_mean: mean over all trained tokens of the step. seq_mean_token_mean: mean of the sequences' means."""
    per_teacher: bool = False
    """Take that mean within each teacher's samples, then the mean over the teachers: teachers with short answers count
    as much as those with long ones."""

    def payload(self) -> Payload:
        """What the teacher sends."""
        return "none"

    def record_top_k(self) -> int:
        """Of how many of its likeliest tokens the sampler keeps the ids; 0 = none."""
        return 0

    def crosses_tokenizers(self) -> bool:
        """Teachers may have another tokenizer than the student."""
        return False

    @model_validator(mode="before")
    @classmethod
    def _compares_tokens(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and "cross_tokenizer" in fields and "cross_tokenizer" not in cls.model_fields:
            raise ValueError(
                "'cross_tokenizer' belongs to policy_gradient: distributions over different vocabularies have no "
                "tokens in common. What can be compared are probabilities of texts, and policy_gradient needs no more"
            )
        return fields


class RewardSpec(Closed):
    """Outcome reward: verifiers judge whole completions, and what is better than its group is made likelier."""

    weight: float = Field(default=1.0, gt=0, le=1000)
    """Factor alpha of the reward's advantage, which is added to the teacher's after it was normalised."""
    normalise: Literal["std", "mean"] = "std"
    """std: reward minus the group's mean, divided by its standard deviation. mean: only minus the mean."""
    verifier: Name | None = None
    """Verifier of rows that name none."""
    timeout_s: float = Field(default=10.0, ge=0.1, le=600)
    """Deadline of one verdict; a completion without one in time has reward 0."""


class PolicyGradientLoss(Reduced):
    """Sampled-token reverse KL(student || teacher) as a policy gradient: 4 bytes of teacher signal a token."""

    objective: Literal["policy_gradient"]
    """Selects this loss."""
    teacher_weight: float = Field(default=1.0, ge=0, le=1000)
    """Factor of the teacher's advantage log q - log p; 0 = outcome reward alone (GRPO), which needs no teacher."""
    advantage_clip: float | None = Field(default=None, gt=0, le=1000)
    """Clip of the teacher's per-token advantage log q - log p to +-this, nats; none = no clip."""
    student_term: Literal["trainer", "sampler"] = "trainer"
    """Whose p the advantage compares with the teacher's q: the current weights', or those that sampled."""
    ratio_gate: Literal["none", "is", "tis", "icepop", "seq_mask"] = "none"
    """Weight of tokens since which the policy has moved on, by rho = p(current) / p(sampled). is: rho. tis: rho clamped
    to the band. icepop: rho inside the band, else 0. seq_mask: rho, and 0 for whole sequences outside the band."""
    gate_low: float | None = Field(default=None, ge=0, le=1000)
    """Lower end of the band; none = 0.5, for seq_mask 0.999."""
    gate_high: float | None = Field(default=None, gt=0, le=1000)
    """Upper end of the band; none = 2, for seq_mask 1.002."""
    discount: float = Field(default=0.0, ge=0, le=1)
    """0: each token answers for itself. Above: also for the later tokens of its sequence, discounted."""
    estimator: Literal["advantage", "k2"] = "advantage"
    """advantage: -A log p, A held fixed. k2: half the squared log-ratio, differentiated. Same gradient on average."""
    baseline: Literal["none", "top_k", "full_vocabulary"] = "none"
    """What is subtracted from the advantage to lower its variance: nothing, or its mean over the next token (-KL, where
    nothing is clipped), held fixed, over the teacher's `k` likeliest tokens and a tail, or exactly. The teacher then
    sends 8*k or 2*d bytes."""
    k: int = Field(default=64, ge=1, le=1024)
    """baseline top_k: tokens per position."""
    hidden_dtype: Literal["float16", "float32"] = "float16"
    """baseline full_vocabulary: element type of the hidden states on the wire."""
    reward: RewardSpec | None = None
    """Outcome reward that is added to the teacher's advantage; none = the teacher alone."""
    cross_tokenizer: bool = False
    """Teachers may have other tokenizers than the student: they read its completions as texts, and each token has the
    advantage of its span of text, log q(span) - log p(span); see docs/cross-tokenizer.md."""

    def crosses_tokenizers(self) -> bool:
        return self.cross_tokenizer

    def payload(self) -> Payload:
        if self.teacher_weight == 0:
            return "none"
        if self.cross_tokenizer:
            return "spans"
        payloads: dict[str, Payload] = {"none": "sampled", "top_k": "top_k", "full_vocabulary": "hidden"}
        return payloads[self.baseline]

    def band(self) -> tuple[float, float]:
        """Ends of the gate's band."""
        low, high = (0.999, 1.002) if self.ratio_gate == "seq_mask" else (0.5, 2.0)
        return low if self.gate_low is None else self.gate_low, high if self.gate_high is None else self.gate_high

    def needs_whole_distribution(self) -> str:
        """Why samples drawn with top_p, top_k or min_p would train something else; "" = they would not."""
        if self.ratio_gate != "none":
            return f"ratio_gate '{self.ratio_gate}' compares with the policy that sampled"
        if self.baseline != "none":
            return f"baseline '{self.baseline}' changes no mean over samples of the whole distribution, and only of it"
        if self.reward is not None:
            return "an outcome reward weighs the gradient of log p, and p must be what sampled"
        return ""

    @field_validator("estimator", mode="before")
    @classmethod
    def _is_a_loss(cls, value: Any) -> Any:
        if value in _NO_LOSS:
            raise ValueError(f"{value} is not offered as a loss: {_NO_LOSS[value]}")
        return value

    @model_validator(mode="after")
    def _gate_makes_sense(self) -> PolicyGradientLoss:
        has_band = self.ratio_gate in ("tis", "icepop", "seq_mask")
        if not has_band and (self.gate_low is not None or self.gate_high is not None):
            raise ValueError(f"'gate_low' and 'gate_high' belong to tis, icepop and seq_mask, not to {self.ratio_gate}")
        low, high = self.band()
        if low >= high:
            raise ValueError(f"the band of the ratio gate is empty: gate_low {low:g}, gate_high {high:g}")
        return self

    @model_validator(mode="after")
    def _advantage_makes_sense(self) -> PolicyGradientLoss:
        if self.estimator == "k2":
            has_advantage = self.advantage_clip is not None or self.discount > 0 or self.student_term != "trainer"
            if has_advantage or self.baseline != "none" or self.reward is not None:
                raise ValueError(
                    "k2 has no advantage: leave out 'advantage_clip', 'discount', 'student_term', 'baseline' and "
                    "'reward'"
                )
        if self.baseline != "none" and self.discount > 0:
            raise ValueError(
                "'baseline' is the mean of a token's own advantage; with 'discount' above 0 it would also take away "
                "what tokens earn for later ones. Use one of the two"
            )
        if self.teacher_weight == 0:
            if self.reward is None:
                raise ValueError("'teacher_weight' 0 leaves nothing to learn from: give a 'reward', or raise it")
            is_shaped = self.advantage_clip is not None or self.discount > 0 or self.student_term != "trainer"
            if is_shaped or self.estimator == "k2" or self.baseline != "none":
                raise ValueError(
                    "'teacher_weight' is 0: leave out 'advantage_clip', 'discount', 'student_term' and 'baseline', "
                    "they are the teacher's"
                )
        return self

    @model_validator(mode="after")
    def _spans_make_sense(self) -> PolicyGradientLoss:
        if not self.cross_tokenizer:
            return self
        refused = {
            "teacher_weight 0": (self.teacher_weight == 0, "asks no teacher"),
            "estimator k2": (self.estimator == "k2", "is of single tokens"),
            f"baseline {self.baseline}": (self.baseline != "none", "is a mean over the next token of one vocabulary"),
            "discount": (self.discount > 0, "counts tokens, and a span has several"),
            "ratio_gate seq_mask": (self.ratio_gate == "seq_mask", "is a mean over single tokens"),
        }
        for knob, (is_set, why) in refused.items():
            if is_set:
                raise ValueError(f"'cross_tokenizer' compares spans of text, and {knob} {why}; leave out one of them")
        return self

    @model_validator(mode="after")
    def _no_idle_knobs(self) -> PolicyGradientLoss:
        for name, baseline in (("k", "top_k"), ("hidden_dtype", "full_vocabulary")):
            is_set = getattr(self, name) != type(self).model_fields[name].default
            if is_set and self.baseline != baseline:
                raise ValueError(f"'{name}' belongs to baseline {baseline}, the baseline is {self.baseline}")
        return self


class FullVocabularyLoss(Reduced):
    """Exact divergence over the whole vocabulary from the teacher's hidden states: low variance, 2*d bytes a token."""

    objective: Literal["full_vocabulary"]
    """Selects this loss."""
    divergence: Literal[
        "reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "entropy_mix", "k2"
    ] = "reverse_kl"
    """reverse_kl: KL(student || teacher), mode-seeking. forward_kl: KL(teacher || student), mass-covering. jsd: between
    them, by `beta`. skew_forward_kl, skew_reverse_kl: towards a mixture of both, by `alpha`. entropy_mix: reverse_kl,
    plus forward_kl where the teacher is unsure. k2: half the squared log-ratio at the sampled token, as a control."""
    beta: float = Field(default=0.5, gt=0, lt=1)
    """jsd: share of the teacher in the mixture; near 0 it acts as forward_kl, near 1 as reverse_kl."""
    beta_rescale: bool = False
    """jsd: divide by beta (1 - beta), so that its size is that of the KLs it lies between."""
    alpha: float = Field(default=0.1, gt=0, lt=1)
    """skew_*: share of the other model that is mixed in; 0 would be the plain KL."""
    entropy_threshold: float = Field(default=1.0, ge=0, le=100)
    """entropy_mix: the teacher counts as unsure where its entropy is above this, nats."""
    forward_weight: float = Field(default=1.0, gt=0, le=1000)
    """entropy_mix: weight of the forward KL there."""
    hidden_dtype: Literal["float16", "float32"] = "float16"
    """Element type of the hidden states on the wire."""

    def payload(self) -> Payload:
        return "hidden"

    @model_validator(mode="after")
    def _no_idle_knobs(self) -> FullVocabularyLoss:
        for name, divergences in _KNOBS.items():
            is_set = getattr(self, name) != type(self).model_fields[name].default
            if is_set and self.divergence not in divergences:
                raise ValueError(
                    f"'{name}' belongs to {' and '.join(divergences)}, the divergence is {self.divergence}"
                )
        return self


_KNOBS = {
    "beta": ("jsd",),
    "beta_rescale": ("jsd",),
    "alpha": ("skew_forward_kl", "skew_reverse_kl"),
    "entropy_threshold": ("entropy_mix",),
    "forward_weight": ("entropy_mix",),
}
"""Fields that only some divergences read: given with another, they would be ignored in silence."""


class TopKLoss(Reduced):
    """KL over k tokens of each position, with what is outside accounted for: 8*k bytes a token."""

    objective: Literal["top_k"]
    """Selects this loss."""
    divergence: Literal["reverse_kl", "forward_kl"] = "reverse_kl"
    """reverse_kl: KL(student || teacher), mode-seeking. forward_kl: KL(teacher || student), mass-covering."""
    correction: Literal["tail", "generalised"] = "tail"
    """tail: all other tokens are one more bucket. generalised: terms -p + q make the mass on the k tokens right.
    Leaving the rest out, or renormalising over the k tokens, would train towards something else and is not offered."""
    support: Literal["teacher", "student", "union"] = "teacher"
    """Whose k likeliest tokens: the teacher's, the student's (as it sampled; 12*k bytes a token), or both sets."""
    k: int = Field(default=64, ge=1, le=1024)
    """Tokens per position; for union, of each of the two."""

    def payload(self) -> Payload:
        return "targets" if self.support == "student" else "top_k"

    def record_top_k(self) -> int:
        return 0 if self.support == "teacher" else self.k

    @field_validator("correction", mode="before")
    @classmethod
    def _is_right(cls, value: Any) -> Any:
        name = _NAIVE_NAMES.get(value, value) if isinstance(value, str) else value
        if name in _NAIVE:
            raise ValueError(f"correction '{value}' is not offered: {_NAIVE[name]}. Use 'tail' or 'generalised'")
        return value


class CrossEntropyLoss(Reduced):
    """-log p of given texts: fine-tuning on the data's or the teacher's completions; the off-policy baseline."""

    objective: Literal["cross_entropy"]
    """Selects this loss."""


LossSpec = Annotated[
    PolicyGradientLoss | TopKLoss | FullVocabularyLoss | CrossEntropyLoss, Field(discriminator="objective")
]
