"""Figures from simulated runs: the files that are drawn, and the reasons for those that are not."""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import duckdb
import matplotlib as mpl
import pytest
from simulated_runs import a_run, add, classified, empty_store, generated, study, trained, used

from hestctl.compare import frames
from hestctl.compare.figures import draw
from hestctl.compare.style import Theme, marks
from hestctl.compare.table import compare, write_csv
from hestctl.errors import HestError
from hestctl.records import EnergyKind

TOPICS = ("energy", "energy_distribution", "latency", "quality_energy", "budget")


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    """A figure that warns has points left out or a legend that fails."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        yield


def test_every_topic_with_data_is_drawn_and_the_others_are_named(tmp_path: Path) -> None:
    connection = study(24)
    profile = a_run("hest", 30, command="profile", parent_run_id="hest-0004")
    long = [
        replace(one, prompt_tokens=256 * 2 ** (place % 4)) for place, one in enumerate(generated(profile, 8))
    ]
    add(connection, profile, samples=long)
    found = compare(connection, methods=["hest", "tabs"])
    drawn = draw(connection, found, tmp_path, dpi=40)
    names = {path.name for path in drawn}
    assert {f"comparison_{topic}.png" for topic in (*TOPICS, "length")} <= names
    assert {"hest-0004_learning.png", "hest-0004_utilisation.png", "tabs-0003_utilisation.png"} <= names
    assert all(path.stat().st_size > 1000 for path in drawn)
    assert {path.name for path in tmp_path.iterdir()} == names
    assert not drawn.reasons


def test_topics_without_data_draw_nothing_and_say_why(tmp_path: Path) -> None:
    connection = empty_store()
    changes = {"energy_kind": "none", "meter": "none"}
    for run in (a_run("lora", 1, **changes), a_run("base", 2, **changes)):
        add(connection, run, samples=generated(run, 8))
    drawn = draw(connection, compare(connection), tmp_path, dpi=40)
    assert [path.name for path in drawn] == ["comparison_latency.png"]
    assert drawn.reasons["comparison_energy"] == "the run had no energy meter: no device"
    assert "hestctl calibrate" in drawn.reasons["comparison_budget"]
    assert "hestctl profile" in drawn.reasons["comparison_length"]
    assert drawn.reasons["base-0002_learning"] == "base is not trained"


def test_classification_has_confusion_matrices_in_the_dark_theme_as_pdf(tmp_path: Path) -> None:
    connection = empty_store()
    run = a_run("hest", 1, dataset="lra-text")
    samples = classified(run, 40, 0.8)
    samples[0] = replace(samples[0], predicted_label=None)
    add(connection, run, samples=samples, steps=trained(replace(run, steps=10)))
    drawn = draw(connection, compare(connection), tmp_path, theme="dark", formats=("pdf",), dpi=40)
    names = {path.name for path in drawn}
    assert {"hest-0001_confusion.pdf", "hest-0001_learning.pdf"} <= names
    table = frames.confusion(connection, compare(connection).rows[0], "test")
    assert table["count"].sum() == 40
    assert "no answer" in set(table["answer"])


def test_unknown_formats_and_themes_are_named(tmp_path: Path) -> None:
    connection = study(8)
    found = compare(connection)
    with pytest.raises(HestError, match="gif"):
        draw(connection, found, tmp_path, formats=("gif",))
    with pytest.raises(HestError, match="sepia"):
        draw(connection, found, tmp_path, theme="sepia")  # type: ignore[arg-type]


def test_run_ids_with_a_store_path_stay_inside_the_folder(tmp_path: Path) -> None:
    connection = empty_store()
    run = replace(a_run("hest", 1), run_id="hest-0001@a/runs")
    add(connection, run, samples=generated(run, 8), utilisation=used("hest"))
    drawn = draw(connection, compare(connection), tmp_path, dpi=40)
    assert tmp_path / "hest-0001@a-runs_utilisation.png" in drawn


def test_a_level_budget_is_one_line_and_an_envelope_follows_the_lengths() -> None:
    connection = empty_store()
    level, envelope = a_run("hest", 1), a_run("hest", 2, emax_ratio=0.4)
    add(connection, level, samples=generated(level, 60, scope_j=0.01, emax_j=0.02))
    matched = [
        replace(one, emax_j=1e-5 * (one.prompt_tokens + one.new_tokens))
        for one in generated(envelope, 60, scope_j=0.01, emax_j=0.02)
    ]
    add(connection, envelope, samples=matched)
    lines = frames.limits(frames.budget(connection, compare(connection)))
    flat, rising = lines[lines["run"] == "hest 0.6"], lines[lines["run"] == "hest 0.4"]
    assert flat["joules"].tolist() == [0.02, 0.02]
    assert rising["joules"].is_monotonic_increasing
    assert len(rising) > 5


def test_methods_keep_their_colours_and_runs_their_shapes() -> None:
    rows = compare(study(8)).rows
    all_marks = marks(rows)
    some = marks([row for row in rows if row.method != "lora"])
    assert all_marks["tabs"].colour == some["tabs"].colour
    assert len({mark.colour for mark in all_marks.values()}) == len(rows)
    assert len({mark.shape for mark in all_marks.values()}) == len(rows)


def test_csv_holds_every_run_and_quotes_what_a_spreadsheet_would_run(tmp_path: Path) -> None:
    connection = empty_store()
    run = replace(a_run("hest", 1), run_id="=cmd()")
    add(connection, run, store="+store", samples=generated(run, 8))
    path = write_csv(compare(connection), tmp_path / "deep" / "rows.csv")
    with path.open(encoding="utf-8", newline="") as file:
        (line,) = list(csv.DictReader(file))
    assert line["run_id"] == "'=cmd()"
    assert line["store"] == "'+store"
    assert float(line["energy_j_per_sample"]) > 0
    assert line["latency_p99_s"] == ""
    assert "at least 100" in line["latency_p99_s_not_measured"]
    assert line["energy_kind"] == "measured"


JOULES = re.compile(r"(?<!\w)[mµn]?J\b|[Jj]oule")
WORD = re.compile(r"(?<!not )\b(measured|estimated|predicted)\b")
RATIO = "J / E_max, as the gates decide"
"""Has no unit of its own: the subtitle says of what it is."""


def drawn_texts(path: Path) -> list[tuple[str, bool]]:
    """Every text of an SVG figure as it was drawn, and whether it is bold: the title alone is."""
    texts = ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")
    return [("".join(text.itertext()).strip(), "700" in text.get("style", "")) for text in texts]


def unworded(texts: Sequence[tuple[str, bool]]) -> list[str]:
    """Texts with joules and no word for them; a title may leave it to a line below."""
    lines = [text for text, bold in texts if not bold]
    below = any(WORD.search(line) for line in lines)
    predicted = any("joules are predicted" in line for line in lines)
    return [
        text
        for text, bold in texts
        if JOULES.search(text)
        and not WORD.search(text)
        and not (below if bold else predicted and text == RATIO)
    ]


def test_the_check_of_texts_finds_what_it_is_to_find() -> None:
    title, axis = ("Joules per sample", True), ("joules per sample, measured", False)
    assert unworded([title, axis, ("ROUGE-Lsum, points", False)]) == []
    assert unworded([title, ("joules per sample", False)]) == ["Joules per sample", "joules per sample"]
    assert unworded([title, axis, ("scope mJ per sample", False)]) == ["scope mJ per sample"]
    assert unworded([title, axis, ("hest 0.25 J", False)]) == ["hest 0.25 J"]
    assert unworded([("joules per sample, not measured", False)]) == ["joules per sample, not measured"]
    assert unworded([(RATIO, False), ("joules are predicted; dashed: E_max", False)]) == []
    assert unworded([(RATIO, False), ("dashed: E_max", False), axis]) == [RATIO]


def one_budgeted_run(
    kind: EnergyKind, *, labelled: bool = False, emax_j: float | None = None
) -> duckdb.DuckDBPyConnection:
    """A run of hest with everything that is drawn of one, and its profile, under a meter of this kind."""
    connection = empty_store()
    changes = {"energy_kind": kind, "dataset": "lra-text" if labelled else "cnn_dailymail"}
    run = a_run("hest", 1, emax_ratio=None if emax_j else 0.6, emax_j=emax_j, **changes)
    samples = generated(run, 24, scope_j=0.017, emax_j=0.016)
    if labelled:
        samples = [replace(one, scope_energy_j=0.01, emax_j=0.02) for one in classified(run, 24, 0.8)]
    add(connection, run, samples=samples, steps=trained(replace(run, steps=60)), utilisation=used("hest"))
    profile = a_run("hest", 2, command="profile", parent_run_id=run.run_id, **changes)
    add(connection, profile, samples=generated(profile, 8))
    return connection


def texts_of(
    connection: duckdb.DuckDBPyConnection, folder: Path, theme: Theme
) -> dict[str, list[tuple[str, bool]]]:
    """The texts of every figure by its file name."""
    drawn = draw(connection, compare(connection), folder / theme, theme=theme, formats=("svg",))
    assert not drawn.reasons
    return {path.name: drawn_texts(path) for path in drawn}


@pytest.fixture
def _text_stays_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")


@pytest.mark.usefixtures("_text_stays_text")
@pytest.mark.parametrize(("kind", "labelled"), [("measured", False), ("estimated", True)])
def test_every_joule_in_a_figure_has_its_word(tmp_path: Path, kind: EnergyKind, labelled: bool) -> None:
    connection = one_budgeted_run(kind, labelled=labelled)
    light = texts_of(connection, tmp_path, "light")
    shown = {name for name, texts in light.items() if any(JOULES.search(text) for text, _ in texts)}
    assert shown == {
        *(f"comparison_{topic}.svg" for topic in (*TOPICS, "length") if topic != "latency"),
        "hest-0001_learning.svg",
    }
    for name, texts in light.items():
        assert unworded(texts) == [], name
        of_joules = [text for text, _ in texts if JOULES.search(text)]
        words = {word for text in of_joules for word in WORD.findall(text)}
        of_table = name in ("comparison_budget.svg", "hest-0001_learning.svg")
        assert words == (set() if not of_joules else {"predicted" if of_table else kind}), name
    if kind == "measured":
        assert texts_of(connection, tmp_path, "dark") == light


@pytest.mark.usefixtures("_text_stays_text")
def test_a_budget_in_joules_has_its_word_in_every_legend(tmp_path: Path) -> None:
    for name, texts in texts_of(one_budgeted_run("measured", emax_j=0.25), tmp_path, "light").items():
        assert unworded(texts) == [], name
