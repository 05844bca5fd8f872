"""``hestctl runs``: list, show, rebuild."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hestctl.cli import options as o

if TYPE_CHECKING:
    from hestctl.records import Run
    from hestctl.store.store import Store

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
    from hestctl.store.queries import list_runs

    store = _store(db)
    for found in store.recover_orphans() if store.db.exists() else []:
        out.note(f"recovered {found.run_id}: {found.status}")
    runs = list_runs(store, command=command, method=method, limit=limit)
    if json:
        out.document({"runs": [_document(run) for run in runs]})
        return
    if not runs:
        out.note(f"no such run in {store.db}; hestctl train --db {store.db} records one")
        return
    headers = ("run", "status", "quality", "energy a sample")
    out.table(f"runs in {store.db}", headers, [_row(run) for run in runs], left=2)


def _row(run: Run) -> tuple[str, str, str, str]:
    from hestctl.cli.figures_text import joules

    rouge, accuracy = run.summary.get("rouge_lsum"), run.summary.get("accuracy")
    quality = "-" if rouge is None else f"{rouge:.1f} R-Lsum"
    if accuracy is not None:
        quality = f"{100 * accuracy:.1f} % accuracy"
    energy_j = run.summary.get("energy_j_per_sample")
    return (
        run.run_id,
        run.status,
        "-" if run.weights == "random" else quality,
        "-" if energy_j is None else joules(energy_j, run.energy_kind or "none"),
    )


@_runs.command()
def show(
    run_id: Annotated[str, typer.Argument(help="The run.")], db: o.DbOption = None, json: o.JsonOption = False
) -> None:
    """What is recorded of one run, but its samples and steps; --json has its settings too."""
    from hestctl.cli import out
    from hestctl.settings import flatten
    from hestctl.store.queries import get_run

    store = _store(db)
    run = get_run(store, run_id)
    document = _document(run)
    if json:
        out.document(document)
        return
    rows = [
        (key, f"{_told(value)}{_kind(key, run)}")
        for key, value in flatten(document)
        if value is not None and not key.startswith("settings.")
    ]
    out.table(run.run_id, ("field", "value"), rows, left=2)
    out.text(f"folder: {store.folder(run.run_id).path}")


def _told(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _kind(key: str, run: Run) -> str:
    """How the joules of a field were had; nothing for other fields."""
    words = key.split(".")[-1].split("_")
    if "j" not in words:
        return ""
    return " (predicted)" if {"emax", "scope", "predicted"} & set(words) else f" ({run.energy_kind})"


@_runs.command()
def rebuild(db: o.DbOption = None, json: o.JsonOption = False) -> None:
    """Make the index anew from the run folders, which are the truth."""
    from hestctl.cli import out

    done = _store(db).rebuild()
    if json:
        out.document({**asdict(done), "backup": None if done.backup is None else str(done.backup)})
        return
    out.text(f"indexed {done.runs} runs; {done.lost_lines} torn lines left out")
    for name, why in done.skipped.items():
        out.text(f"skipped {name}: {why}")
    if done.backup is not None:
        out.text(f"the index as it was: {done.backup}")


@_runs.command()
def verify(db: o.DbOption = None) -> None:
    """Compare the index with the folders' manifests. Exit code 4 where they differ."""
    from hestctl.cli import out
    from hestctl.errors import Exit, HestError

    store = _store(db)
    if not store.db.exists() and not store.root.exists():
        raise HestError(f"there is no store {store.db}", f"hestctl train --db {store.db}", Exit.USAGE)
    found = store.verify()
    if found:
        raise HestError(
            "; ".join(f"{mismatch.run_id}: {mismatch.problem}" for mismatch in found),
            f"hestctl runs rebuild --db {store.db}",
            Exit.STORE,
        )
    out.text(f"{store.db} agrees with its run folders")


def _document(run: Run) -> dict[str, object]:
    return asdict(run)


def _store(db: Path | None) -> Store:
    from hestctl.store.store import Store

    return Store(o.resolve("quickstart", None, db=db).settings.db)
