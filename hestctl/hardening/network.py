"""A plan in scope network: the states of the blocks, and what batches cost in them.

Shape legend: L layers, 2 blocks (attention, MLP), S = 3 states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from hestctl.budget import Bill, Budget, calibrated, calibrated_sizes, whole_model
from hestctl.energy.model import EnergyModel, GateKind, Terms
from hestctl.hardening.plan import BlockChoice, Plan
from hestctl.hardening.repair import Lengths, Prices, mend, refuse_unreachable
from hestctl.model.sensitivity import Sensitivities
from hestctl.records import FULL, OFF, BlockStates


@dataclass(frozen=True, slots=True)
class Blocks:
    """What the states of the backbone's blocks are decided by, besides joules.

    ``fixed`` are those that settings fix, or all full. Where ``sensitivities`` are given a budget decides
    instead, by them: it begins with what the gate's ``logits_L2S`` say, or with ``fixed``. ``spend`` is that
    of the budget's settings; ``int8`` false takes that state from the offer.
    """

    fixed: BlockStates
    logits_L2S: Tensor | None = None
    sensitivities: Sensitivities | None = None
    spend: Literal["useful", "all"] = "useful"
    int8: bool = True

    @property
    def decided(self) -> BlockStates:
        """Before repair."""
        if self.logits_L2S is None:
            return self.fixed
        attention_L, mlp_L = self.logits_L2S.argmax(-1).unbind(1)
        return BlockStates(tuple(attention_L.tolist()), tuple(mlp_L.tolist()))


@dataclass(frozen=True, slots=True)
class Settled:
    """The plan with its blocks and bills, and the base of a whole batch (J) before repair.

    ``expected`` by the gates' probabilities, ``decided`` by their hard decisions.
    """

    plan: Plan
    expected: Terms
    decided: Terms


def settle(
    model: EnergyModel | None,
    plan: Plan,
    budget: Budget | None,
    blocks: Blocks,
    gate: GateKind,
    position_j: float,
    lengths: Lengths,
) -> Settled:
    """Mend the blocks that a gate decided, check those that settings fixed, and bill every batch size.

    ``position_j`` is what the directions decide to spend per billed token position. The margin becomes the
    model's own error where that is larger. Raises HestError: exit 5 where nothing fits, usage for what was
    not calibrated.
    """
    batch_size, beams = plan.batch_size, plan.num_beams
    known = whole_model(model, batch_size, beams)
    sizes = calibrated_sizes(known, beams, batch_size)
    margin = reserve(plan.margin, budget, fit_error(known, beams, sizes))
    expected = decided = None
    if blocks.sensitivities is None or budget is None:
        states, choices = blocks.decided, _kept(known, sizes[-1], beams, blocks, lengths)
    else:
        prices = Prices.of(known, sizes[-1], beams, blocks.fixed.layers, gate)
        decided = prices.base(blocks.decided)
        expected = decided if blocks.logits_L2S is None else prices.expected(blocks.logits_L2S)
        states, choices = choose_blocks(
            known, budget, blocks, gate=gate, margin=plan.margin, position_j=position_j, lengths=lengths
        )
    emax = {} if budget is None else {bill.batch_size: bill.emax for bill in budget.bills}
    bills = tuple(
        Bill(
            size, beams, calibrated(known.generation(size, beams, gate, states), size, beams), emax.get(size)
        )
        for size in sizes
    )
    if budget is not None and blocks.sensitivities is None:
        what = "the network, its blocks as the settings fix them,"
        refuse_unreachable(bills, margin, lengths, emax_j=budget.emax_j, ratio=budget.ratio, what=what)
    mended = replace(plan, margin=margin, bills=bills, blocks=states, choices=choices)
    return Settled(mended, expected or bills[-1].base, decided or bills[-1].base)


def choose_blocks(
    model: EnergyModel,
    budget: Budget,
    blocks: Blocks,
    *,
    gate: GateKind,
    margin: float,
    position_j: float,
    lengths: Lengths,
) -> tuple[BlockStates, tuple[tuple[BlockChoice, BlockChoice], ...]]:
    """States within the budget by ``blocks.sensitivities``, and how each block came by its own.

    ``margin`` is that of the settings, ``position_j`` as for ``settle``, and so are the errors.
    """
    assert blocks.sensitivities is not None
    sizes = [bill.batch_size for bill in budget.bills]
    error = fit_error(model, budget.num_beams, sizes)
    return mend(
        [Prices.of(model, size, budget.num_beams, blocks.fixed.layers, gate) for size in sizes],
        budget.bills,
        blocks.decided,
        logits_L2S=blocks.logits_L2S,
        sensitivities=blocks.sensitivities,
        spend=blocks.spend,
        int8=blocks.int8,
        fit_error=error,
        margin=reserve(margin, budget, error),
        position_j=position_j,
        lengths=lengths,
        ratio=budget.ratio,
        emax_j=budget.emax_j,
    )


def reserve(margin: float, budget: Budget | None, error: float) -> float:
    """The part of E_max that is left to the model's error.

    A matched E_max is a ratio of two figures of one model, whose error is in both.
    """
    return max(margin, error) if budget is not None and budget.envelope == "absolute" else margin


def fit_error(model: EnergyModel, num_beams: int, sizes: Sequence[int]) -> float:
    """The largest relative error of the model's fit at these batch sizes."""
    return max(calibrated(model.fit_error(size, num_beams), size, num_beams) for size in sizes)


def bills_in(model: EnergyModel, budget: Budget, states: BlockStates, gate: GateKind) -> tuple[Bill, ...]:
    """The budget's bills with the blocks in these states.

    Raises HestError (usage) for what was not calibrated.
    """
    return tuple(
        replace(
            bill,
            base=calibrated(
                model.generation(bill.batch_size, bill.num_beams, gate, states),
                bill.batch_size,
                bill.num_beams,
            ),
        )
        for bill in budget.bills
    )


def _kept(
    model: EnergyModel, batch_size: int, num_beams: int, blocks: Blocks, lengths: Lengths
) -> tuple[tuple[BlockChoice, BlockChoice], ...]:
    """How blocks came by their states where settings fixed them."""

    def cost_j(block: int, state: int) -> float:
        if state == OFF:
            return 0.0
        terms = calibrated(model.component(batch_size, num_beams, block, state), batch_size, num_beams)
        return terms.total_j(lengths.prompt_tokens, lengths.new_tokens) / batch_size

    def choice(layer: int, block: int) -> BlockChoice:
        state, s = blocks.decided.state(layer, block), blocks.sensitivities
        saved_j = 0.0 if state == FULL else cost_j(block, FULL) - cost_j(block, state)
        harm = None if s is None else s.harm(layer, block)
        return BlockChoice(state, state, "fixed", None, saved_j, harm)

    return tuple((choice(layer, 0), choice(layer, 1)) for layer in range(blocks.fixed.layers))
