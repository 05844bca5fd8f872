"""``train --trials N``: an Optuna search, then the best settings trained once more and recorded.

Budgeted methods minimise joules per sample subject to ROUGE-Lsum of at least the baseline's, a
constraint and not a penalty; the others maximise ROUGE-Lsum. Labelled data have accuracy in its place.
Trials generate the validation split: the test split is seen once, by the final run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hestctl.errors import Exit, HestError
from hestctl.generation.evaluate import evaluate
from hestctl.model.backbone import load_backbone
from hestctl.model.methods import METHODS
from hestctl.progress import Progress
from hestctl.records import Run
from hestctl.runs import Recorder, new_run_id, recording
from hestctl.settings import Settings, with_values
from hestctl.store import queries
from hestctl.store.store import Store
from hestctl.workflows.engines import chosen_engine, load_hardened, record_engine, with_kernels
from hestctl.workflows.metering import open_meter, stored_table
from hestctl.workflows.setup import (
    describe,
    find_reference,
    load_data,
    read_inputs,
)
from hestctl.workflows.summary import summarise
from hestctl.workflows.train import train

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial


def search(settings: Settings, store: Store, progress: Progress) -> Run:
    """Run ``search.trials`` trials (or ``search.timeout_min`` minutes), then train the best.

    Returns the final training run; the search itself is a run of command ``search`` whose trials are
    stored. Raises HestError when no trial was feasible.
    """
    import optuna
    from optuna.exceptions import TrialPruned

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    s = settings
    budgeted = METHODS[s.method.name].budgeted
    failures: list[str] = []
    row, floor = _start(s, store, progress, budgeted)
    with recording(store, row) as recorder:
        study = optuna.create_study(
            direction="minimize" if budgeted else "maximize",
            sampler=optuna.samplers.TPESampler(
                seed=s.train.seed, constraints_func=_constraint if budgeted else None
            ),
        )

        def objective(trial: Trial) -> float:
            recorder.check()
            tried = _suggest(trial, s, budgeted)
            progress.note(f"trial {trial.number + 1} of {s.search.trials}: {_told(trial.params)}")
            try:
                run = train(tried, store, progress, trial_of=recorder.run.run_id)
            except HestError as error:
                # A trial that diverges, or does not fit into memory, says something of its settings alone.
                if error.exit_code != Exit.FAILED:
                    raise
                progress.note(f"trial {trial.number + 1} failed: {error.message}")
                failures.append(error.message)
                raise TrialPruned(error.message) from error
            score = _score(run.summary)
            trial.set_user_attr("shortfall", 0.0 if floor is None else floor - score)
            return _objective_j(run) if budgeted else score

        study.optimize(
            objective,
            n_trials=s.search.trials,
            timeout=60 * s.search.timeout_min,
            callbacks=[_record(recorder)],
        )
        feasible = [t for t in study.trials if t.value is not None and max(_constraint(t)) <= 0]
        if len(failures) == len(study.trials):
            raise HestError(f"all {len(failures)} trials failed, the last one: {failures[-1]}")
        if not feasible:
            raise HestError(
                f"none of {len(study.trials)} trials reached the baseline's score of {floor:.2f} points",
                f"more --trials, or larger budgets: --set search.emax_ratio={s.search.emax_ratio[1]:g},1.0",
                Exit.OVER_BUDGET,
            )
        pick: Callable[..., FrozenTrial] = min if budgeted else max
        best = pick(feasible, key=lambda t: t.value or 0.0)
        recorder.run.summary = {**recorder.run.summary, "best_trial": best.number, **best.params}
    progress.note(f"best trial {best.number + 1}: {_told(best.params)}; training it once more")
    return train(with_values(s, best.params), store, progress)


def _suggest(trial: Trial, s: Settings, budgeted: bool) -> Settings:
    space = s.search
    values: dict[str, Any] = {
        "train.learning_rate": trial.suggest_float("train.learning_rate", *space.learning_rate, log=True),
        "train.batch_size": trial.suggest_categorical("train.batch_size", space.batch_size),
        "train.accumulation": trial.suggest_categorical("train.accumulation", space.accumulation),
    }
    if budgeted:
        values |= {
            "method.controller_width": trial.suggest_categorical(
                "method.controller_width", space.controller_width
            ),
            "method.tau": trial.suggest_float("method.tau", *space.tau),
            "budget.alpha": trial.suggest_float("budget.alpha", *space.alpha, log=True),
        }
        if s.budget.emax_j is None:
            values["budget.emax_ratio"] = trial.suggest_float("budget.emax_ratio", *space.emax_ratio)
    return with_values(s, values)


def _constraint(trial: FrozenTrial) -> tuple[float]:
    """At most zero where the trial reached the baseline's ROUGE."""
    return (float(trial.user_attrs.get("shortfall", 1.0)),)


def _objective_j(run: Run) -> float:
    """Joules per sample: the meter's where it measures, else those of the budget's scope."""
    measured = run.energy_kind == "measured" and run.summary["energy_j_per_sample"] is not None
    return float(run.summary["energy_j_per_sample" if measured else "scope_energy_j_per_sample"])


def _score(summary: Mapping[str, Any]) -> float:
    """Quality in points: ROUGE-Lsum, or accuracy where the data have labels."""
    accuracy = summary["accuracy"]
    return float(summary["rouge_lsum"] if accuracy is None else 100 * accuracy)


def _told(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in params.items())


def _start(s: Settings, store: Store, progress: Progress, budgeted: bool) -> tuple[Run, float | None]:
    """The row of the search, and the score of the TABS reference on the validation split.

    Raises HestError (usage) where there is no reference run: a constraint needs a number.
    """
    splits = read_inputs(s, store)
    backbone = load_backbone(s.backbone, progress=progress.note)
    data = load_data(s, splits, backbone, progress, needed=("validation", "test"))
    with open_meter(s.energy, backbone.device, store, progress) as meter:
        row = replace(
            describe(s, backbone, meter, data),
            run_id=new_run_id("search", s.method.name),
            command="search",
        )
        if not budgeted:
            return row, None
        reference = find_reference(store, row, s.budget.reference)
        if reference is None:
            raise HestError(
                "the search holds ROUGE at the baseline's, and the store has no comparable tabs run",
                "hestctl train --method tabs first, or name one with --reference",
                Exit.USAGE,
            )
        run = queries.get_run(store, reference.run_id)
        table = stored_table(s, backbone, meter, store, progress)
        kind = with_kernels(chosen_engine(s, backbone, progress), table)
        generator = load_hardened(store, run, backbone, meter.device_name, kind, table)
        record_engine(row, kind, generator)
        result = evaluate(
            generator,
            data.validation,
            s.generation,
            meter,
            split="validation",
            labels=data.labels,
            progress=progress,
            check=_no_stop,
        )
    floor = _score(summarise(result.samples))
    progress.note(f"baseline: {floor:.2f} points by {reference.run_id} on the validation split")
    return row, floor


def _no_stop() -> None:
    """Before the search is recorded, a signal ends the process as usual."""


def _record(recorder: Recorder) -> Callable[[Any, FrozenTrial], None]:
    def write(_study: Any, trial: FrozenTrial) -> None:
        recorder.trial(
            {
                "number": trial.number,
                "state": "failed" if trial.value is None else "complete",
                "value": trial.value,
                "feasible": max(_constraint(trial)) <= 0,
                "params": trial.params,
            }
        )
        recorder.commit()

    return write
