"""Two configurations over the samples and the seeds that both hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hestctl.compare import statistics
from hestctl.compare.loading import Entry, Samples
from hestctl.compare.statistics import Estimate, FloatArray, IntArray, Measure


@dataclass(frozen=True, slots=True)
class Paired:
    """Columns of both sides where all of them are finite, each of shape (seeds, samples).

    ``batches`` numbers the generated batches. With ``matched`` the seeds of both sides are the same, in the
    same order: what a seed shares (its order of data) then cancels.
    """

    first: Mapping[str, FloatArray]
    second: Mapping[str, FloatArray]
    batches: IntArray
    matched: bool

    def __len__(self) -> int:
        return len(self.batches)

    def pooled(self, name: str) -> tuple[FloatArray, FloatArray]:
        """The means over the seeds of both sides, one a sample."""
        return self.first[name].mean(axis=0), self.second[name].mean(axis=0)

    def ratio(self, name: str, per: str | None = None) -> Estimate:
        """Totals of the first over those of the second, both divided by their ``per`` where it is given."""
        first, second = self.pooled(name)
        if per is None:
            found = statistics.quotient(first, second, self.batches)
        else:
            first_per, second_per = self.pooled(per)
            found = statistics.double_quotient((first, first_per), (second, second_per), self.batches)
        if not found.sources:
            return found
        return self._over_seeds(found, *(_logarithms(side, name, per) for side in (self.first, self.second)))

    def tail_ratio(self, name: str, q: float) -> Measure:
        """The ``q``-th percentile (0 to 100) of the first over that of the second, seed by seed."""
        sides = self.first[name], self.second[name]
        return statistics.percentile_ratio(*sides, q, self.batches, matched=self.matched)

    def difference(self, name: str, factor: float, *, of_shares: bool) -> Estimate:
        """Mean of the first less that of the second, times ``factor``; samples vary one by one.

        ``of_shares``: every value is 0 or 1, right or wrong.
        """
        first, second = self.pooled(name)
        found = (statistics.share_difference if of_shares else statistics.average)(first - second)
        found = found.scaled(factor)
        return self._over_seeds(
            found, *(factor * side[name].mean(axis=1) for side in (self.first, self.second))
        )

    def _over_seeds(self, found: Estimate, first: FloatArray, second: FloatArray) -> Estimate:
        return found.over_seeds(first - second) if self.matched else found.over_seeds(first, second)


class Matched:
    """The samples that two entries share, in one order."""

    def __init__(self, first: Entry, second: Entry) -> None:
        self._left, self._right = _places(first.samples, second.samples)
        self._first, self._second = first.by_seed, second.by_seed
        self._batches = first.samples.batches
        self._matched = bool(first.seeds) and set(first.seeds) == set(second.seeds)
        if self._matched:
            self._second = tuple(second.by_seed[second.seeds.index(seed)] for seed in first.seeds)

    def __len__(self) -> int:
        return len(self._left)

    def paired(self, *names: str) -> Paired:
        """``names`` where all of them are finite on both sides, in every seed."""
        left = {name: np.stack([one[name][self._left] for one in self._first]) for name in names}
        right = {name: np.stack([one[name][self._right] for one in self._second]) for name in names}
        held = np.isfinite(np.vstack([*left.values(), *right.values()])).all(axis=0)
        return Paired(
            {name: values[:, held] for name, values in left.items()},
            {name: values[:, held] for name, values in right.items()},
            self._batches[self._left][held],
            self._matched,
        )


def _places(first: Samples, second: Samples) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    if first.ids == second.ids:
        every = np.arange(len(first.ids))
        return every, every
    found = np.intersect1d(
        np.array(first.ids, dtype=str), np.array(second.ids, dtype=str), return_indices=True
    )
    return found[1], found[2]


def _logarithms(side: Mapping[str, FloatArray], name: str, per: str | None) -> FloatArray:
    """Of every seed's total, over its total of ``per``. A seed whose total is zero makes it infinite."""
    with np.errstate(divide="ignore"):
        logarithms: FloatArray = np.log(side[name].sum(axis=1))
        return logarithms if per is None else logarithms - np.log(side[per].sum(axis=1))
