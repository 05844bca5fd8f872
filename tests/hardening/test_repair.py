"""Blocks under a budget: what is free, what is demoted first, what comes back, and what cannot be met."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from simulated_model import SimulatedModel, total

from hestctl.budget import resolve_budget
from hestctl.errors import Exit, HestError
from hestctl.hardening.network import Blocks, bills_in, choose_blocks
from hestctl.hardening.repair import Lengths, least_reachable, refuse_unreachable
from hestctl.model.sensitivity import Sensitivities
from hestctl.records import FULL, INT8, OFF, BlockStates

LAYERS = 6
COSTS = (0.0, 0.4e-6, 1e-6)


def budget_of(model, ratio=0.6, *, emax_j=None, envelope="auto", batch_size=4, new_tokens=64, prompt=500):
    return resolve_budget(
        scope="network",
        envelope=envelope,
        emax_j=emax_j,
        emax_ratio=ratio,
        reference=None,
        costs_j=COSTS,
        predicted_j=1e-4,
        prompt_tokens=prompt,
        max_new_tokens=new_tokens,
        num_beams=model.beams,
        batch_size=batch_size,
        model=model,
    )


def sensitivities(int8=0.01, off=0.3, error=0.001, kind="first-order", seed=0):
    generator = np.random.default_rng(seed)

    def pairs(scale):
        return tuple(map(tuple, (scale * generator.uniform(0.2, 2, (LAYERS, 2))).tolist()))

    flat = ((error, error),) * LAYERS
    return Sensitivities(kind, "f", "d", 8, pairs(off), flat, pairs(int8), flat)


def logits_of(seed=0, low=2.0, high=1.0):
    """Gates that lean to full, not all alike."""
    generator = torch.Generator().manual_seed(seed)
    on = low + torch.rand(LAYERS, 2, generator=generator).double()
    full = high * torch.rand(LAYERS, 2, generator=generator).double()
    return torch.stack((torch.zeros_like(on), on, on + full), -1)


def chosen(model, budget, logits, *, spend="useful", known=None, position_j=1e-5, margin=0.01, int8=True):
    blocks = Blocks(BlockStates.uniform(LAYERS), logits, known or sensitivities(), spend, int8=int8)
    lengths = Lengths.of([400, 600], budget, budget.max_new_tokens, (1, 4096))
    return choose_blocks(
        model, budget, blocks, gate="ordinal", margin=margin, position_j=position_j, lengths=lengths
    )


def worst_share(model, budget, states, position_j=1e-5):
    """The largest share of E_max over a dense grid of lengths and all batch sizes, with the directions."""
    shares = []
    for bill in budget.bills:
        base = model.generation(bill.batch_size, bill.num_beams, "ordinal", states)
        for prompt in (1, 2, 7, 50, 300, 1000, 2500, 4095, 4096):
            for new in (1, 2, 9, budget.max_new_tokens):
                rows = bill.batch_size * bill.num_beams * (prompt + new)
                spent = total(base, prompt, new) + rows * position_j
                shares.append(spent / total(bill.emax.of(bill.batch_size), prompt, new))
    return max(shares)


@pytest.mark.parametrize("spend", ["useful", "all"])
@pytest.mark.parametrize("ratio", [0.35, 0.5, 0.7, 0.9, 1.1])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_worst_case_fits_and_nothing_that_would_fit_is_left_out(ratio, spend, seed):
    model = SimulatedModel(LAYERS)
    budget = budget_of(model, ratio)
    known = sensitivities(int8=2e-3, seed=seed)
    states, choices = chosen(model, budget, logits_of(seed), spend=spend, known=known)
    assert worst_share(model, budget, states) <= 0.99 * (1 + 1e-9)
    assert [[c.state for c in pair] for pair in choices] == [
        [states.attention[i], states.mlp[i]] for i in range(LAYERS)
    ]
    for layer in range(LAYERS):
        for block in range(2):
            state = states.state(layer, block)
            if choices[layer][block].why == "free":
                assert spend == "useful"
                assert not known.int8_harms(layer, block)
            free = state == INT8 and spend == "useful" and not known.int8_harms(layer, block)
            if state != FULL and not free:
                raised = raise_one(states, layer, block)
                assert worst_share(model, budget, raised) > 0.99
    if spend == "all" and ratio <= 0.9:
        assert worst_share(model, budget, states) > 0.9


def raise_one(states, layer, block):
    rows = [list(states.attention), list(states.mlp)]
    rows[block][layer] += 1
    return BlockStates(tuple(rows[0]), tuple(rows[1]))


def test_int8_without_measurable_harm_is_free_and_stays_so():
    model, budget = SimulatedModel(LAYERS), budget_of(SimulatedModel(LAYERS), 1.2)
    known = sensitivities(int8=1e-5, error=0.001)
    states, choices = chosen(model, budget, logits_of(), known=known)
    assert states == BlockStates.uniform(LAYERS, INT8)
    assert {c.why for pair in choices for c in pair} == {"free"}
    states, _ = chosen(model, budget, logits_of(), known=known, spend="all")
    assert states.all_full
    # What nobody knows counts as harm.
    unknown = sensitivities(int8=0.0, kind="uniform")
    assert chosen(model, budget, logits_of(), known=unknown)[0].all_full


def test_int8_that_saves_nothing_is_dropped():
    model = SimulatedModel(LAYERS, int8=(1.1, 0.5))
    states, choices = chosen(model, budget_of(model, 1.2), logits_of(high=-0.5), spend="all")
    assert set(states.attention) == {FULL}
    assert {a.why for a, _ in choices} == {"dear"}
    tight, _ = chosen(model, budget_of(model, 0.45), logits_of(), spend="all")
    assert INT8 not in tight.attention
    assert OFF in tight.attention or INT8 in tight.mlp


def worth_of(known, *, off=None, int8=None):
    """The same sensitivities with single blocks' values replaced: {(layer, block): nats}."""

    def with_(pairs, changes):
        rows = [list(pair) for pair in pairs]
        for (layer, block), value in (changes or {}).items():
            rows[layer][block] = value
        return tuple(map(tuple, rows))

    return replace(known, off=with_(known.off, off), int8=with_(known.int8, int8))


