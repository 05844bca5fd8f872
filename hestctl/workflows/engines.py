"""The engine of a run: which one and by which kernels, made for its adapters, and told in its record."""

from __future__ import annotations

from dataclasses import replace

from hestctl.energy.table import EnergyTable
from hestctl.errors import Exit, HestError
from hestctl.generation.engine import Generator, blocks_note
from hestctl.generation.engines import Engine, EngineKind, engine_for
from hestctl.hardening.artefact import read_codes, write_codes
from hestctl.hardening.plan import read_plan
from hestctl.kernels.choose import Choices
from hestctl.model.backbone import Backbone
from hestctl.model.methods import METHODS, Tuner
from hestctl.progress import Progress
from hestctl.records import BlockStates, Run
from hestctl.settings import Settings, from_document
from hestctl.store.folder import RunFolder
from hestctl.store.store import Store
from hestctl.training.checkpoint import load_tensors
from hestctl.workflows.setup import HARDENED_FILE, PLAN_FILE, decides_blocks, new_tuner


def chosen_engine(settings: Settings, backbone: Backbone, progress: Progress) -> EngineKind:
    """What this run generates with; told where it is not hestctl's own. Raises HestError (usage)."""
    blocks = settings.backbone.blocks(backbone.num_layers)
    kind = engine_for(backbone, settings.generation.engine, blocks)
    if decides_blocks(settings) and kind.name == Generator.engine:
        raise HestError(
            f"scope network needs hestctl's engine, and this is transformers': {kind.reason}",
            "--engine hestctl where it knows the model, or --scope adapter",
            Exit.USAGE,
        )
    told = "" if blocks.all_full else f", blocks: {blocks_note(blocks)}"
    progress.note(f"engine: {kind.name}{told}" + (f" ({kind.reason})" if kind.reason else ""))
    return kind


def with_kernels(kind: EngineKind, table: EnergyTable | None) -> EngineKind:
    """The engine with the kernels that ``calibrate`` chose, where the table of its target has some."""
    if table is None or table.kernels is None:
        return kind
    return replace(kind, choices=Choices.from_dict(table.kernels))


def in_blocks(
    kind: EngineKind,
    store: Store,
    backbone: Backbone,
    tuner: Tuner,
    blocks: BlockStates,
    *,
    write: bool = False,
) -> EngineKind:
    """The engine with the blocks in these states, int8 codes from the store's folder.

    The codes are written there first where ``write``. They are the backbone's, so that all its plans share
    them; LoRA makes other weights, whose codes are made when they are used. Raises HestError: usage where the
    engine cannot run such blocks, else where codes are missing or damaged.
    """
    if blocks.all_full:
        return kind
    kind = kind.running(blocks)
    if blocks.uses_int8 and not tuner.method.lora:
        folder = store.root / f"int8-{backbone.fingerprint[:16]}-{str(backbone.dtype).removeprefix('torch.')}"
        if write:
            write_codes(folder, backbone, blocks)
        kind = replace(kind, codes=read_codes(folder, backbone, blocks))
    return kind


def record_engine(run: Run, kind: EngineKind, engine: Engine) -> None:
    """Write into the run's summary what generates for it: engine, adapter's step, kernels, and each why."""
    run.summary = {**run.summary, "engine": kind.told(engine)}


def load_hardened(
    store: Store,
    run: Run,
    backbone: Backbone,
    device_name: str,
    kind: EngineKind,
    table: EnergyTable | None,
) -> Engine:
    """The engine of a finished run, its adapters exactly as they were hardened.

    ``table`` is the energy table of today, None where there is none to hold the plan against. Raises
    HestError when the files are missing or damaged, or were made for another backbone, device or table.
    """
    folder = RunFolder(store.root, run.run_id).path
    settings = from_document(run.settings)
    if run.summary.get("fingerprint") != backbone.fingerprint:
        raise HestError(
            f"run {run.run_id} was trained on another backbone ({run.backbone}, not {backbone.name})",
            "name the backbone it was trained on with --backbone",
            Exit.USAGE,
        )
    plan = read_plan(folder / PLAN_FILE) if (folder / PLAN_FILE).is_file() else None
    if plan is not None:
        plan.check(backbone.fingerprint, device_name, None if table is None else table.key)
    states = (0, 1, 2) if plan is not None and plan.uses_int8 else (0, 2)
    tuner = new_tuner(settings, backbone, states, 0)
    if METHODS[settings.method.name].trained:
        tuner.load(load_tensors(folder / HARDENED_FILE))
    # What the settings of this call fix holds: a benchmark runs a plan in whatever precision it is about.
    if plan is not None and (kind.blocks is None or kind.blocks.all_full):
        kind = in_blocks(kind, store, backbone, tuner, plan.blocks)
    tuner.finish()
    return kind.make(backbone, tuner.spectral, plan)
