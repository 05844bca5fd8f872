"""Runs with their samples: which run counts, what each is called, and which belong together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from hestctl.compare.results import Role, SetApart
from hestctl.compare.statistics import FloatArray, IntArray, pool_seeds
from hestctl.records import Run

BASELINES: Final = ("tabs", "bhsp", "lora")
_BUDGETED: Final = ("hest", "tabs", "bhsp")
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
    predictions: tuple[str | None, ...]

    def __getitem__(self, name: str) -> FloatArray:
        return self.columns[name]

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


@dataclass(frozen=True, slots=True)
class Entry:
    """One configuration with all its seeds; ``samples`` are pooled over them."""

    config: Config
    label: str
    members: tuple[Loaded, ...]
    samples: Samples

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
    if method != "hest":
        return Config(method, role, scope=scope, control=control)
    budget = "" if run.emax_j is None else f"{run.emax_j:.4g} J predicted"
    if run.emax_ratio is not None:
        budget = f"{run.emax_ratio:g}"
    names = run.precision or "", run.dual or "", run.controller or ""
    return Config(method, role, *names, scope, budget, control)


def entries(members: Iterable[Loaded]) -> tuple[list[Entry], list[SetApart]]:
    """Configurations in the order of print, and the older duplicates they supersede."""
    latest: dict[tuple[Config, int | None], Loaded] = {}
    superseded: list[tuple[Loaded, Loaded]] = []
    for member in sorted(members, key=lambda one: (one.run.created_at, one.run.run_id)):
        config = config_of(member.run)
        if config is None:
            continue
        key = (config, member.run.seed)
        if key in latest:
            superseded.append((latest[key], member))
        latest[key] = member
    seeds: dict[Config, list[Loaded]] = defaultdict(list)
    for (config, _), member in latest.items():
        seeds[config].append(member)
    labels = _labels(list(seeds))
    ordered = sorted(seeds, key=lambda config: (_ROLES.index(config.role), _rank(config), labels[config]))
    made = [
        Entry(config, labels[config], tuple(seeds[config]), _pooled([one.samples for one in seeds[config]]))
        for config in ordered
    ]
    older = [
        SetApart(
            old.run.run_id,
            plain_label(old.run),
            "superseded",
            f"{new.run.run_id} is later and of the same kind",
        )
        for old, new in superseded
    ]
    return made, older


def plain_label(run: Run) -> str:
    """A run's label by itself, such as ``hest 0.6``."""
    config = config_of(run)
    return _label(config, with_budget=True) if config else run.method or "unknown method"


def _label(config: Config, with_budget: bool) -> str:
    parts = [config.method]
    if with_budget and config.budget:
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
    ablations = Counter(_label(config, False) for config in configs if config.role == "ablation")
    labels = {
        config: _label(config, with_budget=config.role != "ablation" or ablations[_label(config, False)] > 1)
        for config in configs
    }
    for label, count in Counter(labels.values()).items():
        if count == 1:
            continue
        alike = [config for config in configs if labels[config] == label]
        for name in ("scope", "dual", "precision", "controller", "budget"):
            if len({getattr(config, name) for config in alike}) > 1:
                for config in alike:
                    labels[config] = f"{labels[config]} {getattr(config, name) or f'no {name}'}"
    return labels


def _rank(config: Config) -> tuple[int, str]:
    order = ("hest", *BASELINES)
    return (order.index(config.method) if config.method in order else len(order), config.budget)


def _pooled(samples: Sequence[Samples]) -> Samples:
    if len(samples) == 1:
        return samples[0]
    names = tuple(samples[0].columns)
    tables = [np.column_stack([one[name] for name in names]) for one in samples]
    ids, table = pool_seeds([one.ids for one in samples], tables)
    first = {name: place for place, name in enumerate(samples[0].ids)}
    kept = [first[name] for name in ids]
    return Samples(
        tuple(ids),
        samples[0].batches[kept],
        {name: table[:, place] for place, name in enumerate(names)},
        tuple(samples[0].labels[place] for place in kept),
        tuple(None for _ in kept),
    )


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
