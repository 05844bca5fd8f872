"""A joule never stands without the word that says how it was had: terminal, JSON and store."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from cli_tools import TINY, TRIAL, Study, run_cli

WORD = re.compile(r"measured|estimated|predicted")
FIGURE = re.compile(r"\d\S* J\b|\bJ \S* ?\d|\bJ \w+ \d")
"""A number with its unit, ``0.5 J``; or a progress figure, ``J estimated 0.5``."""


def unworded(text: str) -> list[str]:
    """The lines and table columns with joules and no such word."""
    found: list[str] = []
    header: list[str] = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("┃"):
            header.append(line)
            continue
        if header:
            columns = zip(*(row.strip("┃").split("┃") for row in header), strict=True)
            titles = [" ".join(cell.strip() for cell in column) for column in columns]
            found += [
                title for title in titles if re.search(r"\bJ\b|[Jj]oule", title) and not WORD.search(title)
            ]
            header = []
        row = line.strip("│").split("│")
        named = line.startswith("│") and re.search(r"(^|[_.])j(_|$)", row[0].strip())
        # A sentence that wraps goes on in the next line.
        near = line + " ".join(lines[number + 1 : number + 2])
        if (FIGURE.search(line) or named) and not WORD.search(near):
            found.append(line)
    return found


def test_the_check_finds_what_it_is_to_find() -> None:
    table = "┃ run ┃ J/sample ┃\n┃     ┃ [95 %]   ┃\n┡━━━╇━━━┩\n│ a │ 1.0 │\n"
    assert unworded(table) == ["J/sample [95 %]"]
    assert unworded(table.replace("[95 %]  ", "measured")) == []
    for line in (
        "it took 0.5 J a sample",
        "training 1/2 J 0.25",
        "│ emax_j │ 0.1 │",
        "│ summary.idle_j │ 1 │",
    ):
        assert unworded(line) == [line]
    assert unworded("it took 0.5 J (estimated) a sample\ntraining 1/2 J estimated 0.25") == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--method", "tabs", *TRIAL),
        ("train", "--method", "hest", "--emax-ratio", "0.5", *TRIAL),
        ("train", "--method", "hest", "--emax", "1e-4", *TRIAL),
        ("harden", "--explain"),
        ("profile", "--seq-len", "32", "--new-tokens", "2", "--repeats", "2"),
        ("calibrate", *TINY),
        ("runs", "list"),
        ("compare", "--no-figures"),
    ],
    ids=lambda arguments: " ".join(arguments[:5]),
)
def test_every_joule_in_the_terminal_has_its_word(copied: Study, arguments: tuple[str, ...]) -> None:
    outcome = run_cli(copied.folder, *arguments)
    assert outcome.code == 0, outcome.err
    assert re.search(r"\bJ\b", outcome.out)
    assert unworded(outcome.out) == []
    assert unworded(outcome.err) == []


def test_every_joule_of_a_run_has_its_word(copied: Study) -> None:
    outcome = run_cli(copied.folder, "runs", "show", copied.hest.document["run_id"])
    assert outcome.code == 0
    assert "energy_j_per_sample" in outcome.out
    assert unworded(outcome.out) == []


def joule_keys(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if re.search(r"(^|_)j(_|$)", key) and isinstance(inner, (int, float)):
                yield f"{path}.{key}", inner
            yield from joule_keys(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from joule_keys(inner, path)


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--method", "hest", *TRIAL),
        ("harden",),
        ("profile", "--seq-len", "32", "--new-tokens", "2", "--repeats", "1"),
        ("calibrate", *TINY),
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_document_with_joules_says_their_kind(copied: Study, arguments: tuple[str, ...]) -> None:
    document = run_cli(copied.folder, *arguments, "-q", "--json").document
    assert list(joule_keys(document))
    assert document["energy_kind"] == "estimated"
    scoped = [name for name, _ in joule_keys(document) if "scope" in name or "emax" in name]
    if scoped:
        assert '"scope_energy_kind": "predicted"' in json.dumps(document)


def test_every_joule_in_the_comparison_says_its_kind(study: Study) -> None:
    document = run_cli(study.folder, "compare", "--no-figures", "--json").document
    for run in document["runs"].values():
        joules = {
            name: measure for name, measure in run["measures"].items() if re.search(r"\bJ\b", measure["unit"])
        }
        assert joules
        assert all(measure["energy_kind"] in ("estimated", "predicted") for measure in joules.values())


def test_every_joule_in_the_store_says_its_kind(study: Study) -> None:
    kinds = {"runs": "energy_kind", "samples": "energy_kind", "windows": "kind", "calibrations": "kind"}
    with duckdb.connect(str(study.folder / "runs.duckdb"), read_only=True) as con:
        columns = con.execute("SELECT table_name, column_name FROM duckdb_columns() WHERE NOT internal")
        by_table: dict[str, list[str]] = {}
        for table, column in columns.fetchall():
            by_table.setdefault(table, []).append(column)
        assert set(kinds) < set(by_table)
        for table, kind in kinds.items():
            (count, distinct) = (
                con.execute(f"SELECT count(*), list(DISTINCT {kind}) FROM {table}").fetchone() or ()
            )
            assert count > 0
            assert distinct == ["estimated"]
        (plans,) = (
            con.execute(
                "SELECT list(DISTINCT document->>'energy_kind') FROM plans WHERE emax_j IS NOT NULL"
            ).fetchone()
            or ()
        )
        assert plans == ["estimated"]
        joules = {name for name in by_table if any(re.search("(^|_)j(_|$)", c) for c in by_table[name])}
    # Steps and plans have no kind of their own: they are of the run with their id.
    assert joules == {"runs", "samples", "windows", "steps", "plans"}


def test_csv_says_the_kind_of_its_joules(copied: Study) -> None:
    run_cli(copied.folder, "compare", "--no-figures", "--csv", "rows.csv")
    header, *rows = Path(copied.folder / "rows.csv").read_text().splitlines()
    assert "energy_kind" in header.split(",")
    assert rows
    assert all("estimated" in row and "predicted" in row for row in rows)
