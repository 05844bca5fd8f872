"""What the ranks of a training have in common, and what every one but the first does in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hestctl.budget import Budget, Multiplier
from hestctl.data.articles import Splits, load_splits
from hestctl.data.prompts import Encoded
from hestctl.energy.table import EnergyTable
from hestctl.model.backbone import Backbone, load_backbone
from hestctl.model.methods import METHODS, Tuner
from hestctl.model.sensitivity import Sensitivities
from hestctl.progress import Progress
from hestctl.runs import heeding
from hestctl.settings import Settings
from hestctl.training.loop import Trainer
from hestctl.training.ranks import Ranks
from hestctl.workflows.blocks import training_blocks
from hestctl.workflows.metering import open_meter
from hestctl.workflows.setup import load_data, new_tuner


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the first rank tells the others before training; ``prompts`` are the reference's tokens."""

    table: EnergyTable
    budget: Budget | None
    sensitivities: Sensitivities | None
    prompts: list[int]
    bound: tuple[int, int]


def trainer_for(
    s: Settings, backbone: Backbone, tuner: Tuner, rows: Sequence[Encoded], given: Inputs, ranks: Ranks
) -> Trainer:
    """The same trainer on every rank."""
    multiplier = None
    if given.budget is not None:
        multiplier = Multiplier(s.budget.lambda0, s.budget.alpha, s.budget.dual)
    trainer = Trainer(
        backbone,
        tuner,
        rows,
        s.train,
        costs_j=given.table.costs_j,
        budget=given.budget,
        multiplier=multiplier,
        ranks=ranks,
    )
    trainer.blocks = training_blocks(
        s,
        backbone,
        tuner,
        given.table,
        given.budget,
        given.sensitivities,
        prompts=given.prompts,
        bound=given.bound,
        warmup_steps=trainer.warmup_steps,
        total_steps=trainer.total_steps,
    )
    return trainer


def identity(settings: Settings, splits: Splits, backbone: Backbone) -> dict[str, str]:
    """What all ranks of a training must have alike, by name."""
    return {
        "data set": splits.data_hash,
        "backbone": backbone.fingerprint,
        "set of settings": settings.model_dump_json(exclude={"db"}),
    }


def follow(settings: Settings, ranks: Ranks, progress: Progress) -> None:
    """Train along with the first rank, which decides before every step whether there is one.

    While that one calibrates, validates and saves, this one waits; it ends with training, and leaves
    hardening and generation to the first. Raises HestError.
    """
    if not METHODS[settings.method.name].trained:
        return
    with heeding(ranks.request_stop):
        ranks.share(None)  # the first rank looks, and downloads, before the others
        splits = load_splits(settings.data, seed=0)
        backbone = load_backbone(settings.backbone, progress=progress.note)
        rows = load_data(settings, splits, backbone, progress, needed=("train",)).train
        with open_meter(settings.energy, backbone.device, None, progress) as meter:
            ranks.meet(meter, identity(settings, splits, backbone))
            given: Inputs = ranks.told(None)
            begin = meter.edge()
            tuner = new_tuner(settings, backbone, given.table.states, settings.train.seed)
            trainer = trainer_for(settings, backbone, tuner, rows, given, ranks)
            trainer.restore(*ranks.told(None))
            steps = trainer.steps()
            while ranks.share(None)[0]:
                next(steps)
            window = meter.cut(begin, meter.edge(), name=f"training, rank {ranks.rank}", phase="training")
            ranks.finish(window)
