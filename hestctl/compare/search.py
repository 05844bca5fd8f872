"""One search as the store has it: its trials as rows, as a table, and as a document."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import duckdb

from hestctl.compare.reading import read_runs
from hestctl.compare.text import TextTable, number
from hestctl.errors import Exit, HestError
from hestctl.records import Run

COLUMNS: Final = (
    "number", "state", "value", "feasible", "score", "energy_j", "energy_kind", "duration_s", "params",
    "trial_run_id", "worker", "error",
)  # fmt: skip


def find_search(connection: duckdb.DuckDBPyConnection, run_id: str) -> Run:
    """The search with this id. Raises HestError (usage) that names the latest searches."""
    searches = {run.run_id: run for run, _ in read_runs(connection, ("search",))}
    if run_id not in searches:
        latest = list(searches)[::-1][:3]
        hint = f"the latest are: {', '.join(latest)}" if latest else "begin one: hestctl train --trials 20"
        raise HestError(f"there is no search {run_id!r}", hint, Exit.USAGE)
    return searches[run_id]


def trials(connection: duckdb.DuckDBPyConnection, run_id: str) -> list[dict[str, Any]]:
    """The trials that were tried, the first one first: the columns of the store, ``params`` a mapping.

    Those that were interrupted are left out: their settings were tried again, or will be.
    """
    found = connection.execute(
        f"SELECT {', '.join(COLUMNS)} FROM trials WHERE run_id = ? AND state <> 'interrupted' "
        "ORDER BY number",
        [run_id],
    ).fetchall()
    rows = [dict(zip(COLUMNS, values, strict=True)) for values in found]
    return [{**row, "params": json.loads(row["params"])} for row in rows]


def trial_table(run: Run, rows: Sequence[Mapping[str, Any]]) -> TextTable:
    """The trials for a reader; the best one has a star."""
    goal = run.summary.get("search", {})
    kind = goal.get("joules", "predicted")
    # What was the same in every trial was not searched.
    varied = (
        [key for key in rows[0]["params"] if len({row["params"].get(key) for row in rows}) > 1]
        if rows
        else []
    )
    headers = ("trial", "outcome", "settings", str(goal.get("quality", "score")), f"J a sample {kind}", "min")
    table = tuple(
        (
            f"{row['number'] + 1}{' *' if row['number'] == run.summary.get('best_trial') else ''}",
            row["state"] if row["state"] != "complete" or row["feasible"] else "below baseline",
            ", ".join(f"{key.split('.')[-1]} {_short(row['params'][key])}" for key in varied),
            *(_figure(row[name]) for name in ("score", "energy_j")),
            "-" if row["duration_s"] is None else f"{row['duration_s'] / 60:.1f}",
        )
        for row in rows
    )
    notes = ["* the best, which was trained again"] if "best_trial" in run.summary else []
    if goal.get("floor_points") is not None:
        notes.append(f"the baseline's score: {goal['floor_points']:.2f} points, by {goal['reference']}")
    if run.weights == "random":
        notes.append("random weights: scores say nothing of quality")
    return TextTable(f"{run.run_id}: {len(table)} trials, {run.status}", headers, table, tuple(notes))


def search_document(run: Run, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The search as JSON: what it held trials to, which was best, what mattered, and every trial."""
    return {
        "run_id": run.run_id,
        "method": run.method,
        "status": run.status,
        **run.summary.get("search", {}),
        "best_trial": run.summary.get("best_trial"),
        "importance": run.summary.get("importance"),
        "trials": [dict(row) for row in rows],
    }


def _figure(value: float | None) -> str:
    return "-" if value is None else number(value)


def _short(value: object) -> str:
    return number(value) if isinstance(value, float) else str(value)
