"""The fused adapter of decode against HardPass and Ledger: the same log of states and the same purses.

Natively on a CUDA device, else in Triton's interpreter. Tokens whose score lies within rounding of a
threshold are drawn again: there the order of a sum decides, in the oracle as in the kernel.
"""

from __future__ import annotations

import pytest
import torch

from hestctl.generation.fused import FusedDecode, fused_weights, why_not_fused
from hestctl.generation.hardpass import HardPass
from hestctl.hardening.ledger import Ledger, Tariff, incomes
from hestctl.model.controller import FactorisedController, UnfactorisedController
from hestctl.model.gates import LinearGate, OrdinalGate, StaticGate
from hestctl.model.spectral import SpectralAdapters, normalise
from hestctl.records import FULL, OFF

pytest.importorskip("triton", reason="triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS = 2
MARGIN = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 2e-1}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def make_adapters(gate_kind, hidden, rank, width, seed):
    generator = torch.Generator().manual_seed(seed)
    if gate_kind == "linear":
        gate = LinearGate(LAYERS, hidden, rank, generator)
    elif gate_kind == "static":
        gate = StaticGate(LAYERS, rank)
        gate.level.data.copy_(torch.randn(LAYERS, rank, generator=generator))
    else:
        kind = FactorisedController if gate_kind == "factorised" else UnfactorisedController
        controller = kind(LAYERS, hidden, width, generator)
        gate = OrdinalGate(controller, LAYERS, rank, tau=0.67, states=(OFF, FULL))
        gate.threshold.data.copy_(torch.randn(LAYERS, rank, generator=generator))
    adapters = SpectralAdapters(LAYERS, hidden, rank, gate, uses_int8=False, generator=generator)
    adapters.scale.data.copy_(torch.randn(LAYERS, rank, generator=generator))
    if isinstance(gate, OrdinalGate):
        x = normalise(torch.randn(1, 64, hidden, generator=generator))
        scores = torch.stack([gate.controller(x, layer)[0] for layer in range(LAYERS)])
        gate.spread_over(scores.mean(1), scores.std(1))
    return adapters.to(DEVICE).requires_grad_(False)


