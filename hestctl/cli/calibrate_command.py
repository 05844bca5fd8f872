"""``hestctl calibrate``."""

from __future__ import annotations

import typer

from hestctl.cli import options as o


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(calibrate)


def calibrate(
    profile: o.ProfileOption = "quickstart",
    db: o.DbOption = None,
    backbone: o.BackboneOption = None,
    weights: o.WeightsOption = None,
    device: o.DeviceOption = None,
    dtype: o.DtypeOption = None,
    meter: o.MeterOption = None,
    set_: o.SetOption = None,
    quiet: o.QuietOption = False,
    json: o.JsonOption = False,
) -> None:
    """Certify the meter, and measure what an adapter direction costs in each state on this device.

    Optional: `train` and `harden` calibrate on the way when the store has no table for this device.
    """
    from hestctl.cli import out
    from hestctl.store.store import Store
    from hestctl.workflows.calibrate import calibrate as work

    settings = o.resolve(
        profile,
        set_,
        db=db,
        backbone__name=backbone,
        backbone__weights=weights,
        backbone__device=device,
        backbone__dtype=dtype,
        energy__meter=meter,
    ).settings
    with out.reporting(quiet) as progress:
        done = work(settings, Store(settings.db), progress)
    if json:
        out.document(
            {
                "run_id": done.run.run_id,
                "status": done.run.status,
                "meter": done.run.meter,
                "energy_kind": done.run.energy_kind,
                "certificate": done.certificate,
                "table": done.table.as_dict(),
                "int8_offered": done.table.int8_pays,
            }
        )
        return
    table = done.table
    rows = [
        (name, f"{cost.joules:.3e}", f"{cost.error_j:.1e}", per)
        for name, cost, per in (
            ("direction, full precision", table.full, "direction and token"),
            ("direction, int8", table.int8, "direction and token"),
            ("controller", table.controller, "token"),
        )
    ]
    out.table(
        f"{table.calibration_id}: {table.device_name}, {table.dtype}, hidden {table.hidden}",
        ("what", f"J ({table.kind})", "+-", "per"),
        rows,
        caption=table.verdict(),
    )
    missing = done.certificate["missing"]
    facts: dict[str, list[str]] = {}
    for key, value in done.certificate.items():
        if key not in ("missing", "warnings"):
            # Figures that are missing for one reason share a row.
            facts.setdefault(_told(value, missing.get(key)), []).append(key)
    told = [("\n".join(keys), value) for value, keys in facts.items()]
    told += [("warning", warning) for warning in done.certificate["warnings"]]
    out.table(f"certificate of the meter ({table.kind})", ("figure", "value"), told, left=2)


def _told(value: object, why: str | None) -> str:
    if value is None:
        return f"not measured: {why}" if why else "not measured"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
