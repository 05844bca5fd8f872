"""Which interrupted run a command goes on with, and whether it may."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hestctl.errors import Exit, HestError
from hestctl.records import Run
from hestctl.settings import Settings
from hestctl.store import queries
from hestctl.store.store import Store
from hestctl.workflows.setup import Data


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on with an interrupted run: the one named, or the latest of the method."""

    run_id: str | None = None
    force: bool = False


def resumable(settings: Settings, store: Store, run_id: str | None, command: str = "train") -> Run:
    """The run to go on with: the one named, or the latest of the method. Raises HestError (usage)."""
    store.recover_orphans()  # a killed run says that it is interrupted only once somebody looks
    if run_id is not None:
        old = queries.get_run(store, run_id)
        if old.command != command or old.status == "finished":
            raise HestError(
                f"run {old.run_id} cannot be resumed: it is a {old.status} {old.command} run",
                "`hestctl runs list` shows the interrupted ones",
                Exit.USAGE,
            )
        return old
    runs = [
        run
        for status in ("interrupted", "failed")
        for run in queries.list_runs(store, command=command, method=settings.method.name, status=status)
    ]
    if not runs:
        what = "run" if command == "train" else command
        raise HestError(
            f"nothing to resume: no interrupted {settings.method.name} {what} in {store.db}",
            "leave out --resume to start afresh",
            Exit.USAGE,
        )
    return max(runs, key=lambda run: run.created_at)


_NO_MATTER = ("db", "profile.", "search.", "train.max_energy_j", "train.rank_timeout_s")
"""Settings that play no part in what a training run does, but for how far it comes."""


def changes(
    old: Run,
    settings: Settings,
    data: Data | None,
    *,
    force: bool,
    no_matter: tuple[str, ...] = _NO_MATTER,
) -> list[str]:
    """What is not as the run was started with: settings, or the data that they name, once these are read.

    Raises HestError (usage) that names them, unless forced. Settings that begin as ``no_matter`` says may
    differ.
    """
    changed = _changed(old.settings, settings.model_dump(mode="json"), no_matter)
    if data is not None and old.data_hash != data.identity:
        changed.append(f"the data {data.splits.name}, which hold other samples")
    if changed and not force:
        raise HestError(
            f"run {old.run_id} was started with other settings: {'; '.join(changed)}",
            "give the same settings, or --force to go on with the new ones",
            Exit.USAGE,
        )
    return changed


def _changed(
    old: Mapping[str, Any], new: Mapping[str, Any], no_matter: tuple[str, ...], prefix: str = ""
) -> list[str]:
    out: list[str] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            out += _changed(before, after, no_matter, f"{prefix}{key}.")
        elif before != after and not (prefix + key).startswith(no_matter):
            out.append(f"{prefix}{key} was {before}, now {after}")
    return out
