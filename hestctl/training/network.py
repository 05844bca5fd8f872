"""Scope network in training: the states of whole blocks, drawn, priced and settled.

The forward pass runs what was drawn. The gradient of the expected loss with respect to a block's
probability of being off is the loss with that block off less the loss with it on, the others as they are
drawn. So that is what is measured: every micro-batch runs once more without a graph, one block turned over,
and the difference is remembered. Between measurements the memory serves, which starts as the calibrated
sensitivities. (The slope of the loss along a block's output costs no pass, and says next to nothing: on
SmolLM2 it calls the first attention harmful, without which nothing works.)

Shape legend: L layers, 2 blocks (attention, MLP), S = 3 states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hestctl.energy.model import Terms
from hestctl.model.blockgate import BlockGate
from hestctl.model.gates import GateNoise, OrdinalGate
from hestctl.model.sensitivity import Sensitivities
from hestctl.records import FULL, INT8, OFF, BlockStates

_NEW = 0.25
"""Weight of a measurement against all earlier ones: a micro-batch is few samples."""

_LEAST = 10
"""Blocks of a kind, by worth, from which a swap takes the one to leave out."""


@dataclass(frozen=True, slots=True)
class BlockPrices:
    """Joules of one generated sample, directions apart: a term for what no state changes (``rest``, the
    adapters' pass included), one for every kind of block and state (a single layer's), and E_max."""

    rest: Terms
    blocks: tuple[tuple[Terms, Terms, Terms], tuple[Terms, Terms, Terms]]
    emax: Terms | None

    def costs_j(self, prompt_tokens: Sequence[int], new_tokens: float) -> Tensor:
        """Joules of a block in each state, summed over samples of these lengths, (2, S) float64."""
        return torch.tensor(
            [
                [sum(terms.total_j(prompt, new_tokens) for prompt in prompt_tokens) for terms in states]
                for states in self.blocks
            ],
            dtype=torch.float64,
        )

    def rest_j(self, prompt_tokens: Sequence[int], new_tokens: float) -> float:
        """The rest, summed over samples of these lengths."""
        return sum(self.rest.total_j(prompt, new_tokens) for prompt in prompt_tokens)


class BlockDraw(NamedTuple):
    """States to run, the probabilities (L, 2, S) behind them, and the block to be turned over, if any."""

    states: BlockStates
    probability_L2S: Tensor
    probe: tuple[int, int] | None = None

    def turned(self) -> BlockStates:
        """The states with the probed block off where it is on, and on where it is off."""
        assert self.probe is not None
        full = self.probability_L2S[self.probe][FULL] > self.probability_L2S[self.probe][INT8]
        return turned(self.states, self.probe, FULL if full else INT8)


def turned(states: BlockStates, probe: tuple[int, int], on: int = INT8) -> BlockStates:
    """The states with one block off where it is on, and ``on`` where it is off."""
    layer, block = probe
    both = [list(states.attention), list(states.mlp)]
    both[block][layer] = on if both[block][layer] == OFF else OFF
    return BlockStates(tuple(both[0]), tuple(both[1]))


@dataclass(frozen=True, slots=True)
class Settlement:
    """How blocks settled before ``step``: from what the gates decided to what fits the budget.

    Both are shares of E_max, directions apart; the losses (nats a token) are before and after ``swaps`` that
    were kept.
    """

    step: int
    decided_over_emax: float
    settled_over_emax: float
    swaps: int
    loss_before: float
    loss: float


class BlockTraining:
    """The blocks of one training: states that are drawn until ``settle_step``, and fixed from there on.

    ``fixed`` holds them from the beginning (controls). The budget tightens over ``tighten_steps`` after the
    warm-up. ``choose`` turns a decision and sensitivities into states that fit it, at ``settle_step``; then
    ``swaps`` are tried on the first ``samples`` of training.
    """

    def __init__(
        self,
        layers: int,
        prices: BlockPrices,
        gate: OrdinalGate | None,
        sensitivities: Sensitivities | None,
        *,
        fixed: BlockStates | None,
        tighten_steps: int,
        settle_step: int,
        choose: Callable[[BlockStates, Sensitivities], BlockStates] | None,
        swaps: int = 0,
        samples: int = 8,
    ) -> None:
        self.prices = prices
        self.fixed = fixed
        self._tighten_steps = tighten_steps
        self._first_ratio: float | None = None
        self.settlement: Settlement | None = None
        self._layers, self._gate, self._choose = layers, gate, choose
        self._settle_step = settle_step
        self.swaps, self.samples = swaps, samples
        self._sensitivities = sensitivities
        self._harm_L2 = torch.zeros(layers, 2)
        if sensitivities is not None:
            known = sensitivities
            harms = [[known.int8_harms(layer, block) for block in range(2)] for layer in range(layers)]
            self._harm_L2 = torch.tensor(known.int8) * torch.tensor(harms)
            if fixed is None:
                self._blocks.off_L2.copy_(torch.tensor(known.off))

    @property
    def learning(self) -> bool:
        """Whether states are still drawn."""
        return self.fixed is None

    def looseness(self, steps: int, ratio: float) -> float:
        """What E_max is multiplied with ``steps`` after the warm-up: from what was spent at first, to 1.

        ``ratio`` is the E / E_max seen now; the first one asked about is where it begins.
        """
        if not self.learning:
            return 1.0
        if self._first_ratio is None:
            self._first_ratio = max(1.0, ratio)
        done = min(1.0, steps / max(1, self._tighten_steps))
        return self._first_ratio + (1 - self._first_ratio) * done

    def start(self, prompt_tokens: Sequence[int], new_tokens: float) -> None:
        """Before step 0: all blocks near full, those that are worth least for their joules nearest to less.

        Margins are ranks, not sensitivities, whose sizes differ by orders of magnitude.
        """
        gate, known = self._gate, self._sensitivities
        if self.fixed is not None or gate is None or gate.blocks is None or known is None:
            return
        cost_2S = self.prices.costs_j(prompt_tokens, new_tokens)
        off_L2, int8_L2 = torch.tensor(known.off), torch.tensor(known.int8)
        saved_2 = (cost_2S[:, FULL] - cost_2S[:, INT8]).clamp_min(1e-30)
        full_L2 = 0.75 + 1.25 * _ranks(int8_L2 / saved_2)
        on_L2 = full_L2 + 0.75 + 2.25 * _ranks(off_L2 / cost_2S[:, INT8].clamp_min(1e-30))
        score_L = gate.controller.layer_scores()
        gate.blocks.start(score_L, full_L2.to(score_L), on_L2.to(score_L))

    def due(self, step: int) -> bool:
        """Whether it is time to settle."""
        return self.fixed is None and step >= self._settle_step

    def learned(self) -> Sensitivities:
        """The sensitivities with what training has measured of blocks that are off."""
        known = self._sensitivities
        assert known is not None
        return known.with_off(self._blocks.off_L2)

    def proposed(self) -> BlockStates:
        """States that fit the budget, by what is known now."""
        assert self._choose is not None
        return self._choose(self.decided(), self.learned())

    def swap(self, states: BlockStates, rng: np.random.Generator) -> BlockStates | None:
        """A block that is off takes the state of one of its kind that is on, which goes off: no joules more.

        Out goes one of those that seem to be worth least. None where no kind has both.
        """
        worth_L2 = self._blocks.off_L2.cpu()
        layers = range(self._layers)
        off = [[x for x in layers if states.state(x, block) == OFF] for block in range(2)]
        on = [[x for x in layers if states.state(x, block) != OFF] for block in range(2)]
        backs = [(x, block) for block in range(2) if on[block] for x in off[block]]
        if not backs:
            return None
        back, block = backs[int(rng.integers(len(backs)))]
        least = sorted(on[block], key=lambda x: float(worth_L2[x, block]))[:_LEAST]
        out = least[int(rng.integers(len(least)))]
        swapped = [list(states.attention), list(states.mlp)]
        swapped[block][back], swapped[block][out] = swapped[block][out], OFF
        return BlockStates(tuple(swapped[0]), tuple(swapped[1]))

    def settle(self, states: BlockStates, told: Settlement) -> None:
        """Fix the states, and make them what the gate says."""
        assert self._gate is not None
        with torch.no_grad():
            self.fixed, self.settlement = states, told
            self._blocks.settle(self._gate.controller.layer_scores(), states)

    @property
    def _blocks(self) -> BlockGate:
        assert self._gate is not None
        assert self._gate.blocks is not None
        return self._gate.blocks

    def draw(self, noise: GateNoise | None) -> BlockDraw:
        """This micro-batch's states."""
        if self.fixed is not None:
            return BlockDraw(self.fixed, _one_hot(self.fixed))
        assert self._gate is not None
        logits = self._gate.block_logits()
        probability = logits.softmax(-1)
        if noise is None:
            return BlockDraw(_states(logits.argmax(-1)), probability)
        noisy = logits + noise.gumbel(self._layers, logits.shape, logits.device)
        return BlockDraw(_states(noisy.argmax(-1)), probability, self._probe(probability, noise))

    def _probe(self, probability: Tensor, noise: GateNoise) -> tuple[int, int]:
        """The block to measure: any, and most likely one whose being off hangs in the balance."""
        off = probability[..., OFF].detach().double().flatten().cpu().numpy()
        weight = off * (1 - off) + 1e-12
        weight = 0.9 * weight / weight.sum() + 0.1 / len(weight)
        rng = np.random.default_rng([noise.seed, noise.step, noise.micro, self._layers])
        layer, block = divmod(int(rng.choice(len(weight), p=weight)), 2)
        return layer, block

    def observe(self, probe: tuple[int, int], worth: float) -> None:
        """Remember the loss with the probed block off less that with it on (nats a token)."""
        known_L2 = self._blocks.off_L2
        known_L2[probe] += _NEW * (worth - known_L2[probe])

    def energy_j(
        self, draw: BlockDraw, prompt_tokens: Sequence[int], new_tokens: float
    ) -> tuple[Tensor, float]:
        """Joules of samples of these lengths, summed: expected, with its gradient, and as decided."""
        cost_2S = self.prices.costs_j(prompt_tokens, new_tokens)
        rest_j = self.prices.rest_j(prompt_tokens, new_tokens)
        probability = draw.probability_L2S
        expected = (probability.double() * cost_2S.to(probability.device)).sum() + rest_j
        best = F.one_hot(probability.argmax(-1), 3).double().sum(0).cpu()
        return expected, float((best * cost_2S).sum()) + rest_j

    def states_j(self, states: BlockStates, prompt_tokens: Sequence[int], new_tokens: float) -> float:
        """Joules of samples of these lengths in these states, summed."""
        cost_2S = self.prices.costs_j(prompt_tokens, new_tokens)
        blocks_j = (_one_hot(states).sum(0).double() * cost_2S).sum()
        return float(blocks_j) + self.prices.rest_j(prompt_tokens, new_tokens)

    def worth(self, draw: BlockDraw) -> Tensor | float:
        """Zero, with the gradient of the expected loss (nats a token) by the blocks' probabilities."""
        if not self.learning:
            return 0.0
        p_L2S = draw.probability_L2S
        moved_L2S = p_L2S - p_L2S.detach()
        off, int8 = self._blocks.off_L2.to(p_L2S), self._harm_L2.to(p_L2S)
        return (moved_L2S[..., OFF] * off + moved_L2S[..., INT8] * int8).sum()

    def decided(self) -> BlockStates:
        """The most probable states, or the fixed ones."""
        if self.fixed is not None:
            return self.fixed
        assert self._gate is not None
        return _states(self._gate.block_logits().argmax(-1))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the settled states, if any, and where the budget began."""
        fixed = None if self.fixed is None else asdict(self.fixed)
        told = None if self.settlement is None else asdict(self.settlement)
        return {"fixed": fixed, "first_ratio": self._first_ratio, "settlement": told}

    def restore(self, state: Mapping[str, Any]) -> None:
        fixed = state["fixed"]
        if fixed is not None:
            self.fixed = BlockStates(tuple(fixed["attention"]), tuple(fixed["mlp"]))
        self._first_ratio = state["first_ratio"]
        if state["settlement"] is not None:
            self.settlement = Settlement(**state["settlement"])


def _states(state_L2: Tensor) -> BlockStates:
    attention, mlp = state_L2.T.tolist()
    return BlockStates(tuple(attention), tuple(mlp))


def _one_hot(states: BlockStates) -> Tensor:
    return F.one_hot(torch.tensor([states.attention, states.mlp]).T, 3).float()


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0 (least) to 1, in the shape of ``values``."""
    order = values.flatten().argsort().argsort().float()
    return (order / max(1, len(order) - 1)).view_as(values)
