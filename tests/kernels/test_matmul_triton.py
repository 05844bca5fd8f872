"""The Triton int8 kernels against the oracle: natively on a CUDA device, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hestctl.kernels.int8 import Int8Linear
from hestctl.kernels.products import DECODE_KERNELS, PREFILL_KERNELS
from hestctl.kernels.reference import int8_linear, quantise_rows

pytest.importorskip("triton", reason="triton is not installed")
from hestctl.kernels import quantise_triton

NATIVE = torch.cuda.is_available()
DEVICE = torch.device("cuda" if NATIVE else "cpu")
TYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = {"decode": "triton.decode/16x64-w4-s3", "prefill": "triton.prefill/32x32x64-w4-s3"}
BY_ROWS = {16: SMALL["decode"], 256: SMALL["prefill"]}


def same(y, expected):
    """Bit for bit; within the last bit of bfloat16 in the interpreter, which truncates to it."""
    if y.dtype == torch.bfloat16 and not NATIVE:
        torch.testing.assert_close(y, expected, rtol=2**-7, atol=0)
    else:
        assert y.dtype == expected.dtype
        assert torch.equal(y, expected)


def rows_of_all_scales(rows, inputs, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator) * torch.logspace(-4, 3, rows)[:, None]
    x[seed % rows] = 0.0
    return x.to(DEVICE, dtype)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 70),
    dtype=st.sampled_from(TYPES),
    bias=st.booleans(),
    kernel=st.sampled_from(["decode", "prefill"]),
    seed=st.integers(0, 10**6),
)
def test_products_are_the_oracle_at_every_size(rows, inputs, outputs, dtype, bias, kernel, seed):
    x = rows_of_all_scales(rows, inputs, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator).to(DEVICE, dtype)
    shift = torch.randn(outputs, generator=generator).to(DEVICE, dtype) if bias else None
    expected = int8_linear(x, weight)
    if shift is not None:
        expected = expected + shift.float()
    same(Int8Linear([weight], [shift], kernel=SMALL[kernel])(x), expected.to(dtype))


@pytest.mark.parametrize("kernel", [*DECODE_KERNELS, *PREFILL_KERNELS])
@pytest.mark.parametrize("inputs", [512, 520])
def test_every_kernel_on_offer(kernel, inputs):
    x = rows_of_all_scales(20, inputs, 1, torch.float16)
    weight = torch.randn(72, inputs, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
    same(Int8Linear([weight], kernel=kernel)(x), int8_linear(x, weight).half())


def test_phases_have_their_own_kernels_and_weights_share_an_input():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(m, 40, generator=generator).to(DEVICE) for m in (24, 8, 8)]
    biases = [torch.randn(24, generator=generator).to(DEVICE), None, None]
    linear = Int8Linear(weights, biases, kernel=BY_ROWS)
    for rows in (1, 16, 17):
        x = torch.randn(1, rows, 40, generator=generator).to(DEVICE)
        expected = int8_linear(x[0], torch.cat(weights))
        expected[:, :24] += biases[0]
        assert torch.equal(linear(x)[0], expected)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("inputs", [1, 100, 1024, 4097])
def test_rows_are_quantised_as_the_oracle_does(inputs, dtype):
    x = rows_of_all_scales(9, inputs, 4, dtype)
    x[0, 0] = x[0].abs().max() / 127 * 2.5  # a tie: half to even
    q, scale = quantise_triton.quantise_rows(x)
    expected_q, expected_scale = quantise_rows(x)
    assert torch.equal(q, expected_q)
    assert torch.equal(scale, expected_scale[:, 0])


def rms(x, weight, epsilon):
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * normed.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_stands_before_a_product_is_fused_with_the_quantisation(dtype):
    """Values within an integer's step: a reduction's order may move a value across a tie."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(6, 150, generator=generator).to(DEVICE, dtype) for _ in range(2))
    weight = torch.rand(150, generator=generator).to(DEVICE, dtype)
    *added, total = quantise_triton.add_rms_quantise_rows(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    for (q, scale), plain in (
        (quantise_triton.rms_quantise_rows(x, weight, 1e-5), rms(x, weight, 1e-5)),
        (added, rms(x + residual, weight, 1e-5)),
        (quantise_triton.silu_quantise_rows(x), F.silu(x[:, :75]) * x[:, 75:]),
    ):
        expected_q, expected_scale = quantise_rows(plain)
        assert (q.int() - expected_q.int()).abs().max() <= 1
        assert (q != expected_q).float().mean() < 0.01
        torch.testing.assert_close(scale, expected_scale[:, 0], rtol=2e-3, atol=0)


def test_a_compiled_layer_has_no_break_and_one_graph_for_all_layers():
    generator = torch.Generator().manual_seed(0)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = Int8Linear([torch.randn(64, 64, generator=generator).to(DEVICE)], kernel=BY_ROWS)

        def forward(self, x):
            return x + self.linear(F.silu(x))

    layers = [Layer() for _ in range(3)]
    x = torch.randn(2, 64, generator=generator).to(DEVICE)
    expected = [layer(x) for layer in layers]
    for layer, y in zip(layers, expected, strict=True):
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False, backend=backend)
        assert torch.equal(layer(x), y)
    assert len(graphs) == 1


@pytest.mark.skipif(not NATIVE, reason="no CUDA device: nothing to capture a graph on")
@torch.no_grad()
def test_a_captured_graph_replays_the_same_result():
    x = torch.randn(1, 512, device=DEVICE, dtype=torch.float16)
    linear = Int8Linear([torch.randn(256, 512, device=DEVICE).half()], kernel=DECODE_KERNELS[0])
    expected = linear(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x)
    graph.replay()
    assert torch.equal(y, expected)
