"""A claimed group: its open samples, and what of them the next holder would find."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Final

from stillhouse.core import tracing
from stillhouse.core.queue.streams import Entry
from stillhouse.core.rollouts import SCHEMA_VERSION
from stillhouse.sampler.generation import Completion
from stillhouse.sampler.messages import make_partial, resumed
from stillhouse.v1 import rollout_pb2 as pb

PART_BYTES: Final = 1 << 19
"""Largest part, about: half of an entry."""
TOKEN_BYTES: Final = 16
"""Of a token in a part: id, log-probability, perhaps entropy, and what frames them; likeliest tokens come on top."""


@dataclass(slots=True, eq=False)
class Work:
    """A claimed group and what is still to be done of it.

    opened -> served, sample by sample -> done        moved by the shift that holds the claim
                 |
                 +- halted: handed back, or left to who took it over
    """

    entry: Entry
    group: pb.PromptGroup
    completions: dict[int, Completion]
    """Open samples by index; one leaves when its end is handed over."""
    halted: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when nothing more of it is to be written."""
    is_writing: bool = False
    is_kept: bool = True
    """What it gains is kept beside the entry. Not where something unreadable lies: no part can follow that."""
    num_parts: int = 0
    """Parts that are kept beside the entry."""
    _kept: dict[int, int] = field(default_factory=dict)
    """Tokens of each open sample that are in them."""
    _sent: tuple[bytes, dict[int, int]] | None = None
    """A part on its way and what will be kept with it. The same one is sent until its answer arrives."""

    @property
    def exact_version(self) -> int | None:
        """Deterministic mode: these weights and no others, the group is its own batch, and nothing is continued."""
        return self.group.exact_policy_version_plus_one - 1 if self.group.exact_policy_version_plus_one else None

    @property
    def pinned_version(self) -> int | None:
        """These weights and no others, whatever is written beside it; None = any that are new enough."""
        if self.group.pinned_policy_version_plus_one:
            return self.group.pinned_policy_version_plus_one - 1
        return self.exact_version

    @property
    def is_alone(self) -> bool:
        """Nothing else is written beside it: its batch must be itself, or it may be what ends its samplers."""
        return self.exact_version is not None or self.entry.is_suspect

    @property
    def min_version(self) -> int:
        """Oldest weights that may go on: what the group allows, and nothing older than what has written already."""
        spans = [span for completion in self.completions.values() for span in completion.spans]
        return max([self.group.min_policy_version, *(weights.policy_version for _, weights in spans)])

    def must_wait(self, others: Iterable[Work], version: int | None) -> bool:
        """Open groups need other weights than this one does. `version` = the weights that are there.

        Weights stay while groups are open that are pinned to them, and never go back under a completion.
        """
        pinned, others = self.pinned_version, list(others)
        if pinned is None:
            return any(o.pinned_version is not None and o.pinned_version < self.min_version for o in others)
        is_behind = version is not None and version > pinned
        return any(is_behind or o.min_version > pinned or o.pinned_version not in (None, pinned) for o in others)

    def span(self) -> AbstractContextManager[tracing.Span]:
        """Around its writing: a child of what planned it, and linked to it."""
        about = {
            **tracing.TAKEN_PROMPTS,
            "messaging.message.id": self.entry.id,
            "stillhouse.samples": len(self.completions),
            "stillhouse.deliveries": self.entry.deliveries,
            "stillhouse.was_held": self.entry.was_held,
        }
        asked, group = self.group.traceparent, self.group.group_id
        return tracing.span("sample", kind="consumer", parent=asked, links=[asked], attributes=about, group=group)

    def resume(self, parts: Sequence[bytes]) -> None:
        """Go on from what an earlier holder kept.

        Raises:
            WireError, DecodeError: the parts cannot be read; nothing is taken from them.
        """
        of_sample: dict[int, list[pb.PartialCompletion]] = {index: [] for index in self.completions}
        for part in parts:
            for partial in pb.PartialGroup.FromString(part).completions:
                of_sample.get(partial.index, []).append(partial)
        found = {i: resumed(self.completions[i].request, partials) for i, partials in of_sample.items()}
        self.completions, self.num_parts = found, len(parts)
        self._kept = {index: len(completion.completion_ids) for index, completion in found.items()}

    def next_part(self) -> bytes:
        """What its samples gained since the last part; empty if nothing did. The end of a sample is not kept: it is
        handed over.
        """
        if self._sent is None:
            part, kept = pb.PartialGroup(schema_version=SCHEMA_VERSION), dict(self._kept)
            open_ = {index: c for index, c in self.completions.items() if not c.finish_reason}
            for index, completion in open_.items():
                start, end = self._kept.get(index, 0), len(completion.completion_ids)
                end = min(end, start + _most_tokens(open_.values()))
                if end > start:
                    part.completions.append(make_partial(index, completion, start, end))
                    kept[index] = end
            if not part.completions:
                return b""
            self._sent = (part.SerializeToString(), kept)
        return self._sent[0]

    def part_is_kept(self) -> None:
        """The part on its way has arrived."""
        if self._sent is not None:
            self._kept, self._sent = self._sent[1], None
            self.num_parts += 1


def _most_tokens(completions: Iterable[Completion]) -> int:
    """Of each of them in one part."""
    return max(1, PART_BYTES // sum(TOKEN_BYTES + 4 * completion.request.record_top_k for completion in completions))
