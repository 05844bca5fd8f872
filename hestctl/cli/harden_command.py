"""``hestctl harden``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from hestctl.cli import options as o

if TYPE_CHECKING:
    from hestctl.hardening.plan import BlockChoice, Plan
    from hestctl.workflows.harden import Hardened


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(harden)


def harden(
    run: o.RunOption = None,
    emax_ratio: o.EmaxRatioOption = None,
    emax: o.EmaxOption = None,
    reference: o.ReferenceOption = None,
    margin: Annotated[
        float | None, typer.Option(help=r"Part of E_max the ledger leaves unspent. \[default: 0.01]")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="One row a layer: budget, use, order.")] = False,
    db: o.DbOption = None,
    data: o.DataOption = None,
    meter: o.MeterOption = None,
    device: o.DeviceOption = None,
    set_: o.SetOption = None,
    quiet: o.QuietOption = False,
    json: o.JsonOption = False,
) -> None:
    """Turn a trained run's gates into a plan with a bound, and certify it by length.

    Takes the latest trained run of a budgeted method unless --run names one; `train` has hardened it
    once already, under its own budget.
    """
    from hestctl.cli import out
    from hestctl.cli.run_ids import LATEST, full_id, with_reference
    from hestctl.settings import DEFAULT_PROFILE, of_run
    from hestctl.store.store import Store
    from hestctl.workflows.harden import harden_run, trained_run

    resolved = o.resolve(
        DEFAULT_PROFILE,
        set_,
        budget__emax_ratio=emax_ratio,
        budget__emax_j=emax,
        budget__reference=reference,
        budget__margin=margin,
        data__source=data,
        energy__meter=meter,
        backbone__device=device,
        db=db,
    )
    store = Store(resolved.settings.db)
    named = None if run is None or run == LATEST else full_id(store, run, commands=("train", "harden"))
    trained = trained_run(store, named)
    settings = of_run(with_reference(resolved, store), trained.settings)
    with out.reporting(quiet) as progress:
        done = harden_run(settings, store, progress, run_id=trained.run_id)
    if json:
        from hestctl.hardening.certificate import certificate, worst

        out.document(
            {
                "run_id": done.run.run_id,
                "parent_run_id": trained.run_id,
                "status": done.run.status,
                "method": done.run.method,
                "scope": done.run.scope,
                "emax_j": done.plan.emax_j,
                "emax_origin": done.plan.emax_origin,
                "energy_kind": done.plan.energy_kind,
                "scope_energy_kind": "predicted",
                "hardened_over_emax": done.run.hardened_ratio,
                "plan": {
                    **done.plan.as_dict(),
                    "certificate": certificate(done.plan),
                    "worst": worst(done.plan),
                },
            }
        )
    else:
        _show(done, explain)


def _show(done: Hardened, explain: bool) -> None:
    from hestctl.cli import out

    plan, energies = done.plan, done.plan.energies
    if energies is None or energies.emax_j is None or energies.worst_ratio is None:
        out.text(f"{done.run.run_id}: {plan.method} has no budget; its gates are fixed as they decide")
    else:
        out.table(
            f"{done.run.run_id}: energy a sample in scope {plan.scope}, from {plan.energy_kind} costs",
            ("figure", "J (predicted)", "of E_max"),
            [
                (name, f"{value:.4g}", f"{value / energies.emax_j:.3f}")
                for name, value in (
                    ("E_max, mean of the validation samples", energies.emax_j),
                    ("expected, by the gates' probabilities", energies.expected_j),
                    ("hard gates, before repair", energies.decided_j),
                    ("hardened: repaired, under the ledger", energies.hardened_j),
                )
            ]
            + [("worst validation sample, of its own E_max", "", f"{energies.worst_ratio:.3f}")],
            caption=f"E_max: {plan.emax_origin}, {plan.envelope}",
        )
        _show_certificate(plan)
    if explain:
        _explain(plan)


def _show_certificate(plan: Plan) -> None:
    from hestctl.cli import out
    from hestctl.hardening.certificate import certificate, worst

    rows = certificate(plan)
    if plan.scope == "adapter":
        out.table(
            "certificate: no sample of this many token positions spends more",
            ("tokens", "bound J (predicted)", "of E_max", "directions affordable"),
            [
                (
                    f"{row['length_tokens']:,}",
                    f"{row['bound_j']:.4g}",
                    f"{row['bound_over_emax']:.3f}",
                    f"{100 * row['open_share']:.0f} %",
                )
                for row in rows
            ],
        )
        return
    most = worst(plan)
    assert most is not None
    out.table(
        "certificate: no sample of this many prompt tokens spends more in a whole batch",
        (
            "batch x beams",
            "tokens",
            "bound J (predicted)",
            "E_max J (predicted)",
            "of E_max",
            "directions affordable",
        ),
        [
            (
                f"{row['batch_size']} x {row['num_beams']}",
                f"{row['length_tokens']:,} + {row['new_tokens']}",
                f"{row['bound_j']:.4g}",
                f"{row['emax_j']:.4g}",
                f"{row['bound_over_emax']:.3f}",
                f"{100 * row['open_share']:.0f} %",
            )
            for row in rows
        ],
        caption=f"worst: {most['bound_over_emax']:.3f} of E_max at {most['length_tokens']:,} + "
        f"{most['new_tokens']} tokens in a batch of {most['batch_size']}; "
        f"{100 * plan.margin:.2g} % stay in reserve. Made for {plan.bound[0]:,} to {plan.bound[1]:,} prompt "
        "tokens; beyond them generation refuses what would exceed E_max",
    )


_WHY = {
    "gate": "",
    "dear": "int8 costs no less",
    "free": "int8 is free",
    "budget": "budget",
    "spare": "joules to spare",
    "fixed": "settings",
}


def _explain(plan: Plan) -> None:
    from hestctl.cli import out

    if plan.choices:
        out.table(
            "layers: attention / MLP",
            ("layer", "state", "full over int8", "on over off", "saved J (predicted)", "harm", "repair"),
            [_layer_row(layer, pair) for layer, pair in enumerate(plan.choices)],
            caption="scores are log-odds of the gate; saved against full, a sample at the reference's mean "
            f"lengths; harm of int8, off in nats per answer token ({plan.sensitivities or 'not known'})",
        )
    out.table(
        "directions",
        ("layer", "share of budget", "directions, most important first"),
        [
            (str(layer), f"{100 * share:.1f} %", " ".join(f"{i:2d}" for i in order))
            for layer, (share, order) in enumerate(zip(plan.pace, plan.order, strict=True))
        ],
        caption=f"repair shifted all thresholds by {plan.shift:+.3f} spreads of their layer's scores",
    )


def _layer_row(layer: int, pair: tuple[BlockChoice, BlockChoice]) -> tuple[str, ...]:
    from hestctl.records import BLOCKS, STATES

    def both(told: Callable[[BlockChoice], str]) -> str:
        return " / ".join(told(choice) for choice in pair)

    def repaired(choice: BlockChoice) -> str:
        was = f"was {STATES[choice.decided]}" if choice.decided != choice.state else ""
        return ", ".join(word for word in (was, _WHY[choice.why]) if word)

    return (
        str(layer),
        both(lambda c: STATES[c.state]),
        both(lambda c: "-" if c.margins is None else f"{c.margins[0]:+.2f}"),
        both(lambda c: "-" if c.margins is None else f"{c.margins[1]:+.2f}"),
        both(lambda c: "-" if c.saved_j is None else f"{c.saved_j:.3g}"),
        both(lambda c: "-" if c.harm is None else f"{c.harm[0]:+.4f} {c.harm[1]:+.4f}"),
        "; ".join(f"{block} {told}" for block, told in zip(BLOCKS, map(repaired, pair), strict=True) if told),
    )
