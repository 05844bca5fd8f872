"""A search in several processes, killed and gone on with: nothing is lost, and the total is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from cli_tools import ESTIMATED, Study, lines_of, run_child, run_cli
from test_cli_search import HEST, runs_of

from hestctl.errors import Exit
from hestctl.runs import Recorder
from hestctl.store.process import liveness
from hestctl.workflows import search
from hestctl.workflows.study import JOURNAL

FOUR = (*HEST, "--trials", "4")
LIMIT_S = 240.0
"""Each worker imports all of torch, which takes a busy machine a while."""


def at_training(nth: int, number: signal.Signals) -> None:
    """Send this very process a signal in its ``nth`` training."""
    step, trainings = Recorder.step, set()

    def record(self: Recorder, metric: Any) -> None:
        step(self, metric)
        trainings.add(self.run.run_id)
        if len(trainings) == nth:
            os.kill(os.getpid(), number)

    Recorder.step = record  # type: ignore[method-assign]


def before_a_trial_ends(number: signal.Signals) -> None:
    """Send this very process a signal when a trial is trained and evaluated, but the study not told of it."""
    search.Study.done = lambda *_: os.kill(os.getpid(), number)  # type: ignore[method-assign,assignment]


def with_another(number: signal.Signals | None) -> None:
    """Let this process take no trial until another has done one, then send it a signal, if any."""
    claim = search.Study.claim

    def take(self: search.Study) -> Any:
        waited = time.monotonic()
        while not self.ended():
            assert time.monotonic() - waited < LIMIT_S, "no other worker did anything"
            time.sleep(0.05)
        if number is not None:
            os.kill(os.getpid(), number)
            return None
        return claim(self)

    search.Study.claim = take  # type: ignore[method-assign]


def searched(place: Study) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The one search, and its trials."""
    (folder,) = (place.folder / "runs").glob("search-*")
    path = folder / "trials.jsonl"
    return json.loads((folder / "run.json").read_text()), lines_of(folder, "trials") if path.exists() else []


def assert_whole(place: Study, outcome: Any, total: int) -> list[dict[str, Any]]:
    """The search has ended as if nothing had disturbed it; returns its trials."""
    assert outcome.code == 0, outcome.err
    record, trials = searched(place)
    assert record["status"] == "finished"
    done = [trial for trial in trials if trial["state"] == "complete"]
    assert len(done) == total
    assert len({trial["number"] for trial in trials}) == len(trials)
    assert len({trial["params"]["train.learning_rate"] for trial in done}) == total
    best = min(done, key=lambda trial: trial["value"])
    assert record["summary"]["best_trial"] == best["number"]
    final = next(r for r in runs_of(place.folder, "train") if r["run_id"] == outcome.document["run_id"])
    assert final["parent_run_id"] == record["run_id"]
    assert final["settings"]["budget"]["emax_ratio"] == best["params"]["budget.emax_ratio"]
    assert final["summary"]["search_trials"] == total
    assert run_cli(place.folder, "runs", "verify").code == 0
    return trials


@pytest.mark.parametrize("nth", [1, 3])
def test_a_killed_search_goes_on_with_what_it_had(copied: Study, nth: int) -> None:
    killed = run_child(copied.folder, *FOUR, first=at_training, given=(nth, signal.SIGKILL))
    assert killed.code == -signal.SIGKILL
    before, kept = searched(copied)
    assert before["status"] == "started"
    assert len(kept) == nth - 1
    trials = assert_whole(copied, run_cli(copied.folder, *FOUR, "--resume", "--json"), 4)
    assert trials[: nth - 1] == kept
    (lost,) = [trial for trial in trials if trial["state"] == "interrupted"]
    assert lost["params"] in [trial["params"] for trial in trials if trial["state"] == "complete"]
    statuses = [run["status"] for run in runs_of(copied.folder, "trial")]
    assert sorted(statuses) == ["finished"] * 4 + ["interrupted"]


def test_a_search_killed_as_a_trial_ends_tries_it_again(copied: Study) -> None:
    killed = run_child(copied.folder, *HEST, first=before_a_trial_ends, given=(signal.SIGKILL,))
    assert killed.code == -signal.SIGKILL
    assert_whole(copied, run_cli(copied.folder, *HEST, "--resume", "--json"), 2)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, Exit.INTERRUPTED), (signal.SIGTERM, Exit.TERMINATED)]
)
def test_a_search_that_is_stopped_says_how_to_go_on(
    copied: Study, number: signal.Signals, code: Exit
) -> None:
    stopped = run_child(copied.folder, *HEST, first=at_training, given=(2, number))
    assert stopped.code == code
    assert "the same command with --resume goes on" in stopped.message
    record, kept = searched(copied)
    assert record["status"] == "interrupted"
    assert [trial["state"] for trial in kept] == ["complete", "interrupted"]
    # More trials may be asked for when it goes on.
    trials = assert_whole(copied, run_cli(copied.folder, *HEST, "--trials", "3", "--resume", "--json"), 3)
    assert trials[:2] == kept


def test_a_search_stopped_in_its_final_training_finishes_that(copied: Study) -> None:
    stopped = run_child(copied.folder, *HEST, first=at_training, given=(3, signal.SIGKILL))
    assert stopped.code == -signal.SIGKILL
    resumed = run_cli(copied.folder, *HEST, "--resume", "--json")
    assert_whole(copied, resumed, 2)
    assert len(runs_of(copied.folder, "train")) == 3
    assert len(runs_of(copied.folder, "trial")) == 2


