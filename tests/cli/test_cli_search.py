"""``train --trials``: a search under the baseline's quality, then the best settings once more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli_tools import TINY, Study, lines_of, run_cli

from hestctl.errors import Exit, HestError
from hestctl.workflows import search
from hestctl.workflows.train import train

SMALL = (
    *TINY,
    "-q",
    *("--epochs", "1"),
    *("--new-tokens", "4"),
    *("--set", "data.train_samples=4"),
    *("--set", "data.validation_samples=2"),
    *("--set", "data.test_samples=2"),
    *("--set", "search.batch_size=[2]"),
    *("--set", "search.accumulation=[1]"),
    *("--set", "search.controller_width=[16]"),
)
HEST = ("train", "--method", "hest", *SMALL, "--trials", "2")


def runs_of(folder: Path, command: str) -> list[dict[str, Any]]:
    runs = run_cli(folder, "runs", "list", "--command", command, "--json").document["runs"]
    assert isinstance(runs, list)
    return runs


def test_the_best_of_two_trials_is_trained_once_more(copied: Study) -> None:
    outcome = run_cli(copied.folder, *HEST, "--json")
    assert outcome.code == 0, outcome.err
    (found,) = runs_of(copied.folder, "search")
    trials = lines_of(copied.folder / "runs" / found["run_id"], "trials")
    assert [(trial["number"], trial["state"], trial["feasible"]) for trial in trials] == [
        (0, "complete", True),
        (1, "complete", True),
    ]
    best = min(trials, key=lambda trial: trial["value"])
    assert found["summary"]["best_trial"] == best["number"]
    tried = runs_of(copied.folder, "trial")
    assert [run["parent_run_id"] for run in tried] == [found["run_id"]] * 2
    document = outcome.document
    (final,) = [run for run in runs_of(copied.folder, "train") if run["run_id"] == document["run_id"]]
    assert final["settings"]["budget"]["emax_ratio"] == best["params"]["budget.emax_ratio"]
    assert final["settings"]["method"]["tau"] == best["params"]["method.tau"]
    assert 0.4 <= final["emax_ratio"] <= 0.8
    assert document["emax_origin"].endswith(copied.tabs.document["run_id"])
    # The trials see the validation split; only the final run sees the test split.
    splits = {run["command"]: {row["split"] for row in rows(copied, run)} for run in (*tried, final)}
    assert splits == {"trial": {"validation"}, "train": {"test"}}


def rows(study: Study, run: dict[str, Any]) -> list[dict[str, Any]]:
    return lines_of(study.folder / "runs" / run["run_id"], "samples")


def test_a_budget_in_joules_is_not_searched(copied: Study) -> None:
    emax_j = copied.hest.document["emax_j"] / 2
    outcome = run_cli(copied.folder, *HEST, "--trials", "1", "--emax", str(emax_j), "--json")
    assert outcome.document["emax_j"] == pytest.approx(emax_j)
    (found,) = runs_of(copied.folder, "search")
    (trial,) = lines_of(copied.folder / "runs" / found["run_id"], "trials")
    assert "budget.emax_ratio" not in trial["params"]


def test_a_search_without_a_baseline_says_what_to_train(tmp_path: Path) -> None:
    outcome = run_cli(tmp_path, *HEST)
    assert outcome.code == Exit.USAGE
    assert "no comparable tabs run" in outcome.message
    assert "hestctl train --method tabs" in outcome.message
    assert list(tmp_path.iterdir()) == []


def test_no_trial_as_good_as_the_baseline_is_a_budget_that_cannot_be_met(
    copied: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter((50.0, 49.9, 0.0))  # the baseline's, then the trials'
    monkeypatch.setattr(search, "_score", lambda _: next(scores))
    outcome = run_cli(copied.folder, *HEST)
    assert outcome.code == Exit.OVER_BUDGET
    assert "none of 2 trials reached the baseline's score of 50.00" in outcome.message
    assert "--set search.emax_ratio=0.8,1.0" in outcome.message
    (found,) = runs_of(copied.folder, "search")
    assert found["status"] == "failed"
    trials = lines_of(copied.folder / "runs" / found["run_id"], "trials")
    assert [trial["feasible"] for trial in trials] == [False, False]
    assert len(runs_of(copied.folder, "train")) == 2


def test_a_trial_that_fails_does_not_end_the_search(copied: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def fail_first(*arguments: Any, **more: Any) -> Any:
        calls.append(more.get("trial_of"))
        if len(calls) == 1:
            raise HestError("training diverged at step 0")
        return train(*arguments, **more)

    monkeypatch.setattr(search, "train", fail_first)
    loud = tuple(argument for argument in HEST if argument != "-q")
    outcome = run_cli(copied.folder, *loud, "--json")
    assert outcome.code == 0, outcome.err
    assert "trial 1 failed: training diverged at step 0" in outcome.err
    (found,) = runs_of(copied.folder, "search")
    trials = lines_of(copied.folder / "runs" / found["run_id"], "trials")
    assert [trial["state"] for trial in trials] == ["failed", "complete"]
    assert found["summary"]["best_trial"] == 1
    assert calls == [found["run_id"], found["run_id"], None]


def test_trials_that_all_fail_end_the_search(copied: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise HestError("training diverged at step 0")

    monkeypatch.setattr(search, "train", fail)
    outcome = run_cli(copied.folder, *HEST)
    assert outcome.code == Exit.FAILED
    assert "all 2 trials failed, the last one: training diverged at step 0" in outcome.message


def test_a_method_without_a_budget_is_searched_for_quality(tmp_path: Path) -> None:
    outcome = run_cli(tmp_path, "train", "--method", "lora", *SMALL, "--trials", "1", "--json")
    assert outcome.code == 0, outcome.err
    (found,) = runs_of(tmp_path, "search")
    (trial,) = lines_of(tmp_path / "runs" / found["run_id"], "trials")
    assert set(trial["params"]) == {"train.learning_rate", "train.batch_size", "train.accumulation"}
