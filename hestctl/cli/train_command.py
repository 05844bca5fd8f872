"""``hestctl train``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from hestctl.cli import options as o

if TYPE_CHECKING:
    from hestctl.records import Run
    from hestctl.settings import Resolved


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(train)


def train(
    method: Annotated[
        str | None, typer.Option(help=r"hest, tabs, bhsp, lora or base. \[default: hest]")
    ] = None,
    emax_ratio: o.EmaxRatioOption = None,
    emax: o.EmaxOption = None,
    reference: o.ReferenceOption = None,
    scope: Annotated[
        str | None, typer.Option(help="What a budget covers: network (whole generations) or adapter.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="mixed, or fp16-only (no int8 state).")] = None,
    dual: Annotated[
        str | None, typer.Option(help="Multiplier: pi, clamp, plain, or none (a fixed soft penalty).")
    ] = None,
    controller: Annotated[str | None, typer.Option(help="factorised or unfactorised.")] = None,
    profile: o.ProfileOption = "quickstart",
    db: o.DbOption = None,
    backbone: o.BackboneOption = None,
    weights: o.WeightsOption = None,
    data: o.DataOption = None,
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = None,
    backbone_precision: o.BackbonePrecisionOption = None,
    engine: o.EngineOption = None,
    meter: o.MeterOption = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training split.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps at most.")] = None,
    max_train_joules: Annotated[
        float | None,
        typer.Option(help="Joules that training may spend by the live meter, over all restarts."),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of adapters.")] = None,
    gate_lr: Annotated[float | None, typer.Option(help="Peak learning rate of controller and gates.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a micro-batch.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Micro-batches an optimiser step.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Prompt and answer together, at most.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Generated tokens a sample, at most.")] = None,
    num_beams: Annotated[int | None, typer.Option(help="Beams in generation; 1 is greedy.")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="Recompute activations to save memory.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of initialisation, data order and gate noise.")
    ] = None,
    trial: Annotated[
        bool, typer.Option("--trial", help="One epoch over two batches: does it run at all?")
    ] = False,
    trials: Annotated[
        int | None,
        typer.Option(help="Search with Optuna first: this many trials of all workers, then the best again."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes of this machine that try them, by predicted joules.")
    ] = None,
    join: Annotated[
        str | None,
        typer.Option("--join", metavar="RUN", help="Work on this running search, from any terminal."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the latest interrupted run, or with --trials search, of this method."
        ),
    ] = False,
    run: o.RunOption = None,
    force: Annotated[bool, typer.Option("--force", help="Resume although settings differ.")] = False,
    set_: o.SetOption = None,
    dry_run: o.DryRunOption = False,
    quiet: o.QuietOption = False,
    json: o.JsonOption = False,
) -> None:
    """Train one method, harden it, and generate the test split under the meter.

    hest trains within a budget: E_max = --emax-ratio x the joules of the latest comparable tabs run
    (or a prediction, marked so), or --emax JOULES.

    In several processes: accelerate launch --multi_gpu --num_processes N -m hestctl train ...

    --trials searches: hest for the fewest joules at the tabs run's ROUGE or better, other methods for the
    highest ROUGE; accuracy where data have labels. Methods compare fairly with equally many trials each.
    """
    from hestctl.cli import out
    from hestctl.cli.run_ids import LATEST, full_id, with_reference
    from hestctl.cli.settings_view import show_settings
    from hestctl.errors import Exit, HestError
    from hestctl.settings import with_values
    from hestctl.store.store import Store
    from hestctl.workflows.preview import capped, preview

    resolved = o.resolve(
        profile,
        set_,
        method__name=method,
        budget__emax_ratio=emax_ratio,
        budget__emax_j=emax,
        budget__reference=reference,
        method__scope=scope,
        method__precision=precision,
        budget__dual=dual,
        method__controller=controller,
        db=db,
        backbone__name=backbone,
        backbone__weights=weights,
        data__source=data,
        backbone__device=device,
        backbone__dtype=dtype,
        backbone__precision=backbone_precision,
        generation__engine=engine,
        energy__meter=meter,
        train__epochs=epochs,
        train__max_steps=max_steps,
        train__max_energy_j=max_train_joules,
        train__learning_rate=lr,
        train__gate_learning_rate=gate_lr,
        train__batch_size=batch_size,
        train__accumulation=accumulation,
        data__max_tokens=max_tokens,
        generation__new_tokens=new_tokens,
        generation__num_beams=num_beams,
        train__gradient_checkpointing=gradient_checkpointing,
        train__seed=seed,
        search__trials=trials,
        search__workers=workers,
    )
    if join is not None:
        _join(join, resolved, resume=resume, quiet=quiet, json=json)
        return
    store = Store(resolved.settings.db)
    resolved = with_reference(resolved, store)
    settings = resolved.settings
    if trial:
        settings = with_values(settings, TRIAL)
    if dry_run:
        left_out = None if trial else capped(settings, resolved.origins)
        show_settings(resolved, settings, json=json, seen=preview(settings, store))
        if left_out is not None:
            out.note(left_out)
        return
    from hestctl.model.methods import METHODS

    name = settings.method.name
    if (emax_ratio is not None or emax is not None) and not METHODS[name].budgeted:
        raise HestError(
            f"{name} has no budget: --emax-ratio and --emax bind hest alone", "leave them out", Exit.USAGE
        )
    if max_train_joules is not None and not METHODS[name].trained:
        raise HestError(
            f"{name} is not trained: --max-train-joules bounds nothing", "leave it out", Exit.USAGE
        )
    if run is not None and not resume:
        raise HestError("--run names a run to go on with", "add --resume", Exit.USAGE)
    searching = settings.search.trials > 0 and not trial
    if workers is not None and not searching:
        raise HestError("--workers share the trials of a search", "add --trials 20", Exit.USAGE)
    from hestctl.training.ranks import joined, launched, launched_alone
    from hestctl.workflows.follow import follow
    from hestctl.workflows.resuming import Resume

    if searching and launched():
        raise HestError(
            "a search does not divide its trainings over processes", "leave out --trials", Exit.USAGE
        )

    if run == LATEST:
        run = None
    elif run is not None:
        run = full_id(store, run, commands=("search" if searching else "train",))
    resuming = Resume(run, force) if resume else None
    with (
        joined(settings.backbone.device, settings.train.rank_timeout_s) as ranks,
        out.reporting(quiet or not ranks.first) as progress,
    ):
        if not ranks.first:
            follow(settings, ranks, progress)
            return
        left_out = None if trial else capped(settings, resolved.origins)
        if left_out is not None:
            progress.note(left_out)
        if launched_alone():
            progress.note(f"accelerate launch --cpu started one process; for several: {LAUNCH} --device cpu")
        if searching:
            from hestctl.workflows.search import search

            done = search(settings, store, progress, resuming=resuming)
        else:
            from hestctl.workflows.train import train

            done = train(settings, store, progress, resuming=resuming, ranks=ranks)
    if json:
        out.document(as_json(done))
    else:
        show(done, settings.db)


def _join(search_id: str, resolved: Resolved, *, resume: bool, quiet: bool, json: bool) -> None:
    """Work on a search. Raises HestError (usage) where settings are given, which are the search's own."""
    from hestctl.cli import out
    from hestctl.cli.run_ids import full_id
    from hestctl.errors import Exit, HestError
    from hestctl.store.store import Store

    given = [key for key, origin in resolved.origins.items() if origin == "flag" and key != "db"]
    if given or resume:
        raise HestError(
            f"--join takes all settings from the search, not {', '.join(given or ['--resume'])}",
            "give --db alone, where the store is elsewhere",
            Exit.USAGE,
        )
    from hestctl.workflows.search import join

    store = Store(resolved.settings.db)
    search_id = full_id(store, search_id, commands=("search",), status="started")
    with out.reporting(quiet) as progress:
        done = join(search_id, store, progress)
    if json:
        out.document({"search_run_id": search_id, "trials": done})
    else:
        out.text(f"{done} trials of {search_id} were done here")


