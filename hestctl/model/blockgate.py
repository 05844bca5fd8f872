"""HEST's gate of whole blocks: the layer scores choose {off, int8, full} for attention and MLP apart.

Shape legend: L layers, 2 blocks (attention, MLP), S = 3 states.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BlockGate(nn.Module):
    """Ordinal logits of every block, as those of the directions: the argmax switches at c1 and at c2.

    Scores come from the controller's layer weights, in spreads from their centre; every block has its own
    thresholds ``c1`` and ``c2 = c1 + softplus(gap)``, all of them one beta (in inverse spreads).
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.full((layers, 2), -3.0))
        self.gap = nn.Parameter(torch.full((layers, 2), math.log(math.e - 1)))
        self.log_beta = nn.Parameter(torch.tensor(math.log(4.0)))
        self.register_buffer("centre", torch.tensor(0.5))
        self.register_buffer("spread", torch.tensor(0.04))
        self.centre: Tensor
        self.spread: Tensor

    def start(self, score_L: Tensor, full_L2: Tensor, on_L2: Tensor) -> None:
        """Before step 0: margins of the scores over c2 (``full_L2``) and over c1 (``on_L2``, the larger).

        Both are in spreads; ``score_L`` are the controller's layer scores.
        """
        with torch.no_grad():
            self.centre.copy_(score_L.mean())
            self.spread.copy_(score_L.std().nan_to_num(0.0).clamp_min(1e-3))
            self.threshold.copy_(self.normal(score_L)[:, None] - on_L2)
            self.gap.copy_(torch.log(torch.expm1((on_L2 - full_L2).clamp_min(1e-3))))

    def normal(self, score_L: Tensor) -> Tensor:
        """Scores in spreads from the centre, (L,)."""
        return (score_L - self.centre) / self.spread

    def logits(self, score_L: Tensor) -> Tensor:
        """Logits (L, 2, S) of the blocks' states."""
        low_L2 = self.normal(score_L)[:, None] - self.threshold
        high_L2 = 2 * low_L2 - F.softplus(self.gap)
        return self.log_beta.exp() * torch.stack((torch.zeros_like(low_L2), low_L2, high_L2), -1)
