"""``calibrate``: the meter's certificate, its check on known work, and the energy table of this device."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hestctl.calibration.measure import Calibration, as_document, from_document, table_key
from hestctl.data.articles import load_splits
from hestctl.energy.certificate import certify
from hestctl.energy.check import MeterCheck, check_meter
from hestctl.energy.meter import Meter
from hestctl.energy.model import Cost
from hestctl.energy.protocol import Counter, Unavailable
from hestctl.energy.replay import recording as recording_trace
from hestctl.energy.table import EnergyTable
from hestctl.errors import Exit, HestError, Interrupted
from hestctl.kernels.choose import Choices
from hestctl.model.backbone import Backbone, load_backbone
from hestctl.progress import Progress
from hestctl.records import Run
from hestctl.runs import Recorder, new_run_id, recording, resume
from hestctl.settings import Settings
from hestctl.store import queries
from hestctl.store.files import write_whole
from hestctl.store.store import Store
from hestctl.workflows.blocks import sensitivities_of
from hestctl.workflows.engines import record_engine, with_kernels
from hestctl.workflows.metering import find_counter, open_meter, record_table, settle, target_of
from hestctl.workflows.setup import decides_blocks, describe


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The run, the energy table, the meter's certificate as plain data, and its check."""

    run: Run
    table: EnergyTable
    certificate: dict[str, Any]
    check: dict[str, Any]
    verdicts: list[tuple[str, bool | None, str]]


@dataclass(slots=True)
class _Kept:
    """What a calibration has found so far, in a file of its run's folder that a resumed one reads."""

    path: Path
    key: str
    certificate: dict[str, Any] | None = None
    check: dict[str, Any] | None = None
    figures: dict[str, Cost] = field(default_factory=dict)
    kernels: Choices | None = None

    @classmethod
    def read(cls, folder: Path, key: str) -> _Kept:
        """Raises HestError (usage) where it was found under other conditions."""
        path = folder / "measured.json"
        if not path.is_file():
            return cls(path, key)
        document = json.loads(path.read_text())
        if document["key"] != key:
            raise HestError(
                "the calibration to resume was made with another device, backbone or software",
                "leave out --resume to start afresh",
                Exit.USAGE,
            )
        kernels = document.get("kernels")
        return cls(
            path,
            key,
            document["certificate"],
            document["check"],
            from_document(document["figures"]),
            None if kernels is None else Choices.from_dict(kernels),
        )

    def save(self) -> None:
        write_whole(
            self.path,
            json.dumps(
                {
                    "key": self.key,
                    "certificate": self.certificate,
                    "check": self.check,
                    "figures": as_document(self.figures),
                    "kernels": None if self.kernels is None else self.kernels.as_dict(),
                }
            ),
        )

    def save_figures(self, figures: dict[str, Cost]) -> None:
        self.figures = figures
        self.save()

    def save_kernels(self, kernels: Choices) -> None:
        self.kernels = kernels
        self.save()


def calibrate(
    settings: Settings,
    store: Store,
    progress: Progress,
    *,
    resuming: bool = False,
    trace: Path | None = None,
) -> Calibrated:
    """Certify the meter, check it on known work, and measure the energy table anew.

    ``resuming`` goes on with the latest calibration that was stopped, figure by figure. ``trace`` records
    what the counter shows while it is certified and checked. Raises HestError: no device when a meter was
    demanded that is not there, or gives no joules; usage when there is nothing to resume.
    """
    old = _stopped(store) if resuming else None
    backbone = load_backbone(settings.backbone, progress=progress.note)
    counter = find_counter(settings.energy, backbone.device)
    unopened = Meter(counter)
    run = replace(describe(settings, backbone, unopened, None), command="calibrate", method=None)
    if old is None:
        run = replace(run, run_id=new_run_id("calibrate", None))
    session = recording(store, run) if old is None else resume(store, old.run_id, run)
    try:
        with session as recorder:
            progress.note(f"run {recorder.run.run_id}")
            target = target_of(settings, backbone)
            why = f" ({target.engine.reason})" if target.engine.reason else ""
            progress.note(f"engine: {target.engine.name}{why}")
            key = table_key(target, unopened)
            kept = _Kept.read(recorder.folder.path, key.text)
            # Before the meter opens: its own polling would spoil the check of what polling does.
            certificate, check = _meter_itself(
                settings, counter, backbone.device, kept, trace, recorder, progress
            )
            run = recorder.run
            run.summary = {**run.summary, "certificate": certificate, "meter_check": check.as_dict()}
            failures = [f"{demand}: {why}" for demand, holds, why in check.verdicts() if holds is False]
            run.summary = {**run.summary, "meter_failures": failures}
            recorder.commit()
            idle_w = certificate["idle_w"]
            with open_meter(settings.energy, backbone.device, store, progress, idle_w=idle_w) as meter:
                table = Calibration(
                    target,
                    settings.energy,
                    meter,
                    progress,
                    recorder.check,
                    found=kept.figures,
                    keep=kept.save_figures,
                    choices=kept.kernels,
                    keep_choices=kept.save_kernels,
                ).full(settings.generation.num_beams)
            record_table(table, recorder, progress)
            engine = with_kernels(target.engine, table)
            record_engine(recorder.run, engine, engine.make(backbone, None, None))
            _sensitivities(settings, backbone, store, recorder, progress)
    except Interrupted as error:
        error.hint = f"{error.hint}; the same command with --resume goes on"
        raise
    return Calibrated(recorder.run, table, certificate, check.as_dict(), check.verdicts())


