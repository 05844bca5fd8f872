"""Choosing kernels: joules before time, every reason in a document that loads back; floors by hand."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from hestctl.kernels import choose as choosing
from hestctl.kernels import devices, products
from hestctl.kernels.choose import Choices, Shape, choose, row_bucket
from hestctl.kernels.floors import DecoderShape, decode_floor_s, device_peak, prefill_floor_s
from hestctl.kernels.int8 import Int8Linear

CPU = torch.device("cpu")
SHAPE = Shape(4, 16, 24)


@pytest.fixture
def three_kernels(monkeypatch):
    """Three names that all run the reference, in the order they are measured first: a, b, c."""
    monkeypatch.setattr(choosing, "candidates", lambda phase: ("a", "b", "c"))
    monkeypatch.setattr(choosing, "why_not", lambda name, *rest: None)
    monkeypatch.setattr(choosing, "product", lambda name: products.product("reference"))


def measured(figures):
    """A measure that answers by candidate; candidates take turns: a b c, c b a, a b c."""
    turns = itertools.cycle([*figures, *reversed(figures), *figures])
    return lambda run: next(turns)


def test_fewer_joules_win_over_time(three_kernels):
    found = choose([SHAPE], torch.float32, CPU, measured([(3.0, 1.0), (1.0, 2.0), (2.0, 0.5)]))
    choice = found.by_shape[SHAPE.key]
    assert choice.kernel == "b"
    assert "fewest joules" in choice.why


def test_time_decides_where_joules_are_not_told_apart(three_kernels):
    readings = [(1.0, 3.0), (1.1, 2.0), (9.0, 1.0), (9.2, 1.0), (1.0, 2.0), (1.1, 3.0)]
    readings += [(1.05, 3.0), (1.05, 2.0), (9.1, 1.0)]
    turns = iter(readings)
    choice = choose([SHAPE], torch.float32, CPU, lambda run: next(turns)).by_shape[SHAPE.key]
    assert choice.kernel == "b"
    assert "fastest of 2" in choice.why


def test_without_joules_the_fastest_is_kept_and_that_is_said(three_kernels):
    found = choose([SHAPE], torch.float32, CPU, measured([(None, 3.0), (None, 2.0), (None, 4.0)]))
    choice = found.by_shape[SHAPE.key]
    assert (choice.kernel, choice.joules, choice.error) == ("b", None, None)
    assert "no joules" in choice.why


def test_a_product_that_differs_from_the_reference_is_never_chosen(three_kernels, monkeypatch):
    def wrong(q, scale, weight, dtype):
        return products.product("reference")(q, scale, weight, dtype) + 1

    pick = {"a": wrong}
    reference = products.product("reference")
    monkeypatch.setattr(choosing, "product", lambda name: pick.get(name, reference))
    found = choose([SHAPE], torch.float32, CPU, measured([(1.0, 1.0), (2.0, 2.0)]))
    choice = found.by_shape[SHAPE.key]
    assert choice.kernel == "b"
    assert choice.unavailable == {"a": "its result differs from the reference"}


def test_what_is_not_there_is_in_the_document_with_its_reason(monkeypatch):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    shapes = [SHAPE, Shape(64, 16, 24)]
    found = choose(shapes, torch.float32, CPU, lambda run: pytest.fail("there is nothing to measure"))
    for shape in shapes:
        choice = found.by_shape[shape.key]
        assert choice.kernel == "torch._int_mm"
        assert choice.why == "the only one that runs here"
        assert (choice.joules, choice.seconds, choice.measured) == (None, None, {})
        assert choice.unavailable["torchao.int_scaled_matmul"] == "torchao is not installed"
        own = [reason for name, reason in choice.unavailable.items() if name.startswith("triton.")]
        assert own and set(own) == {"triton is not installed"}
    document = json.loads(json.dumps(found.as_dict()))
    assert Choices.from_dict(document) == found
    assert found.kernels(16, 24) == {16: "torch._int_mm", 64: "torch._int_mm"}
    with pytest.raises(KeyError, match="16 outputs and 25 inputs"):
        found.kernels(16, 25)


def test_kernels_serve_the_rows_nearest_to_those_they_were_measured_at():
    def chosen(name):
        return choosing.Choice(name, None, None, None, f"{name} is best", {}, {})

    names = {4: "a", 32: "b", 256: "c", 4096: "d"}
    found = Choices("device", {Shape(rows, 8, 24).key: chosen(name) for rows, name in names.items()})
    assert found.kernels(8, 24) == {16: "a", 90: "b", 1024: "c", 4096: "d"}
    assert found.told(8, 24).startswith("16 rows: a (a is best); 32 rows: b (b is best); 256 rows: c")
    many = Choices("device", {Shape(rows, 8, 24).key: chosen(names[rows]) for rows in (4096, 256)})
    assert many.kernels(8, 24) == {1024: "c", 4096: "d"}


def test_triton_is_no_candidate_in_its_interpreter(monkeypatch):
    monkeypatch.setattr(choosing, "why_not", lambda name, *rest: None)
    found = choose([SHAPE], torch.float32, CPU, lambda run: (1.0, 1.0)).by_shape[SHAPE.key]
    own = {name: reason for name, reason in found.unavailable.items() if name.startswith("triton.")}
    assert set(own) == set(products.DECODE_KERNELS)
    assert set(own.values()) == {"Triton's interpreter is for tests"}


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((7, 0), "compute capability 7.0 has no int8 tensor core path"),
        ((7, 5), "compute capability 7.5: Triton's tensor core products need 8.0"),
        ((8, 0), None),
        ((9, 0), None),
    ],
)
def test_older_devices_are_told_why(monkeypatch, capability, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices.why_no_triton(torch.device("cuda")) == reason
    assert "NVIDIA" in devices.why_no_triton(CPU)


def test_a_kernel_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton is not installed"):
        Int8Linear([torch.ones(8, 8)], kernel="triton.decode/16x256-w4-s5")
    with pytest.raises(ValueError, match="no such kernel"):
        Int8Linear([torch.ones(8, 8)], kernel="fastest")
    assert "multiples of 8" in products.why_not("torch._int_mm", torch.device("cuda"), 12, 8)


def test_shapes_of_one_bucket_share_a_choice():
    assert [row_bucket(rows) for rows in (1, 16, 17, 32, 33, 1000)] == [16, 16, 32, 32, 64, 1024]
    assert Shape(16, 8, 8).phase == "decode"
    assert Shape(17, 8, 8).phase == "prefill"


def test_floors_of_llama_2_7b_on_an_h100():
    peak = device_peak("NVIDIA H100 80GB HBM3")
    half = DecoderShape(32, 4096, 11008, 32, 32, 128, 32000)
    whole = DecoderShape(32, 4096, 11008, 32, 32, 128, 32000, layer_bytes=1.0)
    assert 1e3 * decode_floor_s(half, peak, 1, 1024) == pytest.approx(4.10, abs=0.02)
    assert 1e3 * decode_floor_s(whole, peak, 1, 1024) == pytest.approx(2.17, abs=0.02)
    assert 1e3 * prefill_floor_s(half, peak, 1, 4096) == pytest.approx(58, abs=0.5)
    assert 1e3 * prefill_floor_s(whole, peak, 1, 4096) == pytest.approx(31, abs=0.5)
    assert device_peak("NVIDIA H100 PCIe") is None
    assert device_peak("NVIDIA GeForce RTX 4090") is None
