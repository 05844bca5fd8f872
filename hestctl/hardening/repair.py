"""The states of whole blocks under a budget: what the gates decided, mended until the worst case fits.

Shape legend: L layers, 2 blocks (attention, MLP), S = 3 states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import Tensor

from hestctl.budget import Bill, Budget, by_new_tokens, calibrated, most_j
from hestctl.energy.model import EnergyModel, GateKind, Terms
from hestctl.errors import Exit, HestError
from hestctl.hardening.plan import BlockChoice, Why
from hestctl.model.sensitivity import Sensitivities
from hestctl.records import BLOCKS, FULL, INT8, OFF, BlockStates

_CostJ = Callable[[int, int], float]
"""Joules of (block, state)."""

_ALL = tuple(range(len(BLOCKS)))


@dataclass(frozen=True, slots=True)
class Prices:
    """Joules of one calibrated batch: everything with all blocks off, and one layer's block in a state."""

    batch_size: int
    num_beams: int
    nothing: Terms
    component: dict[tuple[int, int], Terms]
    """By (block, state), of INT8 and FULL."""

    @classmethod
    def of(cls, model: EnergyModel, batch_size: int, num_beams: int, layers: int, gate: GateKind) -> Prices:
        """Raises HestError (usage) for what was not calibrated."""
        off = BlockStates.uniform(layers, OFF)
        return cls(
            batch_size,
            num_beams,
            calibrated(model.generation(batch_size, num_beams, gate, off), batch_size, num_beams),
            {
                (block, state): calibrated(
                    model.component(batch_size, num_beams, block, state), batch_size, num_beams
                )
                for block in _ALL
                for state in (INT8, FULL)
            },
        )

    def base(self, states: BlockStates) -> Terms:
        """The batch before its directions, its blocks in these states."""
        total = self.nothing
        for (block, state), terms in self.component.items():
            total = total.plus(terms.times(states.counts()[block][state]))
        return total

    def expected(self, logits_L2S: Tensor) -> Terms:
        """The same by the gates' probabilities."""
        share_2S = logits_L2S.double().softmax(-1).sum(0).tolist()
        total = self.nothing
        for (block, state), terms in self.component.items():
            total = total.plus(terms.times(share_2S[block][state]))
        return total


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean tokens of the reference, and the lengths that must be within E_max.

    ``bound`` are the least and the most prompt tokens; beyond, generation itself refuses what does not fit.
    """

    prompt_tokens: int
    new_tokens: int
    bound: tuple[int, int]
    max_new_tokens: int

    @classmethod
    def of(
        cls, prompts: Sequence[int], budget: Budget | None, max_new_tokens: int, bound: tuple[int, int]
    ) -> Lengths:
        """``prompts`` are the tokens of the reference's prompts."""
        prompt_tokens, new_tokens = sum(prompts) / len(prompts), float(max_new_tokens)
        if budget is not None:
            prompt_tokens, new_tokens = budget.prompt_tokens or prompt_tokens, budget.new_tokens
            if budget.envelope == "absolute":
                # One number cannot pay for every length: prompts beyond these get fewer new tokens.
                bound = min(bound[0], max(prompts)), max(prompts)
        return cls(max(1, round(prompt_tokens)), max(1, round(new_tokens)), bound, max_new_tokens)

    def grid(self) -> list[int]:
        """Prompt tokens across the bound, its ends among them."""
        return grid(self.bound)


def grid(bound: tuple[int, int]) -> list[int]:
    """Whole numbers across ``bound``, its ends among them, dense where they are small."""
    found: list[int] = np.unique(np.geomspace(*bound, 128).round()).astype(int).tolist()
    return found


@dataclass(frozen=True, slots=True)
class Least:
    """What the cheapest blocks take of a sample where they come nearest to E_max or exceed it most (J).

    ``factor`` is what E_max would have to be multiplied with for them to fit.
    """

    joules: float
    emax_j: float
    factor: float
    batch_size: int
    prompt_tokens: int
    new_tokens: int


