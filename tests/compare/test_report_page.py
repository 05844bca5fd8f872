"""The report: what stands in it, in which order, and that nothing in a store can break or betray it."""

from __future__ import annotations

import base64
import html
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import duckdb
import pytest
from simulated_report import VERSIONS, calibration, settings_of, wide_study
from simulated_runs import a_run, add, classified, empty_store, generated

from hestctl.compare import chapters, evidence, pages
from hestctl.compare.configurations import configurations
from hestctl.compare.document import Code, Document, Fold, Grid, Picture, Section
from hestctl.compare.glossary import GAP_COLUMNS, MEASURES, gap_columns
from hestctl.compare.headline import headline
from hestctl.compare.names import shortener
from hestctl.compare.results import METRICS, Comparison
from hestctl.compare.table import compare
from hestctl.errors import Exit, HestError

ORDER = (
    "What was compared", "Gap at equal quality", "Configurations", "The original's expectations",
    "A/A control", "Figures", "What was not measured, and why", "How it was measured", "Provenance",
    "How to repeat it", "Glossary",
)  # fmt: skip
VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """A page's tags, checked for nesting, and its texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> within {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def made(
    connection: duckdb.DuckDBPyConnection, margin: float = 1.0, **options: Any
) -> tuple[Comparison, Document]:
    found = compare(connection, margin=margin)
    return found, pages.make(connection, found, ["--margin", "1"], **{"draw": False, **options})


@pytest.fixture(scope="module")
def whole() -> tuple[Comparison, Document]:
    return made(wide_study(), margin=3)


def section(document: Document, title: str) -> Section:
    return next(one for one in document.sections if one.title == title)


def grids(document: Document, title: str) -> list[Grid]:
    found = []
    for block in section(document, title).blocks:
        found += [
            one for one in (block.blocks if isinstance(block, Fold) else (block,)) if isinstance(one, Grid)
        ]
    return found


def unmarked(text: str) -> str:
    """Markdown without its escapes and marks of code."""
    return re.sub(r"\\([\W_])", r"\1", html.unescape(text)).replace("`", "")


# Contents


def test_the_verdict_comes_first_and_the_sections_in_their_order(whole: tuple[Comparison, Document]) -> None:
    found, document = whole
    first = headline(found)
    assert document.verdict == first.sentence
    assert document.because == tuple(first.reasons())
    assert tuple(one.title for one in document.sections) == ORDER
    page = Page(pages.as_html(document))
    assert page.text.index(first.sentence) < page.text.index(first.next[-1]) < page.text.index("What was com")
    anchors = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    ids = [f"#{attrs['id']}" for tag, attrs in page.tags if tag == "section"]
    assert anchors == ids
    assert len(set(ids)) == len(ORDER)


def test_html_and_markdown_hold_the_same_texts(whole: tuple[Comparison, Document]) -> None:
    _, document = whole

    def close(text: str) -> str:
        """Without the space that a mark of code leaves before what follows it."""
        return re.sub(r" (?=[:;,.)])", "", text)

    page = close(Page(pages.as_html(document)).text)
    markdown = " ".join(unmarked(pages.as_markdown(document, "report_files")).split())
    texts = 0
    for title in ORDER:
        for grid in grids(document, title):
            for text in (*grid.headers, *grid.notes, *(cell for row in grid.rows for cell in row)):
                plain = " ".join(text.split()).replace("`", "")
                assert close(plain) in page
                assert plain in markdown
                texts += 1
    assert texts > 1_000


def test_what_was_compared_is_told_with_device_data_and_counts(whole: tuple[Comparison, Document]) -> None:
    found, document = whole
    (grid,) = grids(document, "What was compared")
    told = dict(grid.rows)
    assert {name: told[name] for name in found.facts} == {
        name: value[:12] if name == "data hash" else value for name, value in found.facts.items()
    }
    (meanings, _) = section(document, "What was compared").blocks
    assert [text.partition(":")[0] for text in meanings.items] == [  # type: ignore[union-attr]
        *("hest", "tabs", "lora", "base"),
        *("control", "ablation"),
    ]
    assert told["samples a run (n)"] == "40"
    assert (told["configurations"], told["runs"], told["seeds"]) == ("7", "19", "42, 43, 44")


def test_every_pair_is_in_the_gap_table_with_what_belongs_to_it(whole: tuple[Comparison, Document]) -> None:
    found, document = whole
    matrix, first, every = grids(document, "Gap at equal quality")
    assert matrix.headers[1:] == ("tabs (baseline)", "lora (baseline)", "lora int8 control")
    assert {(row[0], row[1]) for row in every.rows} == {(one.proposed, one.other) for one in found.pairs}
    assert len(every.headers) == len(gap_columns(True)) == len(GAP_COLUMNS)
    assert found.best_proposed is not None
    assert every.rows[: len(first.rows)] == tuple((found.best_proposed.label, *row) for row in first.rows)
    assert first.title == f"{found.best_proposed.label} against each"
    assert [row[-1] for row in first.rows] == sorted(
        (row[-1] for row in first.rows), key=["baseline", "control", "ablation", "base"].index
    )
    pair = next(one for one in found.pairs if (one.proposed, one.other) == ("hest 0.6", "tabs"))
    cells = dict(
        zip(every.headers, next(row for row in every.rows if row[:2] == ("hest 0.6", "tabs")), strict=True)
    )
    assert pair.gap_percent.value is not None
    assert cells["gap %, measured [95 %]"].startswith(f"{pair.gap_percent.value:.1f} [")
    assert cells["by length"] == f"{pair.length_part_percent:+.1f}"
    assert cells["controller parameters"] == "21,000 : 276,480"
    assert cells["verdict"] == pair.verdict
    assert "per new token" in cells["at equal length"]
    assert float(cells["adjusted p"]) == pytest.approx(pair.claim.adjusted, rel=0.01)
    assert "(a) " in every.notes[0]


def test_estimated_joules_show_ratios_of_time_and_no_ratio_of_joules() -> None:
    _, document = made(wide_study(energy_kind="estimated", meter="CPU time x 8 W"))
    every = grids(document, "Gap at equal quality")[-1]
    assert "time ratio [95 %]" in every.headers
    assert not any(header.startswith("joules ratio") for header in every.headers)
    told = Page(pages.as_html(document)).text
    assert not {"gap %, estimated [95 %]", "verdict", "adjusted p"} & set(every.headers)
    assert every.notes[-1] == "joules are estimated: no gap and no verdict, every pair is inconclusive"
    assert "joules per sample, J, estimated" in told
    assert "from the energy counter" not in told


def test_a_configuration_is_one_line_and_its_runs_are_folded(whole: tuple[Comparison, Document]) -> None:
    found, document = whole
    joined, *parts, single = grids(document, "Configurations")
    assert [part.title for part in parts] == ["Time", "Joules in parts", "Budget", "Training"]
    assert [row[0] for row in joined.rows] == [one.label for one in configurations(found.rows)]
    assert [row[0] for row in single.rows] == [row.run_id for row in found.rows]
    means = [
        row.measure("energy_j_per_sample").value or 0 for row in found.rows if row.config_label == "tabs"
    ]
    place = joined.headers.index("joules per sample, J, measured")
    cell = next(row for row in joined.rows if row[0] == "tabs")[place]
    assert cell.startswith(f"{sum(means) / 3:.1f} [")
    assert any(isinstance(block, Fold) for block in section(document, "Configurations").blocks)


def test_every_absent_measure_stands_under_its_reason(whole: tuple[Comparison, Document]) -> None:
    found, document = whole
    (grid, *_) = grids(document, "What was not measured, and why")
    told = {reason: (what, where) for reason, what, where in grid.rows}
    for one in configurations(found.rows):
        for name, measure in one.measures.items():
            if measure.value is None:
                assert METRICS[name].title in told[measure.reason or ""][0]
    for pair in found.pairs:
        if pair.gap_percent.value is None:
            assert "gap" in told[pair.gap_percent.reason or ""][0]
    for line in found.expectations:
        if line.outcome == "not measured":
            assert line.text in told[line.reason][0]
    of_another = [what for reason, (what, _) in told.items() if "--backbone llama-2-7b" in reason]
    assert of_another == ["joules and latency of Llama-2-7b"]


def test_figures_that_have_nothing_to_draw_are_named_with_the_reason() -> None:
    found = compare(wide_study(4))
    reasons = {"comparison_length": "no profile run"}
    assert "no profile run" in evidence.not_measured(found, reasons).blocks[0].rows[-1][0]  # type: ignore[union-attr]
    shown = chapters.figures([], reasons, drawn=True).blocks
    assert "comparison_length: not drawn (no profile run)" in str(shown)


def test_the_expectations_and_the_aa_control_are_told(whole: tuple[Comparison, Document]) -> None:
    found, document = whole
    (grid,) = grids(document, "The original's expectations")
    assert grid.rows == tuple((line.text, line.outcome, line.reason) for line in found.expectations)
    assert "+0.3 % (the meter's bound is 0.8 %)" in str(section(document, "A/A control"))
    _, without = made(wide_study(4, calibrated=False))
    assert "not measured (no calibration of this device" in str(section(without, "A/A control"))


def test_two_runs_of_one_model_are_a_row_of_the_aa_control() -> None:
    connection = wide_study(12, seeds=1)
    again = a_run("base", 90, seed=43, settings=settings_of("base", 43), scope="network", versions=VERSIONS)
    add(connection, again, samples=generated(again, 12, joules=52, score=18))
    found, document = made(connection)
    (grid,) = grids(document, "A/A control")
    assert len(grid.rows) == len(found.repeats) == 1
    assert grid.rows[0][0].startswith("base")
    assert re.match(r"[+-]\d", grid.rows[0][3])
    assert found.repeatability.reason in str(section(document, "A/A control"))


def test_methods_are_told_from_facts(whole: tuple[Comparison, Document]) -> None:
    _, document = whole
    told = str(section(document, "How it was measured"))
    assert "energy counter nvml on NVIDIA H100" in told
    assert "apportioned: taken for each generated batch" in told
    assert "the variation between trainings as well as between samples" in told
    assert "non-inferiority at 3 points" in told
    assert "580.65.06" in told
    assert "not measured: noise_j (the device was busy)" in told
    assert "the device idles unevenly" in told
    assert "Every sample has valid joules." in told
    _, single = made(wide_study(4, seeds=1, calibrated=False))
    told = str(section(single, "How it was measured"))
    assert "a second source of chance" not in told
    assert "certificate" not in told


def test_a_certificate_of_another_device_or_of_later_is_not_theirs() -> None:
    connection = wide_study(4, calibrated=False)
    add(connection, calibration(run_id="calibrate-2", device_uuid="GPU-2"))
    add(connection, calibration(run_id="calibrate-3", created_at="2025-12-01T00:00:00+00:00"))
    _, document = made(connection)
    assert "580.65.06" not in str(document)
    assert ("driver", "not recorded", "no certificate names one") in grids(document, "Provenance")[1].rows


def test_no_meter_is_told_with_its_reason() -> None:
    connection = empty_store()
    for run in (a_run("tabs", 1), a_run("hest", 2)):
        run = replace(run, energy_kind="none", meter="none")
        add(connection, run, samples=generated(run, 8))
    _, document = made(connection)
    told = str(section(document, "How it was measured"))
    assert "Joules were not measured: the run had no energy meter: no device." in told


def test_provenance_has_runs_versions_and_settings_that_differ(whole: tuple[Comparison, Document]) -> None:
    found, document = whole
    runs, versions, differing, shared = grids(document, "Provenance")
    assert [row[0] for row in runs.rows] == [row.run_id for row in found.rows]
    assert ("torch", "2.13.0", "all") in versions.rows
    told = {(row[0], row[1]): row[2] for row in differing.rows}
    assert told["backbone.precision", "int8"] == "lora int8 control"
    assert told["backbone.precision", "full"] == "the other 16"
    assert told["budget.emax_ratio", "0.4"] == "hest 0.4"
    keys = {row[0] for row in shared.rows}
    assert "train.learning_rate" in keys
    assert keys.isdisjoint({row[0] for row in differing.rows})
    assert not any(key.startswith(("db", "search.")) for key in keys)


def test_the_commands_end_with_this_comparison(whole: tuple[Comparison, Document]) -> None:
    _, document = whole
    (code,) = [block for block in section(document, "How to repeat it").blocks if isinstance(block, Code)]
    assert code.lines[0].startswith("hestctl calibrate --db again.duckdb --profile quickstart")
    assert code.lines[-1] == "hestctl compare --db again.duckdb --margin 1"


def test_every_column_has_a_line_in_the_glossary(whole: tuple[Comparison, Document]) -> None:
    assert set(MEASURES) == set(METRICS)
    _, document = whole
    terms = {row[0] for row in grids(document, "Glossary")[0].rows}
    for grid in grids(document, "Configurations"):
        assert set(grid.headers) - {"run", "seed"} <= terms
    assert set(GAP_COLUMNS) - {"time ratio"} <= terms


def test_classification_has_accuracy_and_chance() -> None:
    connection = empty_store()
    for run in (a_run("tabs", 1, dataset="lra-text"), a_run("hest", 2, dataset="lra-text")):
        add(connection, run, samples=classified(run, 40, 0.85))
    _, document = made(connection)
    headers = grids(document, "Configurations")[0].headers
    assert {"accuracy, %", "chance level, %"} <= set(headers)
    assert not any("ROUGE" in header for header in headers)
    told = dict(grids(document, "What was compared")[0].rows)
    assert told["answers"] == "labels scored, no tokens written"
    assert "beams" not in told


def test_one_run_alone_makes_a_report() -> None:
    connection = empty_store()
    run = a_run("lora", 1)
    add(connection, run, samples=generated(run, 8))
    _, document = made(connection)
    assert "There is no pair to compare." in pages.as_html(document)
    assert "# lora-0001: its settings are not those of this version" in pages.as_markdown(document, "x")


# A page of its own


def test_the_page_fetches_nothing_and_runs_nothing(whole: tuple[Comparison, Document]) -> None:
    text = pages.as_html(whole[1])
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint({"script", "link", "iframe", "object", "embed", "form", "base"})
    assert "url(" not in text
    assert "@import" not in text
    for _, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href"):
            assert (attrs.get(name) or "#").startswith(("#", "data:image/"))
    policy = next(attrs for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in (policy["content"] or "")
    assert any(attrs.get("name") == "viewport" for _, attrs in page.tags)
    assert "prefers-color-scheme: dark" in text


def test_every_table_scrolls_within_its_own_box(whole: tuple[Comparison, Document]) -> None:
    tags = Page(pages.as_html(whole[1])).tags
    places = [place for place, (tag, _) in enumerate(tags) if tag == "table"]
    assert len(places) > 10
    assert all(tags[place - 1][1].get("class") == "box" for place in places)


def test_figures_are_in_the_page_and_beside_the_markdown(tmp_path: Path) -> None:
    connection = wide_study(12, seeds=1)
    _, document = made(connection, draw=True)
    pictures = document.pictures()
    assert pictures
    written = pages.write(document, tmp_path / "report.html")
    assert written == [tmp_path / "report.html", tmp_path / "report.md"]
    page = Page((tmp_path / "report.html").read_text())
    shown = [attrs["src"] or "" for tag, attrs in page.tags if tag == "img"]
    assert [base64.b64decode(source.partition(",")[2]) for source in shown] == [one.data for one in pictures]
    markdown = (tmp_path / "report.md").read_text()
    alts = [attrs["alt"] for tag, attrs in page.tags if tag == "img"]
    assert alts == [one.alt for one in pictures]
    assert all(one.alt not in (one.title, "") for one in pictures)
    parts = next(one for one in pictures if "parts" in one.name)
    assert parts.caption.endswith("never drawn as 0. The bars are by phase and by cause.")
    linked = re.findall(r"\]\((report_files/[\w.]+)\)", markdown)
    assert len(linked) == len(pictures)
    assert all((tmp_path / name).stat().st_size > 1_000 for name in linked)
    for one in pictures:
        assert one.title.endswith("?")
        assert one.caption in page.text
        assert (one.data[:5] == b"<?xml") == (one.mime == "image/svg+xml")


def test_a_large_figure_is_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hestctl.compare.pictures.VECTOR_BYTES", 1)
    _, document = made(wide_study(8, seeds=1), draw=True)
    pictures = document.pictures()
    assert pictures
    assert all(one.data.startswith(b"\x89PNG") and one.name.endswith(".png") for one in pictures)


def test_two_hundred_runs_make_less_than_three_megabytes() -> None:
    connection = wide_study(4, seeds=3, copies=21)
    found, document = made(connection)
    assert len(found.rows) == 199
    # The figures' share: no more than ten, each below the limit of a vector one in base64.
    figures = Picture("x.svg", "?", "", "image/svg+xml", bytes(10 * 130_000))
    full = replace(document, sections=(*document.sections, Section("x", (figures,))))
    assert len(pages.as_html(full).encode()) < 3e6


# What a store may hold

EVIL = (
    "</td><script>alert(1)</script><img src=x onerror=alert(1)>\"'|`[x](javascript:alert(1)) **b** {{ 7*7 }}"
    "\n# forged"
)


@pytest.fixture(scope="module")
def attacked() -> Document:
    connection = empty_store()
    for method, number in (("tabs", 1), ("hest", 2)):
        run = a_run(
            method, number, dataset=EVIL, backbone=EVIL, device_name=EVIL, settings={"train": {"x": EVIL}}
        )
        run = replace(run, run_id=f"{method}{EVIL}", versions={EVIL: EVIL}, emax_origin=EVIL)
        add(connection, run, store=EVIL, samples=generated(run, 8))
    failed = replace(a_run("hest", 3), status="failed", error=EVIL)
    add(connection, failed)
    return made(connection)[1]


def test_nothing_in_a_store_breaks_the_page(attacked: Document) -> None:
    page = Page(pages.as_html(attacked))
    assert not {"script", "b"} & {tag for tag, _ in page.tags}
    assert not [attrs for tag, attrs in page.tags if tag == "img"]
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text


def test_nothing_in_a_store_breaks_the_markdown(attacked: Document) -> None:
    text = pages.as_markdown(attacked, "x")
    outside = re.sub(r"(`{3,})sh\n.*?\n\1", "", text, flags=re.DOTALL)
    assert "<script" not in outside
    assert "<img" not in outside
    assert "](javascript" not in outside.replace("\\]", "")
    assert not re.search("^# forged", text, flags=re.MULTILINE)
    for title in ORDER:
        for grid in grids(attacked, title):
            assert len(grid.headers) == len(grid.rows[0])
    rows = [line for line in outside.splitlines() if line.startswith("|")]
    columns = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
    headers = [place for place, row in enumerate(rows) if re.fullmatch(r"[| :-]+", row)]
    for first, after in zip(headers, [*headers[1:], len(rows) + 1], strict=True):
        assert len(set(columns[first - 1 : after - 1])) == 1


def test_no_path_of_a_machine_is_in_a_report() -> None:
    home = "/home/jo doe/secret & <work>"
    settings = settings_of("hest", data__source=f"{home}/articles", backbone__name=f"{home}/llama")
    connection = empty_store()
    for method, number in (("tabs", 1), ("hest", 2)):
        run = a_run(method, number, dataset=f"{home}/articles", backbone=f"{home}/llama", settings=settings)
        add(connection, replace(run, meter=f"replay:{home}/trace.csv"), samples=generated(run, 8))
    failed = replace(
        a_run("hest", 3), status="failed", error="no file /srv/users/jo/x.jsonl or C:\\Users\\jo\\x.txt"
    )
    add(connection, failed)
    _, document = made(connection)
    for text in (html.unescape(pages.as_html(document)), unmarked(pages.as_markdown(document, "x"))):
        assert "secret" not in text
        assert "/srv" not in text
        assert "Users" not in text
        assert "articles" in text
        assert "trace.csv" in text
        assert "x.jsonl" in text


@pytest.mark.parametrize(
    "text",
    [
        "J/sample in 3 s/token",
        "org/model on a/b",
        "https://example.org/a/b",
        "1 / 2 / 3",
        "and/or",
        "`[x](y/z)`",
    ],
)
def test_what_is_no_path_stays(text: str) -> None:
    assert shortener([])(text) == text


# Where it is written


@pytest.mark.parametrize("name", ["report", "report.pdf", "folder", "file.txt/report.html"])
def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("mine")
    with pytest.raises(HestError) as caught:
        pages.check_place(tmp_path / name)
    assert caught.value.exit_code == Exit.USAGE
    assert str(tmp_path / name) in caught.value.message
    assert caught.value.hint


def test_a_folder_of_that_name_and_a_text_of_ones_own_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(HestError):
        pages.check_place(tmp_path / "report.html")
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(HestError) as caught:
        pages.check_place(tmp_path / "notes.html")
    assert "notes.md" in caught.value.message
    assert (tmp_path / "notes.md").read_text() == "mine"


def test_a_report_may_be_written_again(tmp_path: Path, whole: tuple[Comparison, Document]) -> None:
    place = tmp_path / "new" / "report.html"
    pages.check_place(place)
    pages.write(whole[1], place)
    pages.check_place(place)
    pages.write(whole[1], place)
    assert {path.name for path in place.parent.iterdir()} == {"report.html", "report.md"}


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_an_interrupted_write_leaves_the_old_page_whole(
    tmp_path: Path, whole: tuple[Comparison, Document], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    place = tmp_path / "report.html"
    pages.write(whole[1], place)
    for path in tmp_path.iterdir():
        path.write_text("old")
    real = os.fsync

    def interrupted(descriptor: int) -> None:
        """Ctrl-C when the bytes of ``name`` are written and not yet on the disk."""
        if name in Path(os.readlink(f"/proc/self/fd/{descriptor}")).name:
            raise KeyboardInterrupt
        real(descriptor)

    monkeypatch.setattr("hestctl.store.files.os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pages.write(whole[1], place)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.md"}
    assert place.read_text() == "old"
    assert ((tmp_path / "report.md").read_text() == "old") == (name == "report.md")


def test_the_templates_are_in_the_package() -> None:
    folder = resources.files("hestctl.compare") / "templates"
    assert {path.name for path in folder.iterdir()} == {"report.html.jinja", "report.md.jinja"}
