"""From the store's views to runs and their samples; one question for all runs, however many there are."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Final

import duckdb
import numpy as np

from hestctl.compare.loading import Loaded, Samples
from hestctl.compare.statistics import FloatArray
from hestctl.records import Run

_JSON_FIELDS: Final = ("settings", "versions", "summary")
_METERED: Final = ("energy_j", "energy_net_j", "energy_error_j", "prefill_j", "decode_j")
_PLAIN: Final = (
    "prompt_tokens", "new_tokens", "batch_size", "latency_s", "scope_energy_j", "emax_j",
    "rouge1", "rouge2", "rouge_l", "rouge_lsum", "nll", "answer_tokens",
)  # fmt: skip
_COLUMNS: Final = (*_METERED, *_PLAIN, "correct")
_PORTION: Final = 250_000
"""Samples read at a time, but never less than a run."""


def read_runs(connection: duckdb.DuckDBPyConnection, commands: Sequence[str]) -> list[tuple[Run, str]]:
    """Runs of ``commands`` with their stores, oldest first; a run that two stores hold comes once."""
    cursor = connection.execute(
        "SELECT * REPLACE (CAST(created_at AS VARCHAR) AS created_at, "
        "CAST(finished_at AS VARCHAR) AS finished_at) FROM runs WHERE list_contains(?, command) "
        "ORDER BY created_at, run_id, store",
        [list(commands)],
    )
    names = [column[0] for column in cursor.description or ()]
    known = {field.name for field in fields(Run)}
    runs: dict[str, tuple[Run, str]] = {}
    for values in cursor.fetchall():
        row: dict[str, Any] = dict(zip(names, values, strict=True))
        store = str(row["store"])
        for name in _JSON_FIELDS:
            row[name] = _mapping(row.get(name))
        run = Run(**{name: value for name, value in row.items() if name in known})
        runs.setdefault(run.run_id, (run, store))
    return list(runs.values())


def load(connection: duckdb.DuckDBPyConnection, runs: Sequence[tuple[Run, str]]) -> dict[str, Loaded]:
    """Every run with the samples of its test split, by run id; runs that generated none are left out.

    Replicates of a sample are averaged; joules that are not valid, or of another kind than the run's,
    stay out. Memory: some 200 bytes a sample, and 100 MB for the portion of samples in hand.
    """
    splits = _choose(connection, runs)
    found: dict[str, Loaded] = {}
    if not splits:
        return found
    said = {number: (reason, method) for number, reason, method in connection.execute(_SAID).fetchall()}
    invalid: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for number, why, count in connection.execute(_INVALID).fetchall():
        invalid[number].append((why, count))
    for number, samples in _samples(connection):
        run, store = runs[number]
        found[run.run_id] = Loaded(run, store, splits[number], samples, *said[number], tuple(invalid[number]))
    return found


def _choose(connection: duckdb.DuckDBPyConnection, runs: Sequence[tuple[Run, str]]) -> dict[int, str]:
    """Note in the table ``chosen`` which split counts of each run, and what its samples are numbered in
    the table ``names``; returns the splits by the place of the run in ``runs``."""
    connection.execute(
        _CHOOSE,
        [
            list(range(len(runs))),
            [run.run_id for run, _ in runs],
            [store for _, store in runs],
            [run.energy_kind or "none" for run, _ in runs],
        ],
    )
    connection.execute(_NAME)
    return dict(connection.execute("SELECT number, split FROM chosen").fetchall())


def _samples(connection: duckdb.DuckDBPyConnection) -> Iterator[tuple[int, Samples]]:
    """The samples of each chosen run, with its number."""
    # One string for a name, however many runs share it: a comparison of names is one of addresses.
    names = np.array(
        [name for (name,) in connection.execute("SELECT sample_id FROM names ORDER BY id").fetchall()], object
    )
    for first, last in connection.execute(_PORTIONS, [_PORTION]).fetchall():
        arrays = connection.execute(_in_order(_ROWS), [first, last]).fetchnumpy()
        if _replicated(arrays):
            arrays = connection.execute(_in_order(_MEANS), [first, last]).fetchnumpy()
        columns = {name: _numbers(arrays.pop(name)) for name in _COLUMNS}
        labels = _texts(arrays["label"])
        batches = np.asarray(arrays["batch"], np.int64)
        numbers, starts = np.unique(arrays["number"], return_index=True)
        for number, start, end in zip(numbers, starts, [*starts[1:], len(batches)], strict=True):
            part = slice(start, end)
            samples = Samples(
                tuple(names[arrays["id"][part]]),
                batches[part],
                {name: values[part] for name, values in columns.items()},
                tuple(labels[part]),
            )
            yield int(number), samples


def _replicated(arrays: Mapping[str, Any]) -> bool:
    """Whether a run has a sample more than once."""
    rows = np.stack([np.asarray(arrays["number"]), np.asarray(arrays["id"])])
    rows = rows[:, np.lexsort(rows)]
    return bool((np.diff(rows) == 0).all(axis=0).any())


def _in_order(rows: str) -> str:
    return f"SELECT * FROM ({rows}) ORDER BY number, position, id"


def _mapping(value: Any) -> dict[str, Any]:
    loaded = json.loads(value) if isinstance(value, str) else value
    return dict(loaded) if isinstance(loaded, Mapping) else {}


def _numbers(values: Any) -> FloatArray:
    """Values with NaN for NULL; an array that has none is not copied."""
    if not isinstance(values, np.ma.MaskedArray):
        return np.asarray(values, dtype=np.float64)
    return np.asarray(np.ma.filled(values.astype(np.float64, copy=False), np.nan))


def _texts(values: Any) -> Any:
    """An array of texts with None for NULL."""
    texts = np.array(np.ma.getdata(values), object)
    texts[np.ma.getmaskarray(values)] = None
    return texts


_CHOOSE: Final = """
    CREATE OR REPLACE TEMP TABLE chosen AS
    SELECT number, run_id, store, kind, split, held
    FROM (SELECT run_id, store, split, count(*) AS held FROM samples GROUP BY ALL)
    JOIN (SELECT unnest(?) AS number, unnest(?) AS run_id, unnest(?) AS store, unnest(?) AS kind)
    USING (run_id, store)
    QUALIFY row_number() OVER (PARTITION BY number ORDER BY (split = 'test') DESC, held DESC, split) = 1
