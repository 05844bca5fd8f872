"""Shares of a batch and the two phases of a sample."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hestctl.energy.counter import Unavailable
from hestctl.energy.model import PhaseJoules
from hestctl.energy.shares import PhaseSplit, apportion, share_batch, split_phases

WEIGHTS = st.lists(st.floats(0, 1e6), min_size=1, max_size=64).filter(lambda weights: sum(weights) > 1e-6)


@given(st.floats(0, 1e9), st.floats(0, 1e6), WEIGHTS)
def test_shares_and_their_errors_add_up(total_j: float, error_j: float, weights: list[float]) -> None:
    shares = apportion(total_j, error_j, weights)
    assert math.fsum(joules for joules, _ in shares) == pytest.approx(total_j, rel=1e-9, abs=1e-9)
    assert math.fsum(error for _, error in shares) == pytest.approx(error_j, rel=1e-9, abs=1e-9)
    assert all(joules >= 0 and error >= 0 for joules, error in shares)


@given(st.floats(1, 1e6), st.floats(0, 1e3), WEIGHTS, st.floats(0.5, 1000))
def test_shares_follow_the_weights_and_not_their_scale(
    total_j: float, error_j: float, weights: list[float], scale: float
) -> None:
    shares = apportion(total_j, error_j, weights)
    scaled = apportion(total_j, error_j, [weight * scale for weight in weights])
    for (joules, _), (again, _), weight in zip(shares, scaled, weights, strict=True):
        assert joules == pytest.approx(again, rel=1e-9, abs=1e-12)
        assert joules == pytest.approx(total_j * weight / sum(weights), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0, 2.0], [math.nan], [math.inf, 1.0]])
def test_senseless_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        apportion(10.0, 1.0, weights)


def rows(count: int, noise_j: float = 0.0, seed: int = 0) -> list[tuple[int, int, float]]:
    """Samples that cost 0.03 J per prompt token and 2.5 J per new token."""
    rng = random.Random(seed)
    lengths = [(rng.randrange(100, 4000), rng.randrange(10, 128)) for _ in range(count)]
    return [(p, n, 0.03 * p + 2.5 * n + rng.gauss(0, noise_j)) for p, n in lengths]


def test_phases_are_recovered() -> None:
    split = split_phases(rows(12))
    assert isinstance(split, PhaseSplit)
    assert split.prompt_j_per_token == pytest.approx(0.03)
    assert split.new_j_per_token == pytest.approx(2.5)
    assert split.samples == 12
    assert split.prompt_error_j == pytest.approx(0, abs=1e-6)


def test_standard_errors_cover_the_truth_as_often_as_they_say() -> None:
    prompt_inside = new_inside = 0
    for seed in range(200):
        split = split_phases(rows(30, noise_j=8.0, seed=seed))
        assert isinstance(split, PhaseSplit)
        new_inside += abs(split.new_j_per_token - 2.5) <= 2 * split.new_error_j
        prompt_inside += abs(split.prompt_j_per_token - 0.03) <= 2 * split.prompt_error_j
    assert 0.90 <= prompt_inside / 200 <= 0.99
    assert 0.90 <= new_inside / 200 <= 0.99


@pytest.mark.parametrize(
    "samples, says",
    [
        (rows(2), "at least 3"),
        ([(100 * k, 10 * k, 40.0 * k) for k in range(1, 9)], "one proportion"),
        ([(100, 10, 40.0)] * 8, "one proportion"),
        ([(1000 * k + k % 3, 100 * k, 40.0 * k) for k in range(1, 9)], "one proportion"),
        ([(100, 0, 40.0), (200, 0, 80.0), (50, 0, 20.0)], "one proportion"),
        ([(100, 50, 130.0), (4000, 50, 20.0), (2000, 50, 70.0)], "negative joules per prompt"),
        ([(100, 100, 10.0), (110, 10, 90.0), (105, 50, 40.0)], "negative joules per new"),
    ],
)
def test_phases_that_cannot_be_told_apart_are_not(samples: list[tuple[int, int, float]], says: str) -> None:
    split = split_phases(samples)
    assert isinstance(split, Unavailable) and says in split.reason


def test_a_batch_is_shared_by_prompt_tokens_for_prefill_and_new_tokens_for_decode() -> None:
    # A batch of 90 J, of which the model gives a third to prefill.
    shares = share_batch(90.0, 9.0, [100, 200], [10, 30], PhaseJoules(20.0, 40.0))
    assert [s.prefill_j for s in shares] == pytest.approx([10.0, 20.0])
    assert [s.decode_j for s in shares] == pytest.approx([15.0, 45.0])
    assert [s.energy_j for s in shares] == pytest.approx([25.0, 65.0])
    assert sum(s.error_j or 0.0 for s in shares) == pytest.approx(9.0)
    assert [s.error_j for s in shares] == pytest.approx([2.5, 6.5])


def test_without_a_model_every_token_weighs_the_same_and_phases_are_not_told_apart() -> None:
    shares = share_batch(90.0, None, [100, 200], [50, 100], None)
    assert [s.energy_j for s in shares] == pytest.approx([30.0, 60.0])
    assert all(s.prefill_j is None and s.decode_j is None and s.error_j is None for s in shares)


def test_labels_are_all_prefill() -> None:
    (share,) = share_batch(5.0, 0.1, [64], [1], PhaseJoules(2.0, 0.0))
    assert (share.prefill_j, share.decode_j) == (5.0, 0.0)
