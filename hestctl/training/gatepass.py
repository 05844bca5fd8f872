"""One training forward pass through the adapters: draws the gates, and adds up expected energy.

Shape legend: B batch, T tokens, D hidden size, L layers, R directions, S = 3 states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hestctl.model.gates import GateNoise
from hestctl.model.spectral import SpectralAdapters, normalise


@dataclass(frozen=True, slots=True)
class _LayerEnergy:
    expected_B: Tensor
    decided_B: Tensor
    counts_S: Tensor


class GatePass:
    """Give this to ``model.spectral.applied``; read ``energy`` and ``shares`` after the forward.

    Figures are kept by layer, so that recomputation under gradient checkpointing replaces them
    instead of adding to them.
    """

    def __init__(
        self,
        adapters: SpectralAdapters,
        mask_BT: Tensor,
        costs_j: tuple[float, float, float],
        noise: GateNoise | None,
    ) -> None:
        self._adapters = adapters
        self._mask_BT = mask_BT.float()
        # Joules of one direction are tiny: in units of a full direction nothing underflows.
        self._unit_j = costs_j[2]
        self._price_S = torch.tensor([cost / costs_j[2] for cost in costs_j], device=mask_BT.device)
        self._noise = noise
        self._layers: dict[int, _LayerEnergy] = {}

    def __call__(self, layer: int, hidden_BTD: Tensor) -> Tensor:
        x_BTD = normalise(hidden_BTD)
        draw = self._adapters.gate.draw(x_BTD, layer, self._noise)
        per_token_BTS = draw.probability_BTRS.sum(2)
        drawn_BTS = draw.state_BTRS.detach().sum(2)
        weight_BT1 = self._mask_BT[..., None]
        self._layers[layer] = _LayerEnergy(
            expected_B=((per_token_BTS * weight_BT1).sum(1) * self._price_S).sum(-1),
            decided_B=((_hard(draw.probability_BTRS) * weight_BT1).sum(1) * self._price_S).sum(-1),
            counts_S=(drawn_BTS * weight_BT1).sum((0, 1)),
        )
        return hidden_BTD + self._adapters.delta(x_BTD, layer, draw.state_BTRS)

    def expected_j(self) -> Tensor:
        """Joules of every sequence under the gates' probabilities, (B,); carries the gradient."""
        return torch.stack([entry.expected_B for entry in self._layers.values()]).sum(0) * self._unit_j

    def decided_j(self) -> Tensor:
        """Joules of every sequence as the gates decide without noise, (B,): what generation will ask."""
        return torch.stack([entry.decided_B for entry in self._layers.values()]).sum(0) * self._unit_j

    def shares(self) -> tuple[float, float, float]:
        """Shares of (off, int8, full) among the states drawn."""
        total_S = torch.stack([entry.counts_S for entry in self._layers.values()]).sum(0)
        off, int8, full = (total_S / total_S.sum()).tolist()
        return off, int8, full


def _hard(probability_BTRS: Tensor) -> Tensor:
    """Counts of the most probable state, (B, T, S)."""
    best = probability_BTRS.detach().argmax(-1, keepdim=True)
    return torch.zeros_like(probability_BTRS).scatter_(-1, best, 1.0).sum(2)
