"""The data of each figure as a pandas frame, or why there is none; nothing here draws."""

from __future__ import annotations

import math

import duckdb
import pandas as pd

from hestctl.compare.results import PRIMARY, Comparison, Row
from hestctl.compare.statistics import Measure
from hestctl.compare.text import number
from hestctl.records import STATES


class NoDataError(Exception):
    """Why a topic has no data."""


def energy(comparison: Comparison) -> pd.DataFrame:
    """``run, joules, low, high, text``: mean joules per sample with 95 % intervals."""
    measures = [(row.label, row.measure(PRIMARY)) for row in comparison.rows]
    known = [
        (label, one.value, *_edges(one), number(one.value))
        for label, one in measures
        if one.value is not None
    ]
    if not known:
        raise NoDataError(measures[0][1].reason or "no joules")
    return pd.DataFrame(known, columns=["run", "joules", "low", "high", "text"])


def quality_energy(comparison: Comparison) -> pd.DataFrame:
    """``run, x, x_low, x_high, y, y_low, y_high``: joules per sample and points of quality."""
    rows: list[list[object]] = []
    reason = "no values"
    for row in comparison.rows:
        spent, score = row.measure(PRIMARY), row.measure(comparison.quality_metric)
        if spent.value is None or score.value is None:
            reason = spent.reason or score.reason or reason
            continue
        rows.append([row.label, spent.value, *_edges(spent), score.value, *_edges(score)])
    if not rows:
        raise NoDataError(reason)
    return pd.DataFrame(rows, columns=["run", "x", "x_low", "x_high", "y", "y_low", "y_high"])


def joules(connection: duckdb.DuckDBPyConnection, comparison: Comparison) -> pd.DataFrame:
    """``run, value``: valid joules of every sample, of the comparison's kind."""
    condition = f"energy_valid AND energy_kind = '{comparison.energy_kind}' AND energy_j IS NOT NULL"
    reasons = [row.measure(PRIMARY).reason for row in comparison.rows]
    return _of_samples(
        connection, comparison, "energy_j", condition, next(filter(None, reasons), "no joules")
    )


def latency(connection: duckdb.DuckDBPyConnection, comparison: Comparison) -> pd.DataFrame:
    """``run, value``: wall seconds of every sample's batch."""
    return _of_samples(connection, comparison, "latency_s", "isfinite(latency_s)", "no latency was recorded")


def learning(connection: duckdb.DuckDBPyConnection, row: Row) -> pd.DataFrame:
    """``step, split, panel, value``, panels in the order of print."""
    panels = {
        "task_loss": "task loss",
        "energy_ratio": "J / E_max, as the gates decide",
        "multiplier": "multiplier",
    }
    steps = connection.execute(
        "SELECT step, split, task_loss, energy_ratio, multiplier FROM steps "
        "WHERE run_id = ? AND store = ? ORDER BY step",
        [row.run_id, row.store],
    ).df()
    frame = steps.melt(["step", "split"], list(panels), "panel", "value").dropna(subset=["value"])
    if frame.empty:
        raise NoDataError("base is not trained" if row.method == "base" else "no step was recorded")
    shown = [title for key, title in panels.items() if (frame["panel"] == key).any()]
    frame["panel"] = pd.Categorical(frame["panel"].map(panels), shown)
    frame["value"] = frame["value"].astype(float)
    return frame


def utilisation(connection: duckdb.DuckDBPyConnection, row: Row) -> pd.DataFrame:
    """``layer, state, share``: percent of the layer's direction-tokens in each state."""
    counts = connection.execute(
        "SELECT layer, state, sum(count)::DOUBLE AS count FROM utilisation "
        "WHERE run_id = ? AND store = ? GROUP BY layer, state",
        [row.run_id, row.store],
    ).df()
    if counts.empty or float(counts["count"].sum()) == 0:
        adaptive = row.method in ("hest", "tabs", "bhsp")
        raise NoDataError("no utilisation was recorded" if adaptive else f"{row.method} has no directions")
    grid = counts.pivot(index="layer", columns="state", values="count").fillna(0.0)
    states = [state for state in STATES if state in grid.columns]
    shares = 100 * grid[states].div(grid[states].sum(axis=1), axis=0)
    table = shares.reset_index().melt("layer", states, "state", "share")
    names = {state: f"full\n({row.dtype})" if state == "full" and row.dtype else state for state in states}
    table["state"] = pd.Categorical(table["state"].map(names), list(names.values()))
    return table


