"""One comparison over several stores: the same document however the runs are dealt to files."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import large_stores
import pytest
from simulated_runs import a_run, add, classified, empty_store, generated

from hestctl.cli.app import main
from hestctl.compare import reading
from hestctl.compare.reading import load, read_runs
from hestctl.compare.table import as_json, compare
from hestctl.errors import Exit, HestError
from hestctl.records import Window
from hestctl.store import database, migrations
from hestctl.store.queries import connect

RUNS, SAMPLES = 23, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs in one store, and dealt to three."""
    made = tmp_path_factory.mktemp("stores")
    large_stores.make(made / "one", RUNS, SAMPLES, 1)
    large_stores.make(made / "three", RUNS, SAMPLES, 3)
    return made


def document(*stores: Path) -> dict[str, Any]:
    """What ``compare --json`` says, but for the names of the stores."""
    with connect([str(store) for store in stores]) as connection:
        said = as_json(compare(connection))
    for run in said["runs"].values():
        del run["store"]
    return said


def test_one_store_three_stores_and_a_glob_say_the_same(folder: Path) -> None:
    one = document(folder / "one" / "big-0.duckdb")
    # The older of two runs of one kind and seed does not count, the others do.
    assert len(one["runs"]) + len(one["set_apart"]) == RUNS
    assert any(pair["gap_percent"]["value"] is not None for pair in one["pairs"])
    parts = [folder / "three" / f"big-{number}.duckdb" for number in range(3)]
    assert document(*parts) == one
    assert document(*reversed(parts)) == one
    assert document(folder / "three" / "*.duckdb") == one


def test_a_store_named_twice_or_copied_changes_nothing(folder: Path, tmp_path: Path) -> None:
    store = folder / "one" / "big-0.duckdb"
    shutil.copy(store, tmp_path / "copy.duckdb")
    assert document(store, store, tmp_path / "copy.duckdb") == document(store)


def test_an_older_store_beside_a_new_one_is_compared_alike(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [folder / "three" / f"big-{number}.duckdb" for number in range(3)]
    older = tmp_path / "big-1.duckdb"
    with monkeypatch.context() as early:
        early.setattr(migrations, "MIGRATIONS", migrations.MIGRATIONS[:1])
        database.create(older, lambda con: None)
    with duckdb.connect(str(older)) as con:
        con.execute("ATTACH ? AS newer (READ_ONLY)", [str(parts[1])])
        for table in ("runs", "samples", "windows", "steps", "utilisation"):
            columns = [name for name, *_ in con.execute(f"DESCRIBE {table}").fetchall()]
            con.execute(f"INSERT INTO {table} BY NAME SELECT {', '.join(columns)} FROM newer.{table}")
    before = older.read_bytes()
    assert document(parts[0], older, parts[2]) == document(*parts)
    assert older.read_bytes() == before


@pytest.mark.parametrize("portion", [1, 100, 10**9])
def test_samples_come_in_portions_and_each_run_has_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, portion: int
) -> None:
    monkeypatch.setattr(reading, "_PORTION", portion)
    with connect([str(folder / "three" / "*.duckdb")]) as connection:
        runs = read_runs(connection, ("train",))
        found = load(connection, runs)
        assert list(found) == [run.run_id for run, _ in runs]
        for run_id, one in found.items():
            expected = connection.execute(
                "SELECT sample_id, batch_index, energy_j, rouge_lsum FROM samples WHERE run_id = ? "
                "ORDER BY position",
                [run_id],
            ).fetchall()
            columns = (
                one.samples.ids,
                one.samples.batches,
                one.samples["energy_j"],
                one.samples["rouge_lsum"],
            )
            assert list(zip(*columns, strict=True)) == expected


def test_runs_share_the_strings_of_their_samples(folder: Path) -> None:
    """A million names would take a hundred megabytes, and a second for every comparison of two runs."""
    with connect([str(folder / "three" / "*.duckdb")]) as connection:
        first, *others = load(connection, read_runs(connection, ("train",))).values()
    assert all(a is b for one in others for a, b in zip(first.samples.ids, one.samples.ids, strict=True))


