"""Questions to one store and to several at once."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import duckdb
import pytest
from store_records import Script, a_run, broken_off, fill, first_line

from hestctl.errors import Exit, HestError
from hestctl.runs import recording
from hestctl.store import migrations
from hestctl.store.finding import find_stores
from hestctl.store.index import TABLES
from hestctl.store.queries import connect, get_run, latest_calibration, latest_run, list_runs
from hestctl.store.store import Store

STORES = ("a/runs.duckdb", "b/runs.duckdb", "b/more.duckdb")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hosts' stores with one run id in common, and a third with another name."""
    folder = tmp_path_factory.mktemp("stores")
    for number, name in enumerate(STORES):
        for run_id in ("train-1", f"train-{number}-own") if number < 2 else ("train-9",):
            with recording(Store(folder / name), a_run(run_id, parent_run_id="train-1")) as recorder:
                fill(recorder)
    return folder


@pytest.fixture
def stores(originals: Path, tmp_path: Path) -> list[Store]:
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    return [Store(tmp_path / name) for name in STORES]


def test_views_are_the_union_with_the_store_named(stores: list[Store]) -> None:
    with connect([str(store.db) for store in stores]) as con:
        rows = con.execute("SELECT store, run_id, parent_run_id FROM runs ORDER BY ALL").fetchall()
        for table in TABLES:
            assert con.execute(f"SELECT count(DISTINCT run_id) FROM {table}").fetchall() == [(5,)]
        steps = con.execute("SELECT store, run_id, count(*) FROM steps GROUP BY ALL ORDER BY ALL").fetchall()
    assert rows == [
        ("a/runs", "train-0-own", "train-1@a/runs"),
        ("a/runs", "train-1@a/runs", "train-1@a/runs"),
        ("b/runs", "train-1-own", "train-1@b/runs"),
        ("b/runs", "train-1@b/runs", "train-1@b/runs"),
        # Its parent is a run of that store, if of any, but two others have one of that name too.
        ("more", "train-9", "train-1@more"),
    ]
    assert steps == [(store, run_id, 3) for store, run_id, _ in rows]


def test_a_store_given_twice_counts_once(stores: list[Store], tmp_path: Path) -> None:
    (tmp_path / "link.duckdb").symlink_to(stores[0].db)
    os.link(stores[0].db, tmp_path / "hard.duckdb")
    names = [
        stores[0].db,
        tmp_path / "a/../a/runs.duckdb",
        tmp_path / "link.duckdb",
        tmp_path / "hard.duckdb",
    ]
    with connect([*map(str, names), str(tmp_path / "a" / "*")]) as con:
        rows = con.execute("SELECT store, run_id FROM runs ORDER BY run_id").fetchall()
    assert rows == [("runs", "train-0-own"), ("runs", "train-1")]


def test_a_run_copied_from_store_to_store_counts_once(tmp_path: Path) -> None:
    """The backup was made before the run ended, and lacks what came after it."""
    live, backup = Store(tmp_path / "runs.duckdb"), tmp_path / "backup.duckdb"
    with recording(live, a_run()) as recorder:
        shutil.copy(live.db, backup)
        fill(recorder)
    with recording(live, a_run("train-2")):
        pass
    for named in ([backup, live.db], [live.db, backup]):
        with connect([str(db) for db in named]) as con:
            runs = con.execute("SELECT store, run_id, status FROM runs ORDER BY run_id").fetchall()
            assert con.execute("SELECT run_id, count(*) FROM samples GROUP BY ALL").fetchall() == [
                ("train-1", 4)
            ]
        assert runs == [("runs", "train-1", "finished"), ("runs", "train-2", "finished")]


def test_a_name_with_a_quote_is_a_name(store: Store, tmp_path: Path) -> None:
    with recording(Store(tmp_path / "o'brien's.duckdb"), a_run()):
        pass
    with connect([str(tmp_path / "o'brien's.duckdb")]) as con:
        assert con.execute("SELECT store, run_id FROM runs").fetchall() == [("o'brien's", "train-1")]


def test_globs_stand_for_stores_only(stores: list[Store], tmp_path: Path) -> None:
    stores[0].rebuild()
    assert find_stores([str(tmp_path / "**")]) == [stores[0].db, stores[2].db, stores[1].db]
    assert find_stores([str(tmp_path / "b" / "m*")]) == [stores[2].db]


def test_nothing_stays_open(stores: list[Store]) -> None:
    """While a comparison is on, others record."""
    impatient = Store(stores[0].db, lock_timeout_s=0.2)
    with connect([str(impatient.db)]) as con:
        with recording(impatient, a_run("later-1")):
            pass
        assert con.execute("SELECT count(*) FROM runs").fetchall() == [(2,)]