def make_ledger(ratio, work, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    tariff = Tariff.from_costs((0.0, 1e-6, 1e-6), uses_int8=False)
    pace = torch.rand(LAYERS, generator=generator) + 0.2
    order = torch.stack([torch.randperm(rank, generator=generator) for _ in range(LAYERS)]).to(DEVICE)
    emax_j = ratio * max(work) * LAYERS * rank * 1e-6
    income = incomes(0.99 * emax_j / torch.tensor(work).double(), pace, rank, tariff).to(DEVICE)
    return lambda: Ledger(income, order, tariff, uses_int8=False), order


def empty_log(requests):
    return torch.zeros(LAYERS, requests, 3, dtype=torch.int64, device=DEVICE)


def near_a_threshold(adapters, layer, h_WD):
    """Rows (W,) where rounding could turn a gate."""
    gate, x = adapters.gate, normalise(h_WD)[:, None]
    margin = MARGIN[h_WD.dtype]
    if isinstance(gate, StaticGate):
        return torch.zeros(len(h_WD), dtype=torch.bool, device=h_WD.device)
    if isinstance(gate, LinearGate):
        return (gate.score(x, layer).abs() < margin)[:, 0].any(-1)
    logits = gate.logits(x, layer)[:, 0] / gate.log_beta.exp()
    return ((logits[..., FULL] - logits[..., OFF]).abs() < 2 * margin).any(-1)


def draw_hidden(adapters, rows, generator, dtype):
    """Hidden states (W, L, D), every layer's far enough from its thresholds."""
    _, hidden, _ = adapters.shape
    h_WLD = torch.empty(rows, LAYERS, hidden, dtype=dtype, device=DEVICE)
    for layer in range(LAYERS):
        again = torch.ones(rows, dtype=torch.bool, device=DEVICE)
        while again.any():
            drawn = 3 * torch.randn(int(again.sum()), hidden, generator=generator)
            h_WLD[again, layer] = drawn.to(DEVICE, dtype)
            again = near_a_threshold(adapters, layer, h_WLD[:, layer])
    return h_WLD


@torch.no_grad()
def side_by_side(
    gate,
    *,
    hidden,
    rank,
    width=8,
    beams=1,
    lengths=(3,),
    tokens=6,
    ratio=0.3,
    seed=0,
    dtype=torch.float32,
    joined=None,
):
    """Prompts of ``lengths`` through HardPass, then ``tokens`` new tokens both ways; the log (L, Q, S)."""
    adapters = make_adapters(gate, hidden, rank, width, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    requests, rows, longest = len(lengths), len(lengths) * beams, max(lengths)
    mask_WT = torch.zeros(rows, longest, dtype=torch.bool, device=DEVICE)
    for row in range(rows):
        mask_WT[row, longest - lengths[row // beams] :] = True
    work = [(length + tokens) * beams for length in lengths]
    make, order = (lambda: None, None) if ratio is None else make_ledger(ratio, work, rank, seed)
    oracle_ledger, prompt_ledger = make(), make()
    for ledger in filter(None, (oracle_ledger, prompt_ledger)):
        ledger._ample = False  # the kernel keeps purses that cannot bind, too
    oracle = HardPass(adapters, mask_WT, requests, oracle_ledger, {})
    prompt = HardPass(adapters, mask_WT, requests, prompt_ledger, {})
    prompt_WTD = torch.randn(rows, longest, hidden, generator=generator).to(DEVICE, dtype)
    for layer in range(LAYERS):
        oracle(layer, prompt_WTD)
        prompt(layer, prompt_WTD)
    log_LQS = prompt.log().sum(0).transpose(0, 1).contiguous()
    weights = fused_weights(adapters, dtype, order)
    fused = FusedDecode(weights, prompt_ledger, log_LQS, beams=beams, joined=joined)
    real_W = torch.ones(rows, dtype=torch.bool, device=DEVICE)
    for _ in range(tokens):
        h_WLD = draw_hidden(adapters, rows, generator, dtype)
        for layer in range(LAYERS):
            h_W1D = h_WLD[:, layer, None]
            expected, y = oracle(layer, h_W1D), fused.steps[layer](h_W1D, real_W)
            # The values show which directions ran; the log, how many.
            torch.testing.assert_close(y, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
            assert torch.equal(log_LQS[layer], oracle.log().sum(0)[:, layer])
    if oracle_ledger is not None:
        assert torch.equal(prompt_ledger.purse_LQ, oracle_ledger.purse_LQ)
        assert torch.equal(prompt_ledger.seen_LQ, oracle_ledger.seen_LQ)
    return log_LQS


@pytest.mark.parametrize("gate", ["factorised", "unfactorised", "linear", "static"])
@pytest.mark.parametrize("ratio", [None, 0.3])
def test_every_gate_with_and_without_a_ledger(gate, ratio):
    side_by_side(gate, hidden=150, rank=5, ratio=ratio)


@pytest.mark.parametrize(
    ("hidden", "rank", "width", "beams", "lengths"),
    [
        (16, 1, 1, 1, (2,)),
        (128, 16, 32, 4, (5, 2, 7, 1)),
        (129, 17, 33, 3, (4, 1, 2, 3, 6, 2)),
        (320, 64, 128, 2, (2, 3)),
        (1100, 3, 16, 5, (3, 2)),
        (64, 16, 8, 16, (2,)),
    ],
)
def test_every_size(hidden, rank, width, beams, lengths):
    sizes = {"hidden": hidden, "rank": rank, "width": width, "beams": beams, "lengths": lengths}
    side_by_side("factorised", **sizes, tokens=2, seed=hidden)


def test_a_long_sequence_never_drifts():
    log = side_by_side("factorised", hidden=48, rank=8, beams=2, lengths=(9, 4), tokens=50, seed=5)
    assert log[..., FULL].sum() <= 0.3 * log.sum() < log[..., OFF].sum()


@pytest.mark.parametrize("ratio", [0.02, 5.0])
def test_an_empty_purse_and_a_full_one(ratio):
    side_by_side("factorised", hidden=40, rank=6, ratio=ratio, tokens=10)


@pytest.mark.parametrize("gate", ["factorised", "linear"])
def test_half_precision(gate):
    side_by_side(gate, hidden=200, rank=8, dtype=torch.float16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's interpreter truncates to bfloat16")
@pytest.mark.parametrize("gate", ["factorised", "linear"])
def test_bfloat16(gate):
    side_by_side(gate, hidden=200, rank=8, dtype=torch.bfloat16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: programs cannot meet at a barrier")
@pytest.mark.parametrize("beams", [1, 4])
def test_one_launch_equals_two(beams):
    sizes = {"hidden": 4096, "rank": 16, "width": 32, "beams": beams, "lengths": (5, 3, 2, 4), "tokens": 20}
    joined = side_by_side("factorised", **sizes, joined=True)
    split = side_by_side("factorised", **sizes, joined=False)
    assert torch.equal(joined, split)


@torch.no_grad()
def test_rows_that_are_not_real_spend_nothing():
    adapters = make_adapters("static", 40, 6, 8, 0)
    make, order = make_ledger(0.3, [8, 8], 6, 0)
    ledger, mine, log_LQS = make(), make(), empty_log(2)
    fused = FusedDecode(fused_weights(adapters, torch.float32, order), mine, log_LQS, beams=2)
    h_W1D = torch.randn(4, 1, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    real_W = torch.tensor([True, False, False, False], device=DEVICE)
    for _ in range(3):
        out = fused.steps[0](h_W1D, real_W)
        asked = adapters.gate.decide(h_W1D, 0)
        allowed = ledger.allow(0, asked, real_W[:, None])
        assert torch.equal(out[1:], h_W1D[1:])
    assert log_LQS[0].sum(-1).tolist() == [3 * 6, 0]
    assert torch.equal(mine.purse_LQ, ledger.purse_LQ)
    assert mine.seen_LQ[0].tolist() == [3, 0]
    assert (allowed[1:] == OFF).all()


def test_what_the_kernel_does_not_take_is_said():
    adapters = make_adapters("factorised", 40, 6, 8, 0)
    assert why_not_fused(adapters, DEVICE) is None
    adapters.uses_int8 = True
    assert "int8 directions" in why_not_fused(adapters, DEVICE)
    wide = make_adapters("factorised", 40, 6, 200, 0)
    assert "200 columns" in why_not_fused(wide, DEVICE)
    with pytest.raises(ValueError, match="200 columns"):
        FusedDecode(fused_weights(wide, torch.float32, None), None, empty_log(1), beams=1)
    assert "65 directions" in why_not_fused(make_adapters("linear", 80, 65, 1, 0), DEVICE)


@torch.no_grad()
def test_layers_share_one_compiled_graph_and_keep_their_own_registers():
    adapters = make_adapters("factorised", 64, 6, 8, 0)
    weights = fused_weights(adapters, torch.float32, None)
    logs = empty_log(2), empty_log(2)
    plain, compiled = (FusedDecode(weights, None, log_LQS, beams=1) for log_LQS in logs)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    class Layer(torch.nn.Module):
        def __init__(self, step):
            super().__init__()
            self.step = step

        def forward(self, h, real):
            return self.step(h * 2, real) * 0.5

    real = torch.ones(2, dtype=torch.bool, device=DEVICE)
    layers = [Layer(step) for step in compiled.steps]
    for layer in layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False, backend=backend)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        h = torch.randn(2, 1, 64, generator=generator).to(DEVICE)
        for layer, step in zip(layers, plain.steps, strict=True):
            torch.testing.assert_close(layer(h, real), step(h * 2, real) * 0.5)
    assert torch.equal(*logs)
    assert len(graphs) == 1
