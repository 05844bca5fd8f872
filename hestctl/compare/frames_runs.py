"""How runs went, as pandas frames: their training, and what their meter was worth."""

from __future__ import annotations

from typing import Final, TypeAlias

import duckdb
import numpy as np
import pandas as pd

from hestctl.compare.frames import NoDataError, of_runs, ordered
from hestctl.compare.results import PRIMARY, Comparison

MOST_STEPS: Final = 120
"""Points of a learning curve at most: longer ones are thinned, or a figure would be megabytes."""

REPEATS: Final = "repeats"
PREDICTED: Final = "predicted"
ERROR: Final = "error"
INVALID: Final = "invalid"
STEPS: Final = "steps"
PANELS: Final = (REPEATS, PREDICTED, ERROR, INVALID, STEPS)
"""What is known of a meter, in the order in which it is shown."""

_Mark: TypeAlias = tuple[str, str, float, float, float]
"""Configuration, panel, value, and its ends."""


def learning(connection: duckdb.DuckDBPyConnection, comparison: Comparison, column: str) -> pd.DataFrame:
    """``run_id, configuration, step, split, value``: ``column`` of ``steps`` where it was recorded."""
    frame = of_runs(
        connection, comparison, f"step, split, {column}::DOUBLE AS value", "steps", f"{column} IS NOT NULL"
    )
    if frame.empty:
        if all(row.method == "base" for row in comparison.rows):
            raise NoDataError("base is not trained")
        no_budget = "no run here is trained towards a budget"
        raise NoDataError("no step was recorded" if column == "task_loss" else no_budget)
    kept = []
    for _, part in frame.groupby(["run_id", "split"], observed=True):
        rising = part.sort_values("step")
        kept.append(rising.iloc[np.unique(np.linspace(0, len(part) - 1, MOST_STEPS).round().astype(int))])
    return pd.concat(kept, ignore_index=True)


def means(curves: pd.DataFrame) -> pd.DataFrame:
    """``configuration, step, split, value``: the mean over seeds at steps that all of them recorded."""
    keys = ["configuration", "split", "step"]
    by_step = curves.groupby(keys, observed=True)["value"].agg(["mean", "count"]).reset_index()
    runs = curves.groupby(["configuration", "split"], observed=True)["run_id"].nunique().rename("runs")
    whole = by_step.merge(runs.reset_index(), on=["configuration", "split"])
    whole = whole[whole["count"] == whole["runs"]].rename(columns={"mean": "value"})
    return whole.assign(configuration=whole["configuration"].astype(curves["configuration"].dtype))


