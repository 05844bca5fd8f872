"""``train``: articles in, a hardened and evaluated adapter out, everything recorded on the way."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hestctl.budget import Budget, Multiplier
from hestctl.data.prompts import Encoded
from hestctl.energy.meter import Meter
from hestctl.energy.model import EnergyModel
from hestctl.energy.table import EnergyTable
from hestctl.errors import Exit, HestError, Interrupted
from hestctl.generation.engine import Generator
from hestctl.generation.evaluate import Evaluation, evaluate
from hestctl.generation.quality import RougeScorer
from hestctl.model.backbone import Backbone, load_backbone
from hestctl.model.methods import METHODS, Tuner
from hestctl.progress import Progress
from hestctl.records import Run, StepMetric
from hestctl.runs import Recorder, new_run_id, recording, resume
from hestctl.settings import Settings
from hestctl.store import queries
from hestctl.store.files import ensure_space, write_whole
from hestctl.store.store import Store
from hestctl.training.checkpoint import (
    latest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    save_tensors,
)
from hestctl.training.loop import Trainer
from hestctl.workflows.metering import energy_table, open_meter
from hestctl.workflows.setup import (
    ADAPTER_FILE,
    Data,
    budget_of,
    check_reference,
    describe,
    harden_into,
    load_data,
    new_tuner,
    read_inputs,
)
from hestctl.workflows.summary import summarise


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on with an interrupted run: the one named, or the latest of the method."""

    run_id: str | None = None
    force: bool = False


def train(
    settings: Settings,
    store: Store,
    progress: Progress,
    *,
    resuming: Resume | None = None,
    trial_of: str | None = None,
) -> Run:
    """Train one method, harden it, generate the test split under the meter, and record it all.

    With ``trial_of`` (the id of a search) the run is a trial: it generates the validation split.
    Raises HestError; whatever was finished before stays in the run's folder and in the store.
    """
    old = None if resuming is None else _resumable(settings, store, resuming.run_id)
    _demand_budget(settings)
    if old is not None and resuming is not None:
        _changes(old, settings, None, force=resuming.force)  # what is refused should not wait
    splits = read_inputs(settings, store)
    backbone = load_backbone(settings.backbone, progress=progress.note)
    data = load_data(settings, splits, backbone, progress)
    changed: list[str] = []
    if old is not None and resuming is not None:
        changed = _changes(old, settings, data, force=resuming.force)
    ensure_space(store.root, _bytes_needed(settings, backbone))
    with open_meter(settings.energy, backbone.device, store, progress) as meter:
        run = describe(settings, backbone, meter, data)
        check_reference(settings, store, run)
        if trial_of is not None:
            run = replace(
                run,
                run_id=new_run_id("trial", settings.method.name),
                command="trial",
                parent_run_id=trial_of,
            )
        session = recording(store, run)
        if old is not None and resuming is not None:
            run = replace(run, run_id=old.run_id, created_at=old.created_at)
            if changed:
                run.summary = {**run.summary, "forced": changed}
            session = resume(store, old.run_id, run, force=resuming.force)
        try:
            with session as recorder:
                progress.note(f"run {run.run_id}")
                resumed = None if changed else old
                _Work(settings, store, backbone, data, meter, recorder, progress, resumed).run_all()
        except Interrupted as error:
            if trial_of is None:
                error.hint = f"{error.hint}; the same command with --resume goes on"
            raise
    return recorder.run


