"""Runs with their samples: which run counts, what each is called, and which belong together."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final

import numpy as np

from hestctl.compare.results import Role
from hestctl.compare.statistics import FloatArray, IntArray
from hestctl.records import Run
from hestctl.settings import flatten

BASELINES: Final = ("tabs", "bhsp", "lora")
_BUDGETED: Final = ("hest", "tabs", "bhsp")
_TOLD_APART: Final = frozenset(
    [
        *(f"method.{name}" for name in ("name", "scope", "layers", "controller", "precision")),
        *(f"budget.{name}" for name in ("emax_ratio", "emax_j", "reference", "dual")),
        *(
            f"train.{name}"
            for name in ("seed", "save_steps", "log_steps", "keep_checkpoints", "rank_timeout_s")
        ),
    ]
)
"""Settings that a configuration names itself, and those that leave the trained model as it is."""
_NAMED: Final = 2
"""Most settings that a label spells out."""
_ROLES: Final[Sequence[Role]] = ("proposed", "ablation", "baseline", "control", "base")


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples of one run, or of several seeds pooled; NaN is "not measured".

    ``columns`` holds the numeric fields of ``records.Sample`` under their own names, and
    ``correct`` (0 to 1) for classification. ``batches`` numbers the generated batches.
    """

    ids: tuple[str, ...]
    batches: IntArray
    columns: Mapping[str, FloatArray]
    labels: tuple[str | None, ...]

    def __getitem__(self, name: str) -> FloatArray:
        return self.columns[name]

    def take(self, places: Sequence[int]) -> Samples:
        """These samples alone, in this order."""
        return Samples(
            tuple(self.ids[place] for place in places),
            self.batches[places],
            {name: values[places] for name, values in self.columns.items()},
            tuple(self.labels[place] for place in places),
        )

    @property
    def labelled(self) -> bool:
        """Whether this is classification: every sample has a true label."""
        return bool(self.labels) and all(label is not None for label in self.labels)


@dataclass(frozen=True, slots=True)
class Loaded:
    """One finished train run with the samples of its test split."""

    run: Run
    store: str
    split: str
    samples: Samples
    energy_reason: str | None
    energy_method: str | None
    invalid_windows: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, order=True)
class Config:
    """What tells one row from another, the seed apart."""

    method: str
    role: Role
    precision: str = ""
    dual: str = ""
    controller: str = ""
    scope: str = ""
    budget: str = ""
    control: str = ""
    settings: tuple[tuple[str, str], ...] = ()
    """Dotted keys and values (JSON) of what else a training depends on, such as its learning rate."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One configuration with all its seeds; ``samples`` are means over the seeds.

    ``by_seed`` has the same samples in the same order, seed by seed in the order of ``members``.
    """

    config: Config
    label: str
    members: tuple[Loaded, ...]
    samples: Samples
    by_seed: tuple[Samples, ...]

    @classmethod
    def of(cls, config: Config, label: str, members: Sequence[Loaded]) -> Entry:
        """The entry of these runs, over the samples that all of them hold."""
        by_seed = _aligned([one.samples for one in members])
        return cls(config, label, tuple(members), _pooled(by_seed), by_seed)

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """The seeds of training, as ``members`` are ordered; a model that is not trained has none."""
        return () if self.config.method == "base" else tuple(one.run.seed for one in self.members)

    @property
    def run_ids(self) -> tuple[str, ...]:
        return tuple(member.run.run_id for member in self.members)

    def row_label(self, member: Loaded) -> str:
        """The label of one run; it names the seed where there are several."""
        return self.label if len(self.members) == 1 else f"{self.label} seed {member.run.seed}"


def facts(loaded: Loaded) -> dict[str, str]:
    """What two runs must share before their joules may stand side by side."""
    run = loaded.run
    # Boards of one model differ by up to 5 %: the UUID, not the name, makes the device.
    device = " ".join(filter(None, (run.device_name, f"({run.device_uuid})" if run.device_uuid else None)))
    values: dict[str, object] = {
        "device": device or None,
        "backbone": run.backbone,
        "weights": run.weights,
        "dtype": run.dtype,
        "dataset": run.dataset,
        "data hash": run.data_hash,
        "split": loaded.split,
        "engine": run.engine,
        "beams": run.num_beams,
        "new tokens at most": run.max_new_tokens,
        "batch size": run.batch_size,
        "meter": run.meter,
        "energy kind": run.energy_kind or "none",
    }
    return {name: "not recorded" if value is None else str(value) for name, value in values.items()}


def config_of(run: Run) -> Config | None:
    """The configuration of a run, ``None`` for a method this program does not know."""
    method = run.method or ""
    if method not in ("hest", *BASELINES, "base"):
        return None
    ablated = run.precision == "fp16-only" or run.dual == "none" or run.controller == "unfactorised"
    role: Role
    control = _control(run)
    if control:
        role = "control"
    elif method == "hest":
        role = "ablation" if ablated else "proposed"
    else:
        role = "base" if method == "base" else "baseline"
    scope = run.scope or "" if method in _BUDGETED else ""
    settings = _trained_with(run)
    if method != "hest":
        return Config(method, role, scope=scope, control=control, settings=settings)
    budget = "" if run.emax_j is None else f"{run.emax_j:.4g} J predicted"
    if run.emax_ratio is not None:
        budget = f"{run.emax_ratio:g}"
    names = run.precision or "", run.dual or "", run.controller or ""
    return Config(method, role, *names, scope, budget, control, settings)


