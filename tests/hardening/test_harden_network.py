"""Hardening in scope network on the tiny model: blocks, directions and generation within one budget."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from simulated_model import SimulatedModel, total
from test_harden import fit_spread, table

from hestctl.budget import Emax, resolve_budget
from hestctl.energy.meter import Meter
from hestctl.energy.model import Terms
from hestctl.energy.protocol import Unavailable
from hestctl.errors import Exit, HestError
from hestctl.generation.engine import Generator
from hestctl.generation.evaluate import evaluate
from hestctl.generation.native import NativeGenerator
from hestctl.hardening import harden as harden_module
from hestctl.hardening.harden import harden
from hestctl.hardening.network import Blocks
from hestctl.hardening.plan import Plan
from hestctl.model.methods import build_tuner
from hestctl.model.sensitivity import uniform
from hestctl.records import FULL, INT8, OFF, BlockStates
from hestctl.settings import GenerationSettings, MethodSettings

GENERATION = GenerationSettings(new_tokens=6, num_beams=2, batch_size=4)
COSTS = table().costs_j


def model_of(backbone, **changes):
    return SimulatedModel(backbone.num_layers, sizes=(2, 4), beams=2, **changes)


def tuner_of(backbone, rows, name="hest", seed=0):
    tuner = build_tuner(
        MethodSettings(name=name, scope="network"),
        backbone.model,
        layers=backbone.num_layers,
        hidden=backbone.hidden_size,
        states=(0, 1, 2),
        seed=seed,
    )
    with torch.no_grad():
        tuner.spectral.scale.normal_(generator=torch.Generator().manual_seed(seed)).mul_(0.3)
    if name == "hest":
        fit_spread(backbone, tuner, rows)
    return tuner


def asked_of(model, ratio=0.7):
    return {
        "scope": "network",
        "emax_j": None,
        "emax_ratio": ratio,
        "reference": None,
        "costs_j": COSTS,
        "predicted_j": 0.5 * model.layers * 16 * COSTS[2],
        "prompt_tokens": 30.0,
        "max_new_tokens": GENERATION.new_tokens,
        "num_beams": 2,
        "batch_size": 4,
        "model": model,
    }


def budget_of(model, ratio=0.7, **changes):
    return resolve_budget(**{**asked_of(model, ratio), **changes})


def hardened(
    backbone, rows, *, model=None, ratio=0.7, spend="all", name="hest", blocks=None, budget=None, tuner=None
):
    model = model or model_of(backbone)
    tuner = tuner or tuner_of(backbone, rows, name)
    if blocks is None and name == "hest":
        logits = torch.tensor([0.0, 2.0, 3.0]).repeat(backbone.num_layers, 2, 1)
        logits += torch.rand(logits.shape, generator=torch.Generator().manual_seed(1))
        blocks = Blocks(BlockStates.uniform(backbone.num_layers), logits, uniform(backbone), spend)
    if budget is None and name == "hest":
        budget = budget_of(model, ratio)
    plan = harden(
        backbone,
        tuner.spectral,
        rows,
        run_id="r",
        method=name,
        scope="network",
        table=replace(table(), model=model),
        budget=budget,
        margin=0.01,
        generation=GENERATION,
        blocks=blocks,
    )
    return tuner, plan


def spent_j(model, plan, blocks, counts_QLS, prompt, new, gate="ordinal"):
    """By the blocks that ran and the log of states, sample by sample."""
    requests = len(counts_QLS)
    size = model.padded(requests, 2)
    base = total(model.generation(size, 2, gate, blocks), prompt, new)
    directions_Q = (counts_QLS.double() * torch.tensor(plan.costs_j, dtype=torch.float64)).sum((1, 2))
    return [base / requests + float(j) for j in directions_Q]


@pytest.mark.parametrize("ratio", [0.55, 0.7, 0.95])
def test_generation_stays_within_a_matched_envelope(ratio, backbone, samples):
    rows, model = samples(6, prompt=28), model_of(backbone)
    tuner, plan = hardened(backbone, rows, model=model, ratio=ratio)
    assert not plan.blocks.all_full
    with torch.no_grad():
        tuner.spectral.gate.threshold.fill_(-50.0)  # the gates now ask for everything
    generator = Generator(backbone, tuner.spectral, plan, plan.blocks)
    for batch in (rows[:4], rows[4:], rows[:1]):
        for stop in (1, 3, 6):
            out = generator.generate(batch, new_tokens=stop, num_beams=2, forced_length=True)
            assert out.blocks == plan.blocks
            longest = max(len(row.prompt_ids) for row in batch)
            size = model.padded(len(batch), 2)
            tabs = model.generation(size, 2, "linear", None)
            tabs_j = (
                total(tabs, longest, stop) + size * 2 * (longest + stop - 1) * 8 * model.layers * COSTS[2]
            )
            emax_j = ratio * tabs_j / len(batch)
            for j in spent_j(model, plan, out.blocks, out.counts_QLS, longest, stop):
                assert j <= emax_j
            told = [plan.scope_joules(counts, len(batch), 2, longest, stop) for counts in out.counts_QLS]
            assert [j for j, _ in told] == pytest.approx(
                spent_j(model, plan, plan.blocks, out.counts_QLS, longest, stop)
            )
            assert [e for _, e in told] == pytest.approx([emax_j] * len(batch))


def test_energies_are_those_of_whole_generations(backbone, samples):
    rows, model = samples(5, prompt=28), model_of(backbone)
    _, plan = hardened(backbone, rows, model=model, ratio=0.7)
    lengths = [len(row.prompt_ids) for row in rows]
    emax = [total(plan.bills[-1].emax.batch, p, 6) / 4 for p in lengths]
    assert plan.energies.emax_j == pytest.approx(sum(emax) / len(rows))
    full = [total(model.generation(4, 2, "ordinal", None), p, 6) / 4 for p in lengths]
    assert plan.energies.decided_j == pytest.approx(sum(full) / len(rows), rel=0.01)
    assert plan.energies.decided_j > plan.energies.expected_j > plan.energies.hardened_j
    assert plan.energies.worst_ratio <= 0.99
    assert plan.margin == 0.01
    assert [bill.batch_size for bill in plan.bills] == [2, 4]
    assert plan.moved < 0


def test_the_prompts_run_in_the_blocks_that_were_decided(backbone, samples, monkeypatch):
    rows, seen = samples(3), []
    real = harden_module.in_states

    def spy(layers, states, codes, **more):
        seen.append(states)
        return real(layers, states, codes, **more)

    monkeypatch.setattr(harden_module, "in_states", spy)
    _, plan = hardened(backbone, rows, ratio=0.5)
    assert seen[0] == BlockStates.uniform(backbone.num_layers)
    assert seen[-1] == plan.blocks != seen[0]


def test_directions_that_fit_stay_as_training_made_them(backbone, samples):
    rows = samples(4)
    _, plan = hardened(backbone, rows, ratio=0.9)
    assert plan.shift == 0


def test_directions_are_cut_where_the_blocks_leave_them_too_little(backbone, samples):
    """Directions as dear as half the network: the thresholds rise, and the ledger holds."""
    rows, model = samples(4), model_of(backbone)
    dear = table(int8=0.4e-3, full=1e-3)
    budget = budget_of(model, 0.75, costs_j=dear.costs_j, predicted_j=0.1 * model.layers * 16 * 1e-3)
    tuner = tuner_of(backbone, rows)
    fixed = Blocks(BlockStates.uniform(backbone.num_layers, INT8))
    plan = harden(
        backbone,
        tuner.spectral,
        rows,
        run_id="r",
        method="hest",
        scope="network",
        table=replace(dear, model=model),
        budget=budget,
        margin=0.01,
        generation=GENERATION,
        blocks=fixed,
    )
    assert plan.shift > 0
    assert plan.energies.worst_ratio <= 0.99
    assert plan.energies.hardened_j < plan.energies.decided_j


def test_blocks_that_settings_fix_are_checked_and_kept(backbone, samples):
    rows, layers = samples(3), backbone.num_layers
    fixed = BlockStates.uniform(layers, INT8)
    _, plan = hardened(backbone, rows, ratio=0.8, blocks=Blocks(fixed))
    assert plan.blocks == fixed
    assert {c.why for pair in plan.choices for c in pair} == {"fixed"}
    assert all(c.saved_j > 0 for pair in plan.choices for c in pair)
    with pytest.raises(HestError, match="as the settings fix them") as caught:
        hardened(backbone, rows, ratio=0.4, blocks=Blocks(fixed))
    assert caught.value.exit_code == Exit.OVER_BUDGET


def test_tabs_has_bills_and_no_budget(backbone, samples):
    rows, model = samples(3), model_of(backbone)
    tuner, plan = hardened(backbone, rows, model=model, name="tabs")
    assert plan.emax_j is None
    assert plan.blocks.all_full
    out = Generator(backbone, tuner.spectral, plan).generate(
        rows, new_tokens=4, num_beams=2, forced_length=True
    )
    longest = max(len(row.prompt_ids) for row in rows)
    told = [plan.scope_joules(counts, 3, 2, longest, 4) for counts in out.counts_QLS]
    assert [j for j, _ in told] == pytest.approx(
        spent_j(model, plan, plan.blocks, out.counts_QLS, longest, 4, "linear")
    )
    assert {e for _, e in told} == {None}


def test_a_plan_in_scope_network_comes_back_as_it_was(backbone, samples):
    _, plan = hardened(backbone, samples(3), ratio=0.6)
    back = Plan.from_dict(json.loads(json.dumps(plan.as_dict())))
    assert back == plan
    assert back.choices == plan.choices


def test_an_absolute_budget_gives_long_prompts_fewer_new_tokens(backbone, samples):
    rows, model = samples(4, prompt=28), model_of(backbone)
    budget = budget_of(model, None, emax_j=0.9 * total(model.generation(4, 2, "linear", None), 32, 6) / 4)
    assert (budget.envelope, budget.origin) == ("absolute", "given by --emax")
    tuner, plan = hardened(backbone, rows, model=model, budget=budget)
    generator = Generator(backbone, tuner.spectral, plan)
    assert plan.max_new_tokens_for([32] * 4, 2, 6) == 6
    longer = samples(4, prompt=28 + 12)
    most = plan.max_new_tokens_for([len(row.prompt_ids) for row in longer], 2, 60)
    assert 1 <= most < 60
    out = generator.generate(longer, new_tokens=60, num_beams=2, forced_length=True)
    assert {len(ids) for ids in out.new_ids} == {most}
    with pytest.raises(HestError, match="not even one new token of sample s4"):
        generator.generate(samples(5, prompt=4000)[4:], new_tokens=4, num_beams=2)


def test_a_table_without_whole_generations_says_what_to_calibrate(backbone, samples):
    with pytest.raises(HestError, match="joules of whole generations") as caught:
        resolve_budget(**{**asked_of(model_of(backbone)), "model": None})
    assert caught.value.exit_code == Exit.USAGE
    assert "hestctl calibrate --batch-size 4 --num-beams 2" in caught.value.hint
    with pytest.raises(HestError, match="no batch of 5"):
        budget_of(model_of(backbone), batch_size=5)


class Silent:
    def note(self, text):
        pass

    def advance(self, stage, done, total, figures):
        pass


def evaluated(engine, rows, generation=GENERATION, **asked):
    with Meter(Unavailable("no counter here")) as meter:
        return evaluate(
            engine, rows, generation, meter, split="test", progress=Silent(), check=lambda: None, **asked
        ).samples


@pytest.mark.parametrize("kind", [Generator, NativeGenerator])
def test_an_evaluation_counts_whole_generations_and_none_exceeds(kind, backbone, samples):
    rows, model = samples(6, prompt=28), model_of(backbone)
    tuner, plan = hardened(backbone, rows, model=model, ratio=0.6)
    with torch.no_grad():
        tuner.spectral.gate.threshold.fill_(-50.0)
    found = evaluated(kind(backbone, tuner.spectral, plan, blocks=plan.blocks), rows, score=False)
    assert [s.batch_size for s in found] == [4] * 4 + [2] * 2
    for sample in found:
        batch = [s for s in found if s.batch_index == sample.batch_index]
        longest, new = max(s.prompt_tokens for s in batch), 6
        base = total(model.generation(len(batch), 2, "ordinal", plan.blocks), longest, new)
        states = (sample.directions_off, sample.directions_int8, sample.directions_full)
        directions_j = sum(count * price for count, price in zip(states, plan.costs_j, strict=True))
        assert sample.scope_energy_j == pytest.approx(base / len(batch) + directions_j)
        bill = plan.bill(len(batch), 2)
        assert sample.emax_j == pytest.approx(total(bill.emax.batch, longest, new) / len(batch))
        assert sample.scope_energy_j <= 0.99 * sample.emax_j


def test_a_matched_plan_keeps_the_margin_that_was_asked_for(backbone, samples):
    _, plan = hardened(backbone, samples(3), model=model_of(backbone, error=0.06), ratio=0.8)
    assert plan.margin == 0.01, "a ratio of two figures of one model has its error in both"
    assert plan.energies.worst_ratio <= 0.99


def test_an_absolute_plans_margin_covers_the_models_error(backbone, samples):
    model = model_of(backbone, error=0.06)
    budget = budget_of(model, None, emax_j=0.9 * total(model.generation(4, 2, "linear", None), 32, 6) / 4)
    _, plan = hardened(backbone, samples(3), model=model, budget=budget)
    assert plan.margin == 0.06
    assert plan.energies.worst_ratio <= 0.94


@pytest.mark.parametrize("kind", [Generator, NativeGenerator])
def test_beams_that_run_on_after_the_longest_answer_are_counted(kind, backbone, samples, monkeypatch):
    """The best answer may be short while the search goes on: the log says how long it did."""
    rows, model = samples(2, prompt=20), model_of(backbone)
    tuner, plan = hardened(backbone, rows, model=model, ratio=0.9)
    engine = kind(backbone, tuner.spectral, plan, blocks=plan.blocks)
    out = engine.generate(rows, new_tokens=6, num_beams=2, forced_length=True)
    shorter = replace(out, new_ids=[ids[:1] for ids in out.new_ids])
    monkeypatch.setattr(kind, "generate", lambda *a, **k: shorter)
    for sample in evaluated(engine, rows, score=False):
        assert sample.new_tokens == 1
        emax = plan.bill(2, 2).emax.batch
        assert sample.emax_j == pytest.approx(total(emax, max(len(row.prompt_ids) for row in rows), 6) / 2)


def test_what_a_plan_refuses_is_refused_before_anything_is_generated(backbone, samples, monkeypatch):
    rows, model = samples(4, prompt=28), model_of(backbone)
    budget = budget_of(model, None, emax_j=0.9 * total(model.generation(4, 2, "linear", None), 32, 6) / 4)
    tuner, plan = hardened(backbone, rows, model=model, budget=budget)
    engine = Generator(backbone, tuner.spectral, plan, blocks=plan.blocks)
    monkeypatch.setattr(Generator, "generate", lambda *a, **k: pytest.fail("generated"))
    monkeypatch.setattr(Generator, "label_scores", lambda *a, **k: pytest.fail("scored"))
    for labels in ((), ("yes", "no")):
        with pytest.raises(HestError, match="not even one new token") as caught:
            evaluated(engine, [*rows, *samples(1, prompt=4000, seed=3)], labels=labels)
        assert caught.value.exit_code == Exit.OVER_BUDGET
    assert "shorten prompts" in caught.value.hint
    scarce = replace(plan, bills=tuple(replace(b, emax=Emax(Terms.zero(), Terms.zero())) for b in plan.bills))
    with pytest.raises(HestError) as caught:
        scarce.max_new_tokens_for([plan.bound[0] - 1] * 4, 2, 6)
    assert f"hestctl harden --set budget.shortest={plan.bound[0] - 1}" in caught.value.hint
    other = Generator(backbone, tuner.spectral, plan)
    with pytest.raises(HestError, match="other states than the plan"):
        evaluated(other, rows)


@pytest.mark.parametrize("kind", [Generator, NativeGenerator])
def test_labels_are_scored_within_the_envelope(kind, backbone, samples):
    rows, model = samples(4, prompt=28), model_of(backbone)
    tuner, plan = hardened(backbone, rows, model=model, ratio=0.7)
    engine = kind(backbone, tuner.spectral, plan, blocks=plan.blocks)
    longest = max(len(row.prompt_ids) for row in rows)
    for sample in evaluated(engine, rows, labels=("yes", "no"), score=False):
        base = total(model.generation(4, 2, "ordinal", plan.blocks), longest, 1)
        assert base / 4 < sample.scope_energy_j <= 0.99 * sample.emax_j


def test_directions_that_no_token_moves_are_fixed_for_good(backbone, samples):
    rows = samples(6, prompt=40)
    tuner = tuner_of(backbone, rows)
    gate = tuner.spectral.gate
    with torch.no_grad():
        gate.threshold[0, ::2], gate.threshold[0, 1::2] = -30.0, 30.0
        gate.threshold[1, :3], gate.threshold[1, 3] = -30.0, 30.0
    _, plan = hardened(backbone, rows, ratio=0.9, tuner=tuner)
    assert plan.shift == 0
    assert plan.fixed == ((FULL, OFF) * 8, *[None] * (backbone.num_layers - 1))
    assert set(gate.threshold[0].tolist()) == {-1e4, 1e4}
    assert gate.threshold[1, :4].tolist() == [-1e4, -1e4, -1e4, 1e4]
    assert gate.threshold[1, 4:].abs().max() < 1e3
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan


def test_folding_gives_way_to_the_budget(backbone, samples, monkeypatch):
    rows = samples(6, prompt=40)
    tuner = tuner_of(backbone, rows)
    with torch.no_grad():
        tuner.spectral.gate.threshold[0] = -30.0
    monkeypatch.setattr(harden_module, "_hardened_j", lambda looks, plan, lengths: [1e9] * len(looks))
    _, plan = hardened(backbone, rows, ratio=0.9, tuner=tuner)
    assert plan.fixed is None
    assert set(tuner.spectral.gate.threshold[0].tolist()) == {-30.0}