def least_reachable(bills: Sequence[Bill], margin: float, lengths: Lengths) -> Least:
    """How far E_max would have to be for ``bills`` to fit: their base is the least that is to be asked of it.

    ``nothing`` of ``Prices`` is the least of all; the directions may always be off.
    """
    found: list[Least] = []
    for bill in bills:
        requests = bill.batch_size
        assert bill.emax is not None
        emax = bill.emax.of(requests)
        for prompt in lengths.grid():
            base_N = by_new_tokens(bill.base, prompt, lengths.max_new_tokens)
            emax_N = by_new_tokens(emax, prompt, lengths.max_new_tokens)
            factor_N = base_N / ((1 - margin) * emax_N)
            worst = int(factor_N.argmax())
            found.append(
                Least(
                    float(base_N[worst]) / requests,
                    float(emax_N[worst]) / requests,
                    float(factor_N[worst]),
                    requests,
                    prompt,
                    worst + 1,
                )
            )
    return max(found, key=lambda least: least.factor)


def refuse_unreachable(
    bills: Sequence[Bill], margin: float, lengths: Lengths, *, emax_j: float, ratio: float | None, what: str
) -> None:
    """Raises HestError (exit 5) where ``bills`` do not fit E_max, naming the least budget that they do.

    ``emax_j`` and ``ratio`` are what was asked for; ``what`` says what the bills are of. Training asks this
    of the bills with everything off before it starts.
    """
    if _fits(bills, margin, lengths, 0.0):
        return
    least = least_reachable(bills, margin, lengths)

    def rounded_up(value: float) -> float:
        unit = 10.0 ** (math.floor(math.log10(value)) - 2)
        tried = math.ceil(value * least.factor / unit) * unit
        # The lengths looked at are a grid: the least between them may ask for a little more.
        while not _fits(_scaled(bills, tried / value), margin, lengths, 0.0):
            tried += unit
        return tried

    flag = f"--emax {rounded_up(emax_j):.6g}" if ratio is None else f"--emax-ratio {rounded_up(ratio):.6g}"
    raise HestError(
        f"the budget cannot be met: {what} takes {least.joules:.4g} J a sample of {least.prompt_tokens} + "
        f"{least.new_tokens} tokens in a batch of {least.batch_size}, E_max there is {least.emax_j:.4g} J, "
        f"both predicted ({100 * margin:.2g} % of it in reserve)",
        f"{flag} is the least reachable here",
        Exit.OVER_BUDGET,
    )


@dataclass(slots=True)
class _Block:
    """One block while it is mended: what each state loses (nats a token), and its gate's logits."""

    layer: int
    block: int
    decided: int
    state: int
    why: Why
    loss_S: tuple[float, float, float]
    logit_S: tuple[float, float, float] | None

    def worth(self, low: int, high: int) -> float:
        """What the higher state gains over the lower (nats a token)."""
        return self.loss_S[low] - self.loss_S[high]

    def margins(self) -> tuple[float, float] | None:
        """The gate's log-odds of full over int8, and of on over off."""
        if self.logit_S is None:
            return None
        off, int8, full = self.logit_S
        return full - int8, max(int8, full) - off