def budget(connection: duckdb.DuckDBPyConnection, comparison: Comparison) -> pd.DataFrame:
    """``run, scope, tokens, joules, emax_j``: predicted scope joules of every sample."""
    frames = [
        connection.execute(
            "SELECT (prompt_tokens + new_tokens)::DOUBLE AS tokens, scope_energy_j AS joules, "
            "emax_j::DOUBLE AS emax_j FROM samples "
            "WHERE run_id = ? AND store = ? AND split = ? AND scope_energy_j IS NOT NULL",
            [row.run_id, row.store, comparison.facts["split"]],
        )
        .df()
        .assign(run=row.label, scope=f"scope {row.scope}")
        for row in comparison.rows
        if row.scope is not None
    ]
    held = [frame for frame in frames if not frame.empty]
    if not held:
        raise NoDataError("no sample has scope joules: run `hestctl calibrate` before training")
    return pd.concat(held, ignore_index=True)


def limits(budgets: pd.DataFrame) -> pd.DataFrame:
    """``run, scope, tokens, joules``: E_max of each run over its range of lengths.

    One number for every length is a level line; otherwise medians over groups of like lengths
    between the shortest and the longest sample.
    """
    lines = []
    for (run, scope), part in budgets[budgets["emax_j"] > 0].groupby(["run", "scope"], observed=True):
        if part["emax_j"].nunique() == 1:
            reach = budgets.loc[budgets["scope"] == scope, "tokens"]
            tokens, level = [float(reach.min()), float(reach.max())], [float(part["emax_j"].iloc[0])] * 2
        else:
            rising = part[["tokens", "emax_j"]].sort_values("tokens")
            medians = rising.groupby(pd.qcut(rising["tokens"], 12, duplicates="drop"), observed=True).median()
            line = pd.concat([rising.iloc[[0]], medians, rising.iloc[[-1]]])
            tokens, level = line["tokens"].tolist(), line["emax_j"].tolist()
        lines.append(pd.DataFrame({"run": run, "scope": scope, "tokens": tokens, "joules": level}))
    return pd.concat(lines, ignore_index=True) if lines else pd.DataFrame(columns=["run", "joules"])


def length(connection: duckdb.DuckDBPyConnection, comparison: Comparison) -> pd.DataFrame:
    """``run, batch, tokens, joules``: whole joules of generation in profile runs."""
    frames = [
        connection.execute(
            "SELECT (prompt_tokens + new_tokens)::DOUBLE AS tokens, energy_j AS joules, "
            "'batch ' || batch_size AS batch FROM samples WHERE run_id = ? AND store = ? "
            "AND energy_valid AND energy_kind = ? AND energy_j IS NOT NULL",
            [profile.run_id, profile.store, comparison.energy_kind],
        )
        .df()
        .assign(run=profile.label)
        for profile in comparison.profile_runs
    ]
    held = [frame for frame in frames if not frame.empty]
    if not held:
        raise NoDataError("no profile run of these runs has joules: `hestctl profile` measures by length")
    return pd.concat(held, ignore_index=True)


def confusion(connection: duckdb.DuckDBPyConnection, row: Row, split: str) -> pd.DataFrame:
    """``truth, answer, count``: every pair of labels, zeros included."""
    pairs = connection.execute(
        "SELECT label AS truth, coalesce(predicted_label, 'no answer') AS answer, count(*) AS count "
        "FROM samples WHERE run_id = ? AND store = ? AND split = ? AND label IS NOT NULL GROUP BY ALL",
        [row.run_id, row.store, split],
    ).df()
    if pairs.empty:
        raise NoDataError("no sample has a label")
    classes = sorted(set(pairs["truth"]) | set(pairs["answer"]))
    truths = [name for name in classes if name != "no answer"]
    grid = pairs.pivot(index="truth", columns="answer", values="count")
    whole = grid.reindex(index=truths, columns=classes).fillna(0).astype(int)
    frame = whole.reset_index().melt("truth", classes, "answer", "count")
    frame["truth"] = pd.Categorical(frame["truth"], truths[::-1])
    frame["answer"] = pd.Categorical(frame["answer"], classes)
    return frame


def _edges(measure: Measure) -> tuple[float, float]:
    """The interval as drawn: neither joules nor scores go below zero; without one, the value itself."""
    value = measure.value or 0.0
    low, high = measure.low, measure.high
    if low is None or high is None or not math.isfinite(low) or not math.isfinite(high):
        return value, value
    return max(0.0, low), high


def _of_samples(
    connection: duckdb.DuckDBPyConnection, comparison: Comparison, column: str, condition: str, reason: str
) -> pd.DataFrame:
    split = comparison.facts["split"]
    frames = [
        connection.execute(
            f"SELECT {column}::DOUBLE AS value FROM samples "
            f"WHERE run_id = ? AND store = ? AND split = ? AND {condition}",
            [row.run_id, row.store, split],
        )
        .df()
        .assign(run=row.label)
        for row in comparison.rows
    ]
    held = [frame for frame in frames if not frame.empty]
    if not held:
        raise NoDataError(reason)
    return pd.concat(held, ignore_index=True)
