"""Questions to one store, and a connection over several for comparisons."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hestctl.errors import Exit, HestError
from hestctl.records import Run, RunStatus
from hestctl.store.database import attach_snapshot, in_memory, load_copy
from hestctl.store.finding import demand_store, find_stores
from hestctl.store.index import TABLES, take_runs
from hestctl.store.lock import StoreLock
from hestctl.store.store import Store

if TYPE_CHECKING:
    import duckdb
    from duckdb import DuckDBPyConnection


def get_run(store: Store, run_id: str) -> Run:
    """The run with this id.

    Raises HestError (usage) that names the nearest ids when there is none, or the stores nearby when there
    is no store.
    """
    demand_store(store.db)
    with store.reading() as con:
        runs = take_runs(con, "SELECT * FROM runs WHERE run_id = ?", [run_id])
        if runs:
            return runs[0]
    ids = run_ids(store)
    near = difflib.get_close_matches(run_id, ids, n=3, cutoff=0.5) or ids[:3]
    hint = f"the nearest are: {', '.join(near)}" if near else "the store has no runs"
    raise HestError(f"there is no run {run_id!r} in {store.db}", hint, Exit.USAGE)


def run_ids(store: Store) -> list[str]:
    """The ids of all runs, the newest first."""
    with store.reading() as con:
        found = con.execute("SELECT run_id FROM runs ORDER BY created_at DESC, run_id DESC").fetchall()
    return [run_id for (run_id,) in found]


def runs_like(store: Store, part: str) -> list[Run]:
    """The runs whose id holds ``part``, the newest first. Raises HestError (usage) without a store."""
    demand_store(store.db)
    query = "SELECT * FROM runs WHERE contains(run_id, ?) ORDER BY created_at DESC, run_id DESC"
    with store.reading() as con:
        return take_runs(con, query, [part])


def list_runs(
    store: Store,
    *,
    command: str | None = None,
    method: str | None = None,
    status: RunStatus | None = None,
    has_plan: bool | None = None,
    limit: int | None = None,
) -> list[Run]:
    """The runs that match everything given, the newest first; none where there is no store."""
    where, values = _conditions(command, method, status, has_plan)
    query = f"SELECT * FROM runs WHERE {where} ORDER BY created_at DESC, run_id DESC LIMIT ?"
    with store.reading() as con:
        return take_runs(con, query, [*values, limit])


def count_runs(store: Store, *, command: str | None = None, method: str | None = None) -> int:
    """How many runs match everything given."""
    where, values = _conditions(command, method)
    with store.reading() as con:
        return int(con.execute(f"SELECT count(*) FROM runs WHERE {where}", values).fetchall()[0][0])


def _conditions(
    command: str | None,
    method: str | None,
    status: RunStatus | None = None,
    has_plan: bool | None = None,
) -> tuple[str, list[str | int | None]]:
    conditions = ["true"]
    values: list[str | int | None] = []
    for column, value in (("command", command), ("method", method), ("status", status)):
        if value is not None:
            conditions.append(f"{column} = ?")
            values.append(value)
    if has_plan is not None:
        conditions.append(f"run_id {'IN' if has_plan else 'NOT IN'} (SELECT run_id FROM plans)")
    return " AND ".join(conditions), values


def latest_run(
    store: Store,
    *,
    command: str | None = None,
    method: str | None = None,
    status: RunStatus | None = "finished",
    has_plan: bool | None = None,
) -> Run | None:
    """The newest run that matches everything given, or None."""
    runs = list_runs(store, command=command, method=method, status=status, has_plan=has_plan, limit=1)
    return runs[0] if runs else None


def latest_calibration(store: Store, key: str, *, prefix: bool = False) -> dict[str, Any] | None:
    """The newest calibration document recorded under ``key``, or under one that begins so; or None."""
    where = "starts_with(key, ?)" if prefix else "key = ?"
    query = f"SELECT document FROM calibrations WHERE {where} ORDER BY created_at DESC, run_id DESC LIMIT 1"
    with store.reading() as con:
        found = con.execute(query, [key]).fetchone()
    return None if found is None else dict(json.loads(found[0]))


def calibration(store: Store, calibration_id: str) -> dict[str, Any] | None:
    """The calibration document with this id, or None."""
    query = "SELECT document FROM calibrations WHERE calibration_id = ? LIMIT 1"
    with store.reading() as con:
        found = con.execute(query, [calibration_id]).fetchone()
    return None if found is None else dict(json.loads(found[0]))


@contextmanager
def connect(paths_or_globs: Sequence[str], lock_timeout_s: float = 30.0) -> Iterator[DuckDBPyConnection]:
    """A connection with a view of each table over all the stores named, as they are at this moment.

    The views have one more column, ``store``: the file's name, with as much of its path as tells it
    from the others. An id that different runs have reads ``run_id@store``; a run that was copied from store
    to store is there once. Nothing of the files stays open: others record while the block runs. Raises
    HestError: usage for a store that does not exist, store for one that is locked for ``lock_timeout_s``
    seconds, newer or damaged, even if only a question in the block comes upon the damage.
    """
    import duckdb

    files = find_stores(paths_or_globs)
    with in_memory() as con:
        for number, file in enumerate(files):
            with StoreLock(file, lock_timeout_s).held(read_only=True):
                attach_snapshot(con, file, _database(number), lock_timeout_s)
        try:
            _create_views(con, _names(files))
            yield con
        except duckdb.Error as error:
            _demand_undamaged(files, lock_timeout_s, error)
            raise


def _demand_undamaged(files: Sequence[Path], lock_timeout_s: float, error: duckdb.Error) -> None:
    """Read every store whole: DuckDB's own message names the damaged block, but not the file."""
    for file in files:
        with in_memory() as con, StoreLock(file, lock_timeout_s).held(read_only=True):
            try:
                load_copy(con, file, "whole", lock_timeout_s)
            except HestError as damage:
                raise damage from error


