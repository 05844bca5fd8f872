"""Runs as one names and tells them apart: by a part of the id, ``latest``, and a label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hestctl.errors import Exit, HestError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

    from hestctl.records import Run, RunStatus
    from hestctl.settings import Resolved
    from hestctl.store.store import Store

LATEST = "latest"

_NAMED = 8
"""Matches that a message names at most."""


def full_id(
    store: Store,
    text: str,
    *,
    commands: Sequence[str] = (),
    method: str | None = None,
    status: RunStatus | None = "finished",
) -> str:
    """The id of the one run that ``text`` names: whole, by a part that no other id has, or ``latest``.

    ``commands`` and ``method``, where given, are those of the runs that serve: of several matches these come
    first, and ``latest`` is the newest of them that is in this ``status``.

    Raises HestError (usage) where there is none, where there are several (which it names), and where
    there is no store.
    """
    from hestctl.store import queries
    from hestctl.store.finding import demand_store

    if text == LATEST:
        demand_store(store.db)
        newest = [
            queries.latest_run(store, command=name, method=method, status=status)
            for name in commands or (None,)
        ]
        found = max((run for run in newest if run), key=lambda run: run.created_at, default=None)
        if found is None:
            kind = " ".join(filter(None, (status, " or ".join(commands), "run", method and f"of {method}")))
            raise HestError(
                f"there is no {kind} in {store.db}", f"hestctl runs list --db {store.db}", Exit.USAGE
            )
        return found.run_id
    matches = queries.runs_like(store, text)
    if not matches:
        return queries.get_run(store, text).run_id  # whose message names the nearest
    serving = [run for run in matches if run.command in commands and method in (None, run.method)]
    return choose(matches, text, serving).run_id


def choose(matches: Sequence[Run], text: str, serving: Sequence[Run] = ()) -> Run:
    """The one run that ``text`` means among those whose id holds it; ``serving`` are preferred."""
    fit = [run for run in matches if run.run_id == text] or serving or matches
    if len(fit) > 1:
        named = ", ".join(f"{run.run_id} ({label(run)})" for run in fit[:_NAMED])
        more = f" and {len(fit) - _NAMED} more" if len(fit) > _NAMED else ""
        raise HestError(
            f"'{text}' is part of {len(fit)} run ids: {named}{more}",
            "give more of the id, such as its last eight letters",
            Exit.USAGE,
        )
    return fit[0]


def search_id(connection: DuckDBPyConnection, text: str) -> str:
    """The id of the search that ``text`` names, as ``full_id`` does it; ``text`` itself where there is none.

    ``connection`` has the views of one or more stores.
    """
    from hestctl.compare.reading import read_runs

    searches = [run for run, _ in read_runs(connection, ("search",))]
    matches = searches[-1:] if text == LATEST else [run for run in searches if text in run.run_id]
    return choose(matches, text).run_id if matches else text


def with_reference(resolved: Resolved, store: Store) -> Resolved:
    """``resolved`` with the whole id of the reference that this call names, where a budget needs one.

    Raises HestError (usage) as ``full_id`` does.
    """
    from hestctl.model.methods import METHODS
    from hestctl.settings import with_values

    settings = resolved.settings
    named = settings.budget.reference
    if named is None or settings.budget.emax_j is not None or not METHODS[settings.method.name].budgeted:
        return resolved
    whole = full_id(store, named, commands=("train",), method="tabs")
    return replace(resolved, settings=with_values(settings, {"budget.reference": whole}))


def label(run: Run) -> str:
    """What a run is, such as ``train hest 0.6 seed 1``."""
    from hestctl.compare.loading import plain_label

    if run.method is None:
        return run.command
    # A comparison has these apart where they would meet; in a list they always may.
    scope = " adapter" if run.scope == "adapter" and run.method in ("hest", "tabs", "bhsp") else ""
    seed = "" if run.seed is None or run.method == "base" else f" seed {run.seed}"
    return f"{run.command} {plain_label(run)}{scope}{seed}"


def short_ids(ids: Sequence[str]) -> dict[str, str]:
    """For each id its last word, where no other of them holds it; else the id itself."""
    shorts = {}
    for run_id in ids:
        last = run_id.rpartition("-")[2]
        shared = sum(last in other for other in ids) > 1
        shorts[run_id] = run_id if shared else last
    return shorts


def age(since: str, now: datetime | None = None) -> str:
    """How long ago an ISO 8601 time was, in the largest unit that it fills; ``-`` for what is no time."""
    try:
        passed = (now or datetime.now(UTC)) - datetime.fromisoformat(since)
    except (ValueError, TypeError):
        return "-"
    seconds = max(0.0, passed.total_seconds())
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{int(seconds)} s"