"""
_NAME: Final = """
    CREATE OR REPLACE TEMP TABLE names AS
    SELECT row_number() OVER (ORDER BY sample_id) - 1 AS id, sample_id
    FROM (SELECT DISTINCT sample_id FROM samples SEMI JOIN chosen USING (run_id, store, split))
"""
_VALID: Final = "energy_valid AND energy_kind = kind"
_ROWS: Final = f"""
    SELECT number, id, position, batch_index AS batch, label,
        {", ".join(f"{name}::DOUBLE AS {name}" for name in _PLAIN)},
        {", ".join(f"CASE WHEN {_VALID} THEN {name} END AS {name}" for name in _METERED)},
        CASE WHEN label IS NOT NULL THEN (label IS NOT DISTINCT FROM predicted_label)::DOUBLE END AS correct
    FROM samples JOIN chosen USING (run_id, store, split) JOIN names USING (sample_id)
    WHERE number BETWEEN $1 AND $2
"""
_MEANS: Final = f"""
    SELECT number, id, min(position) AS position, min(batch) AS batch, any_value(label) AS label,
        {", ".join(f"avg({name}) AS {name}" for name in _COLUMNS)}
    FROM ({_ROWS}) GROUP BY number, id
"""
_PORTIONS: Final = """
    SELECT min(number), max(number)
    FROM (SELECT number, sum(held) OVER (ORDER BY number) // ? AS portion FROM chosen)
    GROUP BY portion ORDER BY portion
"""
_SAID: Final = """
    SELECT number, mode(energy_reason) FILTER (WHERE NOT energy_valid OR energy_j IS NULL),
        mode(energy_method)
    FROM samples JOIN chosen USING (run_id, store, split) GROUP BY number
"""
_INVALID: Final = """
    SELECT number, coalesce(reason, 'no reason recorded') AS why, count(*) AS held
    FROM windows JOIN chosen USING (run_id, store) WHERE NOT valid
    GROUP BY number, why ORDER BY number, held DESC, why
"""
