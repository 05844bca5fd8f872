"""Gates: the state {off, int8, full} of every direction, drawn in training and decided in generation.

Shape legend: B batch, T tokens, D hidden size, L layers, R directions, S = 3 states.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hestctl.energy.model import GateKind
from hestctl.model.blockgate import BlockGate
from hestctl.model.controller import FactorisedController, UnfactorisedController
from hestctl.records import FULL, INT8, OFF


@dataclass(frozen=True, slots=True)
class GateNoise:
    """Gumbel noise as a function of (seed, step, micro-batch, layer) alone.

    Recomputation under gradient checkpointing and a resumed run see the very same noise, whatever
    the global random state is.
    """

    seed: int
    step: int
    micro: int

    def gumbel(self, layer: int, shape: torch.Size, device: torch.device) -> Tensor:
        words = np.random.SeedSequence([self.seed, self.step, self.micro, layer]).generate_state(2)
        generator = torch.Generator(device=device)
        generator.manual_seed(int(words[0]) << 31 ^ int(words[1]))
        uniform = torch.rand(shape, generator=generator, device=device).clamp_(1e-10, 1 - 1e-7)
        return -torch.log(-torch.log(uniform))


@dataclass(frozen=True, slots=True)
class Draw:
    """Hard one-hot states with soft gradients (B, T, R, S), and the probabilities behind them."""

    state_BTRS: Tensor
    probability_BTRS: Tensor


class Gate(Protocol):
    """What every method's gate offers: a draw for training, a decision for generation."""

    @property
    def kind(self) -> GateKind: ...

    def draw(self, x_BTD: Tensor, layer: int, noise: GateNoise | None) -> Draw: ...

    def decide(self, x_BTD: Tensor, layer: int) -> Tensor:
        """States (B, T, R), int64 in {0: off, 1: int8, 2: full}."""
        ...


