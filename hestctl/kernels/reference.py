"""int8 numerics in plain PyTorch: the oracle that every kernel and the training's fake quantisation obey.

Symmetric to +-127, round half to even; activations scaled per token by their absolute maximum,
weights per output channel; exact integer accumulation; scales applied in fp32.

Shape legend: N rows (tokens), K inputs, M outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EXACT_TERMS = 1024
"""127 * 127 * 1024 < 2**24: so many products add up exactly in fp32."""


def quantise_rows(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values (as int8, N x K) and fp32 scales (N x 1): one scale a row, by its absolute maximum.

    An all-zero row keeps scale 1, so that nothing is divided by zero.
    """
    x_NK = x_NK.float()
    peak = x_NK.abs().amax(-1, keepdim=True)
    # Divided by a tensor: dividing by a number multiplies by its rounded reciprocal on CUDA.
    scale = torch.where(peak > 0, peak / torch.full_like(peak, 127), torch.ones_like(peak))
    return torch.round(x_NK / scale).clamp_(-127, 127).to(torch.int8), scale


def int8_matmul(q_NK: Tensor, q_MK: Tensor) -> Tensor:
    """Exact integer product ``q_NK @ q_MK.T`` as int32 (N x M), on any device.

    Sums of up to 1,024 products are exact in fp32, so the product runs in fp32 chunks that are added
    as int32. On CUDA this needs TF32 off for matmuls, PyTorch's default.
    """
    total = torch.zeros(q_NK.shape[0], q_MK.shape[0], dtype=torch.int32, device=q_NK.device)
    for start in range(0, q_NK.shape[1], _EXACT_TERMS):
        part = slice(start, start + _EXACT_TERMS)
        total += (q_NK[:, part].float() @ q_MK[:, part].float().T).to(torch.int32)
    return total


def int8_linear(x_NK: Tensor, w_MK: Tensor) -> Tensor:
    """``x @ w.T`` in int8 as a kernel computes it; fp32 result (N x M)."""
    q_x, s_x = quantise_rows(x_NK)
    q_w, s_w = quantise_rows(w_MK)
    return int8_matmul(q_x, q_w).float() * s_x * s_w.T


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return int8_linear(x, w).to(x.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors  # type: ignore[attr-defined]
        (grad,) = grads
        return grad @ w, grad.T @ x


def int8_linear_ste(x_NK: Tensor, w_MK: Tensor) -> Tensor:
    """``int8_linear`` whose gradient is that of the unquantised product (straight-through)."""
    out: Tensor = _StraightThrough.apply(x_NK, w_MK)  # type: ignore[no-untyped-call]
    return out
