"""The MatMuls of a decoder layer, each with what stands before it.

A product in int8 by our own kernels quantises its input in the same kernel that norms, sums or multiplies
it; every other product leaves that to torch, compiled on a GPU.

Shape legend: N tokens, D inputs, M outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from hestctl.kernels.int8 import Int8Linear


def rms_norm(x_ND: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """RMS norm in fp32, rounded to the input's type before the weight, as the models were trained."""
    if x_ND.dtype == torch.float32:  # no rounding in between: the library's own is the same
        return F.rms_norm(x_ND, weight_D.shape, weight_D, epsilon)
    wide = x_ND.float()
    return weight_D * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x_ND.dtype)


class _Plain(ABC):
    """A product that takes its input as torch made it."""

    @abstractmethod
    def __call__(self, x_ND: Tensor) -> Tensor: ...

    def normed(self, x_ND: Tensor, norm_D: Tensor, epsilon: float) -> Tensor:
        """The product of the input's RMS norm with weight ``norm_D``."""
        return self(rms_norm(x_ND, norm_D, epsilon))

    def summed(self, x_ND: Tensor, y_ND: Tensor, norm_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """The sum ``x + y``, and the product of its norm."""
        sum_ND = x_ND + y_ND
        return sum_ND, self.normed(sum_ND, norm_D, epsilon)

    def gated(self, gate_up: Tensor) -> Tensor:
        """The product of ``silu(gate) * up``, which stand side by side (N, 2D)."""
        gate_ND, up_ND = gate_up.chunk(2, -1)
        return self(F.silu(gate_ND) * up_ND)


class Product(_Plain):
    """``x @ weight.T + bias`` in the weights' own type."""

    def __init__(self, weight_MD: Tensor, bias_M: Tensor | None) -> None:
        self.weight_MD, self.bias_M = weight_MD, bias_M

    def __call__(self, x_ND: Tensor) -> Tensor:
        return F.linear(x_ND, self.weight_MD, self.bias_M)


class Int8Product(_Plain):
    """The same in int8, by the numerics of ``kernels.reference``.

    Fused with our own kernels' quantisation, a norm may move a code by one step: its sum has another order.
    ``linear`` keeps int8 codes of its own: a quarter to a half of the weights' bytes beside them.
    """

    def __init__(self, linear: Int8Linear) -> None:
        self.linear = linear

    def __call__(self, x_ND: Tensor) -> Tensor:
        return self.linear(x_ND)

    def normed(self, x_ND: Tensor, norm_D: Tensor, epsilon: float) -> Tensor:
        own = self.linear.own
        if own is None:
            return super().normed(x_ND, norm_D, epsilon)
        return self.linear.scaled(*own.rms(x_ND, norm_D, epsilon), x_ND.dtype)

    def summed(self, x_ND: Tensor, y_ND: Tensor, norm_D: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        own = self.linear.own
        if own is None:
            return super().summed(x_ND, y_ND, norm_D, epsilon)
        q_ND, scale_N, sum_ND = own.add_rms(x_ND, y_ND, norm_D, epsilon)
        return sum_ND, self.linear.scaled(q_ND, scale_N, x_ND.dtype)

    def gated(self, gate_up: Tensor) -> Tensor:
        own = self.linear.own
        if own is None:
            return super().gated(gate_up)
        return self.linear.scaled(*own.silu(gate_up), gate_up.dtype)
