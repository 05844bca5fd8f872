"""Blocks in training: gradients that are sound, measurements, and a budget that tightens.

Shape legend: L layers, 2 blocks (attention, MLP), S = 3 states.
"""

from __future__ import annotations

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
    curve,
    known_of,
    trainer_for,
    tuner_for,
)

from hestctl.data.prompts import train_batch
from hestctl.model.backbone import tiny_backbone
from hestctl.model.blocks import MODULES, Int8Codes, in_states
from hestctl.model.gates import GateNoise
from hestctl.model.likelihood import answer_loss
from hestctl.model.sensitivity import uniform
from hestctl.records import FULL, INT8, OFF, BlockStates
from hestctl.training.network import BlockDraw, Settlement


def cosine(a, b):
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), 0))


def slope_gradient(backbone, batch, tokens, draw, logits_L2S):
    """The estimate that costs no pass: the loss's slope along every block's output."""
    on_L2 = torch.ones(backbone.num_layers, 2)
    for layer, block in product(range(backbone.num_layers), range(2)):
        on_L2[layer, block] = float(draw.states.state(layer, block) != OFF)
    on_L2.requires_grad_(True)
    hooks = []
    for (index, layer), (block, name) in product(enumerate(backbone.layers), enumerate(MODULES)):

        def scale(_module, _args, output, at=(index, block)):
            return (output[0] * on_L2[at], *output[1:]) if isinstance(output, tuple) else output * on_L2[at]

        hooks.append(getattr(layer, name).register_forward_hook(scale))
    (slope_L2,) = torch.autograd.grad(answer_loss(backbone, batch) / tokens, on_L2)
    for hook in hooks:
        hook.remove()
    probability = logits_L2S.softmax(-1)
    (found,) = torch.autograd.grad((probability[..., INT8:].sum(-1) * slope_L2).sum(), logits_L2S)
    return found


def test_the_gradient_by_the_blocks_is_that_of_the_expected_loss(samples):
    """Against all 81 combinations. The slope along a block's output, which needs no measuring, misses it."""
    backbone = tiny_backbone(num_hidden_layers=2)
    for parameter in backbone.model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 2  # blocks that matter to each other
    rows = samples(3)
    batch = train_batch(rows, backbone.pad_id)
    tokens = sum(len(row.answer_ids) for row in rows)
    tuner, codes = tuner_for(backbone), Int8Codes()
    gate = tuner.spectral.gate
    margins = torch.full((2, 2), 0.2)
    gate.blocks.start(gate.controller.layer_scores().detach(), margins, margins + 0.3)
    loss = {}
    for flat in product((OFF, INT8, FULL), repeat=4):
        states = BlockStates(flat[0::2], flat[1::2])
        with torch.no_grad(), in_states(backbone.layers, states, codes):
            loss[states] = float(answer_loss(backbone, batch)) / tokens

    logits_L2S = gate.block_logits().detach().requires_grad_(True)
    probability_BS = logits_L2S.softmax(-1).view(4, 3)
    expected = sum(
        torch.stack([probability_BS[i, s] for i, s in enumerate(flat)]).prod()
        * loss[BlockStates(flat[0::2], flat[1::2])]
        for flat in product((OFF, INT8, FULL), repeat=4)
    )
    (true,) = torch.autograd.grad(expected, logits_L2S)

    # Nothing is known at first, so that all there is to find has to be measured.
    blocks = blocks_for(backbone, tuner, known=uniform(backbone), prices=NOTHING)
    learned, found, slopes = 100, [], []
    for step in range(learned + 400):
        draw = blocks.draw(GateNoise(0, step, 0))
        layer, block = draw.probe
        more, less = (
            (draw.turned(), draw.states)
            if draw.states.state(layer, block) == OFF
            else (draw.states, draw.turned())
        )
        blocks.observe(draw.probe, loss[less] - loss[more])
        (by_threshold,) = torch.autograd.grad(blocks.worth(draw), draw.probability_L2S)
        if step >= learned:
            (by_logit,) = torch.autograd.grad(logits_L2S.softmax(-1), logits_L2S, by_threshold)
            found.append(by_logit)
            if step % 5 == 0:
                slopes.append(slope_gradient(backbone, batch, tokens, draw, logits_L2S))
    estimate = torch.stack(found).mean(0)
    assert cosine(estimate, true) >= 0.95
    assert float(estimate.norm() / true.norm()) == pytest.approx(1.0, abs=0.2)
    assert cosine(torch.stack(slopes).mean(0), true) < 0.7