class OrdinalGate(nn.Module):
    """HEST's gate: ``logits = beta * (0, p - c1, 2p - c1 - c2)`` with ``c2 = c1 + softplus(.)``.

    The argmax switches exactly at c1 and at c2. Scores differ by about 0.01 from token to token and
    not alike in every layer, so everything is measured in each layer's own spread of scores, which
    ``spread_over`` finds before step 0: ``c1 = centre + spread * threshold``, and beta is in inverse
    spreads. ``states`` names the states on offer: the table of energies drops int8 where it is not
    cheaper than full precision. ``blocks`` chooses the states of the layers' own blocks (scope network),
    from the same controller's layer scores.
    """

    kind: GateKind = "ordinal"

    def __init__(
        self,
        controller: FactorisedController | UnfactorisedController,
        layers: int,
        rank: int,
        *,
        tau: float,
        states: tuple[int, ...],
        blocks: BlockGate | None = None,
    ) -> None:
        super().__init__()
        self.controller = controller
        self.tau = tau
        self.blocks = blocks
        # Staggered, so that every state is in use from the start.
        self.threshold = nn.Parameter(torch.linspace(-1.5, 1.0, rank).repeat(layers, 1))
        self.gap = nn.Parameter(torch.full((layers, rank), math.log(math.e - 1)))
        self.log_beta = nn.Parameter(torch.tensor(math.log(4.0)))
        self.register_buffer("centre_L", torch.full((layers,), 0.25))
        self.register_buffer("spread_L", torch.full((layers,), 0.01))
        barred = [0.0 if state in states else -math.inf for state in (OFF, INT8, FULL)]
        self.register_buffer("barred_S", torch.tensor(barred), persistent=False)
        self._two_states = set(states) == {OFF, FULL}
        self.centre_L: Tensor
        self.spread_L: Tensor
        self.barred_S: Tensor

    def spread_over(self, mean_L: Tensor, deviation_L: Tensor) -> None:
        """Take the mean and standard deviation of p over real tokens, layer by layer."""
        self.centre_L.copy_(mean_L)
        self.spread_L.copy_(deviation_L.clamp_min(1e-5))

    def scores(self, x_BTD: Tensor, layer: int) -> Tensor:
        """The controller's p in spreads from the layer's centre, (B, T)."""
        p_BT: Tensor = self.controller(x_BTD, layer)
        return (p_BT - self.centre_L[layer]) / self.spread_L[layer]

    def logits_of(self, score: Tensor, threshold: Tensor, gap: Tensor) -> Tensor:
        """Logits (..., R, S) of scores (...,) under thresholds and gaps that broadcast to (..., R)."""
        low = score[..., None] - threshold
        high = 2 * low - F.softplus(gap)
        stacked = torch.stack((torch.zeros_like(low), low, high), -1)
        return self.log_beta.exp() * stacked + self.barred_S

    def logits(self, x_BTD: Tensor, layer: int) -> Tensor:
        return self.logits_of(self.scores(x_BTD, layer), self.threshold[layer], self.gap[layer])

    def block_logits(self) -> Tensor:
        """Logits (L, 2, S) of the blocks' states; only where the gate has ``blocks``."""
        assert self.blocks is not None
        return self.blocks.logits(self.controller.layer_scores())

    def draw(self, x_BTD: Tensor, layer: int, noise: GateNoise | None) -> Draw:
        logits = self.logits(x_BTD, layer)
        probability = logits.softmax(-1)
        if noise is None:
            soft = probability
            noisy = logits
        else:
            noisy = logits + noise.gumbel(layer, logits.shape, logits.device)
            soft = (noisy / self.tau).softmax(-1)
        hard = F.one_hot(noisy.argmax(-1), 3).to(soft.dtype)
        return Draw(hard + soft - soft.detach(), probability)

    def decide(self, x_BTD: Tensor, layer: int) -> Tensor:
        return self.decided(self.scores(x_BTD, layer), self.threshold[layer], self.gap[layer])

    def decided(self, score: Tensor, threshold: Tensor, gap: Tensor) -> Tensor:
        """The argmax of ``logits_of`` the same, (..., R), int64."""
        if not self._two_states:
            return self.logits_of(score, threshold, gap).argmax(-1)
        # A decode step on a CPU is made of small operations: between two states a comparison decides.
        return FULL * (2 * (score[..., None] - threshold) > F.softplus(gap)).long()


class _TwoStateGate(nn.Module, ABC):
    """Open where the logit is positive (sigmoid above 0.5), in full precision; straight-through."""

    @abstractmethod
    def score(self, x_BTD: Tensor, layer: int) -> Tensor:
        """Logits of being open, (B, T, R)."""

    def draw(self, x_BTD: Tensor, layer: int, noise: GateNoise | None) -> Draw:
        score_BTR = self.score(x_BTD, layer)
        soft = torch.sigmoid(score_BTR)
        hard = (score_BTR > 0).to(soft.dtype)
        opened = hard + soft - soft.detach()
        zeros = torch.zeros_like(opened)
        states = torch.stack((1 - opened, zeros, opened), -1)
        return Draw(states, torch.stack((1 - soft, zeros, soft), -1))

    def decide(self, x_BTD: Tensor, layer: int) -> Tensor:
        return FULL * (self.score(x_BTD, layer) > 0).long()


class LinearGate(_TwoStateGate):
    """TABS: every layer its own linear controller D -> R without bias. L*D*R parameters."""

    kind: GateKind = "linear"

    def __init__(self, layers: int, hidden: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(layers, hidden, rank, generator=generator) * 0.02)

    def score(self, x_BTD: Tensor, layer: int) -> Tensor:
        return (x_BTD @ self.weight[layer].to(x_BTD.dtype)).float()


class StaticGate(_TwoStateGate):
    """BHSP: one learned gate a direction, the same for every token. L*R parameters, all open at first."""

    kind: GateKind = "static"

    def __init__(self, layers: int, rank: int) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.full((layers, rank), 0.5))

    def score(self, x_BTD: Tensor, layer: int) -> Tensor:
        return self.level[layer].expand(*x_BTD.shape[:2], -1)
