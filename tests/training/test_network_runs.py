"""Trainings in scope network: resumed, settled, under fixed blocks, and what their steps cost."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from network_parts import (
    HALF,
    NEW_TOKENS,
    NOTHING,
    PRICES,
    TIGHT,
    blocks_for,
    by_hand,
    curve,
    decided_by,
    known_of,
    sample_j,
    to_half,
    trainer_for,
    tuner_for,
)

from hestctl.data.prompts import train_batch
from hestctl.model.backbone import tiny_backbone
from hestctl.model.gates import GateNoise
from hestctl.model.likelihood import answer_loss
from hestctl.records import FULL, INT8, OFF, BlockStates
from hestctl.settings import BackboneSettings
from hestctl.training.checkpoint import latest_checkpoint, save_checkpoint
from hestctl.training.network import BlockDraw


@pytest.mark.parametrize("stop", [2, 4, 5, 7])
def test_a_resumed_run_has_the_losses_of_one_left_alone(stop, samples, tmp_path):
    """Blocks settle before the fifth step, and the budget is tight after the fourth."""
    rows = samples(10)
    learning = {"settle_step": 4, "tighten_steps": 3, "prices": TIGHT, "choose": to_half}
    whole = trainer_for(rows, learning=learning)
    whole.start()
    expected = curve(whole)
    assert whole.blocks.fixed is not None

    first = trainer_for(rows, learning=learning)
    first.start()
    begun = curve(first, steps=stop)
    save_checkpoint(tmp_path, first.step, *first.state())
    second = trainer_for(rows, learning=learning)
    torch.manual_seed(1234)  # the global random state must not matter
    found, _ = latest_checkpoint(tmp_path)
    second.restore(found.step, found.tensors, found.state)
    assert second.blocks.learning == (stop < 5)
    assert begun + curve(second) == expected
    assert second.blocks.state() == whole.blocks.state()
    assert second.blocks.settlement == whole.blocks.settlement is not None
    assert len(expected) == 9


def test_what_is_settled_stays_what_the_gate_says(samples):
    asked = []

    def choose(decided, known):
        asked.append((decided, known))
        return HALF

    trainer = trainer_for(samples(10), learning={"settle_step": 3, "choose": choose}, gate_learning_rate=0.1)
    trainer.start()
    gate = trainer.tuner.spectral.gate
    scores = []
    for metric in trainer.steps():
        assert trainer.blocks.learning == (metric.step <= 3)
        if metric.step == 3:
            told = trainer.blocks.decided(), trainer.blocks.learned()
        if metric.step > 3:
            scores.append(gate.controller.layer_scores().detach().clone())
            assert decided_by(gate.block_logits()) == trainer.blocks.decided() == trainer.blocks.fixed
    assert asked == [told], "once, by what training has found out"
    assert told[1] != known_of(2)
    assert (scores[0] - scores[-1]).abs().max() > 1e-3, "scores that have not moved prove nothing"


def test_blocks_settle_where_no_swap_of_two_of_one_price_lowers_the_loss(samples):
    rows = samples(10)
    trainer = trainer_for(rows, learning={"settle_step": 2, "choose": to_half})
    trainer.start()
    trainer.tuner.spectral.scale.data.normal_(generator=torch.Generator().manual_seed(0))
    curve(trainer, steps=2)
    losses = {}
    for attention, mlp in product(((OFF, INT8), (INT8, OFF)), repeat=2):
        states = BlockStates(attention, mlp)
        nll = [by_hand(trainer, [row], states, None) * len(row.answer_ids) for row in rows[:6]]
        losses[states] = sum(nll) / sum(len(row.answer_ids) for row in rows[:6])
    decided = trainer.blocks.decided()
    curve(trainer, steps=1)
    found, told = trainer.blocks.fixed, trainer.blocks.settlement
    near = [
        replace(found, attention=found.attention[::-1]),
        replace(found, mlp=found.mlp[::-1]),
    ]
    assert all(losses[found] <= losses[other] for other in near)
    assert losses[found] < losses[HALF], "what it begins with is to be no optimum"
    assert (told.loss_before, told.loss) == pytest.approx((losses[HALF], losses[found]), rel=1e-5)
    assert (told.step, told.swaps > 0) == (2, True)
    emax = sum(PRICES.emax.total_j(len(row.prompt_ids), NEW_TOKENS) for row in rows[:6])
    for states, share in ((decided, told.decided_over_emax), (found, told.settled_over_emax)):
        joules = sum(sample_j(states, len(row.prompt_ids), NEW_TOKENS) for row in rows[:6])
        assert share == pytest.approx(joules / emax, rel=1e-6)


def test_learning_brings_the_joules_of_the_blocks_to_their_budget(samples):
    trainer = trainer_for(
        samples(8), learning={"prices": TIGHT, "tighten_steps": 10}, epochs=20, block_learning_rate=0.1
    )
    trainer.start()
    assert trainer.blocks.decided().all_full
    ratios = [row[4] for row in curve(trainer)]
    assert ratios[0] > 1.3
    assert sum(ratios[-8:]) / 8 < 1.1
    assert not trainer.blocks.decided().all_full


CONTROLS = [
    BackboneSettings(name="tiny", precision="int8"),
    BackboneSettings(name="tiny", skip_last=1),
    BackboneSettings(name="tiny", precision="int8", skip_last=1),
]


@pytest.mark.parametrize("control", CONTROLS, ids=["int8", "skip", "both"])
@pytest.mark.parametrize("name", ["lora", "hest"])
def test_blocks_that_settings_fix_are_what_is_trained(name, control, samples):
    rows, layers = samples(4), tiny_backbone().num_layers
    states = control.blocks(layers)
    trainer = trainer_for(
        rows,
        name=name,
        budgeted=name == "hest",
        blocks={"fixed": states},
        accumulation=1,
        batch_size=4,
        learning_rate=0.05,
        epochs=4,
    )
    trainer.start()
    steps, seen = trainer.steps(), []
    for step in range(4):
        order, noise = trainer._effective_batch(step), GateNoise(42, step, 0)
        expected = by_hand(trainer, order, states, noise)
        plain = by_hand(trainer, order, BlockStates.uniform(layers), noise)
        seen.append(next(steps).task_loss)
        assert seen[-1] == pytest.approx(expected, rel=1e-5)
        assert abs(seen[-1] - plain) > 1e-4
    assert seen[-1] < seen[0]
    assert trainer.blocks.decided() == states


def test_layers_that_are_left_out_are_as_if_they_were_not_there(samples):
    rows = samples(4)
    backbone = tiny_backbone(num_hidden_layers=1)
    shorter = answer_loss(backbone, train_batch(rows, backbone.pad_id)) / sum(
        len(row.answer_ids) for row in rows
    )
    left = BackboneSettings(name="tiny", skip_last=1).blocks(2)
    trainer = trainer_for(
        rows, name="lora", budgeted=False, blocks={"fixed": left}, accumulation=1, batch_size=4, epochs=1
    )
    own = dict(backbone.model.named_parameters())
    for name, parameter in trainer.backbone.model.named_parameters():
        if name.replace(".base_layer", "") in own:
            parameter.data.copy_(own[name.replace(".base_layer", "")])
    # LoRA begins with what changes nothing.
    assert next(iter(trainer.steps())).task_loss == pytest.approx(float(shorter), rel=1e-5)


@pytest.mark.parametrize("fixed", [None, BlockStates((INT8, OFF), (FULL, INT8))], ids=["learned", "fixed"])
def test_the_joules_of_a_step_are_those_of_its_samples_generations(fixed, samples):
    rows = samples(4)
    more = {"accumulation": 1, "batch_size": 4, "epochs": 1}
    if fixed is None:
        both = [trainer_for(rows, learning={"prices": prices}, **more) for prices in (PRICES, NOTHING)]
    else:
        both = [
            trainer_for(rows, blocks={"prices": prices, "fixed": fixed}, **more)
            for prices in (PRICES, NOTHING)
        ]
    found = []
    for trainer in both:
        trainer.start()
        if fixed is None:
            # One block is most probably off, whatever is drawn.
            score_L = trainer.tuner.spectral.gate.controller.layer_scores().detach()
            full_L2 = torch.tensor([[0.5, 0.5], [-2.0, -0.1]])
            trainer.tuner.spectral.gate.blocks.start(score_L, full_L2, full_L2 + 1)
            decided = BlockStates((FULL, OFF), (FULL, INT8))
            assert trainer.blocks.decided() == decided
        found.append(next(iter(trainer.steps())))
    expected = sum(sample_j(fixed or decided, len(row.prompt_ids), NEW_TOKENS) for row in rows) / len(rows)
    # Without prices there are the directions alone.
    assert found[0].energy_j - found[1].energy_j == pytest.approx(expected, rel=1e-6)
    emax = sum(1.0 + 8e-3 * len(row.prompt_ids) + 0.2 * (NEW_TOKENS - 1) for row in rows) / len(rows)
    assert found[0].energy_ratio == pytest.approx(found[0].energy_j / emax, rel=1e-6)


def test_expected_joules_are_the_mean_over_all_that_may_be_drawn():
    backbone = tiny_backbone()
    tuner = tuner_for(backbone)
    blocks = blocks_for(backbone, tuner)
    logits = torch.randn(backbone.num_layers, 2, 3, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_(True)
    probability = logits.softmax(-1)
    draw = BlockDraw(decided_by(logits), probability)
    expected, decided_j = blocks.energy_j(draw, [20, 50], NEW_TOKENS)
    assert decided_j == pytest.approx(sum(sample_j(draw.states, p, NEW_TOKENS) for p in (20, 50)))
    mean = 0.0
    for flat in product((OFF, INT8, FULL), repeat=2 * backbone.num_layers):
        share = float(
            torch.stack([p[s] for p, s in zip(probability.detach().view(-1, 3), flat, strict=True)]).prod()
        )
        mean += share * sum(
            sample_j(BlockStates(flat[0::2], flat[1::2]), prompt, NEW_TOKENS) for prompt in (20, 50)
        )
    assert float(expected.detach()) == pytest.approx(mean, rel=1e-5)
    (slope,) = torch.autograd.grad(expected, probability)
    assert slope[0, 1, FULL] == pytest.approx(
        sum(PRICES.blocks[1][FULL].total_j(prompt, NEW_TOKENS) for prompt in (20, 50))
    )
