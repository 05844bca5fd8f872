"""A linear layer in int8: weights quantised once, activations per token, the product by a named kernel.

Bit for bit the numerics of ``kernels.reference``, whichever kernel of ``kernels.products`` runs it, for
integer sums are exact whatever adds them up.

Shape legend: N rows (tokens), K inputs, M outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hestctl.kernels.products import Int8Weight, Phase, phase_of, product, why_not
from hestctl.kernels.reference import quantise_rows

DEFAULT_KERNEL = "torch._int_mm"
"""What runs everywhere, until ``kernels.choose`` has found something more frugal."""


class Int8Linear:
    """``x @ cat(weights).T + cat(biases)`` in int8: weights per output channel, activations per token.

    ``weights`` (each M_i x K) share their input, which is then quantised once for all of them; ``biases``
    are as many, each (M_i,) or None. Calling it with ``x`` (..., K) gives (..., sum of M_i) in the type of
    ``x``. ``kernel`` names the product (``kernels.choose`` finds the most frugal), one for both phases or
    one for each: up to 16 rows are decode. Raises ValueError where it cannot run on the weights' device.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None] | None = None,
        *,
        kernel: str | Mapping[Phase, str] = DEFAULT_KERNEL,
    ) -> None:
        q_MK, scale_M1 = quantise_rows(torch.cat([weight.detach() for weight in weights]))
        self.weight = Int8Weight(q_MK, scale_M1[:, 0].contiguous(), _cat_biases(weights, biases))
        self.kernel = kernel
        names: dict[Phase, str]
        names = {"prefill": kernel, "decode": kernel} if isinstance(kernel, str) else dict(kernel)
        for name in names.values():
            reason = why_not(name, q_MK.device, *q_MK.shape)
            if reason is not None:
                raise ValueError(f"{name} cannot run here: {reason}")
        self._products = {phase: product(name) for phase, name in names.items()}
        self.own = any(name.startswith("triton.") for name in names.values())
        """True where activations are quantised by our own kernel too, and fused ones may stand before."""
        self._quantise = _own_quantiser() if self.own else _plain_quantiser

    def __call__(self, x: Tensor) -> Tensor:
        q_NK, scale_N = self._quantise(x.reshape(-1, x.shape[-1]))
        return self.scaled(q_NK, scale_N, x.dtype).reshape(*x.shape[:-1], -1)

    def scaled(self, q_NK: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
        """The layer for rows that are quantised already (by a kernel fused with what stands before)."""
        return self._products[phase_of(q_NK.shape[0])](q_NK, scale_N, self.weight, dtype)


def _plain_quantiser(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    q_NK, scale_N1 = quantise_rows(x_NK)
    return q_NK, scale_N1[:, 0]


def _own_quantiser() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    from hestctl.kernels.quantise_triton import quantise_rows as quantise_rows_on_device

    return quantise_rows_on_device


def _cat_biases(weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None) -> Tensor | None:
    """Biases side by side, zeros where a weight has none; None where no weight has one."""
    if biases is None or all(bias is None for bias in biases):
        return None
    pairs = zip(weights, biases, strict=True)
    return torch.cat([w.new_zeros(len(w)) if bias is None else bias.detach() for w, bias in pairs])
