"""The bound: joules recomputed from the states that were applied, never from the ledger's own sums."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hestctl.hardening.ledger import Ledger, Tariff, incomes
from hestctl.records import FULL, INT8


def make(costs_j, emax_j, work, *, layers=3, rank=5, margin=0.01, seed=0, uses_int8=True):
    generator = torch.Generator().manual_seed(seed)
    tariff = Tariff.from_costs(costs_j, uses_int8=uses_int8)
    pace = torch.rand(layers, generator=generator) + 0.05
    order = torch.stack([torch.randperm(rank, generator=generator) for _ in range(layers)])
    income = incomes((1 - margin) * emax_j / torch.tensor(work).double(), pace, rank, tariff)
    return Ledger(income, order, tariff, uses_int8=uses_int8), order


def joules(states, costs_j):
    return torch.tensor(costs_j, dtype=torch.float64)[states].sum().item()


@settings(max_examples=60, deadline=None)
@given(
    ratio=st.floats(0.001, 1.2),
    int8=st.floats(0.05, 0.95),
    uses_int8=st.booleans(),
    beams=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    new_tokens=st.integers(0, 12),
    greedy=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_no_request_exceeds_its_budget(ratio, int8, uses_int8, beams, lengths, new_tokens, greedy, seed):
    layers, rank, costs = 3, 5, (0.0, int8 * 1e-6, 1e-6)
    work = [(length + new_tokens) * beams for length in lengths]
    everything = max(work) * layers * rank * costs[2]
    emax = ratio * everything
    ledger, _ = make(costs, emax, work, seed=seed, uses_int8=uses_int8)
    generator = torch.Generator().manual_seed(seed)
    rows, longest = len(lengths) * beams, max(lengths)
    real = torch.zeros(rows, longest, dtype=torch.bool)
    for row in range(rows):
        real[row, longest - lengths[row // beams] :] = True
    spent = torch.zeros(len(lengths), dtype=torch.float64)

    def ask(tokens):
        if greedy:
            return torch.full((rows, tokens, rank), FULL)
        states = torch.randint(0, 3, (rows, tokens, rank), generator=generator)
        return states if uses_int8 else FULL * (states == FULL)

    for step in range(1 + new_tokens):
        mask = real if step == 0 else torch.ones(rows, 1, dtype=torch.bool)
        for layer in range(layers):
            asked = ask(mask.shape[1])
            applied = ledger.allow(layer, asked, mask)
            assert (applied <= asked).all()
            assert (applied[~mask] == 0).all()
            for row in range(rows):
                spent[row // beams] += joules(applied[row], costs)
    assert (spent <= emax * (1 + 1e-12)).all()


@pytest.mark.parametrize(("share", "ample"), [(1.0, True), (0.999, False)])
def test_an_allowance_for_everything_pays_every_layer_whatever_its_pace(share, ample):
    layers, rank, tariff = 3, 5, Tariff.from_costs((0.0, 0.4e-6, 1e-6), uses_int8=True)
    allowance = torch.tensor([share * layers * rank * 1e-6], dtype=torch.float64)
    income = incomes(allowance, torch.tensor([1e-4, 0.2, 0.8]), rank, tariff)
    everything = (rank * tariff.full) << 20
    assert bool((income == everything).all()) is ample
    assert income.sum() <= layers * everything * share


def test_purses_that_cannot_bind_are_not_kept_and_change_nothing():
    costs = (0.0, 0.4e-6, 1e-6)
    asked = torch.full((1, 20, 5), FULL)
    real = torch.ones(1, 20, dtype=torch.bool)
    ample, _ = make(costs, 10 * 20 * 3 * 5 * costs[2], [20])
    assert torch.equal(ample.allow(0, asked, real), asked)
    assert not ample.seen_LQ.any()
    tight, _ = make(costs, 0.3 * 20 * 3 * 5 * costs[2], [20])
    ample.restart(tight)
    assert torch.equal(ample.allow(0, asked, real), tight.allow(0, asked, real))
    assert not torch.equal(ample.allow(1, asked, real), asked)


def test_a_budget_for_everything_changes_nothing():
    costs = (0.0, 0.4e-6, 1e-6)
    ledger, _ = make(costs, 10 * 20 * 3 * 5 * costs[2], [20])
    asked = torch.randint(0, 3, (1, 20, 5))
    for layer in range(3):
        assert torch.equal(ledger.allow(layer, asked, torch.ones(1, 20, dtype=torch.bool)), asked)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 10**6))
def test_chunks_of_a_prompt_get_what_the_whole_prompt_gets(chunks, seed):
    costs, total = (0.0, 0.4e-6, 1e-6), sum(chunks)
    emax = 0.4 * total * 3 * 5 * costs[2]
    asked = torch.randint(0, 3, (2, total, 5), generator=torch.Generator().manual_seed(seed))
    real = torch.ones(2, total, dtype=torch.bool)
    whole, _ = make(costs, emax, [total] * 2, seed=seed)
    parts, _ = make(costs, emax, [total] * 2, seed=seed)
    for layer in range(3):
        expected = whole.allow(layer, asked, real)
        starts = torch.tensor([0, *chunks]).cumsum(0).tolist()
        pieces = [parts.allow(layer, asked[:, a:b], real[:, a:b]) for a, b in itertools.pairwise(starts)]
        assert torch.equal(torch.cat(pieces, 1), expected)


def test_the_least_important_direction_goes_first_and_int8_comes_before_off():
    costs = (0.0, 0.5e-6, 1e-6)
    tariff = Tariff.from_costs(costs, uses_int8=True)
    order = torch.tensor([[2, 0, 1]])
    income = incomes(torch.tensor([2.0e-6], dtype=torch.float64), torch.ones(1), 3, tariff)
    ledger = Ledger(income, order, tariff, uses_int8=True)
    asked = torch.full((1, 1, 3), FULL)
    applied = ledger.allow(0, asked, torch.ones(1, 1, dtype=torch.bool))
    assert applied.flatten().tolist() == [INT8, INT8, FULL]


def test_what_a_frugal_token_leaves_the_next_may_spend():
    costs = (0.0, 0.5e-6, 1e-6)
    tariff = Tariff.from_costs(costs, uses_int8=False)
    income = incomes(torch.tensor([1e-6], dtype=torch.float64), torch.ones(1), 3, tariff)
    ledger = Ledger(income, torch.tensor([[0, 1, 2]]), tariff, uses_int8=False)
    asked = torch.tensor([[[0, 0, 0], [0, 0, 0], [FULL] * 3, [FULL] * 3]])
    applied = ledger.allow(0, asked, torch.ones(1, 4, dtype=torch.bool))
    assert (applied == FULL).sum(-1).flatten().tolist() == [0, 0, 3, 1]


@pytest.mark.parametrize("uses_int8", [True, False])
def test_prices_are_never_below_the_joules_they_stand_for(uses_int8):
    costs = (0.0, 0.3333e-6, 1e-6)
    tariff = Tariff.from_costs(costs, uses_int8=uses_int8)
    assert tariff.full * tariff.unit_j >= costs[2] * (1 - 1e-12)
    assert tariff.int8 * tariff.unit_j >= costs[1]
