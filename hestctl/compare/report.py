"""A comparison as one JSON document and as CSV."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from hestctl.compare.results import METRICS, PRIMARY, Best, Comparison, Pair, Repeat, Row
from hestctl.compare.statistics import Measure
from hestctl.records import EnergyKind
from hestctl.store.files import write_whole

_CSV_FIELDS: Final = (
    "run_id", "store", "label", "role", "method", "scope", "seed", "dtype", "created_at", "steps", "samples",
)  # fmt: skip


def as_json(comparison: Comparison) -> dict[str, Any]:
    """One strictly valid JSON document; every key of a number carries its unit."""
    gap, control_gap = comparison.gap, comparison.gap_vs_controls
    return {
        "primary_metric": PRIMARY,
        "metrics": {
            name: {row.run_id: _finite(row.measure(name).value) for row in comparison.rows}
            for name in METRICS
        },
        "best_proposed": _best(comparison.best_proposed, comparison.energy_kind),
        "best_baseline": _best(comparison.best_baseline, comparison.energy_kind),
        "gap": _finite(gap.percent.value),
        "gap_unit": "percent fewer joules per sample",
        "gap_interval_percent": _interval(gap.percent),
        "gap_reason": gap.reason,
        "gap_vs_controls": _finite(control_gap.percent.value),
        "gap_vs_controls_interval_percent": _interval(control_gap.percent),
        "gap_vs_controls_reason": control_gap.reason,
        "best_control": _best(comparison.best_control, comparison.energy_kind),
        "estimated_time_ratio": _measure(comparison.estimated_time_ratio),
        "energy_kind": comparison.energy_kind,
        "conclusion": comparison.conclusion,
        "task": comparison.task,
        "quality_metric": comparison.quality_metric,
        "margin_points": comparison.margin_points,
        "facts": {name.replace(" ", "_"): value for name, value in comparison.facts.items()},
        "units": {name: metric.unit for name, metric in METRICS.items()},
        "runs": {row.run_id: _row(row, comparison) for row in comparison.rows},
        "pairs": [_pair(pair, comparison.energy_kind) for pair in comparison.pairs],
        "aa_control": [_repeat(repeat) for repeat in comparison.repeats],
        "repeatability": comparison.repeatability.value,
        "repeatability_reason": comparison.repeatability.reason,
        "set_apart": [
            {"run_id": one.run_id, "label": one.label, "kind": one.kind, "reason": one.reason}
            for one in comparison.set_apart
        ],
        "expectations": [
            {"expectation": line.text, "outcome": line.outcome, "reason": line.reason}
            for line in comparison.expectations
        ],
    }


def write_csv(comparison: Comparison, path: Path) -> Path:
    """One line a run, every measure with its interval; text that a spreadsheet would run is quoted."""
    headers = [*_CSV_FIELDS, "energy_kind", "energy_method", "scope_energy_kind"]
    for name in METRICS:
        headers += [name, f"{name}_low", f"{name}_high", f"{name}_not_measured"]
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(headers)
    for row in comparison.rows:
        cells: list[object] = [getattr(row, name) for name in _CSV_FIELDS]
        cells += [comparison.energy_kind, row.energy_method, "predicted"]
        for name in METRICS:
            measure = row.measure(name)
            reason = measure.reason if measure.value is None else None
            cells += [_finite(measure.value), _finite(measure.low), _finite(measure.high), reason]
        writer.writerow([_safe(cell) for cell in cells])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, file.getvalue())
    return path


def _row(row: Row, comparison: Comparison) -> dict[str, Any]:
    kinds = {"meter": comparison.energy_kind, "table": "predicted", None: None}
    measured = {}
    for name, metric in METRICS.items():
        measured[name] = {**_measure(row.measure(name)), "unit": metric.unit}
        if kinds[metric.source] is not None:
            measured[name]["energy_kind"] = kinds[metric.source]
    return {
        "label": row.label,
        "method": row.method,
        "role": row.role,
        "scope": row.scope,
        "seed": row.seed,
        "dtype": row.dtype,
        "created_at": row.created_at,
        "store": row.store,
        "steps": row.steps,
        "samples": row.samples,
        "energy_method": row.energy_method,
        "measures": measured,
        "notes": list(row.notes),
    }


def _pair(pair: Pair, kind: EnergyKind) -> dict[str, Any]:
    return {
        "proposed": pair.proposed,
        "other": pair.other,
        "other_role": pair.other_role,
        "proposed_run_ids": list(pair.proposed_run_ids),
        "other_run_ids": list(pair.other_run_ids),
        "samples": pair.samples,
        "verdict": pair.verdict,
        "why": pair.why,
        "quality": pair.quality,
        "quality_reason": pair.quality_reason,
        "quality_metric": pair.quality_metric,
        "quality_difference_points": _measure(pair.quality_difference),
        "least_detectable_points": _finite(pair.least_detectable_points),
        "energy_kind": kind,
        "energy_ratio": _measure(pair.ratio),
        "least_detectable_saving_percent": _finite(pair.least_detectable_saving_percent),
        "meter_error_percent": _finite(pair.meter_error_percent),
        "new_token_ratio": _measure(pair.token_ratio),
        "energy_per_new_token_ratio": _measure(pair.per_token_ratio),
        "energy_ratio_at_forced_length": _measure(pair.forced_length_ratio),
        "gap_percent": _measure(pair.gap_percent),
        "gap_length_part_percent": _finite(pair.length_part_percent),
        "gap_token_part_percent": _finite(pair.token_part_percent),
        "time_ratio": _measure(pair.time_ratio),
        "latency_p99_ratio": _measure(pair.latency_p99_ratio),
        "scope_energy_ratio_predicted": _measure(pair.scope_ratio),
        "break_even_samples": _measure(pair.break_even_samples),
        "equal_length": pair.equal_length,
        "at_equal_length": pair.at_equal_length,
        "p_one_sided": asdict(pair.claim),
        "notes": list(pair.notes),
    }


def _repeat(repeat: Repeat) -> dict[str, Any]:
    return {
        "label": repeat.label,
        "kind": repeat.kind,
        "run_ids": list(repeat.run_ids),
        "samples": repeat.samples,
        "energy_ratio": _measure(repeat.ratio),
        "energy": repeat.energy,
        "quality_metric": repeat.quality_metric,
        "quality_difference_points": _measure(repeat.quality_difference),
        "quality": repeat.quality,
    }


def _best(best: Best | None, kind: EnergyKind) -> dict[str, Any]:
    if best is None:
        return {"run_id": None, "value": None, "energy_kind": kind, "label": None, "run_ids": []}
    return {
        "run_id": best.run_id,
        "value": _finite(best.value),
        "energy_kind": kind,
        "label": best.label,
        "run_ids": list(best.run_ids),
    }


def _measure(measure: Measure) -> dict[str, Any]:
    return {
        "value": _finite(measure.value),
        "low": _finite(measure.low),
        "high": _finite(measure.high),
        "n": measure.n,
        "reason": measure.reason,
    }


def _interval(measure: Measure) -> list[float | None] | None:
    return None if measure.low is None else [_finite(measure.low), _finite(measure.high)]


def _finite(value: float | None) -> float | None:
    """JSON has no infinities: an open end becomes null."""
    return value if value is not None and math.isfinite(value) else None


def _safe(cell: object) -> object:
    """A text that starts like a formula gets an apostrophe, so that a spreadsheet shows it as text."""
    if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{cell}"
    return "" if cell is None else cell