def test_what_a_run_says_of_its_samples_is_its_own() -> None:
    """Replicates are averaged, the test split counts, joules of another kind or not valid stay out."""
    connection = empty_store()
    plain, twice, other = a_run("tabs", 1), a_run("hest", 2), a_run("lora", 3)
    rows = generated(twice, 12)
    again = [replace(one, position=one.position + 12, rouge_l=one.rouge_l + 2) for one in rows[:3]]
    invalid = [replace(rows[4], energy_valid=False, energy_reason="too short", energy_j=99.0)]
    estimated = [replace(rows[5], energy_kind="estimated", energy_j=99.0)]
    add(connection, plain, samples=generated(plain, 8))
    add(connection, twice, samples=[*rows, *again, *invalid, *estimated])
    validation = [replace(one, split="validation") for one in generated(other, 20)]
    window = Window("w", "test", 0.0, 1.0, "measured", "counter", valid=False, reason="reset")
    add(connection, other, samples=[*validation, *generated(other, 8)], windows=[window, window])
    found = load(connection, read_runs(connection, ("train",)))
    samples = found["hest-0002"].samples
    assert samples.ids == tuple(one.sample_id for one in rows)
    assert samples["rouge_l"].tolist() == pytest.approx(
        [one.rouge_l + (place < 3) for place, one in enumerate(rows)]
    )
    assert samples["energy_j"].tolist() == pytest.approx([one.energy_j for one in rows])
    assert found["hest-0002"].energy_reason == "too short"
    assert (found["lora-0003"].split, len(found["lora-0003"].samples.ids)) == ("test", 8)
    assert found["lora-0003"].invalid_windows == (("reset", 2),)
    assert found["tabs-0001"].invalid_windows == ()
    assert len(found["tabs-0001"].samples.ids) == 8


def test_labels_and_answers_come_with_their_samples() -> None:
    connection = empty_store()
    run = a_run("tabs", 1, dataset="lra-text")
    rows = classified(run, 30, 0.7)
    rows[3] = replace(rows[3], predicted_label=None)
    add(connection, run, samples=rows)
    samples = load(connection, read_runs(connection, ("train",)))["tabs-0001"].samples
    assert samples.labelled
    assert samples.labels == tuple(one.label for one in rows)
    assert samples["correct"].tolist() == [float(one.label == one.predicted_label) for one in rows]


def test_a_run_without_samples_is_set_apart_and_not_the_others() -> None:
    connection = empty_store()
    for run, count in ((a_run("tabs", 1), 8), (a_run("hest", 2), 8), (a_run("lora", 3), 0)):
        add(connection, run, samples=generated(run, count))
    found = compare(connection)
    assert [one.run_id for one in found.rows] == ["hest-0002", "tabs-0001"]
    assert [(one.run_id, one.kind) for one in found.set_apart] == [("lora-0003", "without samples")]


def test_only_runs_without_samples_say_so() -> None:
    connection = empty_store()
    add(connection, a_run("tabs", 1))
    with pytest.raises(HestError, match="no train run is finished with test samples"):
        compare(connection)


# What the command says


def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *stores: Path
) -> tuple[int, str]:
    names = [text for store in stores for text in ("--db", str(store))]
    monkeypatch.setattr(sys, "argv", ["hestctl", "compare", *names, "--no-figures", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    code = ended.value.code
    assert isinstance(code, int)
    return code, said.out if code == 0 else said.err


def test_several_stores_are_one_document(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = command(capsys, monkeypatch, folder / "one" / "*.duckdb", folder / "three" / "*.duckdb")
    assert code == 0
    runs = json.loads(said)["runs"]
    # Every run is in both folders: it counts once, from the first.
    assert {run["store"] for run in runs.values()} == {"one/big-0"}


def test_what_cannot_be_read_has_its_exit_code(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = command(capsys, monkeypatch, folder / "one" / "big-0.duckdb", tmp_path / "none-*.duckdb")
    assert (code, "there is no store" in said) == (Exit.USAGE, True)
    damaged = tmp_path / "damaged.duckdb"
    damaged.write_bytes((folder / "one" / "big-0.duckdb").read_bytes()[:5_000])
    code, said = command(capsys, monkeypatch, folder / "one" / "big-0.duckdb", damaged)
    assert (code, "damaged.duckdb" in said, "no run folders are beside it" in said) == (
        Exit.STORE,
        True,
        True,
    )


def test_the_command_measures_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = large_stores.make(tmp_path, 4, 12, 2)
    with duckdb.connect(str(paths[1]), read_only=True) as con:
        assert con.execute("SELECT count(*), count(DISTINCT run_id) FROM samples").fetchall() == [(24, 2)]
    large_stores.bench(tmp_path, False, 1, [])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["wall_s"] > 0
    assert last["peak_mib"] > 0