@dataclass(slots=True)
class _Work:
    """One training under way: the rooms it uses, and the stages in their order."""

    settings: Settings
    store: Store
    backbone: Backbone
    data: Data
    meter: Meter
    recorder: Recorder
    progress: Progress
    resumed: Run | None
    """The run as it was interrupted, where this one goes on with its very settings."""

    def run_all(self) -> None:
        s, run, backbone = self.settings, self.recorder.run, self.backbone
        table = energy_table(
            s, backbone, self.meter, self.store, self.recorder, self.progress, resumed=self.resumed
        )
        budget = None
        if METHODS[s.method.name].budgeted:
            budget = budget_of(
                s, self.store, self.recorder, backbone, self.data, table, self.progress, self.resumed
            )
        self.recorder.commit()  # what a resumed run keeps must be there before the first checkpoint
        tuner = new_tuner(s.method, self.backbone, table.states, s.train.seed)
        counts = tuner.counts()
        run.controller_parameters = counts.controller + counts.thresholds
        run.adapter_parameters = counts.adapter
        if METHODS[s.method.name].trained:
            self._train(tuner, table, budget)
            save_tensors(self.recorder.folder.path / ADAPTER_FILE, tuner.state(), {"run": run.run_id})
        plan = harden_into(self.recorder, s, backbone, tuner, self.data, table, budget, self.progress)
        tuner.finish()
        self._evaluate(Generator(self.backbone, tuner.spectral, plan), table.model)

    def _train(self, tuner: Tuner, table: EnergyTable, budget: Budget | None) -> None:
        s, run = self.settings, self.recorder.run
        multiplier = None
        if budget is not None:
            multiplier = Multiplier(s.budget.lambda0, s.budget.alpha, s.budget.dual)
        trainer = Trainer(
            self.backbone,
            tuner,
            self.data.train,
            s.train,
            costs_j=table.costs_j,
            budget=budget,
            multiplier=multiplier,
        )
        best = _Best(patience=s.train.patience)
        spent = self._continue_from_checkpoint(trainer, best)
        if trainer.step == 0:
            trainer.start()
            self._validate(trainer, best, 0.0, None)
        elif best.judged_step < trainer.step and self._is_due(trainer):
            self._validate(trainer, best, trainer.epoch, None)
        started, edge = time.monotonic(), self.meter.edge()
        base_j, base_s = spent
        live_j = self.meter.total_j()

        def so_far() -> tuple[float | None, float]:
            now_j = self.meter.total_j()
            joules = None if now_j is None or live_j is None or base_j is None else base_j + now_j - live_j
            return joules, base_s + time.monotonic() - started

        try:
            for metric in trainer.steps():
                joules, seconds = so_far()
                metric = replace(metric, train_energy_j=joules, elapsed_s=seconds)
                if trainer.step % s.train.log_steps == 0 or trainer.step == trainer.total_steps:
                    self.recorder.step(metric)
                self._show(trainer, metric)
                if self._is_due(trainer):
                    self._validate(trainer, best, metric.epoch, metric.energy_ratio)
                if trainer.step % s.train.save_steps == 0 or trainer.step == trainer.total_steps:
                    self._save(trainer, best, so_far())
                self.recorder.check()
                if best.exhausted:
                    self.progress.note(f"no improvement in {best.patience} evaluations: stopped early")
                    break
        except Interrupted:
            self._save(trainer, best, so_far())
            raise
        window = self.meter.cut(edge, self.meter.edge(), name="training", phase="training")
        self.recorder.window(window)
        run.train_energy_j = None if window.energy_j is None or base_j is None else base_j + window.energy_j
        run.train_time_s = so_far()[1]
        run.steps = trainer.step
        if best.state is not None and best.step != trainer.step:
            self.progress.note(f"taking the best evaluation, step {best.step}")
            tuner.load(best.state)

    def _is_due(self, trainer: Trainer) -> bool:
        """Whether this step ends with an evaluation."""
        return trainer.step % self.settings.train.eval_steps == 0 or trainer.step == trainer.total_steps

    def _continue_from_checkpoint(self, trainer: Trainer, best: _Best) -> tuple[float | None, float]:
        """Restore the newest whole checkpoint, if any: joules and seconds spent before it."""
        found, warnings = latest_checkpoint(self._checkpoints)
        for warning in warnings:
            self.progress.note(warning)
        if found is None:
            self.recorder.truncate_steps(-1)
            return (None if self.meter.kind == "none" else 0.0), 0.0
        trainer.restore(found.step, found.tensors, found.state)
        best.restore(found.tensors, found.state)
        self.recorder.truncate_steps(found.step)
        self.progress.note(f"resumed at step {found.step} of {trainer.total_steps}")
        return found.state["train_energy_j"], found.state["train_time_s"]

    def _save(self, trainer: Trainer, best: _Best, spent: tuple[float | None, float]) -> None:
        tensors, state = trainer.state()
        state = {**state, **best.as_state(), "train_energy_j": spent[0], "train_time_s": spent[1]}
        save_checkpoint(self._checkpoints, trainer.step, {**tensors, **best.tensors()}, state)
        prune_checkpoints(self._checkpoints, self.settings.train.keep_checkpoints)
        self.recorder.commit()

    def _validate(self, trainer: Trainer, best: _Best, epoch: float, ratio: float | None) -> None:
        """Answer likelihood (and ROUGE where asked for) of the validation split, by the hard gates."""
        rows = self.data.validation
        generator = Generator(self.backbone, trainer.tuner.spectral, None)
        self.backbone.model.train(False)
        nll = tokens = 0.0
        for done, row in enumerate(rows, 1):
            self.recorder.check()
            nll += generator.answer_nll([row])[0]
            tokens += len(row.answer_ids)
            self.progress.advance("validating", done, len(rows), {"nll": nll / tokens})
        rouge = self._validation_rouge(generator, rows[: self.settings.train.early_stop_samples])
        self.backbone.model.train(self.settings.train.gradient_checkpointing)
        self.recorder.step(
            StepMetric(
                step=trainer.step,
                split="validation",
                epoch=epoch,
                loss=nll / tokens,
                task_loss=nll / tokens,
                energy_ratio=ratio,
                rouge_lsum=rouge,
            )
        )
        # Repair mends a small excess, not a large one; before the first step the energy is not known.
        within = trainer.budget is None or (ratio is not None and ratio <= 1.2)
        best.offer(trainer, nll / tokens if rouge is None else -rouge, within=within)

    def _validation_rouge(self, generator: Generator, rows: Sequence[Encoded]) -> float | None:
        if not rows or self.data.labels:
            return None
        scorer, total = RougeScorer(), 0.0
        for row in rows:
            self.recorder.check()
            s = self.settings.generation
            ids = generator.generate([row], new_tokens=s.new_tokens, num_beams=s.num_beams).new_ids[0]
            total += scorer.score(row.reference, generator.text(ids)).rouge_lsum
        return total / len(rows)

    def _show(self, trainer: Trainer, metric: StepMetric) -> None:
        self.progress.advance(
            "training",
            trainer.step,
            trainer.total_steps,
            {
                "loss": metric.task_loss,
                "E/Emax": metric.energy_ratio,
                "lambda": metric.multiplier,
                f"J {self.meter.kind}": metric.train_energy_j,
                "tokens/s": metric.tokens_per_s,
            },
        )

    def _evaluate(self, generator: Generator, model: EnergyModel | None) -> None:
        split = "test" if self.recorder.run.command == "train" else "validation"
        result = evaluate(
            generator,
            self.data.test if split == "test" else self.data.validation,
            self.settings.generation,
            self.meter,
            split=split,
            labels=self.data.labels,
            model=model,
            progress=self.progress,
            check=self.recorder.check,
        )
        record_evaluation(result, self.recorder)

    @property
    def _checkpoints(self) -> Any:
        return self.recorder.folder.path / "checkpoints"


