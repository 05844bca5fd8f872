"""A store for reports: baselines, a control, an ablation and two budgets, three seeds each, with settings."""

from __future__ import annotations

from typing import Any

import duckdb
import numpy as np
from simulated_runs import a_run, add, empty_store, generated

from hestctl.records import Run
from hestctl.settings import of_profile, with_values

VERSIONS = {"hestctl": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"}
CERTIFICATE = {
    "created_at": "2025-11-20T07:00:00+00:00", "counter": "nvml", "kind": "measured", "device_uuid": "GPU-1",
    "driver": "580.65.06", "step_s": 0.1, "idle_w": 71.2, "noise_j": None,
    "warnings": ["the device idles unevenly"], "missing": {"noise_j": "the device was busy"},
}  # fmt: skip
CHECK = {"aa_ratio": 1.003, "aa_error": 0.008, "missing": {}}

CONFIGURATIONS: tuple[tuple[str, float, float, dict[str, Any]], ...] = (
    ("tabs", 63, 30.1, {}),
    ("lora", 58, 29.9, {}),
    ("lora", 47, 29.8, {"backbone.precision": "int8"}),
    ("hest", 43, 30.0, {"budget.emax_ratio": 0.6}),
    ("hest", 35, 27.0, {"budget.emax_ratio": 0.4}),
    ("hest", 46, 30.0, {"budget.dual": "none"}),
    ("base", 52, 18.0, {}),
)
"""Method, joules per sample, ROUGE-Lsum, and settings beyond the quickstart's."""


def settings_of(method: str, seed: int = 42, **changes: Any) -> dict[str, Any]:
    """Settings as a run records them; ``changes`` have two underscores for the dot."""
    keys = {name.replace("__", "."): value for name, value in changes.items()}
    wanted = {"method.name": method, "train.seed": seed, **keys}
    return with_values(of_profile("quickstart"), wanted).model_dump(mode="json")


def wide_study(
    count: int = 40, seeds: int = 3, copies: int = 1, calibrated: bool = True, **changes: Any
) -> duckdb.DuckDBPyConnection:
    """Every configuration with ``seeds`` seeds (base with one), ``copies`` times with other budgets of hest.

    ``changes`` are fields of every run.
    """
    connection = empty_store()
    number = 0
    for copy in range(copies):
        for method, joules, score, beyond in CONFIGURATIONS:
            if copy and method != "hest":
                continue
            for seed in range(42, 42 + (1 if method == "base" else seeds)):
                number += 1
                own = np.random.default_rng(number)
                keys = {name.replace(".", "__"): value for name, value in beyond.items()}
                ratio = beyond.get("budget.emax_ratio", 0.6) + 0.007 * copy if method == "hest" else None
                if ratio is not None:
                    keys["budget__emax_ratio"] = ratio
                run = a_run(
                    method, number, seed=seed, scope="network", emax_ratio=ratio,
                    dual=beyond.get("budget.dual", "pi"), versions=VERSIONS,
                    settings=settings_of(method, seed, **keys),
                    created_at=f"2025-11-20T{8 + number // 60:02d}:{number % 60:02d}:00+00:00", **changes,
                )  # fmt: skip
                spent = joules * own.normal(1, 0.01)
                budget = {"scope_j": 14 * spent, "emax_j": 504.0} if method == "hest" else {}
                samples = generated(run, count, joules=spent, score=score + own.normal(0, 0.15), **budget)
                add(connection, run, samples=samples)
    if calibrated:
        add(connection, calibration())
    return connection


def calibration(**changes: Any) -> Run:
    """A finished calibration of the simulated device, with certificate and check."""
    run = Run(
        "calibrate-1", "calibrate", "finished", "2025-11-20T07:00:00+00:00",
        device_name="NVIDIA H100 80GB HBM3", device_uuid="GPU-1", meter="nvml", energy_kind="measured",
        settings=settings_of("hest"), versions=VERSIONS,
        summary={"certificate": CERTIFICATE, "meter_check": CHECK},
    )  # fmt: skip
    for name, value in changes.items():
        setattr(run, name, value)
    return run
