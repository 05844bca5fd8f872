"""``hestctl profile``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hestctl.cli import options as o

if TYPE_CHECKING:
    from hestctl.workflows.profile import Profiled


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(profile)


def profile(
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", help="Longest prompt, tokens; shorter ones are swept too.")
    ] = None,
    batch_size: Annotated[str | None, typer.Option("--batch-size", help="Such as 1 or 1,4.")] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="Tokens generated from each prompt, exactly.")
    ] = None,
    num_beams: Annotated[int | None, typer.Option(help="Beams; 1 is greedy.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Samples a length, each from another article.")] = None,
    precision: Annotated[
        float | None,
        typer.Option(
            "--precision",
            help="Generate each sample again until its joules are known so well. "
            r"\[default: 0.05; an estimate has no bound and runs once]",
        ),
    ] = None,
    run: o.RunOption = None,
    profile: o.ProfileOption = "quickstart",
    db: o.DbOption = None,
    backbone: o.BackboneOption = None,
    weights: o.WeightsOption = None,
    data: o.DataOption = None,
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = None,
    meter: o.MeterOption = None,
    set_: o.SetOption = None,
    quiet: o.QuietOption = False,
    json: o.JsonOption = False,
) -> None:
    """Joules and latency over prompt lengths, of the latest hardened run or the one that --run names.

    Where the store has no hardened run, the bare backbone is profiled, and that is said.
    """
    from hestctl.cli import out
    from hestctl.settings import of_run
    from hestctl.store.store import Store
    from hestctl.workflows.profile import profile as work
    from hestctl.workflows.profile import profiled_run

    resolved = o.resolve(
        profile,
        set_,
        profile__seq_len=seq_len,
        profile__batch_sizes=batch_size,
        profile__new_tokens=new_tokens,
        generation__num_beams=num_beams,
        profile__repeats=repeats,
        profile__precision=precision,
        db=db,
        backbone__name=backbone,
        backbone__weights=weights,
        data__source=data,
        backbone__device=device,
        backbone__dtype=dtype,
        energy__meter=meter,
    )
    store = Store(resolved.settings.db)
    hardened = profiled_run(store, run)
    settings = resolved.settings if hardened is None else of_run(resolved, hardened.settings)
    with out.reporting(quiet) as progress:
        if hardened is None:
            progress.note("no hardened run in the store: profiling the bare backbone (base)")
        else:
            progress.note(f"profiling the hardened run {hardened.run_id}")
        done = work(settings, store, progress, hardened=hardened)
    if json:
        out.document(_as_json(done))
    else:
        _show(done)


def _as_json(done: Profiled) -> dict[str, object]:
    run = done.run
    return {
        "run_id": run.run_id,
        "status": run.status,
        "method": run.method,
        "profiled_run_id": run.parent_run_id,
        "device": run.device_name,
        "energy_kind": run.energy_kind,
        "new_tokens_per_sample": run.max_new_tokens,
        "num_beams": run.num_beams,
        "phases": done.phases,
        "prediction": done.prediction,
        "points": [
            {
                "prompt_tokens": p.prompt_tokens,
                "batch_size": p.batch_size,
                "samples": p.samples,
                "replicates": p.replicates,
                "latency_s": p.latency_s,
                "energy_j_per_sample": p.energy_j,
                "energy_error_j_per_sample": p.error_j,
                "prefill_j_per_sample": p.prefill_j,
                "decode_j_per_sample": p.decode_j,
                "phase_method": None if p.prefill_j is None else "apportioned",
                "predicted_j_per_sample": p.predicted_j,
                "scope_energy_j_per_sample": p.scope_energy_j,
                "scope_energy_kind": "predicted",
                "emax_j": p.emax_j,
            }
            for p in done.points
        ],
    }


def _show(done: Profiled) -> None:
    from hestctl.cli import out
    from hestctl.cli.figures_text import number

    kind = done.run.energy_kind
    rows = [
        (
            f"{p.prompt_tokens:,}",
            str(p.batch_size),
            str(p.samples) if p.replicates == 1 else f"{p.samples} x {p.replicates}",
            number(p.latency_s, 2),
            _joules(p.energy_j, p.error_j),
            "-" if p.prefill_j is None or p.decode_j is None else f"{p.prefill_j:.3g} + {p.decode_j:.3g}",
            "-" if p.predicted_j is None else f"{p.predicted_j:.4g}",
            "-" if p.scope_energy_j is None else f"{p.scope_energy_j:.3g}",
            "-" if p.emax_j is None or p.scope_energy_j is None else f"{p.scope_energy_j / p.emax_j:.3f}",
        )
        for p in done.points
    ]
    out.table(
        f"{done.run.run_id}: {done.run.method}, {done.run.max_new_tokens} new tokens, {done.run.device_name}",
        (
            "prompt",
            "batch",
            "n",
            "latency s",
            f"J a sample ({kind})",
            f"prefill + decode J ({kind})",
            "J a sample (predicted)",
            "scope J (predicted)",
            "of E_max",
        ),
        rows,
        left=0,
        caption=f"{done.phases}\n{done.prediction}",
    )


def _joules(joules: float | None, error: float | None) -> str:
    """With the meter's error bound where it has one; an estimate has none that is known."""
    if joules is None:
        return "not measured"
    return f"{joules:.4g} +- {error:.2g}" if error else f"{joules:.4g}"
