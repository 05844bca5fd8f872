"""The meter of the device at hand, and the energy table that fits it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from hestctl.calibration.figures import Target, runs_blocks
from hestctl.calibration.measure import Calibration, table_key
from hestctl.energy.counter import open_counter
from hestctl.energy.meter import Meter
from hestctl.energy.protocol import Counter, Unavailable
from hestctl.energy.table import EnergyTable
from hestctl.errors import Exit, HestError
from hestctl.generation.engines import engine_for
from hestctl.model.backbone import Backbone
from hestctl.progress import Progress
from hestctl.records import FULL, Run
from hestctl.runs import Recorder
from hestctl.settings import EnergySettings, GenerationSettings, Settings
from hestctl.store import queries
from hestctl.store.store import Store


def find_counter(settings: EnergySettings, device: torch.device) -> Counter | Unavailable:
    """The energy counter of the device that computes.

    Raises HestError (no device) where one was demanded and is not there.
    """
    uuid = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    return open_counter(settings.meter, cuda_uuid=uuid, nominal_watts=settings.nominal_watts)


@contextmanager
def open_meter(
    settings: EnergySettings,
    device: torch.device,
    store: Store | None,
    progress: Progress,
    *,
    idle_w: float | None = None,
) -> Iterator[Meter]:
    """The meter of the device that generates, started and stopped around the work.

    Joules are net of idle too where ``idle_w`` (W) is given or the store has a certificate of this device
    with its idle watts, and the device idles at these still.
    """
    counter = find_counter(settings, device)
    warnings: list[str] = []
    if idle_w is None and store is not None and not isinstance(counter, Unavailable):
        idle_w, warnings = _certified(store, counter.device_uuid)
    synchronise = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else None
    with Meter(counter, idle_w=idle_w, synchronise=synchronise, poll_s=settings.poll_s) as meter:
        if meter.kind == "none":
            progress.note(f"meter: none, joules are not measured ({meter.reason})")
        else:
            progress.note(f"meter: {meter.counter_name} on {meter.device_name}; joules are {meter.kind}")
        for warning in warnings:
            progress.note(f"the meter's last calibration warns: {warning}")
        settle(device)
        drift = meter.check_idle()
        if drift is not None:
            progress.note(drift)
        yield meter


def settle(device: torch.device) -> None:
    """Lets a GPU come to rest: its clocks stay up for about a second after work, such as loading weights."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        time.sleep(1.0)


def _certified(store: Store, device_uuid: str) -> tuple[float | None, list[str]]:
    """Idle watts of this device by its latest certificate, and what that warns of."""
    for run in queries.list_runs(store, command="calibrate", status="finished"):
        if run.device_uuid == device_uuid:
            certificate = run.summary.get("certificate", {})
            idle_w = certificate.get("idle_w")
            warnings = [*certificate.get("warnings", ()), *run.summary.get("meter_failures", ())]
            return None if idle_w is None else float(idle_w), warnings
    return None, []


def energy_table(
    settings: Settings,
    backbone: Backbone,
    meter: Meter,
    store: Store,
    recorder: Recorder,
    progress: Progress,
    *,
    resumed: Run | None = None,
) -> EnergyTable:
    """The stored table that fits this device, shape and software, or one measured on the way.

    That has the directions' prices alone, or in scope network all that the model needs for the batch size
    and beams asked for, where the stored one lacks them. A ``resumed`` run keeps its own, so that it goes on
    with the prices it began with. Raises HestError: usage where the only tables are stale, no device where
    the meter gives no joules.
    """
    own = None if resumed is None else resumed.calibration_id
    table = stored_table(settings, backbone, meter, store, progress, own=own)
    target, asked = target_of(settings, backbone), settings.generation
    if settings.method.scope == "network":
        lacking = _lacking(table, target, asked)
        if lacking is not None:
            progress.note(f"scope network needs the energy of whole generations: {lacking}")
            energy = settings.energy.model_copy(update={"batch_sizes": (asked.batch_size,)})
            known = None if table is None else table.model
            table = Calibration(target, energy, meter, progress, recorder.check).full(asked.num_beams)
            if known is not None and table.model is not None:
                # The newest table is the one that is found: what an older one of its key knows goes with it.
                table = replace(table, model=table.model.with_batches_of(known))
            record_table(table, recorder, progress)
    elif table is None:
        table = Calibration(target, settings.energy, meter, progress, recorder.check).directions()
        record_table(table, recorder, progress)
    assert table is not None
    recorder.run.calibration_id = table.calibration_id
    return table