def test_what_costs_least_likelihood_per_joule_goes_first():
    model, budget = SimulatedModel(LAYERS), budget_of(SimulatedModel(LAYERS), 0.97)
    known = worth_of(sensitivities(int8=0.1), int8={(3, 1): 1e-4})
    # The gate's own margins have no say: the last thing it would give up goes first.
    logits = logits_of()
    logits[3, 1, FULL] += 50
    states, choices = chosen(model, budget, logits, spend="all", known=known)
    assert states.mlp[3] == INT8
    assert choices[3][1].why == "budget"
    assert choices[3][1].decided == FULL
    assert states.counts()[1] == (0, 1, LAYERS - 1)


def test_a_small_harm_of_int8_goes_before_a_block_is_left_out():
    model = SimulatedModel(LAYERS)
    known = sensitivities(int8=1e-3, off=0.3, error=0.0)
    states, _ = chosen(model, budget_of(model, 0.7), logits_of(), known=known)
    assert OFF not in states.attention + states.mlp
    assert INT8 in states.mlp


def test_without_int8_on_offer_blocks_are_off_or_full():
    model = SimulatedModel(LAYERS)
    states, _ = chosen(model, budget_of(model, 0.7), logits_of(), int8=False)
    assert INT8 not in states.attention + states.mlp
    assert OFF in states.attention + states.mlp


def test_a_choice_tells_scores_joules_and_harm():
    model, budget, known = SimulatedModel(LAYERS), budget_of(SimulatedModel(LAYERS), 0.6), sensitivities()
    logits = logits_of()
    states, choices = chosen(model, budget, logits, known=known)
    layer = states.mlp.index(INT8)
    choice = choices[layer][1]
    lengths = round(budget.prompt_tokens), round(budget.new_tokens)
    full, int8 = (total(model.component(4, 1, 1, s), *lengths) / 4 for s in (FULL, INT8))
    assert choice.saved_j == pytest.approx(full - int8)
    assert choice.margins == pytest.approx(
        (float(logits[layer, 1, 2] - logits[layer, 1, 1]), float(logits[layer, 1, 2]))
    )
    assert choice.harm == (known.int8[layer][1], known.off[layer][1])


@pytest.mark.parametrize("envelope", ["matched", "absolute"])
def test_a_budget_that_cannot_be_met_names_the_least_that_can(envelope):
    model = SimulatedModel(LAYERS)
    emax_j = 0.05 if envelope == "absolute" else None
    budget = budget_of(model, None if emax_j else 0.02, emax_j=emax_j)
    with pytest.raises(HestError, match="cannot be met") as caught:
        chosen(model, budget, logits_of())
    assert caught.value.exit_code == Exit.OVER_BUDGET
    flag, value = re.search(r"(--emax(?:-ratio)?) (\S+) is the least", caught.value.hint).groups()
    assert flag == ("--emax" if emax_j else "--emax-ratio")
    least = float(value)

    def again(factor):
        number = factor * least
        return chosen(
            model,
            budget_of(model, None if emax_j else number, emax_j=number if emax_j else None),
            logits_of(),
            position_j=0.0,
        )

    assert again(1.0)[0] is not None
    with pytest.raises(HestError):
        again(0.97)