def _sensitivities(
    settings: Settings, backbone: Backbone, store: Store, recorder: Recorder, progress: Progress
) -> None:
    """What the blocks are worth on the training split, where the budget will ask and the data are there."""
    if not decides_blocks(settings):
        return
    try:
        splits = load_splits(settings.data, seed=0)
    except HestError as error:
        progress.note(f"sensitivities: not measured, {error.message}; `train` measures them")
        return
    sensitivities_of(settings, backbone, splits, store, recorder, progress)


def _stopped(store: Store) -> Run:
    store.recover_orphans()  # a killed run says that it is interrupted only once somebody looks
    runs = [
        run
        for status in ("interrupted", "failed")
        for run in queries.list_runs(store, command="calibrate", status=status)
    ]
    if not runs:
        raise HestError(
            f"nothing to resume: no calibration in {store.db} was stopped",
            "leave out --resume to start afresh",
            Exit.USAGE,
        )
    return max(runs, key=lambda run: run.created_at)


def _meter_itself(
    settings: Settings,
    counter: Counter | Unavailable,
    device: torch.device,
    kept: _Kept,
    trace: Path | None,
    recorder: Recorder,
    progress: Progress,
) -> tuple[dict[str, Any], MeterCheck]:
    """The certificate, and the check on samples of known relative work."""
    units, poll_s = _work(device), settings.energy.poll_s
    with _traced(counter, trace) as watched:
        if kept.certificate is None:
            progress.note("certifying the meter: at rest, then under load")
            settle(device)
            kept.certificate = certify(watched, load=_load(units), poll_s=poll_s).as_dict()
            kept.save()
        recorder.check()
        if kept.check is None:
            check = check_meter(
                _checkable(watched),
                units,
                poll_s=poll_s,
                samples=settings.energy.check_samples,
                check=recorder.check,
                tell=lambda stage: progress.note(f"checking the meter: {stage}"),
            )
            kept.check = check.as_dict()
            kept.save()
    return kept.certificate, MeterCheck(**kept.check)


def _checkable(counter: Counter | Unavailable) -> Counter | Unavailable:
    """An estimate knows nothing of the work's joules that a check could find out."""
    if isinstance(counter, Unavailable) or counter.kind == "measured":
        return counter
    return Unavailable(f"the joules are {counter.kind} ({counter.name}): no counter was checked")


@contextmanager
def _traced(counter: Counter | Unavailable, path: Path | None) -> Iterator[Counter | Unavailable]:
    if path is None:
        yield counter
    elif isinstance(counter, Unavailable):
        raise HestError(f"there is no counter to record: {counter.reason}", None, Exit.NO_DEVICE)
    else:
        with recording_trace(counter, path, note="certificate and check of the meter") as recorder:
            yield recorder


def _work(device: torch.device) -> Callable[[int], None]:
    """So many equal units of work, done when it returns: matrix products of a millisecond or so."""
    size = 4096 if device.type == "cuda" else 512
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    matrix = torch.full((size, size), 1e-3, device=device, dtype=dtype)

    def run(units: int) -> None:
        for _ in range(units):
            torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def _load(units: Callable[[int], None]) -> Callable[[float], None]:
    """A steady load for the certificate: units of work for so many seconds."""

    def run(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            units(8)

    return run