class _Best:
    """The best evaluation so far, its tensors, and how long none was better."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.state: dict[str, Tensor] | None = None
        self.step = 0
        self.judged_step = -1
        self._score: float | None = None
        self._stale = 0

    @property
    def exhausted(self) -> bool:
        return self._stale >= self.patience

    def offer(self, trainer: Trainer, score: float, *, within: bool) -> None:
        """Lower is better; a step over its budget cannot be the best."""
        self.judged_step = trainer.step
        if not within:
            return
        if self._score is None or score < self._score:
            self._score, self._stale, self.step = score, 0, trainer.step
            self.state = trainer.tuner.state()
        else:
            self._stale += 1

    def tensors(self) -> dict[str, Tensor]:
        return {f"best.{name}": tensor for name, tensor in (self.state or {}).items()}

    def as_state(self) -> dict[str, Any]:
        return {
            "best_step": self.step,
            "best_score": self._score,
            "best_stale": self._stale,
            "judged_step": self.judged_step,
        }

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        self.step, self._score, self._stale = state["best_step"], state["best_score"], state["best_stale"]
        self.judged_step = state["judged_step"]
        kept = {k.removeprefix("best."): t for k, t in tensors.items() if k.startswith("best.")}
        self.state = kept or None


def record_evaluation(result: Evaluation, recorder: Recorder) -> None:
    """Append samples, windows and layer use, and the run's summary."""
    for sample in result.samples:
        recorder.sample(sample)
    for window in result.windows:
        recorder.window(window)
    for use in result.layer_use:
        recorder.layer_use(use)
    lines = [json.dumps({"sample_id": i, "text": t}) for i, t in result.texts.items()]
    write_whole(recorder.folder.path / "predictions.jsonl", "\n".join(lines) + "\n")
    recorder.commit()
    run = recorder.run
    run.summary = {**run.summary, **summarise(result.samples)}
    bound = [s for s in result.samples if s.emax_j is not None and s.scope_energy_j is not None]
    if bound:
        over = [s for s in bound if (s.scope_energy_j or 0.0) > (s.emax_j or 0.0)]
        run.over_budget_share = len(over) / len(bound)


