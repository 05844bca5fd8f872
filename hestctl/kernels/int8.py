"""A linear layer in int8: weights quantised once, activations per token, the product by a named kernel.

Bit for bit the numerics of ``kernels.reference``, whichever kernel of ``kernels.products`` runs it, for
integer sums are exact whatever adds them up.

Shape legend: N rows (tokens), K inputs, M outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hestctl.kernels.products import Int8Weight, Product, product, why_not
from hestctl.kernels.reference import quantise_rows

DEFAULT_KERNEL = "torch._int_mm"
"""What runs everywhere, until ``kernels.choose`` has found something more frugal."""

Rows = tuple[Tensor, Tensor]
"""Quantised rows: int8 values (N, K) and fp32 scales (N,)."""


class Quantisers(NamedTuple):
    """Our own quantisation of rows, alone and fused with what stands before; ``kernels.quantise_triton``."""

    rows: Callable[[Tensor], Rows]
    rms: Callable[[Tensor, Tensor, float], Rows]
    add_rms: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]
    silu: Callable[[Tensor], Rows]


class Int8Linear:
    """``x @ cat(weights).T + cat(biases)`` in int8: weights per output channel, activations per token.

    ``weights`` (each M_i x K) share their input, which is then quantised once for all of them; ``biases``
    are as many, each (M_i,) or None. Calling it with ``x`` (..., K) gives (..., sum of M_i) in the type of
    ``x``. ``kernel`` names the product, or several by the most rows that each serves, the last of which
    serves all beyond (``kernels.choose`` finds the most frugal). Raises ValueError where one cannot run on
    the weights' device.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None] | None = None,
        *,
        kernel: str | Mapping[int, str] = DEFAULT_KERNEL,
    ) -> None:
        q_MK, scale_M1 = quantise_rows(torch.cat([weight.detach() for weight in weights]))
        self._take(Int8Weight(q_MK, scale_M1[:, 0].contiguous(), _cat_biases(weights, biases)), kernel)

    @classmethod
    def quantised(cls, weight: Int8Weight, *, kernel: str | Mapping[int, str] = DEFAULT_KERNEL) -> Int8Linear:
        """The layer of codes that exist already, bit for bit the one that would quantise anew."""
        made = cls.__new__(cls)
        made._take(weight, kernel)
        return made

    def _take(self, weight: Int8Weight, kernel: str | Mapping[int, str]) -> None:
        self.weight, q_MK = weight, weight.q_MK
        named = sorted({0: kernel}.items() if isinstance(kernel, str) else kernel.items())
        for _, name in named:
            reason = why_not(name, q_MK.device, *q_MK.shape)
            if reason is not None:
                raise ValueError(f"{name} cannot run here: {reason}")
        self._up_to = tuple((most, product(name)) for most, name in named[:-1])
        self._beyond: Product = product(named[-1][1])
        own = any(name.startswith("triton.") for _, name in named)
        self.own = _own_quantisers() if own else None
        """Where a kernel is our own, activations are quantised by our own too; None elsewhere."""
        self._quantise = _plain_quantiser if self.own is None else self.own.rows

    def __call__(self, x: Tensor) -> Tensor:
        q_NK, scale_N = self._quantise(x.reshape(-1, x.shape[-1]))
        return self.scaled(q_NK, scale_N, x.dtype).reshape(*x.shape[:-1], -1)

    def scaled(self, q_NK: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
        """The layer for rows that are quantised already (by a kernel fused with what stands before)."""
        for most, run in self._up_to:
            if q_NK.shape[0] <= most:
                return run(q_NK, scale_N, self.weight, dtype)
        return self._beyond(q_NK, scale_N, self.weight, dtype)


def _plain_quantiser(x_NK: Tensor) -> Rows:
    q_NK, scale_N1 = quantise_rows(x_NK)
    return q_NK, scale_N1[:, 0]


def _own_quantisers() -> Quantisers:
    from hestctl.kernels import quantise_triton as own

    return Quantisers(
        own.quantise_rows, own.rms_quantise_rows, own.add_rms_quantise_rows, own.silu_quantise_rows
    )


def _cat_biases(weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None) -> Tensor | None:
    """Biases side by side, zeros where a weight has none; None where no weight has one."""
    if biases is None or all(bias is None for bias in biases):
        return None
    pairs = zip(weights, biases, strict=True)
    return torch.cat([w.new_zeros(len(w)) if bias is None else bias.detach() for w, bias in pairs])