def _names(files: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths, without suffix, that tell them apart."""
    names = []
    for file in files:
        parts, length = file.with_suffix("").parts, 1
        others = [other.with_suffix("").parts for other in files if other != file]
        while length < len(parts) and any(other[-length:] == parts[-length:] for other in others):
            length += 1
        names.append("/".join(parts[-length:]))
    return names


def _create_views(con: DuckDBPyConnection, names: Sequence[str]) -> None:
    held = " UNION ALL ".join(
        f"SELECT {number} AS number, run_id, created_at, status FROM {_database(number)}.runs"
        for number in range(len(names))
    )
    con.execute(f"CREATE TABLE held AS {held}")
    con.execute(
        "CREATE TABLE shared AS SELECT run_id FROM held GROUP BY run_id HAVING count(DISTINCT created_at) > 1"
    )
    # Of a run's copies the finished one tells most: the others may be older than its end.
    con.execute(
        "CREATE TABLE copies AS SELECT number, run_id FROM held QUALIFY row_number() OVER "
        "(PARTITION BY run_id, created_at ORDER BY (status = 'finished') DESC, number) > 1"
    )
    any_shared = con.execute("SELECT count(*) > 0 FROM shared").fetchall()[0][0]
    with_copies = {number for (number,) in con.execute("SELECT DISTINCT number FROM copies").fetchall()}
    for table in TABLES:
        parts = []
        for number, name in enumerate(names):
            # As a constant, so that a question about one store leaves the others unread.
            store = "'" + name.replace("'", "''") + "'"
            columns = "t.*"
            if any_shared:
                replaced = ("run_id", "parent_run_id") if table == "runs" else ("run_id",)
                columns += f" REPLACE ({', '.join(_qualified(column, store) for column in replaced)})"
            part = f"SELECT {store} AS store, {columns} FROM {_database(number)}.{table} AS t"
            if number in with_copies:
                part += f" WHERE t.run_id NOT IN (SELECT run_id FROM copies WHERE number = {number})"
            parts.append(part)
        con.execute(f"CREATE VIEW {table} AS {' UNION ALL BY NAME '.join(parts)}")


def _qualified(column: str, store: str) -> str:
    return (
        f"CASE WHEN t.{column} IN (SELECT run_id FROM shared) THEN t.{column} || '@' || {store} "
        f"ELSE t.{column} END AS {column}"
    )


def _database(number: int) -> str:
    return f"store_{number}"
