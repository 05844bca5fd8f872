"""E_max with its origin, and the multiplier on a problem whose answer is known."""

from __future__ import annotations

import pytest

from hestctl.budget import Multiplier, Reference, predicted_tabs_j, resolve_budget
from hestctl.errors import Exit, HestError

ASKED = {
    "emax_j": None,
    "emax_ratio": 0.6,
    "reference": None,
    "costs_j": (0.0, 1.0, 2.0),
    "predicted_j": 0.5,
    "prompt_tokens": 40.0,
    "max_new_tokens": 10,
    "num_beams": 2,
}


def test_emax_outright_beats_the_ratio():
    budget = resolve_budget(**{**ASKED, "emax_j": 7.0})
    assert (budget.emax_j, budget.ratio) == (7.0, None)


def test_emax_from_a_reference_prices_its_logged_states_with_todays_table():
    reference = Reference("tabs-1", int8_per_sample=10, full_per_sample=40, prompt_tokens=90, new_tokens=8.5)
    budget = resolve_budget(**{**ASKED, "reference": reference})
    assert budget.emax_j == pytest.approx(0.6 * (10 * 1 + 40 * 2))
    assert "tabs-1" in budget.origin
    assert "predicted" not in budget.origin
    assert budget.work(100) == 2 * (100 + 8.5)
    assert budget.most_work(100) == 2 * 110


def test_emax_without_a_reference_is_marked_predicted():
    budget = resolve_budget(**ASKED)
    assert budget.emax_j == pytest.approx(30.0)
    assert "predicted" in budget.origin


def test_no_budget_at_all_is_a_usage_error():
    with pytest.raises(HestError) as caught:
        resolve_budget(**{**ASKED, "emax_ratio": None})
    assert caught.value.exit_code == Exit.USAGE


def test_predicted_tabs_opens_half_of_all_directions():
    assert predicted_tabs_j(layers=3, rank=16, full_j=2.0) == 0.5 * 3 * 16 * 2.0


@pytest.mark.parametrize("kind", ["plain", "clamp", "pi"])
def test_the_multiplier_converges_where_the_answer_is_known(kind):
    # minimise (x - 1)^2 subject to x <= 0.5: x* = 0.5 and lambda* = 0.5 (with E / E_max = x / 0.5).
    x, multiplier = 1.0, Multiplier(0.1, 0.05, kind)
    for _ in range(4000):
        gradient = 2 * (x - 1) + multiplier.weight / 0.5
        x -= 0.02 * gradient
        multiplier.step(x / 0.5)
    assert x == pytest.approx(0.5, abs=1e-3)
    assert multiplier.value == pytest.approx(0.5, abs=1e-3)


def test_a_slack_budget_drives_clamp_to_zero_and_plain_below_it():
    clamp, plain, fixed = (Multiplier(0.1, 0.05, kind) for kind in ("clamp", "plain", "none"))
    for _ in range(50):
        for multiplier in (clamp, plain, fixed):
            multiplier.step(0.5)
    assert clamp.value == 0
    assert plain.value < -1
    assert fixed.value == 0.1
