"""Runs that are stopped, and go on as if they had not been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_tools import TINY, Outcome, Study, lines_of, run_child, run_cli

from hestctl.errors import Exit

LONG = (
    *(*TINY, "--set", "method.scope=adapter"),
    "-q",
    "--max-tokens",
    "220",
    "--new-tokens",
    "2",
    *("--gate-lr", "0.002"),
    *("--set", "data.train_samples=8"),
    *("--set", "data.validation_samples=1"),
    *("--set", "data.test_samples=1"),
    *("--epochs", "3"),
    *("--set", "train.save_steps=4"),
    *("--set", "train.eval_steps=5"),
    *("--set", "train.patience=5"),
)
"""12 steps on 8 articles; a checkpoint after every fourth."""
HEST = ("train", "--method", "hest", *LONG)
LINES = 12 + 4
"""Training steps, and evaluations at steps 0, 5, 10 and 12."""


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A store with a tabs run and a hest run of 12 steps that nothing stopped. To be read only."""
    folder = tmp_path_factory.mktemp("undisturbed")
    tabs = run_cli(folder, "train", "--method", "tabs", *LONG, "--max-steps", "2", "--json")
    hest = run_cli(folder, *HEST, "--json")
    assert (tabs.code, hest.code) == (0, 0), tabs.err + hest.err
    return Study(folder, tabs, hest)


def copy(study: Study, folder: Path) -> Study:
    shutil.copytree(study.folder, folder)
    return Study(folder, study.tabs, study.hest)


@pytest.fixture
def place(undisturbed: Study, tmp_path: Path) -> Study:
    """The same in a folder of the test's own: E_max and energy table are those of the undisturbed run."""
    return copy(undisturbed, tmp_path / "place")


@pytest.fixture(scope="session")
def stopped(undisturbed: Study, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The same with a second hest run, stopped after 11 lines: at step 9, with checkpoints at 8 and 9."""
    place = copy(undisturbed, tmp_path_factory.mktemp("stopped") / "place")
    assert run_child(place.folder, *HEST, first=at_line, given=(11, signal.SIGTERM)).code == Exit.TERMINATED
    checkpoints = begun(place) / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step-00000008", "step-00000009"}
    return place


@pytest.fixture
def broken_off(stopped: Study, tmp_path: Path) -> Study:
    """That, too, in a folder of the test's own."""
    return copy(stopped, tmp_path / "place")


def begun(place: Study) -> Path:
    """The folder of the run that the test began."""
    known = {place.tabs.document["run_id"], place.hest.document["run_id"]}
    (path,) = [path for path in (place.folder / "runs").glob("train-hest-*") if path.name not in known]
    return path


def record_of(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "run.json").read_text())
    assert isinstance(record, dict)
    return record


def curve(folder: Path) -> list[tuple[object, ...]]:
    """What training did, but for time and the joules it took."""
    names = ("step", "split", "loss", "task_loss", "grad_norm", "energy_ratio", "multiplier", "share_full")
    return [tuple(row[name] for name in names) for row in lines_of(folder, "steps")]


def assert_as_undisturbed(place: Study, outcome: Outcome) -> None:
    assert outcome.code == 0, outcome.err
    document, reference = outcome.document, place.hest.document
    expected = curve(place.run_folder(place.hest))
    assert len(expected) == LINES
    assert curve(place.run_folder(outcome)) == expected
    for key in ("emax_j", "emax_origin", "scope_energy_j_per_sample", "train_steps", "hardened_over_emax"):
        assert document[key] == reference[key]
    assert len(lines_of(place.run_folder(outcome), "samples")) == 1
    assert run_cli(place.folder, "runs", "verify").code == 0


def at_line(line: int, number: signal.Signals) -> None:
    """Send this very process a signal when it has recorded its ``line``-th step."""
    from hestctl.runs import Recorder

    step, count = Recorder.step, 0

    def record(self: Recorder, metric: Any) -> None:
        nonlocal count
        step(self, metric)
        count += 1
        if count == line:
            os.kill(os.getpid(), number)

    Recorder.step = record  # type: ignore[method-assign]


def at_checkpoint(number: int) -> None:
    """Kill this process when it has written its ``number``-th checkpoint, but not yet given it its name."""
    from hestctl.training import checkpoint

    replace, count = os.replace, 0

    def rename(aside: Path, final: Path) -> None:
        nonlocal count
        count += "step-" in final.name
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(aside, final)

    checkpoint.os.replace = rename  # type: ignore[assignment]


def at_evaluation(number: signal.Signals) -> None:
    """Send a signal during the generation of the test split."""
    from hestctl.generation.native import NativeGenerator

    generate = NativeGenerator.generate

    def run(self: NativeGenerator, *rows: Any, **more: Any) -> Any:
        os.kill(os.getpid(), number)
        return generate(self, *rows, **more)

    NativeGenerator.generate = run  # type: ignore[method-assign]


