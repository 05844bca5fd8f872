"""HEST's gate of whole blocks: the layer scores choose {off, int8, full} for attention and MLP apart.

Shape legend: L layers, 2 blocks (attention, MLP), S = 3 states.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hestctl.records import FULL, OFF, BlockStates

_EDGE = 0.05
"""Spreads by which a settled state holds."""

_SURE = 200.0
"""Beta of settled gates: nothing is drawn any more, and what is expected is what was decided."""


class BlockGate(nn.Module):
    """Ordinal logits of every block, as those of the directions: the argmax switches at c1 and at c2.

    Scores come from the controller's layer weights, in spreads from their centre; every block has its own
    thresholds ``c1`` and ``c2 = c1 + softplus(gap)``, all of them one beta (in inverse spreads). ``off_L2``
    remembers what leaving each block out costs (nats per answer token), as far as training has measured it.
    ``int8`` false takes that state from the offer.
    """

    def __init__(self, layers: int, *, int8: bool = True) -> None:
        super().__init__()
        barred = torch.tensor([0.0, 0.0 if int8 else -math.inf, 0.0])
        self.register_buffer("barred_S", barred, persistent=False)
        self.barred_S: Tensor
        self.threshold = nn.Parameter(torch.full((layers, 2), -3.0))
        self.gap = nn.Parameter(torch.full((layers, 2), math.log(math.e - 1)))
        self.log_beta = nn.Parameter(torch.tensor(math.log(4.0)))
        self.register_buffer("centre", torch.tensor(0.5))
        self.register_buffer("spread", torch.tensor(0.04))
        self.centre: Tensor
        self.register_buffer("settled_L", torch.full((layers,), math.nan))
        self.spread: Tensor
        self.settled_L: Tensor
        self.register_buffer("off_L2", torch.full((layers, 2), math.nan))
        self.off_L2: Tensor

    def start(self, score_L: Tensor, full_L2: Tensor, on_L2: Tensor) -> None:
        """Before step 0: margins of the scores over c2 (``full_L2``) and over c1 (``on_L2``, the larger).

        Both are in spreads; ``score_L`` are the controller's layer scores.
        """
        with torch.no_grad():
            self.centre.copy_(score_L.mean())
            self.spread.copy_(score_L.std().nan_to_num(0.0).clamp_min(1e-3))
            self.threshold.copy_(self.normal(score_L)[:, None] - on_L2)
            self.gap.copy_(torch.log(torch.expm1((on_L2 - full_L2).clamp_min(1e-3))))

    def settle(self, score_L: Tensor, states: BlockStates) -> None:
        """Make ``states`` what the logits say from now on, however the scores move with other training."""
        with torch.no_grad():
            self.settled_L.copy_(score_L)
            score_L1 = self.normal(score_L)[:, None]
            state_L2 = torch.tensor([states.attention, states.mlp], device=score_L.device).T
            on_L2 = score_L1 - self.threshold
            full_L2 = on_L2 - F.softplus(self.gap)
            # Margins that already agree stay: they are what training found out.
            full_L2 = torch.where(state_L2 == FULL, full_L2.clamp_min(_EDGE), full_L2.clamp_max(-_EDGE))
            on_L2 = torch.where(state_L2 == OFF, on_L2.clamp_max(-_EDGE), on_L2.clamp_min(_EDGE))
            on_L2 = torch.where(state_L2 == FULL, torch.maximum(on_L2, full_L2 + _EDGE), on_L2)
            full_L2 = torch.minimum(full_L2, on_L2 - _EDGE)
            self.threshold.copy_(score_L1 - on_L2)
            self.gap.copy_(torch.log(torch.expm1(on_L2 - full_L2)))
            self.log_beta.fill_(math.log(_SURE))

    def normal(self, score_L: Tensor) -> Tensor:
        """Scores in spreads from the centre, (L,)."""
        return (score_L - self.centre) / self.spread

    def logits(self, score_L: Tensor) -> Tensor:
        """Logits (L, 2, S) of the blocks' states."""
        score_L = torch.where(self.settled_L.isnan(), score_L, self.settled_L)
        low_L2 = self.normal(score_L)[:, None] - self.threshold
        high_L2 = 2 * low_L2 - F.softplus(self.gap)
        stacked = torch.stack((torch.zeros_like(low_L2), low_L2, high_L2), -1)
        return self.log_beta.exp() * stacked + self.barred_S
