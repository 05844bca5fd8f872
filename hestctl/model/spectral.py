"""The spectral adapter: R gated directions on every decoder layer's output.

``delta(h) = ((x @ U) * s * m) @ V`` with x the RMS-normalised h, U (D, R), s (R,), V (R, D), m the gate.
Raw residual norms differ by a factor of hundreds between layers, hence the normalisation.

Shape legend: B batch, T tokens, D hidden size, L layers, R directions, S = 3 states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hestctl.kernels.reference import int8_linear_ste
from hestctl.model.gates import Gate
from hestctl.records import FULL, INT8


class SpectralAdapters(nn.Module):
    """The adapters of all layers, and the gate they share.

    U and V start orthonormal and s at zero: training starts at the backbone's own function.
    ``uses_int8`` false leaves the int8 products out altogether.
    """

    def __init__(
        self, layers: int, hidden: int, rank: int, gate: Gate, *, uses_int8: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        down = torch.randn(layers, hidden, rank, generator=generator) * 0.02
        up = torch.randn(layers, hidden, rank, generator=generator) * 0.02
        self.down = nn.Parameter(torch.linalg.qr(down).Q.contiguous())
        self.up = nn.Parameter(torch.linalg.qr(up).Q.transpose(1, 2).contiguous())
        self.scale = nn.Parameter(torch.zeros(layers, rank))
        self.gate = gate
        self.uses_int8 = uses_int8

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers, hidden size, directions)."""
        layers, hidden, rank = self.down.shape
        return layers, hidden, rank

    def delta(self, x_BTD: Tensor, layer: int, state_BTRS: Tensor) -> Tensor:
        """What the layer's directions add under the given one-hot states, (B, T, D)."""
        down_DR, up_RD = self.down[layer].to(x_BTD.dtype), self.up[layer].to(x_BTD.dtype)
        scale_R = self.scale[layer].to(x_BTD.dtype)
        state_BTRS = state_BTRS.to(x_BTD.dtype)
        out = (x_BTD @ down_DR * scale_R * state_BTRS[..., FULL]) @ up_RD
        if self.uses_int8:
            x_ND = x_BTD.flatten(0, 1)
            z_NR = int8_linear_ste(x_ND, down_DR.T) * scale_R * state_BTRS[..., INT8].flatten(0, 1)
            out = out + int8_linear_ste(z_NR, up_RD.T).view_as(out)
        return out

    def importance(self) -> Tensor:
        """How much a direction can add to the residual: ``|s| * |U_i| * |V_i|``, (L, R)."""
        down_LR: Tensor = torch.linalg.vector_norm(self.down, dim=1)
        up_LR: Tensor = torch.linalg.vector_norm(self.up, dim=2)
        return self.scale.abs() * down_LR * up_LR


def normalise(hidden_BTD: Tensor, epsilon: float = 1e-6) -> Tensor:
    """RMS normalisation without a weight, computed in fp32, returned in the input's type."""
    wide = hidden_BTD.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(hidden_BTD.dtype)


@contextmanager
def applied(layers: nn.ModuleList, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """While open, ``change(layer index, output (B, T, D))`` replaces every decoder layer's output."""

    def hook(index: int) -> Callable[[nn.Module, Any, Any], Any]:
        def run(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(index, output[0]), *output[1:])
            return change(index, output)

        return run

    handles = [layer.register_forward_hook(hook(index)) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