def _lacking(table: EnergyTable | None, target: Target, asked: GenerationSettings) -> str | None:
    """Why this table cannot bill the batches asked for; None where it can."""
    if table is None or table.model is None:
        return "this device has no energy model of this backbone yet"
    size = table.model.padded(asked.batch_size, asked.num_beams)
    if isinstance(size, Unavailable):
        return size.reason
    costs = table.model.component(size, asked.num_beams, 0, FULL)
    return costs.reason if isinstance(costs, Unavailable) and runs_blocks(target) else None


def target_of(settings: Settings, backbone: Backbone) -> Target:
    """What these settings calibrate. Raises HestError (usage) for an engine that cannot run the backbone.

    Whatever states the settings give its blocks: all of them are in its table.
    """
    engine = engine_for(backbone, settings.generation.engine, None)
    return Target(backbone, engine, settings.method)


def stored_table(
    settings: Settings,
    backbone: Backbone,
    meter: Meter,
    store: Store,
    progress: Progress,
    *,
    own: str | None = None,
) -> EnergyTable | None:
    """The newest stored table of this device, backbone and software, or the one whose id is ``own``.

    None where this device never saw this backbone. Raises HestError (usage), with the command that renews
    it, where a table is there but was measured under other conditions.
    """
    key = table_key(target_of(settings, backbone), meter)
    found = queries.latest_calibration(store, key.text)
    if own is not None:
        mine = queries.calibration(store, own)
        found = mine if mine is not None and mine["key"] == key.text else found
    if found is None:
        stale = queries.latest_calibration(store, key.subject_text, prefix=True)
        if stale is None:
            return None
        raise HestError(
            f"the energy table {stale['calibration_id']} is stale: {'; '.join(key.changes(stale['key']))}",
            f"renew it: {calibrate_command(settings)}",
            Exit.USAGE,
        )
    table = EnergyTable.from_dict(found["table"])
    progress.note(f"energy table {table.calibration_id} of {table.created_at[:10]}: {table.verdict()}")
    return table


def record_table(table: EnergyTable, recorder: Recorder, progress: Progress) -> None:
    """Put a table that was measured just now into the run, and tell it."""
    recorder.calibration(
        {
            "calibration_id": table.calibration_id,
            "created_at": table.created_at,
            "device_uuid": table.device_uuid,
            "device_name": table.device_name,
            "kind": table.kind,
            "key": table.key,
            "table": table.as_dict(),
        }
    )
    recorder.run.calibration_id = table.calibration_id
    progress.note(f"energy table {table.calibration_id}, {table.kind} now: {table.verdict()}")


def calibrate_command(settings: Settings) -> str:
    """The command that measures the table of these settings anew."""
    default = Settings.model_construct()
    words = [f"hestctl calibrate --db {shlex.quote(str(settings.db))}"]
    for flag, value, usual in (
        ("--backbone", settings.backbone.name, default.backbone.name),
        ("--weights", settings.backbone.weights, default.backbone.weights),
        ("--dtype", settings.backbone.dtype, None),
        ("--engine", settings.generation.engine, default.generation.engine),
        ("--num-beams", settings.generation.num_beams, default.generation.num_beams),
        ("--batch-size", _listed(settings.energy.batch_sizes), _listed(default.energy.batch_sizes)),
        ("--lengths", _listed(settings.energy.lengths), _listed(default.energy.lengths)),
        ("--set method.controller", settings.method.controller, default.method.controller),
        ("--set method.precision", settings.method.precision, default.method.precision),
        ("--device", settings.backbone.device, default.backbone.device),
        ("--meter", settings.energy.meter, default.energy.meter),
        ("--set method.rank", settings.method.rank, default.method.rank),
        ("--set method.controller_width", settings.method.controller_width, default.method.controller_width),
    ):
        if value != usual and value != "none":
            words.append(f"{flag}{'=' if ' ' in flag else ' '}{shlex.quote(str(value))}")
    return " ".join(words)


def _listed(counts: tuple[int, ...]) -> str:
    return ",".join(str(count) for count in counts)
