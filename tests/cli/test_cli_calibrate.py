"""``calibrate``: stopped and resumed, refused when stale, and what it tells ``profile``."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from cli_tools import TINY, TRIAL, Study, lines_of, run_child, run_cli

from hestctl.calibration import measure
from hestctl.energy.model import EnergyModel, PhaseJoules, Terms
from hestctl.errors import Exit
from hestctl.records import BLOCKS, FULL, INT8, OFF, STATES, BlockStates

CALIBRATE = ("calibrate", *TINY, "--lengths", "16,48", "-q", "--json")
PROFILE = ("profile", "--seq-len", "64", "--new-tokens", "3", "--repeats", "2", "-q", "--json")


def at_figure(count: int, number: int) -> None:
    """Sends this process a signal once so many figures were kept."""
    from hestctl.workflows.calibrate import _Kept

    save = _Kept.save_figures

    def watched(kept: Any, figures: Any) -> None:
        save(kept, figures)
        if len(figures) == count:
            os.kill(os.getpid(), number)

    _Kept.save_figures = watched  # type: ignore[method-assign]


def kept(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("runs/calibrate-*/measured.json")
    document = json.loads(path.read_text())
    assert isinstance(document, dict)
    return document


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_calibration_goes_on_where_it_was(tmp_path: Path, number: signal.Signals) -> None:
    stopped = run_child(tmp_path, *CALIBRATE, first=at_figure, given=(6, number))
    assert stopped.code in (-signal.SIGKILL, Exit.TERMINATED)
    if number == signal.SIGTERM:
        assert "--resume goes on" in stopped.message
    before = kept(tmp_path)
    resumed = run_cli(tmp_path, *CALIBRATE, "--resume")
    assert resumed.code == 0, resumed.err
    after = kept(tmp_path)
    figures = list(before["figures"])
    assert len(figures) >= 6
    assert {key: after["figures"][key] for key in figures} == before["figures"]
    assert len(after["figures"]) > len(figures)
    assert after["certificate"] == before["certificate"]
    assert resumed.document["table"]["full"]["joules"] == before["figures"]["direction/full"][0]
    (folder,) = (tmp_path / "runs").glob("calibrate-*")
    assert folder.name == resumed.document["run_id"]


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    outcome = run_cli(tmp_path, *CALIBRATE, "--resume")
    assert outcome.code == Exit.USAGE
    assert "nothing to resume" in outcome.message


def test_a_calibration_of_something_else_is_not_resumed(tmp_path: Path) -> None:
    run_child(tmp_path, *CALIBRATE, first=at_figure, given=(3, signal.SIGTERM))
    outcome = run_cli(tmp_path, *CALIBRATE, "--resume", "--set", "method.rank=8")
    assert outcome.code == Exit.USAGE
    assert "another device, backbone or software" in outcome.message
    assert run_cli(tmp_path, *CALIBRATE, "--resume").code == 0


def test_what_a_block_costs_in_each_state_is_told(tmp_path: Path) -> None:
    document = run_cli(tmp_path, *CALIBRATE).document
    rows = document["blocks"]
    assert [(row["block"], row["state"]) for row in rows] == [
        (block, state) for block in ("attention", "mlp") for state in ("full", "int8")
    ]
    model = EnergyModel.from_dict(document["table"]["model"])
    for row in rows:
        assert (row["batch_size"], row["num_beams"], row["prompt_tokens"]) == (1, 1, 48)
        costs = model.component(1, 1, BLOCKS.index(row["block"]), STATES.index(row["state"]))
        assert isinstance(costs, Terms)
        assert row["prefill_j_per_prompt_token"] == pytest.approx(costs.prefill_j(48) / 48)
        assert row["decode_j_per_step"] == pytest.approx(costs.decode_j(48, 33) / 32)
        for phase, name in (("prefill", "prefill_j_per_prompt_token"), ("decode", "decode_j_per_step")):
            full = next(r for r in rows if r["block"] == row["block"] and r["state"] == "full")[name]
            ratio = row[f"{phase}_ratio_of_full"]
            assert ratio is None if full == 0 else ratio == pytest.approx(row[name] / full)
    states = {(p["attention"], p["mlp"]) for p in document["table"]["model"]["points"]}
    assert len(states) == 7
    shown = run_cli(tmp_path, *(argument for argument in CALIBRATE if argument != "--json")).out
    assert "one layer's blocks" in shown
    assert "the fit is off by at most" in shown
    refused = run_cli(tmp_path, *CALIBRATE, "--backbone-precision", "int8")
    assert refused.code == Exit.USAGE


@pytest.fixture
def calibrated(copied: Study) -> Study:
    outcome = run_cli(copied.folder, *CALIBRATE)
    assert outcome.code == 0, outcome.err
    return copied


def test_profile_predicts_and_tells_the_phases_apart(calibrated: Study) -> None:
    document = run_cli(calibrated.folder, *PROFILE).document
    points = {point["prompt_tokens"]: point for point in document["points"]}
    assert set(points) == {16, 32, 64}
    for point in points.values():
        assert point["phase_method"] == "apportioned"
        parts = point["prefill_j_per_sample"] + point["decode_j_per_sample"]
        assert parts == pytest.approx(point["energy_j_per_sample"])
        assert point["predicted_j_per_sample"] > 0
        assert point["replicates"] == 1
    assert points[64]["predicted_j_per_sample"] > points[16]["predicted_j_per_sample"]
    assert "mean error" in document["prediction"]
    assert "1 lengths outside the calibrated 16 to 48" in document["prediction"]
    samples = lines_of(calibrated.folder / "runs" / document["run_id"], "samples")
    assert all(sample["predicted_j"] > 0 for sample in samples)


def test_chosen_kernels_are_what_generation_takes_and_its_record_says(copied: Study) -> None:
    int8 = ("--backbone-precision", "int8")
    before = run_cli(copied.folder, *PROFILE, *int8).document
    calibrated = run_cli(copied.folder, *CALIBRATE).document
    after = run_cli(copied.folder, *PROFILE, *int8).document
    engines = [
        run_cli(copied.folder, "runs", "show", document["run_id"], "--json").document["summary"]["engine"]
        for document in (before, calibrated, after)
    ]
    assert {(engine["name"], engine["reason"]) for engine in engines} == {("hestctl", None)}
    assert engines[0]["kernels"] == "default: not calibrated"
    assert engines[1]["kernels"] == "full precision: torch's own"
    assert set(calibrated["table"]["kernels"]["by_shape"]) >= {"decode n16 m64 k64", "prefill n4096 m64 k64"}
    assert "16 rows: torch._int_mm (the only one that runs here)" in engines[2]["kernels"]["64x64"]
    assert engines[2]["adapter"].startswith("unfused: ")
    shown = run_cli(copied.folder, "runs", "show", after["run_id"])
    assert "summary.engine.adapter" in shown.out
    (folder,) = copied.folder.glob("runs/calibrate-*")
    assert json.loads((folder / "measured.json").read_text())["kernels"] == calibrated["table"]["kernels"]


@pytest.mark.parametrize(
    ("control", "states"),
    [
        (("--set", "backbone.skip_last=1"), (FULL, OFF)),
        (("--set", "backbone.skip_last=1", "--backbone-precision", "int8"), (INT8, OFF)),
    ],
)
def test_what_is_predicted_is_of_the_blocks_that_ran(
    tmp_path: Path, control: tuple[str, ...], states: tuple[int, int]
) -> None:
    table = run_cli(tmp_path, *CALIBRATE).document["table"]
    model = EnergyModel.from_dict(table["model"])
    base = (*PROFILE, *TINY, "--set", "data.test_samples=2")
    for point in run_cli(tmp_path, *base, *control).document["points"]:
        found = model.predict([point["prompt_tokens"]], [3], blocks=BlockStates(states, states))
        assert isinstance(found, PhaseJoules)
        assert point["predicted_j_per_sample"] == pytest.approx(found.total_j)


def test_a_batch_that_was_not_calibrated_is_not_predicted(calibrated: Study) -> None:
    document = run_cli(calibrated.folder, *PROFILE, "--batch-size", "2").document
    assert all(point["predicted_j_per_sample"] is None for point in document["points"])
    assert all(point["prefill_j_per_sample"] is None for point in document["points"])
    assert "not measured (no valid sample that the energy model covers)" in document["prediction"]


def test_without_a_calibration_profile_says_what_to_type(copied: Study) -> None:
    # The study's trainings measured the prices of directions alone.
    outcome = run_cli(copied.folder, *(argument for argument in PROFILE if argument != "-q"))
    assert outcome.code == 0
    assert "nothing is predicted (hestctl calibrate --db runs.duckdb --backbone tiny" in outcome.err
    assert "not measured (no energy model" in outcome.document["prediction"]


def test_a_stale_table_is_refused_until_it_is_renewed(
    calibrated: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "on_offer", lambda device: "another kernel")
    for command in (PROFILE, ("train", "--method", "tabs", *TRIAL, "-q"), ("harden", "-q")):
        outcome = run_cli(calibrated.folder, *command)
        assert outcome.code == Exit.USAGE, outcome.err
        assert "is stale: kernels was torch._int_mm, is another kernel" in outcome.message
        assert "renew it: hestctl calibrate --db runs.duckdb --backbone tiny --weights random" in outcome.err
    hint = next(line for line in outcome.err.splitlines() if "renew it" in line)
    renewal = hint.split("hestctl ", 1)[1].split()
    quick = ("--set", "energy.calibration_s=0.004", "--lengths", "16,48", "-q")
    assert run_cli(calibrated.folder, *renewal, *quick).code == 0
    outcome = run_cli(calibrated.folder, *PROFILE)
    assert outcome.code == Exit.USAGE
    assert "was made for another energy table" in outcome.message
    hint = next(line for line in outcome.err.splitlines() if "hestctl harden" in line)
    hardening = hint.split("`hestctl ", 1)[1].split("`")[0].split()
    assert run_cli(calibrated.folder, *hardening, "-q").code == 0
    assert run_cli(calibrated.folder, *PROFILE).code == 0
