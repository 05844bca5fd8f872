"""One decoder layer's adapter for one token a row, in one kernel on an NVIDIA device.

RMS normalisation, projection on the directions and the controller, gates, ledger, expansion, sum, and the log
of states. One program a row would read the 0.5 MB of a layer (Llama-2-7B) through a single SM, which takes
as long as the unfused kernels did. So programs split the hidden size: each projects its slice, all meet at a
barrier, and each then decides by itself (the same small integers in all of them) and expands its slice.

The barrier needs every program to run at once (a cooperative launch). Where the programs outnumber the SMs,
the same kernel runs as two launches, one for each side of the barrier.

It rounds where ``generation.hardpass`` and ``model`` round, and its integers are ``hardening.ledger``'s for
whole directions (one price); int8 directions are not in it. Importing this module imports Triton.

Shape legend: W rows (Q requests x beams), D hidden size, R directions, K width of the controller.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hestctl.kernels.adapter import SLICE, TILE_ROWS

_NORM = 1024
_UNROLL = 16
_WARPS = 4
_FINE_BITS = tl.constexpr(20)
_EPSILON = tl.constexpr(1e-6)


@triton.jit
def _product(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    # fp32 models get fp32 products: Triton's default there is TF32.
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _sum_slices(
    part: tl.tensor,
    at: tl.tensor,
    mask: tl.tensor,
    stride: tl.tensor,
    SLICES: tl.constexpr,
    UNROLL: tl.constexpr,
) -> tl.tensor:
    # UNROLL reads are under way at once; the order of the sum is fixed.
    total = tl.zeros(at.shape, tl.float32)
    for start in range(0, SLICES, UNROLL):
        for s in tl.static_range(0, UNROLL):
            within = mask & (start + s < SLICES)
            total += tl.load(part + (start + s) * stride + at, mask=within, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def _adapter_kernel(
    h: tl.tensor,
    out: tl.tensor,
    down: tl.tensor,
    up: tl.tensor,
    scale: tl.tensor,
    controller: tl.tensor,
    mix: tl.tensor,
    threshold: tl.tensor,
    gap: tl.tensor,
    centre_spread: tl.tensor,
    real: tl.tensor,
    income: tl.tensor,
    purse: tl.tensor,
    seen: tl.tensor,
    counts: tl.tensor,
    arrivals: tl.tensor,
    part: tl.tensor,
    held: tl.tensor,
    rows: tl.tensor,
    requests: tl.tensor,
    D: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    BEAMS: tl.constexpr,
    TILE: tl.constexpr,
    SLICES: tl.constexpr,
    GATE: tl.constexpr,
    LEDGER: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    NORM: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    kind = h.dtype.element_ty
    slice_ = tl.program_id(0)
    i = tl.arange(0, ROWS)
    row = tl.program_id(1) * TILE + i
    live = (i < TILE) & (row < rows)
    request = row // BEAMS
    lead = live & (row % BEAMS == 0)
    d = slice_ * BD + tl.arange(0, BD)
    r = tl.arange(0, BR)
    k = tl.arange(0, BK)
    in_d, in_r, in_k = d < D, r < R, k < K
    h_at = row.to(tl.int64)[:, None] * D
    here = tl.load(h + h_at + d[None, :], mask=live[:, None] & in_d[None, :], other=0.0).to(tl.float32)
    z_at = row[:, None] * (R + K) + r[None, :]
    y_at = row[:, None] * (R + K) + R + k[None, :]
    z_mask, y_mask = live[:, None] & in_r[None, :], live[:, None] & in_k[None, :]
    stride = rows * (R + K)

    if BEFORE:
        square = tl.zeros((ROWS,), tl.float32)
        for start in range(0, D, NORM):
            e = start + tl.arange(0, NORM)
            v = tl.load(h + h_at + e[None, :], mask=live[:, None] & (e < D)[None, :], other=0.0)
            square += tl.sum(v.to(tl.float32) * v.to(tl.float32), 1)
        x = (here * tl.rsqrt(square / D + _EPSILON)[:, None]).to(kind)
        weight = tl.load(down + d[:, None] * R + r[None, :], mask=in_d[:, None] & in_r[None, :], other=0.0)
        tl.store(part + slice_ * stride + z_at, _product(x, weight), mask=z_mask)
        if K > 0:
            weight = tl.load(
                controller + d[:, None] * K + k[None, :], mask=in_d[:, None] & in_k[None, :], other=0.0
            )
            tl.store(part + slice_ * stride + y_at, _product(x, weight), mask=y_mask)
        if slice_ == 0:
            # The registers are written after the barrier; everyone reads them from this copy.
            tl.store(held + request, tl.load(purse + request, mask=lead, other=0), mask=lead)
            tl.store(held + requests + request, tl.load(seen + request, mask=lead, other=0), mask=lead)

    rises = tl.load(up + r[:, None] * D + d[None, :], mask=in_r[:, None] & in_d[None, :], other=0.0)
    if BEFORE and AFTER:
        tl.debug_barrier()
        turn = tl.atomic_add(arrivals + tl.program_id(1), 1, sem="acq_rel", scope="gpu")
        goal = (turn // SLICES + 1) * SLICES
        while tl.atomic_add(arrivals + tl.program_id(1), 0, sem="acquire", scope="gpu") < goal:
            pass
        tl.debug_barrier()

    if AFTER:
        cut = tl.load(threshold + r, mask=in_r, other=0.0)[None, :]
        if GATE == "static":
            asked = (cut > 0) & live[:, None]
        else:
            y = _sum_slices(part, y_at, y_mask, stride, SLICES, UNROLL).to(kind).to(tl.float32)
            if GATE == "linear":
                asked = y > 0
            else:
                token = tl.sigmoid(y)
                if GATE == "factorised":
                    token = token.to(kind).to(tl.float32)
                share = tl.load(mix + k, mask=in_k, other=0.0)[None, :]
                p = tl.sum(tl.where(in_k[None, :], token * share, 0.0), 1) / K
                score = tl.div_rn(p - tl.load(centre_spread), tl.zeros_like(p) + tl.load(centre_spread + 1))
                # Full wins over off where 2 * (score - c1) - softplus(gap) > 0: beta cannot change that.
                asked = 2 * (score[:, None] - cut) > tl.load(gap + r, mask=in_r, other=0.0)[None, :]
        counted = live & (tl.load(real + row, mask=live, other=0) != 0)
        asked = asked & in_r[None, :] & counted[:, None]

        # Rows of one request share a purse and are served in order. (i, j): row i sees rows j up to itself.
        one = counted.to(tl.int64)
        kin = (request[:, None] == request[None, :]) & (i[None, :] <= i[:, None]) & live[None, :]
        allowed = asked
        if LEDGER:
            saved = tl.load(held + request, mask=live, other=0, cache_modifier=".cg")
            so_far = tl.load(held + requests + request, mask=live, other=0, cache_modifier=".cg")
            nth = so_far + tl.sum(tl.where(kin, one[None, :], 0), 1)
            fine = tl.load(income + request, mask=live, other=0)
            gain = ((fine * nth) >> _FINE_BITS) - ((fine * (nth - one)) >> _FINE_BITS)
            step = gain - tl.sum(asked.to(tl.int64), 1)
            # left[t] = max(0, left[t-1] + gain[t] - cost[t]) for all rows at once (Lindley's recursion).
            walk = saved + tl.sum(tl.where(kin, step[None, :], 0), 1)
            lowest = tl.minimum(tl.min(tl.where(kin, walk[None, :], 0), 1), 0)
            left = walk - lowest
            earlier = kin & (i[None, :] < i[:, None])
            before = walk - step - tl.min(tl.where(earlier, walk[None, :], 0), 1) + gain
            # Directions lie in order of importance: the purse serves the first of those that ask.
            allowed = asked & (tl.cumsum(asked.to(tl.int32), 1) <= before[:, None])
        on = tl.sum(allowed.to(tl.int64), 1)

        if slice_ == 0:
            last = live & (row % BEAMS == BEAMS - 1)
            full = tl.sum(tl.where(kin, on[None, :], 0), 1)
            tokens = tl.sum(tl.where(kin, one[None, :], 0), 1)
            if LEDGER:
                tl.store(purse + request, left, mask=last)
                tl.store(seen + request, nth, mask=last)
            log = counts + request * 3
            tl.store(log, tl.load(log, mask=last, other=0) + tokens * R - full, mask=last)
            tl.store(log + 2, tl.load(log + 2, mask=last, other=0) + full, mask=last)

        z = _sum_slices(part, z_at, z_mask, stride, SLICES, UNROLL).to(kind).to(tl.float32)
        z = (z * tl.load(scale + r, mask=in_r, other=0.0).to(tl.float32)[None, :]).to(kind)
        z = tl.where(allowed, z, 0.0)
        # The maximum of z and itself: across a reduction Triton leaves layouts alone. Without it, it carries
        # the product's layout back through the sums and the gates, and some versions fail to compile that.
        z = tl.max(tl.join(z, z), 2)
        delta = _product(z.to(kind), rises).to(kind).to(tl.float32)
        tl.store(out + h_at + d[None, :], (here + delta).to(kind), mask=live[:, None] & in_d[None, :])


@torch.library.custom_op("hestctl::adapter_step", mutates_args=("purse_Q", "seen_Q", "counts_QS", "arrivals"))
def adapter_step(
    h_WD: Tensor,
    down_DR: Tensor,
    up_RD: Tensor,
    scale_R: Tensor,
    controller_DK: Tensor,
    mix_K: Tensor,
    threshold_R: Tensor,
    gap_R: Tensor,
    centre_spread: Tensor,
    real_W: Tensor,
    income_Q: Tensor,
    purse_Q: Tensor,
    seen_Q: Tensor,
    counts_QS: Tensor,
    arrivals: Tensor,
    gate: str,
    ledger: bool,
    joined: bool,
) -> Tensor:
    """``h + delta(h)`` of one token a row, (W, D); the purses and the log of states move on in place.

    ``arrivals`` (int64) counts programs at the barrier and is never reset: one element for every
    ``tiles`` of rows. ``joined`` asks for one launch instead of two. See ``kernels.adapter`` for the rest.
    """
    (rows, hidden), rank, width = h_WD.shape, down_DR.shape[1], controller_DK.shape[1]
    requests = len(purse_Q)
    beams = rows // requests
    slices = triton.cdiv(hidden, SLICE)
    out = torch.empty(rows, hidden, dtype=h_WD.dtype, device=h_WD.device)
    part = torch.empty(slices, rows, rank + width, dtype=torch.float32, device=h_WD.device)
    held = torch.empty(2, requests, dtype=torch.int64, device=h_WD.device)
    per_tile = TILE_ROWS // beams * beams
    grid = (slices, triton.cdiv(rows, per_tile))
    for before, after in ((True, True),) if joined else ((True, False), (False, True)):
        _adapter_kernel[grid](
            h_WD,
            out,
            down_DR,
            up_RD,
            scale_R,
            controller_DK,
            mix_K,
            threshold_R,
            gap_R,
            centre_spread,
            real_W,
            income_Q,
            purse_Q,
            seen_Q,
            counts_QS,
            arrivals,
            part,
            held,
            rows,
            requests,
            D=hidden,
            R=rank,
            K=width,
            BEAMS=beams,
            TILE=per_tile,
            SLICES=slices,
            GATE=gate,
            LEDGER=ledger,
            BEFORE=before,
            AFTER=after,
            ROWS=TILE_ROWS,
            BD=SLICE,
            BR=max(16, triton.next_power_of_2(rank)),
            BK=max(16, triton.next_power_of_2(width)),
            NORM=_NORM,
            UNROLL=min(_UNROLL, triton.next_power_of_2(slices)),
            num_warps=_WARPS,
            launch_cooperative_grid=joined,
        )
    return out


@adapter_step.register_fake
def _(h_WD: Tensor, *arguments: object) -> Tensor:
    return torch.empty(h_WD.shape, dtype=h_WD.dtype, device=h_WD.device)
