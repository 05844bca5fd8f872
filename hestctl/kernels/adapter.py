"""The fused adapter of the decode step: one layer's tensors, its registers, and the one call that runs it.

Holds what ``kernels.adapter_triton`` needs in the order it needs it; imports Triton only when a step is made.

Shape legend: W rows (Q requests x beams), D hidden size, L layers, R directions, K width of the controller,
S = 3 states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hestctl.kernels.devices import multiprocessors

GateKind = Literal["static", "linear", "factorised", "unfactorised"]
MOST_RANK, MOST_WIDTH, MOST_BEAMS = 64, 128, 16
TILE_ROWS = 16
"""Rows of a tile: the least a tensor-core product takes. Padding rows are masked and cost no traffic."""
SLICE = 128
"""Part of the hidden size that a program projects and expands: 32 programs at 4,096."""


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """One layer's directions and gate. Directions lie in the ledger's order, the most important first.

    ``down_DR``, ``up_RD``, ``scale_R`` and ``controller_DK`` are in the model's type. By ``gate``:

    - factorised, unfactorised: ``controller_DK`` (D, K); ``mix_K`` fp32, the layer's sigmoid weights (ones
      where unfactorised); ``threshold_R`` and ``gap_R`` (after softplus), fp32; ``centre_spread`` fp32 (2,).
    - linear: ``controller_DK`` is (D, R).
    - static: ``controller_DK`` is (D, 0) and ``threshold_R`` the level, open above zero.
    """

    gate: GateKind
    down_DR: Tensor
    up_RD: Tensor
    scale_R: Tensor
    controller_DK: Tensor
    mix_K: Tensor
    threshold_R: Tensor
    gap_R: Tensor
    centre_spread: Tensor


@dataclass(frozen=True, slots=True)
class Registers:
    """What moves from token to token, at fixed addresses: a captured graph writes here.

    ``income_LQ`` is the ledger's income per token in 2**-20 units; all are int64.
    """

    income_LQ: Tensor
    purse_LQ: Tensor
    seen_LQ: Tensor
    counts_LQS: Tensor


class AdapterStep:
    """``step(h_W1D, real_W)``: one layer's ``h + delta(h)`` for one token a row, in place of ``HardPass``.

    ``real_W`` (bool) is false for rows that count for nothing (their directions stay off). ``ledger`` says
    whether the purses bind. ``joined`` is one launch (programs meet at a barrier, all must fit the device at
    once) instead of two; by default wherever they fit. No host syncs; fit for CUDA graphs and torch.compile.
    """

    def __init__(
        self,
        weights: AdapterWeights,
        registers: Registers,
        layer: int,
        *,
        beams: int,
        ledger: bool,
        joined: bool | None = None,
    ) -> None:
        from hestctl.kernels.adapter_triton import adapter_step

        hidden, rank = weights.down_DR.shape
        device = weights.down_DR.device
        requests = registers.purse_LQ.shape[1]
        for what, value, most in (
            ("directions", rank, MOST_RANK),
            ("columns of the controller", weights.controller_DK.shape[1], MOST_WIDTH),
            ("beams", beams, MOST_BEAMS),
        ):
            if value > most:
                raise ValueError(f"{value} {what}: the fused adapter takes at most {most}")
        tiles = -(-requests // (TILE_ROWS // beams))
        programs = -(-hidden // SLICE) * tiles
        fits = programs <= multiprocessors(device)
        self._op = adapter_step
        self._weights = weights
        self._income_Q = registers.income_LQ[layer]
        self._purse_Q = registers.purse_LQ[layer]
        self._seen_Q = registers.seen_LQ[layer]
        self._counts_QS = registers.counts_LQS[layer]
        self._arrivals = torch.zeros(tiles, dtype=torch.int64, device=device)
        self._ledger = ledger
        self.joined = fits if joined is None else joined

    def __call__(self, h_W1D: Tensor, real_W: Tensor) -> Tensor:
        weights = self._weights
        out: Tensor = self._op(
            h_W1D.reshape(h_W1D.shape[0], h_W1D.shape[-1]).contiguous(),
            weights.down_DR,
            weights.up_RD,
            weights.scale_R,
            weights.controller_DK,
            weights.mix_K,
            weights.threshold_R,
            weights.gap_R,
            weights.centre_spread,
            real_W,
            self._income_Q,
            self._purse_Q,
            self._seen_Q,
            self._counts_QS,
            self._arrivals,
            weights.gate,
            self._ledger,
            self.joined,
        )
        return out.view(h_W1D.shape)
