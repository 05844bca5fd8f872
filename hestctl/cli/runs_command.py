"""``hestctl runs``: list, show, rebuild."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hestctl.cli import options as o

_runs = typer.Typer(no_args_is_help=True, help="What the store holds: list, show, rebuild, verify.")


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.add_typer(_runs, name="runs")


@_runs.command("list")
def list_(
    command: Annotated[str | None, typer.Option(help="Only train, harden, profile, calibrate, ...")] = None,
    method: Annotated[str | None, typer.Option(help="Only this method.")] = None,
    limit: Annotated[int, typer.Option(help="The newest so many.", min=1)] = 30,
    db: o.DbOption = None,
    json: o.JsonOption = False,
) -> None:
    """The runs of a store, the newest first."""
    from hestctl.cli import out
    from hestctl.cli.figures_text import joules, number
    from hestctl.store.queries import list_runs

    runs = list_runs(_store(db), command=command, method=method, limit=limit)
    if json:
        out.document({"runs": [_document(run) for run in runs]})
        return
    rows = [
        (
            run.run_id,
            run.status,
            run.created_at[:16].replace("T", " "),
            number(run.summary.get("rouge_lsum"), 1) if run.command in ("train", "trial") else "-",
            joules(run.summary.get("energy_j_per_sample"), run.energy_kind or "none")
            if run.command in ("train", "trial", "profile")
            else "-",
        )
        for run in runs
    ]
    out.table("runs", ("run", "status", "created (UTC)", "ROUGE-Lsum", "energy a sample"), rows, left=3)


@_runs.command()
def show(
    run_id: Annotated[str, typer.Argument(help="The run.")], db: o.DbOption = None, json: o.JsonOption = False
) -> None:
    """Everything recorded of one run, but its samples and steps."""
    from hestctl.cli import out
    from hestctl.store.queries import get_run

    store = _store(db)
    run = get_run(store, run_id)
    document = _document(run)
    if json:
        out.document(document)
        return
    rows = [(key, "-" if value is None else str(value)) for key, value in document.items()]
    out.table(run.run_id, ("field", "value"), rows)
    out.text(f"folder: {store.folder(run.run_id).path}")


@_runs.command()
def rebuild(db: o.DbOption = None, json: o.JsonOption = False) -> None:
    """Make the index anew from the run folders, which are the truth."""
    from hestctl.cli import out

    done = _store(db).rebuild()
    if json:
        out.document({"rebuilt": done.__dict__ if hasattr(done, "__dict__") else str(done)})
        return
    out.text(str(done))


@_runs.command()
def verify(db: o.DbOption = None) -> None:
    """Compare the index with the folders' manifests. Exit code 4 where they differ."""
    from hestctl.cli import out
    from hestctl.errors import Exit, HestError

    store = _store(db)
    found = store.verify()
    if found:
        raise HestError(
            "; ".join(str(mismatch) for mismatch in found),
            f"hestctl runs rebuild --db {store.db}",
            Exit.STORE,
        )
    out.text(f"{store.db} agrees with its run folders")


def _document(run: object) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(run)  # type: ignore[call-overload, no-any-return]


def _store(db: Path | None):  # type: ignore[no-untyped-def]
    from hestctl.store.store import Store

    return Store(o.resolve("quickstart", None, db=db).settings.db)
