"""Training-curve values of one optimizer step, from the measures of its rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from stillhouse.trainer.batch import MIN_LOG_Q, RowMeasures, TrainSample
from stillhouse.trainer.masks import token_metrics
from stillhouse.trainer.mixtures import firsts, is_first, shares
from stillhouse.trainer.packing import MicroBatch
from stillhouse.v1 import rollout_pb2


@dataclass(eq=False)
class StepMeasures:
    """Collects the rows of all micro-batches of a step; the student's terms are those before the update. Tokens that
    several teachers judge are in several of them and count once; in the mean of the KLs each word has its share."""

    samples: Sequence[TrainSample]
    teachers: Collection[str] = ()
    """Names of the job's teachers: each of several has metrics of its own."""
    counts_forbidden: bool = True
    """False: the objective takes log q as it is, from the whole vocabulary."""
    loss: float = 0.0
    reverse_kl: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """Teacher -> [R] per micro-batch."""
    shares: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """The same rows' shares in a mean over tokens."""
    entropy: list[np.ndarray] = field(default_factory=list)
    gap: list[np.ndarray] = field(default_factory=list)
    """|rollout_logprobs - student_logprobs|."""
    gate: list[np.ndarray] = field(default_factory=list)
    forbidden: list[np.ndarray] = field(default_factory=list)
    """[R] bool per micro-batch: log q of the token is too low to be taken as it is."""

    def add(self, batch: MicroBatch, rows: RowMeasures) -> None:
        """Take over the measures of a micro-batch; rows of weight 0 were not computed and have none."""
        trained = batch.weights != 0
        if not trained.any():
            return
        self.loss += rows.loss
        self.reverse_kl.setdefault(batch.teacher, []).append(rows.reverse_kl[trained])
        self.shares.setdefault(batch.teacher, []).append(self._shares[batch.sample_of_row][trained])
        self.gate.append(rows.gate[trained])
        if self.counts_forbidden:
            self.forbidden.append((batch.teacher_logprobs < MIN_LOG_Q)[trained])
        is_counted = trained & self._is_first[batch.sample_of_row]
        self.entropy.append(rows.entropy[is_counted])
        self.gap.append(np.abs(batch.rollout_logprobs - rows.logprobs)[is_counted])

    @cached_property
    def _shares(self) -> np.ndarray:
        return shares(self.samples)

    @cached_property
    def _is_first(self) -> np.ndarray:
        return is_first(self.samples)

    def summary(self, policy_version: int) -> dict[str, float]:
        """The step's metrics; `policy_version` is that of the weights that were trained."""
        metrics = {"loss/total": self.loss, "tokens/trained": float(sum(len(rows) for rows in self.entropy))}
        if self.entropy:
            by_teacher = {teacher: known for teacher, rows in self.reverse_kl.items() if len(known := _known(rows))}
            gap, gate = _known(self.gap), np.concatenate(self.gate)
            metrics["student/entropy"] = _mean(np.concatenate(self.entropy))
            if by_teacher:
                metrics["loss/reverse_kl/mean"] = self._mean_kl()
            if len(gap):
                metrics |= {"mismatch/logprob_abs_mean": _mean(gap), "mismatch/logprob_abs_max": float(gap.max())}
            if (gate != 1).any():
                metrics |= {"gate/mean": _mean(gate), "gate/dropped_fraction": _mean(gate == 0)}
            if self.forbidden and (forbidden := np.concatenate(self.forbidden)).any():
                metrics["teacher/forbidden_fraction"] = _mean(forbidden)
            if len(self.teachers) > 1:
                metrics |= {f"loss/reverse_kl/{teacher}": _mean(rows) for teacher, rows in by_teacher.items()}
        if self.samples:
            samples = firsts(self.samples)
            own = [sample for sample in samples if sample.is_on_policy]
            truncated = [sample.finish_reason == rollout_pb2.FINISH_REASON_LENGTH for sample in samples]
            if own:
                staleness = [policy_version - sample.oldest_policy_version for sample in own]
                metrics |= {"staleness/max": float(max(staleness)), "staleness/mean": float(np.mean(staleness))}
            metrics |= {
                "tokens/on_policy_fraction": _share(own, samples),
                "completion/length_mean": float(np.mean([len(sample.completion_ids) for sample in samples])),
                "completion/truncated_fraction": float(np.mean(truncated)),
                **token_metrics(self.samples, self.teachers),
            }
        return metrics

    def _mean_kl(self) -> float:
        """Per token, nats; of rows about which something is known."""
        kls = np.concatenate([values for rows in self.reverse_kl.values() for values in rows])
        weights = np.concatenate([values for rows in self.shares.values() for values in rows])
        is_known = ~np.isnan(kls)
        return float(np.average(kls[is_known].astype(np.float64), weights=weights[is_known]))


def _known(rows: Sequence[np.ndarray]) -> np.ndarray:
    """[R] the values that are there: NaN stands for what nobody said of a row."""
    values = np.concatenate(rows)
    return values[~np.isnan(values)]


def _share(part: Sequence[TrainSample], whole: Sequence[TrainSample]) -> float:
    """Trained tokens of `part` / of `whole`."""
    return sum(sample.num_loss_tokens for sample in part) / max(1, sum(sample.num_loss_tokens for sample in whole))


def _mean(rows: np.ndarray) -> float:
    return float(rows.mean(dtype=np.float64))