def at_validation(nth: int) -> None:
    """Send SIGTERM as the ``nth`` evaluation of the validation split begins."""
    from hestctl.workflows import train

    made, count = train.Generator, 0

    def make(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == nth:
            os.kill(os.getpid(), signal.SIGTERM)
        return made(*arguments)

    train.Generator = make  # type: ignore[assignment,misc]


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")],
)
def test_a_signal_in_training_saves_and_resume_finishes(
    place: Study, number: signal.Signals, code: int, word: str
) -> None:
    stopped = run_child(place.folder, *HEST, first=at_line, given=(8, number))
    assert stopped.code == code
    assert stopped.out == ""
    record = record_of(begun(place))
    assert f"stopped by {word}" in stopped.message
    assert f"runs/{record['run_id']}" in stopped.message
    assert "--resume goes on" in stopped.message
    assert (record["status"], record["error"]) == ("interrupted", f"stopped by {word}")
    # Saved at the step it was stopped at: nothing is done twice.
    checkpoints = begun(place) / "checkpoints"
    assert max(path.name for path in checkpoints.iterdir()) == "step-00000006"
    resumed = run_cli(place.folder, *HEST, "--resume", "--json")
    assert resumed.document["run_id"] == record["run_id"]
    assert_as_undisturbed(place, resumed)


def test_a_signal_in_the_evaluation_loses_no_training(place: Study) -> None:
    stopped = run_child(place.folder, *HEST, first=at_evaluation, given=(signal.SIGTERM,))
    assert stopped.code == Exit.TERMINATED
    assert record_of(begun(place))["status"] == "interrupted"
    assert_as_undisturbed(place, run_cli(place.folder, *HEST, "--resume", "--json"))


@pytest.mark.parametrize(("nth", "step"), [(1, 0), (2, 5)])
def test_a_validation_that_is_broken_off_is_made_up_for(place: Study, nth: int, step: int) -> None:
    stopped = run_child(place.folder, *HEST, first=at_validation, given=(nth,))
    assert stopped.code == Exit.TERMINATED
    assert max(path.name for path in (begun(place) / "checkpoints").iterdir()) == f"step-{step:08d}"
    assert_as_undisturbed(place, run_cli(place.folder, *HEST, "--resume", "--json"))


@pytest.mark.parametrize("lines", [(3, 9), (15,)], ids=str)
def test_a_killed_run_goes_on_from_its_checkpoint(place: Study, lines: tuple[int, ...]) -> None:
    again: tuple[str, ...] = ()
    for line in lines:
        killed = run_child(place.folder, *HEST, *again, first=at_line, given=(line, signal.SIGKILL))
        assert killed.code == -signal.SIGKILL
        assert record_of(begun(place))["status"] == "started"
        again = ("--resume",)
    assert_as_undisturbed(place, run_cli(place.folder, *HEST, "--resume", "--json"))


