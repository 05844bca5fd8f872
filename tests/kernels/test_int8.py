"""The library's integer products against the oracle, bit for bit."""

from __future__ import annotations

import pytest
import torch

from hestctl.kernels.int8 import Int8Linear
from hestctl.kernels.reference import int8_linear


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 100])
@pytest.mark.parametrize(("inputs", "outputs"), [(8, (8,)), (64, (64, 16, 16)), (1536, (576,))])
def test_int8_linear_is_the_oracle_exactly(rows: int, inputs: int, outputs: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(rows * inputs)
    weights = [torch.randn(m, inputs, generator=generator) for m in outputs]
    x = torch.randn(rows, inputs, generator=generator) * torch.logspace(-4, 4, rows)[:, None]
    x[0] = 0.0
    y = Int8Linear(weights)(x)
    assert torch.equal(y, int8_linear(x, torch.cat(weights)))


def test_int8_linear_keeps_shape_and_type() -> None:
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    y = Int8Linear([weight])(torch.ones(2, 3, 16, dtype=torch.bfloat16))
    assert y.shape == (2, 3, 24)
    assert y.dtype == torch.bfloat16
