"""``harden``: a trained run's gates to a new plan, with its bound and certificate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from hestctl.budget import Budget
from hestctl.errors import Exit, HestError
from hestctl.generation.engines import engine_for
from hestctl.hardening.plan import Plan, read_plan
from hestctl.model.backbone import load_backbone
from hestctl.model.methods import METHODS
from hestctl.progress import Progress
from hestctl.records import BlockStates, Run
from hestctl.runs import new_run_id, recording
from hestctl.settings import Settings, from_document
from hestctl.store import queries
from hestctl.store.folder import RunFolder
from hestctl.store.store import Store
from hestctl.training.checkpoint import load_tensors
from hestctl.workflows.blocks import deciding, sensitivities_of
from hestctl.workflows.engines import in_blocks
from hestctl.workflows.metering import energy_table, open_meter
from hestctl.workflows.setup import (
    ADAPTER_FILE,
    PLAN_FILE,
    budget_of,
    check_reference,
    decides_blocks,
    describe,
    harden_into,
    load_data,
    new_tuner,
    read_inputs,
)


@dataclass(frozen=True, slots=True)
class Hardened:
    """The new run and its plan."""

    run: Run
    plan: Plan


def harden_run(settings: Settings, store: Store, progress: Progress, *, run_id: str | None) -> Hardened:
    """Harden the named trained run, or the latest one, under the budget of ``settings``.

    ``settings`` are those of the trained run with the flags of this call on top. Raises HestError
    (usage) for a run that has nothing to harden.
    """
    trained = trained_run(store, run_id)
    method = METHODS[settings.method.name]
    splits = read_inputs(settings, store)
    backbone = load_backbone(settings.backbone, progress=progress.note)
    data = load_data(settings, splits, backbone, progress, needed=("validation", "test"))
    with open_meter(settings.energy, backbone.device, store, progress) as meter:
        row = replace(
            describe(settings, backbone, meter, data),
            run_id=new_run_id("harden", trained.method),
            command="harden",
            parent_run_id=trained.run_id,
            controller_parameters=trained.controller_parameters,
            adapter_parameters=trained.adapter_parameters,
        )
        check_reference(settings, store, row)
        with recording(store, row) as recorder:
            table = energy_table(settings, backbone, meter, store, recorder, progress)
            # What was trained is what is there, whatever this call decides by.
            tuner = new_tuner(from_document(trained.settings), backbone, table.states, settings.train.seed)
            folder = RunFolder(store.root, trained.run_id).path
            tuner.load(load_tensors(folder / ADAPTER_FILE))
            budget: Budget | None = None
            if method.budgeted:
                budget = budget_of(settings, store, recorder, backbone, data, table, progress)
            known = None
            if decides_blocks(settings):
                known = sensitivities_of(settings, backbone, splits, store, recorder, progress)
            blocks = deciding(settings, backbone, tuner, known, _trained_blocks(folder))
            plan = harden_into(recorder, settings, backbone, tuner, data, table, budget, progress, blocks)
            assert plan is not None
            if plan.blocks.uses_int8:
                kind = engine_for(backbone, settings.generation.engine, None)
                in_blocks(kind, store, backbone, tuner, plan.blocks, write=True)
    return Hardened(recorder.run, plan)


def _trained_blocks(folder: Path) -> BlockStates | None:
    """The blocks' states in the plan that training ended with; None where there is none to be read."""
    try:
        return read_plan(folder / PLAN_FILE).blocks
    except HestError:
        return None


def trained_run(store: Store, run_id: str | None) -> Run:
    """The finished spectral run to harden. Raises HestError (usage) where there is none."""
    if run_id is not None:
        run = queries.get_run(store, run_id)
        if run.command == "harden" and run.parent_run_id is not None:
            run = queries.get_run(store, run.parent_run_id)
        if run.command != "train" or run.status != "finished" or METHODS[run.method or "base"].gate is None:
            raise HestError(
                f"run {run_id} has nothing to harden: a {run.status} {run.command} run of {run.method}",
                "name a finished train run of hest, tabs or bhsp",
                Exit.USAGE,
            )
        return run
    runs = [
        run
        for run in queries.list_runs(store, command="train", status="finished")
        if METHODS[run.method or "base"].gate is not None
    ]
    if not runs:
        raise HestError(
            f"nothing to harden in {store.db}: no finished run of hest, tabs or bhsp",
            "hestctl train --method hest --emax-ratio 0.6",
            Exit.USAGE,
        )
    budgeted = [run for run in runs if METHODS[run.method or "base"].budgeted]
    return (budgeted or runs)[0]
