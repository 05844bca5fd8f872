"""The study of a search: one total for all workers, and nothing lost of those that die."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hestctl.errors import Exit, HestError
from hestctl.records import Run
from hestctl.settings import Settings, with_values
from hestctl.store.folder import RunFolder, now
from hestctl.store.process import identity
from hestctl.workflows import study as module
from hestctl.workflows.study import JOURNAL, Outcome, Study, space_of

LATER, DONE = "2999-01-01T00:00:00.000000+00:00", Outcome(30.0, 2.0, "predicted", "trial-1", 1.5)
FLOOR = 29.0


def settings(**values: Any) -> Settings:
    return with_values(Settings.model_construct(), {"search.trials": 4, **values})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """The folder of a search of 4 trials that this process is at work on."""
    run = Run("search-1", "search", "started", now(), method="hest")
    run.settings = settings().model_dump(mode="json")
    run.summary = {"search": {"ends_at": LATER}}
    return RunFolder.create(tmp_path, run)


def change(folder: RunFolder, **values: Any) -> None:
    folder.write_run(replace(folder.read_run(), **values))


def in_a_process(work: Callable[..., object], *given: object, count: int = 1) -> None:
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=work, args=given) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0


def claim_all(root: Path) -> None:
    study = Study(RunFolder(root, "search-1"), settings())
    while (trial := study.claim()) is not None:
        study.done(trial, DONE, FLOOR)


def claim_one(root: Path) -> None:
    """And end without a word of it."""
    assert Study(RunFolder(root, "search-1"), settings()).claim() is not None


def test_many_workers_keep_to_one_total(folder: RunFolder) -> None:
    change(folder, settings=settings(**{"search.trials": 12}).model_dump(mode="json"))
    in_a_process(claim_all, folder.path.parent, count=3)
    rows = Study(folder, settings()).ended()
    assert [row["number"] for row in rows] == list(range(12))
    assert {row["state"] for row in rows} == {"complete"}
    assert len({row["params"]["train.learning_rate"] for row in rows}) == 12


def test_trials_under_way_are_taken(folder: RunFolder) -> None:
    study = Study(folder, settings())
    assert [study.claim() is None for _ in range(5)] == [False] * 4 + [True]


def test_a_trial_of_a_dead_process_is_tried_again_and_does_not_count(folder: RunFolder) -> None:
    in_a_process(claim_one, folder.path.parent)
    study = Study(folder, settings())
    assert study.under_way()
    trial = study.claim()
    assert trial is not None
    (lost,) = study.ended()
    assert (lost["state"], lost["feasible"], lost["params"]) == ("interrupted", False, trial.params)
    assert study.counted() == 0
    study.done(trial, DONE, FLOOR)
    claim_all(folder.path.parent)
    assert Study(folder, settings()).counted() == 4


def test_settings_that_two_processes_died_of_are_given_up(folder: RunFolder) -> None:
    for _ in range(2):
        in_a_process(claim_one, folder.path.parent)
    study = Study(folder, settings())
    trial = study.claim()
    assert trial is not None
    assert [row["state"] for row in study.ended()] == ["interrupted", "failed"]
    assert trial.params not in [row["params"] for row in study.ended()]


def test_a_trial_of_another_host_is_left_to_it_unless_it_is_said_to_be_lost(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(folder, settings())
    with monkeypatch.context() as patch:
        patch.setattr(module, "identity", lambda: {**identity(), "host": "elsewhere"})
        assert study.claim() is not None
    study.close_left()
    assert study.under_way()
    study.close_left(elsewhere=True)
    assert not study.under_way()


def test_a_trial_left_within_its_claim_is_closed(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(folder, settings())
    with monkeypatch.context() as patch:
        patch.setattr(module, "identity", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            study.claim()
    study.close_left()
    assert not study.under_way()


def test_an_outcome_that_was_written_counts_though_its_process_died(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(folder, settings())
    with monkeypatch.context() as patch:
        patch.setattr(module, "identity", lambda: {**identity(), "start_ticks": 1})
        patch.setattr(Study, "_tell", lambda *_: None)
        trial = study.claim()
        assert trial is not None
        study.done(trial, DONE, FLOOR)
    study.close_left()
    (row,) = study.ended()
    assert (row["state"], row["value"], row["feasible"]) == ("complete", 2.0, True)


def test_a_trial_that_is_given_back_is_the_next_one(folder: RunFolder) -> None:
    study = Study(folder, settings())
    trial = study.claim()
    assert trial is not None
    study.give_back(trial)
    again = study.claim()
    assert again is not None
    assert again.params == trial.params


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "interrupted"},
        {"summary": {"search": {"ends_at": "2001-01-01T00:00:00.000000+00:00"}}},
        {"settings": settings(**{"search.trials": 0}).model_dump(mode="json")},
    ],
    ids=["the search was stopped", "time is up", "all are taken"],
)
def test_no_trial_is_taken_where(folder: RunFolder, changes: dict[str, Any]) -> None:
    study = Study(folder, settings())
    change(folder, **changes)
    assert study.claim() is None


def test_no_trial_is_taken_of_a_search_whose_process_died(folder: RunFolder) -> None:
    study = Study(folder, settings())
    (folder.path / "process.json").write_text(json.dumps({**identity(), "start_ticks": 1}))
    assert study.claim() is None


def test_a_torn_line_of_the_journal_is_cut_and_the_rest_kept(folder: RunFolder) -> None:
    study = Study(folder, settings())
    trial = study.claim()
    assert trial is not None
    study.done(trial, DONE, FLOOR)
    journal = folder.path / JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":4,"work')
    after = Study(folder, settings())
    assert after.claim() is not None
    assert after.counted() == 1
    assert journal.read_bytes().startswith(whole)
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    assert Study(folder, settings()).counted() == 1


def test_a_journal_damaged_within_is_named(folder: RunFolder) -> None:
    Study(folder, settings())
    journal = folder.path / JOURNAL
    journal.write_bytes(b"?\n" + journal.read_bytes())
    with pytest.raises(HestError, match=JOURNAL) as caught:
        Study(folder, settings())
    assert caught.value.exit_code == Exit.STORE


def test_a_study_gone_on_with_draws_other_settings(folder: RunFolder) -> None:
    first = Study(folder, settings()).claim()
    second = Study(folder, settings()).claim()
    assert first is not None
    assert second is not None
    assert first.params["train.learning_rate"] != second.params["train.learning_rate"]


def test_the_best_is_the_cheapest_that_reached_the_baseline(folder: RunFolder) -> None:
    study = Study(folder, settings())
    outcomes = [replace(DONE, score=s, energy_j=j) for s, j in ((30.0, 3.0), (28.9, 1.0), (29.0, 2.0))]
    for outcome in outcomes:
        trial = study.claim()
        assert trial is not None
        study.done(trial, outcome, FLOOR)
    trial = study.claim()
    assert trial is not None
    study.failed(trial, Outcome(error="diverged"))
    best = study.best()
    assert best is not None
    assert best.number == 2
    assert [row["state"] for row in study.ended()] == ["complete"] * 3 + ["failed"]
    assert study.claim() is None  # one that failed counts


def test_without_a_budget_the_best_has_the_highest_score(folder: RunFolder) -> None:
    study = Study(folder, settings(**{"method.name": "tabs"}))
    for score in (30.0, 32.0, 31.0):
        trial = study.claim()
        assert trial is not None
        study.done(trial, replace(DONE, score=score), None)
    best = study.best()
    assert best is not None
    assert best.number == 1


@pytest.mark.parametrize("name", ["tabs", "bhsp", "lora"])
def test_methods_without_a_budget_share_one_space(name: str) -> None:
    names = {"train.learning_rate", "train.batch_size", "train.accumulation"}
    assert set(space_of(settings(**{"method.name": name}))) == names
    hest = set(space_of(settings()))
    assert hest == names | {"method.controller_width", "method.tau", "budget.alpha", "budget.emax_ratio"}


def test_what_decides_is_found_important(folder: RunFolder) -> None:
    total = 24
    change(folder, settings=settings(**{"search.trials": total}).model_dump(mode="json"))
    study = Study(folder, settings())
    for number in range(total):
        if number == module.ENOUGH - 1:
            assert study.importance() == {}
        trial = study.claim()
        assert trial is not None
        ratio, tau = trial.params["budget.emax_ratio"], trial.params["method.tau"]
        study.done(trial, replace(DONE, energy_j=100 * ratio, score=30 + tau), FLOOR)
    found = study.importance()
    assert max(found["joules"], key=found["joules"].__getitem__) == "budget.emax_ratio"
    assert max(found["score"], key=found["score"].__getitem__) == "method.tau"
    assert sum(found["joules"].values()) == pytest.approx(1)
