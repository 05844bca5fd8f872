"""Hardening on the tiny model: the band it reaches, the bound in real generation, the way back from disk."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from hestctl.budget import Budget
from hestctl.data.prompts import train_batch
from hestctl.energy.model import Cost
from hestctl.energy.table import EnergyTable
from hestctl.errors import Exit, HestError
from hestctl.generation.engine import Generator
from hestctl.generation.native import NativeGenerator
from hestctl.hardening.certificate import certificate
from hestctl.hardening.harden import harden
from hestctl.hardening.plan import Plan, read_plan
from hestctl.model.methods import build_tuner
from hestctl.model.spectral import applied, normalise
from hestctl.records import FULL, INT8, OFF
from hestctl.settings import GenerationSettings, MethodSettings

NEW_TOKENS = 6


def table(int8=0.4e-6, full=1e-6):
    return EnergyTable(
        calibration_id="table-1",
        key="k",
        created_at="2026-01-01",
        kind="estimated",
        meter="fake",
        device_name="Fake",
        device_uuid="u",
        dtype="float32",
        hidden=64,
        rank=16,
        tokens=256,
        full=Cost(full, full / 100),
        int8=Cost(int8, int8 / 100),
        controller=Cost(1e-7, 1e-9),
    )


def spectral(backbone, name="hest", states=(0, 1, 2), seed=0):
    tuner = build_tuner(
        MethodSettings(name=name),
        backbone.model,
        layers=backbone.num_layers,
        hidden=backbone.hidden_size,
        states=states,
        seed=seed,
    )
    with torch.no_grad():
        tuner.spectral.scale.normal_(generator=torch.Generator().manual_seed(seed)).mul_(0.3)
    return tuner


def fit_spread(backbone, tuner, rows):
    """What training does before step 0: thresholds in the spread of real scores."""
    gate, seen = tuner.spectral.gate, []
    batch = train_batch(rows, backbone.pad_id)

    def look(layer, hidden):
        seen.append(gate.controller(normalise(hidden), layer)[batch.attention_mask.bool()])
        return hidden

    with torch.no_grad():
        with applied(backbone.layers, look):
            backbone.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        scores = torch.stack(seen)
        gate.spread_over(scores.mean(1), scores.std(1))


def budget_of(backbone, rows, share, beams=1):
    work = sum(len(row.prompt_ids) + NEW_TOKENS for row in rows) / len(rows)
    emax = share * beams * work * backbone.num_layers * 16 * 1e-6
    return Budget(emax, "test", None, NEW_TOKENS, NEW_TOKENS, beams)


def hardened(backbone, rows, share, *, states=(0, 1, 2), beams=1, seed=0):
    tuner = spectral(backbone, states=states, seed=seed)
    fit_spread(backbone, tuner, rows)
    budget = budget_of(backbone, rows, share, beams)
    plan = harden(
        backbone,
        tuner.spectral,
        rows,
        run_id="r",
        method="hest",
        table=table(),
        budget=budget,
        margin=0.01,
        generation=GenerationSettings(new_tokens=NEW_TOKENS, num_beams=beams),
    )
    return tuner, plan


@pytest.mark.parametrize("states", [(0, 1, 2), (0, 2)])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("share", [0.25, 0.35, 0.45, 0.7])
def test_the_hardened_energy_lies_in_its_band(share, seed, states, backbone, samples):
    rows = samples(6, prompt=200, answer=NEW_TOKENS - 1)
    _, plan = hardened(backbone, rows, share, states=states, seed=seed)
    assert 0.95 <= plan.energies.hardened_j / plan.emax_j <= 1.0
    assert plan.energies.worst_j <= plan.emax_j
    assert plan.moved is not None


def test_gates_already_in_the_band_are_left_as_training_made_them(backbone, samples):
    rows = samples(6, prompt=40, answer=NEW_TOKENS - 1)
    tuner, plan = hardened(backbone, rows, 0.3, states=(0, 2))
    before = tuner.spectral.gate.threshold.clone()
    again = harden(
        backbone,
        tuner.spectral,
        rows,
        run_id="r",
        method="hest",
        table=table(),
        budget=budget_of(backbone, rows, 0.3),
        margin=0.01,
        generation=GenerationSettings(new_tokens=NEW_TOKENS, num_beams=1),
    )
    assert again.shift == 0
    assert torch.equal(before, tuner.spectral.gate.threshold)
    assert again.energies.hardened_j == pytest.approx(plan.energies.hardened_j)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("states", [(0, 1, 2), (0, 2)])
def test_no_generated_sample_exceeds_its_budget(beams, states, backbone, samples):
    rows = samples(6, prompt=30)
    tuner, plan = hardened(backbone, rows, 0.25, states=states, beams=beams)
    with torch.no_grad():
        tuner.spectral.gate.threshold.fill_(-50.0)  # the gates now ask for everything
    generator = Generator(backbone, tuner.spectral, plan)
    out = generator.generate(rows, new_tokens=NEW_TOKENS, num_beams=beams, forced_length=True)
    free = Generator(backbone, tuner.spectral, None).generate(
        rows, new_tokens=NEW_TOKENS, num_beams=beams, forced_length=True
    )
    costs = torch.tensor(plan.costs_j, dtype=torch.float64)
    joules = (out.counts_QLS.double() * costs).sum((1, 2))
    assert (joules <= plan.emax_j).all()
    assert (joules > 0.8 * plan.emax_j).all()
    assert ((free.counts_QLS.double() * costs).sum((1, 2)) > plan.emax_j).all()
    assert plan.joules(out.counts_QLS[0]) == pytest.approx(joules[0].item())


def test_a_ragged_batch_gets_what_its_samples_get_alone(backbone, samples):
    rows = samples(5, prompt=20)
    tuner, plan = hardened(backbone, rows, 0.3)
    generator = Generator(backbone, tuner.spectral, plan)
    together = generator.generate(rows, new_tokens=NEW_TOKENS, num_beams=1)
    for index, row in enumerate(rows):
        alone = generator.generate([row], new_tokens=NEW_TOKENS, num_beams=1)
        assert alone.new_ids[0] == together.new_ids[index]


def test_a_plan_comes_back_from_disk_as_it_was(backbone, samples, tmp_path):
    rows = samples(4)
    _, plan = hardened(backbone, rows, 0.3)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**plan.as_dict(), "created_at": "now", "certificate": certificate(plan)}))
    assert read_plan(path) == plan


def test_the_certificate_bounds_every_length(backbone, samples):
    _, plan = hardened(backbone, samples(4), 0.3)
    rows = certificate(plan)
    assert [row["length_tokens"] for row in rows][-1] == 4096
    assert all(row["bound_j"] <= plan.emax_j for row in rows)
    assert rows[-1]["open_share"] < 0.05


def test_a_plan_refuses_another_backbone_device_or_version(backbone, samples, tmp_path):
    _, plan = hardened(backbone, samples(4), 0.3)
    plan.check(backbone.fingerprint, "Fake", "k")
    plan.check(backbone.fingerprint, "Fake", None)
    with pytest.raises(HestError, match="another backbone") as caught:
        plan.check("another", "Fake", "k")
    assert caught.value.exit_code == Exit.USAGE
    with pytest.raises(HestError, match="another device"):
        plan.check(backbone.fingerprint, "H100", "k")
    with pytest.raises(HestError, match="another energy table") as caught:
        plan.check(backbone.fingerprint, "Fake", "other")
    assert "hestctl harden --run r" in caught.value.hint
    with pytest.raises(HestError, match="version"):
        Plan.from_dict({**plan.as_dict(), "version": 99})
    (tmp_path / "plan.json").write_text('{"version": 1')
    with pytest.raises(HestError, match="no readable plan"):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize("name", ["tabs", "bhsp"])
def test_methods_without_a_budget_get_a_plan_that_binds_nothing(name, backbone, samples):
    rows = samples(3)
    tuner = spectral(backbone, name)
    plan = harden(
        backbone,
        tuner.spectral,
        rows,
        run_id="r",
        method=name,
        table=table(),
        budget=None,
        margin=0.01,
        generation=GenerationSettings(),
    )
    assert plan.emax_j is None
    assert certificate(plan) == []
    assert plan.energies.decided_j == pytest.approx(plan.energies.hardened_j)
    out = Generator(backbone, tuner.spectral, plan).generate(rows, new_tokens=3, num_beams=1)
    assert plan.joules(out.counts_QLS) > 0


def test_an_int8_state_that_does_not_pay_is_dropped():
    assert table(int8=0.5e-6).states == (0, 1, 2)
    assert table(int8=0.99e-6).states == (0, 2)  # within the error of both
    assert table(int8=2e-6).states == (0, 2)
    assert "dropped" in table(int8=2e-6).verdict()
    assert EnergyTable.from_dict(json.loads(json.dumps(table().as_dict()))) == table()


@pytest.mark.parametrize("kind", [Generator, NativeGenerator])
def test_an_engine_does_not_ask_the_gates_of_a_fixed_layer(kind, backbone, samples, monkeypatch):
    rows = samples(3)
    tuner, plan = hardened(backbone, rows, 0.3)
    constant = (FULL, OFF, INT8, OFF) * 4
    gate, asked = tuner.spectral.gate, set()
    with torch.no_grad():
        # As the gate itself would decide: full, off, or int8 between two thresholds.
        gate.threshold[0] = torch.tensor([-1e4, 1e4, -1e4, 1e4] * 4)
        gate.gap[0] = torch.tensor([1.0, 1.0, 1e5, 1.0] * 4)
    plan = replace(plan, fixed=(None, *[None] * (backbone.num_layers - 1)))
    before = kind(backbone, tuner.spectral, plan).generate(rows, new_tokens=4, num_beams=1)
    plan = replace(plan, fixed=(constant, *[None] * (backbone.num_layers - 1)))
    real = gate.decide
    monkeypatch.setattr(gate, "decide", lambda x, layer: asked.add(layer) or real(x, layer))
    after = kind(backbone, tuner.spectral, plan).generate(rows, new_tokens=4, num_beams=1)
    assert 0 not in asked
    assert 1 in asked
    assert after.new_ids == before.new_ids
    assert torch.equal(after.counts_QLS, before.counts_QLS)
