"""How runs went, as pandas frames: their training, and what their meter was worth."""

from __future__ import annotations

from typing import Final

import duckdb
import numpy as np
import pandas as pd

from hestctl.compare.frames import NoDataError, of_runs, ordered
from hestctl.compare.results import PRIMARY, Comparison

MOST_STEPS: Final = 120
"""Points of a learning curve at most: longer ones are thinned, or a figure would be megabytes."""

ERROR: Final = "error bound of\na sample, %"
INVALID: Final = "windows that\ndo not count, %"
STEPS: Final = "window length,\ncounter steps"
SECONDS: Final = "window length,\nseconds"
REPEATS: Final = "A/A pairs:\njoules apart, %"


def learning(connection: duckdb.DuckDBPyConnection, comparison: Comparison, column: str) -> pd.DataFrame:
    """``run_id, configuration, step, split, value``: ``column`` of ``steps`` where it was recorded."""
    frame = of_runs(
        connection, comparison, f"step, split, {column}::DOUBLE AS value", "steps", f"{column} IS NOT NULL"
    )
    if frame.empty:
        trained = any(row.method != "base" for row in comparison.rows)
        raise NoDataError(f"no step has a {column}" if trained else "base is not trained")
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


def turns(connection: duckdb.DuckDBPyConnection, comparison: Comparison) -> pd.DataFrame:
    """``configuration, step, what``: where warm-up ended and blocks settled, in the first seed."""
    frame = of_runs(
        connection,
        comparison,
        "(summary->>'$.warmup_steps')::DOUBLE AS warmup, (summary->>'$.settlement.step')::DOUBLE AS settled",
        "runs",
    )
    first = frame.drop_duplicates("configuration")
    told = first.melt(["configuration"], ["warmup", "settled"], "what", "step").dropna(subset=["step"])
    return told[told["step"] > 0]


def meter(connection: duckdb.DuckDBPyConnection, comparison: Comparison) -> tuple[pd.DataFrame, list[str]]:
    """``configuration, panel, value, low, high``, a row a run, and what is not known and why.

    The bound on a sample's joules relative to them, the share of windows that do not count, how long windows
    are against the counter's step (median, with the shortest and the longest),
    and by how much the joules of A/A pairs differ.
    """
    reasons: list[str] = []
    found: list[tuple[str, str, float, float, float]] = []
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
        "kind <> 'none'",
    )
    if windows.empty:
        reasons.append("no window of the meter was recorded")
    step_s, why = _counter_step(connection, comparison)
    if step_s is None and not windows.empty:
        reasons.append(f"the step of the counter is not known: {why}")
    for (name, _), part in windows.groupby(["configuration", "run_id"], observed=True):
        label = str(name)
        bad = 100 * (1 - float(part["valid"].mean()))
        found.append((label, INVALID, bad, bad, bad))
        lengths = part["length_s"] if step_s is None else part["length_s"] / step_s
        panel = SECONDS if step_s is None else STEPS
        found.append((label, panel, float(lengths.median()), float(lengths.min()), float(lengths.max())))
    for pair in comparison.repeats:
        # Which of the two came first says nothing.
        ratio = pair.ratio.value or 1.0
        differ = 100 * (max(ratio, 1 / ratio) - 1)
        found.append((pair.label, REPEATS, differ, differ, differ))
    if not found:
        raise NoDataError("; ".join(reasons))
    frame = pd.DataFrame(found, columns=["configuration", "panel", "value", "low", "high"])
    panels = [panel for panel in (ERROR, INVALID, STEPS, SECONDS, REPEATS) if panel in set(frame["panel"])]
    return (
        frame.assign(
            configuration=ordered(frame["configuration"], comparison),
            panel=pd.Categorical(frame["panel"], panels),
        ),
        reasons,
    )


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
