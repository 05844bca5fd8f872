"""Where the rows of a comparison come from: settings, versions, and the certificate of their meter."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import duckdb

from hestctl.compare.reading import read_runs
from hestctl.compare.results import Comparison
from hestctl.records import Run
from hestctl.settings import flatten

_OWN: Final = ("db", "search.", "profile.", "train.seed")
"""Settings that bear on nothing that is compared, and the seed, which every run is shown with."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """The train runs behind the rows, by id, and what belongs to them.

    ``calibration`` is the latest finished calibration of their device that has a certificate and was begun
    before the last of them; ``profiles`` are the profile runs that belong to rows.
    """

    runs: Mapping[str, Run]
    calibration: Run | None
    profiles: tuple[Run, ...]

    @property
    def certificate(self) -> Mapping[str, Any]:
        """The meter's certificate, empty where there is none."""
        return _mapping(self.calibration, "certificate")

    @property
    def meter_check(self) -> Mapping[str, Any]:
        """What the meter said of work of known relative cost, empty where that was not tried."""
        return _mapping(self.calibration, "meter_check")

    def versions(self) -> dict[str, dict[str, list[str]]]:
        """For every program or library its versions, each with the ids of the runs that had it."""
        found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for run in self.runs.values():
            for name, version in run.versions.items():
                found[name][str(version)].append(run.run_id)
        return {name: dict(versions) for name, versions in found.items()}

    def settings(self) -> dict[str, dict[str, list[str]]]:
        """For every dotted key its values as JSON, each with the ids of the runs that had it."""
        found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for run in self.runs.values():
            for key, value in flatten(run.settings):
                if not key.startswith(_OWN):
                    found[key][json.dumps(value)].append(run.run_id)
        return {key: dict(values) for key, values in found.items()}

    def texts(self) -> Iterator[str]:
        """Every setting that is a text: it may be a path."""
        for run in (*self.runs.values(), *self.profiles, *((self.calibration,) if self.calibration else ())):
            yield from (value for _, value in flatten(run.settings) if isinstance(value, str))
            yield from filter(None, (run.dataset, run.backbone, run.meter))


def gather(connection: duckdb.DuckDBPyConnection, comparison: Comparison) -> Provenance:
    """What the store knows of the runs behind ``comparison``."""
    wanted = [row.run_id for row in comparison.rows]
    every = {run.run_id: run for run, _ in read_runs(connection, ("train", "profile", "calibrate"))}
    runs = {run_id: every[run_id] for run_id in wanted}
    profiles = tuple(every[profile.run_id] for profile in comparison.profile_runs)
    return Provenance(runs, _calibration(list(every.values()), list(runs.values())), profiles)


def _calibration(every: Sequence[Run], runs: Sequence[Run]) -> Run | None:
    devices = {run.device_uuid for run in runs}
    latest = max(run.created_at for run in runs)
    fitting = [
        run
        for run in every
        if run.command == "calibrate"
        and run.status == "finished"
        and run.device_uuid in devices
        and run.created_at <= latest
        and "certificate" in run.summary
    ]
    return max(fitting, key=lambda run: run.created_at, default=None)


def _mapping(run: Run | None, name: str) -> Mapping[str, Any]:
    found = run.summary.get(name) if run is not None else None
    return found if isinstance(found, Mapping) else {}
