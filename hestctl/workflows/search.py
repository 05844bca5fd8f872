"""``train --trials N``: an Optuna search, then the best settings trained once more and recorded.

Budgeted methods minimise joules per sample subject to ROUGE-Lsum of at least the baseline's, a
constraint and not a penalty; the others maximise ROUGE-Lsum. Labelled data have accuracy in its place.
Trials generate the validation split: the test split is seen once, by the final run. The search is a run
until that has ended: whatever stops it, ``--resume`` goes on with it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from optuna.trial import FrozenTrial, Trial

from hestctl.energy.meter import Meter
from hestctl.errors import Exit, HestError, Interrupted
from hestctl.generation.evaluate import evaluate
from hestctl.model.backbone import Backbone
from hestctl.model.methods import METHODS
from hestctl.progress import Progress
from hestctl.records import Run
from hestctl.runs import Recorder, new_run_id, recording, resume
from hestctl.settings import Settings, from_document, with_values
from hestctl.store import queries
from hestctl.store.store import Store
from hestctl.workflows.crew import Crew, crew
from hestctl.workflows.engines import chosen_engine, load_hardened, record_engine, with_kernels
from hestctl.workflows.metering import energy_table, open_meter, stored_table
from hestctl.workflows.resuming import Resume, changes, resumable
from hestctl.workflows.setup import Data, describe, find_reference
from hestctl.workflows.study import Goal, Outcome, Study
from hestctl.workflows.summary import summarise
from hestctl.workflows.train import Part, load_inputs, train

_LOOK_S = 0.5
"""How often a search that waits for its other workers looks at their trials."""

_GOES_ON = ("db", "profile.", "search.trials", "search.timeout_min", "search.workers")
"""Settings that may differ when a search goes on. No others: trials of other settings cannot be compared."""


def search(
    settings: Settings,
    store: Store,
    progress: Progress,
    *,
    resuming: Resume | None = None,
    figures: Path = Path("figures"),
) -> Run:
    """Try ``search.trials`` settings (or for ``search.timeout_min`` minutes), then train the best.

    Returns the final training run; the search itself is a run of command ``search`` whose trials are
    stored, and drawn into the folder ``figures``. Raises HestError when no trial was feasible.
    """
    s = settings
    if not METHODS[s.method.name].trained:
        raise HestError(f"{s.method.name} is not trained: there is nothing to search", None, Exit.USAGE)
    old = None if resuming is None else resumable(s, store, resuming.run_id, "search")
    if old is not None:
        changes(old, s, None, force=False, no_matter=_GOES_ON)  # what is refused should not wait
    backbone, data = load_inputs(s, store, progress)
    if old is not None:
        changes(old, s, data, force=False, no_matter=_GOES_ON)
    row, goal = _begin(s, store, backbone, data, old, progress)
    if old is None or resuming is None:
        session = recording(store, row)
    else:
        session = resume(store, old.run_id, row, force=resuming.force)
    try:
        with session as recorder:
            run = recorder.run
            study = Study(recorder.folder, s)
            if resuming is not None and resuming.force:
                study.close_left(elsewhere=True)
            progress.note(f"search {run.run_id}; another worker: hestctl train --join {run.run_id}")
            part = Part(run.run_id, backbone, data)
            try:
                with crew(s.search.workers - 1, recorder.folder, s.db, backbone.device, progress) as others:
                    _try_all(study, goal, s, store, part, recorder, others, progress)
            finally:
                _record_ended(study, recorder, progress)
            recorder.check()
            run.summary = {**run.summary, "importance": study.importance()}
            recorder.commit()
            _draw(store, recorder, figures, progress)
            best = _best(study, goal, s)
            run.summary = {**run.summary, "best_trial": best.number, **best.params}
            recorder.commit()
            recorder.check()
            progress.note(f"best trial {best.number + 1}: {_told(best.params)}; training it once more")
            part = replace(part, trials=study.counted())
            return _train_best(_tried(s, best.params, goal), store, part, progress)
    except Interrupted as error:
        error.hint = f"{error.hint}; the same command with --resume goes on"
        raise


def join(search_id: str, store: Store, progress: Progress) -> int:
    """Work on a search that another process began, until it has no more trials; returns how many were done.

    All settings are the search's, but for the store's path. Raises HestError (usage) for a search that is
    not at work, or whose joules this process would disturb or could not have.
    """
    found = queries.get_run(store, search_id)
    folder = store.folder(search_id)
    if found.command != "search":
        raise HestError(
            f"run {search_id} is a {found.command} run, not a search",
            "`hestctl runs list --command search` shows the searches",
            Exit.USAGE,
        )
    if found.status != "started" or folder.owner_liveness() == "dead":
        raise HestError(
            f"search {search_id} is not at work",
            "go on with it by the command that began it, and --resume",
            Exit.USAGE,
        )
    found = folder.read_run()
    goal = Goal(**found.summary["search"])
    if goal.joules == "measured":
        raise HestError(
            f"search {search_id} meters its trials: two at once on a device would be in each other's joules",
            "begin it with --workers 2, or with --set search.joules=predicted",
            Exit.USAGE,
        )
    s = with_values(from_document(found.settings), {"db": store.db})
    backbone, data = load_inputs(s, store, progress)
    with open_meter(s.energy, backbone.device, store, progress) as meter:
        _demand_same(found, describe(s, backbone, meter, data))
    study, done = Study(folder, s), 0
    part = Part(search_id, backbone, data)
    while (trial := study.claim()) is not None:
        _try_one(trial, study, goal, s, store, part, progress)
        done += 1
    return done


def _begin(
    s: Settings, store: Store, backbone: Backbone, data: Data, old: Run | None, progress: Progress
) -> tuple[Run, Goal]:
    """The row of the search, and its goal: that of ``old`` where it goes on with one."""
    with open_meter(s.energy, backbone.device, store, progress) as meter:
        row = describe(s, backbone, meter, data)
        row.run_id, row.command = new_run_id("search", s.method.name), "search"
        ends = datetime.now(UTC) + timedelta(minutes=s.search.timeout_min)
        ends_at = ends.isoformat(timespec="microseconds")
        if old is not None and "search" in old.summary:
            goal = replace(Goal(**old.summary["search"]), ends_at=ends_at)
            if goal.joules == "measured" and s.search.workers > 1:
                raise HestError(
                    f"search {old.run_id} meters its trials, which only a single process can",
                    "leave out --workers, or begin another search",
                    Exit.USAGE,
                )
        else:
            alone = s.search.workers == 1 and s.search.joules == "auto"
            joules: Literal["measured", "predicted"] = (
                "measured" if alone and meter.kind == "measured" else "predicted"
            )
            goal = Goal("accuracy" if data.labels else "ROUGE-Lsum", None, None, joules, ends_at)
            if METHODS[s.method.name].budgeted:
                goal = _hold_to_reference(goal, s, store, row, backbone, data, meter, progress)
        _price(s, store, backbone, data, meter, progress)
    row.summary = {**row.summary, "search": asdict(goal)}
    return row, goal


def _hold_to_reference(
    goal: Goal,
    s: Settings,
    store: Store,
    row: Run,
    backbone: Backbone,
    data: Data,
    meter: Meter,
    progress: Progress,
) -> Goal:
    """The goal with the TABS reference and its score on the validation split.

    Raises HestError (usage) where there is no reference run: a constraint needs a number.
    """
    reference = find_reference(store, row, s.budget.reference)
    if reference is None:
        raise HestError(
            "the search holds quality at the baseline's, and the store has no comparable tabs run",
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
    return replace(goal, floor_points=floor, reference=reference.run_id)


def _no_stop() -> None:
    """Before the search is recorded, a signal ends the process as usual."""


def _price(
    s: Settings, store: Store, backbone: Backbone, data: Data, meter: Meter, progress: Progress
) -> None:
    """Have the energy tables that trials will ask for, while nothing else runs on the device."""
    widths = s.search.controller_width if METHODS[s.method.name].budgeted else (s.method.controller_width,)
    for width in widths:
        priced = with_values(s, {"method.controller_width": width})
        if stored_table(priced, backbone, meter, store, progress) is None:
            run = describe(priced, backbone, meter, data)
            run.run_id, run.command = new_run_id("prices", s.method.name), "prices"
            with recording(store, run) as recorder:
                energy_table(priced, backbone, meter, store, recorder, progress)


def _try_all(
    study: Study,
    goal: Goal,
    s: Settings,
    store: Store,
    part: Part,
    recorder: Recorder,
    others: Crew,
    progress: Progress,
) -> None:
    """Take trials until all workers together have done them, and record each as it ends."""
    working = True
    while working:
        recorder.check()
        trial = study.claim()
        if trial is not None:
            _try_one(trial, study, goal, s, store, part, progress)
        else:
            working = study.under_way()
            if working:
                time.sleep(_LOOK_S)
        _record_ended(study, recorder, progress)
        others.look()


def _record_ended(study: Study, recorder: Recorder, progress: Progress) -> None:
    """Put into the store what the journal has of trials that ended, whoever tried them, and tell it."""
    known = {row["number"] for row in recorder.folder.read_lines("trials").rows}
    for row in study.ended():
        if row["number"] not in known:
            recorder.trial(row)
            progress.note(_line(row, recorder.run.settings["search"]["trials"]))
    recorder.commit()


def _try_one(
    trial: Trial, study: Study, goal: Goal, s: Settings, store: Store, part: Part, progress: Progress
) -> None:
    """Train one suggestion. Whatever stops this process, others may try it again."""
    start_s = time.monotonic()
    progress.note(f"trial {trial.number + 1} of {s.search.trials}: {_told(trial.params)}")
    try:
        run = train(_tried(s, trial.params, goal), store, progress, part=part)
        outcome = _outcome(run, goal, study.budgeted, time.monotonic() - start_s)
    except HestError as error:
        # A trial that diverges, does not fit into memory or cannot meet its budget says something of its
        # settings alone.
        if error.exit_code not in (Exit.FAILED, Exit.OVER_BUDGET):
            study.give_back(trial)
            raise
        outcome = Outcome(duration_s=time.monotonic() - start_s, error=error.message)
    except BaseException:
        study.give_back(trial)
        raise
    if outcome.error is not None:
        study.failed(trial, outcome)
    else:
        study.done(trial, outcome, goal.floor_points)


def _outcome(run: Run, goal: Goal, budgeted: bool, duration_s: float) -> Outcome:
    """Joules per sample: the meter's where the search goes by these, else those of the budget's scope."""
    measured = goal.joules == "measured"
    energy_j = run.summary["energy_j_per_sample" if measured else "scope_energy_j_per_sample"]
    error = "its joules were not measured" if budgeted and energy_j is None else None
    kind = None if energy_j is None else goal.joules
    return Outcome(_score(run.summary), energy_j, kind, run.run_id, duration_s, error)


def _score(summary: Mapping[str, Any]) -> float:
    """Quality in points: ROUGE-Lsum, or accuracy where the data have labels."""
    accuracy = summary["accuracy"]
    return float(summary["rouge_lsum"] if accuracy is None else 100 * accuracy)


def _tried(s: Settings, params: Mapping[str, Any], goal: Goal) -> Settings:
    """The settings of a trial; a tabs run that is recorded meanwhile does not become its reference."""
    held = {} if goal.reference is None else {"budget.reference": goal.reference}
    return with_values(s, {**params, **held})


def _best(study: Study, goal: Goal, s: Settings) -> FrozenTrial:
    """The best feasible trial. Raises HestError where there is none."""
    best, rows = study.best(), study.ended()
    if best is not None:
        return best
    failures = [row["error"] for row in rows if row["state"] == "failed"]
    if not study.counted():
        raise HestError("no trial was done in time", "allow more: --set search.timeout_min=600")
    if len(failures) == study.counted():
        raise HestError(f"all {len(failures)} trials failed, the last one: {failures[-1]}")
    raise HestError(
        f"none of {study.counted()} trials reached the baseline's score of {goal.floor_points:.2f} points",
        f"more --trials with --resume, or larger budgets: "
        f"--set search.emax_ratio={s.search.emax_ratio[1]:g},1.0",
        Exit.OVER_BUDGET,
    )


def _train_best(chosen: Settings, store: Store, part: Part, progress: Progress) -> Run:
    """Train the best settings, or go on with that where an earlier process was stopped in it."""
    for old in queries.list_runs(store, command="train", method=chosen.method.name):
        if old.parent_run_id == part.search_id and not changes(old, chosen, None, force=True):
            if old.status == "finished":
                return old
            return train(chosen, store, progress, resuming=Resume(old.run_id), part=part)
    return train(chosen, store, progress, part=part)


def _draw(store: Store, recorder: Recorder, figures: Path, progress: Progress) -> None:
    """The search's figures, from what the store has of it. Drawing never ends a search."""
    from hestctl.compare.search_figures import draw_search

    store.index(recorder.folder)
    try:
        with queries.connect([str(store.db)]) as connection:
            drawn = draw_search(connection, recorder.run.run_id, figures)
    except (HestError, OSError) as error:
        progress.note(f"the search is not drawn: {error}")
        return
    progress.note(f"{len(drawn)} figures of the search in {figures.absolute()}")
    for topic, reason in drawn.reasons.items():
        progress.note(f"not drawn: {topic} ({reason})")


