"""The data of the figures as pandas frames, or why there is none; nothing here draws.

A frame has a row a configuration, its seeds joined, in the order of print; where it has single runs or
samples, ``configuration`` says whose they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

import duckdb
import pandas as pd

from hestctl.compare.configurations import configurations
from hestctl.compare.results import PRIMARY, Comparison
from hestctl.compare.statistics import Measure, absent

ADAPTIVE: Final = ("hest", "tabs", "bhsp")
"""Methods whose adapters have directions."""
VERDICTS: Final = ("not inferior", "inconclusive", "inferior")
"""What may be said of quality, in the order in which it is shown."""
FAR_MARGINS: Final = 5
"""Beyond so many margins of lost quality a saving is no offer."""


class NoDataError(Exception):
    """Why a topic has no data."""


def edges(measure: Measure) -> tuple[float, float]:
    """The interval as drawn: neither joules nor scores go below zero; without one, the value itself."""
    value = measure.value or 0.0
    low, high = measure.low, measure.high
    if low is None or high is None or not math.isfinite(low) or not math.isfinite(high):
        return value, value
    return max(0.0, low), high


def ordered(labels: Iterable[object], comparison: Comparison) -> pd.Categorical[Any]:
    """Labels of configurations in the order of print, those without a row left out."""
    named = [str(label) for label in labels]
    present = set(named)
    return pd.Categorical(
        named, [one.label for one in configurations(comparison.rows) if one.label in present]
    )


def of_runs(
    connection: duckdb.DuckDBPyConnection,
    comparison: Comparison,
    columns: str,
    table: str,
    where: str = "true",
    values: Sequence[object] = (),
) -> pd.DataFrame:
    """``run_id, configuration`` and ``columns`` of the rows of ``table`` that the comparison's runs have.

    One query for all runs; ``columns`` and ``where`` are SQL, ``values`` are bound in ``where``.
    """
    runs = pd.DataFrame(
        [(row.run_id, row.store, row.config_label) for row in comparison.rows],
        columns=["run_id", "store", "configuration"],
    )
    frame = connection.execute(
        f"SELECT run_id, store, {columns} FROM {table} "
        f"WHERE run_id IN (SELECT unnest(?::VARCHAR[])) AND {where}",
        [runs["run_id"].tolist(), *values],
    ).df()
    # Without rows DuckDB names no types, and text would not meet text.
    keys = {"run_id": str, "store": str}
    frame = frame.astype(keys).merge(runs.astype(keys), on=["run_id", "store"]).drop(columns="store")
    return frame.assign(configuration=ordered(frame["configuration"], comparison))


def energy(comparison: Comparison) -> pd.DataFrame:
    """``configuration, joules, low, high, verdict, points, points_low, points_high``, not inferior first.

    ``verdict`` and ``points`` (NaN where there are none) set its quality beside the best baseline's. Within
    a verdict the least mean joules per sample come first.
    """
    known: list[list[object]] = []
    reasons = []
    for one in configurations(comparison.rows):
        spent = one.measure(PRIMARY)
        if spent.value is None:
            reasons.append(spent.reason or "no joules")
            continue
        verdict = comparison.equal_quality.get(one.label, "inconclusive")
        score = comparison.quality_differences.get(one.label, absent("there is no baseline"))
        points = [math.nan] * 3
        if score.value is not None:
            points = [score.value, *(score.value if end is None else end for end in (score.low, score.high))]
        known.append([one.label, spent.value, *edges(spent), verdict, *points])
    if not known:
        raise NoDataError(reasons[0])
    frame = pd.DataFrame(
        known,
        columns=["configuration", "joules", "low", "high", "verdict", "points", "points_low", "points_high"],
    )
    frame["verdict"] = pd.Categorical(frame["verdict"], VERDICTS, ordered=True)
    return frame.sort_values(["verdict", "joules"], kind="stable", ignore_index=True)


def front(comparison: Comparison) -> pd.DataFrame:
    """``configuration, x, x_low, x_high, y, y_low, y_high, far, best``: joules per sample, quality in points.

    ``far``: shown to be worse than the best baseline by more than ``FAR_MARGINS`` margins. ``best``: of the
    others none has both fewer joules and a higher score.
    """
    found: list[list[object]] = []
    reason = "no values"
    for one in configurations(comparison.rows):
        spent, score = one.measure(PRIMARY), one.measure(comparison.quality_metric)
        if spent.value is None or score.value is None:
            lacking = spent if spent.value is None else score
            reason = lacking.reason or reason
            continue
        beside = comparison.quality_differences.get(one.label, absent("there is no baseline"))
        far = beside.high is not None and beside.high < -FAR_MARGINS * comparison.margin_points
        found.append([one.label, spent.value, *edges(spent), score.value, *edges(score), far])
    if not found:
        raise NoDataError(reason)
    columns = ["configuration", "x", "x_low", "x_high", "y", "y_low", "y_high", "far"]
    frame = pd.DataFrame(found, columns=columns)
    if frame["far"].all():
        frame["far"] = False
    rising = frame[~frame["far"]].sort_values(["x", "y"], ascending=[True, False])
    highest = rising["y"].cummax().shift(fill_value=-math.inf)
    return frame.assign(best=(rising["y"] > highest).reindex(frame.index, fill_value=False))


def front_seeds(comparison: Comparison) -> pd.DataFrame:
    """``configuration, x, y``: the runs of configurations that have several."""
    found = [
        (one.label, row.measure(PRIMARY).value, row.measure(comparison.quality_metric).value)
        for one in configurations(comparison.rows)
        for row in one.rows
        if len(one.rows) > 1
    ]
    return pd.DataFrame(found, columns=["configuration", "x", "y"]).dropna()


def joules(connection: duckdb.DuckDBPyConnection, comparison: Comparison) -> pd.DataFrame:
    """``run_id, configuration, value, size``: mean valid joules a sample of every generated batch.

    The meter sees a batch, and no sample of it. Joules are of the comparison's kind.
    """
    reasons = [row.measure(PRIMARY).reason for row in comparison.rows]
    return _of_batches(
        connection,
        comparison,
        "energy_j",
        f"energy_valid AND energy_kind = '{comparison.energy_kind}' AND energy_j IS NOT NULL",
        next(filter(None, reasons), "no joules"),
    )


def latency(connection: duckdb.DuckDBPyConnection, comparison: Comparison) -> pd.DataFrame:
    """``run_id, configuration, value, size``: wall seconds of every generated batch."""
    return _of_batches(connection, comparison, "latency_s", "isfinite(latency_s)", "no latency was recorded")


def parts(connection: duckdb.DuckDBPyConnection, comparison: Comparison) -> tuple[pd.DataFrame, list[str]]:
    """``configuration, panel, part, joules``, and what is left out and why: parts of mean joules per sample.

    By phase: prefill and decode, as apportioned. By cause: idle draw (gross less net), the adapters'
    directions (predicted: states times prices of the energy table), and the rest.
    """
    directions = _direction_joules(connection, comparison)
    found: list[tuple[str, str, str, float]] = []
    lacking: dict[str, list[str]] = {}
    for one in configurations(comparison.rows):
        gross = one.measure(PRIMARY)
        if gross.value is None:
            lacking.setdefault(gross.reason or "no joules", []).append(one.label)
            continue
        prefill, decode = one.measure("prefill_j_per_sample"), one.measure("decode_j_per_sample")
        if prefill.value is None or decode.value is None:
            reason = prefill.reason or decode.reason or "phases were not told apart"
            lacking.setdefault(reason, []).append(one.label)
        else:
            found += [
                (one.label, "by phase", "prefill", prefill.value),
                (one.label, "by phase", "decode", decode.value),
            ]
        net = one.measure("energy_net_j_per_sample")
        if net.value is None:
            lacking.setdefault("idle draw: the meter does not know it", []).append(one.label)
            continue
        found.append((one.label, "by cause", "idle", gross.value - net.value))
        adapters = directions.get(one.label)
        if adapters is not None:
            found.append((one.label, "by cause", "directions", adapters))
        elif one.method in ADAPTIVE:
            lacking.setdefault("directions: no log of states, or no plan with prices", []).append(one.label)
        found.append((one.label, "by cause", "all else", max(0.0, net.value - (adapters or 0.0))))
    every = len(configurations(comparison.rows))
    told = [
        f"{reason} ({'all' if len(labels) == every else ', '.join(labels)})"
        for reason, labels in lacking.items()
    ]
    if not found:
        raise NoDataError("; ".join(lacking))
    frame = pd.DataFrame(found, columns=["configuration", "panel", "part", "joules"])
    return (
        frame.assign(
            configuration=ordered(frame["configuration"], comparison),
            panel=pd.Categorical(frame["panel"], ["by phase", "by cause"]),
        ),
        told,
    )


def _direction_joules(connection: duckdb.DuckDBPyConnection, comparison: Comparison) -> dict[str, float]:
    """Mean joules per sample of the adapters' directions, predicted by the prices of the plans."""
    prices = connection.execute(
        "SELECT run_id, store, (document->>'$.costs_j[1]')::DOUBLE AS int8_j, "
        "(document->>'$.costs_j[2]')::DOUBLE AS full_j FROM plans"
    ).df()
    counts = of_runs(
        connection,
        comparison,
        "store AS place, directions_int8::DOUBLE AS int8, directions_full::DOUBLE AS full",
        "samples",
        "split = ? AND directions_full IS NOT NULL",
        [comparison.facts["split"]],
    )
    if prices.empty or counts.empty:
        return {}
    both = counts.merge(prices, left_on=["run_id", "place"], right_on=["run_id", "store"])
    both["joules"] = both["int8"] * both["int8_j"] + both["full"] * both["full_j"]
    runs = both.groupby(["configuration", "run_id"], observed=True)["joules"].mean()
    means = runs.groupby("configuration", observed=True).mean()
    return {str(label): float(joules) for label, joules in means.items()}


def _of_batches(
    connection: duckdb.DuckDBPyConnection, comparison: Comparison, column: str, condition: str, reason: str
) -> pd.DataFrame:
    frame = of_runs(
        connection,
        comparison,
        f"batch_index AS batch, {column}::DOUBLE AS value, batch_size::INT AS size",
        "samples",
        f"split = ? AND {condition}",
        [comparison.facts["split"]],
    )
    if frame.empty:
        raise NoDataError(reason)
    batches = frame.groupby(["configuration", "run_id", "batch"], observed=True)
    return batches.agg(value=("value", "mean"), size=("size", "max")).reset_index().drop(columns="batch")