def _demand_budget(settings: Settings) -> None:
    if METHODS[settings.method.name].budgeted and not (settings.budget.emax_j or settings.budget.emax_ratio):
        raise HestError(
            f"{settings.method.name} needs a budget", "give --emax-ratio 0.6 or --emax JOULES", Exit.USAGE
        )


def _bytes_needed(settings: Settings, backbone: Backbone) -> int:
    """Checkpoints kept plus one being written: parameters, two Adam moments and the best, in fp32."""
    m = settings.method
    parameters = 2 * backbone.num_layers * backbone.hidden_size * max(m.rank, 4 * m.lora_rank)
    parameters += backbone.num_layers * backbone.hidden_size * m.rank
    return 16 * parameters * (settings.train.keep_checkpoints + 1) + 50_000_000


def _resumable(settings: Settings, store: Store, run_id: str | None) -> Run:
    """The run to go on with: the one named, or the latest of the method. Raises HestError (usage)."""
    store.recover_orphans()  # a killed run says that it is interrupted only once somebody looks
    if run_id is not None:
        old = queries.get_run(store, run_id)
        if old.command != "train" or old.status == "finished":
            raise HestError(
                f"run {old.run_id} cannot be resumed: it is a {old.status} {old.command} run",
                "`hestctl runs list` shows the interrupted ones",
                Exit.USAGE,
            )
        return old
    runs = [
        run
        for status in ("interrupted", "failed")
        for run in queries.list_runs(store, command="train", method=settings.method.name, status=status)
    ]
    if not runs:
        raise HestError(
            f"nothing to resume: no interrupted {settings.method.name} run in {store.db}",
            "leave out --resume to start afresh",
            Exit.USAGE,
        )
    return max(runs, key=lambda run: run.created_at)


def _changes(old: Run, settings: Settings, data: Data | None, *, force: bool) -> list[str]:
    """What is not as the run was started with: settings, or the data that they name, once these are read.

    Raises HestError (usage) that names them, unless forced.
    """
    changed = _changed(old.settings, settings.model_dump(mode="json"))
    if data is not None and old.data_hash != data.identity:
        changed.append(f"the data {data.splits.name}, which hold other samples")
    if changed and not force:
        raise HestError(
            f"run {old.run_id} was started with other settings: {'; '.join(changed)}",
            "give the same settings, or --force to go on with the new ones",
            Exit.USAGE,
        )
    return changed


_NO_MATTER = ("db", "profile.", "search.")
"""Settings that play no part in a training run."""


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    out: list[str] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            out += _changed(before, after, f"{prefix}{key}.")
        elif before != after and not (prefix + key).startswith(_NO_MATTER):
            out.append(f"{prefix}{key} was {before}, now {after}")
    return out
