"""``hestctl runs``: list, show, rebuild."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    from hestctl.store.queries import count_runs, list_runs, run_ids

    store = _store(db)
    for found in store.recover_orphans():
        out.note(f"recovered {found.run_id}: {found.status}")
    runs = list_runs(store, command=command, method=method, limit=limit)
    if json:
        out.document({"runs": [_document(run) for run in runs]})
        return
    if not runs:
        out.note(f"no such run in {store.db}; hestctl train --db {store.db} records one")
        return
    title, headers, rows = _listing(runs, run_ids(store))
    out.table(f"{title} in {store.db}", headers, rows, left=2)
    older = count_runs(store, command=command, method=method) - len(runs)
    if older:
        out.text(f"{older} older run{'s' if older > 1 else ''}: --limit {len(runs) + older}")
    out.text("any part of an id that no other run has names it, and so does `latest`; whole ids: --json")


def _listing(runs: Sequence[Run], ids: Sequence[str]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Title, headers and rows of the runs; what is the same in all of them stands above them once."""
    from hestctl.cli.run_ids import age, label, short_ids

    shorts = short_ids(ids)
    columns = [
        ("run", [shorts[run.run_id] for run in runs]),
        ("what", [label(run) for run in runs]),
        ("age", [age(run.created_at) for run in runs]),
    ]
    title = "runs"
    if {run.status for run in runs} == {"finished"}:
        title = "finished runs"
    else:
        columns.append(("status", [run.status for run in runs]))
    columns += [_column("quality", map(_quality, runs)), _column("a sample", map(_energy, runs))]
    headers, cells = zip(*columns, strict=True)
    return title, headers, list(zip(*cells, strict=True))


def _column(name: str, values: Iterable[tuple[str, str] | None]) -> tuple[str, list[str]]:
    """A column of figures with their units: in the header where all have the same."""
    pairs = list(values)
    units = {pair[1] for pair in pairs if pair}
    if len(units) == 1:
        (unit,) = units
        return unit, ["-" if pair is None else pair[0] for pair in pairs]
    return name, ["-" if pair is None else " ".join(pair) for pair in pairs]


def _quality(run: Run) -> tuple[str, str] | None:
    rouge, accuracy = run.summary.get("rouge_lsum"), run.summary.get("accuracy")
    if run.weights == "random":
        return None
    if accuracy is not None:
        return f"{100 * accuracy:.1f}", "% accuracy"
    return None if rouge is None else (f"{rouge:.1f}", "ROUGE-Lsum")


def _energy(run: Run) -> tuple[str, str] | None:
    energy_j = run.summary.get("energy_j_per_sample")
    return None if energy_j is None else (f"{energy_j:,.4g}", f"J a sample ({run.energy_kind or 'none'})")


@_runs.command()
def show(
    run_id: Annotated[
        str, typer.Argument(metavar="RUN", help="A part of its id that no other has, or latest.")
    ],
    db: o.DbOption = None,
    json: o.JsonOption = False,
) -> None:
    """What is recorded of one run, but its samples and steps; --json has its settings and long lists too."""
    from hestctl.cli import out
    from hestctl.cli.run_ids import full_id, label
    from hestctl.settings import flatten
    from hestctl.store.queries import get_run

    store = _store(db)
    run = get_run(store, full_id(store, run_id, status=None))
    document = _document(run)
    if json:
        out.document(document)
        return
    fields = [
        (key, value)
        for key, value in flatten(document)
        if value is not None and not key.startswith("settings.")
    ]
    long = [key for key, value in fields if isinstance(value, list) and len(str(value)) > _LINE]
    rows = [(key, f"{_told(value)}{_kind(key, run)}") for key, value in fields if key not in long]
    out.table(f"{run.run_id}: {label(run)}", ("field", "value"), rows, left=2)
    out.text(f"in --json alone: {', '.join(['settings', *long])}")
    out.text(f"folder: {store.folder(run.run_id).path}")


_LINE = 60
"""Letters of a list that a reader is shown; a longer one is for programs."""


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

    done = _store(db, or_folders=True).rebuild()
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
    from hestctl.store.queries import run_ids
    from hestctl.store.store import NO_FOLDER

    store = _store(db)
    found = store.verify()
    gone = [mismatch.run_id for mismatch in found if mismatch.problem == NO_FOLDER]
    others = [f"{mismatch.run_id}: {mismatch.problem}" for mismatch in found if mismatch.run_id not in gone]
    if gone:
        # What rebuild would do is drop these runs.
        told = f"none of the {len(gone)} run folders is in {store.root}"
        if len(gone) < (runs := len(run_ids(store))):
            told = f"{len(gone)} of {runs} run folders are missing in {store.root}: {_few(gone)}"
        raise HestError(
            "; ".join([f"{told}; compare works without them", *([_few(others)] if others else [])]),
            "put the folders there to verify",
            Exit.STORE,
        )
    if found:
        raise HestError(_few(others), f"hestctl runs rebuild --db {store.db}", Exit.STORE)
    out.text(f"{store.db} agrees with its run folders")


_NAMED = 8
"""Runs that a message names at most."""


def _few(words: Sequence[str]) -> str:
    more = f" and {len(words) - _NAMED} more" if len(words) > _NAMED else ""
    return "; ".join(words[:_NAMED]) + more


def _document(run: Run) -> dict[str, object]:
    return asdict(run)


def _store(db: Path | None, *, or_folders: bool = False) -> Store:
    """The store. Raises HestError (usage) where there is none; it names those nearby.

    ``or_folders``: the folders of its runs will do.
    """
    from hestctl.store.finding import demand_name, demand_store, has_run_folders
    from hestctl.store.store import Store

    path = o.resolve("quickstart", None, db=db).settings.db
    demand_name(path)
    if not (or_folders and has_run_folders(path)):
        demand_store(path)
    return Store(path)
