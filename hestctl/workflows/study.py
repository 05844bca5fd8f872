"""The Optuna study of a search: a journal in the search's folder, which all of its workers share.

Whose a trial is stands in the trial: one that a dead process left is closed, and tried again. Whoever
takes or counts trials holds the study's lock, so that all workers together keep to the total.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from hestctl.errors import Exit, HestError
from hestctl.model.methods import METHODS
from hestctl.settings import Settings
from hestctl.store.folder import RunFolder, cut_torn_line, now
from hestctl.store.process import identity, liveness

optuna.logging.set_verbosity(optuna.logging.WARNING)

JOURNAL: Final = "optuna.journal"
ENOUGH: Final = 8
"""Trials from which on importances are more than chance."""

_STATES: Final[Mapping[TrialState, str]] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "failed",
    TrialState.FAIL: "interrupted",
}
"""Optuna's word for how a trial ended, and the store's. An interrupted one does not count: it is retried."""
_COUNTED: Final = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True, slots=True)
class Goal:
    """What every trial of a search is held to, fixed when the search began.

    ``quality`` is what scores are of. ``floor_points`` is that of the reference run on the validation split,
    None where quality itself is what is sought. ``joules`` says how a trial's were had; ``ends_at`` is when
    no more trials begin.
    """

    quality: str
    floor_points: float | None
    reference: str | None
    joules: Literal["measured", "predicted"]
    ends_at: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a trial came to: points of quality, joules a sample, its run, its seconds; or why it failed."""

    score: float | None = None
    energy_j: float | None = None
    energy_kind: str | None = None
    trial_run_id: str | None = None
    duration_s: float | None = None
    error: str | None = None


class Study:
    """The trials of the search in ``folder``, whose ``settings`` say what is sought and where.

    Raises HestError (store) for a journal that cannot be read.
    """

    def __init__(self, folder: RunFolder, settings: Settings) -> None:
        self.folder = folder
        self.budgeted = METHODS[settings.method.name].budgeted
        self.space = space_of(settings)
        self._seed = settings.train.seed
        self._lock = FileLock(folder.path / "study.lock")
        path = folder.path / JOURNAL
        with self._lock:
            try:
                self._study = optuna.create_study(
                    study_name=folder.run_id,
                    storage=JournalStorage(JournalFileBackend(str(path), lock_obj=_JournalLock(path))),
                    direction="minimize" if self.budgeted else "maximize",
                    load_if_exists=True,
                )
            except ValueError as error:
                raise HestError(
                    f"{path} cannot be read: {error}", "search again", exit_code=Exit.STORE
                ) from error

    def claim(self) -> Trial | None:
        """The next trial, its settings suggested, now this process's.

        None where all are done or under way, time is up, or the search's own process has ended.
        """
        with self._lock:
            self.close_left()
            run = self.folder.read_run()
            if run.status != "started" or self.folder.owner_liveness() == "dead":
                return None
            trials = self._study.get_trials(deepcopy=False)
            taken = sum(trial.state in (*_COUNTED, TrialState.RUNNING) for trial in trials)
            if taken >= run.settings["search"]["trials"] or now() >= run.summary["search"]["ends_at"]:
                return None
            # A seed a trial: neither workers nor a search gone on with draw the same settings twice.
            self._study.sampler = TPESampler(seed=self._seed + len(trials))
            trial = self._study.ask(self.space)
            trial.set_user_attr("worker", identity())
            return trial

    def done(self, trial: Trial, outcome: Outcome, floor_points: float | None) -> None:
        """The trial was trained and evaluated. Its constraint is at most zero where it reached the floor."""
        assert outcome.score is not None
        if floor_points is not None:
            trial.set_constraint("score", floor_points - outcome.score)
        trial.set_user_attr("outcome", asdict(outcome))
        self._tell(trial.number, asdict(outcome))

    def failed(self, trial: Trial, outcome: Outcome) -> None:
        """Its settings cannot be trained: it counts, and is not tried again."""
        if self.budgeted:
            trial.set_constraint("score", 1.0)
        trial.set_user_attr("outcome", asdict(outcome))
        self._tell(trial.number, asdict(outcome))

    def give_back(self, trial: Trial) -> None:
        """This process was stopped: the same settings are tried again by whoever takes the next trial."""
        with self._lock:
            self._study.tell(trial, state=TrialState.FAIL)
            self._study.enqueue_trial(trial.params)

    def close_left(self, *, elsewhere: bool = False) -> None:
        """Close the trials of dead processes and have them tried again; ``elsewhere``: of other hosts too.

        Settings under which a second process died are given up: they may be what killed it.
        """
        with self._lock:
            for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                # Without an owner it was left within ``claim``, for this process has the lock now.
                owner = liveness(trial.user_attrs.get("worker", {}))
                if owner == "alive" or (owner == "elsewhere" and not elsewhere):
                    continue
                if "outcome" in trial.user_attrs:
                    self._tell(trial.number, trial.user_attrs["outcome"])
                elif trial.user_attrs.get("deaths"):
                    self._study.tell(trial.number, state=TrialState.PRUNED)
                else:
                    self._study.tell(trial.number, state=TrialState.FAIL)
                    if trial.params.keys() == self.space.keys():
                        self._study.enqueue_trial(trial.params, user_attrs={"deaths": 1})

    def _tell(self, number: int, outcome: Mapping[str, Any]) -> None:
        if outcome["error"] is not None:
            self._study.tell(number, state=TrialState.PRUNED)
        else:
            self._study.tell(number, outcome["energy_j" if self.budgeted else "score"])

    def under_way(self) -> bool:
        """Whether some process is at work on a trial."""
        return bool(self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))

    def ended(self) -> list[dict[str, Any]]:
        """The trials that have ended, as rows of the store's table ``trials``."""
        return [_row(t) for t in self._study.get_trials(deepcopy=False, states=tuple(_STATES))]

    def counted(self) -> int:
        """How many trials have been tried: those that failed count, interrupted ones do not."""
        return len(self._study.get_trials(deepcopy=False, states=_COUNTED))

    def best(self) -> FrozenTrial | None:
        """The best trial among those that reached the floor."""
        found = [t for t in self._study.get_trials(deepcopy=False) if _feasible(t)]
        pick = min if self.budgeted else max
        return pick(found, key=lambda trial: trial.value or 0.0, default=None)

    def importance(self) -> dict[str, dict[str, float]]:
        """The share that each setting has in reaching low joules, and in reaching a high score.

        PED-ANOVA over the completed trials; empty where they are fewer than ``ENOUGH``.
        """
        done = [t for t in self._study.get_trials() if t.state == TrialState.COMPLETE]
        outcomes = {t.number: t.user_attrs["outcome"] for t in done}
        # Optuna's evaluator holds low values for good.
        targets = {"score": {number: -outcome["score"] for number, outcome in outcomes.items()}}
        if all(outcome["energy_j"] is not None for outcome in outcomes.values()):
            targets["joules"] = {number: outcome["energy_j"] for number, outcome in outcomes.items()}
        found: dict[str, dict[str, float]] = {}
        for name, values in targets.items():
            if len(done) < ENOUGH or len(set(values.values())) == 1:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns of what the sign above has seen to
                found[name] = get_param_importances(
                    self._study,
                    evaluator=PedAnovaImportanceEvaluator(target_quantile=0.25),
                    params=[name for name, values in self.space.items() if not values.single()],
                    target=lambda trial, values=values: values[trial.number],  # type: ignore[misc]
                )
        return found