def test_a_search_does_not_go_on_under_other_settings(copied: Study) -> None:
    run_child(copied.folder, *HEST, first=at_training, given=(1, signal.SIGTERM))
    other = (*HEST, "--resume", "--force", "--epochs", "2", "--set", "search.tau=[0.5,0.6]")
    refused = run_cli(copied.folder, *other)
    assert refused.code == Exit.USAGE
    assert "search.tau was [0.4, 1.0], now [0.5, 0.6]; train.epochs was 1, now 2" in refused.message
    tabs = ("train", "--method", "tabs", *HEST[3:], "--resume")
    assert "nothing to resume: no interrupted tabs search" in run_cli(copied.folder, *tabs).message


def test_two_workers_share_one_total(copied: Study) -> None:
    arguments = (*FOUR, "--workers", "2", "--json")
    loud = tuple(argument for argument in arguments if argument != "-q")
    outcome = run_child(copied.folder, *loud, first=with_another, given=(None,), limit_s=LIMIT_S)
    trials = assert_whole(copied, outcome, 4)
    assert len(trials) == 4
    assert len({trial["worker"] for trial in trials}) == 2
    told = [line for line in outcome.err.splitlines() if " points, " in line]
    assert len(told) == 4
    assert outcome.document["method"] == "hest"


def test_a_search_that_is_stopped_ends_its_workers(copied: Study) -> None:
    arguments = (*HEST, "--trials", "200", "--workers", "2")
    stopped = run_child(
        copied.folder, *arguments, first=with_another, given=(signal.SIGINT,), limit_s=LIMIT_S
    )
    assert stopped.code == Exit.INTERRUPTED
    assert "--resume goes on" in stopped.message
    (folder,) = (copied.folder / "runs").glob("search-*")
    logs = [json.loads(line) for line in (folder / JOURNAL).read_text().splitlines()]
    workers = [log["user_attr"]["worker"] for log in logs if "worker" in log.get("user_attr", {})]
    assert {liveness(worker) for worker in workers} == {"dead"}
    # What it was at is not lost either: the search can be gone on with, to the trials there are.
    done = sum(trial["state"] == "complete" for trial in searched(copied)[1])
    again = (*HEST, "--trials", str(done + 2), "--resume", "--json")
    assert_whole(copied, run_cli(copied.folder, *again), done + 2)


def test_a_search_goes_on_when_a_worker_cannot_work(copied: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    loud = tuple(argument for argument in HEST if argument != "-q")
    outcome = run_cli(copied.folder, *loud, "--workers", "2", "--json")
    assert_whole(copied, outcome, 2)
    assert "a worker ended with code 1" in outcome.err


def test_another_terminal_joins_and_ends_with_the_search(copied: Study) -> None:
    """The one process waits for the other's trial, which only a joined worker can do."""
    joined: list[subprocess.CompletedProcess[str]] = []

    def join() -> None:
        while not (found := list((copied.folder / "runs").glob("search-*/" + JOURNAL))):
            time.sleep(0.05)
        command = [sys.executable, "-m", "hestctl", "train", "--join", found[0].parent.name, "--json"]
        environment = {**os.environ, **ESTIMATED}
        joined.append(
            subprocess.run(command, cwd=copied.folder, env=environment, capture_output=True, text=True)
        )

    other = threading.Thread(target=join)
    other.start()
    outcome = run_child(copied.folder, *FOUR, "--json", first=with_another, given=(None,), limit_s=LIMIT_S)
    other.join(timeout=LIMIT_S)
    trials = assert_whole(copied, outcome, 4)
    (worker,) = joined
    assert worker.returncode == 0, worker.stderr
    document = json.loads(worker.stdout)
    by_worker = {trial["worker"] for trial in trials}
    assert len(by_worker) == 2
    assert 1 <= document["trials"] <= 3
    assert document["search_run_id"] == searched(copied)[0]["run_id"]


def test_a_search_that_meters_its_trials_is_not_joined(
    copied: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []
    begin = search._begin

    def metered(*arguments: Any) -> Any:
        row, goal = begin(*arguments)
        row.summary = {**row.summary, "search": {**row.summary["search"], "joules": "measured"}}
        return row, goal

    def join_it(*arguments: Any, **more: Any) -> Any:
        (folder,) = (copied.folder / "runs").glob("search-*")
        refused.append(run_cli(copied.folder, "train", "--join", folder.name))
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "_begin", metered)
    monkeypatch.setattr(search, "train", join_it)
    run_cli(copied.folder, *HEST)
    (outcome,) = refused
    assert outcome.code == Exit.USAGE
    assert "two at once on a device would be in each other's joules" in outcome.message
    assert "--set search.joules=predicted" in outcome.message


def test_a_worker_with_another_backbone_is_refused(copied: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = []

    def join_it(*arguments: Any, **more: Any) -> Any:
        (folder,) = (copied.folder / "runs").glob("search-*")
        path = folder / "run.json"
        before = path.read_text()
        path.write_text(before.replace('"device_uuid":"', '"device_uuid":"GPU-other-'))
        refused.append(run_cli(copied.folder, "train", "--join", folder.name))
        path.write_text(before)
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "train", join_it)
    run_cli(copied.folder, *HEST)
    (outcome,) = refused
    assert outcome.code == Exit.USAGE
    assert "cannot work on search" in outcome.message
    assert "device_uuid" in outcome.message
