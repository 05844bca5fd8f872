"""The store: acknowledged is stored, locked says by whom, and the index can always be made again."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import duckdb
import pytest
from store_records import Script, a_run, a_step, broken_off, fill, first_line

from hestctl.errors import Exit, HestError
from hestctl.records import Run
from hestctl.runs import recording
from hestctl.store import files
from hestctl.store.folder import RunFolder
from hestctl.store.index import TABLES
from hestctl.store.lock import StoreLock
from hestctl.store.process import identity, liveness
from hestctl.store.queries import get_run, list_runs
from hestctl.store.store import Mismatch, Store


def contents(store: Store) -> dict[str, list[tuple[object, ...]]]:
    """Every row of every table, in an order that does not depend on how it got there."""
    with store.reading() as con:
        return {table: sorted(con.execute(f"SELECT * FROM {table}").fetchall(), key=str) for table in TABLES}


def test_making_a_store_opens_and_creates_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "runs.duckdb")
    assert list_runs(store) == []
    assert store.verify() == []
    assert store.recover_orphans() == []
    assert list(tmp_path.iterdir()) == []


def test_the_store_imports_nothing_heavy(script: Script) -> None:
    process = script("""
        heavy = {"torch", "transformers", "pandas", "pyarrow"} & set(sys.modules)
        with recording(Store(DB), a_run()) as recorder:
            fill(recorder)
        print(sorted(heavy | {"torch", "transformers", "pandas"} & set(sys.modules)))
    """)
    assert process.communicate()[0] == "[]\n"


def test_start_up_imports_neither_duckdb_nor_filelock(script: Script) -> None:
    process = script("""
        import hestctl.runs, hestctl.store.queries
        print(sorted({"duckdb", "filelock"} & set(sys.modules)))
    """)
    assert process.communicate()[0] == "[]\n"


def test_sixteen_processes_at_once_lose_nothing(store: Store, script: Script) -> None:
    """Each prints a run only once it is recorded; what is printed must be in the index, exactly."""
    process = script("""
        import duckdb, filelock
        children = []
        for worker in range(16):
            child = os.fork()
            if child == 0:
                store = Store(DB, lock_timeout_s=60.0)
                for number in range(2):
                    with recording(store, a_run(f"train-{worker}-{number}")) as recorder:
                        for position in range(5 + number):
                            recorder.sample(a_sample(position))
                    os.write(1, f"{recorder.run.run_id} {5 + number}\\n".encode())
                os._exit(0)
            children.append(child)
        sys.exit(any(os.waitpid(child, 0)[1] for child in children))
    """)
    out, err = process.communicate()
    assert process.returncode == 0, err
    acknowledged = {run_id: int(rows) for run_id, rows in map(str.split, out.splitlines())}
    with store.reading() as con:
        stored = con.execute("SELECT run_id, count(*) FROM samples GROUP BY run_id").fetchall()
        runs = con.execute("SELECT count(*) FROM runs WHERE status = 'finished'").fetchall()
    assert len(acknowledged) == 32
    assert dict(stored) == acknowledged
    assert runs == [(32,)]
    assert store.verify() == []


def test_a_rebuild_equals_the_original(store: Store) -> None:
    for run_id in ("train-1", "train-2"):
        with recording(store, a_run(run_id, seed=7)) as recorder:
            fill(recorder)
    with recording(store, a_run("train-3")) as recorder:
        recorder.step(a_step(1, loss=float("nan")))
    with pytest.raises(ZeroDivisionError):
        broken_off(store, a_run("train-4"), ZeroDivisionError())
    before = contents(store)
    assert all(before.values())
    first, second = store.rebuild(), store.rebuild()
    assert (first.runs, first.lost_lines, first.skipped) == (4, 0, {})
    assert str(contents(store)) == str(before)
    assert first.backup != second.backup
    store.db.unlink()
    assert store.rebuild().backup is None
    assert str(contents(store)) == str(before)


def test_a_rebuild_reports_what_it_skips_and_what_was_lost(store: Store) -> None:
    for run_id in ("train-1", "train-2", "train-3"):
        with recording(store, a_run(run_id)) as recorder:
            fill(recorder)
    (store.folder("train-1").path / "run.json").write_text("{")
    (store.folder("train-2").path / "manifest.json").write_text("{")
    (store.folder("train-2").path / "plan.json").write_text("{")
    with store.folder("train-3").lines_path("steps").open("ab") as file:
        file.write(b'{"step": 4, "lo')
    (store.root / "notes").mkdir()
    report = store.rebuild()
    assert (report.runs, report.lost_lines) == (2, 2)
    assert list(report.skipped) == ["train-1"]
    assert "run.json cannot be read" in report.skipped["train-1"]
    assert {run.run_id for run in list_runs(store)} == {"train-2", "train-3"}


def test_a_rebuild_does_not_replay_the_old_log(store: Store) -> None:
    with recording(store, a_run()) as recorder:
        fill(recorder)
    expected = contents(store)
    store.db.with_name("runs.duckdb.wal").write_bytes(b"\x01" * 500)
    store.rebuild()
    assert contents(store) == expected
    store.db.unlink()
    store.db.with_name("runs.duckdb.wal").write_bytes(b"\x01" * 500)
    with recording(store, a_run("train-2")):
        pass
    assert [run.run_id for run in list_runs(store)] == ["train-2"]


def test_a_rebuild_without_folders_keeps_the_index(store: Store) -> None:
    with recording(store, a_run()) as recorder:
        pass
    recorder.folder.discard()
    with pytest.raises(HestError, match="there are no runs in") as caught:
        store.rebuild()
    assert caught.value.exit_code == Exit.STORE
    assert [run.run_id for run in list_runs(store)] == ["train-1"]


def test_a_locked_store_names_its_holder_and_nothing_has_begun(store: Store, script: Script) -> None:
    process = script("""
        with Store(DB).locked():
            print("held", flush=True)
            time.sleep(60)
    """)
    assert first_line(process) == "held\n"
    impatient = Store(store.db, lock_timeout_s=0.2)
    holder = rf"process {process.pid} on .* \(waited 0\.2 s\)"
    with pytest.raises(HestError, match=holder) as caught, recording(impatient, a_run()):
        pytest.fail("the block ran")
    assert caught.value.exit_code == Exit.STORE
    assert not impatient.folder("train-1").path.exists()
    process.kill()
    process.wait()
    with recording(impatient, a_run()):
        pass


def test_a_store_open_in_another_program_names_it(store: Store, script: Script) -> None:
    with recording(store, a_run()):
        pass
    process = script("""
        import duckdb
        con = duckdb.connect(str(DB))
        print("held", flush=True)
        time.sleep(60)
    """)
    assert first_line(process) == "held\n"
    impatient = Store(store.db, lock_timeout_s=0.2)
    with pytest.raises(HestError, match=f"is open in PID {process.pid}") as caught:
        list_runs(impatient)
    assert caught.value.exit_code == Exit.STORE


def test_a_lock_is_waited_for(store: Store, script: Script) -> None:
    process = script("""
        with Store(DB).locked():
            print("held", flush=True)
            time.sleep(0.5)
    """)
    assert first_line(process) == "held\n"
    with recording(store, a_run()):
        pass
    assert [run.status for run in list_runs(store)] == ["finished"]


def test_the_lock_is_free_and_unsigned_afterwards(store: Store) -> None:
    holder = store.db.with_name("runs.duckdb.lock-holder")
    with store.locked():
        with store.locked():
            pass
        assert holder.read_text().split()[0] == str(os.getpid())
    assert not holder.exists()
    with StoreLock(store.db, 0.1).held():
        pass


def test_a_read_only_folder_can_be_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root no folder is read-only, so the lock is told that it is."""
    import filelock

    with recording(store, a_run()):
        pass

    def refuse(self: object, *arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    assert [run.run_id for run in list_runs(Store(store.db))] == ["train-1"]
    with pytest.raises(HestError, match=r"cannot write .*runs\.duckdb\.lock"):
        Store(store.db).started(a_run("train-2"))


def test_a_run_that_waits_to_be_indexed_is_no_mismatch(store: Store) -> None:
    folder = RunFolder.create(store.root, a_run())
    store.started(a_run())
    folder.finish(Run("train-1", "train", "finished", "2026"))
    assert store.verify() == []
    assert store.recover_orphans() == []


def killed(script: Script, code: str) -> None:
    process = script(code)
    assert first_line(process) == "working\n"
    process.kill()
    process.wait()


def test_the_next_command_recovers_what_sigkill_left(store: Store, script: Script) -> None:
    killed(
        script,
        """
        with recording(Store(DB), a_run()) as recorder:
            for number in range(50):
                recorder.step(a_step(number))
            recorder.run.train_energy_j = 12.5
            recorder.commit()
            with open(recorder.folder.lines_path("steps"), "ab") as file:
                file.write(b'{"step": 50, "lo')
            print("working", flush=True)
            time.sleep(60)
        """,
    )
    assert get_run(store, "train-1").status == "started"
    with recording(store, a_run("train-2")):
        pass
    run = get_run(store, "train-1")
    assert (run.status, run.train_energy_j) == ("interrupted", 12.5)
    assert "ended without a word" in (run.error or "")
    assert run.finished_at is not None
    assert run.finished_at < get_run(store, "train-2").created_at
    assert (store.folder("train-1").manifest() or {})["lost_lines"] == 1
    with store.reading() as con:
        assert con.execute("SELECT count(*), max(step) FROM steps").fetchall() == [(50, 49)]
    assert store.verify() == []
    assert store.recover_orphans() == []


def test_a_run_that_ended_unindexed_is_indexed_by_the_next_command(store: Store, script: Script) -> None:
    killed(
        script,
        """
        store = Store(DB)
        folder = RunFolder.create(store.root, a_run())
        store.started(a_run())
        folder.append("steps", {"step": 1})
        run = folder.read_run()
        run.status = "finished"
        folder.finish(run)
        print("working", flush=True)
        time.sleep(60)
        """,
    )
    (recovered,) = store.recover_orphans()
    assert (recovered.run_id, recovered.status) == ("train-1", "finished")
    assert store.verify() == []


def test_runs_at_work_are_left_alone(store: Store, script: Script) -> None:
    process = script("""
        with recording(Store(DB), a_run()) as recorder:
            print("working", flush=True)
            time.sleep(60)
    """)
    assert first_line(process) == "working\n"
    with recording(store, a_run("train-2")) as recorder:
        assert store.recover_orphans() == []
        assert recorder.folder.read_run().status == "started"
    assert get_run(store, "train-1").status == "started"
    assert store.verify() == []


def test_runs_of_another_host_are_left_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    RunFolder.create(store.root, a_run())
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    assert store.recover_orphans() == []


@pytest.mark.parametrize("emptied", [False, True])
def test_a_started_row_without_a_folder_is_closed(store: Store, emptied: bool) -> None:
    store.started(a_run())
    if emptied:
        store.folder("train-1").path.mkdir(parents=True)
    (recovered,) = store.recover_orphans()
    assert (recovered.run_id, recovered.status) == ("train-1", "interrupted")
    assert get_run(store, "train-1").error == "its folder is missing"
    assert store.recover_orphans() == []


def test_an_unreadable_folder_stops_nobody(store: Store) -> None:
    for run_id in ("bad-1", "bad-2"):
        RunFolder.create(store.root, a_run(run_id))
    (store.folder("bad-1").path / "run.json").write_text("{")
    (store.folder("bad-2").path / "run.json").unlink()
    with recording(store, a_run()):
        pass
    assert {mismatch.run_id for mismatch in store.verify()} == {"bad-1", "bad-2"}


def test_liveness_knows_a_process_from_a_later_one_with_its_pid() -> None:
    me = identity()
    assert liveness(me) == "alive"
    assert liveness(me | {"start_ticks": -1}) == "dead"
    assert liveness(me | {"boot_id": "other"}) == "dead"
    assert liveness(me | {"host": "other"}) == "elsewhere"
    assert liveness({}) == "dead"
    if sys.platform == "linux":
        child = os.fork()
        if child == 0:
            os._exit(0)
        while Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        # A zombie is dead, though its PID is still taken.
        assert liveness(me | {"pid": child, "start_ticks": 1}) == "dead"
        os.waitpid(child, 0)


def test_verify_finds_rows_that_the_index_lost_or_never_had(store: Store) -> None:
    for run_id in ("train-1", "train-2", "train-3", "train-4"):
        with recording(store, a_run(run_id)) as recorder:
            fill(recorder)
    with duckdb.connect(str(store.db)) as con:
        con.execute("DELETE FROM samples WHERE run_id = 'train-1' AND position = 2")
        con.execute("DELETE FROM runs WHERE run_id = 'train-2'")
        con.execute("UPDATE runs SET status = 'failed' WHERE run_id = 'train-4'")
    store.folder("train-3").discard()
    (store.folder("train-4").path / "windows.jsonl").write_text("")
    assert store.verify() == [
        Mismatch("train-1", "its manifest counts 4 samples, the index has 3"),
        Mismatch("train-2", "it is not in the index"),
        Mismatch("train-3", "it is in the index, but its folder is missing"),
        Mismatch("train-4", "it is finished, the index says failed"),
        Mismatch("train-4", "windows.jsonl differs from its checksum"),
    ]


def test_a_full_disk_at_the_index_leaves_it_as_it_was(store: Store, script: Script) -> None:
    with recording(store, a_run("old-1")) as recorder:
        fill(recorder)
    size = store.db.stat().st_size
    process = script(f"""
        import resource
        store = Store(DB)
        try:
            with recording(store, a_run("new-1")) as recorder:
                for number in range(8000):
                    recorder.sample(a_sample(number, sample_id=os.urandom(40).hex()))
                recorder.folder.commit()
                # The folder's files are written; only what the database appends is beyond the limit.
                resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
        except HestError as error:
            print(error.message, "//", error.hint)
            sys.exit(error.exit_code)
    """)
    out, err = process.communicate()
    assert process.returncode == Exit.STORE, err
    assert "the run's own files are safe in" in out
    assert "free some space" in out
    assert [row.status for row in list_runs(store) if row.run_id == "old-1"] == ["finished"]
    (recovered,) = store.recover_orphans()
    assert (recovered.run_id, recovered.status) == ("new-1", "finished")
    assert store.verify() == []


def test_a_full_disk_while_the_store_is_made_leaves_no_half_made_file(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: object, target: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(HestError, match="no space left"):
            store.started(Run("train-1", "train", "started", "2026"))
    assert not [path for path in store.db.parent.iterdir() if path.suffix != ".lock"]
    assert files.free_name(store.db) == store.db


def test_a_reader_without_a_lock_file_keeps_writers_waiting(store: Store, script: Script) -> None:
    """DuckDB's own lock does: nothing that a reader sees changes while it looks, and no writer is refused."""
    with recording(store, a_run()):
        pass
    store.db.with_name("runs.duckdb.lock").unlink()
    with store.reading() as con:
        assert not store.db.with_name("runs.duckdb.lock").exists()
        process = script("""
            print("begun", flush=True)
            with recording(Store(DB), a_run("train-2")):
                pass
            print("recorded", flush=True)
        """)
        assert first_line(process) == "begun\n"
        assert con.execute("SELECT count(*) FROM runs").fetchall() == [(1,)]
    assert first_line(process) == "recorded\n"
    assert len(list_runs(store)) == 2
