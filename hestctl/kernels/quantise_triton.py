"""Row quantisation in one pass on an NVIDIA device, alone or fused with what stands before a MatMul.

One program holds one row in registers: read once, reduced, divided, written as int8. The integers and scales
of a row equal ``kernels.reference.quantise_rows`` bit for bit (divisions are IEEE ones, where Triton's ``/``
is approximate). Importing this module imports Triton; ``kernels.devices`` says whether it can run.

Shape legend: N rows (tokens), K inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_INPUTS = 65536
_TO_EVEN = tl.constexpr(12582912.0)
"""1.5 * 2**23: added to |v| < 2**22 and taken off again, it leaves v rounded half to even."""


@triton.jit
def _quantise_kernel(
    x: tl.tensor,
    beside: tl.tensor,
    weight: tl.tensor,
    q: tl.tensor,
    scale: tl.tensor,
    total: tl.tensor,
    inputs: tl.tensor,
    stride: tl.tensor,
    epsilon: tl.tensor,
    BEFORE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < inputs
    kind = x.dtype.element_ty
    v = tl.load(x + row * stride + k, mask=inside, other=0.0).to(tl.float32)
    # Every step before the quantisation rounds to the model's type, as the layer's own modules do.
    if BEFORE == "add_rms":
        v += tl.load(beside + row * inputs + k, mask=inside, other=0.0).to(tl.float32)
        v = v.to(kind).to(tl.float32)
        tl.store(total + row * inputs + k, v.to(kind), mask=inside)
    if BEFORE == "rms" or BEFORE == "add_rms":
        v = (v * tl.rsqrt(tl.sum(v * v, 0) / inputs + epsilon)).to(kind).to(tl.float32)
        v *= tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
        v = v.to(kind).to(tl.float32)
    if BEFORE == "silu_mul":
        v = (v * tl.sigmoid(v)).to(kind).to(tl.float32)
        v *= tl.load(x + row * stride + inputs + k, mask=inside, other=0.0).to(tl.float32)
        v = v.to(kind).to(tl.float32)
    peak = tl.max(tl.abs(v), 0)
    unit = tl.where(peak > 0, tl.div_rn(peak, 127.0), 1.0)
    whole = (tl.div_rn(v, unit) + _TO_EVEN) - _TO_EVEN
    tl.store(q + row * inputs + k, tl.clamp(whole, -127.0, 127.0).to(tl.int8), mask=inside)
    tl.store(scale + row, unit)


def _results(x_NK: Tensor, inputs: int) -> tuple[Tensor, Tensor]:
    rows = x_NK.shape[0]
    q_NK = torch.empty(rows, inputs, dtype=torch.int8, device=x_NK.device)
    return q_NK, torch.empty(rows, dtype=torch.float32, device=x_NK.device)


def _launch(
    before: str,
    x: Tensor,
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    beside: Tensor,
    total: Tensor,
    eps: float,
) -> None:
    rows, inputs = q.shape
    if inputs > _MOST_INPUTS:
        raise ValueError(f"rows of {inputs} inputs: the kernel takes at most {_MOST_INPUTS}")
    if rows == 0:
        return
    if x.stride(1) != 1:
        x = x.contiguous()
    block = triton.next_power_of_2(inputs)
    _quantise_kernel[(rows,)](
        x,
        beside,
        weight,
        q,
        scale,
        total,
        inputs,
        x.stride(0),
        eps,
        BEFORE=before,
        BLOCK=block,
        num_warps=min(32, max(1, block // 512)),
    )


@torch.library.custom_op("hestctl::quantise_rows", mutates_args=())
def quantise_rows(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values (N, K) and fp32 scales (N,) of rows whose inputs lie side by side."""
    q, scale = _results(x_NK, x_NK.shape[1])
    _launch("", x_NK, q, scale, x_NK, x_NK, x_NK, 0.0)
    return q, scale


@quantise_rows.register_fake
def _(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    return _results(x_NK, x_NK.shape[1])


@torch.library.custom_op("hestctl::rms_quantise_rows", mutates_args=())
def rms_quantise_rows(x_NK: Tensor, weight_K: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """RMSNorm with its weight, then ``quantise_rows``, in one kernel."""
    q, scale = _results(x_NK, x_NK.shape[1])
    _launch("rms", x_NK, q, scale, weight_K, x_NK, x_NK, epsilon)
    return q, scale


@rms_quantise_rows.register_fake
def _(x_NK: Tensor, weight_K: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return _results(x_NK, x_NK.shape[1])


@torch.library.custom_op("hestctl::add_rms_quantise_rows", mutates_args=())
def add_rms_quantise_rows(
    x_NK: Tensor, residual_NK: Tensor, weight_K: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual sum, its RMSNorm and ``quantise_rows`` in one kernel; the sum (N, K) comes third."""
    q, scale = _results(x_NK, x_NK.shape[1])
    total = torch.empty(x_NK.shape, dtype=x_NK.dtype, device=x_NK.device)
    _launch("add_rms", x_NK, q, scale, weight_K, residual_NK.contiguous(), total, epsilon)
    return q, scale, total


@add_rms_quantise_rows.register_fake
def _(x_NK: Tensor, residual_NK: Tensor, weight_K: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    return *_results(x_NK, x_NK.shape[1]), torch.empty(x_NK.shape, dtype=x_NK.dtype, device=x_NK.device)


@torch.library.custom_op("hestctl::silu_quantise_rows", mutates_args=())
def silu_quantise_rows(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """``silu(gate) * up`` of a merged (N, 2K) projection, then ``quantise_rows``, in one kernel."""
    q, scale = _results(gate_up, gate_up.shape[1] // 2)
    _launch("silu_mul", gate_up, q, scale, gate_up, gate_up, gate_up, 0.0)
    return q, scale


@silu_quantise_rows.register_fake
def _(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return _results(gate_up, gate_up.shape[1] // 2)
