"""``train``: articles in, a hardened and evaluated adapter out, everything recorded on the way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hestctl.budget import Budget
from hestctl.data.prompts import Encoded
from hestctl.energy.meter import Meter
from hestctl.energy.model import EnergyModel
from hestctl.energy.table import EnergyTable
from hestctl.errors import Exit, HestError, Interrupted
from hestctl.generation.engine import Generator
from hestctl.generation.engines import Engine, EngineKind
from hestctl.generation.evaluate import Evaluation, evaluate
from hestctl.generation.quality import RougeScorer
from hestctl.model.backbone import Backbone, load_backbone
from hestctl.model.methods import METHODS, Tuner
from hestctl.model.sensitivity import Sensitivities
from hestctl.progress import Progress
from hestctl.records import BlockStates, Run, StepMetric
from hestctl.runs import Recorder, new_run_id, recording, resume
from hestctl.settings import Settings
from hestctl.store import queries
from hestctl.store.files import ensure_space, write_whole
from hestctl.store.store import Store
from hestctl.training.account import SPENT_FILE, Account, JoulesUnknown, demand_live_counter
from hestctl.training.best import Best
from hestctl.training.checkpoint import (
    latest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    save_tensors,
)
from hestctl.training.loop import Trainer
from hestctl.training.ranks import JointMeter, RankFailed, Ranks
from hestctl.workflows.blocks import deciding, sensitivities_of
from hestctl.workflows.engines import chosen_engine, in_blocks, record_engine, with_kernels
from hestctl.workflows.follow import Inputs, identity, trainer_for
from hestctl.workflows.metering import energy_table, open_meter
from hestctl.workflows.resuming import Resume, changes, resumable
from hestctl.workflows.setup import (
    ADAPTER_FILE,
    SPLITS,
    Data,
    bound_of,
    budget_of,
    check_reference,
    decides_blocks,
    describe,
    harden_into,
    load_data,
    new_tuner,
    read_inputs,
)
from hestctl.workflows.summary import summarise


@dataclass(frozen=True, slots=True)
class Part:
    """The search that a training belongs to, and what all of its trainings work on.

    ``trials`` is None for a trial, which generates the validation split; for the training of the best
    settings it is how many were tried. LoRA is taken off ``backbone`` after each.
    """

    search_id: str
    backbone: Backbone
    data: Data
    trials: int | None = None

    def mark(self, run: Run) -> Run:
        """The row of the search's trial, or of its best settings."""
        if self.trials is not None:
            summary = {**run.summary, "search_trials": self.trials}
            return replace(run, parent_run_id=self.search_id, summary=summary)
        run_id = new_run_id("trial", run.method)
        return replace(run, run_id=run_id, command="trial", parent_run_id=self.search_id)


def train(
    settings: Settings,
    store: Store,
    progress: Progress,
    *,
    resuming: Resume | None = None,
    part: Part | None = None,
    ranks: Ranks | None = None,
) -> Run:
    """Train one method, harden it, generate the test split under the meter, and record it all.

    ``part``: within a search, on the backbone and data that it has loaded. ``ranks``: the processes that
    share the training; the others call ``workflows.follow``.
    Raises HestError; whatever was finished before stays in the run's folder and in the store.
    """
    ranks = ranks or Ranks()
    old = None if resuming is None else resumable(settings, store, resuming.run_id)
    _demand_budget(settings)
    if old is not None and resuming is not None:
        changes(old, settings, None, force=resuming.force)  # what is refused should not wait
    if part is None:
        backbone, data = load_inputs(settings, store, progress)
    else:
        backbone, data = part.backbone, part.data
    trained = METHODS[settings.method.name].trained
    if trained:
        ranks.share(None)  # what was downloaded now lies on the disk for all
    engine = chosen_engine(settings, backbone, progress)
    changed: list[str] = []
    if old is not None and resuming is not None:
        changed = changes(old, settings, data, force=resuming.force)
    ensure_space(store.root, _bytes_needed(settings, backbone))
    with open_meter(settings.energy, backbone.device, store, progress) as meter:
        if trained:
            ranks.meet(meter, identity(settings, data.splits, backbone))
        if settings.train.max_energy_j is not None and trained:
            demand_live_counter(JointMeter(meter, ranks))
        run = describe(settings, backbone, meter, data)
        check_reference(settings, store, run)
        if part is not None:
            run = part.mark(run)
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
                _Work(
                    settings, store, backbone, data, meter, recorder, progress, engine, ranks, resumed
                ).run_all()
        except Interrupted as error:
            if part is None:
                error.hint = f"{error.hint}; the same command with --resume goes on"
            raise
    return recorder.run


