"""Simulated runs with planted effects, through the pairs that the command makes: how often it is wrong.

Rates are held against what is promised, give or take the chance of so few repetitions; ``truth.py`` asks
the same questions at length.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from truth import (
    EDGE,
    ONE,
    THREE,
    VARIED,
    WORSE,
    World,
    claims_found,
    difference_covered,
    false_claims,
    false_claims_of_eight,
    false_equality,
    ratio_covered,
    savings_found,
)

TIMES = 300
HEAVY = {"batch": 0.15, "tail": 3}


def chance(rate: float, times: int = TIMES) -> float:
    """Two and a half binomial standard errors."""
    return 2.5 * math.sqrt(rate * (1 - rate) / times)


@pytest.mark.parametrize("world", [ONE, THREE], ids=["one seed", "three seeds"])
def test_no_saving_is_called_one_by_chance(world: World) -> None:
    assert false_claims(world, TIMES) <= 0.025 + chance(0.025)


@pytest.mark.parametrize("size", [20, 500])
def test_what_two_runs_of_one_model_differ_by_is_no_saving(size: int) -> None:
    assert false_claims(replace(ONE, size=size), TIMES, EDGE) <= 0.025 + chance(0.025)


def test_eight_pairs_together_are_wrong_no_more_often_than_one() -> None:
    assert false_claims_of_eight(replace(ONE, score=0.5), TIMES, EDGE) <= 0.025 + chance(0.025)


def test_fewer_joules_at_worse_quality_are_claimed_no_more_often() -> None:
    world = replace(ONE, score=0.5)
    assert false_claims_of_eight(world, TIMES, EDGE, WORSE) <= 0.025 + chance(0.025)


@pytest.mark.parametrize("size", [20, 100, 500])
def test_the_interval_of_one_seed_holds_the_ratio_of_heavy_tailed_joules(size: int) -> None:
    assert abs(ratio_covered(replace(ONE, size=size, **HEAVY), TIMES) - 0.95) <= chance(0.95)


@pytest.mark.parametrize("same_seeds", [True, False])
@pytest.mark.parametrize("size", [20, 100])
def test_the_intervals_of_three_seeds_hold_what_other_trainings_would_do(size: int, same_seeds: bool) -> None:
    world = replace(VARIED, size=size, same_seeds=same_seeds)
    assert ratio_covered(world, TIMES) >= 0.95 - chance(0.95)
    assert difference_covered(world, TIMES) >= 0.95 - chance(0.95)


@pytest.mark.parametrize("size", [20, 500])
def test_the_interval_of_one_seed_holds_the_difference_in_points(size: int) -> None:
    assert abs(difference_covered(replace(ONE, size=size), TIMES) - 0.95) <= chance(0.95)


@pytest.mark.parametrize("world", [ONE, THREE], ids=["one seed", "three seeds"])
def test_a_model_worse_by_the_margin_is_seldom_called_equal(world: World) -> None:
    assert false_equality(replace(world, size=500), TIMES) <= 0.025 + chance(0.025)


def test_a_saving_of_five_percent_is_found_in_five_hundred_samples() -> None:
    world = replace(ONE, size=500, score=3.0)
    assert savings_found(world, 100, 0.05) >= 0.95
    assert claims_found(world, 100, 0.05) >= 0.95
