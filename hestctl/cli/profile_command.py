"""``hestctl profile``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hestctl.cli import options as o
from hestctl.errors import Exit, HestError

if TYPE_CHECKING:
    from hestctl.settings import Settings
    from hestctl.store.store import Store
    from hestctl.workflows.benchmark import Benchmarked
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
    num_beams: Annotated[
        str | None, typer.Option(help="Beams, such as 1 or, with --method, 1,4; 1 is greedy.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="Benchmark these side by side, such as base,tabs,hest+int8,base+transformers.",
        ),
    ] = None,
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
    backbone_precision: o.BackbonePrecisionOption = None,
    engine: o.EngineOption = None,
    meter: o.MeterOption = None,
    set_: o.SetOption = None,
    quiet: o.QuietOption = False,
    json: o.JsonOption = False,
) -> None:
    """Joules and latency over prompt lengths, of the latest hardened run or the one that --run names.

    Where the store has no hardened run, the bare backbone is profiled, and that is said. With --method,
    methods are measured side by side in turns, trained or not: --weights random needs no download.
    """
    from hestctl.cli import out
    from hestctl.cli.run_ids import full_id
    from hestctl.settings import of_run
    from hestctl.store.store import Store
    from hestctl.workflows.profile import profile as work
    from hestctl.workflows.profile import profiled_run

    beams = o.counts("--num-beams", num_beams)
    if len(beams) > 1 and method is None:
        raise HestError(
            "--num-beams takes one number without --method", "add --method base,tabs,hest", Exit.USAGE
        )
    resolved = o.resolve(
        profile,
        set_,
        profile__seq_len=seq_len,
        profile__batch_sizes=batch_size,
        profile__new_tokens=new_tokens,
        generation__num_beams=beams[0] if beams else None,
        profile__repeats=repeats,
        profile__precision=precision,
        db=db,
        backbone__name=backbone,
        backbone__weights=weights,
        data__source=data,
        backbone__device=device,
        backbone__dtype=dtype,
        backbone__precision=backbone_precision,
        generation__engine=engine,
        energy__meter=meter,
    )
    store = Store(resolved.settings.db)
    if method is not None:
        if run is not None:
            raise HestError("--run and --method exclude each other", "leave one out", Exit.USAGE)
        _benchmark(resolved.settings, store, method, beams, quiet=quiet, json=json)
        return
    named = None if run is None else full_id(store, run, commands=("train", "harden"))
    hardened = profiled_run(store, named)
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


def _benchmark(
    settings: Settings, store: Store, method: str, beams: tuple[int, ...], *, quiet: bool, json: bool
) -> None:
    from hestctl.cli import out
    from hestctl.workflows.benchmark import benchmark, variants_of

    variants = variants_of(settings, method.split(","))
    with out.reporting(quiet) as progress:
        done = benchmark(settings, store, progress, variants, beams or (settings.generation.num_beams,))
    if json:
        out.document(_benchmark_json(done))
    else:
        _show_benchmark(done)


def _benchmark_json(done: Benchmarked) -> dict[str, object]:
    from dataclasses import asdict

    from hestctl.workflows.benchmark import ratio_to_first

    rows = []
    for row in done.rows:
        joules, seconds = ratio_to_first(done.rows, row)
        rows.append({**asdict(row), "energy_ratio_to_first": joules, "time_ratio_to_first": seconds})
    return {
        "run_ids": [run.run_id for run in done.runs],
        "device": done.runs[0].device_name,
        "energy_kind": done.runs[0].energy_kind,
        "new_tokens_per_sample": done.runs[0].max_new_tokens,
        "notes": done.notes,
        "rows": rows,
    }


def _show_benchmark(done: Benchmarked) -> None:
    from hestctl.workflows.benchmark import ratio_to_first

    kind, rows = done.runs[0].energy_kind, done.rows
    ratios = [ratio_to_first(rows, row) for row in rows]
    where = f"{done.runs[0].backbone}, {done.runs[0].max_new_tokens} new tokens, {done.runs[0].device_name}"
    points = [
        ("variant", [row.variant for row in rows]),
        ("prompt", [f"{row.prompt_tokens:,}" for row in rows]),
        ("batch x beams", [f"{row.batch_size} x {row.num_beams}" for row in rows]),
    ]
    _columns(
        f"time: {where}; x is against {rows[0].variant}",
        [
            *points,
            ("ms", [f"{1e3 * row.latency_s:,.1f}" for row in rows]),
            ("prefill ms", [f"{1e3 * row.prefill_s:,.1f}" for row in rows]),
            ("decode tokens/s", [_per_second(row.decode_tokens_per_s) for row in rows]),
            ("x time", [f"{seconds:.3f}" for _, seconds in ratios]),
            ("of memory floor", [_percent(row.memory_share) for row in rows]),
            ("of compute floor", [_percent(row.compute_share) for row in rows]),
        ],
        "",
    )
    _columns(
        f"joules ({kind}): {where}",
        [
            *points,
            (f"J a sample ({kind})", [_joules(row.energy_j, row.error_j) for row in rows]),
            (f"prefill J ({kind})", [_told(row.prefill_j) for row in rows]),
            (f"decode J ({kind})", [_told(row.decode_j) for row in rows]),
            (f"x J ({kind})", ["-" if joules is None else f"{joules:.3f}" for joules, _ in ratios]),
        ],
        "\n".join((*done.notes, "runs: " + ", ".join(run.run_id for run in done.runs))),
    )


def _columns(title: str, columns: list[tuple[str, list[str]]], caption: str) -> None:
    """A table of columns; one that nothing fills (no budget, no calibration, no datasheet) is left out."""
    from hestctl.cli import out

    filled = [(name, cells) for name, cells in columns if set(cells) != {"-"}]
    rows = list(zip(*(cells for _, cells in filled), strict=True))
    out.table(title, [name for name, _ in filled], rows, caption=caption)


def _per_second(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


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
        "left_out": done.left_out,
        "points": [
            {
                "prompt_tokens": p.prompt_tokens,
                "batch_size": p.batch_size,
                "samples": p.samples,
                "energy_samples": p.valid,
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
    from hestctl.cli.figures_text import number

    kind = done.run.energy_kind
    columns = [
        ("prompt", [f"{p.prompt_tokens:,}" for p in done.points]),
        ("batch", [str(p.batch_size) for p in done.points]),
        (
            "n",
            [str(p.samples) if p.replicates == 1 else f"{p.samples} x {p.replicates}" for p in done.points],
        ),
        ("latency s", [number(p.latency_s, 3) for p in done.points]),
        (f"J a sample ({kind})", [_joules(p.energy_j, p.error_j) for p in done.points]),
        (
            f"prefill + decode J ({kind}, apportioned)",
            [_told(p.prefill_j, p.decode_j) for p in done.points],
        ),
        ("J a sample (predicted)", [_told(p.predicted_j) for p in done.points]),
        ("scope J (predicted)", [_told(p.scope_energy_j) for p in done.points]),
        (
            "of E_max",
            [
                _told(p.scope_energy_j / p.emax_j) if p.emax_j and p.scope_energy_j else "-"
                for p in done.points
            ],
        ),
    ]
    _columns(
        f"{done.run.run_id}: {done.run.method}, {done.run.max_new_tokens} new tokens, {done.run.device_name}",
        columns,
        "\n".join(line for line in (done.left_out, done.phases, done.prediction) if line),
    )


def _told(*joules: float | None) -> str:
    known = [f"{value:.3g}" for value in joules if value is not None]
    return " + ".join(known) if len(known) == len(joules) else "-"


def _joules(joules: float | None, error: float | None) -> str:
    """With the meter's error bound where it has one; an estimate has none that is known."""
    if joules is None:
        return "not measured"
    return f"{joules:.4g} +- {error:.2g}" if error else f"{joules:.4g}"
