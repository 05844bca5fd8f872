"""The int8 products there are, by name, and in words why one cannot run somewhere.

A name says all that is needed to run it again: ``torch._int_mm``, ``torchao.int_scaled_matmul``,
``reference``, ``triton.prefill/128x256x128-w8-s3``, ``triton.decode/16x512-w4-s4`` (columns x inputs of a
block, warps, pipeline stages). Every one computes ``kernels.reference`` bit for bit.

Shape legend: N rows (tokens), K inputs, M outputs.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from hestctl.kernels.devices import why_no_triton
from hestctl.kernels.reference import int8_matmul

Phase = Literal["prefill", "decode"]
DECODE_ROWS = 16
"""Up to so many rows a product counts as decode: one tensor-core tile."""

_INT_MM_LEAST_ROWS = 17
_TRITON_NAME = re.compile(r"triton\.(?:prefill/(\d+)x|decode/)(\d+)x(\d+)-w(\d+)-s(\d+)")

PREFILL_KERNELS = (
    "triton.prefill/128x256x128-w8-s3",
    "triton.prefill/128x128x128-w8-s3",
    "triton.prefill/128x128x128-w4-s4",
    "triton.prefill/256x128x128-w8-s3",
    "triton.prefill/64x128x128-w4-s4",
)
DECODE_KERNELS = (
    "triton.decode/16x256-w4-s5",
    "triton.decode/16x512-w4-s4",
    "triton.decode/16x512-w8-s3",
    "triton.decode/32x256-w4-s4",
    "triton.decode/32x512-w8-s3",
    "triton.decode/64x256-w8-s3",
)


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A weight quantised once: int8 (M, K), fp32 scales (M,), and a bias (M,) or None."""

    q_MK: Tensor
    scale_M: Tensor
    bias_M: Tensor | None = None


Product = Callable[[Tensor, Tensor, Int8Weight, torch.dtype], Tensor]
"""``product(q_NK, scale_N, weight, dtype)``: the scaled product and bias in ``dtype``, (N, M)."""


def phase_of(rows: int) -> Phase:
    return "decode" if rows <= DECODE_ROWS else "prefill"


def candidates(phase: Phase) -> tuple[str, ...]:
    """Names worth measuring in this phase, on any device."""
    own = DECODE_KERNELS if phase == "decode" else PREFILL_KERNELS
    return ("torch._int_mm", "torchao.int_scaled_matmul", *own)


def why_not(name: str, device: torch.device, outputs: int, inputs: int) -> str | None:
    """Why this product cannot run for such weights on such a device; None where it can."""
    if name == "reference":
        return None
    if name == "torch._int_mm":
        if device.type == "cuda" and (inputs % 8 or outputs % 8):
            return f"on CUDA it takes multiples of 8, not {inputs} inputs and {outputs} outputs"
        return None if device.type in ("cpu", "cuda") else f"not offered for {device.type}"
    if name == "torchao.int_scaled_matmul":
        return None if importlib.util.find_spec("torchao") else "torchao is not installed"
    if _TRITON_NAME.fullmatch(name):
        return why_no_triton(device)
    return "no such kernel"


@cache
def product(name: str) -> Product:
    """The product of that name, always the same one. Raises ValueError for a name that stands for none."""
    if name == "reference":
        return _reference
    if name == "torch._int_mm":
        return _int_mm
    if name == "torchao.int_scaled_matmul":
        return _torchao()
    match = _TRITON_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"no int8 kernel is called {name!r}")
    rows, *rest = match.groups()
    return _triton(rows is None, [int(rows or DECODE_ROWS), *map(int, rest)])


def _finish(sums_NM: Tensor, scale_N: Tensor, weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    y_NM = sums_NM.float() * scale_N[:, None] * weight.scale_M
    return (y_NM if weight.bias_M is None else y_NM + weight.bias_M.float()).to(dtype)


def _reference(q_NK: Tensor, scale_N: Tensor, weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    return _finish(int8_matmul(q_NK, weight.q_MK), scale_N, weight, dtype)


def _int_mm(q_NK: Tensor, scale_N: Tensor, weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    rows = q_NK.shape[0]
    if q_NK.is_cuda and rows < _INT_MM_LEAST_ROWS:
        # It refuses fewer rows there.
        q_NK = torch.nn.functional.pad(q_NK, (0, 0, 0, _INT_MM_LEAST_ROWS - rows))
    return _finish(torch._int_mm(q_NK, weight.q_MK.T)[:rows], scale_N, weight, dtype)


def _torchao() -> Product:
    from torchao.kernel.intmm import int_scaled_matmul

    def run(q_NK: Tensor, scale_N: Tensor, weight: Int8Weight, dtype: torch.dtype) -> Tensor:
        y_NM: Tensor = int_scaled_matmul(q_NK, weight.q_MK.T, scale_N[:, None]) * weight.scale_M
        return (y_NM if weight.bias_M is None else y_NM + weight.bias_M.float()).to(dtype)

    return run


def _triton(decode: bool, blocks: list[int]) -> Product:
    from hestctl.kernels.matmul_triton import int8_product

    def run(q_NK: Tensor, scale_N: Tensor, weight: Int8Weight, dtype: torch.dtype) -> Tensor:
        y_NM: Tensor = int8_product(
            q_NK, scale_N, weight.q_MK, weight.scale_M, weight.bias_M, dtype, decode, blocks
        )
        return y_NM

    return run
