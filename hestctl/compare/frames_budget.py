"""Joules by sequence length as pandas frames: against E_max, and of profile runs."""

from __future__ import annotations

import duckdb
import pandas as pd

from hestctl.compare.frames import NoDataError, of_runs, ordered
from hestctl.compare.results import Comparison
from hestctl.settings import Scope

_GROUPS = 12
"""Groups of like lengths of which a line has a median each."""


def budget(connection: duckdb.DuckDBPyConnection, comparison: Comparison, scope: Scope) -> pd.DataFrame:
    """``configuration, tokens, joules, emax_j``: predicted joules of every sample in this scope."""
    frame = of_runs(
        connection,
        comparison,
        "(prompt_tokens + new_tokens)::DOUBLE AS tokens, scope_energy_j AS joules, emax_j::DOUBLE AS emax_j",
        "samples",
        "split = ? AND scope_energy_j IS NOT NULL",
        [comparison.facts["split"]],
    )
    if frame.empty:
        raise NoDataError("no sample has scope joules: run `hestctl calibrate` before training")
    counted = {row.config_label for row in comparison.rows if row.scope == scope}
    frame = frame[frame["configuration"].isin(counted)]
    if frame.empty:
        raise NoDataError(f"no run here has a budget of scope {scope}")
    return frame.assign(configuration=ordered(frame["configuration"], comparison))


def limits(budgets: pd.DataFrame) -> pd.DataFrame:
    """``configuration, tokens, joules``: E_max of each configuration over its range of lengths.

    One number for every length is a level line; otherwise medians over groups of like lengths
    between the shortest and the longest sample.
    """
    lines = []
    for label, part in budgets[budgets["emax_j"] > 0].groupby("configuration", observed=True):
        if part["emax_j"].nunique() == 1:
            ends = [float(part["tokens"].min()), float(part["tokens"].max())]
            line = pd.DataFrame({"tokens": ends, "joules": [float(part["emax_j"].iloc[0])] * 2})
        else:
            line = _medians(part, "emax_j")
        lines.append(line.assign(configuration=label))
    columns = ["configuration", "tokens", "joules"]
    return pd.concat(lines, ignore_index=True) if lines else pd.DataFrame(columns=columns)


def beside(budgets: pd.DataFrame, comparison: Comparison) -> pd.DataFrame:
    """``configuration, tokens, joules``: what TABS takes of the same scope, beside each other one."""
    present = list(budgets["configuration"].cat.categories)
    of_tabs = [row.config_label for row in comparison.rows if (row.method, row.role) == ("tabs", "baseline")]
    tabs = next((label for label in of_tabs if label in present), None)
    line = _medians(budgets[budgets["configuration"] == tabs], "joules")
    others = [label for label in present if label != tabs]
    none = line.iloc[0:0].assign(configuration=None)
    return pd.concat([none, *(line.assign(configuration=label) for label in others)])


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


def _medians(part: pd.DataFrame, column: str) -> pd.DataFrame:
    """``tokens, joules``: medians of ``column`` over groups of like lengths, and both ends."""
    rising = part[["tokens", column]].dropna().sort_values("tokens").rename(columns={column: "joules"})
    if rising["tokens"].nunique() < 2:
        return rising.iloc[0:0]
    groups = pd.qcut(rising["tokens"], _GROUPS, duplicates="drop")
    medians = rising.groupby(groups, observed=True).median()
    return pd.concat([rising.iloc[[0]], medians, rising.iloc[[-1]]], ignore_index=True)
