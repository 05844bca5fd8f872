"""``hestctl calibrate``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hestctl.cli import options as o

if TYPE_CHECKING:
    from hestctl.energy.model import Cost, EnergyModel
    from hestctl.workflows.calibrate import Calibrated


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(calibrate)


def calibrate(
    profile: o.ProfileOption = "quickstart",
    db: o.DbOption = None,
    lengths: Annotated[
        str | None, typer.Option("--lengths", help="Prompt tokens that the energy model is fitted at.")
    ] = None,
    batch_size: Annotated[
        str | None, typer.Option("--batch-size", help="Batch sizes it is fitted for, such as 1 or 1,4.")
    ] = None,
    num_beams: Annotated[int | None, typer.Option(help="Beams it is fitted for; 1 is greedy.")] = None,
    backbone: o.BackboneOption = None,
    weights: o.WeightsOption = None,
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = None,
    engine: o.EngineOption = None,
    meter: o.MeterOption = None,
    data: o.DataOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the latest calibration that was stopped.")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", help="Record what the counter shows into this new file, for replay:FILE."),
    ] = None,
    set_: o.SetOption = None,
    quiet: o.QuietOption = False,
    json: o.JsonOption = False,
) -> None:
    """Certify the meter, check it on known work, and measure the energy table of this device.

    The table prices adapter directions and the blocks of a layer (attention, MLP) in full precision, in int8
    and off, and predicts whole generations in any mix of these. The int8 kernels are chosen first; generation
    takes what was chosen. Last come the sensitivities: what likelihood each block of the backbone is worth on
    the training split. `train` and `harden` measure what they need on the way where the store has none for
    this device; a table measured with another driver, library or kernel is refused until it is renewed here.
    """
    from hestctl.cli import out
    from hestctl.store.store import Store
    from hestctl.workflows.calibrate import calibrate as work

    settings = o.resolve(
        profile,
        set_,
        db=db,
        energy__lengths=lengths,
        energy__batch_sizes=batch_size,
        generation__num_beams=num_beams,
        backbone__name=backbone,
        backbone__weights=weights,
        backbone__device=device,
        backbone__dtype=dtype,
        generation__engine=engine,
        energy__meter=meter,
        data__source=data,
    ).settings
    with out.reporting(quiet) as progress:
        done = work(settings, Store(settings.db), progress, resuming=resume, trace=trace)
    if json:
        out.document(_as_json(done))
    else:
        _show(done)


def _as_json(done: Calibrated) -> dict[str, object]:
    return {
        "run_id": done.run.run_id,
        "status": done.run.status,
        "meter": done.run.meter,
        "energy_kind": done.run.energy_kind,
        "certificate": done.certificate,
        "check": done.check,
        "verdicts": [{"demand": demand, "holds": holds, "why": why} for demand, holds, why in done.verdicts],
        "table": done.table.as_dict(),
        "int8_offered": done.table.int8_pays,
        "blocks": _block_rows(done.table.model),
    }


def _show(done: Calibrated) -> None:
    from hestctl.cli import out

    table, kind = done.table, done.table.kind
    rows = [
        (name, f"{cost.joules:.3e}", f"{cost.error_j:.1e}", per)
        for name, cost, per in (
            ("direction, full precision", table.full, "direction and token"),
            ("direction, int8", table.int8, "direction and token"),
            ("controller", table.controller, "token"),
            *_model_rows(done),
        )
    ]
    out.table(
        f"{table.calibration_id}: {table.device_name}, {table.dtype}, hidden {table.hidden}",
        ("what", f"J ({kind})", "+-", "per"),
        rows,
        caption=table.verdict(),
    )
    _show_blocks(done)
    _show_predictions(done)
    _show_kernels(done)
    facts = [
        (key, "not measured" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value))
        for key, value in done.certificate.items()
        if key not in ("missing", "warnings")
    ]
    facts += [("warning", warning) for warning in done.certificate["warnings"]]
    reasons: dict[str, list[str]] = {}
    for key, why in done.certificate["missing"].items():
        reasons.setdefault(why, []).append(key)
    out.table(
        f"certificate of the meter ({kind})",
        ("figure", "value"),
        facts,
        left=2,
        caption="\n".join(f"not measured: {', '.join(keys)}: {why}" for why, keys in reasons.items()),
    )
    demands: dict[tuple[str, str], list[str]] = {}
    for demand, holds, why in done.verdicts:
        word = "not measured" if holds is None else "yes" if holds else "NO"
        demands.setdefault((word, why.removeprefix("not measured: ")), []).append(demand)
    out.table(
        f"the meter on samples of known relative work ({kind})",
        ("demand", "holds", "why"),
        [(", ".join(names), word, why) for (word, why), names in demands.items()],
        left=3,
    )


def _model_rows(done: Calibrated) -> Iterator[tuple[str, Cost, str]]:
    model = done.table.model
    if model is None:
        return
    for adapters in model.adapters:
        name = f"adapters, {adapters.gate} gate, {adapters.batch_size} x {adapters.num_beams}"
        yield f"{name}, prefill", adapters.prefill, "prompt token"
        yield f"{name}, decode", adapters.decode, "step"


def _block_rows(model: EnergyModel | None) -> list[dict[str, str | int | float | None]]:
    """What one layer's block costs a batch in each state, at the longest calibrated lengths."""
    from hestctl.energy.protocol import Unavailable
    from hestctl.records import BLOCKS, FULL, INT8, STATES

    found: list[dict[str, str | int | float | None]] = []
    for batch, beams in [] if model is None else _calibrated(model):
        assert model is not None
        points = [p for p in model.points if (p.batch_size, p.num_beams) == (batch, beams)]
        prompt, new = max(p.prompt_tokens for p in points), max(p.new_tokens for p in points)
        for block, name in enumerate(BLOCKS):
            full = model.component(batch, beams, block, FULL)
            for state in (FULL, INT8):
                costs = model.component(batch, beams, block, state)
                if isinstance(costs, Unavailable) or isinstance(full, Unavailable):
                    continue
                prefill_j, decode_j = costs.prefill_j(prompt), costs.decode_j(prompt, new)
                found.append(
                    {
                        "batch_size": batch,
                        "num_beams": beams,
                        "prompt_tokens": prompt,
                        "block": name,
                        "state": STATES[state],
                        "prefill_j_per_prompt_token": prefill_j / (prompt * batch),
                        "decode_j_per_step": decode_j / (new - 1),
                        "prefill_ratio_of_full": _ratio(prefill_j, full.prefill_j(prompt)),
                        "decode_ratio_of_full": _ratio(decode_j, full.decode_j(prompt, new)),
                    }
                )
    return found