def test_a_run_killed_while_it_writes_a_checkpoint_takes_the_one_before(place: Study) -> None:
    killed = run_child(place.folder, *HEST, first=at_checkpoint, given=(2,))
    assert killed.code == -signal.SIGKILL
    checkpoints = begun(place) / "checkpoints"
    whole = sorted(path.name for path in checkpoints.glob("step-*"))
    assert whole == ["step-00000004"]
    assert list(checkpoints.glob(".aside-*"))
    resumed = run_cli(place.folder, *HEST, "--resume", "--json")
    assert_as_undisturbed(place, resumed)
    assert list(checkpoints.glob(".aside-*")) == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "name", "says"),
    [
        (truncate, "tensors.safetensors", "the checksum of tensors.safetensors differs"),
        (flip, "state.json", "the checksum of state.json differs"),
        (Path.unlink, "manifest.json", "no readable manifest"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    broken_off: Study, damage: Callable[[Path], None], name: str, says: str
) -> None:
    place = broken_off
    damage(begun(place) / "checkpoints" / "step-00000009" / name)
    loud = tuple(argument for argument in HEST if argument != "-q")
    resumed = run_cli(place.folder, *loud, "--resume", "--json")
    assert says in resumed.err
    assert "resumed at step 8 of 12" in resumed.err
    assert_as_undisturbed(place, resumed)


def test_what_came_between_changes_neither_budget_nor_prices(broken_off: Study) -> None:
    """A later tabs run would give another E_max, a later calibration other joules a direction."""
    place, interrupted = broken_off, begun(broken_off)
    arguments = ("train", "--method", "tabs", *LONG, "--lr", "0.01", "--max-steps", "2", "--json")
    later = run_cli(place.folder, *arguments)
    assert later.code == 0
    assert run_cli(place.folder, "calibrate", *TINY, "-q").code == 0
    resumed = run_cli(place.folder, *HEST, "--resume", "--json")
    assert resumed.document["run_id"] == interrupted.name
    assert_as_undisturbed(place, resumed)
    fresh = run_cli(place.folder, *HEST, "--max-steps", "1", "--json").document
    assert fresh["emax_origin"] == f"0.6 x tabs run {later.document['run_id']}"
    assert fresh["emax_j"] != resumed.document["emax_j"]


def test_other_settings_are_refused_by_name_unless_forced(broken_off: Study) -> None:
    place, interrupted = broken_off, begun(broken_off)
    before = (interrupted / "run.json").read_bytes()
    other = (*HEST, "--resume", "--gate-lr", "0.01", "--set", "train.patience=9")
    refused = run_cli(place.folder, *other)
    assert refused.code == Exit.USAGE
    assert f"run {interrupted.name} was started with other settings" in refused.message
    assert "train.gate_learning_rate was 0.002, now 0.01; train.patience was 5, now 9" in refused.message
    assert "--force" in refused.message
    assert (interrupted / "run.json").read_bytes() == before
    forced = run_cli(place.folder, *other, "--force", "--json")
    assert forced.code == 0, forced.err
    assert forced.document["run_id"] == interrupted.name
    assert record_of(interrupted)["summary"]["forced"] == [
        "train.gate_learning_rate was 0.002, now 0.01",
        "train.patience was 5, now 9",
    ]


def test_other_data_under_the_same_name_are_refused(tmp_path: Path) -> None:
    rows = [
        {"id": f"row-{n}", "article": f"Word {n}. " * 30, "highlights": f"The word {n}."} for n in range(40)
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("train", "--method", "tabs", *LONG, "--data", "mine.jsonl")
    assert run_child(tmp_path, *arguments, first=at_line, given=(5, signal.SIGTERM)).code == 143
    path.write_text("".join(json.dumps({**row, "highlights": "Others."}) + "\n" for row in rows))
    refused = run_cli(tmp_path, *arguments, "--resume")
    assert refused.code == Exit.USAGE
    assert "the data mine.jsonl, which hold other samples" in refused.message


@pytest.mark.parametrize("named", [False, True])
def test_a_finished_run_is_not_resumed(place: Study, named: bool) -> None:
    run_id = place.hest.document["run_id"]
    outcome = run_cli(place.folder, *HEST, "--resume", *(("--run", run_id) if named else ()))
    assert outcome.code == Exit.USAGE
    if named:
        assert f"run {run_id} cannot be resumed: it is a finished train run" in outcome.message
    else:
        assert "nothing to resume: no interrupted hest run in runs.duckdb" in outcome.message


def test_resume_takes_the_run_that_is_named(broken_off: Study) -> None:
    place, interrupted = broken_off, begun(broken_off)
    assert run_child(place.folder, *HEST, first=at_line, given=(2, signal.SIGTERM)).code == Exit.TERMINATED
    resumed = run_cli(place.folder, *HEST, "--resume", "--run", interrupted.name, "--json")
    assert resumed.document["run_id"] == interrupted.name
    assert_as_undisturbed(place, resumed)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


def interrupt_and_convert() -> None:
    """As libraries do that wrap whatever fails in their imports."""
    try:
        interrupt()
    except BaseException as error:
        raise RuntimeError("could not import module") from error


def interrupt_and_swallow() -> None:
    try:
        interrupt()
    except BaseException:
        time.sleep(5)


@pytest.mark.parametrize("first", [interrupt, interrupt_and_convert, interrupt_and_swallow])
def test_ctrl_c_before_the_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: Callable[[], None]
) -> None:
    monkeypatch.setattr("hestctl.workflows.train.load_backbone", lambda *_, **__: first())
    started, handlers = time.monotonic(), [signal.getsignal(number) for number in signals]
    outcome = run_cli(tmp_path, *HEST)
    assert (outcome.code, outcome.err) == (Exit.INTERRUPTED, "error: stopped by Ctrl-C\n")
    assert time.monotonic() - started < 4
    assert list(tmp_path.iterdir()) == []
    assert [signal.getsignal(number) for number in signals] == handlers


signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGALRM)


def test_sigterm_before_the_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminate(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("hestctl.workflows.train.load_backbone", terminate)
    outcome = run_cli(tmp_path, *HEST)
    assert (outcome.code, outcome.err) == (Exit.TERMINATED, "error: stopped by SIGTERM\n")
    assert list(tmp_path.iterdir()) == []
