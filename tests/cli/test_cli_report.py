"""``compare --report``: the page of a real study, beside --json and --csv, and the places it refuses."""

from __future__ import annotations

import csv
import html
import json
from importlib import resources
from pathlib import Path

import pytest
from cli_tools import Study, files_of, run_cli


def test_report_json_and_csv_work_together(copied: Study) -> None:
    arguments = ("compare", "--report", "out/page.html", "--csv", "rows.csv", "--json")
    outcome = run_cli(copied.folder, *arguments)
    assert outcome.code == 0, outcome.err
    document = outcome.document
    assert document["report"] == ["out/page.html", "out/page.md"]
    assert document["figures"] == []
    assert not (copied.folder / "figures").exists()
    page = (copied.folder / "out" / "page.html").read_text()
    assert html.escape(document["conclusion"].partition(":")[0], quote=False) in page
    assert page.count("data:image/") == len(list((copied.folder / "out" / "page_files").iterdir())) > 0
    for run_id in document["runs"]:
        assert run_id in page
    with (copied.folder / "rows.csv").open(newline="") as file:
        assert {row["run_id"] for row in csv.DictReader(file)} == set(document["runs"])


def test_a_report_has_no_text_of_articles_or_outputs_and_no_path(copied: Study) -> None:
    outcome = run_cli(copied.folder, "compare", "--report", "page.html", "--no-figures", "--margin", "2")
    assert outcome.code == 0, outcome.err
    assert "report: page.html" in outcome.out
    assert not (copied.folder / "page_files").exists()
    written = [(copied.folder / name).read_text() for name in ("page.html", "page.md")]
    corpus = resources.files("hestctl.data") / "corpus"
    rows = [json.loads(line) for line in (corpus / "test.jsonl").read_text().splitlines()]
    texts = [row[key][:40] for row in rows for key in ("article", "highlights")]
    assert len(texts) > 20
    for text in written:
        assert str(copied.folder) not in text
        assert not [one for one in texts if html.escape(one) in text or one in text]
        assert "hestctl compare --db again.duckdb --margin 2 --report page.html" in text


def test_figures_go_into_a_folder_too_where_one_is_named(copied: Study) -> None:
    outcome = run_cli(copied.folder, "compare", "--report", "page.html", "--out", "drawn")
    assert outcome.code == 0, outcome.err
    assert list((copied.folder / "drawn").glob("comparison_*.png"))
    assert "data:image/" in (copied.folder / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--report", "."), "is a folder"),
        (("--report", "page.pdf"), "does not end in .html"),
        (("--report", "runs.duckdb/page.html"), "cannot be written"),
        (("--csv", "runs"), "is a folder"),
        (("--csv", "runs.duckdb/rows.csv"), "cannot be written"),
        (("--report", "page.html", "--search", "search-1"), "not of a search"),
    ],
)
def test_places_that_cannot_be_written_are_refused_before_any_work(
    copied: Study, arguments: tuple[str, ...], says: str
) -> None:
    before = files_of(copied.folder)
    outcome = run_cli(copied.folder, "compare", *arguments)
    assert outcome.code == 2
    assert says in outcome.message
    assert files_of(copied.folder) == before


def test_a_text_beside_the_page_that_is_no_report_is_not_replaced(copied: Study) -> None:
    (copied.folder / "notes.md").write_text("my own\n")
    outcome = run_cli(copied.folder, "compare", "--report", "notes.html", "--no-figures")
    assert outcome.code == 2
    assert "notes.md" in outcome.message
    assert (copied.folder / "notes.md").read_text() == "my own\n"
    assert not Path(copied.folder / "notes.html").exists()