LAUNCH = "accelerate launch --multi_gpu --num_processes N -m hestctl train"

TRIAL = {
    "train.epochs": 1,
    "train.max_steps": 2,
    "data.train_samples": 4,
    "data.validation_samples": 2,
    "data.test_samples": 2,
    "train.batch_size": 2,
    "train.accumulation": 1,
    "train.early_stop_samples": 0,
    "search.trials": 0,
}
"""``--trial``: one epoch of two batches, no search."""


def as_json(run: Run) -> dict[str, Any]:
    """The run's outcome, units in the keys; null is "not measured"."""
    s = dict(run.summary)
    if run.weights == "random":
        s |= dict.fromkeys((*_ROUGE, "accuracy", "nll_per_token"))
    accuracy, chance = s.get("accuracy"), s.get("chance")
    return {
        "run_id": run.run_id,
        "status": run.status,
        "method": run.method,
        "scope": run.scope,
        "backbone": run.backbone,
        "weights": run.weights,
        "dataset": run.dataset,
        "samples": s.get("samples"),
        "rouge_lsum": s.get("rouge_lsum"),
        "rouge_l": s.get("rouge_l"),
        "rouge1": s.get("rouge1"),
        "rouge2": s.get("rouge2"),
        "accuracy_percent": None if accuracy is None else 100 * accuracy,
        "chance_percent": None if chance is None else 100 * chance,
        "nll_per_token_nats": s.get("nll_per_token"),
        "energy_kind": run.energy_kind,
        "energy_j_per_sample": s.get("energy_j_per_sample"),
        "energy_error_j_per_sample": s.get("energy_error_j_per_sample"),
        "scope_energy_j_per_sample": s.get("scope_energy_j_per_sample"),
        "scope_energy_kind": "predicted",
        "emax_j": run.emax_j,
        "emax_origin": run.emax_origin,
        "hardened_over_emax": run.hardened_ratio,
        "over_budget_share": run.over_budget_share,
        "new_tokens_per_sample": s.get("new_tokens_per_sample"),
        "latency_p50_s": s.get("latency_p50_s"),
        "latency_p99_s": s.get("latency_p99_s"),
        "controller_parameters": run.controller_parameters,
        "adapter_parameters": run.adapter_parameters,
        "train_energy_j": run.train_energy_j,
        "train_time_s": run.train_time_s,
        "train_steps": run.steps,
        "training_stopped": s.get("training_stopped"),
        "training_budget_j": s.get("training_budget_j"),
        "training_overshoot_j": s.get("training_overshoot_j"),
    }


