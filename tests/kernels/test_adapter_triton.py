"""The fused adapter of decode against HardPass and Ledger: the same states, counts and purses, token by token."""

from __future__ import annotations

import pytest
import torch

from hestctl.generation.fused import FusedDecode, why_not_fused
from hestctl.generation.hardpass import HardPass
from hestctl.hardening.ledger import Ledger, Tariff, incomes
from hestctl.model.controller import FactorisedController, UnfactorisedController
from hestctl.model.gates import FULL, OFF, LinearGate, OrdinalGate, StaticGate
from hestctl.model.spectral import SpectralAdapters, normalise

triton = pytest.importorskip("triton", reason="triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS = 2


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
    income = incomes(emax_j, 0.01, pace, torch.tensor(work), tariff).to(DEVICE)
    return lambda: Ledger(income, order, tariff, uses_int8=False), order


def decode(adapters, ledgers, hidden_TWLD, prompt_WTD, mask_WT, requests, *, dtype, joined=None):
    """Both ways side by side over one prompt and many tokens; yields (oracle, kernel) outputs by token."""
    beams = len(mask_WT) // requests
    make, order = ledgers or (lambda: None, None)
    oracle_ledger, prompt_ledger = make(), make()
    oracle = HardPass(adapters, mask_WT, requests, oracle_ledger)
    prompt = HardPass(adapters, mask_WT, requests, prompt_ledger)
    for layer in range(LAYERS):
        oracle(layer, prompt_WTD)
        prompt(layer, prompt_WTD)
    fused = FusedDecode(adapters, dtype, order, requests=requests, beams=beams, joined=joined)
    fused.take(prompt.counts_QLS, prompt_ledger)
    real = torch.ones(len(mask_WT), dtype=torch.bool, device=DEVICE)
    for hidden_WLD in hidden_TWLD:
        for layer in range(LAYERS):
            before = fused.counts_QLS[:, layer].clone()
            before_oracle = oracle.counts_QLS[:, layer].clone()
            h = hidden_WLD[:, layer, None]
            expected, y = oracle(layer, h), fused.steps[layer](h, real)
            gained = fused.counts_QLS[:, layer] - before
            assert torch.equal(gained, oracle.counts_QLS[:, layer] - before_oracle)
            tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
            torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(fused.counts_QLS, oracle.counts_QLS)
    if oracle_ledger is not None:
        assert torch.equal(fused.registers.purse_LQ, oracle_ledger.purse_LQ)
        assert torch.equal(fused.registers.seen_LQ, oracle_ledger.seen_LQ)
    return fused


@torch.no_grad()
def run(gate, *, hidden, rank, width=8, beams=1, lengths=(3,), tokens=12, ratio=0.4, seed=0, dtype=torch.float32, joined=None):
    adapters = make_adapters(gate, hidden, rank, width, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    requests, rows, longest = len(lengths), len(lengths) * beams, max(lengths)
    mask = torch.zeros(rows, longest, dtype=torch.bool)
    for row in range(rows):
        mask[row, longest - lengths[row // beams] :] = True
    draw = lambda *shape: (3 * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)
    work = [(length + tokens) * beams for length in lengths]
    ledgers = None if ratio is None else make_ledger(ratio, work, rank, seed)
    return decode(adapters, ledgers, draw(tokens, rows, LAYERS, hidden), draw(rows, longest, hidden), mask.to(DEVICE), requests, dtype=dtype, joined=joined)


@pytest.mark.parametrize("gate", ["factorised", "unfactorised", "linear", "static"])
@pytest.mark.parametrize("ratio", [None, 0.3])
def test_every_gate(gate, ratio):
    run(gate, hidden=150, rank=5, ratio=ratio)
