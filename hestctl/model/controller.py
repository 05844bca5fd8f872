"""Controllers: what decides how open an adapter's directions are, layer by layer and token by token.

Shape legend: B batch, T tokens, D hidden size, L layers, R directions, K controller width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FactorisedController(nn.Module):
    """One controller for the whole network: ``p[l,t] = mean_k(sigmoid(x W_tok) * sigmoid(W_layer[l]))``.

    ``D*K + L*K`` parameters; O((T + L) K) beyond the projection.
    """

    def __init__(self, layers: int, hidden: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(hidden, width, generator=generator) * 0.02)
        self.layer = nn.Parameter(torch.randn(layers, width, generator=generator))

    def forward(self, x_BTD: Tensor, layer: int) -> Tensor:
        """Score p in (0, 1), (B, T)."""
        token_BTK = torch.sigmoid(x_BTD @ self.token.to(x_BTD.dtype))
        return (token_BTK.float() * torch.sigmoid(self.layer[layer])).mean(-1)

    def layer_scores(self) -> Tensor:
        """``mean_k sigmoid(W_layer[l])``: what chooses the states of a layer's blocks, (L,)."""
        return torch.sigmoid(self.layer).mean(-1)


class UnfactorisedController(nn.Module):
    """The ablation: a D x K projection of its own in every layer, ``p[l,t] = mean_k sigmoid(x W[l])``.

    It has no layer weights: what blocks do is left to their thresholds.
    """

    def __init__(self, layers: int, hidden: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(layers, hidden, width, generator=generator) * 0.02)

    def forward(self, x_BTD: Tensor, layer: int) -> Tensor:
        """Score p in (0, 1), (B, T)."""
        return torch.sigmoid((x_BTD @ self.token[layer].to(x_BTD.dtype)).float()).mean(-1)

    def layer_scores(self) -> Tensor:
        """Zeros (L,): there is nothing that the layers' blocks could share."""
        return self.token.new_zeros(len(self.token))
