"""A joule never stands without the word that says how it was had: terminal, progress, JSON and store.

Figures are looked at in ``tests/compare/test_compare_figures.py``.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pytest
from cli_tools import TINY, TRIAL, Outcome, Study, run_cli
from test_cli_replay import HEADER

from hestctl.cli import calibrate_command, out
from hestctl.energy.certificate import certify
from hestctl.energy.check import check_meter
from hestctl.energy.fake import FakeClock, FakeCounter
from hestctl.energy.model import Cost
from hestctl.energy.table import EnergyTable
from hestctl.records import Run, Sample
from hestctl.workflows import calibrate as calibrate_workflow
from hestctl.workflows.profile import _phases

WORD = re.compile(r"(?<!not )\b(measured|estimated|predicted)\b")
FIGURE = re.compile(r"\d\S* J\b|\bJ \S* ?\d|\bJ \w+ \d")
"""A number with its unit, ``0.5 J``; or a progress figure, ``J estimated 0.5``."""


def unworded(text: str) -> list[str]:
    """The lines and table columns with joules and no such word; a table's rows may leave it to its title."""
    found: list[str] = []
    header: list[str] = []
    titled = False
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("┏"):
            titled = number > 0 and bool(re.search(rf"\({WORD.pattern}\)$", lines[number - 1].strip()))
        if line.startswith("┃"):
            header.append(line)
            continue
        if header:
            columns = zip(*(row.strip("┃").split("┃") for row in header), strict=True)
            titles = [" ".join(cell.strip() for cell in column) for column in columns]
            found += [
                title for title in titles if re.search(r"\bJ\b|[Jj]oule", title) and not WORD.search(title)
            ]
            header = []
        row = line.strip("│").split("│")
        named = line.startswith("│") and re.search(r"(^|[_.])j(_|$)", row[0].strip())
        # A sentence that wraps goes on in the next line.
        near = line + " ".join(lines[number + 1 : number + 2])
        within = titled and line.startswith("│")
        if (FIGURE.search(line) or named) and not within and not WORD.search(near):
            found.append(line)
    return found


def test_the_check_finds_what_it_is_to_find() -> None:
    table = "┃ run ┃ J/sample ┃\n┃     ┃ [95 %]   ┃\n┡━━━╇━━━┩\n│ a │ 1.0 │\n"
    assert unworded(table) == ["J/sample [95 %]"]
    assert unworded(table.replace("[95 %]  ", "measured")) == []
    for line in (
        "it took 0.5 J a sample",
        "training 1/2 J 0.25",
        "│ emax_j │ 0.1 │",
        "│ summary.idle_j │ 1 │",
    ):
        assert unworded(line) == [line]
    assert unworded("it took 0.5 J (estimated) a sample\ntraining 1/2 J estimated 0.25") == []
    assert unworded("0.5 J a sample\nlatency: not measured") == ["0.5 J a sample"]
    certificate = "┏━━━┓\n┃ a ┃\n┡━━━┩\n│ noise_j │ 1 │\n└───┘\n"
    for title, found in (("of the meter (measured)", []), ("of the meter", ["│ noise_j │ 1 │"])):
        assert unworded(f"{title}\n{certificate}\n") == found
        assert unworded(f"{title}\n{certificate}│ noise_j │ 1 │\n0.5 J")[-1] == "0.5 J"


