"""Intervals and verdicts over paired samples; numpy and scipy only.

Energy noise is shared by the samples of one generated batch (the meter sees the batch), so energies
and latencies are resampled by batch (``clusters``), scores by sample. Every random draw has a fixed
seed: the same rows give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]
SumStatistic: TypeAlias = Callable[[FloatArray], FloatArray]
"""Column totals, shape (draws, columns), to one value a draw."""

QualityVerdict: TypeAlias = Literal["not inferior", "inferior", "inconclusive"]
EnergyVerdict: TypeAlias = Literal["less", "more", "same", "unclear"]

LEVEL = 0.95
RESAMPLES = 4000
"""Fewer, down to a quarter, where the samples are so many that it would take minutes."""
SMALL = 8
"""Below this many clusters the bootstrap is too narrow; a jackknife t interval is used instead."""
FEWEST = 3
"""With two clusters a t interval is twenty times as wide as their distance: no interval is given."""
TAIL_MINIMUM = 100
"""Fewest samples for a 99th percentile: below, it is the maximum under another name."""
REPEATABILITY = 0.02
"""Two runs of the same artefact on the same board differ by up to 2 % in mean joules (temperature,
clocks, the counter's own step): no interval over samples of one run can see that."""
SAME_WITHIN = 0.05
"""Energies whose ratio surely lies within 5 % of 1 are called the same."""

_SEED = 20_251_101


@dataclass(frozen=True, slots=True)
class Measure:
    """One number with its 95 % interval, or ``None`` with the reason why there is none.

    ``low`` and ``high`` are ``None`` when no interval can be given; ``high`` is infinite when the
    data bound the value from below only. ``n`` counts samples.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    reason: str | None = None

    def scaled(self, factor: float) -> Measure:
        """The same measure in another unit (``factor`` > 0)."""

        def times(number: float | None) -> float | None:
            return None if number is None else number * factor

        return Measure(times(self.value), times(self.low), times(self.high), self.n, self.reason)


def absent(reason: str, n: int = 0) -> Measure:
    """A measure that no row holds, and why."""
    return Measure(None, n=n, reason=reason)


def of_sums(
    columns: Sequence[FloatArray], statistic: SumStatistic, clusters: IntArray | None = None
) -> Measure:
    """A function of column totals with its 95 % interval, resampled by cluster.

    Means, ratios of means and ratios of ratios are all functions of totals. Bootstrap percentiles
    are widened for small counts (Hesterberg 2015, "expanded percentile"); under ``SMALL`` clusters
    a jackknife t interval stands in.
    """
    matrix = np.column_stack(columns).astype(np.float64)
    size = len(matrix)
    if size == 0:
        return absent("no samples")
    totals = matrix if clusters is None else _cluster_totals(matrix, clusters)
    value = float(statistic(totals.sum(axis=0, keepdims=True))[0])
    units = len(totals)
    if not math.isfinite(value):
        return absent("the divisor is zero", size)
    if units < FEWEST:
        return Measure(
            value, n=size, reason=f"an interval needs at least {FEWEST} independent samples or batches"
        )
    if units < SMALL:
        low, high = _jackknife(totals, statistic, value)
    else:
        draws = _bootstrap_totals(totals, statistic)
        tail = _expanded_tail(units)
        low, high = (float(edge) for edge in np.quantile(draws, [tail, 1 - tail]))
    return Measure(value, low, high, size)


def mean(values: FloatArray, clusters: IntArray | None = None) -> Measure:
    """The mean of ``values`` (their unit) with its interval."""
    return of_sums([values, np.ones(len(values))], _quotient, clusters)


def ratio_of_means(
    numerator: FloatArray, denominator: FloatArray, clusters: IntArray | None = None
) -> Measure:
    """The ratio of the means of two paired columns (no unit) with its interval."""
    return of_sums([numerator, denominator], _quotient, clusters)


def ratio_of_ratios(
    first: tuple[FloatArray, FloatArray],
    second: tuple[FloatArray, FloatArray],
    clusters: IntArray | None = None,
) -> Measure:
    """The ratio of two quotients of totals, such as joules per new token of two runs."""
    return of_sums([*first, *second], _double_quotient, clusters)


def mean_difference(first: FloatArray, second: FloatArray) -> Measure:
    """The mean paired difference ``first - second`` (their unit) with its interval."""
    return mean(first - second)


def share_difference(differences: FloatArray) -> Measure:
    """The mean paired difference of shares (each difference -1 to 1), with the interval of Agresti and Min.

    Where two runs answer all samples alike the bootstrap sees no spread and would call eight samples
    certainty (Agresti and Min 2005, Statistics in Medicine 24, on matched proportions).
    """
    size = len(differences)
    if size == 0:
        return absent("no samples")
    padded = as_if_two_more(differences)
    half = float(stats.norm.ppf((1 + LEVEL) / 2) * padded.std() / math.sqrt(len(padded)))
    value, centre = float(differences.mean()), float(padded.mean())
    return Measure(value, max(-1.0, min(value, centre - half)), min(1.0, max(value, centre + half)), size)


def as_if_two_more(differences: FloatArray) -> FloatArray:
    """Paired differences of shares with two pairs more: half a sample in each cell of the table."""
    return np.append(differences, [math.sqrt(0.5), -math.sqrt(0.5)])


def percentile(values: FloatArray, q: float, clusters: IntArray | None = None, minimum: int = 1) -> Measure:
    """The ``q``-th percentile (0 to 100) with a distribution-free interval from order statistics.

    Where the data end before the interval does, ``high`` is infinite: the true percentile may lie
    beyond the largest value seen.
    """
    size = len(values)
    if size < max(minimum, 1):
        return absent(f"{size} samples: a p{q:g} needs at least {minimum}", size)
    value = float(np.percentile(values, q))
    units = np.sort(values if clusters is None else _cluster_means(values, clusters))
    count = len(units)
    lower_rank = int(stats.binom.ppf((1 - LEVEL) / 2, count, q / 100))
    upper_rank = int(stats.binom.ppf((1 + LEVEL) / 2, count, q / 100)) + 1
    low = float(units[lower_rank - 1]) if lower_rank >= 1 else -math.inf
    high = float(units[upper_rank - 1]) if upper_rank <= count else math.inf
    # Interpolation may set the value just beyond the rank that bounds it.
    return Measure(value, min(low, value), max(high, value), size)


def percentile_ratio(
    numerator: FloatArray, denominator: FloatArray, q: float, clusters: IntArray, minimum: int = TAIL_MINIMUM
) -> Measure:
    """The ratio of two paired ``q``-th percentiles, with a bootstrap interval over batches."""
    size = len(numerator)
    if size < minimum:
        return absent(f"{size} paired samples: a p{q:g} needs at least {minimum}", size)
    first, second = _cluster_means(numerator, clusters), _cluster_means(denominator, clusters)
    value = float(np.percentile(numerator, q) / np.percentile(denominator, q))
    if len(first) < SMALL:
        return Measure(value, n=size, reason=f"{len(first)} batches alone give no interval")
    index = _resampled(len(first), min(RESAMPLES, 1000))
    draws = np.percentile(first[index], q, axis=1) / np.percentile(second[index], q, axis=1)
    tail = _expanded_tail(len(first))
    low, high = (float(edge) for edge in np.quantile(draws, [tail, 1 - tail]))
    return Measure(value, min(low, value), max(high, value), size)


def wilson(successes: float, size: int) -> Measure:
    """The share ``successes / size`` (0 to 1) with its Wilson score interval."""
    if size == 0:
        return absent("no samples")
    z = float(stats.norm.ppf((1 + LEVEL) / 2))
    share = successes / size
    centre = (share + z * z / (2 * size)) / (1 + z * z / size)
    half = z / (1 + z * z / size) * math.sqrt(share * (1 - share) / size + z * z / (4 * size * size))
    return Measure(share, max(0.0, centre - half), min(1.0, centre + half), size)


def chance_level(labels: Sequence[str]) -> float:
    """The accuracy (0 to 1) of always answering the most frequent label."""
    counts = np.unique(np.asarray(labels, dtype=str), return_counts=True)[1]
    return float(counts.max() / counts.sum())


def quality_verdict(difference: Measure, margin: float) -> QualityVerdict:
    """Non-inferiority of a paired difference (higher is better) at ``margin``, in its unit."""
    if difference.low is None or difference.high is None:
        return "inconclusive"
    if difference.low > -margin:
        return "not inferior"
    return "inferior" if difference.high < -margin else "inconclusive"


def energy_verdict(ratio: Measure) -> EnergyVerdict:
    """Whether a ratio of joules is below 1 beyond its interval and the meter's repeatability."""
    if ratio.low is None or ratio.high is None:
        return "unclear"
    low, high = ratio.low * (1 - REPEATABILITY), ratio.high * (1 + REPEATABILITY)
    if high < 1:
        return "less"
    if low > 1:
        return "more"
    return "same" if low > 1 - SAME_WITHIN and high < 1 + SAME_WITHIN else "unclear"


def least_detectable_difference(differences: FloatArray) -> float | None:
    """The smallest true mean difference found with 80 % power by a one-sided 5 % test.

    In the unit of the paired ``differences``; ``None`` below two pairs.
    """
    size = len(differences)
    if size < 2:
        return None
    quantiles = float(stats.t.ppf(0.95, size - 1) + stats.t.ppf(0.80, size - 1))
    return quantiles * float(np.std(differences, ddof=1)) / math.sqrt(size)


def decompose(ratio: float, token_ratio: float) -> tuple[float, float]:
    """Split the percent of joules saved into an output-length part and a per-token part.

    ``ratio`` is joules over joules, ``token_ratio`` new tokens over new tokens. The logarithms add
    up, and are scaled so that the two parts sum to ``100 * (1 - ratio)``.
    """
    total, length = math.log(ratio), math.log(token_ratio)
    # (ratio - 1) / log(ratio) tends to 1 as the ratio does.
    scale = (ratio - 1) / total if abs(total) > 1e-9 else 1.0
    return -100 * scale * length, -100 * scale * (total - length)


def pool_seeds(ids: Sequence[Sequence[str]], tables: Sequence[FloatArray]) -> tuple[list[str], FloatArray]:
    """The mean over seeds of every sample that all seeds hold.

    ``tables`` are (samples, columns) matrices, one a seed, in the order of ``ids``; NaN (not
    measured) in one seed makes the pooled value NaN: seeds are never averaged over unequal samples.
    """
    shared = set(ids[0]).intersection(*ids[1:])
    kept = [name for name in ids[0] if name in shared]
    places = [{name: place for place, name in enumerate(names)} for names in ids]
    aligned = [table[[place[name] for name in kept]] for table, place in zip(tables, places, strict=True)]
    return kept, np.asarray(np.mean(aligned, axis=0), dtype=np.float64)


def _quotient(totals: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(totals[:, 0] / totals[:, 1], dtype=np.float64)


def _double_quotient(totals: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = (totals[:, 0] / totals[:, 1]) / (totals[:, 2] / totals[:, 3])
    return np.asarray(quotient, dtype=np.float64)


def _cluster_totals(matrix: FloatArray, clusters: IntArray) -> FloatArray:
    codes = np.unique(clusters, return_inverse=True)[1]
    totals = np.zeros((int(codes.max()) + 1, matrix.shape[1]))
    np.add.at(totals, codes, matrix)
    return totals


def _cluster_means(values: FloatArray, clusters: IntArray) -> FloatArray:
    totals = _cluster_totals(np.column_stack([values, np.ones(len(values))]), clusters)
    return np.asarray(totals[:, 0] / totals[:, 1], dtype=np.float64)


def _resampled(units: int, resamples: int) -> NDArray[np.intp]:
    return np.random.default_rng(_SEED).integers(0, units, size=(resamples, units), dtype=np.intp)


def _bootstrap_totals(totals: FloatArray, statistic: SumStatistic) -> FloatArray:
    units = len(totals)
    resamples = max(RESAMPLES // 4, min(RESAMPLES, 10_000_000 // units))
    chunk = max(1, 4_000_000 // units)
    generator = np.random.default_rng(_SEED)
    draws = []
    for start in range(0, resamples, chunk):
        index = generator.integers(0, units, size=(min(chunk, resamples - start), units))
        sums = np.column_stack([column[index].sum(axis=1) for column in totals.T])
        draws.append(statistic(sums))
    drawn = np.concatenate(draws)
    return drawn[np.isfinite(drawn)]


def _expanded_tail(units: int) -> float:
    t = float(stats.t.ppf((1 - LEVEL) / 2, units - 1))
    return float(stats.norm.cdf(math.sqrt(units / (units - 1)) * t))


def _jackknife(totals: FloatArray, statistic: SumStatistic, value: float) -> tuple[float, float]:
    units = len(totals)
    left_out = statistic(totals.sum(axis=0) - totals)
    spread = float(np.sum((left_out - left_out.mean()) ** 2))
    if not math.isfinite(spread):
        return -math.inf, math.inf
    half = float(stats.t.ppf((1 + LEVEL) / 2, units - 1)) * math.sqrt((units - 1) / units * spread)
    return value - half, value + half
