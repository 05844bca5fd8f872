"""Intervals and verdicts against truths that are known because they were planted."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hestctl.compare import decisions as d
from hestctl.compare import statistics as s
from hestctl.compare.statistics import Estimate, Measure


def coverage(draw, truth: float, repeats: int = 150) -> float:
    found = [draw(np.random.default_rng(seed)) for seed in range(repeats)]
    return sum(one.low <= truth <= one.high for one in found) / repeats


@pytest.mark.parametrize("size", [5, 16, 80])
def test_the_mean_interval_covers_the_truth(size: int) -> None:
    assert 0.90 <= coverage(lambda rng: s.mean(rng.normal(20, 5, size)), 20) <= 0.995


@pytest.mark.parametrize("batches", [4, 30])
def test_the_interval_of_joules_covers_the_truth_when_a_batch_shares_its_noise(batches: int) -> None:
    clusters = np.repeat(np.arange(batches), 4)

    def draw(rng: np.random.Generator) -> Measure:
        article = rng.lognormal(3, 0.2, batches * 4)
        mine = 0.7 * article * rng.normal(1, 0.1, batches)[clusters]
        theirs = article * rng.normal(1, 0.1, batches)[clusters]
        return s.ratio_of_means(mine, theirs, clusters)

    assert 0.88 <= coverage(draw, 0.7) <= 0.995


def test_resampling_by_sample_would_be_too_sure_where_a_batch_shares_its_noise() -> None:
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(10), 8)
    joules = 50 * rng.normal(1, 0.1, 10)[clusters]
    by_batch, by_sample = s.mean(joules, clusters), s.mean(joules)
    assert by_batch.high - by_batch.low > 2 * (by_sample.high - by_sample.low)


def test_pairing_removes_what_the_articles_share() -> None:
    rng = np.random.default_rng(2)
    article = rng.normal(30, 9, 200)
    difference = s.mean((article + rng.normal(1, 1, 200)) - (article + rng.normal(0, 1, 200)))
    assert difference.low is not None
    assert difference.low > 0.5
    assert difference.high is not None
    assert difference.high < 1.5


def test_the_same_rows_give_the_same_interval() -> None:
    values = np.random.default_rng(3).normal(10, 2, 50)
    assert s.mean(values) == s.mean(values)


def test_too_few_units_give_the_value_without_an_interval() -> None:
    two_batches = s.mean(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0, 0, 1, 1]))
    assert two_batches.value == 2.5
    assert two_batches.low is None
    assert two_batches.reason is not None
    assert s.mean(np.array([])).value is None
    assert s.ratio_of_means(np.ones(4), np.zeros(4)).value is None


def test_p99_needs_a_hundred_samples_and_says_so() -> None:
    few = s.percentile(np.arange(99.0), 99, minimum=s.TAIL_MINIMUM)
    assert few.value is None
    assert few.reason == "99 samples: a p99 needs at least 100"
    assert s.percentile(np.arange(100.0), 99, minimum=s.TAIL_MINIMUM).value is not None


def test_the_p99_interval_is_open_until_the_data_reach_beyond_it() -> None:
    assert s.percentile(np.arange(200.0), 99).high == math.inf
    closed = s.percentile(np.arange(2000.0), 99)
    assert closed.low < closed.value < closed.high < math.inf


def test_the_p99_interval_covers_the_truth() -> None:
    truth = 10 + 2 * 2.3263
    assert coverage(lambda rng: s.percentile(rng.normal(10, 2, 800), 99), truth) >= 0.92


def test_the_ratio_of_percentiles_finds_a_planted_ratio() -> None:
    rng = np.random.default_rng(4)
    clusters = np.repeat(np.arange(100), 2)
    latency = rng.gamma(20, 0.1, 100)[clusters]
    ratio = s.percentile_ratio(0.6 * latency[None], latency[None], 99, clusters)
    assert ratio.value == pytest.approx(0.6)
    assert ratio.low == pytest.approx(0.6)
    short = s.percentile_ratio(latency[None, :198], latency[None, :198], 99, clusters[:198])
    assert short.value is None
    assert "99 batches" in short.reason


def test_a_resampled_percentile_is_numpys() -> None:
    rng = np.random.default_rng(5)
    for count in (100, 130, 700):
        rows = rng.lognormal(0, 0.5, (3, count))
        drawn, counts = s._drawn_tails(rows, 99), s._draws(count)
        for place in range(0, s.TAIL_DRAWS, 100):
            resampled = [np.percentile(np.repeat(row, counts[place]), 99) for row in rows]
            assert drawn[place] == pytest.approx(resampled)


@pytest.mark.parametrize("seeds", [(1, 1), (5, 1), (3, 3)])
def test_the_ratio_of_percentiles_covers_one_where_nothing_differs(seeds: tuple[int, int]) -> None:
    """However many seeds a side has: the mean of five runs has lost its tail, the mean of tails has not."""
    clusters = np.arange(200)
    held = 0
    for place in range(60):
        rng = np.random.default_rng(place)
        first, second = (rng.lognormal(0, 0.6, (count, 200)) for count in seeds)
        ratio = s.percentile_ratio(first, second, 99, clusters)
        held += ratio.low <= 1 <= ratio.high
    assert held >= 53


def test_ranks_of_order_statistics_are_those_of_the_binomial() -> None:
    for count in (5, 25, 100, 1250):
        for share in (0.5, 0.99):
            for level in (0.025, 0.975):
                expected = int(stats.binom.ppf(level, count, share))
                assert s._binomial_quantile(level, count, share) == expected


def test_wilson_agrees_with_the_published_example() -> None:
    # Newcombe 1998, Table I: 81 of 263.
    share = s.wilson(81, 263)
    assert (round(share.low, 4), round(share.high, 4)) == (0.2553, 0.3662)
    assert s.wilson(0, 10).low == 0


def test_answers_that_are_all_alike_are_no_certainty() -> None:
    """Eight samples on which two runs agree may still hide many on which they would not."""
    few, many = (s.share_difference(np.zeros(count)).measure() for count in (8, 2000))
    assert few.value == many.value == 0
    assert few.low < -0.15 < 0.15 < few.high
    assert -0.002 < many.low < 0 < many.high < 0.002
    assert d.least_detectable_difference(s.share_difference(np.zeros(8))) > 0.15


@pytest.mark.parametrize(("first", "second"), [(0.9, 0.9), (0.95, 0.85), (0.6, 0.7)])
@pytest.mark.parametrize("count", [15, 60, 400])
def test_the_interval_of_a_share_difference_covers(first: float, second: float, count: int) -> None:
    generator = np.random.default_rng(7)
    covered = 0
    for _ in range(800):
        alike = generator.random(count) < 0.7  # the two runs' answers are not independent
        draw = generator.random(count)
        right = draw < second
        left = np.where(alike, draw < first, generator.random(count) < first)
        found = s.share_difference(left.astype(float) - right.astype(float)).measure()
        covered += found.low <= first - second <= found.high
    assert covered >= 0.93 * 800


def test_chance_is_the_share_of_the_most_frequent_label() -> None:
    assert s.chance_level(["a", "b", "b", "b"]) == 0.75


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.5, 0.4, "not inferior"),
        (0.2, 0.9, "not inferior"),
        (-3.0, -1.2, "inferior"),
        (-1.4, 0.3, "inconclusive"),
        (None, None, "inconclusive"),
    ],
)
def test_quality_verdicts(low: float | None, high: float | None, verdict: str) -> None:
    assert d.quality_verdict(Measure(0.0, low, high, 100), 1.0) == verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.60, 0.70, "less"),
        (0.97, 0.99, "same"),  # within what two runs of one model differ by
        (0.94, 0.985, "unclear"),
        (0.99, 1.01, "same"),
        (0.90, 1.10, "unclear"),
        (1.10, 1.20, "more"),
        (None, None, "unclear"),
    ],
)
def test_energy_verdicts(low: float | None, high: float | None, verdict: str) -> None:
    assert d.energy_verdict(Measure(1.0, low, high, 100)) == verdict


def test_a_larger_repeatability_asks_for_a_larger_saving() -> None:
    assert d.energy_verdict(Measure(0.93, 0.92, 0.95, 100), 0.04) == "less"
    assert d.energy_verdict(Measure(0.93, 0.92, 0.95, 100), 0.06) == "unclear"


def test_the_least_detectable_difference_has_the_power_it_claims() -> None:
    rng = np.random.default_rng(5)
    size, sd = 400, 9.0
    least = d.least_detectable_difference(s.average(rng.normal(0, sd, size)))
    assert least == pytest.approx(2.808 * sd / math.sqrt(size), rel=0.1)
    found = 0
    for _ in range(400):
        found += s.mean(rng.normal(least, sd, size)).low > 0
    assert 0.7 <= found / 400 <= 0.9
    assert d.least_detectable_difference(s.average(np.array([1.0]))) is None


def test_the_least_detectable_saving_has_the_power_it_claims() -> None:
    rng = np.random.default_rng(6)
    error = 0.02
    least = d.least_detectable_saving(Estimate(1.0, 100, True, ((error**2, 99.0),)), 0.02)
    found = [
        d.energy_verdict(
            Estimate(
                (1 - least / 100) * math.exp(rng.normal(0, error)), 100, True, ((error**2, 99.0),)
            ).measure()
        )
        == "less"
        for _ in range(600)
    ]
    assert 0.75 <= sum(found) / 600 <= 0.85


@pytest.mark.parametrize("sources", [((0.04, 9.0),), ((0.04, 9.0), (0.02, 2.0))])
def test_a_p_value_and_the_interval_agree_about_every_bound(sources: tuple[tuple[float, float], ...]) -> None:
    for estimate in (Estimate(0.7, 40, True, sources), Estimate(0.7, 40, False, sources)):
        measure = estimate.measure()
        assert estimate.p_below(measure.high) == pytest.approx(0.025, rel=1e-6)
        assert estimate.p_above(measure.low) == pytest.approx(0.025, rel=1e-6)
        assert estimate.p_below(0.7) == 0.5
        assert estimate.p_below(measure.low) == pytest.approx(0.975, rel=1e-6)


def test_the_p_value_of_one_source_is_that_of_a_t_test() -> None:
    values = np.random.default_rng(8).normal(0.4, 1, 30)
    assert s.average(values).p_above(0) == pytest.approx(
        stats.ttest_1samp(values, 0, alternative="greater").pvalue, rel=1e-6
    )


def test_holm_agrees_with_a_worked_example() -> None:
    # Holm's step-down by hand: 4 x 0.01, 3 x 0.02 raised to what came before, and so on.
    assert d.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert d.holm([0.9, 0.6]) == [1.0, 1.0]
    assert d.holm([0.02]) == [0.02]
    assert d.holm([]) == []


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_an_interval_over_seeds_covers_the_truth_however_much_trainings_vary(seeds: int) -> None:
    rng = np.random.default_rng(9)
    for spread in (0.0, 0.3, 3.0):
        covered = 0
        for _ in range(400):
            trainings = rng.normal(0, spread, seeds)
            values = trainings[:, None] + rng.normal(0, 3, (seeds, 100))
            found = s.average(values.mean(axis=0)).over_seeds(values.mean(axis=1)).measure()
            covered += found.low <= 0 <= found.high
        # 92.8 % lies two binomial errors below the nominal rate.
        assert covered / 400 >= 0.928, spread


def test_one_seed_adds_no_chance_and_too_few_batches_stay_without_an_interval() -> None:
    values = np.random.default_rng(3).normal(10, 2, 50)
    alone = s.average(values)
    assert alone.over_seeds(np.array([10.0])) == alone
    two = s.average(np.array([1.0, 2.0]), np.array([0, 1]))
    assert two.over_seeds(np.array([1.0, 2.0])).measure().low is None


@given(
    ratio=st.floats(0.05, 5.0, allow_nan=False),
    tokens=st.floats(0.05, 5.0, allow_nan=False),
)
@settings(max_examples=60, deadline=None)
def test_the_two_parts_of_a_gap_add_up(ratio: float, tokens: float) -> None:
    length, per_token = s.decompose(ratio, tokens)
    assert length + per_token == pytest.approx(100 * (1 - ratio), abs=1e-6)
    assert (length > 0) == (tokens < 1) or length == pytest.approx(0, abs=1e-9)


def test_a_saving_by_shorter_answers_alone_is_all_length() -> None:
    length, per_token = s.decompose(0.8, 0.8)
    assert length == pytest.approx(20)
    assert per_token == pytest.approx(0)
