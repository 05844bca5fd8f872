"""Figures from simulated runs: the files that are drawn, and the reasons for those that are not."""

from __future__ import annotations

import contextlib
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
from simulated_runs import (
    a_run,
    add,
    add_plan,
    classified,
    empty_store,
    generated,
    metered,
    study,
    trained,
    used,
    wide_study,
)

from hestctl.compare import figures_energy, frames, frames_states
from hestctl.compare.canvas import MOST_PANELS, Canvas
from hestctl.compare.captions import CAPTIONS
from hestctl.compare.figures import TOPICS, draw
from hestctl.compare.style import Theme, marks
from hestctl.compare.table import compare, write_csv
from hestctl.compare.text import number
from hestctl.errors import HestError
from hestctl.records import EnergyKind

MEASURED = {
    *("energy", "front", "parts", "energy_distribution", "latency", "budget", "length"),
    *("depth", "position", "learning_loss", "learning_budget", "meter"),
}
"""Topics of a measured run of hest in scope adapter that has all there is to record, and of its profile."""


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    """A figure that warns has points left out or a legend that fails."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        yield


def test_a_whole_study_is_one_file_a_topic(tmp_path: Path) -> None:
    connection = wide_study(24, seeds=2)
    drawn = draw(connection, compare(connection), tmp_path, dpi=40)
    names = {path.name for path in drawn}
    assert names == {f"comparison_{topic}.png" for topic in MEASURED}
    assert all(path.stat().st_size > 1000 for path in drawn)
    assert {path.name for path in tmp_path.iterdir()} == names
    assert not drawn.reasons


def test_a_figure_takes_one_or_a_few_queries_however_many_runs_there_are() -> None:
    class Counting:
        def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
            self.connection, self.queries = connection, 0

        def execute(self, *arguments: object) -> object:
            self.queries += 1
            return self.connection.execute(*arguments)  # type: ignore[arg-type]

    connection = wide_study(12, seeds=2)
    found = compare(connection)
    assert len(found.rows) == 32
    for topic, paint in TOPICS.items():
        counting = Counting(connection)
        with contextlib.suppress(frames.NoDataError):
            paint(Canvas(counting, found, "light"))  # type: ignore[arg-type]
        assert counting.queries <= 3, topic


@pytest.mark.parametrize("method", ["tabs", "hest", "lora", "base"])
def test_one_run_of_few_samples_is_drawn_as_far_as_it_goes(method: str, tmp_path: Path) -> None:
    connection = empty_store()
    run = a_run(method, 1)
    scope_j = 0.02 if method in ("tabs", "hest") else None
    samples = [replace(one, rouge_lsum=None) for one in generated(run, 2, scope_j=scope_j)]
    uses = used(method)[:3] if scope_j else []
    add(connection, run, samples=samples, utilisation=uses, windows=metered(run, samples))
    drawn = draw(connection, compare(connection), tmp_path, dpi=40)
    names = {path.stem.removeprefix("comparison_") for path in drawn}
    assert {"energy", "parts", "energy_distribution", "latency", "meter"} <= names
    assert ({"depth", "position"} <= names) == (scope_j is not None)
    assert drawn.reasons["comparison_front"] == "the texts were not scored"
    lacking = "no run here has an E_max" if scope_j else "no sample has scope joules"
    assert drawn.reasons["comparison_budget"].startswith(lacking)


def test_topics_without_data_draw_nothing_and_say_why(tmp_path: Path) -> None:
    connection = empty_store()
    changes = {"energy_kind": "none", "meter": "none"}
    for run in (a_run("lora", 1, **changes), a_run("base", 2, **changes)):
        add(connection, run, samples=generated(run, 8))
    drawn = draw(connection, compare(connection), tmp_path, dpi=40)
    assert [path.name for path in drawn] == ["comparison_latency.png"]
    for topic in ("energy", "front", "energy_distribution"):
        assert drawn.reasons[f"comparison_{topic}"] == "the run had no energy meter: no device", topic
    assert drawn.reasons["comparison_parts"].startswith("the run had no energy meter")
    assert "hestctl calibrate" in drawn.reasons["comparison_budget"]
    assert "hestctl profile" in drawn.reasons["comparison_length"]
    assert drawn.reasons["comparison_depth"] == "none of these methods has directions"
    assert drawn.reasons["comparison_learning_loss"] == "no step was recorded"
    assert "budget" in drawn.reasons["comparison_learning_budget"]
    assert drawn.reasons["comparison_meter"] == "the run had no energy meter: no device"


def test_classification_has_a_panel_of_labels_for_every_configuration(tmp_path: Path) -> None:
    connection = empty_store()
    for seed, accuracy in ((1, 0.8), (2, 0.6)):
        run = a_run("hest", seed, seed=seed, dataset="lra-text")
        samples = classified(run, 40, accuracy)
        samples[0] = replace(samples[0], predicted_label=None)
        add(connection, run, samples=samples, steps=trained(replace(run, steps=10)))
    drawn = draw(connection, compare(connection), tmp_path, theme="dark", formats=("pdf",), dpi=40)
    assert {"comparison_confusion.pdf", "comparison_learning_loss.pdf"} <= {path.name for path in drawn}
    table = frames_states.confusion(connection, compare(connection))
    assert table["count"].sum() == 80
    assert table.loc[table["answer"] == "no answer", "count"].sum() == 2
    right = connection.execute("SELECT count(*) FROM samples WHERE label = predicted_label").fetchall()[0][0]
    diagonal = table["truth"].astype(str) == table["answer"].astype(str)
    assert table.loc[diagonal, "count"].sum() == right
    assert table.groupby("truth", observed=True)["share"].sum().tolist() == pytest.approx([100.0, 100.0])


def test_every_topic_has_a_caption() -> None:
    assert list(CAPTIONS) == list(TOPICS)


def test_single_topics_may_be_chosen(tmp_path: Path) -> None:
    connection = study(8)
    drawn = draw(connection, compare(connection), tmp_path, dpi=40, only=lambda name: name.endswith("_front"))
    assert [path.name for path in drawn] == ["comparison_front.png"]
    assert not drawn.reasons


def test_unknown_formats_and_themes_are_named(tmp_path: Path) -> None:
    connection = study(8)
    found = compare(connection)
    with pytest.raises(HestError, match="gif"):
        draw(connection, found, tmp_path, formats=("gif",))
    with pytest.raises(HestError, match="sepia"):
        draw(connection, found, tmp_path, theme="sepia")  # type: ignore[arg-type]


def test_more_configurations_than_panels_are_told_and_every_kind_stays() -> None:
    connection = wide_study(12, seeds=1)
    found = compare(connection)
    canvas = Canvas(connection, found, "light")
    whole = frames.joules(connection, found)
    part, says = canvas.chosen(whole)
    kept = set(part["configuration"])
    left = set(whole["configuration"]) - kept
    assert len(kept) == MOST_PANELS
    assert says.startswith(f"{MOST_PANELS} of 16")
    assert all(label in says for label in left)
    marks_of = {canvas.marks[label] for label in whole["configuration"]}
    assert {canvas.marks[label] for label in kept} == marks_of
    assert {
        best.label for best in (found.best_proposed, found.best_baseline, found.best_control) if best
    } <= kept
    assert canvas.chosen(part)[1] == ""


def test_methods_keep_their_marks_and_kinds_are_told_apart_without_colour() -> None:
    rows = compare(wide_study(12, seeds=1)).rows
    all_marks = marks(rows)
    some = marks([row for row in rows if row.method != "lora"])
    assert {label: all_marks[label] for label in some} == some
    kinds = set(all_marks.values())
    assert len({mark.shape for mark in kinds}) == len({mark.colour for mark in kinds}) == len(kinds) == 7


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


def test_every_figure_says_what_it_shows_and_the_extremes(tmp_path: Path) -> None:
    connection = wide_study(24, seeds=2)
    found = compare(connection)
    drawn = draw(connection, found, tmp_path, dpi=40)
    assert set(drawn.words) == {path.stem for path in drawn}
    spent = frames.energy(found).sort_values("joules")
    least, most = (
        f"{one.configuration} {number(float(one.joules))} J"
        for one in (*spent[:1].itertuples(), *spent[-1:].itertuples())
    )
    for topic in ("energy", "front", "energy_distribution"):
        assert f"{least} to {most}" in drawn.words[f"comparison_{topic}"].alt
        assert "measured" in drawn.words[f"comparison_{topic}"].alt
    for name, words in drawn.words.items():
        assert re.search(r"\d", words.alt), name
        assert words.alt.endswith("."), name
    assert "chose the same blocks" in drawn.words["comparison_depth"].more


def test_what_is_not_shown_to_be_equal_is_grey() -> None:
    connection = wide_study(40)
    found = compare(connection)
    canvas = Canvas(connection, found, "light")
    drawn = figures_energy.energy(canvas).plot.data
    assert drawn["panel"].nunique() == 2
    for one in drawn.itertuples():
        equal = found.equal_quality[str(one.configuration)] == "not inferior"
        assert one.colour == (canvas.marks[str(one.configuration)].colour if equal else canvas.ink.muted)
        assert one.fill == (one.colour if equal else canvas.ink.paper)


def test_far_inferior_configurations_stand_below_the_front_and_in_their_order() -> None:
    connection = wide_study(40, seeds=1)
    run = a_run("lora", 77, settings={"backbone": {"name": "smollm2-135m", "skip_last": 9}})
    add(connection, run, samples=generated(run, 40, joules=10.0, score=9.0))
    canvas = Canvas(connection, compare(connection), "light")
    drawn = figures_energy.front(canvas).plot.data.set_index("configuration")
    far = drawn[drawn["far"]]
    assert {"base", "lora last 9 off control"} <= set(far.index)
    assert far["y"].max() < drawn.loc[~drawn["far"], "y_low"].min()
    assert far.loc["lora last 9 off control", "y"] < far.loc["base", "y"]
    assert not far["best"].any()
    assert all(label.endswith("points") for label in far["label"])


@pytest.mark.usefixtures("_text_stays_text")
def test_a_tail_is_drawn_where_the_table_has_one_and_nowhere_else(tmp_path: Path) -> None:
    connection = empty_store()
    for method, count in (("lora", 400), ("base", 396)):
        run = a_run(method, 1)
        add(connection, run, samples=generated(run, count))
    found = compare(connection)
    tails = {row.config_label: row.measure("latency_p99_s").value for row in found.rows}
    assert tails["base"] is None
    drawn = draw(connection, found, tmp_path, formats=("svg",), only=lambda name: name.endswith("latency"))
    texts = [text for text, _ in drawn_texts(drawn[0])]
    assert number(tails["lora"] or 0.0) in texts
    assert any("no p99 below 100 batches" in text for text in texts)
    assert f"p99: lora {number(tails['lora'] or 0.0)} s" in drawn.words["comparison_latency"].alt


@pytest.mark.usefixtures("_text_stays_text")
def test_samples_of_like_lengths_are_held_against_e_max_in_one_strip(tmp_path: Path) -> None:
    connection = empty_store()
    for place, scope in enumerate(("network", "adapter")):
        run = a_run("hest", place, scope=scope)
        samples = [
            replace(one, prompt_tokens=100, new_tokens=20 + one.position)
            for one in generated(run, 12, scope_j=0.1, emax_j=60.0)
        ]
        add(connection, run, samples=samples)
    drawn = draw(
        connection, compare(connection), tmp_path, formats=("svg",), only=lambda name: name.endswith("budget")
    )
    words = drawn.words["comparison_budget"]
    assert words.more == "Samples have 120 to 131 tokens: lengths tell nothing apart."
    assert "predicted means" in words.alt
    assert "measured means: hest 0.6 network" in words.alt
    texts = " ".join(text for text, _ in drawn_texts(drawn[0]))
    assert "predicted only, since the meter sees more than a budget of directions: hest 0.6 adapter" in texts
    assert "prompt and new tokens" not in texts


def test_the_caption_of_the_parts_is_of_what_is_drawn() -> None:
    connection = empty_store()
    run = a_run("lora", 1)
    add(connection, run, samples=[replace(one, energy_net_j=None) for one in generated(run, 12)])
    words = figures_energy.parts(Canvas(connection, compare(connection), "light")).words
    assert words.more.startswith("The bars are by phase.")
    assert "the idle draw is not known" in words.more
    whole = wide_study(8, seeds=1)
    words = figures_energy.parts(Canvas(whole, compare(whole), "light")).words
    assert words.more == "The bars are by phase and by cause."


def test_what_all_lack_is_not_a_list_of_all() -> None:
    connection = empty_store()
    for method in ("lora", "base"):
        run = a_run(method, 1)
        add(connection, run, samples=[replace(one, energy_net_j=None) for one in generated(run, 12)])
    assert frames.parts(connection, compare(connection))[1] == ["idle draw: the meter does not know it (all)"]


JOULES = re.compile(r"(?<!\w)[mµn]?J\b|[Jj]oule")
WORD = re.compile(r"(?<!not )\b(measured|estimated|predicted)\b")
RATIO = "J / E_max"
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
    samples = [replace(one, directions_int8=5, directions_full=7, predicted_j=1.0) for one in samples]
    add(
        connection,
        run,
        samples=samples,
        steps=trained(replace(run, steps=60)),
        utilisation=used("hest"),
        windows=metered(run, samples),
    )
    add_plan(connection, run, costs_j=[0.0, 0.1, 0.2], blocks={"attention": [2] * 30, "mlp": [2] * 30})
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
    assert set(light) == {f"comparison_{topic}.svg" for topic in {*MEASURED, *(["confusion"] * labelled)}}
    without = {"latency", "depth", "position", "learning_loss", "confusion"}
    of_table = {"budget", "learning_budget"}
    for name, texts in light.items():
        topic = name.removeprefix("comparison_").removesuffix(".svg")
        assert unworded(texts) == [], name
        of_joules = [text for text, _ in texts if JOULES.search(text)]
        assert bool(of_joules) == (topic not in without), name
        words = {word for text in of_joules for word in WORD.findall(text)}
        expected = {kind} if topic not in of_table else set()
        expected |= {"predicted"} if topic in of_table | {"meter"} else set()
        assert words == (expected if of_joules else set()), name
    assert ("directions (predicted)", False) in light["comparison_parts.svg"]
    if kind == "measured":
        assert texts_of(connection, tmp_path, "dark") == light


@pytest.mark.usefixtures("_text_stays_text")
def test_a_budget_in_joules_has_its_word_in_every_legend(tmp_path: Path) -> None:
    for name, texts in texts_of(one_budgeted_run("measured", emax_j=0.25), tmp_path, "light").items():
        assert unworded(texts) == [], name
