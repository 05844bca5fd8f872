"""What a training would work on, looked at without loading the backbone: its data, and its reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hestctl.data.articles import Available, available, is_hub_source, load_splits
from hestctl.data.examples import SPLITS
from hestctl.errors import HestError
from hestctl.model.methods import METHODS
from hestctl.records import Run
from hestctl.settings import Settings
from hestctl.store import queries
from hestctl.store.store import Store

_KEYS = {split: f"data.{split}_samples" for split in SPLITS}


@dataclass(frozen=True, slots=True)
class Preview:
    """``samples`` of each split, or None where only a download would tell; ``dataset`` is their name.

    ``reference`` is the tabs run that E_max would be a ratio of, by its settings; ``emax`` says in words
    where E_max would come from, and is None for a method without a budget.
    """

    dataset: str
    samples: Mapping[str, int] | None
    reference: Run | None
    emax: str | None


def preview(settings: Settings, store: Store) -> Preview:
    """Look at the data and at the store. Raises HestError as the training itself would."""
    if is_hub_source(settings.data):
        dataset, samples = settings.data.source, None
    else:
        splits = load_splits(settings.data, seed=0)
        dataset, samples = splits.name, {split: len(getattr(splits, split)) for split in SPLITS}
    reference, emax = _emax(settings, store, dataset)
    return Preview(dataset, samples, reference, emax)


def capped(settings: Settings, origins: Mapping[str, str]) -> str | None:
    """One line that says what of one's own data a profile leaves out; None where it leaves nothing out.

    ``origins`` says where each setting comes from: what a flag or the environment limits is wanted.
    """
    limits = {split: getattr(settings.data, f"{split}_samples") for split in SPLITS}
    by_profile = [split for split in SPLITS if limits[split] and origins[_KEYS[split]].startswith("profile")]
    if not by_profile:
        return None
    try:
        there = available(settings.data)
    except HestError:
        return None  # what is wrong with them is told by what reads them
    cut = [split for split in by_profile if split in there and there[split].samples > limits[split]]
    if not cut:
        return None
    told = ", ".join(f"{limits[split]:,} of {_told(there[split])} {_NAMES[split]}" for split in cut)
    all_of = " ".join(f"--set {_KEYS[split]}={there[split].rows}" for split in cut)
    return f"using {told} samples ({origins[_KEYS[cut[0]]]}); for all: {all_of}"


def _told(there: Available) -> str:
    return f"{'' if there.samples == there.rows else 'about '}{there.samples:,}"


_NAMES = {"train": "training", "validation": "validation", "test": "test"}


def _emax(settings: Settings, store: Store, dataset: str) -> tuple[Run | None, str | None]:
    budget = settings.budget
    if not METHODS[settings.method.name].budgeted:
        return None, None
    if budget.emax_j is not None:
        return None, f"{budget.emax_j:g} J a sample, given"
    if budget.reference is not None:
        named = queries.get_run(store, budget.reference)
        return named, f"{budget.emax_ratio:g} x tabs run {named.run_id}, as named"
    runs = queries.list_runs(store, command="train", method="tabs", status="finished")
    fit = [run for run in runs if run.steps and run.dataset == dataset and _alike(run, settings)]
    if fit:
        told = f"{budget.emax_ratio:g} x tabs run {fit[0].run_id}, by its settings"
        return fit[0], f"{told} (device and data are compared when the training begins)"
    others = f", {len(runs)} of others" if runs else ""
    told = f"{budget.emax_ratio:g} x TABS, predicted"
    return None, f"{told}: no finished tabs run of these settings in {store.db}{others}"


_OF_FILES = ("source", "train_file", "validation_file", "test_file")


def _alike(run: Run, settings: Settings) -> bool:
    """Whether the run was made with the same settings, as far as they bear on what a reference spends."""
    mine, theirs = settings.model_dump(mode="json"), run.settings
    pairs = [
        (mine[room][key], theirs.get(room, {}).get(key))
        for room, key in (
            *(("backbone", key) for key in ("name", "weights", "revision", "dtype")),
            *(("data", key) for key in mine["data"] if key not in _OF_FILES),
            *(("generation", key) for key in ("num_beams", "batch_size", "new_tokens")),
            ("method", "scope"),
        )
    ]
    own = theirs.get("backbone", {})
    free = own.get("precision", "full") == "full" and not own.get("skip_last", 0)
    return free and all(one == other for one, other in pairs)
