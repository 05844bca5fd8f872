"""Puts a run's folder into the database and takes Run records out. Callers own the transaction.

Values are bound; only names of tables and columns, which are ours, are part of the SQL text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hestctl.errors import HestError
from hestctl.records import Run
from hestctl.store.files import to_json
from hestctl.store.folder import LINE_TABLES, Document, LineTable, RunFolder, run_fields

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

TABLES = ("runs", *LINE_TABLES, "calibrations", "plans")

RUN_JSON = ("settings", "versions", "summary")
"""The fields of a Run that the database keeps as JSON text."""

# A line that has lost this field is damaged: every record has it.
_NEEDED: Mapping[LineTable, str] = {
    "steps": "step",
    "samples": "sample_id",
    "windows": "name",
    "utilisation": "layer",
    "trials": "number",
}

# The documents with a table, and the fields that are columns there, beside the document itself.
_DOCUMENTS: Mapping[str, tuple[Document, tuple[str, ...]]] = {
    "plans": ("plan", ("created_at", "scope", "emax_j")),
    "calibrations": (
        "calibration",
        ("calibration_id", "created_at", "device_uuid", "device_name", "kind", "key"),
    ),
}


def put_run(con: DuckDBPyConnection, run: Run) -> None:
    """Insert or replace the row of a run."""
    # Through JSON, so that the row says what run.json says, whatever the fields were filled with.
    row = json.loads(to_json(run_fields(run)))
    row |= {name: to_json(row[name]) for name in RUN_JSON}
    con.execute("DELETE FROM runs WHERE run_id = ?", [run.run_id])
    _insert(con, "runs", row)


def put_folder(con: DuckDBPyConnection, folder: RunFolder) -> int:
    """Replace all rows of a run by what its folder says; returns the lines that could not be read.

    Raises HestError (store) when ``run.json`` cannot be read, having changed nothing.
    """
    run = folder.read_run()
    put_run(con, run)
    lost = sum(_put_lines(con, folder, table) for table in LINE_TABLES)
    for table, (name, columns) in _DOCUMENTS.items():
        lost += _put_document(con, folder, table, name, columns)
    return lost


def take_runs(con: DuckDBPyConnection, query: str, values: list[Any]) -> list[Run]:
    """The Run records of a query that selects the columns of ``runs``."""
    cursor = con.execute(query, values)
    names = [column[0] for column in cursor.description or []]
    runs = []
    for values_of_row in cursor.fetchall():
        row = dict(zip(names, values_of_row, strict=True))
        runs.append(Run(**row | {name: json.loads(row[name] or "{}") for name in RUN_JSON}))
    return runs


def row_counts(con: DuckDBPyConnection) -> dict[tuple[str, str], int]:
    """How many rows each run has in each table that is made of lines: (table, run_id) -> rows."""
    counts: dict[tuple[str, str], int] = {}
    for table in LINE_TABLES:
        for run_id, rows in con.execute(f"SELECT run_id, count(*) FROM {table} GROUP BY run_id").fetchall():
            counts[table, run_id] = rows
    return counts


def _put_lines(con: DuckDBPyConnection, folder: RunFolder, table: LineTable) -> int:
    con.execute(f"DELETE FROM {table} WHERE run_id = ?", [folder.run_id])
    path = folder.lines_path(table)
    lines = _count_lines(path)
    if lines == 0:
        return 0
    columns = dict(
        con.execute(
            "SELECT column_name, data_type FROM duckdb_columns() "
            "WHERE database_name = current_database() AND table_name = ? AND column_name <> 'run_id'",
            [table],
        ).fetchall()
    )
    # DuckDB reads 100,000 lines in 0.2 s, Python would take longer to parse them. A line that cannot
    # be read comes back as NULLs.
    inserted = con.execute(
        f"INSERT INTO {table} BY NAME SELECT CAST(? AS VARCHAR) AS run_id, * "
        "FROM read_json(?, format = 'newline_delimited', ignore_errors = true, hive_partitioning = false, "
        f"columns = ?) WHERE {_NEEDED[table]} IS NOT NULL",
        [folder.run_id, _one_file(path), columns],
    ).fetchall()[0][0]
    return lines - int(inserted)


def _put_document(
    con: DuckDBPyConnection, folder: RunFolder, table: str, name: Document, columns: tuple[str, ...]
) -> int:
    con.execute(f"DELETE FROM {table} WHERE run_id = ?", [folder.run_id])
    try:
        document = folder.read_document(name)
    except HestError:
        return 1
    if document is None:
        return 0
    row = {column: document.get(column) for column in columns}
    _insert(con, table, row | {"run_id": folder.run_id, "document": to_json(document)})
    return 0


def _insert(con: DuckDBPyConnection, table: str, row: Mapping[str, Any]) -> None:
    marks = ", ".join("?" * len(row))
    con.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", list(row.values()))


def _count_lines(path: Path) -> int:
    """Lines of the file, an unfinished last one included."""
    if not path.exists():
        return 0
    lines, last = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            lines += block.count(b"\n")
            last = block[-1:]
    return lines + (last != b"\n")


def _one_file(path: Path) -> str:
    """The path as a pattern that matches this file alone: DuckDB reads '*' and the like as wildcards."""
    return re.sub(r"([*[])", r"[\1]", str(path))
