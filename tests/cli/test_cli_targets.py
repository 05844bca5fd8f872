"""What ``compare`` would write, or be told, is looked at before anything is read or drawn."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import duckdb
import pytest
from cli_tools import Study, files_of, run_cli


def refused(folder: Path, *arguments: str) -> str:
    """The message of a refusal that left every file as it was."""
    before = files_of(folder)
    outcome = run_cli(folder, "compare", *arguments)
    assert (outcome.code, outcome.out) == (2, ""), outcome.out + outcome.err
    assert files_of(folder) == before
    return outcome.message


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hestctl.store.queries.connect", lambda *_: pytest.fail("a store was read"))


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize("name", ["runs.duckdb", "./runs.duckdb", "hard.html", "link.html"])
@pytest.mark.parametrize("flag", ["--csv", "--report"])
def test_a_store_that_is_read_is_no_target(copied: Study, flag: str, name: str) -> None:
    os.link(copied.folder / "runs.duckdb", copied.folder / "hard.html")
    (copied.folder / "link.html").symlink_to("runs.duckdb")
    message = refused(copied.folder, flag, name)
    assert f"{flag} {Path(name)} is a store that is being read" in message
    assert f"{flag} " + ("rows.csv" if flag == "--csv" else "report.html") in message.partition("hint")[2]


@pytest.mark.usefixtures("nothing_is_read")
def test_no_other_database_is_a_target_whatever_it_is_called(copied: Study) -> None:
    with duckdb.connect(str(copied.folder / "other.csv")) as con:
        con.execute("CREATE TABLE recipes (name VARCHAR)")
    assert "other.csv is a database" in refused(copied.folder, "--csv", "other.csv")
    for kept in ("runs.duckdb.lock", "runs.duckdb.wal", "runs.duckdb.lock-holder"):
        assert f"{kept} is a name that runs.duckdb keeps" in refused(copied.folder, "--csv", kept)


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize("more", [(), ("--no-figures",), ("--search", "search-1")])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--out", "runs.duckdb"), "--out: runs.duckdb is a file"),
        (("--out", "runs.duckdb/drawn"), "which is a file"),
        (("--theme", "blue"), "unknown theme 'blue'"),
        (("--formats", "png,gif"), "unknown figure format 'gif'"),
        (("--formats", ""), "unknown figure format ''"),
        (("--db", "nowhere.duckdb"), "there is no store nowhere.duckdb"),
    ],
)
def test_options_are_checked_whether_or_not_figures_are_drawn(
    copied: Study, arguments: tuple[str, ...], says: str, more: tuple[str, ...]
) -> None:
    assert says in refused(copied.folder, *arguments, *more)


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--csv", "page.md", "--report", "page.html"), "page.md is where --report writes"),
        (("--csv", "rows.csv", "--search", "search-1"), "not of a search"),
        (("--report", "notes.html"), "notes_files is a file"),
    ],
)
def test_targets_that_would_meet_something_else(copied: Study, arguments: tuple[str, ...], says: str) -> None:
    (copied.folder / "notes_files").write_text("my own")
    assert says in refused(copied.folder, *arguments)


def test_the_default_folder_of_figures_may_be_a_file(copied: Study) -> None:
    (copied.folder / "figures").write_text("my own")
    assert "figures is a file" in refused(copied.folder)
    assert run_cli(copied.folder, "compare", "--no-figures").code == 0


def test_formats_that_a_page_does_not_have_are_not_ignored_in_silence(
    copied: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hestctl.compare.pictures.draw", lambda *_, **__: pytest.fail("drawn"))
    told = run_cli(
        copied.folder, "compare", "--report", "page.html", "--formats", "svg,pdf", "--no-figures"
    ).err
    assert "--formats is for those of a folder, --out figures" in told
    quiet = run_cli(copied.folder, "compare", "--report", "page.html", "--no-figures").err
    assert "--formats" not in quiet


def test_a_store_without_its_option_is_asked_after(copied: Study) -> None:
    message = refused(copied.folder, "runs.duckdb")
    assert "did you mean hestctl compare --db runs.duckdb?" in message
    shutil.copy(copied.folder / "runs.duckdb", copied.folder / "more runs.duckdb")
    message = refused(copied.folder, "runs.duckdb", "more runs.duckdb", "--no-figures")
    assert "--db runs.duckdb --db 'more runs.duckdb'" in message