def test_a_missing_store_names_what_is_nearby(stores: list[Store], tmp_path: Path) -> None:
    with pytest.raises(HestError) as caught, connect([str(stores[0].db), str(tmp_path / "b" / "mor.duckdb")]):
        pass
    assert caught.value.exit_code == Exit.USAGE
    assert str(stores[1].db) in caught.value.message
    assert str(stores[2].db) in caught.value.message
    assert caught.value.hint == f"name it with: --db {stores[2].db}"


def test_a_missing_store_with_nothing_nearby_says_how_to_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HestError, match="none nearby") as caught, connect(["*.duckdb"]):
        pass
    assert "hestctl train --db" in (caught.value.hint or "")


def test_one_damaged_store_of_several_is_named(stores: list[Store]) -> None:
    stores[1].db.write_bytes(b"?")
    every = [str(store.db) for store in stores]
    with pytest.raises(HestError, match=r"b/runs\.duckdb") as caught, connect(every):
        pass
    assert caught.value.exit_code == Exit.STORE


def test_damage_that_only_a_question_finds_names_the_store(stores: list[Store]) -> None:
    """A block of samples is not read before somebody asks for samples."""
    with duckdb.connect(str(stores[1].db)) as con:
        con.execute("INSERT INTO samples (run_id, latency_s) SELECT 'train-1', random() FROM range(200_000)")
        con.execute("CHECKPOINT")
        block = "SELECT max(block_id) FROM pragma_storage_info('samples') WHERE column_name = 'latency_s'"
        ((number,),) = con.execute(block).fetchall()
    content = bytearray(stores[1].db.read_bytes())
    content[12_288 + 262_144 * number + 1_000] ^= 0xFF
    stores[1].db.write_bytes(content)
    every = [str(store.db) for store in stores]
    with pytest.raises(HestError, match=r"b/runs\.duckdb") as caught, connect(every) as connection:
        connection.execute("SELECT sum(latency_s) FROM samples").fetchall()
    assert caught.value.exit_code == Exit.STORE
    assert "runs rebuild" in (caught.value.hint or "")


def test_a_wrong_question_is_no_damage(stores: list[Store]) -> None:
    with pytest.raises(duckdb.Error), connect([str(stores[0].db)]) as connection:
        connection.execute("SELECT nothing FROM samples")


def test_a_locked_store_of_several_is_named(stores: list[Store]) -> None:
    every = [str(store.db) for store in stores]
    with (
        stores[2].locked(),
        pytest.raises(HestError, match=r"more\.duckdb is locked by process") as caught,
        connect(every, lock_timeout_s=0.2),
    ):
        pass
    assert caught.value.exit_code == Exit.STORE


def test_what_others_record_meanwhile_is_not_seen(stores: list[Store]) -> None:
    with connect([str(stores[0].db)]) as con:
        with recording(stores[0], a_run("later-1")) as recorder:
            fill(recorder)
        assert con.execute("SELECT count(*) FROM runs").fetchall() == [(2,)]
        assert con.execute("SELECT count(*) FROM samples").fetchall() == [(8,)]


