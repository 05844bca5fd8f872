"""JSON lines, CSV, TSV and Parquet as tables, plain or gzipped. Data is only parsed, never executed."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from hestctl.data.tables import Columns, Table, nearest
from hestctl.errors import Exit, HestError

KINDS = ("jsonl", "csv", "tsv", "parquet")

_CELL_CHARACTERS = 1 << 27
"""The csv module's own limit of 131,072 characters is below a long article."""

_Records = Iterator[tuple[int, Mapping[str, object]]]


def kind_of(path: Path) -> str | None:
    """One of ``KINDS`` by the file's name, ``.gz`` set aside; None for anything else."""
    name = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    kind = name.suffix.lower().removeprefix(".")
    return kind if kind in KINDS else None


def open_table(path: Path) -> Table:
    """The rows of ``path``, read as they are asked for.

    Raises HestError (usage), here or while rows are read, for a missing or unreadable file, a kind that
    is not supported, bytes that are not UTF-8, and a malformed line; it names the file and the line.
    """
    kind = kind_of(path)
    if not path.is_file():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise HestError(f"no file at {path}{nearest(path.name, siblings)}", "check the path", Exit.USAGE)
    if kind is None:
        raise HestError(
            f"{path} is not a kind of file that is read",
            "give .jsonl, .csv, .tsv or .parquet, plain or with .gz added",
            Exit.USAGE,
        )
    if kind == "parquet":
        return _parquet(path)
    return _json_lines(path) if kind == "jsonl" else _csv(path, "\t" if kind == "tsv" else ",")


def count_rows(path: Path) -> int:
    """How many rows the file has, by as little reading as its kind allows; none of them is checked.

    Raises HestError (usage) as ``open_table`` does.
    """
    table = open_table(path)
    kind = kind_of(path)
    if kind == "jsonl":
        with _open(path) as stream:
            return sum(1 for line in stream if line.strip())
    if kind == "parquet":
        return int(_open_parquet(path).metadata.num_rows)
    return sum(1 for _ in table.records)


def columns_present(table: Table, columns: Columns) -> bool:
    """Whether the table has the text and the answer column."""
    return columns.text in table.names and columns.answer in table.names


def _bad(place: str, what: str, hint: str = "mend or drop that line") -> HestError:
    return HestError(f"{place}: {what}", hint, Exit.USAGE)


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with _open(path) as stream:
            for number, raw in enumerate(stream, start=1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    what = f"byte 0x{raw[error.start]:02x} at offset {error.start} is not UTF-8"
                    raise _bad(f"{path}, line {number}", what, "save the file as UTF-8") from None
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise _bad(str(path), f"cannot be read: {error}", "check the file") from None


def _json_lines(path: Path) -> Table:
    records = _json_records(path)
    first = next(records, None)
    if first is None:
        raise _bad(str(path), "holds no rows", "give a file with samples in it")
    return Table(str(path), "line", tuple(first[1]), itertools.chain([first], records))


def _json_records(path: Path) -> _Records:
    for number, line in _lines(path):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise _bad(place, f"not valid JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:
            raise _bad(place, f"not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise _bad(place, f"a JSON object is expected, not {type(record).__name__}")
        yield number, record


def _csv(path: Path, delimiter: str) -> Table:
    csv.field_size_limit(_CELL_CHARACTERS)
    rows = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)

    def next_row() -> tuple[str, list[str] | None]:
        place = f"{path}, line {rows.line_num + 1}"
        try:
            return place, next(rows, None)
        except csv.Error as error:
            raise _bad(place, f"not valid CSV: {error}") from None

    def records() -> _Records:
        while True:
            number = rows.line_num + 1
            place, row = next_row()
            if row is None:
                return
            if row and len(row) != len(names):
                raise _bad(place, f"{len(row)} cells, but the header has {len(names)}")
            if row:
                yield number, dict(zip(names, row, strict=True))

    names = tuple(next_row()[1] or ())
    if not names:
        raise _bad(str(path), "holds no rows", "give a file with a header and samples in it")
    return Table(str(path), "line", names, records())


def _open_parquet(path: Path) -> Any:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        with _open(path) as stream:
            source = pyarrow.BufferReader(stream.read()) if path.suffix.lower() == ".gz" else str(path)
        return parquet.ParquetFile(source)
    except (pyarrow.ArrowException, OSError, EOFError, zlib.error) as error:
        raise _bad(str(path), f"cannot be read: {error}", "check the file") from None


def _parquet(path: Path) -> Table:
    import pyarrow

    opened = _open_parquet(path)

    def records() -> _Records:
        number = 0
        try:
            for batch in opened.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _bad(str(path), f"cannot be read after row {number}: {error}", "check the file") from None

    return Table(str(path), "row", tuple(opened.schema_arrow.names), records())