def mend(
    prices: Sequence[Prices],
    bills: Sequence[Bill],
    decided: BlockStates,
    *,
    logits_L2S: Tensor | None,
    sensitivities: Sensitivities,
    spend: Literal["useful", "all"],
    int8: bool,
    fit_error: float,
    margin: float,
    position_j: float,
    lengths: Lengths,
    ratio: float | None,
    emax_j: float,
) -> tuple[BlockStates, tuple[tuple[BlockChoice, BlockChoice], ...]]:
    """The blocks' states within E_max at all lengths, and how each came by its own.

    ``prices`` and ``bills`` (for their E_max) are of the same batch sizes, rising; ``decided`` is where it
    begins, and ``logits_L2S`` the gate's logits, for the record. ``int8`` false offers off and full alone.
    ``position_j`` is what the directions decide to spend per billed token position. First what is free: int8
    where it does no measurable harm (``spend`` useful). Then blocks are demoted by the least likelihood per
    joule until the worst case fits, and promoted again by the most as far as the rest goes. Raises HestError
    (exit 5) where nothing fits, usage for what was not calibrated.
    """
    off = [replace(bill, base=price.nothing) for bill, price in zip(bills, prices, strict=True)]
    refuse_unreachable(
        off, margin, lengths, emax_j=emax_j, ratio=ratio, what="the network with all blocks off"
    )
    largest = prices[-1]

    def cost_j(block: int, state: int) -> float:
        """A sample's joules of one block at the mean lengths."""
        if state == OFF:
            return 0.0
        terms = largest.component[block, state]
        return terms.total_j(lengths.prompt_tokens, lengths.new_tokens) / largest.batch_size

    offered = [int8 and cost_j(block, INT8) * (1 + fit_error) < cost_j(block, FULL) for block in _ALL]
    held: list[_Block] = []
    for layer in range(decided.layers):
        for block in _ALL:
            state = decided.state(layer, block)
            losses = sensitivities.off[layer][block], sensitivities.int8[layer][block], 0.0
            logits = None if logits_L2S is None else tuple(logits_L2S[layer, block].tolist())
            held.append(_Block(layer, block, state, state, "gate", losses, logits))
    harms = [sensitivities.int8_harms(b.layer, b.block) for b in held]
    for b, harm in zip(held, harms, strict=True):
        if b.state == INT8 and not offered[b.block]:
            b.state, b.why = FULL, "dear"
        elif b.state == FULL and offered[b.block] and spend == "useful" and not harm:
            b.state, b.why = INT8, "free"

    def fits() -> bool:
        states = _states(held)
        tried = [replace(bill, base=p.base(states)) for bill, p in zip(bills, prices, strict=True)]
        return _fits(tried, margin, lengths, position_j)

    def step(b: _Block, direction: int) -> tuple[int, float, float]:
        """The next state offered in a direction, what the higher of the two gains, and their joules."""
        state = b.state + direction
        if state == INT8 and not offered[b.block]:
            state += direction
        low, high = min(b.state, state), max(b.state, state)
        return state, b.worth(low, high), cost_j(b.block, high) - cost_j(b.block, low)

    while not fits():
        moves = [(*step(b, -1), b) for b in held if b.state != OFF]
        if not moves:
            break  # the directions alone exceed the rest: the ledger cuts them
        state, _, _, b = min(moves, key=lambda move: _per_joule(move[1], move[2]))
        b.state, b.why = state, "budget"
    # Each once in the order of worth, and again whoever rose: what is too dear leaves room for cheaper ones.
    waiting = [i for i, b in enumerate(held) if b.state != FULL]
    while waiting:
        waiting.sort(key=lambda i: _per_joule(*step(held[i], 1)[1:]))
        b, index = held[waiting[-1]], waiting.pop()
        before = b.state, b.why
        state, worth, _ = step(b, 1)
        buys = harms[index] if b.state == INT8 else worth > 0
        if spend == "useful" and not buys:
            continue
        b.state, b.why = state, "gate" if state == b.decided else "spare"
        if not fits():
            b.state, b.why = before
        elif b.state != FULL:
            waiting.append(index)
    return _told(held, cost_j, sensitivities)


def _told(
    held: Sequence[_Block], cost_j: _CostJ, sensitivities: Sensitivities
) -> tuple[BlockStates, tuple[tuple[BlockChoice, BlockChoice], ...]]:
    told = []
    for b in held:
        saved_j = cost_j(b.block, FULL) - cost_j(b.block, b.state)
        told.append(
            BlockChoice(
                b.state,
                b.decided,
                b.why,
                b.margins(),
                saved_j,
                sensitivities.harm(b.layer, b.block),
            )
        )
    return _states(held), tuple(zip(told[::2], told[1::2], strict=True))


def _states(held: Sequence[_Block]) -> BlockStates:
    return BlockStates(tuple(b.state for b in held[::2]), tuple(b.state for b in held[1::2]))


def _per_joule(worth: float, joules: float) -> float:
    """A block that saves nothing is never worth demoting, and always worth having."""
    return worth / joules if joules > 0 else math.inf


def _scaled(bills: Sequence[Bill], factor: float) -> list[Bill]:
    scaled = []
    for bill in bills:
        assert bill.emax is not None
        emax = replace(
            bill.emax, batch=bill.emax.batch.times(factor), request=bill.emax.request.times(factor)
        )
        scaled.append(replace(bill, emax=emax))
    return scaled


def _fits(bills: Sequence[Bill], margin: float, lengths: Lengths, position_j: float) -> bool:
    """Whether whole batches and their directions are within E_max at every length."""
    for bill in bills:
        rows_j = bill.batch_size * bill.num_beams * position_j
        directions = Terms(call_j=rows_j, token_j=rows_j, step_j=rows_j)
        over = directions.plus(bill.spare(bill.batch_size, margin).times(-1.0))
        if most_j(over, lengths.bound, lengths.max_new_tokens) > 0:
            return False
    return True
