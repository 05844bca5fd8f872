"""From estimates to decisions: thresholds, a family of claims, and what could have been found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

from hestctl.compare.statistics import LEVEL, Estimate, Measure

QualityVerdict: TypeAlias = Literal["not inferior", "inferior", "inconclusive"]
EnergyVerdict: TypeAlias = Literal["less", "more", "same", "unclear"]

ALPHA = (1 - LEVEL) / 2
"""What a one-sided p-value is held against: the test that a 95 % interval is, so that a claim never
stands against its own interval."""
POWER = 0.80
"""The chance with which a least detectable difference would be found."""
REPEATABILITY = 0.02
"""Two runs of the same artefact on the same board differ by up to 2 % in mean joules (temperature,
clocks, the counter's own step): no interval over samples of one run can see that."""
SAME_WITHIN = 0.05
"""Energies whose ratio surely lies within 5 % of 1 are called the same."""

ENERGY_WORDS: Mapping[EnergyVerdict, str] = {
    "less": "less energy",
    "more": "more energy",
    "same": "no difference",
    "unclear": "inconclusive",
}


def quality_verdict(difference: Measure, margin: float) -> QualityVerdict:
    """Non-inferiority of a paired difference (higher is better) at ``margin``, in its unit."""
    if difference.low is None or difference.high is None:
        return "inconclusive"
    if difference.low > -margin:
        return "not inferior"
    return "inferior" if difference.high < -margin else "inconclusive"


def energy_verdict(ratio: Measure, repeatability: float = REPEATABILITY) -> EnergyVerdict:
    """Whether a ratio of joules lies below 1 beyond its interval and the ``repeatability`` of a run."""
    if ratio.low is None or ratio.high is None:
        return "unclear"
    low, high = ratio.low / (1 + repeatability), ratio.high * (1 + repeatability)
    if high < 1:
        return "less"
    if low > 1:
        return "more"
    return "same" if low > 1 - SAME_WITHIN and high < 1 + SAME_WITHIN else "unclear"


def p_fewer_joules(ratio: Estimate, repeatability: float) -> float | None:
    """One-sided p-value of "no fewer joules than two runs of one model may differ by"."""
    return ratio.p_below(1 / (1 + repeatability))


def p_not_inferior(difference: Estimate, margin: float) -> float | None:
    """One-sided p-value of "worse by ``margin`` or more" (Schuirmann's lower test)."""
    return difference.p_above(-margin)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of one family, adjusted so that holding each against a level holds them all to it.

    Holm 1979: the smallest is taken times their number, the next times one less, and none may end below one
    before it. No independence is needed.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def least_detectable_difference(difference: Estimate) -> float | None:
    """The true difference (in its unit) that a test against zero would find with 80 % power."""
    return _reach(difference) if difference.sources else None


def sample_share(difference: Estimate) -> float | None:
    """How much of the square of the least detectable difference is the samples' (0 to 1), not the seeds'."""
    if not difference.sources:
        return None
    alone = replace(difference, sources=difference.sources[:1])
    return (_reach(alone) / _reach(difference)) ** 2 if _reach(difference) else None


def least_detectable_saving(ratio: Estimate, repeatability: float) -> float | None:
    """The true saving in percent of joules that would be called one with 80 % power, in a pair by itself."""
    if not ratio.sources:
        return None
    return 100 * (1 - math.exp(-_reach(ratio)) / (1 + repeatability))


def _reach(estimate: Estimate) -> float:
    """How far beyond a bound the truth must lie for a test at ``ALPHA`` to have the power asked for."""
    return estimate.half_width(1 - ALPHA) + estimate.half_width(POWER)
