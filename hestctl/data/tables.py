"""Rows with named columns, whatever they were read from, checked and turned into examples."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hestctl.data.examples import Example
from hestctl.errors import Exit, HestError

_NAMED = 5
"""How many offenders one message names."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns hold what; without ``id`` rows are numbered, and ``labelled`` answers are classes."""

    text: str
    answer: str
    id: str | None
    labelled: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows not yet read: ``where`` they are, what a row's number counts, and the columns' names."""

    where: str
    unit: str
    names: tuple[str, ...]
    records: Iterator[tuple[int, Mapping[str, object]]]


def read_examples(table: Table, columns: Columns, *, prefix: str) -> Iterator[Example]:
    """The table's examples in order; rows without an id column are called ``prefix-number``.

    Raises HestError (usage) that names the place and the column for a column that is missing or named
    twice, a cell that is empty, not text or not valid Unicode, and for ids that occur twice.
    """
    wanted = [name for name in (columns.text, columns.answer, columns.id) if name is not None]
    for name in wanted:
        _check_column(table.where, name, table.names)
    seen: dict[str, int] = {}
    repeated: dict[str, tuple[int, int]] = {}
    for number, record in table.records:
        place = f"{table.where}, {table.unit} {number}"
        for name in wanted:
            _check_column(place, name, tuple(record))
        if columns.id is None:
            sample_id = f"{prefix}-{number}"
        else:
            sample_id = _cell(record, columns.id, place, numbers=True)
        if sample_id in seen:
            repeated.setdefault(sample_id, (seen[sample_id], number))
        seen.setdefault(sample_id, number)
        text = _cell(record, columns.text, place)
        answer = _cell(record, columns.answer, place, numbers=columns.labelled)
        if repeated:  # the rest of the file is read for the sake of the message alone
            continue
        if columns.labelled:
            yield Example(sample_id, text, answer, answer)
        else:
            yield Example(sample_id, text, one_a_line(answer))
    if repeated:
        found = [f"'{name}' ({table.unit}s {one} and {two})" for name, (one, two) in repeated.items()]
        raise HestError(
            f"{table.where}: duplicate ids: {few(found)}",
            "give every row an id of its own, or leave the id column out",
            Exit.USAGE,
        )


def one_a_line(summary: str) -> str:
    """The summary's lines without blank ones and outer spaces."""
    return "\n".join(line.strip() for line in summary.splitlines() if line.strip())


def few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def nearest(word: str, known: Sequence[str]) -> str:
    """``; did you mean '...'?``, or nothing where no known word is near (case ignored)."""
    by_lower = {name.lower(): name for name in known}
    match = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f"; did you mean '{by_lower[match[0]]}'?" if match else ""


def _check_column(place: str, name: str, names: tuple[str, ...]) -> None:
    if names.count(name) == 1:
        return
    if name in names:
        raise HestError(f"{place}: two columns are called '{name}'", "rename one of them", Exit.USAGE)
    raise HestError(
        f"{place}: no column '{name}'{nearest(name, names)} (columns: {few(names) or 'none'})",
        "name the columns with data.article_column, data.summary_column and data.id_column",
        Exit.USAGE,
    )


def _cell(record: Mapping[str, object], column: str, place: str, *, numbers: bool = False) -> str:
    """The cell as text, outer spaces taken off; whole numbers pass where ``numbers`` says so."""
    value = record[column]
    if numbers and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        kind = "nothing" if value is None else f"a value of type {type(value).__name__}"
        raise HestError(f"{place}: column '{column}' holds {kind}, not text", "mend that row", Exit.USAGE)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"half a surrogate pair ({value[error.start]!r})"
        raise HestError(f"{place}: column '{column}' holds {what}", "mend that row", Exit.USAGE) from None
    text = value.strip()
    if not text:
        raise HestError(f"{place}: column '{column}' is empty", "fill it in or drop the row", Exit.USAGE)
    return text