def entries(members: Iterable[Loaded]) -> tuple[list[Entry], list[tuple[Loaded, Loaded]]]:
    """Configurations in the order of print, and each older duplicate with the run that supersedes it."""
    latest: dict[tuple[Config, int | None], Loaded] = {}
    superseded: list[tuple[Config, Loaded]] = []
    for member in sorted(members, key=lambda one: (one.run.created_at, one.run.run_id)):
        config = config_of(member.run)
        if config is None:
            continue
        key = (config, member.run.seed)
        if key in latest:
            superseded.append((config, latest[key]))
        latest[key] = member
    seeds: dict[Config, list[Loaded]] = defaultdict(list)
    for (config, _), member in latest.items():
        seeds[config].append(member)
    labels = _labels(list(seeds))
    ordered = sorted(seeds, key=lambda config: (_ROLES.index(config.role), _rank(config), labels[config]))
    return [Entry.of(config, labels[config], seeds[config]) for config in ordered], [
        (old, latest[config, old.run.seed]) for config, old in superseded
    ]


def plain_label(run: Run) -> str:
    """A run's label by itself, such as ``hest 0.6``."""
    config = config_of(run)
    return _label(config) if config else run.method or "unknown method"


def _label(config: Config) -> str:
    parts = [config.method]
    if config.budget:
        parts.append(config.budget)
    if config.precision == "fp16-only":
        parts.append("fp16-only")
    if config.dual == "none":
        parts.append("no dual")
    if config.controller == "unfactorised":
        parts.append("unfactorised")
    if config.role == "control":
        parts.append(f"{config.control} control")
    return " ".join(parts)


def _labels(configs: Sequence[Config]) -> dict[Config, str]:
    labels = {config: _label(config) for config in configs}
    for label, count in Counter(labels.values()).items():
        if count == 1:
            continue
        alike = [config for config in configs if labels[config] == label]
        for name in ("scope", "dual", "precision", "controller", "budget"):
            if len({getattr(config, name) for config in alike}) > 1:
                for config in alike:
                    labels[config] = f"{labels[config]} {getattr(config, name) or f'no {name}'}"
    for label, count in Counter(labels.values()).items():
        if count > 1:
            labels.update(_apart([config for config in labels if labels[config] == label], label))
    return labels


def _apart(alike: Sequence[Config], label: str) -> dict[Config, str]:
    """Labels of configurations that differ in other settings: by these if they are few, else numbered."""
    settings = [dict(config.settings) for config in alike]
    differing = sorted(key for key in {*chain(*settings)} if len({held.get(key) for held in settings}) > 1)
    if len(differing) > _NAMED:
        return {config: f"{label} settings {place}" for place, config in enumerate(alike, 1)}
    return {
        config: " ".join(
            (label, *(f"{key.rpartition('.')[2]} {held.get(key, 'not recorded')}" for key in differing))
        )
        for config, held in zip(alike, settings, strict=True)
    }


def _trained_with(run: Run) -> tuple[tuple[str, str], ...]:
    """What the training of a run hangs on beside what ``Config`` names; nothing for ``base``."""
    if run.method == "base":
        return ()
    sections = ("train.", "method.", "budget.") if run.method == "hest" else ("train.", "method.")
    return tuple(
        sorted(
            (key, json.dumps(value))
            for key, value in flatten(run.settings)
            if key.startswith(sections) and key not in _TOLD_APART
        )
    )


def _rank(config: Config) -> tuple[int, str]:
    order = ("hest", *BASELINES)
    return (order.index(config.method) if config.method in order else len(order), config.budget)


def _aligned(samples: Sequence[Samples]) -> tuple[Samples, ...]:
    """The samples that all seeds hold, in the order of the first."""
    if all(one.ids == samples[0].ids for one in samples):
        return tuple(samples)
    shared = set(samples[0].ids).intersection(*(one.ids for one in samples[1:]))
    kept = [name for name in samples[0].ids if name in shared]
    places = [{name: place for place, name in enumerate(one.ids)} for one in samples]
    return tuple(one.take([place[name] for name in kept]) for one, place in zip(samples, places, strict=True))


def _pooled(by_seed: Sequence[Samples]) -> Samples:
    """Means over seeds; a value that one seed lacks is lacking: no mean is over unequal samples."""
    first = by_seed[0]
    if len(by_seed) == 1:
        return first
    columns = {name: np.mean([one[name] for one in by_seed], axis=0) for name in first.columns}
    return replace(first, columns=columns)


def _control(run: Run) -> str:
    """What kind of control a run is: what fixed the states of its blocks; empty for one that is none."""
    backbone, method = (run.settings.get(room) for room in ("backbone", "method"))
    parts = []
    if isinstance(backbone, Mapping):
        if backbone.get("precision") == "int8":
            parts.append("int8")
        if backbone.get("skip_last"):
            parts.append(f"last {backbone['skip_last']} off")
    if not parts and isinstance(method, Mapping):
        greedy = (method.get("name"), method.get("scope"), method.get("layers"))
        if greedy == ("hest", "network", "greedy"):
            parts.append("greedy")
    return ", ".join(parts)
