"""Scope network in training: gradients that are sound, states that are priced, settled and resumed.

Shape legend: L layers, 2 blocks (attention, MLP), S = 3 states.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from hestctl.budget import Budget, Multiplier
from hestctl.data.prompts import train_batch
from hestctl.energy.model import Terms
from hestctl.model.backbone import tiny_backbone
from hestctl.model.blocks import MODULES, Int8Codes, in_states
from hestctl.model.gates import GateNoise
from hestctl.model.likelihood import answer_loss
from hestctl.model.methods import build_tuner
from hestctl.model.sensitivity import Sensitivities, uniform
from hestctl.records import FULL, INT8, OFF, BlockStates
from hestctl.settings import BackboneSettings, MethodSettings, TrainSettings
from hestctl.training.checkpoint import latest_checkpoint, save_checkpoint
from hestctl.training.loop import Trainer
from hestctl.training.network import BlockDraw, BlockPrices, BlockTraining, Settlement

NOTHING = BlockPrices(Terms(), ((Terms(),) * 3, (Terms(),) * 3), None)
PRICES = BlockPrices(
    Terms(0.5, 2e-3, 0.0, 0.05, 0.0),
    (
        (Terms(), Terms(0.05, 6e-4, 5e-8, 0.01, 5e-6), Terms(0.1, 1e-3, 1e-7, 0.02, 1e-5)),
        (Terms(), Terms(0.1, 1e-3, 0.0, 0.03, 0.0), Terms(0.2, 3e-3, 0.0, 0.04, 0.0)),
    ),
    emax=Terms(1.0, 8e-3, 0.0, 0.2, 0.0),
)
"""Joules of a sample."""
TIGHT = replace(PRICES, emax=PRICES.emax.times(0.7))
"""An E_max that the tiny backbone's blocks exceed."""
COSTS = (0.0, 0.5e-6, 1e-6)
NEW_TOKENS = 8


def states_of(state_L2):
    attention, mlp = state_L2.T.tolist()
    return BlockStates(tuple(attention), tuple(mlp))


def decided_by(logits_L2S):
    return states_of(logits_L2S.argmax(-1))


def as_decided(decided, _known):
    """A budget that everything fits."""
    return decided


HALF = BlockStates((OFF, INT8), (INT8, OFF))


def to_half(_decided, _known):
    """One block of a kind, so that the other may be tried in its place."""
    return HALF


def tuner_for(backbone, name="hest", *, learns_blocks=True):
    return build_tuner(
        MethodSettings(name=name),
        backbone.model,
        layers=backbone.num_layers,
        hidden=backbone.hidden_size,
        states=(0, 1, 2),
        seed=0,
        learns_blocks=learns_blocks,
    )


def known_of(layers):
    """Later layers are worth more; int8 harms the MLPs alone."""
    off = tuple((0.05 * (1 + layer), 0.03 * (1 + layer)) for layer in range(layers))
    int8, error = ((0.0, 0.01),) * layers, ((0.001, 0.001),) * layers
    return Sensitivities("exact", "-", "-", 5, off, error, int8, error)


def blocks_for(
    backbone,
    tuner,
    *,
    prices=PRICES,
    fixed=None,
    tighten_steps=2,
    settle_step=10**6,
    choose=as_decided,
    known=None,
):
    layers = backbone.num_layers
    gate = None if tuner.spectral is None else tuner.spectral.gate
    known = known or known_of(layers)
    return BlockTraining(
        layers,
        prices,
        gate,
        known,
        fixed=fixed,
        tighten_steps=tighten_steps,
        settle_step=settle_step,
        choose=choose,
        swaps=24,
        samples=6,
    )


def trainer_for(rows, *, name="hest", budgeted=True, learning=None, blocks=None, **train):
    """``learning`` or ``blocks``: what ``blocks_for`` is told of learned blocks, or of fixed ones."""
    backbone = tiny_backbone()
    tuner = tuner_for(backbone, name, learns_blocks=learning is not None)
    defaults = {"warmup_steps": 1, "batch_size": 2, "accumulation": 2, "learning_rate": 5e-3, "epochs": 3}
    return Trainer(
        backbone,
        tuner,
        rows,
        TrainSettings(**{**defaults, "block_learning_rate": 0.3, **train}),
        costs_j=COSTS,
        budget=Budget(2.0, "test", None, NEW_TOKENS, NEW_TOKENS, 1, "network") if budgeted else None,
        multiplier=Multiplier(0.1, 0.05, "pi") if budgeted else None,
        blocks=blocks_for(backbone, tuner, **(learning or blocks or {})),
    )


def curve(trainer, steps=None):
    out = []
    for m in trainer.steps():
        out.append((m.loss, m.task_loss, m.grad_norm, m.energy_j, m.energy_ratio, m.multiplier, m.share_full))
        if len(out) == steps:
            break
    return out


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
    gate.blocks.off_L2.fill_(1.0)
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


def by_hand(trainer, rows, states, noise):
    """Nats a token with the blocks in ``states``."""
    backbone = trainer.backbone
    batch = train_batch(rows, backbone.pad_id)
    with (
        torch.no_grad(),
        in_states(backbone.layers, states, Int8Codes()),
        trainer._adapters_run(trainer._gates(batch, noise)),
    ):
        return float(answer_loss(backbone, batch)) / sum(len(row.answer_ids) for row in rows)


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


def sample_j(states, prompt, new):
    """The definition of a sample's joules, directions apart, written out once more."""

    def total(terms):
        looks = sum(prompt + step for step in range(1, new))
        prefill = terms.call_j + prompt * terms.token_j + prompt**2 * terms.token2_j
        return prefill + (new - 1) * terms.step_j + looks * terms.context_j

    blocks = sum(
        total(PRICES.blocks[block][state])
        for block, column in enumerate((states.attention, states.mlp))
        for state in column
    )
    return total(PRICES.rest) + blocks


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