@pytest.fixture
def progress(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of all figures of progress so far, those too that no line on stderr shows."""
    names: set[str] = set()
    advance = out.Reporter.advance

    def watched(
        reporter: out.Reporter, stage: str, done: int, total: int, figures: Mapping[str, float | None]
    ) -> None:
        names.update(figures)
        advance(reporter, stage, done, total, figures)

    monkeypatch.setattr(out.Reporter, "advance", watched)
    return names


def assert_worded(outcome: Outcome, progress: set[str]) -> None:
    """Nothing that a command has said has joules without a word."""
    assert outcome.code == 0, outcome.err
    assert unworded(outcome.out) == []
    assert unworded(outcome.err) == []
    assert [name for name in progress if re.search(r"\bJ\b|[Jj]oule", name) and not WORD.search(name)] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--method", "tabs", *TRIAL),
        ("train", "--method", "hest", "--emax-ratio", "0.5", *TRIAL),
        ("train", "--method", "hest", "--emax", "1e-4", *TRIAL),
        ("harden", "--explain"),
        ("profile", "--seq-len", "32", "--new-tokens", "2", "--repeats", "2"),
        ("calibrate", *TINY),
        ("runs", "list"),
        ("compare", "--no-figures"),
        ("compare", "--no-figures", "--all"),
    ],
    ids=lambda arguments: " ".join(arguments[:5]),
)
def test_every_joule_in_the_terminal_has_its_word(
    copied: Study, progress: set[str], arguments: tuple[str, ...]
) -> None:
    outcome = run_cli(copied.folder, *arguments)
    assert_worded(outcome, progress)
    assert re.search(r"\bJ\b", outcome.out)
    assert ("J estimated" in progress) == (arguments[0] in ("train", "profile"))


CALIBRATE = ("calibrate", *TINY, "--lengths", "16,48")
PROFILE = ("profile", "--seq-len", "64", "--new-tokens", "3", "--repeats", "2")


@pytest.fixture(scope="module")
def calibrated(study: Study, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Outcome, Outcome]:
    """The study with an energy model and a profile that it predicts; what these two commands printed."""
    folder = tmp_path_factory.mktemp("calibrated") / "study"
    shutil.copytree(study.folder, folder)
    return (
        Study(folder, study.tabs, study.hest),
        run_cli(folder, *CALIBRATE),
        run_cli(folder, *PROFILE),
    )


def test_every_joule_of_an_energy_model_has_its_word(calibrated: tuple[Study, Outcome, Outcome]) -> None:
    _, calibration, profile = calibrated
    for outcome in (calibration, profile):
        assert_worded(outcome, set())
    assert "(predicted)" in calibration.out
    assert "predicted against estimated joules: mean error" in profile.out
    assert profile.out.count("(predicted)") >= 2


def test_phases_are_called_apportioned_by_whatever_way_they_were_told_apart() -> None:
    """Here and not in a profile of the tiny model, whose few microjoules seldom tell them apart."""
    samples = [
        Sample(
            "s", place, "profile", prompt, 4, 0, place, 1, 1, "e", 0.1, "measured", "interpolated",
            energy_j=prompt + 4.0, prefill_j=float(prompt), decode_j=4.0, phase_method="apportioned",
        )
        for place, prompt in enumerate((16, 32, 64, 128))
    ]  # fmt: skip
    by_model = _phases(samples)
    by_regression = _phases([replace(s, prefill_j=None, decode_j=None) for s in samples])
    assert unworded(by_model) == unworded(by_regression) == []
    assert by_model.endswith("(measured, apportioned by the energy model over 4 samples)")
    assert by_regression.endswith("(measured, apportioned by regression over 4 samples)")


def test_predicted_and_apportioned_joules_say_so_in_documents_and_store(
    calibrated: tuple[Study, Outcome, Outcome],
) -> None:
    study, _, _ = calibrated
    document = run_cli(study.folder, *PROFILE, "-q", "--json").document
    assert document["energy_kind"] == "estimated"
    for point in document["points"]:
        assert point["phase_method"] == "apportioned"
        assert point["scope_energy_kind"] == "predicted"
        unsaid = {name for name, _ in joule_keys(point) if not WORD.search(name.replace("_", " "))}
        metered = {"energy_j_per_sample", "prefill_j_per_sample", "decode_j_per_sample"}
        assert unsaid == {f".{name}" for name in (*metered, "scope_energy_j_per_sample", "emax_j")}
    with duckdb.connect(str(study.folder / "runs.duckdb"), read_only=True) as con:
        found = con.execute(
            "SELECT DISTINCT energy_kind, phase_method, prefill_j > 0, predicted_j > 0 "
            "FROM samples WHERE run_id = ?",
            [document["run_id"]],
        ).fetchall()
    assert found == [("estimated", "apportioned", True, True)]


def test_a_recorded_prediction_is_called_predicted(calibrated: tuple[Study, Outcome, Outcome]) -> None:
    study, _, _ = calibrated
    (run,) = run_cli(study.folder, "runs", "list", "--command", "profile", "--limit", "1", "--json").document[
        "runs"
    ]
    shown = run_cli(study.folder, "runs", "show", run["run_id"]).out
    (line,) = [line for line in shown.splitlines() if "predicted_j_per_sample" in line]
    assert "(predicted)" in line


def test_the_budget_is_called_predicted(copied: Study) -> None:
    outcome = run_cli(copied.folder, "harden")
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("E_max ")]
    assert WORD.findall(line) == ["predicted"]


@pytest.fixture
def replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs a command on joules of a trace of 450 W in steps of 20 ms; the certificate takes two seconds."""
    rows = [{**HEADER, "step_s": 0.02}, *([index / 50, 9.0 * index] for index in range(50 * 600))]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(calibrate_workflow, "certify", partial(certify, seconds=0.5))
    return lambda *arguments: run_cli(tmp_path, *arguments, "--meter", "replay:t.jsonl")


def test_every_joule_of_a_replay_has_its_word(replayed: Callable[..., Outcome], progress: set[str]) -> None:
    calibration = replayed(*CALIBRATE, "--set", "energy.calibration_precision=0.5")
    assert "│ noise_j " in calibration.out, "a trace has steps, and so a certificate"
    profile = replayed(*PROFILE, *TINY, "--precision", "0.5")
    assert {"J estimated", "repetitions"} <= progress
    for outcome in (calibration, profile):
        assert_worded(outcome, progress)
        assert "(estimated)" in outcome.out
        assert "measured" not in set(WORD.findall(outcome.out + outcome.err))


def test_every_joule_of_a_measured_certificate_has_its_word(capsys: pytest.CaptureFixture[str]) -> None:
    """Its own figures and the sentences of the verdicts: no command here has a counter to show them."""
    clock = FakeClock()
    counter = FakeCounter(450.0, clock, on_read=lambda: clock.spend(0.00225))
    check = check_meter(counter, lambda units: clock.advance(units * 0.002), clock=clock, pace=clock)
    cost = Cost(1.0, 0.1)
    table = EnergyTable("t", "k", "2026", "measured", "m", "d", "u", "float16", 64, 16, 256, cost, cost, cost)
    calibrate_command._show(
        calibrate_workflow.Calibrated(
            Run("r", "calibrate", "finished", "2026"),
            table,
            certify(counter, clock=clock, pace=clock, load=clock.advance).as_dict(),
            check.as_dict(),
            check.verdicts(),
        )
    )
    shown = capsys.readouterr().out
    assert "noise_j" in shown
    assert "one counter step" in shown
    assert unworded(shown) == []
    assert set(WORD.findall(shown)) == {"measured"}


def test_every_joule_of_a_run_has_its_word(copied: Study) -> None:
    outcome = run_cli(copied.folder, "runs", "show", copied.hest.document["run_id"])
    assert outcome.code == 0
    assert "energy_j_per_sample" in outcome.out
    assert unworded(outcome.out) == []


def joule_keys(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if re.search(r"(^|_)j(_|$)", key) and isinstance(inner, (int, float)):
                yield f"{path}.{key}", inner
            yield from joule_keys(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from joule_keys(inner, path)


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--method", "hest", *TRIAL),
        ("harden",),
        ("profile", "--seq-len", "32", "--new-tokens", "2", "--repeats", "1"),
        ("calibrate", *TINY),
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_document_with_joules_says_their_kind(copied: Study, arguments: tuple[str, ...]) -> None:
    document = run_cli(copied.folder, *arguments, "-q", "--json").document
    assert list(joule_keys(document))
    assert document["energy_kind"] == "estimated"
    scoped = [name for name, _ in joule_keys(document) if "scope" in name or "emax" in name]
    if scoped:
        assert '"scope_energy_kind": "predicted"' in json.dumps(document)


def test_every_joule_in_the_comparison_says_its_kind(study: Study) -> None:
    document = run_cli(study.folder, "compare", "--no-figures", "--json").document
    for run in document["runs"].values():
        joules = {
            name: measure for name, measure in run["measures"].items() if re.search(r"\bJ\b", measure["unit"])
        }
        assert joules
        assert all(measure["energy_kind"] in ("estimated", "predicted") for measure in joules.values())


def test_every_joule_in_the_store_says_its_kind(study: Study) -> None:
    kinds = {"runs": "energy_kind", "samples": "energy_kind", "windows": "kind", "calibrations": "kind"}
    with duckdb.connect(str(study.folder / "runs.duckdb"), read_only=True) as con:
        columns = con.execute("SELECT table_name, column_name FROM duckdb_columns() WHERE NOT internal")
        by_table: dict[str, list[str]] = {}
        for table, column in columns.fetchall():
            by_table.setdefault(table, []).append(column)
        assert set(kinds) < set(by_table)
        for table, kind in kinds.items():
            (count, distinct) = (
                con.execute(f"SELECT count(*), list(DISTINCT {kind}) FROM {table}").fetchone() or ()
            )
            assert count > 0
            assert distinct == ["estimated"]
        (plans,) = (
            con.execute(
                "SELECT list(DISTINCT document->>'energy_kind') FROM plans WHERE emax_j IS NOT NULL"
            ).fetchone()
            or ()
        )
        assert plans == ["estimated"]
        joules = {name for name in by_table if any(re.search("(^|_)j(_|$)", c) for c in by_table[name])}
    # Steps and plans have no kind of their own. Which of all these joules are predicted, the store does not
    # tell: examples/joules.md does, and tests/test_docs.py holds it to every column.
    assert joules == {"runs", "samples", "windows", "steps", "plans", "trials"}


def test_csv_says_the_kind_of_its_joules(copied: Study) -> None:
    run_cli(copied.folder, "compare", "--no-figures", "--csv", "rows.csv")
    header, *rows = Path(copied.folder / "rows.csv").read_text().splitlines()
    assert "energy_kind" in header.split(",")
    assert rows
    assert all("estimated" in row and "predicted" in row for row in rows)
