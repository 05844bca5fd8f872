"""E_max with its origin, and the multiplier on a problem whose answer is known."""

from __future__ import annotations

import json

import pytest

from hestctl.budget import Budget, Multiplier, Reference, predicted_tabs_j, resolve_budget
from hestctl.energy.model import AdapterPass, Cost, EnergyModel, GenerationPoint
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


def generation_model(beams=2):
    """Two batch sizes of a backbone in full precision, and adapters of each gate, on a noiseless board."""
    points, adapters = [], []
    for batch in (1, 4):
        for prompt in (10, 100, 400):
            for new in (1, 9, 33):
                steps = new - 1
                context = steps * prompt + steps * (steps + 1) / 2
                joules = batch * (3 + 0.02 * prompt + 1e-5 * prompt**2 + 0.4 * steps + 1e-4 * context)
                points.append(GenerationPoint(batch, beams, prompt, new, Cost(joules, 0.0)))
        for gate, share in (("ordinal", 1.5), ("linear", 1.0)):
            costs = Cost(1e-3 * batch * share, 0.0), Cost(2e-3 * batch * share, 0.0)
            adapters.append(AdapterPass(gate, batch, beams, *costs))
    return EnergyModel("hestctl", 4, tuple(points), tuple(adapters))


NETWORK = {**ASKED, "scope": "network", "batch_size": 3, "model": generation_model()}


def test_a_matched_network_budget_is_a_ratio_of_tabs_at_every_length():
    reference = Reference("tabs-1", int8_per_sample=10, full_per_sample=40, prompt_tokens=90, new_tokens=10)
    budget = resolve_budget(**{**NETWORK, "reference": reference})
    assert budget.envelope == "matched"
    assert [bill.batch_size for bill in budget.bills] == [1, 4]
    assert budget.bill.batch_size == 4  # as a batch of four with an empty row
    position_j = (10 * 1.0 + 40 * 2.0) / (2 * 100)
    for prompt, new in ((30, 1), (30, 9), (777, 20)):
        tabs = NETWORK["model"].generation(4, 2, "linear", None).total_j(prompt, new)
        tabs += 4 * 2 * position_j * (prompt + new - 1)
        assert budget.bill.emax.of(4).total_j(prompt, new) == pytest.approx(0.6 * tabs)
        assert budget.bill.emax.of(2) == budget.bill.emax.of(4)
    assert budget.emax_j == pytest.approx(budget.bill.emax.of(3).total_j(90, 10) / 3)
    hest = NETWORK["model"].generation(4, 2, "ordinal", None)
    assert budget.bill.base == hest
    assert "tabs-1" in budget.origin
    three = budget.sample_emax().total_j(90, 10)
    assert three == pytest.approx(budget.bill.emax.of(3).total_j(90, 10) / 3)


def test_a_predicted_network_budget_takes_the_prompts_lengths():
    budget = resolve_budget(**NETWORK)
    assert (budget.prompt_tokens, budget.new_tokens) == (40.0, 10)
    assert "predicted" in budget.origin
    assert budget.emax_j == pytest.approx(budget.bill.emax.of(3).total_j(40, 10) / 3)


def test_an_absolute_network_budget_is_one_number_a_sample():
    for changes in ({"emax_j": 7.0, "emax_ratio": None}, {"envelope": "absolute"}):
        budget = resolve_budget(**{**NETWORK, **changes})
        assert budget.envelope == "absolute"
        for requests, prompt in ((1, 9), (3, 4000)):
            emax = budget.bill.emax.of(requests)
            assert emax.total_j(prompt, 5) == pytest.approx(requests * budget.emax_j)
    assert budget.emax_j == pytest.approx(resolve_budget(**NETWORK).emax_j)


def test_a_matched_adapter_budget_counts_token_positions():
    budget = resolve_budget(**{**ASKED, "envelope": "matched"})
    assert budget.emax_j == pytest.approx(0.6 * 0.5 * 2 * (40 + 10))
    assert budget.position_j == pytest.approx(0.6 * 0.5)
    assert budget.sample_emax().total_j(7, 3) == pytest.approx(0.6 * 0.5 * 2 * (7 + 3))
    assert resolve_budget(**ASKED).envelope == "absolute"


def test_a_number_cannot_be_matched():
    with pytest.raises(HestError, match="ratio of what TABS spends") as caught:
        resolve_budget(**{**NETWORK, "emax_j": 7.0, "envelope": "matched"})
    assert caught.value.exit_code == Exit.USAGE


@pytest.mark.parametrize("changes", [{}, {"scope": "network", "batch_size": 3, "model": generation_model()}])
@pytest.mark.parametrize("envelope", ["matched", "absolute"])
def test_a_budget_comes_back_from_a_run_as_it_was(envelope, changes):
    budget = resolve_budget(**{**ASKED, **changes, "envelope": envelope})
    assert Budget.from_dict(json.loads(json.dumps(budget.as_dict()))) == budget