def _demand_same(search: Run, here: Run) -> None:
    """Raises HestError (usage) where trials of this process would not be comparable with the search's."""
    names = ["backbone", "weights", "dtype", "data_hash"]
    if METHODS[search.method or ""].budgeted:
        names.append("device_uuid")  # the reference, E_max and all prices are of one device
    pairs = [(name, getattr(search, name), getattr(here, name)) for name in names]
    pairs.append(("fingerprint", search.summary.get("fingerprint"), here.summary.get("fingerprint")))
    other = [f"{name} {mine} is not {theirs}" for name, theirs, mine in pairs if mine != theirs]
    if other:
        raise HestError(
            f"this process cannot work on search {search.run_id}: {', '.join(other)}",
            "join it where its backbone, data and, for a budget, its device are the same",
            Exit.USAGE,
        )


def _told(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in params.items())


def _line(row: Mapping[str, Any], trials: int) -> str:
    """What became of a trial, in one line."""
    name = f"trial {row['number'] + 1}"
    if row["state"] == "failed":
        return f"{name} failed: {row['error']}"
    if row["state"] == "interrupted":
        return f"{name} was interrupted; its settings are tried again"
    joules = "" if row["energy_j"] is None else f", {row['energy_j']:.4g} J a sample {row['energy_kind']}"
    below = "" if row["feasible"] else ", below the baseline"
    minutes = row["duration_s"] / 60
    return (
        f"{name} of {trials}: {row['score']:.2f} points{below}{joules}, "
        f"{minutes:.1f} min, by process {row['worker']}"
    )
