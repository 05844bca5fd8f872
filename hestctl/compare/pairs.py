"""Two configurations over the same samples: gap, its parts, and a verdict with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hestctl.compare import statistics
from hestctl.compare.loading import Entry
from hestctl.compare.measures import no_quality_reason
from hestctl.compare.results import Pair, Verdict
from hestctl.compare.statistics import FloatArray, IntArray, Measure, QualityVerdict, absent
from hestctl.records import EnergyKind

_SMALL = (
    f"too small beside the {100 * statistics.REPEATABILITY:g} % by which two runs of one model may differ"
)


@dataclass(frozen=True, slots=True)
class Quality:
    """The paired difference in points (first minus second) and what it says."""

    metric: str
    verdict: QualityVerdict
    difference: Measure
    detectable_points: float | None
    reason: str


class Matched:
    """The samples that two entries share, in one order; ``column`` gives finite paired values."""

    def __init__(self, first: Entry, second: Entry) -> None:
        _, left, right = np.intersect1d(
            np.array(first.samples.ids, dtype=str),
            np.array(second.samples.ids, dtype=str),
            return_indices=True,
        )
        self._left, self._right = left, right
        self._first, self._second = first.samples, second.samples

    def __len__(self) -> int:
        return len(self._left)

    def column(self, *names: str) -> tuple[list[FloatArray], list[FloatArray], IntArray]:
        """Values of both sides where all of ``names`` are finite on both, and their batches."""
        left = [self._first[name][self._left] for name in names]
        right = [self._second[name][self._right] for name in names]
        held = np.isfinite(np.vstack([*left, *right])).all(axis=0)
        batches = self._first.batches[self._left][held]
        return [values[held] for values in left], [values[held] for values in right], batches


def quality(first: Entry, second: Entry, margin: float) -> Quality:
    """Is ``first`` not inferior to ``second``? ``margin`` in points of 100."""
    classified = first.samples.labelled and second.samples.labelled
    metric, column, factor = (
        ("accuracy_percent", "correct", 100.0) if classified else ("rouge_lsum", "rouge_lsum", 1.0)
    )
    for member in (*first.members, *second.members):
        reason = no_quality_reason(member)
        if reason:
            return Quality(metric, "inconclusive", absent(reason), None, reason)
    (left,), (right,), _ = Matched(first, second).column(column)
    if not len(left):
        reason = "no sample was scored in both"
        return Quality(metric, "inconclusive", absent(reason), None, reason)
    difference = statistics.mean_difference(left, right)
    spread = left - right
    if classified:
        difference, spread = statistics.share_difference(spread), statistics.as_if_two_more(spread)
    difference = difference.scaled(factor)
    detectable = statistics.least_detectable_difference(spread * factor)
    verdict = statistics.quality_verdict(difference, margin)
    name = "accuracy" if classified else "ROUGE-Lsum"
    reason = f"{name} {_difference(difference)} points"
    if classified:
        chance = statistics.chance_level([str(label) for label in first.samples.labels])
        level = f"chance level {100 * chance:.1f} %"
        # Near chance there is nothing to be equal to: two coins agree as well as two models.
        if verdict == "not inferior" and _near_chance(left, chance):
            verdict = "inconclusive"
            reason += f"; {first.label} cannot be told from chance ({level})"
        else:
            reason += f" ({level})"
    if verdict == "inconclusive" and detectable is not None:
        reason += f"; the least difference that {len(left)} samples can show is {detectable:.2g} points"
    return Quality(metric, verdict, difference, detectable, reason)


def _near_chance(correct: FloatArray, chance: float) -> bool:
    return (statistics.wilson(float(correct.sum()), len(correct)).low or 0.0) <= chance


def pair(proposed: Entry, other: Entry, kind: EnergyKind, margin: float) -> Pair:
    """Compare ``proposed`` with ``other``; every number is of the samples both hold."""
    matched = Matched(proposed, other)
    score = quality(proposed, other, margin)
    (joules, tokens), (other_joules, other_tokens), batches = matched.column("energy_j", "new_tokens")
    metered = kind != "none" and len(joules) > 0
    no_joules = "no sample has joules on both sides" if len(matched) else "the two share no sample"
    ratio = statistics.ratio_of_means(joules, other_joules, batches) if metered else absent(no_joules)
    token_ratio, per_token = absent("no new tokens"), absent("no new tokens")
    length_part, token_part = None, None
    if tokens.sum() > 0 and other_tokens.sum() > 0:
        token_ratio = statistics.ratio_of_means(tokens, other_tokens, batches)
        if metered:
            per_token = statistics.ratio_of_ratios((joules, tokens), (other_joules, other_tokens), batches)
    gap = _gap(ratio, score, kind)
    if gap.value is not None and ratio.value and ratio.value > 0 and token_ratio.value:
        length_part, token_part = statistics.decompose(ratio.value, token_ratio.value)
    (latency,), (other_latency,), latency_batches = matched.column("latency_s")
    verdict, why = _verdict(ratio, score, kind, margin)
    time_ratio = statistics.ratio_of_means(latency, other_latency, latency_batches)
    (every_token,), (every_other_token,), _ = matched.column("new_tokens")
    equal_length = len(matched) > 0 and bool(np.array_equal(every_token, every_other_token))
    return Pair(
        proposed=proposed.label,
        other=other.label,
        other_role=other.config.role,
        proposed_run_ids=proposed.run_ids,
        other_run_ids=other.run_ids,
        samples=len(matched),
        quality_metric=score.metric,
        quality=score.verdict,
        quality_reason=score.reason,
        quality_difference=score.difference,
        least_detectable_points=score.detectable_points,
        ratio=ratio,
        token_ratio=token_ratio,
        per_token_ratio=per_token,
        gap_percent=gap,
        length_part_percent=length_part,
        token_part_percent=token_part,
        time_ratio=time_ratio,
        latency_p99_ratio=statistics.percentile_ratio(latency, other_latency, 99, latency_batches),
        scope_ratio=_scope_ratio(proposed, other, matched),
        break_even_samples=_break_even(proposed, other, ratio, joules, other_joules, kind),
        equal_length=equal_length,
        at_equal_length=_at_equal_length(equal_length, bool(every_token.any()), verdict, per_token, kind),
        verdict=verdict,
        why=why,
        notes=_notes(proposed, other),
    )


def _gap(ratio: Measure, score: Quality, kind: EnergyKind) -> Measure:
    if kind == "none":
        return absent("there was no energy meter")
    if kind == "estimated":
        return absent("the joules are estimated, not measured")
    if ratio.value is None:
        return absent(ratio.reason or "no joules on both sides")
    if score.verdict != "not inferior":
        return absent(f"quality is {score.verdict}")
    low = None if ratio.high is None else 100 * (1 - ratio.high)
    high = None if ratio.low is None else 100 * (1 - ratio.low)
    return Measure(100 * (1 - ratio.value), low, high, ratio.n)


def _verdict(ratio: Measure, score: Quality, kind: EnergyKind, margin: float) -> tuple[Verdict, str]:
    if kind != "measured":
        word = "estimated" if kind == "estimated" else "not measured"
        return "inconclusive", f"the joules are {word}; {score.reason}"
    if ratio.value is None:
        return "inconclusive", f"{ratio.reason}; {score.reason}"
    energy = statistics.energy_verdict(ratio)
    joules = _saving(ratio)
    if energy == "more":
        return "more energy", f"{joules}; {score.reason}"
    if energy == "same":
        return "no difference", f"{joules}, within what two runs of one model differ by; {score.reason}"
    if energy == "unclear":
        beyond = (ratio.high or 1.0) < 1 or (ratio.low or 1.0) > 1
        cause = _SMALL if beyond else "the samples are too few or too noisy to tell"
        return "inconclusive", f"{joules}: {cause}; {score.reason}"
    if score.verdict == "not inferior":
        return "less energy at equal quality", f"{joules}; {score.reason}, within the margin of {margin:g}"
    if score.verdict == "inferior":
        return "less energy, worse quality", f"{joules}; {score.reason}, beyond the margin of {margin:g}"
    return "inconclusive", f"{joules}, but quality is undecided: {score.reason}"


def _at_equal_length(
    equal_length: bool, written: bool, verdict: Verdict, per_token: Measure, kind: EnergyKind
) -> str:
    if equal_length and not written:
        return f"at equal length: {verdict} (labels are scored: no token was written)"
    if equal_length:
        return f"at equal length: {verdict} (both wrote the same number of tokens)"
    if kind != "measured" or per_token.value is None:
        return "at equal length: not measured"
    return f"at equal length: not measured (the outputs differ in length); per new token {_saving(per_token)}"


def _scope_ratio(proposed: Entry, other: Entry, matched: Matched) -> Measure:
    if other.config.role == "base" or other.config.method == "lora":
        return absent(f"the budget counts nothing of {other.config.method}")
    if _budgets_differ(proposed, other):
        scopes = f"{proposed.config.scope or 'none'} and {other.config.scope or 'none'}"
        return absent(f"the budgets count different things: scopes {scopes}")
    (scope,), (other_scope,), batches = matched.column("scope_energy_j")
    if not len(scope):
        return absent("no scope joules on both sides")
    return statistics.ratio_of_means(scope, other_scope, batches)


def _budgets_differ(proposed: Entry, other: Entry) -> bool:
    return bool(other.config.scope) and proposed.config.scope != other.config.scope


def _break_even(
    proposed: Entry,
    other: Entry,
    ratio: Measure,
    joules: FloatArray,
    other_joules: FloatArray,
    kind: EnergyKind,
) -> Measure:
    if kind != "measured":
        return absent("the joules are not measured")
    if statistics.energy_verdict(ratio) != "less":
        return absent("no saving is shown")
    spent, other_spent = _training_joules(proposed), _training_joules(other)
    if spent is None or (other_spent is None and other.config.role != "base"):
        return absent("the training joules of one side were not measured")
    saved = float(other_joules.mean() - joules.mean())
    return Measure(float(max(0, math.ceil((spent - (other_spent or 0.0)) / saved))), n=len(joules))


def _training_joules(entry: Entry) -> float | None:
    spent = [member.run.train_energy_j for member in entry.members]
    known = [joules for joules in spent if joules is not None]
    return sum(known) / len(known) if len(known) == len(spent) else None


def _notes(proposed: Entry, other: Entry) -> tuple[str, ...]:
    notes = []
    steps = [sorted({member.run.steps or 0 for member in entry.members}) for entry in (proposed, other)]
    if other.config.role != "base" and steps[0] != steps[1]:
        first, second = (", ".join(map(str, counts)) for counts in steps)
        notes.append(f"{proposed.label} was trained for {first} steps, {other.label} for {second}")
    for entry in (proposed, other):
        if len(entry.members) > 1:
            notes.append(f"{entry.label} is the mean of {len(entry.members)} seeds")
    if _budgets_differ(proposed, other):
        notes.append(f"{proposed.label} and {other.label} count different scopes: joules of the meter alone")
    return tuple(notes)


def _saving(ratio: Measure) -> str:
    percent = 100 * (1 - (ratio.value or 0.0))
    word = "fewer" if percent >= 0 else "more"
    text = f"{abs(percent):.1f} % {word} joules"
    if ratio.low is None or ratio.high is None:
        return text
    edges = sorted((100 * (1 - ratio.low), 100 * (1 - ratio.high)))
    if percent < 0:
        edges = sorted(-edge for edge in edges)
    return f"{text} [{edges[0]:.1f}, {edges[1]:.1f}]"


def _difference(difference: Measure) -> str:
    text = f"{difference.value:+.2f}"
    if difference.low is None or difference.high is None:
        return text
    return f"{text} [{difference.low:+.2f}, {difference.high:+.2f}]"
