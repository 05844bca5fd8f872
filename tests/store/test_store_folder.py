"""The run's own folder: whole or not at all, whatever the disk or the id does."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_records import Script, a_run, a_sample, fill

from hestctl.errors import Exit, HestError
from hestctl.runs import recording
from hestctl.store import files
from hestctl.store.files import ensure_space, write_whole
from hestctl.store.folder import RunFolder, is_run_id
from hestctl.store.store import Store

HOSTILE = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "/etc",
    "A",
    "-a",
    "_a",
    "a\n",
    "a b",
    "a" * 65,
    "é",
    "a\0",
    "a'--",
    "١",
]


@pytest.mark.parametrize("run_id", HOSTILE)
def test_hostile_ids_are_refused_and_nothing_is_made(store: Store, run_id: str) -> None:
    with pytest.raises(HestError, match="run id") as caught, recording(store, a_run(run_id)):
        pytest.fail("the block ran")
    assert caught.value.exit_code == Exit.USAGE
    assert not store.root.exists()


@given(st.text())
def test_whatever_passes_for_a_run_id_stays_under_its_root(text: str) -> None:
    if is_run_id(text):
        assert (Path("/root") / text).resolve().parent == Path("/root")


def test_a_folder_that_leads_elsewhere_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    store.root.mkdir()
    (store.root / "train-1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HestError, match="leads out of"):
        store.folder("train-1")


def test_create_refuses_an_existing_run(store: Store) -> None:
    first = RunFolder.create(store.root, a_run(seed=1))
    with pytest.raises(HestError, match="already exists") as caught:
        RunFolder.create(store.root, a_run(seed=2))
    assert caught.value.exit_code == Exit.USAGE
    assert first.read_run().seed == 1
    assert [path.name for path in store.root.iterdir()] == ["train-1"]


def test_what_is_written_is_read_back(store: Store) -> None:
    with recording(store, a_run(seed=3)) as recorder:
        fill(recorder)
    folder = store.folder("train-1")
    run = folder.read_run()
    assert (run.status, run.seed, run.settings) == ("finished", 3, {"lr": 1e-4, "path": "x"})
    assert [row["step"] for row in folder.read_lines("steps").rows] == [0, 1, 2]
    assert (folder.read_document("plan") or {})["layers"] == [1, 2]
    assert folder.problems() == []
    manifest = folder.manifest() or {}
    assert manifest["files"]["samples.jsonl"]["lines"] == 4
    assert set(manifest["files"]) == {
        *("run.json", "plan.json", "calibration.json", "steps.jsonl", "samples.jsonl"),
        *("windows.jsonl", "utilisation.jsonl", "trials.jsonl"),
    }


def test_a_changed_or_missing_file_is_found(store: Store) -> None:
    with recording(store, a_run()) as recorder:
        fill(recorder)
    folder = recorder.folder
    data = bytearray((folder.path / "samples.jsonl").read_bytes())
    data[40] ^= 1
    (folder.path / "samples.jsonl").write_bytes(data)
    (folder.path / "plan.json").unlink()
    assert folder.problems() == ["plan.json is missing", "samples.jsonl differs from its checksum"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(min_value=0, max_value=100_000))
def test_a_torn_last_line_costs_that_line_alone(tmp_path: Path, cut: int) -> None:
    root = tmp_path / f"cut-{cut}"
    if root.exists():
        return
    folder = RunFolder.create(root, a_run())
    for number in range(5):
        folder.append("steps", {"step": number, "loss": 0.5, "note": "ä\n" * 3})
    folder.close()
    path = folder.lines_path("steps")
    data = path.read_bytes()[: cut % (path.stat().st_size + 1)]
    path.write_bytes(data)
    lines = folder.read_lines("steps")
    assert [row["step"] for row in lines.rows] == list(range(len(lines.rows)))
    assert len(lines.rows) in (data.count(b"\n"), data.count(b"\n") + 1)
    assert len(lines.rows) + lines.lost == len([line for line in data.split(b"\n") if line])
    assert folder.repair() == lines.lost
    folder.append("steps", {"step": 99})
    mended = folder.read_lines("steps")
    assert (mended.rows[:-1], mended.rows[-1], mended.lost) == (lines.rows, {"step": 99}, 0)


def test_a_damaged_line_in_the_middle_is_counted_and_the_index_agrees(store: Store) -> None:
    with recording(store, a_run()) as recorder:
        fill(recorder, steps=4)
    path = recorder.folder.lines_path("steps")
    whole = path.read_bytes().split(b"\n")
    path.write_bytes(
        b"\n".join([whole[0], b"\0" * 30, b"[1]", whole[2][:-5] + whole[3]]) + b"\n" + b'{"step":9,'
    )
    assert len(recorder.folder.read_lines("steps").rows) == 1
    assert recorder.folder.read_lines("steps").lost == 4
    assert store.index(recorder.folder) == 4
    with store.reading() as con:
        assert con.execute("SELECT step FROM steps").fetchall() == [(0,)]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(st.text(alphabet=st.characters(), min_size=1), st.floats()), min_size=1))
def test_any_text_and_number_reach_the_index_unchanged(
    tmp_path: Path, pairs: list[tuple[str, float]]
) -> None:
    store = Store(tmp_path / "texts.duckdb")
    store.folder("train-1").discard()
    text, number = pairs[0]
    folder = RunFolder.create(store.root, a_run(error=text, summary={text: number}))
    for sample_id, nll in pairs:
        folder.append("samples", {"sample_id": sample_id, "nll": nll})
    assert store.index(folder) == 0
    with store.reading() as con:
        rows = con.execute("SELECT sample_id, nll FROM samples").fetchall()
        errors = con.execute("SELECT error FROM runs").fetchall()
    assert [row[0] for row in rows] == [readable(sample_id) for sample_id, _ in pairs]
    assert errors == [(readable(text),)]
    for (_, stored), (_, nll) in zip(rows, pairs, strict=True):
        assert stored == nll or (math.isnan(stored) and math.isnan(nll))


def readable(text: str) -> str:
    """The text with what has no encoding (lone surrogates) replaced."""
    return text.encode("utf-8", "replace").decode()


def test_a_folder_named_like_a_pattern_is_itself_alone(tmp_path: Path) -> None:
    for decoy in ("runs", "rans", "z", "a1", "a"):
        path = tmp_path / decoy / "s" / "train-1" / "steps.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text('{"step":1,"loss":-1.0}\n')
    for name in ("r*", "r**", "[!r]", "a[1]", "{a,b}", "it's", "a b", "r%20", "s3:"):
        store = Store(tmp_path / name / "s.duckdb")
        folder = RunFolder.create(store.root, a_run())
        folder.append("steps", {"step": 2, "loss": 1.5})
        store.index(folder)
        with store.reading() as con:
            assert con.execute("SELECT step, loss FROM steps").fetchall() == [(2, 1.5)], name


@pytest.mark.parametrize("name", ["runs", "r?ns/s.duckdb", "r\\ns/s.duckdb"])
def test_paths_that_duckdb_would_misread_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(HestError, match="cannot name a store") as caught:
        Store(tmp_path / name)
    assert caught.value.exit_code == Exit.USAGE


def test_too_little_space_is_refused_with_the_bytes_needed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_free_bytes", lambda path: 1000)
    with pytest.raises(HestError, match=r"1,001 bytes are needed, 1,000 are free"):
        ensure_space(store.root, 1001)
    ensure_space(store.root, 1000)
    with pytest.raises(HestError, match="bytes are needed"), recording(store, a_run()):
        pytest.fail("the block ran")
    assert not store.root.exists()


def test_a_write_that_fails_half_way_leaves_the_earlier_lines(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.create(store.root, a_run())
    folder.append("steps", {"step": 1})
    before, real = folder.lines_path("steps").read_bytes(), os.write

    def half(fd: int, data: bytes) -> int:
        if len(data) < 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data[:30])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(HestError, match=r"no space left .* bytes are needed"):
            folder.append("steps", {"step": 2, "note": "x" * 30})
    assert folder.lines_path("steps").read_bytes() == before
    folder.append("steps", {"step": 3})
    assert [row["step"] for row in folder.read_lines("steps").rows] == [1, 3]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_whole(path, "old")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HestError, match=r"no space left .* 3 bytes are needed"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_a_disk_that_fills_up_during_a_run_keeps_what_was_recorded(store: Store, script: Script) -> None:
    """The limit on file sizes stands in for the disk: the kernel refuses in the same places."""
    process = script("""
        import resource
        store = Store(DB)
        try:
            with recording(store, a_run()) as recorder:
                recorder.sample(a_sample(0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
                for number in range(1, 10_000):
                    recorder.sample(a_sample(number))
        except HestError as error:
            print(number)
            sys.exit(error.message + " // " + (error.hint or ""))
    """)
    out, err = process.communicate()
    assert process.returncode == 1, err
    assert "no space left" in err
    assert "bytes are needed" in err
    store.recover_orphans()
    rows = store.folder("train-1").read_lines("samples")
    assert [row["position"] for row in rows.rows] == list(range(int(out)))
    assert rows.lost == 0
    assert store.verify() == []
    with store.reading() as con:
        assert con.execute("SELECT count(*) FROM samples").fetchall() == [(int(out),)]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run_id":"other","command":"x","status":"started"}', "{}"])
def test_a_damaged_record_is_an_error_that_names_the_file(store: Store, text: str) -> None:
    folder = RunFolder.create(store.root, a_run())
    (folder.path / "run.json").write_text(text)
    with pytest.raises(HestError, match=r"run\.json cannot be read") as caught:
        folder.read_run()
    assert caught.value.exit_code == Exit.STORE


def test_a_record_of_a_newer_hestctl_is_read_without_what_is_unknown(store: Store) -> None:
    folder = RunFolder.create(store.root, a_run())
    values = json.loads((folder.path / "run.json").read_text())
    (folder.path / "run.json").write_text(json.dumps(values | {"carbon_g": 1.0}))
    assert folder.read_run().run_id == "train-1"


def test_samples_with_every_field_survive(store: Store) -> None:
    sample = a_sample(7, "id 'with\" quotes")
    with recording(store, a_run()) as recorder:
        recorder.sample(sample)
    with store.reading() as con:
        names = [name for name, *_ in con.execute("DESCRIBE samples").fetchall()][1:]
        row = con.execute("SELECT * EXCLUDE run_id FROM samples").fetchone()
    assert row == tuple(getattr(sample, name) for name in names)