@pytest.mark.parametrize("older", [False, True])
def test_nothing_is_left_in_the_temporary_folder(
    stores: list[Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    if older:
        newer = (*migrations.MIGRATIONS, lambda con: con.execute("ALTER TABLE steps ADD COLUMN note VARCHAR"))
        monkeypatch.setattr(migrations, "MIGRATIONS", newer)
    aside = tmp_path / "temporary"
    aside.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(aside))
    with connect([str(stores[0].db)]) as con:
        assert list(aside.iterdir()) == []
        assert con.execute("SELECT count(*) FROM runs").fetchall() == [(2,)]
        in_memory = "SELECT sum(memory_usage_bytes) FROM duckdb_memory() WHERE tag = 'IN_MEMORY_TABLE'"
        assert con.execute(in_memory).fetchall()[0][0] < 1 << 20


@pytest.mark.parametrize("reason", ["no folder", "no room"])
def test_without_a_temporary_folder_rows_are_held_in_memory(
    stores: list[Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    def full(source: object, target: object, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    aside = tmp_path / "temporary"
    monkeypatch.setattr(tempfile, "tempdir", str(aside))
    if reason == "no room":
        aside.mkdir()
        monkeypatch.setattr(shutil, "copyfileobj", full)
    with connect([str(store.db) for store in stores]) as con:
        assert con.execute("SELECT count(*) FROM samples").fetchall() == [(20,)]
    assert not aside.exists() or list(aside.iterdir()) == []


def test_rows_that_are_in_the_log_alone_are_read(store: Store, script: Script) -> None:
    """A program that is killed leaves its last rows in DuckDB's log, beside the file."""
    with recording(store, a_run()) as recorder:
        fill(recorder)
    process = script("""
        import duckdb
        con = duckdb.connect(str(DB))
        con.execute("INSERT INTO samples (run_id, sample_id) VALUES ('train-1', 'late')")
        print("inserted", flush=True)
        time.sleep(600)
    """)
    assert first_line(process) == "inserted\n"
    process.kill()
    process.wait()
    assert store.db.with_name("runs.duckdb.wal").stat().st_size > 0
    with connect([str(store.db)]) as con:
        assert con.execute("SELECT count(*) FROM samples").fetchall() == [(5,)]


def test_stores_are_read_whole_while_another_process_records(store: Store, script: Script) -> None:
    """Every look at a store at work sees whole runs, and no run of the writer is refused."""
    process = script("""
        for number in range(8):
            with recording(Store(DB, lock_timeout_s=60.0), a_run(f"train-{number}")) as recorder:
                fill(recorder, samples=50)
            print(number, flush=True)
    """)
    assert first_line(process) == "0\n"
    seen = []
    while process.poll() is None:
        with connect([str(store.db)]) as con:
            held = con.execute(
                "SELECT status, (SELECT count(*) FROM samples s WHERE s.run_id = r.run_id) FROM runs r"
            ).fetchall()
        assert set(held) <= {("started", 0), ("finished", 50)}
        seen.append(len(held))
    assert process.returncode == 0
    assert seen == sorted(seen)
    assert len(set(seen)) > 1
    with connect([str(store.db)]) as con:
        assert con.execute("SELECT count(*) FROM samples").fetchall() == [(8 * 50,)]
    assert store.verify() == []


def test_runs_are_listed_newest_first_and_filtered(store: Store) -> None:
    for number, (command, method) in enumerate([("train", "hest"), ("train", "lora"), ("harden", "hest")]):
        with recording(store, a_run(f"r-{number}", command, method=method)) as recorder:
            if command == "harden":
                recorder.plan({"scope": "ffn", "emax_j": 2.0})
    with pytest.raises(ZeroDivisionError):
        broken_off(store, a_run("r-3", method="hest"), ZeroDivisionError("broken"))
    assert [run.run_id for run in list_runs(store)] == ["r-3", "r-2", "r-1", "r-0"]
    assert [run.run_id for run in list_runs(store, method="hest", limit=2)] == ["r-3", "r-2"]
    assert [run.run_id for run in list_runs(store, status="failed")] == ["r-3"]
    assert [run.run_id for run in list_runs(store, has_plan=True)] == ["r-2"]
    found = latest_run(store, method="hest")
    assert found is not None
    assert found.run_id == "r-2"
    found = latest_run(store, command="train", has_plan=False)
    assert found is not None
    assert found.run_id == "r-1"
    found = latest_run(store, status=None)
    assert found is not None
    assert found.error == "ZeroDivisionError: broken"
    assert latest_run(store, command="compare") is None


def test_a_run_comes_back_as_it_was_recorded(store: Store) -> None:
    with recording(store, a_run(seed=4, versions={"torch": "2"}, summary={"a": [1, None]})) as recorder:
        fill(recorder)
    assert get_run(store, "train-1") == recorder.folder.read_run()


def test_an_unknown_run_names_the_nearest(store: Store) -> None:
    with pytest.raises(HestError, match="there is no store") as caught:
        get_run(store, "x")
    assert caught.value.exit_code == Exit.USAGE
    for run_id in ("train-hest-20261122", "harden-lora-20261122"):
        with recording(store, a_run(run_id)):
            pass
    with pytest.raises(HestError) as caught:
        get_run(store, "train-hest-2026112")
    assert caught.value.exit_code == Exit.USAGE
    assert (caught.value.hint or "").startswith("the nearest are: train-hest-20261122")
    with pytest.raises(HestError):
        get_run(store, "' OR true --")


def test_the_latest_calibration_under_a_key(store: Store) -> None:
    assert latest_calibration(store, "gpu") is None
    for number, key in enumerate(["gpu", "gpu", "cpu"]):
        with recording(store, a_run(f"r-{number}", "calibrate")) as recorder:
            recorder.calibration({"key": key, "kind": "measured", "number": number, "table": {"full": 1e-6}})
    found = latest_calibration(store, "gpu")
    assert found is not None
    assert (found["number"], found["table"]) == (1, {"full": 1e-6})
    assert latest_calibration(store, "tpu") is None