def test_training_may_refuse_before_it_starts():
    model = SimulatedModel(LAYERS)
    for ratio, refused in ((0.02, True), (0.6, False)):
        budget = budget_of(model, ratio)
        lengths = Lengths.of([400, 600], budget, 64, (1, 4096))
        bills = bills_in(model, budget, BlockStates.uniform(LAYERS, OFF), "ordinal")
        least = least_reachable(bills, 0.01, lengths)
        assert (least.factor > 1) == refused
        assert least.joules / (0.99 * least.emax_j) == pytest.approx(least.factor)
        if refused:
            with pytest.raises(HestError) as caught:
                refuse_unreachable(
                    bills, 0.01, lengths, emax_j=budget.emax_j, ratio=ratio, what="everything off"
                )
            assert caught.value.exit_code == Exit.OVER_BUDGET
        else:
            refuse_unreachable(bills, 0.01, lengths, emax_j=budget.emax_j, ratio=ratio, what="")


def test_the_margin_of_an_absolute_budget_is_the_models_error_where_that_is_larger():
    model = SimulatedModel(LAYERS, error=0.08)
    budget = budget_of(model, None, emax_j=30.0, envelope="absolute")
    states, _ = chosen(model, budget, logits_of(), spend="all", margin=0.01)
    (bill,) = [bill for bill in budget.bills if bill.batch_size == 4]
    base = model.generation(4, 1, "ordinal", states)
    assert total(base, 600, 64) <= 0.92 * total(bill.emax.of(4), 600, 64)
    # A matched one is a ratio of two figures of one model, whose error is in both.
    matched = budget_of(model, 0.6)
    states, _ = chosen(model, matched, logits_of(), spend="all", margin=0.01)
    assert 0.92 < worst_share(model, matched, states) <= 0.99 * (1 + 1e-9)


def test_a_choice_without_a_gate_begins_with_everything_at_full():
    known = sensitivities(int8=0.05, off=0.5, seed=3)
    model = SimulatedModel(LAYERS)
    states, choices = chosen(model, budget_of(model, 0.8), None, spend="all", known=known)
    assert {c.decided for pair in choices for c in pair} == {FULL}
    assert {c.margins for pair in choices for c in pair} == {None}
    lowered = [known.int8[i][1] for i in range(LAYERS) if states.mlp[i] != FULL]
    kept = [known.int8[i][1] for i in range(LAYERS) if states.mlp[i] == FULL]
    assert lowered
    assert kept
    # A block that was kept may be too large for what was left, never worth less a joule than all others.
    assert min(lowered) < min(kept)


def test_joules_to_spare_raise_a_block_all_the_way():
    model = SimulatedModel(LAYERS)
    off = logits_of() * torch.tensor([1.0, -1.0, -1.0])
    states, choices = chosen(model, budget_of(model, 1.2), off, spend="all")
    assert states.all_full
    assert {(c.decided, c.why) for pair in choices for c in pair} == {(OFF, "spare")}


def test_what_the_directions_decide_to_spend_is_left_to_them():
    model = SimulatedModel(LAYERS)
    budget = budget_of(model, 0.9)
    states, _ = chosen(model, budget, logits_of(), spend="all", position_j=5e-3)
    assert worst_share(model, budget, states, position_j=5e-3) <= 0.99 * (1 + 1e-9)
    assert chosen(model, budget, logits_of(), spend="all", position_j=0.0)[0] != states


def test_a_plan_answers_for_the_lengths_of_its_bound_alone():
    model = SimulatedModel(LAYERS)
    budget = budget_of(model, 0.6)
    bills = bills_in(model, budget, BlockStates.uniform(LAYERS, OFF), "ordinal")
    factors = {
        bound: least_reachable(bills, 0.01, Lengths.of([500], budget, 64, bound)).factor
        for bound in ((1, 4096), (300, 4096), (300, 300))
    }
    everywhere, longer, one = factors.values()
    assert everywhere > longer >= one
    share = max(
        total(bill.base, 300, new) / total(bill.emax.of(bill.batch_size), 300, new)
        for bill in bills
        for new in range(1, 65)
    )
    assert one == pytest.approx(share / 0.99)
