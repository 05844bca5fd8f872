"""int8 x int8 -> int32 products with both scales applied in the epilogue, on an NVIDIA device.

Two kernels. *Prefill*: square-ish tiles, ordered so that programs that run together share weights in the
cache. *Decode*: 16 rows (real ones padded to one tensor-core tile) and few columns a program, so that every
SM streams weights; each weight is read once and is marked as the first to leave the cache. The inputs are
not split over programs: 16 columns each already give a merged projection more programs than there are SMs.

Sums are exact in int32 (up to 133,000 inputs). The epilogue is ``fl(fl(sum * token scale) * channel scale)``
in fp32, then ``+ bias`` in fp32 without contraction, then one rounding to the output type: bit for bit the
reference. Importing this module imports Triton; ``kernels.devices`` says whether it can run.

Shape legend: N rows (tokens), K inputs, M outputs; one program takes BN x BM outputs in steps of BK inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_GROUP = 8
"""Row tiles that walk the columns together in prefill."""


@triton.jit
def _scaled_store(
    total: tl.tensor,
    s_x: tl.tensor,
    s_w: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    HAS_BIAS: tl.constexpr,
) -> None:
    y = total.to(tl.float32) * tl.load(s_x + n, mask=n < rows, other=0.0)[:, None]
    y = y * tl.load(s_w + m, mask=m < outputs, other=0.0)[None, :]
    if HAS_BIAS:
        y = y + tl.load(bias + m, mask=m < outputs, other=0.0).to(tl.float32)[None, :]
    at = n.to(tl.int64)[:, None] * outputs + m[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(n < rows)[:, None] & (m < outputs)[None, :])


@triton.jit
def _prefill_kernel(
    q_x: tl.tensor,
    q_w: tl.tensor,
    s_x: tl.tensor,
    s_w: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    K: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    in_group = GROUP * tl.cdiv(outputs, BM)
    first = program // in_group * GROUP
    height = tl.minimum(tl.cdiv(rows, BN) - first, GROUP)
    n = (first + program % in_group % height) * BN + tl.arange(0, BN)
    m = (program % in_group // height) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    # Rows and columns past the edge wrap around: they are read without a mask and never stored.
    x_at = q_x + (n % rows).to(tl.int64)[:, None] * K + k[None, :]
    w_at = q_w + (m % outputs).to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros((BN, BM), tl.int32)
    for start in range(0, K, BK):
        if K % BK == 0:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            x = tl.load(x_at, mask=(k < K - start)[None, :], other=0)
            w = tl.load(w_at, mask=(k < K - start)[:, None], other=0)
        total = tl.dot(x, w, total, out_dtype=tl.int32)
        x_at += BK
        w_at += BK
    _scaled_store(total, s_x, s_w, bias, out, n, m, rows, outputs, HAS_BIAS)


@triton.jit
def _decode_kernel(
    q_x: tl.tensor,
    q_w: tl.tensor,
    s_x: tl.tensor,
    s_w: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    outputs: tl.tensor,
    K: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    real = (n < rows)[:, None]
    x_at = q_x + n.to(tl.int64)[:, None] * K + k[None, :]
    w_at = q_w + (m % outputs).to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros((BN, BM), tl.int32)
    for start in range(0, K, BK):
        if K % BK == 0:
            # Rows of padding are masked, not wrapped: a masked row costs no traffic.
            x = tl.load(x_at, mask=real, other=0)
            w = tl.load(w_at, eviction_policy="evict_first")
        else:
            x = tl.load(x_at, mask=real & (k < K - start)[None, :], other=0)
            w = tl.load(w_at, mask=(k < K - start)[:, None], other=0, eviction_policy="evict_first")
        total = tl.dot(x, w, total, out_dtype=tl.int32)
        x_at += BK
        w_at += BK
    _scaled_store(total, s_x, s_w, bias, out, n, m, rows, outputs, HAS_BIAS)


@torch.library.custom_op("hestctl::int8_product", mutates_args=())
def int8_product(
    q_NK: Tensor,
    s_N: Tensor,
    q_MK: Tensor,
    s_M: Tensor,
    bias_M: Tensor | None,
    dtype: torch.dtype,
    decode: bool,
    blocks: Sequence[int],
) -> Tensor:
    """``(q_NK @ q_MK.T) * s_N * s_M + bias_M`` in ``dtype``, (N, M). All tensors contiguous, on one device.

    ``blocks``: BN, BM, BK (powers of two, at least 16, BK at least 32), warps, pipeline stages. Raises
    Triton's own error where a block does not fit the device.
    """
    (rows, inputs), outputs = q_NK.shape, q_MK.shape[0]
    out = torch.empty(rows, outputs, dtype=dtype, device=q_NK.device)
    if rows == 0:
        return out
    block_n, block_m, block_k, warps, stages = blocks
    arguments = (q_NK, q_MK, s_N, s_M, s_M if bias_M is None else bias_M, out, rows, outputs, inputs)
    shared = {
        "BN": block_n,
        "BM": block_m,
        "BK": block_k,
        "HAS_BIAS": bias_M is not None,
        "num_warps": warps,
        "num_stages": stages,
        "enable_fp_fusion": False,
    }
    tiles_n, tiles_m = triton.cdiv(rows, block_n), triton.cdiv(outputs, block_m)
    if decode:
        _decode_kernel[(tiles_m, tiles_n)](*arguments, **shared)
    else:
        _prefill_kernel[(tiles_n * tiles_m,)](*arguments, GROUP=_GROUP, **shared)
    return out


@int8_product.register_fake
def _(
    q_NK: Tensor,
    s_N: Tensor,
    q_MK: Tensor,
    s_M: Tensor,
    bias_M: Tensor | None,
    dtype: torch.dtype,
    decode: bool,
    blocks: Sequence[int],
) -> Tensor:
    return torch.empty(q_NK.shape[0], q_MK.shape[0], dtype=dtype, device=q_NK.device)
