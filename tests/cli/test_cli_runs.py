"""``runs``: a list to pick from, runs by a part of their id, and one answer to a store that is not there."""

from __future__ import annotations

import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cli_tools import TRIAL, Study, files_of, run_cli

from hestctl.cli import out
from hestctl.cli.run_ids import age, choose, label, short_ids
from hestctl.errors import HestError
from hestctl.records import Run
from hestctl.runs import recording
from hestctl.store.folder import now
from hestctl.store.store import Store


def a_run(run_id: str, command: str = "train", **fields: object) -> Run:
    return Run(run_id, command, "started", now(), **fields)  # type: ignore[arg-type]


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A folder whose store has five runs; the tabs run is the newest."""
    store = Store(tmp_path / "runs.duckdb")
    for run in (
        a_run("calibrate-20261122-101500-0a0a0a0a", "calibrate"),
        a_run("train-hest-20261122-101501-1b1b1b1b", method="hest", emax_ratio=0.45, seed=1, scope="network"),
        a_run("train-hest-20261122-101502-2c2c2c2c", method="hest", emax_ratio=0.45, seed=2, scope="adapter"),
        a_run("harden-hest-20261122-101503-3d3d3d3d", "harden", method="hest", emax_ratio=0.6, seed=2),
        a_run("train-tabs-20261122-101504-4e4e4e4e", method="tabs", seed=1),
    ):
        with recording(store, run) as recorder:
            recorder.run.energy_kind = "estimated"
            recorder.run.summary = {"rouge_lsum": 21.94, "energy_j_per_sample": 3.2106, "many": [0.5] * 99}
    return tmp_path


def rows_of(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in text.splitlines()
        if line.startswith("│")
    ]


def test_a_run_can_be_picked_from_the_list(many: Path) -> None:
    outcome = run_cli(many, "runs", "list")
    assert outcome.code == 0
    assert outcome.out.startswith("finished runs in runs.duckdb")
    rows = [[cell for at, cell in enumerate(row) if at != 2] for row in rows_of(outcome.out)]
    assert rows == [
        ["4e4e4e4e", "train tabs seed 1", "21.9", "3.211"],
        ["3d3d3d3d", "harden hest 0.6 seed 2", "21.9", "3.211"],
        ["2c2c2c2c", "train hest 0.45 adapter seed 2", "21.9", "3.211"],
        ["1b1b1b1b", "train hest 0.45 seed 1", "21.9", "3.211"],
        ["0a0a0a0a", "calibrate", "21.9", "3.211"],
    ]
    header = outcome.out.splitlines()[2]
    assert "ROUGE-Lsum" in header
    assert "J a sample (estimated)" in header


def test_what_is_left_out_of_the_list_is_counted(many: Path) -> None:
    assert "\n3 older runs: --limit 5\n" in run_cli(many, "runs", "list", "--limit", "2").out
    told = run_cli(many, "runs", "list", "--method", "hest", "--limit", "2").out
    assert "\n1 older run: --limit 3\n" in told
    assert "older" not in run_cli(many, "runs", "list").out


def test_the_list_hides_no_column_in_eighty(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        recording(Store(many / "runs.duckdb"), a_run("train-hest-ff")) as it,
    ):
        it.run.method, it.run.weights = "hest", "random"
        raise ZeroDivisionError
    monkeypatch.setattr(out, "_PIPE_WIDTH", 80)
    text = run_cli(many, "runs", "list").out
    words = " ".join(" ".join(row) for row in rows_of(text))
    for shown in ("4e4e4e4e", "adapter seed 2", "failed", "21.9", "3.211", " s "):
        assert shown in words, text
    assert "status" in text
    assert max(map(len, text.splitlines()[:-1])) <= 80


def test_units_that_differ_stand_in_the_rows(many: Path) -> None:
    with recording(Store(many / "runs.duckdb"), a_run("train-base-5f5f5f5f", method="base", seed=7)) as it:
        it.run.energy_kind = "measured"
        it.run.summary = {"accuracy": 0.5, "energy_j_per_sample": 1.0}
    first, second, *_ = rows_of(run_cli(many, "runs", "list").out)
    assert first[1:2] + first[3:] == ["train base", "50.0 % accuracy", "1 J a sample (measured)"]
    assert second[3:] == ["21.9 ROUGE-Lsum", "3.211 J a sample (estimated)"]


def test_an_age_is_told_in_its_largest_unit() -> None:
    start = datetime(2026, 11, 22, tzinfo=UTC)
    told = {
        "5 s": timedelta(seconds=5.9),
        "59 min": timedelta(minutes=59.9),
        "23 h": timedelta(hours=23.9),
        "12 d": timedelta(days=12.5),
        "0 s": timedelta(seconds=-5),
    }
    assert {age(start.isoformat(), start + passed) for passed in told.values()} == set(told)
    assert age("not a time") == "-"


def test_a_short_id_is_one_that_no_other_id_holds() -> None:
    assert short_ids(["train-a-11", "train-b-22"]) == {"train-a-11": "11", "train-b-22": "22"}
    assert short_ids(["train-a-11", "train-b-11"]) == {name: name for name in ("train-a-11", "train-b-11")}
    assert short_ids(["train-1", "train-12"])["train-1"] == "train-1"


def test_a_label_says_what_a_run_is() -> None:
    assert label(a_run("r", method="base", seed=3)) == "train base"
    assert label(a_run("r", "calibrate")) == "calibrate"
    assert label(a_run("r", method="lora", scope="adapter", seed=3)) == "train lora seed 3"


@pytest.mark.parametrize(
    ("part", "whole"),
    [
        ("1b1b1b1b", "train-hest-20261122-101501-1b1b1b1b"),
        ("1b1", "train-hest-20261122-101501-1b1b1b1b"),
        ("harden", "harden-hest-20261122-101503-3d3d3d3d"),
        ("latest", "train-tabs-20261122-101504-4e4e4e4e"),
        ("train-tabs-20261122-101504-4e4e4e4e", "train-tabs-20261122-101504-4e4e4e4e"),
    ],
)
def test_a_part_of_an_id_names_the_run(many: Path, part: str, whole: str) -> None:
    assert run_cli(many, "runs", "show", part, "--json").document["run_id"] == whole


def test_an_id_that_is_part_of_another_names_its_own_run(many: Path) -> None:
    for run_id in ("short", "short-2"):
        with recording(Store(many / "runs.duckdb"), a_run(run_id)):
            pass
    assert run_cli(many, "runs", "show", "short", "--json").document["run_id"] == "short"


def test_a_part_of_several_ids_lists_them_with_their_labels(many: Path) -> None:
    outcome = run_cli(many, "runs", "show", "hest")
    assert outcome.code == 2
    assert "'hest' is part of 3 run ids" in outcome.message
    assert "train-hest-20261122-101501-1b1b1b1b (train hest 0.45 seed 1)" in outcome.message
    for number in range(9):
        with recording(Store(many / "runs.duckdb"), a_run(f"other-{number}")):
            pass
    assert "and 1 more" in run_cli(many, "runs", "show", "other").message


def test_of_several_matches_those_that_serve_come_first() -> None:
    runs = [a_run("train-tabs-1", method="tabs"), a_run("profile-tabs-1", "profile", method="tabs")]
    assert choose(runs, "tabs", runs[:1]).run_id == "train-tabs-1"
    with pytest.raises(HestError, match="part of 2 run ids"):
        choose(runs, "tabs")


def test_what_no_id_holds_names_the_nearest(many: Path) -> None:
    outcome = run_cli(many, "runs", "show", "train-tabs-20261122-101504-4e4e4e4f")
    assert outcome.code == 2
    assert "the nearest are: train-tabs-20261122-101504-4e4e4e4e" in outcome.message


def test_a_shown_run_leaves_long_lists_to_programs(many: Path) -> None:
    shown = run_cli(many, "runs", "show", "tabs").out
    assert shown.startswith("train-tabs-20261122-101504-4e4e4e4e: train tabs seed 1\n")
    assert "in --json alone: settings, summary.many" in shown
    assert shown.count("0.5") == 0
    assert run_cli(many, "runs", "show", "tabs", "--json").document["summary"]["many"] == [0.5] * 99


def test_every_command_takes_a_part_of_an_id(copied: Study) -> None:
    tabs, hest = (outcome.document["run_id"] for outcome in (copied.tabs, copied.hest))
    last = hest.rpartition("-")[2]
    hardened = run_cli(copied.folder, "harden", "--run", last, "--reference", "tabs", "-q", "--json").document
    assert hardened["parent_run_id"] == hest
    assert tabs in hardened["emax_origin"]
    # Of the two runs of hest, the one that no longer stands alone is named by more of its id.
    assert run_cli(copied.folder, "harden", "--run", "hest", "-q").code == 2
    sweep = ("--seq-len", "32", "--new-tokens", "2", "--repeats", "1", "-q", "--json")
    for named, found in ((last, hest), ("latest", hardened["run_id"])):
        profiled = run_cli(copied.folder, "profile", "--run", named, *sweep).document
        assert profiled["profiled_run_id"] == found
    assert (
        run_cli(copied.folder, "harden", "--run", "latest", "-q", "--json").document["parent_run_id"] == hest
    )
    for arguments in (("--resume", "--run", last), ("--reference", "nothing", "--method", "hest")):
        refused = run_cli(copied.folder, "train", "--method", "tabs", *TRIAL, "-q", *arguments)
        assert refused.code == 2
    dry = run_cli(copied.folder, "train", *TRIAL, "--dry-run", "--json", "--reference", "latest").document
    assert dry["settings"]["budget.reference"] == {"value": tabs, "origin": "flag"}


MISSING = {
    "compare": ("compare", "--no-figures"),
    "runs list": ("runs", "list"),
    "runs show": ("runs", "show", "x"),
    "runs verify": ("runs", "verify"),
    "runs rebuild": ("runs", "rebuild"),
    "harden": ("harden", "--run", "x"),
    "profile": ("profile", "--run", "latest"),
}


@pytest.mark.parametrize("name", MISSING)
@pytest.mark.parametrize(
    ("db", "says", "next"),
    [
        ("rnus.duckdb", "there is no store rnus.duckdb; nearby: ", "runs.duckdb"),
        (
            "kept",
            "kept is a folder; it holds kept/a.duckdb, kept/b.duckdb",
            "name it with: --db kept/a.duckdb",
        ),
        ("runs", "runs is a folder; its store is runs.duckdb", "name it with: --db runs.duckdb"),
        ("empty.d", "empty.d is a folder, and no store is in it", "--db runs.duckdb"),
        ("runs.duckdb.lock", "runs.duckdb.lock is kept beside a store", "name it with: --db runs.duckdb"),
        ("no.duckdb.wal", "no.duckdb.wal is kept beside a store", "name it with: --db no.duckdb"),
    ],
)
def test_one_answer_to_a_store_that_is_not_there(
    copied: Study, name: str, db: str, says: str, next: str
) -> None:
    for folder in ("kept", "empty.d"):
        (copied.folder / folder).mkdir()
    for store in ("a.duckdb", "b.duckdb"):
        shutil.copy(copied.folder / "runs.duckdb", copied.folder / "kept" / store)
    (copied.folder / "runs.duckdb.lock").touch()
    before = files_of(copied.folder)
    outcome = run_cli(copied.folder, *MISSING[name], "--db", db)
    assert (outcome.code, outcome.out) == (2, "")
    assert says in outcome.message
    assert next in outcome.message.partition("hint")[2]
    assert files_of(copied.folder) == before


@pytest.mark.parametrize("name", MISSING)
def test_run_folders_without_their_store_are_named(copied: Study, name: str) -> None:
    (copied.folder / "runs.duckdb").unlink()
    if name == "runs rebuild":
        assert json.loads(run_cli(copied.folder, *MISSING[name], "--json").out)["runs"] == 2
        return
    outcome = run_cli(copied.folder, *MISSING[name])
    assert outcome.code == 2
    assert "the folders of its runs are in runs" in outcome.message
    assert "hestctl runs rebuild --db runs.duckdb" in outcome.message


def test_a_search_is_drawn_by_a_part_of_its_id(many: Path) -> None:
    for name in ("aaaa", "bbbb"):
        with recording(Store(many / "runs.duckdb"), a_run(f"search-hest-{name}", "search", method="hest")):
            pass
    for named, whole in (("aaaa", "search-hest-aaaa"), ("latest", "search-hest-bbbb")):
        outcome = run_cli(many, "compare", "--search", named, "--no-figures", "--json")
        assert outcome.document["run_id"] == whole, outcome.err
    assert "part of 2 run ids" in run_cli(many, "compare", "--search", "search", "--no-figures").message
    assert "there is no search '1b1b'" in run_cli(many, "compare", "--search", "1b1b", "--no-figures").message


READING = ("runs list", "runs verify", "compare", "profile")


@pytest.mark.parametrize("name", READING)
@pytest.mark.parametrize("content", ["text", "empty", "cut"])
def test_a_file_that_is_no_store_is_rebuilt_only_where_folders_are(
    copied: Study, name: str, content: str
) -> None:
    whole = (copied.folder / "runs.duckdb").read_bytes()
    damaged = {"text": b"these are not the runs that you look for", "empty": b"", "cut": whole[:20_000]}
    for db in ("runs.duckdb", "alone.duckdb"):
        (copied.folder / db).write_bytes(damaged[content])
    with_folders, alone = (
        run_cli(copied.folder, *MISSING[name], "--db", db) for db in ("runs.duckdb", "alone.duckdb")
    )
    assert (with_folders.code, alone.code) == (4, 4)
    assert "hestctl runs rebuild --db" in with_folders.message
    assert "rebuild --db" not in alone.message
    says = "no run folders are beside it" if content == "cut" else "this is no store of hestctl"
    assert says in alone.message
    assert "name another with --db" in alone.message


def test_a_store_without_its_folders_is_told_in_one_line(many: Path) -> None:
    shutil.copy(many / "runs.duckdb", many / "copy.duckdb")
    outcome = run_cli(many, "runs", "verify", "--db", "copy.duckdb")
    assert outcome.code == 4
    assert outcome.err == (
        "error: none of the 5 run folders is in copy; compare works without them\n"
        "  hint: put the folders there to verify\n"
    )


def test_some_missing_folders_are_named_beside_what_else_differs(many: Path) -> None:
    shutil.rmtree(many / "runs" / "calibrate-20261122-101500-0a0a0a0a")
    (many / "runs" / "train-tabs-20261122-101504-4e4e4e4e" / "run.json").write_text("{")
    outcome = run_cli(many, "runs", "verify")
    assert outcome.code == 4
    assert "1 of 5 run folders are missing in runs: calibrate-20261122-101500-0a0a0a0a" in outcome.message
    assert "train-tabs-20261122-101504-4e4e4e4e" in outcome.message
    assert "rebuild" not in outcome.message, "it would drop the run whose folder is missing"


@pytest.mark.parametrize("name", ["runs list", "runs verify", "compare", "runs show", "env"])
def test_readers_leave_no_file_behind(copied: Study, name: str) -> None:
    for lock in copied.folder.glob("*.lock"):
        lock.unlink()
    before = sorted(copied.folder.rglob("*"))
    arguments = {"runs show": ("runs", "show", "tabs"), "env": ("env",)}.get(name) or MISSING[name]
    outcome = run_cli(copied.folder, *arguments)
    assert outcome.code == 0, outcome.err
    assert sorted(copied.folder.rglob("*")) == before


@pytest.mark.parametrize("name", ["runs list", "compare"])
def test_a_wait_for_a_store_is_told(many: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hestctl.store.lock.TELL_AFTER_S", 0.0)
    monkeypatch.setattr(Store.__init__, "__defaults__", (0.05,))
    monkeypatch.setattr("hestctl.store.queries.connect.__defaults__", (0.05,))
    with Store(many / "runs.duckdb").locked():
        outcome = run_cli(many, *MISSING[name])
    assert outcome.code == 4
    first, *_ = outcome.err.splitlines()
    assert first.startswith(f"waiting for process {os.getpid()} on ")
    assert first.endswith("runs.duckdb")
    assert outcome.err.count("waiting") == 1
    assert "waiting" not in run_cli(many, *MISSING[name]).err
