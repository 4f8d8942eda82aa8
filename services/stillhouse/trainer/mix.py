"""Which row of the data is drawn next: in passes over all rows, or from each domain in its share (`data.mix`).

Both are pure functions of the job's seed and the number of the draw, so that a claim that takes over draws the same. No
torch here. core/oracle/stages.py has its own code for the same.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Protocol

from stillhouse.core.errors import PreflightError


class Draws(Protocol):
    """Rows of the data by number of the draw, from 0."""

    def __getitem__(self, number: int) -> int: ...


def draws(domains: Sequence[str], seed: int | str, *, shuffle: bool, mix: Mapping[str, float] | None) -> Draws:
    """`domains` has the domain of each row; `mix` as in `DataSpec`.

    Raises:
        PreflightError: the mix has a share for a domain without rows.
    """
    if mix is None:
        return Passes(range(len(domains)), f"{seed}/pass", shuffle)
    rows = {name: [row for row, domain in enumerate(domains) if domain == name] for name in mix}
    for name in mix:
        if not rows[name]:
            raise PreflightError(
                f"'data.mix' has a share for '{name}', and no row is routed to it; there are rows for "
                f"{sorted(set(domains))}"
            )
    return Mixed({name: Passes(rows[name], f"{seed}/pass/{name}", shuffle) for name in mix}, Turns(mix))


class Passes:
    """Rows in passes over all of them: a new order in each, or always the given one."""

    def __init__(self, rows: Sequence[int], seed: str, shuffle: bool) -> None:
        self._rows = rows
        self._seed = seed
        self._shuffle = shuffle
        self._pass = -1
        self._order: list[int] = []

    def __getitem__(self, number: int) -> int:
        turn, position = divmod(number, len(self._rows))
        if turn != self._pass:
            self._order = list(self._rows)
            if self._shuffle:
                random.Random(f"{self._seed}/{turn}").shuffle(self._order)
            self._pass = turn
        return self._order[position]


class Mixed:
    """Rows of several domains, each in passes of its own."""

    def __init__(self, domains: Mapping[str, Passes], turns: Turns) -> None:
        self._domains = domains
        self._turns = turns

    def __getitem__(self, number: int) -> int:
        name, earlier = self._turns[number]
        return self._domains[name][earlier]


class Turns:
    """Whose turn it is: always that of the domain which is furthest behind its share.

    After `period` turns (20 for 0.35, 0.35, 0.3) each domain has had its share exactly, and all begins again.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        self._weights = whole_numbers(shares)
        self.period = sum(self._weights.values())
        self._begin()

    def __getitem__(self, number: int) -> tuple[str, int]:
        """(domain, how many turns it had before)."""
        periods, position = divmod(number, self.period)
        if position < self._given - 1:
            self._begin()
        while self._given <= position:
            self._give()
        return self._last, periods * self._weights[self._last] + self._turns[self._last] - 1

    def _begin(self) -> None:
        self._given = 0
        """Turns of this period so far."""
        self._last = ""
        self._turns = dict.fromkeys(self._weights, 0)
        self._behind = dict.fromkeys(self._weights, 0)
        """Turns that a domain should have had by now and has not, times `period`."""

    def _give(self) -> None:
        for name, weight in self._weights.items():
            self._behind[name] += weight
        self._last = max(self._behind, key=self._behind.__getitem__)
        self._behind[self._last] -= self.period
        self._turns[self._last] += 1
        self._given += 1


def whole_numbers(shares: Mapping[str, float]) -> dict[str, int]:
    """The shares in the smallest whole numbers, by name: 0.35, 0.35, 0.3 are 7, 7, 6. Decimals count as written."""
    exact = {name: Fraction(repr(float(shares[name]))) for name in sorted(shares)}
    numerators, denominators = [share.numerator for share in exact.values()], [s.denominator for s in exact.values()]
    unit = Fraction(math.gcd(*numerators), math.lcm(*denominators))
    return {name: int(share / unit) for name, share in exact.items()}