def load_inputs(settings: Settings, store: Store, progress: Progress) -> tuple[Backbone, Data]:
    """The backbone, and what of the data the method needs. Raises HestError as both loaders do."""
    splits = read_inputs(settings, store)
    backbone = load_backbone(settings.backbone, progress=progress.note)
    # base trains on nothing: encoding a large training split would take it minutes.
    needed = SPLITS if METHODS[settings.method.name].trained else ("validation", "test")
    return backbone, load_data(settings, splits, backbone, progress, needed=needed)


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
    engine: EngineKind
    ranks: Ranks
    resumed: Run | None
    """The run as it was interrupted, where this one goes on with its very settings."""
    saved: tuple[int, int] | None = None
    """Step and latest evaluation of the newest checkpoint."""

    def run_all(self) -> None:
        s, backbone = self.settings, self.backbone
        table = energy_table(
            s, backbone, self.meter, self.store, self.recorder, self.progress, resumed=self.resumed
        )
        budget = None
        if METHODS[s.method.name].budgeted:
            budget = budget_of(
                s, self.store, self.recorder, backbone, self.data, table, self.progress, self.resumed
            )
        self.recorder.commit()  # what a resumed run keeps must be there before the first checkpoint
        known = None
        if decides_blocks(s):
            known = sensitivities_of(
                s,
                backbone,
                self.data.splits,
                self.store,
                self.recorder,
                self.progress,
                resumed=self.resumed,
            )
        tuner = new_tuner(s, self.backbone, table.states, s.train.seed)
        try:
            self._tune(tuner, table, budget, known)
        finally:
            tuner.discard()

    def _tune(
        self, tuner: Tuner, table: EnergyTable, budget: Budget | None, known: Sensitivities | None
    ) -> None:
        """All that is done with the trained parts: training, hardening, evaluation."""
        s, run, backbone = self.settings, self.recorder.run, self.backbone
        counts = tuner.counts()
        run.controller_parameters = counts.controller + counts.thresholds
        run.adapter_parameters = counts.adapter
        trained = None
        if METHODS[s.method.name].trained:
            trained = self._train(tuner, table, budget, known)
            save_tensors(self.recorder.folder.path / ADAPTER_FILE, tuner.state(), {"run": run.run_id})
        blocks = deciding(s, backbone, tuner, known, trained)
        plan = harden_into(self.recorder, s, backbone, tuner, self.data, table, budget, self.progress, blocks)
        states = blocks.fixed if plan is None else plan.blocks
        kind = with_kernels(self.engine, table)
        kind = in_blocks(kind, self.store, backbone, tuner, states, write=True)
        tuner.finish()
        engine = kind.make(self.backbone, tuner.spectral, plan)
        record_engine(run, kind, engine)
        self._evaluate(engine, table.model)
        if budget is not None:
            self._against_reference(budget)

    def _train(
        self, tuner: Tuner, table: EnergyTable, budget: Budget | None, known: Sensitivities | None
    ) -> BlockStates:
        """Train; the states that the blocks were trained in at last."""
        s, run, ranks = self.settings, self.recorder.run, self.ranks
        prompts = [len(row.prompt_ids) for row in self.data.validation]
        given = ranks.told(Inputs(table, budget, known, prompts, bound_of(s, self.data)))
        trainer = trainer_for(s, self.backbone, tuner, self.data.train, given, ranks)
        best = Best(patience=s.train.patience)
        meter = JointMeter(self.meter, ranks)
        account = Account(meter, self.recorder.folder.path / SPENT_FILE, s.train.max_energy_j)
        restored = self._continue_from_checkpoint(trainer, best, account)
        account.check()
        try:
            if not restored:
                trainer.start()
            if ranks.world > 1:
                ranks.told((trainer.step, *trainer.state()))
            stopped = self._run_steps(trainer, best, account)
            self._close(account)
        except (Interrupted, JoulesUnknown, RankFailed):
            self._save(trainer, best, account)
            raise
        finally:
            account.leave()
            run.train_energy_j, run.train_time_s = account.joules, account.seconds
            run.steps = trainer.step
        self._tell(trainer, best, account, stopped)
        if best.state is not None and best.step != trainer.step:
            self.progress.note(f"taking the best evaluation, step {best.step}")
            tuner.load(best.state)
        assert trainer.blocks is not None
        return trainer.blocks.decided()

    def _close(self, account: Account) -> None:
        """End training on all ranks: every rank's window is recorded, every device counted once."""
        ranks = self.ranks
        ranks.share(False)
        windows = ranks.finish(None)
        counted = {rank for rank, _ in ranks.devices()}
        others = [w for rank, w in enumerate(windows) if w is not None and rank in counted]
        self.recorder.window(account.close(others))
        for window in windows:
            if window is not None:
                self.recorder.window(window)
        if ranks.world > 1:
            run = self.recorder.run
            run.summary = {**run.summary, "training_devices": ranks.uuids}

    def _run_steps(self, trainer: Trainer, best: Best, account: Account) -> str:
        """Train until something stops it, and say what; the state it stops in is judged and saved."""
        s = self.settings.train
        account.book()
        if best.judged_step < trainer.step and self._is_due(trainer):
            self._validate(trainer, best, account)
        steps = trainer.steps()
        while (stopped := _why_stop(trainer, best, account)) is None:
            self.ranks.share(True)
            if trainer.settle():
                account.book()  # once in a training, and no step's price
            metric = next(steps)
            account.book("step")
            metric = replace(metric, train_energy_j=account.joules, elapsed_s=account.seconds)
            best.ratio = metric.energy_ratio
            if trainer.step % s.log_steps == 0 or trainer.step == trainer.total_steps:
                self.recorder.step(metric)
            self._show(trainer, metric)
            account.check()
            if self._is_due(trainer):
                self._validate(trainer, best, account)
            if trainer.step % s.save_steps == 0:
                self._save(trainer, best, account)
            if self.ranks.stop_signal is not None and self.recorder.stop_requested is None:
                self.recorder.request_stop(self.ranks.stop_signal)
            self.recorder.check()
        if best.judged_step < trainer.step:  # else training up to here would count for nothing
            self._validate(trainer, best, account)
        self._save(trainer, best, account)
        return stopped

    def _tell(self, trainer: Trainer, best: Best, account: Account, stopped: str) -> None:
        """Why training stopped, and what became of its budget: to the user, and into the run."""
        if stopped == PATIENCE:
            self.progress.note(f"no improvement in {best.patience} evaluations: stopped early")
        if stopped == MAX_JOULES or account.overshoot_j:
            self.progress.note(account.told(f"step {trainer.step} of {trainer.total_steps}"))
        elif account.unread is not None and self.meter.kind != "none":
            self.progress.note(f"what training has spent is not known: {account.unread}")
        summary: dict[str, Any] = {"training_stopped": stopped, "warmup_steps": trainer.warmup_steps}
        told = None if trainer.blocks is None else trainer.blocks.settlement
        if told is not None:
            summary["settlement"] = asdict(told)
            moved = told.settled_over_emax / told.decided_over_emax - 1
            flag = f" (flag: by {100 * moved:+.0f} %, train longer to need less)" if abs(moved) > 0.1 else ""
            self.progress.note(
                f"blocks settled after step {told.step}: the gates decided {told.decided_over_emax:.3f} of "
                f"E_max, repair made it {told.settled_over_emax:.3f}{flag}, both predicted; {told.swaps} "
                f"swaps took the loss from {told.loss_before:.3f} to {told.loss:.3f} nats a token"
            )
        if account.unread is not None:
            summary["training_unread"] = account.unread
        if account.budget_j is not None:
            summary["training_budget_j"] = account.budget_j
            summary["training_overshoot_j"] = account.overshoot_j
        self.recorder.run.summary = {**self.recorder.run.summary, **summary}

    def _is_due(self, trainer: Trainer) -> bool:
        """Whether this step ends with an evaluation."""
        return trainer.step % self.settings.train.eval_steps == 0 or trainer.step == trainer.total_steps

    def _continue_from_checkpoint(self, trainer: Trainer, best: Best, account: Account) -> bool:
        """Restore the newest whole checkpoint, and what earlier attempts spent; whether there was one."""
        found, warnings = latest_checkpoint(self._checkpoints)
        for warning in warnings:
            self.progress.note(warning)
        if found is None:
            self.recorder.truncate_steps(-1)
        else:
            trainer.restore(found.step, found.tensors, found.state)
            best.restore(found.tensors, found.state)
            self.saved = found.step, best.judged_step
            self.recorder.truncate_steps(found.step)
            self.progress.note(f"resumed at step {found.step} of {trainer.total_steps}")
        earlier = account.go_on(None if found is None else found.state["spent"])
        if earlier is not None:
            self.progress.note(earlier)
        return found is not None

    def _save(self, trainer: Trainer, best: Best, account: Account) -> None:
        now = trainer.step, best.judged_step
        if now == self.saved:
            return
        tensors, state = trainer.state()
        state = {**state, **best.as_state(), "spent": account.as_state()}
        save_checkpoint(self._checkpoints, trainer.step, {**tensors, **best.tensors()}, state)
        self.saved = now
        prune_checkpoints(self._checkpoints, self.settings.train.keep_checkpoints)
        self.recorder.commit()
        account.book("checkpoint")

    def _validate(self, trainer: Trainer, best: Best, account: Account) -> None:
        """Answer likelihood (and ROUGE where asked for) of the validation split, by the hard gates."""
        rows, model = self.data.validation, self.backbone.model
        blocks = None if trainer.blocks is None else trainer.blocks.decided()
        generator = Generator(self.backbone, trainer.tuner.spectral, None, blocks)
        training = model.training
        model.train(False)
        nll = tokens = 0.0
        for done, row in enumerate(rows, 1):
            self.recorder.check()
            nll += generator.answer_nll([row])[0]
            tokens += len(row.answer_ids)
            self.progress.advance("validating", done, len(rows), {"nll": nll / tokens})
        rouge = self._validation_rouge(generator, rows[: self.settings.train.early_stop_samples])
        model.train(training)
        self.recorder.step(
            StepMetric(
                step=trainer.step,
                split="validation",
                epoch=trainer.epoch,
                loss=nll / tokens,
                task_loss=nll / tokens,
                energy_ratio=best.ratio,
                rouge_lsum=rouge,
            )
        )
        # Repair mends a small excess, not a large one; before the first step the energy is not known.
        within = trainer.budget is None or (best.ratio is not None and best.ratio <= 1.2)
        if trainer.blocks is not None and trainer.blocks.learning:
            within = False  # the blocks that it would be judged by are not settled
        best.offer(trainer, nll / tokens if rouge is None else -rouge, within=within)
        account.book("evaluation")

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

    def _evaluate(self, generator: Engine, model: EnergyModel | None) -> None:
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

    def _against_reference(self, budget: Budget) -> None:
        """A matched envelope allows longer answers more joules: whether the mean keeps the ratio as well."""
        run = self.recorder.run
        if budget.reference is None or budget.ratio is None:
            return
        theirs = queries.get_run(self.store, budget.reference).summary
        mine, other = (s.get("scope_energy_j_per_sample") for s in (run.summary, theirs))
        if run.command != "train" or mine is None or not other:
            return
        run.summary = {**run.summary, "scope_energy_over_reference": mine / other}
        held = "within" if mine <= budget.ratio * other else "NOT within"
        lengths = (
            f"{run.summary['new_tokens_per_sample']:.1f} new tokens against "
            f"{theirs['new_tokens_per_sample']:.1f}"
        )
        if self.data.labels:
            lengths = "labels are scored, no new tokens"
        self.progress.note(
            f"the mean sample takes {mine / other:.3f} of the tabs run's in scope {run.scope} (predicted), "
            f"{held} {budget.ratio:g}: {lengths}"
        )

    @property
    def _checkpoints(self) -> Any:
        return self.recorder.folder.path / "checkpoints"


ALL_STEPS, PATIENCE, MAX_JOULES = "all steps", "patience", "max_train_joules"


def _why_stop(trainer: Trainer, best: Best, account: Account) -> str | None:
    """What ends training before its next step, if anything. Raises JoulesUnknown."""
    if trainer.step == trainer.total_steps:
        return ALL_STEPS
    if best.exhausted:
        return PATIENCE
    return None if account.affords_step() else MAX_JOULES


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
    """Checkpoints kept plus one being written, each parameters, two Adam moments and the best in fp32, and
    the int8 codes of all blocks."""
    m = settings.method
    parameters = 2 * backbone.num_layers * backbone.hidden_size * max(m.rank, 4 * m.lora_rank)
    parameters += backbone.num_layers * backbone.hidden_size * m.rank
    checkpoints = 16 * parameters * (settings.train.keep_checkpoints + 1)
    layers = sum(p.numel() for p in backbone.layers.parameters())
    codes = layers if settings.method.scope == "network" and not METHODS[m.name].lora else 0
    return checkpoints + codes + 50_000_000
