"""Samples of a step that several teachers judge: they are there once for each, and count once all the same.

    loss     sum of w_i loss_i over the teachers i of a sample; denominators count its tokens once
    means    over samples or tokens: each teacher's word with its share w_i / sum w

Weights are the samples' own: row times mixture. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stillhouse.trainer.batch import TrainSample


def together(samples: Sequence[TrainSample]) -> list[list[int]]:
    """Indices into `samples` of each sample of the step, one for each of its teachers."""
    found: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        found.setdefault(sample.sample_id, []).append(index)
    return list(found.values())


def firsts(samples: Sequence[TrainSample]) -> list[TrainSample]:
    """Each sample of the step once."""
    return [samples[indices[0]] for indices in together(samples)]


def is_first(samples: Sequence[TrainSample]) -> np.ndarray:
    """[N] bool: those of `firsts`."""
    found = np.zeros(len(samples), dtype=bool)
    found[[indices[0] for indices in together(samples)]] = True
    return found


def shares(samples: Sequence[TrainSample]) -> np.ndarray:
    """[N] float64 what each counts in a mean over samples; those of one sample add up to 1."""
    found = np.ones(len(samples))
    for indices in together(samples):
        weights = np.array([samples[index].weight for index in indices])
        found[indices] = weights / weights.sum() if weights.any() else 1 / len(indices)
    return found


def route(samples: Sequence[TrainSample], indices: Sequence[int]) -> tuple[str, ...]:
    """The teachers of one sample, by name."""
    return tuple(sorted(samples[index].teacher for index in indices))


def num_trained(samples: Sequence[TrainSample], indices: Sequence[int]) -> int:
    """Tokens of one sample that train on the word of one teacher at least."""
    return int(np.count_nonzero(np.logical_or.reduce([samples[index].loss_mask for index in indices])))
