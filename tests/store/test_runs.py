"""Recording a run: however it ends, it says so in its folder, in the index and by its exit code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable

import pytest
from store_records import Script, a_run, a_step, broken_off, fill, first_line

from hestctl.errors import Exit, HestError, Interrupted
from hestctl.records import Run
from hestctl.runs import new_run_id, recording, resume, versions
from hestctl.store.folder import RunFolder, is_run_id
from hestctl.store.queries import get_run, list_runs
from hestctl.store.store import Store

WORKING = """
    try:
        with recording(Store(DB, lock_timeout_s=float(sys.argv[1])), a_run()) as recorder:
            print("working", flush=True)
            for number in range(6000):
                recorder.step(a_step(number))
                time.sleep(0.01)
                {check}
    except HestError as error:
        print(error.message, "//", error.hint)
        sys.exit(error.exit_code)
"""


def at_work(script: Script, check: str = "recorder.check()", wait_s: float = 10.0) -> subprocess.Popen[str]:
    process = script(WORKING.format(check=check), wait_s)
    assert first_line(process) == "working\n"
    return process


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR2, 143), (signal.SIGINT, 130)]
)
def test_a_signal_ends_the_run_in_order(
    store: Store, script: Script, number: signal.Signals, code: int
) -> None:
    process = at_work(script)
    process.send_signal(number)
    if number == signal.SIGTERM:
        process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code, err
    assert "stopped by" in out
    assert str(store.folder("train-1").path) in out
    run = get_run(store, "train-1")
    assert run.status == "interrupted"
    assert "stopped by" in (run.error or "")
    assert store.verify() == []


def test_a_second_ctrl_c_stops_at_once(store: Store, script: Script) -> None:
    process = at_work(script, check="pass")
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "at once" in out
    assert get_run(store, "train-1").status == "interrupted"
    assert store.folder("train-1").read_lines("steps").lost == 0
    assert store.verify() == []


def test_a_third_ctrl_c_need_not_wait_for_the_lock(store: Store, script: Script) -> None:
    process = at_work(script, wait_s=60.0)
    with store.locked():
        process.send_signal(signal.SIGINT)
        manifest = store.folder("train-1").path / "manifest.json"
        while not manifest.exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
    (recovered,) = store.recover_orphans()
    assert recovered.status == "interrupted"
    assert store.verify() == []


def test_a_store_locked_at_the_end_says_that_the_run_is_safe(store: Store, script: Script) -> None:
    process = at_work(script, wait_s=0.3)
    with store.locked():
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 143, err
    assert f"locked by process {os.getpid()}" in out
    assert "files are safe in" in out
    assert f"hestctl runs rebuild --db {store.db}" in out
    assert store.folder("train-1").problems() == []
    store.recover_orphans()
    assert store.verify() == []


def test_a_store_damaged_during_the_run_says_that_the_run_is_safe(store: Store) -> None:

    def record() -> None:
        with recording(store, a_run()) as recorder:
            fill(recorder)
            store.db.write_bytes(b"damaged")

    with pytest.raises(HestError, match="the run's own files are safe in") as caught:
        record()
    assert caught.value.exit_code == Exit.STORE
    assert store.folder("train-1").read_run().status == "finished"
    store.rebuild()
    assert get_run(store, "train-1").status == "finished"


def test_handlers_are_restored(store: Store) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)]

    def record() -> None:
        with recording(store, a_run()) as recorder:
            recorder.check()
            os.kill(os.getpid(), signal.SIGTERM)
            assert recorder.stop_requested == "SIGTERM"
            recorder.check()

    with pytest.raises(Interrupted) as caught:
        record()
    assert caught.value.exit_code == Exit.TERMINATED
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)] == before


def test_a_thread_records_without_touching_handlers(store: Store) -> None:
    seen = []

    def work() -> None:
        with recording(store, a_run()) as recorder:
            seen.append(signal.getsignal(signal.SIGTERM))
            fill(recorder)

    thread = threading.Thread(target=work)
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert seen == [before]
    assert get_run(store, "train-1").status == "finished"


def test_an_error_ends_the_run_as_failed_and_is_raised_on(store: Store) -> None:
    error = RuntimeError("CUDA out of memory.\n  Tried to allocate 2 GiB")
    with pytest.raises(RuntimeError) as caught:
        broken_off(store, a_run(device_name="A"), error)
    assert caught.value is error
    run = get_run(store, "train-1")
    assert (run.status, run.device_name) == ("failed", "A")
    assert run.error == "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB"
    with pytest.raises(HestError) as told:
        broken_off(store, a_run("train-2"), HestError("the loss is not finite"))
    assert told.value.hint is None
    assert get_run(store, "train-2").error == "the loss is not finite"


def test_the_record_filled_in_the_block_is_stored(store: Store) -> None:
    run = Run(new_run_id("train", "hest"), "train", "started", "2026-11-22")
    with recording(store, run) as recorder:
        recorder.run.steps = 12
        recorder.run.summary = {"rouge_lsum": 30.5}
        assert get_run(store, run.run_id).status == "started"
    stored = get_run(store, run.run_id)
    assert (stored.status, stored.steps, stored.summary) == ("finished", 12, {"rouge_lsum": 30.5})
    assert stored.finished_at is not None


def interrupted(store: Store, steps: int = 5) -> None:
    with pytest.raises(Interrupted):
        broken_off(store, a_run(seed=1), Interrupted("stopped", exit_code=Exit.TERMINATED), steps)


def test_resume_appends_to_the_same_folder(store: Store) -> None:
    interrupted(store)
    first = get_run(store, "train-1")
    with resume(store, "train-1", a_run("other", seed=2)) as recorder:
        assert get_run(store, "train-1").status == "started"
        assert recorder.truncate_steps(2) == 2
        for number in (3, 4, 5):
            recorder.step(a_step(number, loss=9.0))
    run = get_run(store, "train-1")
    assert (run.status, run.seed, run.created_at, run.error) == ("finished", 2, first.created_at, None)
    with store.reading() as con:
        rows = con.execute("SELECT step, loss FROM steps ORDER BY step").fetchall()
    assert rows == [(0, 1.5), (1, 1.5), (2, 1.5), (3, 9.0), (4, 9.0), (5, 9.0)]
    assert [run.run_id for run in list_runs(store)] == ["train-1"]
    assert store.verify() == []


def test_resume_cuts_a_torn_line_and_counts_it(store: Store) -> None:
    interrupted(store)
    with store.folder("train-1").lines_path("steps").open("ab") as file:
        file.write(b'{"step": 5, "lo')
    with resume(store, "train-1", a_run()) as recorder:
        recorder.step(a_step(5))
    assert [row["step"] for row in recorder.folder.read_lines("steps").rows] == [0, 1, 2, 3, 4, 5]
    assert (recorder.folder.manifest() or {})["lost_lines"] == 1
    assert store.verify() == []


def test_resume_after_sigkill(store: Store, script: Script) -> None:
    process = at_work(script)
    process.kill()
    process.wait()
    with resume(store, "train-1", a_run()) as recorder:
        recorder.truncate_steps(0)
    assert get_run(store, "train-1").status == "finished"


def test_resume_refuses_what_is_finished_missing_or_at_work(store: Store, script: Script) -> None:
    with recording(store, a_run("done-1")):
        pass
    process = at_work(script)
    before = store.folder("train-1").owner()
    for run_id, text in (
        ("done-1", "has finished"),
        ("none-1", "there is no run"),
        ("train-1", f"at work in process {process.pid}"),
        ("../x", "not a run id"),
    ):
        for force in (False, True):
            with (
                pytest.raises(HestError, match=text) as caught,
                resume(store, run_id, a_run(), force=force),
            ):
                pytest.fail("the block ran")
            assert caught.value.exit_code == Exit.USAGE
    assert store.folder("train-1").owner() == before


def test_resume_takes_over_from_a_lost_host_only_by_force(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("platform.node", lambda: "lost-host")
        RunFolder.create(store.root, a_run())
    with pytest.raises(HestError, match="on lost-host") as caught, resume(store, "train-1", a_run()):
        pytest.fail("the block ran")
    assert "--force" in (caught.value.hint or "")
    with resume(store, "train-1", a_run(), force=True):
        pass
    assert get_run(store, "train-1").status == "finished"


def test_a_taken_id_leaves_the_first_run_alone(store: Store) -> None:
    with recording(store, a_run(seed=1)) as recorder:
        fill(recorder)
    with pytest.raises(HestError, match="already exists"), recording(store, a_run(seed=2)):
        pytest.fail("the block ran")
    assert get_run(store, "train-1").seed == 1
    assert store.verify() == []


def test_run_ids_are_valid_and_unique() -> None:
    ids = {new_run_id("train", "hest") for _ in range(500)}
    assert len(ids) == 500
    assert all(re.fullmatch(r"train-hest-\d{8}-\d{6}-[0-9a-f]{8}", run_id) for run_id in ids)
    odd: list[Callable[[], str]] = [
        lambda: new_run_id("calibrate"),
        lambda: new_run_id("train", "A/b c" * 30),
        lambda: new_run_id("é"),
    ]
    assert all(is_run_id(make()) for make in odd)


def test_versions_come_from_metadata() -> None:
    found = versions()
    assert found["duckdb"]
    assert found["hestctl"]
    assert found["python"].startswith("3.")