def smoothed(curves: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """``curves`` of ``means`` as running means, and of how many recorded steps each is at most.

    A mean is centred; towards both ends it is of fewer steps.
    """
    points = int(curves.groupby(["configuration", "split"], observed=True).size().max())
    window = 2 * (points // 16) + 1
    rising = curves.sort_values("step")
    values = rising.groupby(["configuration", "split"], observed=True)["value"].transform(
        lambda values: values.rolling(window, center=True, min_periods=1).mean()
    )
    return rising.assign(value=values), window


def settled(connection: duckdb.DuckDBPyConnection, comparison: Comparison) -> list[float]:
    """The steps at which blocks settled, of every run that has any."""
    frame = of_runs(connection, comparison, "(summary->>'$.settlement.step')::DOUBLE AS settled", "runs")
    return sorted(set(frame["settled"].dropna()))


def meter(connection: duckdb.DuckDBPyConnection, comparison: Comparison) -> tuple[pd.DataFrame, list[str]]:
    """``configuration, panel, value, low, high``, a row a run or A/A pair, and what is not known and why.

    By how much the joules of A/A pairs differ, and the meter's joules over what the energy model predicts of
    the same samples. Of a counter also the bound on a sample's joules relative to them, the share of
    generation's windows that do not count, and how long they are against its step (median, with the
    shortest and the longest).
    """
    if comparison.energy_kind == "none":
        raise NoDataError(next(filter(None, (row.measure(PRIMARY).reason for row in comparison.rows))))
    found = [*_repeats(comparison), *_against_predictions(connection, comparison)]
    reasons = []
    if not comparison.repeats:
        reasons.append("no A/A pair: train one run again with the same settings and seed")
    if len(found) == len(comparison.repeats):
        reasons.append("no predicted joules to compare with: run `hestctl calibrate` before training")
    if comparison.energy_kind == "estimated":
        reasons.append("no counter: the estimated joules cannot be judged beyond that")
    else:
        of_counter, lacking = _counter(connection, comparison)
        found += of_counter
        reasons += lacking
    if not found:
        raise NoDataError("; ".join(reasons))
    frame = pd.DataFrame(found, columns=["configuration", "panel", "value", "low", "high"])
    panels = [panel for panel in PANELS if panel in set(frame["panel"])]
    return (
        frame.assign(
            configuration=ordered(frame["configuration"], comparison),
            panel=pd.Categorical(frame["panel"], panels),
        ),
        reasons,
    )


def _repeats(comparison: Comparison) -> list[_Mark]:
    found = []
    for pair in comparison.repeats:
        ratio = pair.ratio.value or 1.0
        edges = [end if end is not None else ratio for end in (pair.ratio.low, pair.ratio.high)]
        # Which of the two came first says nothing.
        apart = sorted((100 * (end - 1) if ratio >= 1 else 100 * (1 / end - 1)) for end in edges)
        found.append((pair.label, REPEATS, 100 * (max(ratio, 1 / ratio) - 1), apart[0], apart[1]))
    return found


def _against_predictions(connection: duckdb.DuckDBPyConnection, comparison: Comparison) -> list[_Mark]:
    frame = of_runs(
        connection,
        comparison,
        "energy_j::DOUBLE AS energy_j, predicted_j::DOUBLE AS predicted_j",
        "samples",
        f"split = ? AND energy_valid AND energy_kind = '{comparison.energy_kind}' "
        "AND energy_j IS NOT NULL AND predicted_j > 0",
        [comparison.facts["split"]],
    )
    sums = frame.groupby(["configuration", "run_id"], observed=True)[["energy_j", "predicted_j"]].sum()
    ratios = (sums["energy_j"] / sums["predicted_j"]).reset_index(name="ratio")
    pairs = zip(ratios["configuration"].astype(str), ratios["ratio"].tolist(), strict=True)
    return [(label, PREDICTED, ratio, ratio, ratio) for label, ratio in pairs]


def _counter(connection: duckdb.DuckDBPyConnection, comparison: Comparison) -> tuple[list[_Mark], list[str]]:
    reasons: list[str] = []
    found: list[_Mark] = []
    for row in comparison.rows:
        error, spent = row.measure("energy_error_j_per_sample"), row.measure(PRIMARY)
        if error.value is not None and spent.value:
            share = 100 * error.value / spent.value
            found.append((row.config_label, ERROR, share, share, share))
    if not found:
        reasons.append(f"no error bound: {comparison.rows[0].measure('energy_error_j_per_sample').reason}")
    windows = of_runs(
        connection,
        comparison,
        "valid::INT AS valid, end_s - start_s AS length_s",
        "windows",
        "kind <> 'none' AND phase = 'generation'",
    )
    if windows.empty:
        return found, [*reasons, "no window of the meter was recorded"]
    step_s, why = _counter_step(connection, comparison)
    if step_s is None:
        reasons.append(f"the step of the counter is not known: {why}")
    for (name, _), part in windows.groupby(["configuration", "run_id"], observed=True):
        label = str(name)
        bad = 100 * (1 - float(part["valid"].mean()))
        found.append((label, INVALID, bad, bad, bad))
        if step_s is not None:
            lengths = part["length_s"] / step_s
            found.append((label, STEPS, float(lengths.median()), float(lengths.min()), float(lengths.max())))
    return found, reasons


def _counter_step(connection: duckdb.DuckDBPyConnection, comparison: Comparison) -> tuple[float | None, str]:
    """Seconds between steps of the counter by the latest certificate of this device, or why not."""
    found = connection.execute(
        "SELECT (summary->>'$.certificate.step_s')::DOUBLE, summary->>'$.certificate.missing.step_s' "
        "FROM runs WHERE command = 'calibrate' AND (summary->'$.certificate') IS NOT NULL "
        "AND contains(?, coalesce(device_uuid, device_name, '?')) AND meter IS NOT DISTINCT FROM ? "
        "ORDER BY created_at DESC LIMIT 1",
        [comparison.facts["device"], comparison.facts["meter"]],
    ).fetchone()
    if found is None:
        return None, "these stores hold no calibration of this device"
    step_s, missing = found
    return step_s, missing or "the certificate has none"
