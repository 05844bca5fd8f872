"""``train --trials``: a search under the baseline's quality, then the best settings once more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import TINY, Study, lines_of, run_cli

from hestctl.errors import Exit, HestError
from hestctl.model.backbone import Backbone, load_backbone
from hestctl.settings import with_values
from hestctl.workflows import search
from hestctl.workflows.train import train

SMALL = (
    *TINY,
    *("--set", "method.scope=adapter"),
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
    assert final["parent_run_id"] == found["run_id"]
    assert final["summary"]["search_trials"] == 2
    assert [trial["trial_run_id"] for trial in trials] == [run["run_id"] for run in reversed(tried)]
    assert {trial["energy_kind"] for trial in trials} == {"predicted"}
    history = copied.folder / "figures" / f"{found['run_id']}_history.png"
    assert history.stat().st_size > 1000
    # The trials see the validation split; only the final run sees the test split.
    splits = {run["command"]: {row["split"] for row in rows(copied, run)} for run in (*tried, final)}
    assert splits == {"trial": {"validation"}, "train": {"test"}}


def rows(study: Study, run: dict[str, Any]) -> list[dict[str, Any]]:
    return lines_of(study.folder / "runs" / run["run_id"], "samples")


def test_trials_keep_to_the_reference_that_the_search_began_with(
    copied: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tabs run that is recorded meanwhile would give later trials another E_max."""

    def train_tabs_first(*arguments: Any, **more: Any) -> Any:
        if len(runs_of(copied.folder, "train")) == 2:
            train(with_values(arguments[0], {"method.name": "tabs"}), *arguments[1:])
        return train(*arguments, **more)

    monkeypatch.setattr(search, "train", train_tabs_first)
    assert run_cli(copied.folder, *HEST).code == 0
    runs = [*runs_of(copied.folder, "trial"), runs_of(copied.folder, "train")[0]]
    assert len(runs_of(copied.folder, "train")) == 4
    reference = copied.tabs.document["run_id"]
    assert [run["emax_origin"].endswith(reference) for run in runs] == [True] * 3


def test_the_backbone_is_loaded_once_and_as_it_was_before_each_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[dict[str, Any]] = []
    seen: list[dict[str, Any]] = []

    def load(*arguments: Any, **more: Any) -> Any:
        backbone = load_backbone(*arguments, **more)
        loaded.append(weights_of(backbone))
        return backbone

    def look(*arguments: Any, **more: Any) -> Any:
        seen.append(weights_of(more["part"].backbone))
        return train(*arguments, **more)

    monkeypatch.setattr("hestctl.workflows.train.load_backbone", load)
    monkeypatch.setattr(search, "train", look)
    arguments = ("train", "--method", "lora", *SMALL, "--lr", "0.01", "--trials", "2")
    assert run_cli(tmp_path, *arguments).code == 0
    assert (len(loaded), len(seen)) == (1, 3)
    for weights in seen:
        assert weights.keys() == loaded[0].keys()
        assert all(torch.equal(weights[name], loaded[0][name]) for name in weights)


def weights_of(backbone: Backbone) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}


def test_trials_that_were_not_metered_fail_where_joules_are_measured(
    copied: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    goal = search.Goal("ROUGE-Lsum", 0.0, copied.tabs.document["run_id"], "measured", "2999")
    monkeypatch.setattr(search, "_hold_to_reference", lambda *_: goal)

    def unmetered(*arguments: Any, **more: Any) -> Any:
        run = train(*arguments, **more)
        run.summary = {**run.summary, "energy_j_per_sample": None}
        return run

    monkeypatch.setattr(search, "train", unmetered)
    outcome = run_cli(copied.folder, *HEST)
    assert "all 2 trials failed, the last one: its joules were not measured" in outcome.message


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--method", "base", "--trials", "2"), "base is not trained: there is nothing to search"),
        (("--method", "tabs", "--workers", "2"), "--workers share the trials of a search"),
        (("--join", "search-1", "--lr", "0.1"), "--join takes all settings from the search"),
        (("--join", "search-1"), "there is no store runs.duckdb"),
    ],
    ids=str,
)
def test_what_no_search_can_do_is_said(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    outcome = run_cli(tmp_path, "train", *arguments)
    assert outcome.code == Exit.USAGE
    assert says in outcome.message
    assert list(tmp_path.iterdir()) == []


def test_only_a_search_at_work_is_joined(copied: Study) -> None:
    outcome = run_cli(copied.folder, "train", "--join", copied.hest.document["run_id"])
    assert "is a train run, not a search" in outcome.message
    assert run_cli(copied.folder, *HEST).code == 0
    (found,) = runs_of(copied.folder, "search")
    outcome = run_cli(copied.folder, "train", "--join", found["run_id"])
    assert outcome.code == Exit.USAGE
    assert f"search {found['run_id']} is not at work" in outcome.message


def test_compare_draws_and_lists_the_trials_of_a_search(copied: Study) -> None:
    assert run_cli(copied.folder, *HEST).code == 0
    (found,) = runs_of(copied.folder, "search")
    shown = run_cli(copied.folder, "compare", "--search", found["run_id"], "--out", "drawn")
    assert shown.code == 0, shown.err
    assert {path.name for path in (copied.folder / "drawn").iterdir()} == {
        f"{found['run_id']}_{topic}.png" for topic in ("history", "front")
    }
    assert "not drawn" in shown.err
    assert "emax_ratio" in shown.out
    arguments = ("compare", "--search", found["run_id"], "--no-figures", "--json")
    document = run_cli(copied.folder, *arguments).document
    assert [trial["number"] for trial in document["trials"]] == [0, 1]
    assert document["reference"] == copied.tabs.document["run_id"]
    unknown = run_cli(copied.folder, "compare", "--search", "search-of-nobody")
    assert unknown.code == Exit.USAGE
    assert found["run_id"] in unknown.message


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


@pytest.mark.parametrize("code", [Exit.FAILED, Exit.OVER_BUDGET])
def test_a_trial_that_fails_does_not_end_the_search(
    copied: Study, monkeypatch: pytest.MonkeyPatch, code: Exit
) -> None:
    calls: list[object] = []

    def fail_first(*arguments: Any, **more: Any) -> Any:
        part = more["part"]
        calls.append((part.search_id, part.trials))
        if len(calls) == 1:
            raise HestError("training diverged at step 0", None, code)
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
    assert calls == [(found["run_id"], None), (found["run_id"], None), (found["run_id"], 2)]


def test_trials_that_all_fail_end_the_search(copied: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise HestError("training diverged at step 0")

    monkeypatch.setattr(search, "train", fail)
    outcome = run_cli(copied.folder, *HEST)
    assert outcome.code == Exit.FAILED
    assert "all 2 trials failed, the last one: training diverged at step 0" in outcome.message
    (found,) = runs_of(copied.folder, "search")
    trials = lines_of(copied.folder / "runs" / found["run_id"], "trials")
    assert [trial["error"] for trial in trials] == ["training diverged at step 0"] * 2


def test_a_method_without_a_budget_is_searched_for_quality(tmp_path: Path) -> None:
    outcome = run_cli(tmp_path, "train", "--method", "lora", *SMALL, "--trials", "1", "--json")
    assert outcome.code == 0, outcome.err
    (found,) = runs_of(tmp_path, "search")
    (trial,) = lines_of(tmp_path / "runs" / found["run_id"], "trials")
    assert set(trial["params"]) == {"train.learning_rate", "train.batch_size", "train.accumulation"}