def test_what_is_measured_is_the_loss_with_the_block_off_less_that_with_it_on(samples):
    """Within a step, under its own noise, whichever of the two was drawn."""
    rows = samples(2)
    trainer = trainer_for(rows, learning={"prices": NOTHING}, accumulation=1, epochs=1)
    trainer.start()
    trainer.tuner.spectral.scale.data.normal_(generator=torch.Generator().manual_seed(0))
    blocks, backbone = trainer.blocks, trainer.backbone
    batch = train_batch(rows, backbone.pad_id)
    seen = set()
    for step in range(12):
        noise = GateNoise(42, step, 0)
        draw = blocks.draw(noise)
        trainer.step = step
        totals = trainer._try_accumulate(rows)
        ((_, probe, worth),) = totals.measured
        assert probe == draw.probe
        drawn_off = draw.states.state(*probe) == OFF
        off, on = (draw.states, draw.turned()) if drawn_off else (draw.turned(), draw.states)
        assert (off.state(*probe), on.state(*probe) != OFF) == (OFF, True)
        nll = []
        for states in (off, on):
            with (
                torch.no_grad(),
                in_states(backbone.layers, states, Int8Codes()),
                trainer._adapters_run(trainer._gates(batch, noise)),
            ):
                nll.append(float(answer_loss(backbone, batch)) / sum(len(row.answer_ids) for row in rows))
        assert worth == pytest.approx(nll[0] - nll[1], abs=1e-5)
        seen.add(drawn_off)
        # A block that is likely to be off is drawn so.
        trainer.tuner.spectral.gate.blocks.threshold.data += 0.5
    assert seen == {True, False}


def test_a_step_follows_what_its_blocks_are_worth(samples):
    """Micro-batches by their samples; joules apart."""
    rows = samples(3)
    trainer = trainer_for(rows, learning={"prices": NOTHING}, epochs=1)
    trainer.start()
    threshold = trainer.tuner.spectral.gate.blocks.threshold
    draws = [trainer.blocks.draw(GateNoise(42, 0, micro)) for micro in range(2)]
    expected = sum(share * trainer.blocks.worth(d) for share, d in zip((2 / 3, 1 / 3), draws, strict=True))
    (slope,) = torch.autograd.grad(expected, threshold)
    trainer._try_accumulate(rows)
    assert slope.abs().min() > 0
    assert torch.allclose(threshold.grad, slope, rtol=1e-5, atol=0)


def test_probes_depend_on_seed_step_and_micro_batch_alone_and_prefer_what_hangs_in_the_balance():
    backbone = tiny_backbone()
    tuner = tuner_for(backbone)
    gate, layers = tuner.spectral.gate, backbone.num_layers
    on_L2 = torch.full((layers, 2), 3.0)
    on_L2[1, 0] = 0.0
    gate.blocks.start(gate.controller.layer_scores().detach(), on_L2 - 1, on_L2)
    blocks = blocks_for(backbone, tuner)

    def probes(seed=0, micro=0):
        return [blocks.draw(GateNoise(seed, step, micro)).probe for step in range(300)]

    first = probes()
    torch.manual_seed(5)
    assert probes() == first
    assert probes(seed=1) != first
    assert probes(micro=1) != first
    assert first.count((1, 0)) > 0.8 * len(first)
    assert set(first) == {(layer, block) for layer in range(layers) for block in range(2)}
    assert blocks.draw(None).probe is None, "a decision measures nothing"


def test_a_block_is_turned_on_in_the_likelier_state_of_the_two():
    probability = torch.tensor([[[0.8, 0.05, 0.15], [0.8, 0.15, 0.05]]])
    draw = BlockDraw(BlockStates((OFF,), (OFF,)), probability)
    assert draw._replace(probe=(0, 0)).turned() == BlockStates((FULL,), (OFF,))
    assert draw._replace(probe=(0, 1)).turned() == BlockStates((OFF,), (INT8,))


