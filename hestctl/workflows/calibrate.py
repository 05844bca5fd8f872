"""``calibrate``: the meter's certificate and the energy table of this device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

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
    backbone = load_backbone(settings.backbone, progress=progress.note)
    counter = find_counter(settings.energy, backbone.device)
    # Before the meter opens: its own polling would spoil the check of what polling does.
    progress.note("certifying the meter")
    certificate = certify(counter, load=_load(backbone.device)).as_dict()
    with open_meter(settings.energy, backbone.device, store, progress) as meter:
        row = replace(
            describe(settings, backbone, meter, None),
            run_id=new_run_id("calibrate", None),
            command="calibrate",
            method=None,
        )
        row.summary = {**row.summary, "certificate": certificate}
        with recording(store, row) as recorder:
            table = energy_table(settings, backbone, meter, store, recorder, progress, renew=True)
    return Calibrated(recorder.run, table, certificate)


def _load(device: torch.device) -> Callable[[float], None]:
    """A steady load for the certificate: matrix products for so many seconds."""
    size = 4096 if device.type == "cuda" else 512
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    matrix = torch.full((size, size), 1e-3, device=device, dtype=dtype)

    def run(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(8):
                torch.mm(matrix, matrix)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    return run