def show(run: Run, db: object) -> None:
    """The run's outcome for a reader."""
    from hestctl.cli import out
    from hestctl.cli.figures_text import joules, number, seconds

    s, kind = run.summary, run.energy_kind or "none"
    rows = [("ROUGE-Lsum / L / 1 / 2", " / ".join(number(s.get(k), 1) for k in _ROUGE))]
    written = [("new tokens a sample", number(s.get("new_tokens_per_sample"), 1))]
    if s.get("accuracy") is not None:
        written = []  # labels are scored
        chance = "" if s.get("chance") is None else f" (chance level {number(100 * s['chance'], 1)} %)"
        rows = [("accuracy", f"{number(100 * s['accuracy'], 1)} %{chance}")]
    rows.append(("answer likelihood", number(s.get("nll_per_token"), 3) + " nats a token"))
    if run.weights == "random":
        rows = [("quality", "not measured: random weights say nothing of it")]
    rows += [
        ("energy a sample", joules(s.get("energy_j_per_sample"), kind)),
        *written,
        ("latency p50 / p99", f"{seconds(s.get('latency_p50_s'))} / {seconds(s.get('latency_p99_s'))}"),
        ("training", joules(run.train_energy_j, kind)),
        (
            "parameters",
            f"{run.controller_parameters or 0:,} controller, {run.adapter_parameters or 0:,} adapter",
        ),
    ]
    if s.get("training_budget_j") is not None:
        over_j = s["training_overshoot_j"]
        over = f", overshot by {joules(over_j, kind)}" if over_j else ""
        told = f"{joules(s['training_budget_j'], kind)}{over}; training ended: {s['training_stopped']}"
        rows.append(("training budget", told))
    if run.emax_j is not None:
        rows += [
            ("budget E_max", f"{joules(run.emax_j, 'predicted')} a sample in scope {run.scope}"),
            ("E_max is", str(run.emax_origin)),
            (
                "spent of it",
                f"{joules(s.get('scope_energy_j_per_sample'), 'predicted')} from the logged states",
            ),
            ("over budget", f"{100 * (run.over_budget_share or 0):.0f} % of {s.get('samples')} samples"),
        ]
    out.table(f"{run.run_id}: {run.method} on {run.dataset}", ("figure", "value"), rows, left=2)
    out.text(f"next: hestctl compare --db {db}")


_ROUGE = ("rouge_lsum", "rouge_l", "rouge1", "rouge2")