def test_measurements_replace_what_was_known_little_by_little():
    backbone = tiny_backbone()
    blocks = blocks_for(backbone, tuner_for(backbone))
    blocks.start([30], NEW_TOKENS)
    before = torch.tensor(known_of(backbone.num_layers).off)
    assert torch.allclose(torch.tensor(blocks.learned().off), before)
    found = []
    for _ in range(20):
        blocks.observe((1, 1), 5.0)
        found.append(blocks.learned().off[1][1])
    assert before[1, 1] < found[0] < found[1] < found[-1]
    assert found[0] < 2.5, "one micro-batch is few samples"
    assert found[-1] == pytest.approx(5.0, rel=0.02)
    before[1, 1] = found[-1]
    assert torch.allclose(torch.tensor(blocks.learned().off), before)


def test_the_budget_tightens_from_what_is_spent_at_first_to_e_max():
    backbone = tiny_backbone()
    tuner = tuner_for(backbone)
    blocks = blocks_for(backbone, tuner, tighten_steps=4, settle_step=3)
    assert [blocks.looseness(step, 1.8) for step in (0, 1, 2)] == pytest.approx([1.8, 1.6, 1.4])
    # The first ratio is where it began, whatever is spent meanwhile.
    assert [blocks.looseness(step, 0.3) for step in (3, 4, 9)] == pytest.approx([1.2, 1.0, 1.0])
    within = blocks_for(backbone, tuner, tighten_steps=4)
    assert [within.looseness(step, 0.7) for step in range(6)] == [1.0] * 6
    assert [blocks.due(step) for step in (2, 3, 4)] == [False, True, True]
    blocks.settle(HALF, Settlement(3, 1.0, 1.0, 0, 1.0, 1.0))
    assert not blocks.learning
    assert not blocks.due(4)
    assert blocks.looseness(0, 1.8) == 1.0
    at_once = blocks_for(backbone, tuner, tighten_steps=0)
    assert at_once.looseness(1, 1.8) == 1.0


def test_the_multiplier_is_moved_by_what_exceeds_the_budget_as_it_is_by_then(samples):
    trainer = trainer_for(samples(8), learning={"prices": TIGHT, "tighten_steps": 4}, epochs=4)
    trainer.start()
    rows = curve(trainer)
    ratios, weights = [row[4] for row in rows], [row[5] for row in rows]
    looseness, value, expected = [], 0.1, [0.1]
    for step, ratio in enumerate(ratios):
        # One step of warm-up moves nothing.
        if step >= 1:
            loose = ratios[1] + (1 - ratios[1]) * min(1.0, step / 4)
            value = max(0.0, value + 0.05 * (ratio / loose - 1))
            looseness.append(loose)
        expected.append(value + (ratio / looseness[-1] - 1 if looseness else 0.0))
    assert ratios[1] > 1.2
    assert weights == pytest.approx(expected[:-1], rel=1e-6)


def test_training_starts_with_every_block_at_full_and_the_least_worth_their_joules_nearest_to_less():
    backbone = tiny_backbone()
    tuner = tuner_for(backbone)
    blocks = blocks_for(backbone, tuner)
    blocks.start([30, 40], NEW_TOKENS)
    logits = tuner.spectral.gate.block_logits()
    assert blocks.decided() == BlockStates.uniform(backbone.num_layers)
    on_L2 = (logits[..., INT8] - logits[..., OFF]).detach()
    worth_L2 = torch.tensor(known_of(backbone.num_layers).off)
    saved_2 = torch.tensor(
        [sum(block[INT8].total_j(p, NEW_TOKENS) for p in (30, 40)) for block in PRICES.blocks]
    )
    order = (worth_L2 / saved_2).flatten().argsort()
    full_L2 = (logits[..., FULL] - logits[..., INT8]).detach()
    # int8 harms the MLPs alone: the attentions are nearest to int8, and lose least by it.
    assert full_L2[:, 0].max() < full_L2[:, 1].min()
    assert (on_L2 - full_L2).flatten()[order].diff().min() > 0
