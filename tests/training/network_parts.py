"""Tiny trainings in scope network, and the definition of their joules written out once more."""

from __future__ import annotations

from dataclasses import replace

import torch

from hestctl.budget import Budget, Multiplier
from hestctl.data.prompts import train_batch
from hestctl.energy.model import Terms
from hestctl.model.backbone import tiny_backbone
from hestctl.model.blocks import Int8Codes, in_states
from hestctl.model.likelihood import answer_loss
from hestctl.model.methods import build_tuner
from hestctl.model.sensitivity import Sensitivities
from hestctl.records import INT8, OFF, BlockStates
from hestctl.settings import MethodSettings, TrainSettings
from hestctl.training.loop import Trainer
from hestctl.training.network import BlockPrices, BlockTraining

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