def _calibrated(model: EnergyModel) -> list[tuple[int, int]]:
    """The batch sizes and beams of a model."""
    return sorted({(p.batch_size, p.num_beams) for p in model.points})


def _ratio(joules: float, full_j: float) -> float | None:
    return joules / full_j if full_j > 0 else None


def _show_blocks(done: Calibrated) -> None:
    """One layer's blocks in each state; an int8 block that costs more than a full one is there to be seen."""
    from hestctl.cli import out

    kind, rows = done.table.kind, []
    for row in _block_rows(done.table.model):
        figures = [f"{row['prefill_j_per_prompt_token']:.3e}", f"{row['decode_j_per_step']:.3e}"]
        for name in ("prefill_ratio_of_full", "decode_ratio_of_full"):
            figures.append("-" if row[name] is None else f"{row[name]:.2f}")
        where = f"{row['batch_size']} x {row['num_beams']}"
        rows.append((where, str(row["prompt_tokens"]), str(row["block"]), str(row["state"]), *figures))
    if not rows:
        return
    out.table(
        "one layer's blocks (off: nothing)",
        (
            "batch x beams",
            "prompt",
            "block",
            "state",
            f"J a prompt token ({kind})",
            f"J a decode step of the batch ({kind})",
            "prefill of full",
            "decode of full",
        ),
        rows,
        left=4,
    )


def _show_kernels(done: Calibrated) -> None:
    """The int8 kernels that generation takes on this device, where any were to be chosen."""
    from hestctl.cli import out

    kernels, kind = done.table.kernels, done.table.kind
    if kernels is None:
        return
    rows = [
        (
            shape,
            choice["kernel"],
            "-" if choice["joules"] is None else f"{choice['joules']:.3e}",
            choice["why"],
        )
        for shape, choice in kernels["by_shape"].items()
    ]
    headers = ("rows, outputs, inputs", "kernel", f"J a product ({kind})", "why")
    out.table("int8 kernels", headers, rows, left=2)


def _show_predictions(done: Calibrated) -> None:
    """Each calibrated generation against the model's own prediction: how well the fit holds."""
    from hestctl.cli import out
    from hestctl.energy.model import uniform
    from hestctl.energy.protocol import Unavailable

    model, kind = done.table.model, done.table.kind
    if model is None:
        return
    rows = []
    for point in model.points:
        lengths = [point.prompt_tokens] * point.batch_size, [point.new_tokens] * point.batch_size
        blocks = uniform(model.layers, point.attention, point.mlp)
        found = model.predict(*lengths, num_beams=point.num_beams, blocks=blocks)
        assert not isinstance(found, Unavailable)
        joules = point.cost.joules
        rows.append(
            (
                f"{point.batch_size} x {point.num_beams}",
                str(point.prompt_tokens),
                str(point.new_tokens),
                f"{point.attention}, {point.mlp}",
                f"{joules:.4g} +- {point.cost.error_j:.2g}",
                f"{found.prefill_j:.4g}",
                f"{found.decode_j:.4g}",
                f"{100 * (found.total_j / joules - 1):+.1f} %",
            )
        )
    out.table(
        "whole generations of the bare backbone",
        (
            "batch x beams",
            "prompt",
            "new",
            "attention, MLP",
            f"J a batch ({kind})",
            "prefill J (predicted)",
            "decode J (predicted)",
            "fit off by",
        ),
        rows,
        left=0,
        caption="\n".join(_cross_checks(model)),
    )


def _cross_checks(model: EnergyModel) -> Iterator[str]:
    from hestctl.energy.protocol import Unavailable

    for batch, beams in _calibrated(model):
        worst = model.fit_error(batch, beams)
        assert not isinstance(worst, Unavailable)
        yield f"batch {batch} x {beams}: the fit is off by at most {100 * worst:.1f} %"
        found = model.phases_disagree(batch, beams)
        if found is not None:
            yield (
                f"batch {batch} x {beams}: prefills metered alone and told by regression over longer "
                f"generations differ by at most {100 * found:.1f} %"
            )
