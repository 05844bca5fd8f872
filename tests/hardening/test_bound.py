"""The bound of scope network: joules recomputed from states and lengths alone, wherever a batch stops."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from simulated_model import random_terms, total

from hestctl.budget import Bill, Emax, allowance_j, by_new_tokens, most_j
from hestctl.energy.model import Terms
from hestctl.errors import Exit, HestError
from hestctl.hardening.certificate import certificate, worst
from hestctl.hardening.plan import PLAN_VERSION, Plan
from hestctl.records import FULL, BlockStates

LAYERS, RANK = 2, 3
CPU = torch.device("cpu")


def plan_of(bills, *, envelope="matched", margin=0.01, beams=1, new_tokens=8, seed=0, scope="network"):
    generator = np.random.default_rng(seed)
    pace = generator.uniform(0.05, 1, LAYERS)
    return Plan(
        version=PLAN_VERSION,
        run_id="r",
        method="hest",
        scope=scope,
        envelope=envelope,
        backbone="tiny",
        fingerprint="f",
        device_name="Fake",
        calibration_id="table-1",
        table_key="k",
        energy_kind="estimated",
        costs_j=(0.0, 0.4e-3, 1e-3),
        uses_int8=bool(generator.integers(2)),
        emax_j=1.0,
        emax_origin="test",
        margin=margin,
        batch_size=bills[-1].batch_size,
        num_beams=beams,
        max_new_tokens=new_tokens,
        bound=(1, 4096),
        bills=tuple(bills),
        blocks=BlockStates.uniform(LAYERS),
        pace=tuple((pace / pace.sum()).tolist()),
        order=tuple(tuple(generator.permutation(RANK).tolist()) for _ in range(LAYERS)),
        shift=0.0,
        energies=None,
    )


def random_bill(generator, batch_size, beams, envelope):
    """A base, and an E_max that is nowhere much below it: of another shape, and often hardly above it."""
    base = random_terms(generator, batch_size)
    slack = random_terms(generator, batch_size * generator.choice([1e-3, 0.03, 1.0]))
    if envelope == "matched":
        return Bill(batch_size, beams, base, Emax(base.times(1.02).plus(slack), Terms.zero()))
    one = total(base, 600, 9) / batch_size * generator.uniform(0.5, 3)
    return Bill(batch_size, beams, base, Emax(Terms.zero(), Terms(call_j=float(one))))


@pytest.mark.parametrize("envelope", ["matched", "absolute"])
def test_no_batch_exceeds_its_budget_wherever_it_stops(envelope):
    generator = np.random.default_rng(7)
    ran, refused, unbounded, spent_shares = 0, 0, [], []
    for trial in range(120):
        beams = int(generator.integers(1, 5))
        bills = [random_bill(generator, size, beams, envelope) for size in (2, 4)]
        asked = int(generator.integers(1, 24))
        plan = plan_of(bills, envelope=envelope, beams=beams, new_tokens=asked, seed=trial)
        requests = int(generator.integers(1, 5))
        longest = int(generator.choice([1, 3, 30, 200, 700] if trial % 20 else [4096]))
        lengths = [int(generator.integers(1, longest + 1)) for _ in range(requests - 1)] + [longest]
        bill = bills[0] if requests <= 2 else bills[1]
        try:
            most = plan.max_new_tokens_for(lengths, beams, asked)
        except HestError as error:
            assert error.exit_code == Exit.OVER_BUDGET
            refused += 1
            continue
        stop = int(generator.integers(1, most + 1))
        counts = run_batch(plan.ledger(lengths, most, beams, CPU), lengths, beams, stop, generator)
        directions_j = sum(int(counts[state]) * price for state, price in enumerate(plan.costs_j))
        emax = total(bill.emax.batch, longest, stop) + requests * total(bill.emax.request, longest, stop)
        base = total(bill.base, longest, stop)
        assert base + directions_j <= (1 - plan.margin) * emax * (1 + 1e-9)
        # What the plan itself says of the samples agrees with what was counted here.
        told_j, told_emax = plan.scope_joules(counts, requests, beams, longest, stop)
        assert told_j == pytest.approx(base / requests + directions_j)
        assert told_emax == pytest.approx(emax / requests)
        everything = sum(lengths) * beams + requests * beams * (stop - 1)
        unbounded.append((base + everything * LAYERS * RANK * plan.costs_j[2]) / emax)
        spent_shares.append((base + directions_j) / emax)
        ran += 1
    assert ran > 60
    assert refused < 60
    # The gates ask for everything, as TABS may: without a ledger that exceeds the budget, and often.
    assert np.mean(np.array(unbounded) > 1) > 0.3
    assert max(spent_shares) > 0.95


def run_batch(ledger, lengths, beams, stop, generator):
    """Prompts in chunks, then single steps; every gate asks for full. The log of what was allowed, (3,)."""
    rows, longest = len(lengths) * beams, max(lengths)
    real = torch.zeros(rows, longest, dtype=torch.bool)
    for row in range(rows):
        real[row, longest - lengths[row // beams] :] = True
    cuts = sorted({0, longest, *generator.integers(0, longest + 1, 2).tolist()})
    masks = [real[:, a:b] for a, b in itertools.pairwise(cuts)]
    masks += [torch.ones(rows, 1, dtype=torch.bool)] * (stop - 1)
    counts = torch.zeros(3, dtype=torch.int64)
    for mask in masks:
        for layer in range(LAYERS):
            allowed = ledger.allow(layer, torch.full((*mask.shape, RANK), FULL), mask)
            counts += torch.bincount(allowed[mask].flatten(), minlength=3)
    return counts


def test_lengths_are_priced_as_defined():
    generator = np.random.default_rng(3)
    for _ in range(40):
        terms = random_terms(generator).plus(random_terms(generator).times(-1))
        prompt, new = int(generator.integers(1, 60)), int(generator.integers(1, 12))
        assert terms.total_j(prompt, new) == pytest.approx(total(terms, prompt, new))
        by_n = by_new_tokens(terms, prompt, new)
        assert by_n.tolist() == pytest.approx([total(terms, prompt, n) for n in range(1, new + 1)])
        least = int(generator.integers(1, prompt + 1))
        largest = max(total(terms, p, n) for p in range(least, prompt + 1) for n in range(1, new + 1))
        assert most_j(terms, (least, prompt), new) == pytest.approx(largest)


def test_the_allowance_is_the_least_over_all_lengths():
    spare = Terms(call_j=1.0, step_j=0.5)
    at = [total(spare, 10, n) / (2 * 3 * (10 + n)) for n in range(1, 21)]
    assert allowance_j(spare, 2, 3, 10, 20) == pytest.approx(min(at)) != at[-1]
    assert allowance_j(spare.times(-1), 2, 3, 10, 20) == 0.0
    assert allowance_j(spare, 2, 3, 10, 0) == pytest.approx(1.0 / 60)


def test_scope_adapter_with_one_number_earns_what_it_always_did():
    emax = 0.37
    plan = plan_of(
        [Bill(1, 1, Terms.zero(), Emax(Terms.zero(), Terms(call_j=emax)))],
        scope="adapter",
        envelope="absolute",
    )
    lengths, beams, new_tokens = [5, 400, 77], 3, 24
    ledger = plan.ledger(lengths, new_tokens, beams, CPU)
    work = torch.tensor([beams * (p + new_tokens) for p in lengths])
    share = torch.tensor(plan.pace, dtype=torch.float64)
    before = 0.99 * emax / plan.tariff.unit_j * share[:, None] / work.double()[None, :] * 2**20
    everything = RANK * plan.tariff.full * 2**20
    assert (ledger.income_LQ - before.floor().long().clamp(max=everything)).abs().max() <= 1
    assert plan.scope_joules(torch.tensor([5, 0, 100]), 3, beams, 400, 9) == (pytest.approx(0.1), plan.emax_j)


def test_scope_adapter_matched_earns_the_same_at_every_length():
    position_j = 2e-3
    request = Terms(call_j=position_j, token_j=position_j, step_j=position_j)
    plan = plan_of([Bill(1, 1, Terms.zero(), Emax(Terms.zero(), request))], scope="adapter")
    for beams in (1, 4):
        found = plan.allowances_j([1, 70, 4096], 16, beams)
        assert found == pytest.approx([0.99 * position_j] * 3)
    _, emax_j = plan.scope_joules(torch.tensor([0, 0, 1]), 1, 4, 70, 9)
    assert emax_j == pytest.approx(4 * (70 + 9) * position_j)


def test_a_cap_on_new_tokens_follows_from_one_number():
    base = Terms(call_j=1.0, token_j=0.1, step_j=0.5)
    plan = plan_of([Bill(2, 1, base, Emax(Terms.zero(), Terms(call_j=3.0)))], envelope="absolute", margin=0.0)
    most = plan.max_new_tokens_for([10, 10], 1, 100)
    assert total(base, 10, most) <= 2 * 3.0 < total(base, 10, most + 1)
    assert plan.max_new_tokens_for([10, 10], 1, 3) == 3
    with pytest.raises(HestError, match="s-long") as caught:
        plan.max_new_tokens_for([10, 60], 1, 100, ["s-short", "s-long"])
    assert caught.value.exit_code == Exit.OVER_BUDGET
    assert "60 prompt tokens" in caught.value.message
    assert "3.5 J" in caught.value.message


def test_a_batch_larger_than_any_calibrated_is_a_usage_error():
    plan = plan_of([Bill(2, 1, Terms.zero(), Emax(Terms(call_j=1.0), Terms.zero()))])
    with pytest.raises(HestError, match="batch of 3 with 1 beams") as caught:
        plan.ledger([4, 4, 4], 2, 1, CPU)
    assert caught.value.exit_code == Exit.USAGE
    assert "calibrate --batch-size 3" in caught.value.hint
    with pytest.raises(HestError, match="2 beams"):
        plan.ledger([4], 2, 2, CPU)


def test_prompts_are_scored_under_the_purse_of_generation():
    emax = Emax(Terms(call_j=2.0, token_j=0.2, step_j=0.2), Terms.zero())
    plan = plan_of([Bill(2, 4, Terms(call_j=1.0), emax)], beams=4)
    spare = total(plan.bills[0].spare(2, plan.margin), 30, 0)
    assert plan.allowances_j([30, 20], 0, None) == pytest.approx([spare / 2 / (4 * 30)] * 2)


def test_the_certificate_is_what_a_ledger_earns_and_names_its_worst():
    generator = np.random.default_rng(1)
    bills = [random_bill(generator, size, 2, "matched") for size in (2, 4)]
    plan = plan_of(bills, beams=2, new_tokens=12)
    rows = certificate(plan)
    assert [(row["batch_size"], row["length_tokens"]) for row in rows][:2] == [(2, 128), (2, 256)]
    assert len(rows) == 12
    for row in [*rows, worst(plan)]:
        bill = next(bill for bill in bills if bill.batch_size == row["batch_size"])
        prompt, new = row["length_tokens"], row["new_tokens"]
        emax = total(bill.emax.batch, prompt, new)
        assert row["emax_j"] == pytest.approx(emax / row["batch_size"])
        assert row["bound_j"] <= (1 - plan.margin) * row["emax_j"] * (1 + 1e-9)
        assert row["bound_j"] >= total(bill.base, prompt, new) / row["batch_size"]
        assert row["bound_over_emax"] == pytest.approx(row["bound_j"] / row["emax_j"])
    most = max(
        total(bill.base, prompt, new) / total(bill.emax.batch, prompt, new)
        for bill in bills
        for prompt in (1, 64, 1000, 4096)
        for new in range(1, 13)
    )
    assert worst(plan)["bound_over_emax"] >= most


def test_a_plan_of_bills_comes_back_from_disk_with_the_same_incomes():
    generator = np.random.default_rng(5)
    plan = plan_of([random_bill(generator, size, 3, "matched") for size in (1, 8)], beams=3)
    back = Plan.from_dict(json.loads(json.dumps({**plan.as_dict(), "worst": worst(plan)})))
    assert back == plan
    mine, theirs = (p.ledger([7, 90, 4000], 8, 3, CPU).income_LQ for p in (plan, back))
    assert torch.equal(mine, theirs)
