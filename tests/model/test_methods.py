"""What each method is made of: parameter counts, the untouched start, gradients, states, noise."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hestctl.kernels.reference import int8_linear, int8_linear_ste, int8_matmul, quantise_rows
from hestctl.model.gates import GateNoise, OrdinalGate
from hestctl.model.methods import METHODS, build_tuner
from hestctl.model.spectral import applied, normalise
from hestctl.records import FULL, INT8, OFF
from hestctl.settings import MethodSettings
from hestctl.training.gatepass import GatePass

COSTS = (0.0, 0.5e-6, 1e-6)


def tuner_for(name, backbone, states=(OFF, INT8, FULL), **more):
    return build_tuner(
        MethodSettings(name=name, **more),
        backbone.model,
        layers=backbone.num_layers,
        hidden=backbone.hidden_size,
        states=states,
        seed=0,
    )


def batch_of(rows, pad_id):
    from hestctl.data.prompts import train_batch

    return train_batch(rows, pad_id)


def forward(backbone, batch, change):
    with applied(backbone.layers, change) if change else nullcontext():
        return backbone.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.trained])
def test_an_untrained_adapter_leaves_the_logits_as_they_are(name, backbone, samples):
    batch = batch_of(samples(3), backbone.pad_id)
    with torch.no_grad():
        plain = forward(backbone, batch, None)
        tuner = tuner_for(name, backbone)
        gates = None
        if tuner.spectral is not None:
            gates = GatePass(tuner.spectral, batch.attention_mask, COSTS, GateNoise(0, 0, 0))
        assert torch.equal(forward(backbone, batch, gates), plain)


def test_controller_parameters_for_the_shape_of_llama_2_7b():
    def counts(name, **more):
        tuner = build_tuner(
            MethodSettings(name=name, **more), None, layers=32, hidden=4096, states=(0, 1, 2), seed=0
        )
        return tuner.counts()

    hest, tabs = counts("hest"), counts("tabs")
    assert hest.controller == 132_096
    assert hest.thresholds == 1_024 + 1  # and beta
    assert tabs.controller == 2_097_152
    assert tabs.thresholds == 0
    assert hest.adapter == tabs.adapter == 2 * 32 * 4096 * 16 + 32 * 16
    assert 1 - (hest.controller + hest.thresholds) / tabs.controller > 0.93
    assert counts("hest", controller="unfactorised").controller == 32 * 4096 * 32


@pytest.mark.parametrize("name", ["hest", "tabs", "bhsp"])
def test_every_trainable_tensor_has_a_gradient_by_step_2(name, backbone, samples):
    tuner = tuner_for(name, backbone)
    batch = batch_of(samples(4), backbone.pad_id)
    optimizer = torch.optim.SGD(tuner.named_parameters().values(), lr=1.0)
    reached = set()
    for step in range(2):
        gates = GatePass(tuner.spectral, batch.attention_mask, COSTS, GateNoise(0, step, 0))
        logits = forward(backbone, batch, gates)
        wanted = batch.labels[:, 1:] != -100
        loss = torch.nn.functional.cross_entropy(logits[:, :-1][wanted], batch.labels[:, 1:][wanted])
        optimizer.zero_grad()
        loss.backward()
        for parameter_name, parameter in tuner.named_parameters().items():
            if parameter.grad is not None and parameter.grad.abs().sum() > 0:
                reached.add(parameter_name)
        optimizer.step()
    assert reached == set(tuner.named_parameters())


def test_all_three_states_occur_from_the_start(backbone, samples):
    tuner = tuner_for("hest", backbone)
    gate = tuner.spectral.gate
    batch = batch_of(samples(4), backbone.pad_id)
    seen = {}

    def look(layer, hidden):
        scores = gate.controller(normalise(hidden), layer)
        seen[layer] = (scores.mean(), scores.std())
        return hidden

    with torch.no_grad():
        forward(backbone, batch, look)
        gate.spread_over(*(torch.stack(part) for part in zip(*seen.values(), strict=True)))
        gates = GatePass(tuner.spectral, batch.attention_mask, COSTS, GateNoise(0, 0, 0))
        forward(backbone, batch, gates)
    assert min(gates.shares()) > 0.1
    assert sum(gates.shares()) == pytest.approx(1)


def test_fp16_only_never_draws_int8(backbone, samples):
    tuner = tuner_for("hest", backbone, precision="fp16-only")
    batch = batch_of(samples(2), backbone.pad_id)
    gates = GatePass(tuner.spectral, batch.attention_mask, COSTS, GateNoise(0, 0, 0))
    with torch.no_grad():
        forward(backbone, batch, gates)
    assert gates.shares()[INT8] == 0
    assert not tuner.spectral.uses_int8


@given(st.floats(-3, 3), st.floats(-2, 2), st.floats(-2, 2))
def test_the_ordinal_gate_switches_exactly_at_its_thresholds(score, threshold, gap):
    gate = OrdinalGate(None, 1, 1, tau=0.67, states=(OFF, INT8, FULL))
    c1 = torch.tensor([threshold])
    c2 = c1 + torch.nn.functional.softplus(torch.tensor([gap]))
    s = torch.tensor([score])
    if min((s - c1).abs().min(), (s - c2).abs().min()) < 1e-4:
        return
    expected = OFF if s < c1 else INT8 if s < c2 else FULL
    with torch.no_grad():
        assert gate.logits_of(s, c1, torch.tensor([gap])).argmax(-1).item() == expected


def test_gate_noise_depends_on_its_place_alone():
    torch.manual_seed(1)
    first = GateNoise(3, 5, 1).gumbel(2, torch.Size((4, 4)), torch.device("cpu"))
    torch.manual_seed(2)
    torch.rand(7)
    assert torch.equal(first, GateNoise(3, 5, 1).gumbel(2, torch.Size((4, 4)), torch.device("cpu")))
    for other in (GateNoise(4, 5, 1), GateNoise(3, 6, 1), GateNoise(3, 5, 0)):
        assert not torch.equal(first, other.gumbel(2, torch.Size((4, 4)), torch.device("cpu")))


def test_gumbel_noise_has_its_mean_and_variance():
    noise = GateNoise(0, 0, 0).gumbel(0, torch.Size((200_000,)), torch.device("cpu"))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.05)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3000), st.integers(1, 9), st.integers(0, 10**6))
def test_int8_products_are_exact(n, k, m, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    b = torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8)
    assert torch.equal(int8_matmul(a, b).long(), a.long() @ b.long().T)


def test_quantisation_is_symmetric_rounds_half_to_even_and_survives_zero_rows():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0.0] * 5])
    q, scale = quantise_rows(x)
    assert q.tolist() == [[127, 0, 2, -2, -127], [0] * 5]
    assert scale.flatten().tolist() == [1.0, 1.0]


def test_fake_quantisation_computes_what_the_kernel_does_and_passes_the_plain_gradient():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 64, generator=generator, requires_grad=True)
    w = torch.randn(7, 64, generator=generator, requires_grad=True)
    out = int8_linear_ste(x, w)
    assert torch.equal(out, int8_linear(x, w))
    out.sum().backward()
    fake = x.grad.clone(), w.grad.clone()
    x.grad = w.grad = None
    (x @ w.T).sum().backward()
    assert torch.allclose(fake[0], x.grad)
    assert torch.allclose(fake[1], w.grad)


def test_lora_merges_into_the_backbone_it_changed(backbone, samples):
    batch = batch_of(samples(2), backbone.pad_id)
    tuner = tuner_for("lora", backbone)
    with torch.no_grad():
        for parameter in tuner.named_parameters().values():
            parameter.add_(0.05)
        trained = forward(backbone, batch, None)
        tuner.finish()
        merged = forward(backbone, batch, None)
    assert torch.allclose(trained, merged, atol=1e-4)
    assert not any("lora" in name for name, _ in backbone.model.named_parameters())


@pytest.mark.parametrize("merged", [False, True])
def test_discarding_lora_leaves_the_backbone_bit_for_bit_as_it_was(backbone, merged):
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    for seed in range(2):
        tuner = tuner_for("lora", backbone)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in tuner.named_parameters().values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if merged:
            tuner.finish()
            assert any(not torch.equal(w, before[name]) for name, w in backbone.model.state_dict().items())
        tuner.discard()
        after = backbone.model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
