"""The schema: what the records say, upgraded with a backup, and clear about what it cannot read."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import duckdb
import pytest
from store_records import a_run, fill

from hestctl.errors import Exit, HestError
from hestctl.records import LayerUse, Run, Sample, StepMetric, Window
from hestctl.runs import recording
from hestctl.store import migrations
from hestctl.store.index import RUN_JSON, TABLES
from hestctl.store.queries import connect, list_runs
from hestctl.store.store import Store

RECORDS: Mapping[str, Any] = {
    "runs": Run,
    "steps": StepMetric,
    "samples": Sample,
    "windows": Window,
    "utilisation": LayerUse,
}


def columns(store: Store, table: str) -> dict[str, str]:
    with store.reading() as con:
        return {name: kind for name, kind, *_ in con.execute(f"DESCRIBE {table}").fetchall()}


@pytest.mark.parametrize("table", RECORDS)
def test_columns_are_the_fields_of_the_record(store: Store, table: str) -> None:
    kinds = {bool: "BOOLEAN", int: "BIGINT", float: "DOUBLE"}
    expected = {} if table == "runs" else {"run_id": "VARCHAR"}
    hints = get_type_hints(RECORDS[table])
    for field in dataclasses.fields(RECORDS[table]):
        hint = hints[field.name]
        members = [hint, *getattr(hint, "__args__", ())]
        kind = next((kinds[member] for member in members if member in kinds), "VARCHAR")
        expected[field.name] = "JSON" if get_origin(hint) is not None and field.name in RUN_JSON else kind
    assert columns(store, table) == expected


def test_mapping_fields_are_the_json_columns() -> None:
    hints = get_type_hints(Run)
    assert [name for name, hint in hints.items() if get_origin(hint) is Mapping] == list(RUN_JSON)


NEWEST = len(migrations.MIGRATIONS)


def test_the_schema_has_no_keys_or_indexes(store: Store) -> None:
    with recording(store, a_run()), store.reading() as con:
        assert con.execute("SELECT count(*) FROM duckdb_indexes()").fetchall() == [(0,)]
        assert con.execute("SELECT count(*) FROM duckdb_constraints()").fetchall() == [(0,)]
        names = {name for (name,) in con.execute("SELECT table_name FROM duckdb_tables()").fetchall()}
        applied = con.execute("SELECT number, name FROM migrations").fetchall()
    assert names == {*TABLES, "migrations"}
    assert applied == [(i, step.__name__) for i, step in enumerate(migrations.MIGRATIONS, start=1)]


def test_every_migration_says_why_in_one_line() -> None:
    for migration in migrations.MIGRATIONS:
        assert migration.__doc__
        assert "\n" not in migration.__doc__


def add_notes(con: duckdb.DuckDBPyConnection) -> None:
    """A column that a later hestctl might want."""
    con.execute("ALTER TABLE windows ADD COLUMN note VARCHAR DEFAULT 'none'")


@pytest.fixture
def older(store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store written before the newest migration."""
    with recording(store, a_run("old-1")) as recorder:
        fill(recorder)
    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, add_notes))
    return store


def test_an_older_store_is_migrated_after_a_backup(older: Store) -> None:
    with recording(older, a_run("new-1")):
        pass
    assert columns(older, "windows")["note"] == "VARCHAR"
    assert {run.run_id for run in list_runs(older)} == {"old-1", "new-1"}
    backup = older.db.with_name(f"runs.duckdb.schema-{NEWEST}")
    with duckdb.connect(str(backup), read_only=True) as con:
        assert con.execute("SELECT run_id FROM runs").fetchall() == [("old-1",)]
        assert "note" not in {name for name, *_ in con.execute("DESCRIBE windows").fetchall()}
    assert older.verify() == []


def test_an_older_store_is_read_as_it_would_be_without_changing_the_file(older: Store) -> None:
    before = older.db.read_bytes()
    assert [run.run_id for run in list_runs(older)] == ["old-1"]
    with connect([str(older.db)]) as con:
        assert con.execute("SELECT note, run_id FROM windows").fetchall() == [("none", "old-1")]
    assert older.db.read_bytes() == before
    assert not older.db.with_name(f"runs.duckdb.schema-{NEWEST}").exists()


def test_a_migration_that_fails_changes_nothing(older: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(con: duckdb.DuckDBPyConnection) -> None:
        con.execute("DROP TABLE steps")
        con.execute("SELECT * FROM missing")

    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS[:NEWEST], broken))
    with pytest.raises(HestError), recording(older, a_run("new-1")):
        pytest.fail("the block ran")
    with duckdb.connect(str(older.db), read_only=True) as con:
        assert con.execute("SELECT count(*) FROM steps").fetchall() == [(3,)]
        assert con.execute("SELECT max(number) FROM migrations").fetchall() == [(NEWEST,)]


def test_a_store_of_schema_1_is_read_and_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as early:
        early.setattr(migrations, "MIGRATIONS", migrations.MIGRATIONS[:1])
        with recording(store, a_run("old-1")):
            pass
    with duckdb.connect(str(store.db), read_only=True) as con:
        assert "predicted_j" not in {name for name, *_ in con.execute("DESCRIBE samples").fetchall()}
    with recording(store, a_run("new-1")) as recorder:
        fill(recorder)
    assert "predicted_j" in columns(store, "samples")
    assert {run.run_id for run in list_runs(store)} == {"old-1", "new-1"}
    assert store.verify() == []


