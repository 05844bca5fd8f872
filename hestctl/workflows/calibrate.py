"""``calibrate``: the meter's certificate and the energy table of this device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hestctl.energy.certificate import certify
from hestctl.energy.table import EnergyTable
from hestctl.model.backbone import load_backbone
from hestctl.progress import Progress
from hestctl.records import Run
from hestctl.runs import new_run_id, recording
from hestctl.settings import Settings
from hestctl.store.store import Store
from hestctl.workflows.setup import describe, energy_table, find_counter, open_meter


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The run, the energy table, and the meter's certificate as plain data."""

    run: Run
    table: EnergyTable
    certificate: dict[str, Any]


def calibrate(settings: Settings, store: Store, progress: Progress) -> Calibrated:
    """Certify the meter and measure the energy table anew, whatever the store already holds.

    Raises HestError (no device) when a meter was demanded that is not there, or gives no joules.
    """
    backbone = load_backbone(settings.backbone, seed=settings.train.seed, progress=progress.note)
    with open_meter(settings.energy, backbone.device, progress) as meter:
        row = replace(
            describe(settings, backbone, meter, None),
            run_id=new_run_id("calibrate", None),
            command="calibrate",
            method=None,
        )
        with recording(store, row) as recorder:
            progress.note("certifying the meter")
            certificate = certify(find_counter(settings.energy, backbone.device)).as_dict()
            table = energy_table(settings, backbone, meter, store, recorder, progress, renew=True)
            recorder.run.summary = {**recorder.run.summary, "certificate": certificate}
    return Calibrated(recorder.run, table, certificate)
