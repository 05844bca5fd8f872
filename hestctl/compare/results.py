"""What a comparison consists of: plain frozen data, units in the names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from hestctl.compare.decisions import ENERGY_WORDS, EnergyVerdict, QualityVerdict
from hestctl.compare.statistics import Measure, absent
from hestctl.records import EnergyKind

Role: TypeAlias = Literal["proposed", "ablation", "baseline", "control", "base"]
Task: TypeAlias = Literal["summarisation", "classification"]
Verdict: TypeAlias = Literal[
    "less energy at equal quality",
    "less energy, worse quality",
    "more energy",
    "no difference",
    "inconclusive",
]
Outcome: TypeAlias = Literal["confirmed", "refuted", "not measured"]

PRIMARY = "energy_j_per_sample"


@dataclass(frozen=True, slots=True)
class Metric:
    """A column: its title, its unit, and where its joules come from when it has any.

    ``source`` is ``meter`` (measured or estimated, as the run says), ``table`` (predicted from the
    energy table and the states that were applied) or ``None`` (no joules).
    """

    title: str
    unit: str
    source: Literal["meter", "table"] | None = None


METRICS: Mapping[str, Metric] = {
    PRIMARY: Metric("joules per sample", "J", "meter"),
    "energy_net_j_per_sample": Metric("joules per sample, net of idle", "J", "meter"),
    "energy_error_j_per_sample": Metric("error bound of one sample's joules, mean", "J", "meter"),
    "prefill_j_per_sample": Metric("prefill joules per sample, apportioned", "J", "meter"),
    "decode_j_per_sample": Metric("decode joules per sample, apportioned", "J", "meter"),
    "energy_j_per_new_token": Metric("joules per new token", "J", "meter"),
    "new_tokens_per_sample": Metric("new tokens per sample", "tokens"),
    "latency_p50_s": Metric("latency, p50", "s"),
    "latency_p99_s": Metric("latency, p99", "s"),
    "tokens_per_s": Metric("new tokens per second", "tokens/s"),
    "rouge_lsum": Metric("ROUGE-Lsum", "points"),
    "rouge_l": Metric("ROUGE-L", "points"),
    "rouge1": Metric("ROUGE-1", "points"),
    "rouge2": Metric("ROUGE-2", "points"),
    "accuracy_percent": Metric("accuracy", "%"),
    "chance_percent": Metric("chance level", "%"),
    "answer_nll_nats": Metric("answer NLL", "nats/token"),
    "scope_energy_j_per_sample": Metric("scope joules per sample", "J", "table"),
    "emax_j_per_sample": Metric("E_max per sample", "J", "table"),
    "emax_use_percent": Metric("scope joules of E_max, mean", "%", "table"),
    "emax_use_worst_percent": Metric("scope joules of E_max, worst", "%", "table"),
    "over_budget_percent": Metric("samples over E_max", "%", "table"),
    "meter_of_predicted_percent": Metric("joules per sample of those predicted", "%", "meter"),
    "meter_of_emax_percent": Metric("joules per sample of E_max", "%", "meter"),
    "controller_parameters": Metric("controller parameters", "parameters"),
    "adapter_parameters": Metric("adapter parameters", "parameters"),
    "train_energy_j": Metric("training joules", "J", "meter"),
    "train_time_s": Metric("training time", "s"),
}
"""Every measure of a run, in the order of print; the names carry the units."""


@dataclass(frozen=True, slots=True)
class Row:
    """One run that counts: its label, its role and its measures (keys of ``METRICS``)."""

    run_id: str
    store: str
    method: str
    label: str
    config_label: str
    role: Role
    scope: str | None
    seed: int | None
    dtype: str | None
    created_at: str
    steps: int | None
    samples: int
    energy_method: str | None
    measures: Mapping[str, Measure]
    notes: tuple[str, ...] = ()

    def measure(self, name: str) -> Measure:
        """The measure ``name``, absent with a reason where the run cannot have it."""
        return self.measures.get(name, absent("does not apply to this task"))


@dataclass(frozen=True, slots=True)
class Claim:
    """One-sided p-values of "less energy at equal quality", held against ``decisions.ALPHA``.

    ``energy`` is of fewer joules beyond repeatability, ``quality`` of not being inferior, ``both`` the larger
    of them: the claim needs both to hold. ``adjusted_energy`` and ``adjusted`` are ``energy`` and ``both``
    after Holm, over ``family`` pairs.
    ``None``: there is nothing to test.
    """

    energy: float | None
    quality: float | None
    both: float | None = None
    adjusted_energy: float | None = None
    adjusted: float | None = None
    family: int = 0


@dataclass(frozen=True, slots=True)
class Pair:
    """Two configurations over the samples both generated; intervals hold samples and, where several, seeds.

    ``ratio`` is joules of ``proposed`` over joules of ``other``; ``gap_percent`` is its saving, with
    ``length_part_percent`` and ``token_part_percent`` adding up to it. ``at_equal_length`` is the
    verdict where both wrote equally many tokens, of their own accord or forced to
    (``forced_length_ratio``, from profile runs), else why there is none and the joules per token.
    ``meter_error_percent`` is by how much the meter's error bounds of both sides may shift ``ratio``.
    ``sample_share`` is the samples' part (0 to 1) of the square of ``least_detectable_points``; the seeds
    make the rest.
    """

    proposed: str
    other: str
    other_role: Role
    proposed_run_ids: tuple[str, ...]
    other_run_ids: tuple[str, ...]
    samples: int
    quality_metric: str
    quality: QualityVerdict
    quality_reason: str
    quality_difference: Measure
    least_detectable_points: float | None
    ratio: Measure
    least_detectable_saving_percent: float | None
    meter_error_percent: float | None
    token_ratio: Measure
    per_token_ratio: Measure
    forced_length_ratio: Measure
    gap_percent: Measure
    length_part_percent: float | None
    token_part_percent: float | None
    time_ratio: Measure
    latency_p99_ratio: Measure
    scope_ratio: Measure
    break_even_samples: Measure
    equal_length: bool
    at_equal_length: str
    claim: Claim
    verdict: Verdict
    why: str
    notes: tuple[str, ...] = ()
    sample_share: float | None = None


@dataclass(frozen=True, slots=True)
class Repeat:
    """An A/A pair: two runs of one model, ``ratio`` the joules of the later over those of the earlier.

    ``energy`` and ``quality`` are what the comparison calls their difference, at the fixed repeatability;
    estimated joules are called nothing.
    """

    label: str
    kind: str
    run_ids: tuple[str, str]
    samples: int
    ratio: Measure
    energy: EnergyVerdict | None
    quality_metric: str
    quality_difference: Measure
    quality: QualityVerdict

    @property
    def energy_word(self) -> str:
        return "no verdict" if self.energy is None else ENERGY_WORDS[self.energy]


@dataclass(frozen=True, slots=True)
class Repeatability:
    """The relative difference in joules that two runs of one model are granted, and where it is from."""

    value: float
    reason: str


@dataclass(frozen=True, slots=True)
class Best:
    """The configuration that stands for its side: ``value`` joules per sample, seeds pooled."""

    label: str
    run_id: str
    run_ids: tuple[str, ...]
    value: float


@dataclass(frozen=True, slots=True)
class Gap:
    """Percent fewer joules, or no number and why."""

    percent: Measure
    reason: str | None


@dataclass(frozen=True, slots=True)
class SetApart:
    """A run that does not count here, and why."""

    run_id: str
    label: str
    kind: Literal["superseded", "not comparable", "unfinished", "without samples"]
    reason: str


@dataclass(frozen=True, slots=True)
class Expectation:
    """One line of what the original sketch expected, and what the rows say of it."""

    text: str
    outcome: Outcome
    reason: str


@dataclass(frozen=True, slots=True)
class ProfileRun:
    """A profile run that measured the configuration of a row, by sequence length."""

    run_id: str
    store: str
    label: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs that may be compared with one another, and what follows from them.

    ``facts`` is what all of them share (device, backbone, data, generation settings, meter).
    ``equal_quality`` is each configuration's verdict beside ``best_baseline``, by its label, and
    ``quality_differences`` the points (configuration less baseline) that it rests on.
    """

    task: Task
    facts: Mapping[str, str]
    energy_kind: EnergyKind
    margin_points: float
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]
    best_proposed: Best | None
    best_baseline: Best | None
    best_control: Best | None
    gap: Gap
    gap_vs_controls: Gap
    repeatability: Repeatability
    estimated_time_ratio: Measure
    conclusion: str
    equal_quality: Mapping[str, QualityVerdict] = field(default_factory=dict)
    quality_differences: Mapping[str, Measure] = field(default_factory=dict)
    repeats: tuple[Repeat, ...] = ()
    set_apart: tuple[SetApart, ...] = ()
    expectations: tuple[Expectation, ...] = ()
    profile_runs: tuple[ProfileRun, ...] = ()

    @property
    def quality_metric(self) -> str:
        """The score that decides equal quality: a key of ``METRICS``, in points of 100."""
        return "accuracy_percent" if self.task == "classification" else "rouge_lsum"

    @property
    def energy_word(self) -> str:
        """The word that stands beside a joule of the meter: measured, estimated or not measured."""
        return "not measured" if self.energy_kind == "none" else self.energy_kind