def space_of(settings: Settings) -> dict[str, BaseDistribution]:
    """What a method's search tries, by settings key. A budget in joules outright is not searched."""
    s = settings.search
    space: dict[str, BaseDistribution] = {
        "train.learning_rate": FloatDistribution(*s.learning_rate, log=True),
        "train.batch_size": CategoricalDistribution(s.batch_size),
        "train.accumulation": CategoricalDistribution(s.accumulation),
    }
    if METHODS[settings.method.name].budgeted:
        space |= {
            "method.controller_width": CategoricalDistribution(s.controller_width),
            "method.tau": FloatDistribution(*s.tau),
            "budget.alpha": FloatDistribution(*s.alpha, log=True),
        }
        if settings.budget.emax_j is None:
            space["budget.emax_ratio"] = FloatDistribution(*s.emax_ratio)
    return space


class _JournalLock(JournalFileOpenLock):
    """The journal's lock, which ends with the process that holds it: Optuna's own outlives it by 30 s."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._held = FileLock(f"{journal}.lock")

    def acquire(self) -> bool:
        self._held.acquire()
        cut_torn_line(self._journal)
        return True

    def release(self) -> None:
        self._held.release()


def _feasible(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.COMPLETE and max(trial.constraints.values(), default=0.0) <= 0


def _row(trial: FrozenTrial) -> dict[str, Any]:
    worker: Mapping[str, Any] = trial.user_attrs.get("worker", {})
    outcome: Mapping[str, Any] = trial.user_attrs.get("outcome", asdict(Outcome(error=_LEFT)))
    return {
        "number": trial.number,
        "state": _STATES[trial.state],
        "value": trial.value,
        "feasible": _feasible(trial),
        "params": trial.params,
        "worker": f"{worker.get('pid')} on {worker.get('host', platform.node())}",
        **outcome,
    }


_LEFT: Final = "its process was stopped, or ended without a word"
