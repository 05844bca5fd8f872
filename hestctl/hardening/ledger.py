"""The ledger: no generated sample spends more on its directions than its E_max, whatever the gates ask.

Every (layer, request) has a purse that earns a fixed income with each token and carries what is left
along the tokens of that layer. A token whose gates ask for more than the purse holds gets less:
first full becomes int8 (where int8 is offered), then off, the least important directions first.
All sums are integers, so that splitting a prompt into chunks changes nothing.

Shape legend: Q requests, W rows of the batch (Q * beams), T tokens, L layers, R directions, S = 3 states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hestctl.records import FULL, INT8, OFF

_FINE_BITS = 20
_BLOCK = 16
_UNITS = 1024
"""Units in a full direction: rounding the price of int8 up costs less than a thousandth."""


@dataclass(frozen=True, slots=True)
class Tariff:
    """Whole-number prices of the states, and what one unit is worth in joules.

    Prices are rounded up, so that joules computed from states never exceed those the ledger saw.
    """

    int8: int
    full: int
    unit_j: float

    @classmethod
    def from_costs(cls, costs_j: tuple[float, float, float], *, uses_int8: bool) -> Tariff:
        _, int8_j, full_j = costs_j
        if not uses_int8:
            return cls(int8=1, full=1, unit_j=full_j)
        unit_j = full_j / _UNITS
        return cls(int8=-int(-int8_j // unit_j), full=_UNITS, unit_j=unit_j)

    def prices(self, device: torch.device) -> Tensor:
        return torch.tensor([0, self.int8, self.full], dtype=torch.int64, device=device)


def incomes(allowance_Q: Tensor, pace_L: Tensor, rank: int, tariff: Tariff) -> Tensor:
    """Income per token of every (layer, request) in 2**-20 units, (L, Q) int64.

    ``allowance_Q`` is what a request may spend per token position (J, float64): over its positions the
    incomes of all layers add up to at most that much each. No layer earns more than ``rank`` full
    directions cost, and every one that much where the allowance pays for all, whatever the pace.
    """
    share_L = pace_L.double() / pace_L.double().sum()
    per_token = allowance_Q.double()[None, :] / tariff.unit_j * share_L[:, None]
    everything = (rank * tariff.full) << _FINE_BITS
    fine: Tensor = per_token * 2**_FINE_BITS
    income_LQ = fine.floor().clamp(max=everything).long()
    ample_Q = allowance_Q >= len(pace_L) * rank * tariff.full * tariff.unit_j
    return torch.where(ample_Q.to(income_LQ.device), everything, income_LQ)


class Ledger:
    """One ledger a batch of requests; beams of a request share its purses.

    ``allow`` is called once per layer and forward pass, in token order. Memory: a few times L * Q
    integers. A token that is cut may leave less than one int8 direction unspent; what a block of
    positions left so comes back to the purse at its end, wherever chunks begin and end. Calls of one
    token keep their whole state on the device, so that a CUDA graph may hold them. The fused adapter of
    decode reads and writes ``income_LQ``, ``purse_LQ`` and ``seen_LQ`` (tokens served) in their places.
    On a CPU, where every small operation is time and joules, no purse is kept when each token earns all that
    its directions could ask for.
    """

    def __init__(self, income_LQ: Tensor, order_LR: Tensor, tariff: Tariff, *, uses_int8: bool) -> None:
        self.income_LQ = income_LQ
        self.order_LR = order_LR
        self._prices_S = tariff.prices(income_LQ.device)
        self._uses_int8 = uses_int8
        self.purse_LQ = torch.zeros_like(income_LQ)
        self._unspent_LQ = torch.zeros_like(income_LQ)
        self.seen_LQ = torch.zeros_like(income_LQ)
        # Where each layer stands within its blocks: on the device, so that a graph of one-token steps
        # carries it on, and here, to cut longer calls at the blocks' ends.
        self._position_L = torch.zeros(len(income_LQ), dtype=torch.int64, device=income_LQ.device)
        self._start_L = [0] * len(income_LQ)
        everything = (order_LR.shape[1] * int(self._prices_S[FULL])) << _FINE_BITS
        self._ample = income_LQ.device.type == "cpu" and bool((income_LQ >= everything).all())

    def restart(self, fresh: Ledger) -> None:
        """Become ``fresh`` (of the same shape) in the memory this ledger already holds."""
        for mine, other in zip(self._state(), fresh._state(), strict=True):
            mine.copy_(other)
        self._start_L = list(fresh._start_L)
        self._ample = fresh._ample

    def _state(self) -> tuple[Tensor, ...]:
        return (self.income_LQ, self.purse_LQ, self._unspent_LQ, self.seen_LQ, self._position_L)

    def allow(self, layer: int, asked_WTR: Tensor, real_WT: Tensor) -> Tensor:
        """The states that may run, (W, T, R). ``real_WT`` is false on padding, which is always off."""
        asked_WTR = asked_WTR * real_WT[..., None]
        if self._ample:
            return asked_WTR
        parts, start, tokens = [], 0, asked_WTR.shape[1]
        while start < tokens:
            # With whole directions as the only price nothing is ever left over: no blocks are needed.
            room = _BLOCK - self._start_L[layer] % _BLOCK if self._uses_int8 else tokens
            end = min(tokens, start + room)
            parts.append(self._allow_block(layer, asked_WTR[:, start:end], real_WT[:, start:end]))
            self._start_L[layer] += end - start
            if self._uses_int8:
                self._close_block(layer, end - start)
            start = end
        return torch.cat(parts, 1)

    def _close_block(self, layer: int, tokens: int) -> None:
        """Step on by ``tokens``; at a block's end its unspent units return to the purse."""
        position = self._position_L[layer]
        position += tokens
        back_Q = self._unspent_LQ[layer] * (position % _BLOCK == 0)
        self.purse_LQ[layer] += back_Q
        self._unspent_LQ[layer] -= back_Q

    def _allow_block(self, layer: int, asked_WTR: Tensor, real_WT: Tensor) -> Tensor:
        requests = self.income_LQ.shape[1]
        rows, tokens, rank = asked_WTR.shape
        beams = rows // requests

        def by_request(x: Tensor) -> Tensor:
            # Token-major within a request: beams of one position stand side by side.
            return x.view(requests, beams, tokens, *x.shape[2:]).transpose(1, 2).flatten(1, 2)

        asked_QNR, real_QN = by_request(asked_WTR), by_request(real_WT).long()
        nth_QN = self.seen_LQ[layer][:, None] + real_QN.cumsum(1)
        fine_Q1 = self.income_LQ[layer][:, None]
        income_QN = ((fine_Q1 * nth_QN) >> _FINE_BITS) - ((fine_Q1 * (nth_QN - real_QN)) >> _FINE_BITS)
        cost_QN = self._prices_S[asked_QNR].sum(-1)
        start_Q1 = self.purse_LQ[layer][:, None]
        # q[t] = max(0, q[t-1] + income[t] - cost[t]), for all t at once (Lindley's recursion).
        walk_QN = start_Q1 + (income_QN - cost_QN).cumsum(1)
        left_QN = walk_QN - walk_QN.cummin(1).values.clamp(max=0)
        before_QN = torch.cat((start_Q1, left_QN[:, :-1]), 1) + income_QN
        allowed_QNR = _trim(asked_QNR, before_QN, self.order_LR[layer], self._prices_S, self._uses_int8)
        spent_QN = self._prices_S[allowed_QNR].sum(-1)
        self._unspent_LQ[layer] += (before_QN - left_QN - spent_QN).sum(1)
        self.purse_LQ[layer] = left_QN[:, -1]
        self.seen_LQ[layer] = nth_QN[:, -1]
        return allowed_QNR.view(requests, tokens, beams, rank).transpose(1, 2).reshape(asked_WTR.shape)


def _trim(asked: Tensor, purse: Tensor, order_R: Tensor, prices_S: Tensor, uses_int8: bool) -> Tensor:
    """Demote the least important directions until the token's price fits its purse."""
    ranked = asked[..., order_R]
    price = prices_S[ranked]
    if uses_int8:
        lower = torch.where(ranked == FULL, INT8, ranked)
        low_price = prices_S[lower]
        # Keeping the first j as asked and the rest lowered costs prefix(j) + suffix(j).
        kept_cost = price.cumsum(-1) + low_price.sum(-1, keepdim=True) - low_price.cumsum(-1)
        ranked = torch.where(kept_cost <= purse[..., None], ranked, lower)
        price = prices_S[ranked]
    fits = price.cumsum(-1) <= purse[..., None]
    ranked = torch.where(fits, ranked, OFF)
    allowed = torch.empty_like(asked)
    allowed[..., order_R] = ranked
    return allowed