def test_a_search_of_schema_3_is_read_with_what_later_trials_have(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as early:
        early.setattr(migrations, "MIGRATIONS", migrations.MIGRATIONS[:3])
        with recording(store, a_run("old-1")) as recorder:
            fill(recorder)
    query = "SELECT run_id, value, score, energy_kind FROM trials ORDER BY run_id DESC"
    with connect([str(store.db)]) as con:
        assert con.execute(query).fetchall() == [("old-1", 2.5, None, None)]
    with recording(store, a_run("new-1")) as recorder:
        recorder.trial({"number": 0, "params": {}, "value": 3.0, "score": 31.5, "energy_kind": "predicted"})
    with store.reading() as con:
        found = con.execute(query).fetchall()
    assert found == [("old-1", 2.5, None, None), ("new-1", 3.0, 31.5, "predicted")]


def test_uses_of_schema_4_are_read_without_positions(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as early:
        early.setattr(migrations, "MIGRATIONS", migrations.MIGRATIONS[:4])
        with recording(store, a_run("old-1")) as recorder:
            fill(recorder)
    query = "SELECT run_id, count, phase, position FROM utilisation ORDER BY run_id DESC"
    with connect([str(store.db)]) as con:
        assert con.execute(query).fetchall() == [("old-1", 12, None, None)]
    with recording(store, a_run("new-1")) as recorder:
        recorder.layer_use(LayerUse(0, "int8", 7, 0.5, "new", 16))
    with store.reading() as con:
        found = con.execute(query).fetchall()
    assert found == [("old-1", 12, None, None), ("new-1", 7, "new", 16)]


def refused(store: Store) -> HestError:
    """The error that writing, reading and comparing all give, with nothing recorded."""
    errors = []
    for attempt in (
        lambda: recording(store, a_run("new-1")).__enter__(),
        lambda: list_runs(store),
        lambda: connect([str(store.db)]).__enter__(),
    ):
        with pytest.raises(HestError) as caught:
            attempt()
        errors.append(caught.value)
    assert {error.exit_code for error in errors} == {Exit.STORE}
    assert not store.folder("new-1").path.exists()
    return errors[0]


def test_a_newer_store_is_refused_with_the_hestctl_it_needs(store: Store) -> None:
    with recording(store, a_run()):
        pass
    with duckdb.connect(str(store.db)) as con:
        con.execute("INSERT INTO migrations VALUES (7, 'later', '2030', '9.8.7')")
    before = store.db.read_bytes()
    error = refused(store)
    assert "9.8.7" in error.message
    assert "schema 7" in error.message
    assert "hestctl>=9.8.7" in (error.hint or "")
    assert store.db.read_bytes() == before


def test_a_file_of_a_newer_duckdb_names_the_upgrade(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.db.write_bytes(b"?")

    def newer(*arguments: object, **options: object) -> None:
        raise duckdb.IOException(
            "IO Error: version number 99\nIt was created with a newer version of DuckDB."
        )

    monkeypatch.setattr(duckdb, "connect", newer)
    with pytest.raises(HestError, match="version number 99") as caught:
        list_runs(store)
    assert (caught.value.hint or "").startswith("pip install --upgrade duckdb")


def test_another_programs_database_is_refused_and_left_alone(store: Store) -> None:
    with duckdb.connect(str(store.db)) as con:
        con.execute("CREATE TABLE theirs (i INTEGER)")
    assert "not one that hestctl wrote" in refused(store).message
    with duckdb.connect(str(store.db)) as con:
        assert con.execute("SELECT table_name FROM duckdb_tables()").fetchall() == [("theirs",)]


@pytest.mark.parametrize("data", [b"", b"x", b"not a database " * 1000, b"\0" * 20_000])
def test_what_is_not_a_database_is_named_with_the_way_out(store: Store, data: bytes) -> None:
    store.db.write_bytes(data)
    error = refused(store)
    assert str(store.db) in error.message
    assert error.hint == "this is no store of hestctl: name another with --db"
    assert store.db.read_bytes() == data


@pytest.mark.parametrize("damage", ["cut", "header", "body"])
def test_a_damaged_store_is_named_and_a_rebuild_mends_it(store: Store, damage: str) -> None:
    with recording(store, a_run("old-1")) as recorder:
        fill(recorder, samples=200)
    data = bytearray(store.db.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "header":
        data[4100] ^= 0xFF
    else:
        generator = random.Random(0)
        for _ in range(2000):
            data[generator.randrange(12_288, len(data))] ^= 0xFF
    store.db.write_bytes(data)
    error = refused(store)
    assert f"hestctl runs rebuild --db {store.db}" in (error.hint or "")
    report = store.rebuild()
    assert (report.runs, report.lost_lines, report.skipped) == (1, 0, {})
    assert report.backup is not None
    assert report.backup.read_bytes() == bytes(data)
    assert store.verify() == []


def test_an_empty_database_becomes_a_store(store: Store) -> None:
    duckdb.connect(str(store.db)).close()
    assert list_runs(store) == []
    with recording(store, a_run()):
        pass
    assert [run.status for run in list_runs(store)] == ["finished"]
    assert not list(Path(store.db.parent).glob("*.schema-*"))
