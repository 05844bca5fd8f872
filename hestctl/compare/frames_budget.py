"""Joules against E_max and by sequence length, as pandas frames."""

from __future__ import annotations

from typing import Final

import duckdb
import pandas as pd

from hestctl.compare.frames import NoDataError, of_runs, ordered
from hestctl.compare.results import Comparison

PREDICTED: Final = "predicted"
LENGTHS_DIFFER: Final = 1.5
"""Of the longest sample over the shortest: below, lengths tell nothing apart."""


def budget(connection: duckdb.DuckDBPyConnection, comparison: Comparison) -> pd.DataFrame:
    """``configuration, scope, kind, tokens, ratio``: joules over E_max, of configurations that have one.

    ``predicted``: what the energy table says of every sample, in the scope of its budget. In scope network
    also every generated batch by the meter, of the comparison's kind; in scope adapter the meter's joules are
    not those that the budget counts.
    """
    frame = of_runs(
        connection,
        comparison,
        "batch_index AS batch, (prompt_tokens + new_tokens)::DOUBLE AS tokens, "
        "scope_energy_j::DOUBLE AS scope_j, emax_j::DOUBLE AS emax_j, "
        "CASE WHEN energy_valid AND energy_kind = "
        f"'{comparison.energy_kind}' THEN energy_j END::DOUBLE AS energy_j",
        "samples",
        "split = ? AND scope_energy_j IS NOT NULL",
        [comparison.facts["split"]],
    )
    if frame.empty:
        raise NoDataError("no sample has scope joules: run `hestctl calibrate` before training")
    frame = frame[frame["emax_j"] > 0]
    if frame.empty:
        raise NoDataError("no run here has an E_max")
    scopes = {row.config_label: row.scope for row in comparison.rows}
    frame["scope"] = [scopes[str(label)] for label in frame["configuration"]]
    samples = frame.assign(kind=PREDICTED, ratio=frame["scope_j"] / frame["emax_j"])
    whole = frame[frame["scope"] == "network"].dropna(subset=["energy_j"])
    keys = ["configuration", "scope", "run_id", "batch"]
    sums = ["energy_j", "emax_j"]
    batches = whole.groupby(keys, observed=True).agg({"tokens": "mean", **dict.fromkeys(sums, "sum")})
    batches = batches.assign(kind=comparison.energy_kind, ratio=batches["energy_j"] / batches["emax_j"])
    found = pd.concat([samples, batches.reset_index()], ignore_index=True)
    found = found[["configuration", "scope", "kind", "tokens", "ratio"]]
    return found.assign(configuration=ordered(found["configuration"], comparison))


def lengths_differ(budgets: pd.DataFrame) -> bool:
    """Whether samples differ enough in length for a figure by length."""
    return bool(budgets["tokens"].max() >= LENGTHS_DIFFER * budgets["tokens"].min())


def uses(budgets: pd.DataFrame) -> pd.DataFrame:
    """``configuration, scope, kind, mean, worst``: joules over E_max of all samples or batches."""
    groups = budgets.groupby(["configuration", "scope", "kind"], observed=True)["ratio"]
    return groups.agg(mean="mean", worst="max").reset_index()


def length(connection: duckdb.DuckDBPyConnection, comparison: Comparison) -> pd.DataFrame:
    """``configuration, batch, tokens, joules``: whole joules of generation in profile runs."""
    runs = pd.DataFrame(
        [(one.run_id, one.store, one.label) for one in comparison.profile_runs],
        columns=["run_id", "store", "label"],
    )
    frame = connection.execute(
        "SELECT run_id, store, (prompt_tokens + new_tokens)::DOUBLE AS tokens, energy_j AS joules, "
        "'batch ' || batch_size AS batch FROM samples WHERE run_id IN (SELECT unnest(?::VARCHAR[])) "
        "AND energy_valid AND energy_kind = ? AND energy_j IS NOT NULL",
        [runs["run_id"].tolist(), comparison.energy_kind],
    ).df()
    if frame.empty:
        raise NoDataError("no profile run of these runs has joules: `hestctl profile` measures by length")
    of_row = {row.label: row.config_label for row in comparison.rows}
    frame = frame.merge(runs, on=["run_id", "store"])
    labels = frame["label"].map(of_row)
    return frame.assign(configuration=ordered(labels, comparison)).drop(columns=["store", "label"])
