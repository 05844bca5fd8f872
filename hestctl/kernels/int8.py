"""int8 MatMuls that run as such: the integer product of the device's own library, scales applied after.

Bit for bit the numerics of ``kernels.reference``, for integer sums are exact whatever adds them up.

Shape legend: N rows (tokens), K inputs, M outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hestctl.kernels.reference import quantise_rows

_CUDA_LEAST_ROWS = 17
"""``torch._int_mm`` on CUDA refuses 16 rows and fewer."""


class Int8Linear:
    """``x @ cat(weights).T`` in int8: weights quantised once, per output channel; activations per token.

    ``weights`` (each M_i x K) share their input, which is then quantised once for all of them. Calling it
    with ``x`` (..., K) gives (..., sum of M_i) in the type of ``x``. On CUDA, K and the sum of M_i must be
    multiples of 8 (a demand of ``torch._int_mm``).
    """

    kernel = "torch._int_mm"

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._q_MK, scale_M1 = quantise_rows(torch.cat([weight.detach() for weight in weights]))
        self._scale_M = scale_M1[:, 0]

    def __call__(self, x: Tensor) -> Tensor:
        x_NK = x.reshape(-1, x.shape[-1])
        q_NK, scale_N1 = quantise_rows(x_NK)
        rows = len(q_NK)
        if q_NK.is_cuda and rows < _CUDA_LEAST_ROWS:
            q_NK = torch.nn.functional.pad(q_NK, (0, 0, 0, _CUDA_LEAST_ROWS - rows))
        y_NM = torch._int_mm(q_NK, self._q_MK.T)[:rows].float() * scale_N1 * self._scale_M
        return y_NM.to(x.dtype).reshape(*x.shape[:-1], -1)
