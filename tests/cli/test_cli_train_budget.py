"""``train --max-train-joules``: what training spends is counted over all attempts, and ends at the budget."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cli_tools import TINY, Outcome, lines_of, run_child, run_cli
from test_cli_words import unworded

from hestctl.errors import Exit, HestError

TRAIN = (
    *("train", "--method", "tabs", *TINY, "--json"),
    *("--max-tokens", "220", "--new-tokens", "2", "--batch-size", "2", "--accumulation", "1"),
    *("--set", "data.train_samples=8", "--set", "data.validation_samples=1", "--set", "data.test_samples=1"),
    *("--set", "train.early_stop_samples=0", "--epochs", "3"),
    *("--set", "train.eval_steps=5", "--set", "train.save_steps=4", "--set", "train.log_steps=1"),
)
"""12 steps; evaluations at 0, 5, 10 and 12, checkpoints at 4, 8 and 12."""
STEP, EVALUATION, CHECKPOINT = 10.0, 4.0, 1.0
WHOLE = 12 * STEP + 4 * EVALUATION + 3 * CHECKPOINT
"""Joules of a training that nothing stops."""


@dataclass
class Machine:
    """A counter whose joules are what the stages of training cost, to some millionths.

    ``dear``: the joules of single stages, by name and how many of them came before in this process.
    ``lost_at_j``: the counter is lost once so much was spent. ``kill_at``, ``stop_at``, ``fail_at``: the step
    (the n-th of this process) at whose beginning, end or middle the process meets its fate.
    """

    dear: dict[tuple[str, int], float] = field(default_factory=dict)
    lost_at_j: float | None = None
    kill_at: int | None = None
    stop_at: int | None = None
    fail_at: int | None = None
    kind: str = "measured"
    seconds: float = 0.0
    looks: int = 0
    """Each costs next to nothing, but not nothing: calibration cannot do without joules."""
    counts: dict[str, int] = field(default_factory=dict)

    def __call__(self) -> float:
        self.looks += 1
        return self.seconds + 1e-6 * self.looks

    def spend(self, stage: str, joules: float) -> int:
        """Returns how many of the stage there were."""
        count = self.counts.get(stage, 0)
        self.counts[stage] = count + 1
        self.seconds += self.dear.get((stage, count), joules)
        return count + 1

    def install(self, put: Callable[[object, str, object], None]) -> None:
        from hestctl.energy.fake import FakeCounter, Faults
        from hestctl.generation.engine import Generator
        from hestctl.training.loop import Trainer
        from hestctl.workflows import metering, train

        accumulate, answer_nll, save = Trainer._accumulate, Generator.answer_nll, train.save_checkpoint

        def step(trainer: Trainer, rows: Any) -> Any:
            if self.kill_at == self.counts.get("step", 0) + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            number = self.spend("step", STEP)
            if self.stop_at == number:
                os.kill(os.getpid(), signal.SIGTERM)
            if self.fail_at == number:
                raise HestError("simulated failure")
            return accumulate(trainer, rows)

        def evaluation(generator: Generator, rows: Any) -> Any:
            self.spend("evaluation", EVALUATION)
            return answer_nll(generator, rows)

        def checkpoint(*arguments: Any) -> Any:
            self.spend("checkpoint", CHECKPOINT)
            return save(*arguments)

        def counter(*_: object, **__: object) -> FakeCounter:
            faults = Faults(lost_at_s=self.lost_at_j)
            return FakeCounter(1.0, self, step_s=None, kind=self.kind, faults=faults)  # type: ignore[arg-type]

        put(Trainer, "_accumulate", step)
        put(Generator, "answer_nll", evaluation)
        put(train, "save_checkpoint", checkpoint)
        put(metering, "open_counter", counter)


def install(machine: Machine) -> None:
    """In a process of its own, which needs nothing put back."""
    machine.install(setattr)


def run(folder: Path, *arguments: str, **machine: Any) -> tuple[Outcome, Machine]:
    made = Machine(**machine)
    with pytest.MonkeyPatch.context() as patch:
        made.install(patch.setattr)
        return run_cli(folder, *TRAIN, *arguments), made


def run_until_killed(folder: Path, *arguments: str, at: int) -> None:
    died = run_child(folder, *TRAIN, *arguments, first=install, given=(Machine(kill_at=at),))
    assert died.code == -signal.SIGKILL, died.err


def run_folder(folder: Path) -> Path:
    (path,) = (folder / "runs").iterdir()
    return path


def record_of(folder: Path) -> dict[str, Any]:
    record = json.loads((run_folder(folder) / "run.json").read_text())
    assert isinstance(record, dict)
    return record


def joules(value: float) -> Any:
    return pytest.approx(value, abs=0.01)


def notes(outcome: Outcome) -> list[str]:
    return [line for line in outcome.err.splitlines() if line.startswith("training budget: ")]


@pytest.mark.parametrize(
    ("budget", "steps", "spent"),
    [
        # After step 4, its checkpoint too; the next would need 10 J, and 4 + 1 J to judge and keep it.
        (59.0, 4, 4 * STEP + 2 * EVALUATION + 2 * CHECKPOINT),
        (73.0, 5, 5 * STEP + 2 * EVALUATION + 2 * CHECKPOINT),
        (75.0, 6, 6 * STEP + 3 * EVALUATION + 2 * CHECKPOINT),
    ],
)
def test_training_stops_before_the_step_that_would_exceed(
    tmp_path: Path, budget: float, steps: int, spent: float
) -> None:
    outcome, machine = run(tmp_path, "--max-train-joules", str(budget))
    assert outcome.code == 0, outcome.err
    document = outcome.document
    assert (document["status"], document["train_steps"]) == ("finished", steps)
    assert machine.counts["step"] == steps
    assert document["train_energy_j"] == joules(spent)
    assert budget - STEP - EVALUATION - CHECKPOINT < spent < budget
    assert (document["training_stopped"], document["training_overshoot_j"]) == ("max_train_joules", 0.0)
    assert document["training_budget_j"] == budget
    (note,) = notes(outcome)
    assert note == (
        f"training budget: {spent:g} J of {budget:g} J spent (measured) after step {steps} of 12; "
        f"the next step, and what ends training, would take about 15 J"
    )
    # What was trained last is judged, so that it can be the best, and kept.
    assert lines_of(run_folder(tmp_path), "steps")[-1]["split"] == "validation"
    assert lines_of(run_folder(tmp_path), "steps")[-1]["step"] == steps
    assert (run_folder(tmp_path) / "checkpoints" / f"step-{steps:08d}").is_dir()
    assert len(lines_of(run_folder(tmp_path), "samples")) == 1


@pytest.mark.parametrize(
    ("dear", "stopped", "steps", "over"),
    [
        ({("evaluation", 1): 40.0}, "max_train_joules", 5, 5 * STEP + EVALUATION + 40 + 2 - 80),
        ({("checkpoint", 0): 70.0}, "max_train_joules", 4, 4 * STEP + 2 * EVALUATION + 70 + 1 - 80),
        ({("step", 1): 75.0}, "max_train_joules", 2, STEP + 75 + 2 * EVALUATION + 1 - 80),
        # At its end, where no further step is left to be forgone.
        ({("evaluation", 3): 500.0}, "all steps", 12, WHOLE + 496 - 200),
    ],
    ids=["evaluation", "checkpoint", "step", "last evaluation"],
)
def test_what_turns_out_dearer_than_anything_before_overshoots_and_that_is_told(
    tmp_path: Path, dear: dict[tuple[str, int], float], stopped: str, steps: int, over: float
) -> None:
    budget = 200.0 if stopped == "all steps" else 80.0
    outcome, _ = run(tmp_path, "--max-train-joules", str(budget), dear=dear, kind="estimated")
    assert outcome.code == 0, outcome.err
    document = outcome.document
    assert (document["training_stopped"], document["train_steps"]) == (stopped, steps)
    assert document["training_overshoot_j"] == joules(over)
    (note,) = notes(outcome)
    assert f"spent (estimated) after step {steps} of 12; overshot by {over:g} J" in note
    assert unworded(outcome.err) == []


def test_a_training_within_its_budget_says_nothing_of_it(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, "--max-train-joules", "1000")
    assert notes(outcome) == []
    assert outcome.document["train_energy_j"] == joules(WHOLE)
    assert outcome.document["training_stopped"] == "all steps"


@pytest.mark.parametrize("at", [4, 7], ids=["before the first checkpoint", "after it"])
def test_what_a_killed_attempt_spent_counts(tmp_path: Path, at: int) -> None:
    """Of that after its last checkpoint nothing is left but the file beside it."""
    run_until_killed(tmp_path, at=at)
    first = json.loads((run_folder(tmp_path) / "spent.json").read_text())
    resumed, machine = run(tmp_path, "--resume")
    assert resumed.code == 0, resumed.err
    again = at - 1 if at == 4 else 2
    repeated = again * STEP + EVALUATION  # the evaluation at step 0, or that at step 5
    assert machine.counts["step"] == 12 - (at - 1) + again
    document = resumed.document
    assert document["train_energy_j"] == joules(WHOLE + repeated)
    assert document["train_time_s"] > first["seconds"] > 0
    assert [row["step"] for row in lines_of(run_folder(tmp_path), "steps") if row["split"] == "train"] == [
        *range(1, 13)
    ]


def test_a_budget_holds_over_killed_attempts(tmp_path: Path) -> None:
    """Each is killed two steps after the checkpoint at 4, and none gets further: the budget still ends."""
    budget = ("--max-train-joules", "150")
    run_until_killed(tmp_path, *budget, at=7)
    run_until_killed(tmp_path, *budget, "--resume", at=3)
    resumed, machine = run(tmp_path, *budget, "--resume")
    # Spent: 69 J to the end of step 6, then twice (with this attempt) steps 5 and 6 and the evaluation.
    before = 6 * STEP + 2 * EVALUATION + CHECKPOINT + 2 * STEP + EVALUATION
    assert before == 93.0
    assert f"training has spent {before:g} J (measured)" in resumed.err
    assert resumed.document["train_steps"] == 8
    assert machine.counts["step"] == 4
    assert resumed.document["train_energy_j"] == joules(before + 4 * STEP + 2 * EVALUATION + 2 * CHECKPOINT)
    assert resumed.document["training_stopped"] == "max_train_joules"


def test_an_orderly_stop_and_a_failure_count_to_the_joule(tmp_path: Path) -> None:
    stopped, _ = run(tmp_path, stop_at=6)
    assert stopped.code == Exit.TERMINATED
    spent = 6 * STEP + 2 * EVALUATION + 2 * CHECKPOINT
    assert record_of(tmp_path)["train_energy_j"] == joules(spent)
    failed, _ = run(tmp_path, "--resume", fail_at=2)
    assert "simulated failure" in failed.message
    spent += 2 * STEP  # the second came to nothing, but its joules are gone
    assert (record_of(tmp_path)["status"], record_of(tmp_path)["steps"]) == ("failed", 7)
    assert record_of(tmp_path)["train_energy_j"] == joules(spent)
    resumed, _ = run(tmp_path, "--resume")
    spent += 6 * STEP + 2 * EVALUATION + 2 * CHECKPOINT
    assert resumed.document["train_energy_j"] == joules(spent)


def test_without_the_file_the_sum_is_the_checkpoints(tmp_path: Path) -> None:
    stopped, _ = run(tmp_path, stop_at=6)
    assert stopped.code == Exit.TERMINATED
    (run_folder(tmp_path) / "spent.json").unlink()
    resumed, _ = run(tmp_path, "--resume")
    # The checkpoint of the stop knows everything but its own joule.
    assert resumed.document["train_energy_j"] == joules(WHOLE)


def test_a_sum_at_the_budget_trains_no_further_and_another_budget_goes_on(tmp_path: Path) -> None:
    """The budget is a matter of the call: it may change without --force."""
    stopped, _ = run(tmp_path, "--max-train-joules", "500", stop_at=6)
    assert stopped.code == Exit.TERMINATED
    again, _ = run(tmp_path, "--resume", "--max-train-joules", "100", stop_at=1)
    assert again.code == Exit.TERMINATED, again.err
    spent = 7 * STEP + 2 * EVALUATION + 3 * CHECKPOINT
    ended, machine = run(tmp_path, "--resume", "--max-train-joules", "50")
    assert ended.code == 0, ended.err
    assert "step" not in machine.counts
    document = ended.document
    assert (document["status"], document["train_steps"]) == ("finished", 7)
    over = spent + EVALUATION + CHECKPOINT - 50
    assert document["training_overshoot_j"] == joules(over)
    assert f"overshot by {over:g} J" in notes(ended)[0]
    assert len(lines_of(run_folder(tmp_path), "samples")) == 1
    assert "forced" not in record_of(tmp_path)["summary"]


def test_a_run_stopped_by_patience_trains_no_further_when_its_evaluation_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hestctl.training.best import Best

    offer = Best.offer
    monkeypatch.setattr(
        Best, "offer", lambda best, trainer, _, within: offer(best, trainer, 1.0, within=within)
    )

    def terminate(*_: object, **__: object) -> None:
        raise HestError("simulated failure")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hestctl.workflows.train.evaluate", terminate)
        failed, _ = run(tmp_path, "--set", "train.patience=1")
    assert "simulated failure" in failed.message
    resumed, machine = run(tmp_path, "--set", "train.patience=1", "--resume")
    assert resumed.code == 0, resumed.err
    assert "step" not in machine.counts
    assert (resumed.document["training_stopped"], resumed.document["train_steps"]) == ("patience", 5)
    assert "taking the best evaluation, step 0" in resumed.err


def test_a_budget_needs_a_live_counter(tmp_path: Path) -> None:
    outcome = run_cli(tmp_path, *TRAIN, "--max-train-joules", "100", "--meter", "none")
    assert outcome.code == Exit.NO_DEVICE
    assert "a training budget cannot be held without a live counter" in outcome.err
    assert "metering is switched off" in outcome.err
    assert "--meter estimate" in outcome.err
    assert list(tmp_path.glob("runs/*")) == []


def test_a_counter_lost_in_training_stops_it_safely_and_resume_goes_on(tmp_path: Path) -> None:
    budget = ("--max-train-joules", "100")
    lost, machine = run(tmp_path, *budget, lost_at_j=49.0)
    assert lost.code == Exit.NO_DEVICE
    assert "GPU is lost" in lost.err
    assert "--resume goes on" in lost.err
    # Noticed after the fifth step, and nothing was trained beyond it.
    assert machine.counts == {"step": 5, "evaluation": 1, "checkpoint": 2}
    assert (run_folder(tmp_path) / "checkpoints" / "step-00000005").is_dir()
    record = record_of(tmp_path)
    assert (record["status"], record["train_energy_j"]) == ("failed", None)
    resumed, machine = run(tmp_path, *budget, "--resume")
    assert resumed.code == 0, resumed.err
    document = resumed.document
    assert document["training_stopped"] == "max_train_joules"
    assert document["train_energy_j"] is None
    assert record_of(tmp_path)["summary"]["training_unread"] == "GPU is lost"
    assert "some joules are a guess: GPU is lost" in notes(resumed)[0]
    # 45 J were read. The fifth step and its checkpoint count as 10 J and 1 J, what follows was read again.
    assert (document["train_steps"], machine.counts["step"]) == (8, 3)
    assert unworded(resumed.err) == []


def test_a_counter_lost_without_a_budget_costs_the_number_and_no_budget_can_follow(tmp_path: Path) -> None:
    stopped, _ = run(tmp_path, lost_at_j=30.0, stop_at=6)
    assert stopped.code == Exit.TERMINATED, stopped.err
    refused, machine = run(tmp_path, "--resume", "--max-train-joules", "1000")
    assert (refused.code, machine.counts) == (Exit.NO_DEVICE, {})
    assert "what training has spent is not known (GPU is lost)" in refused.err
    resumed, _ = run(tmp_path, "--resume")
    assert resumed.code == 0, resumed.err
    assert resumed.document["train_energy_j"] is None
    assert "what training has spent is not known: GPU is lost" in resumed.err


def test_a_resume_that_cannot_hold_the_budget_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    stopped, _ = run(tmp_path, stop_at=2)
    assert stopped.code == Exit.TERMINATED
    refused, machine = run(tmp_path, "--resume", "--max-train-joules", "1000", kind="estimated")
    assert (refused.code, machine.counts) == (Exit.NO_DEVICE, {})
    assert "joules of an earlier attempt are measured, of this one estimated" in refused.err
    resumed, _ = run(tmp_path, "--resume", "--max-train-joules", "1000")
    assert resumed.document["train_energy_j"] == joules(WHOLE + CHECKPOINT)


def test_a_method_that_is_not_trained_has_no_training_budget(tmp_path: Path) -> None:
    outcome = run_cli(tmp_path, "train", "--method", "base", *TINY, "--max-train-joules", "5")
    assert outcome.code == Exit.USAGE
    assert "base is not trained" in outcome.message


def test_a_budget_of_nothing_is_refused_by_the_name_of_its_flag(tmp_path: Path) -> None:
    outcome = run_cli(tmp_path, *TRAIN, "--max-train-joules", "0")
    assert outcome.code == Exit.USAGE
    assert "--max-train-joules" in outcome.message
