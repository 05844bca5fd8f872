"""Two configurations over the same samples: gap, its parts, and a verdict with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hestctl.compare import decisions, statistics, verdicts
from hestctl.compare.forced import Forced, forced_ratio
from hestctl.compare.loading import Entry
from hestctl.compare.matching import Matched
from hestctl.compare.measures import no_quality_reason
from hestctl.compare.notes import budgets_differ, notes
from hestctl.compare.results import Claim, Pair, Repeatability, Role
from hestctl.compare.statistics import Estimate, FloatArray, Measure, absent
from hestctl.compare.verdicts import Energy, Quality
from hestctl.records import EnergyKind

_FAMILIES: Sequence[tuple[Role, ...]] = (("baseline", "control"), ("ablation",), ("base",))


@dataclass(frozen=True, slots=True)
class _Evidence:
    """What the samples of two entries say, before the other pairs of its family are known."""

    proposed: Entry
    other: Entry
    matched: Matched
    quality: Quality
    energy: Energy
    claim: Claim


def compare_pairs(
    proposed: Sequence[Entry],
    others: Sequence[Entry],
    kind: EnergyKind,
    margin: float,
    repeatability: Repeatability,
    forced: Mapping[str, Forced],
) -> list[Pair]:
    """Every proposed configuration against every other that it may be held against, over the samples of both.

    Their claims of less energy, and of less energy at equal quality, are adjusted together: a false one among
    all has the chance of one. Ablations, and the untrained model, ask other questions and are families of
    their own. ``forced`` is of profile runs, by label.
    """
    found = [
        _evidence(one, other, kind, margin, repeatability)
        for one in proposed
        for other in others
        if answers(one, other)
    ]
    for roles in _FAMILIES:
        family = [
            place
            for place, one in enumerate(found)
            if one.other.config.role in roles and one.claim.both is not None
        ]
        claims = [found[place].claim for place in family]
        fewer = decisions.holm([claim.energy or 0.0 for claim in claims])
        both = decisions.holm([claim.both or 0.0 for claim in claims])
        for place, claim, p_fewer, p_both in zip(family, claims, fewer, both, strict=True):
            adjusted = replace(claim, adjusted_energy=p_fewer, adjusted=p_both, family=len(family))
            found[place] = replace(found[place], claim=adjusted)
    chosen: tuple[str, ...] = ()
    if len(proposed) > 1 and kind == "measured":
        chosen = (
            f"the best of {len(proposed)} proposed configurations is chosen by these joules: verdicts are "
            "corrected for that (Holm), intervals are not",
        )
    made = [_pair(one, kind, margin, repeatability, forced) for one in found]
    return [replace(one, notes=(*one.notes, *chosen)) for one in made]


def answers(proposed: Entry, other: Entry) -> bool:
    """Whether the pair answers a question.

    An ablation is the proposed method without a part: it is held against the very budget it was trained
    under. Budgets of two scopes count different things and are never held against each other.
    """
    if other.config.role == "ablation":
        return (other.config.budget, other.config.scope) == (proposed.config.budget, proposed.config.scope)
    return not other.config.budget or other.config.scope == proposed.config.scope


def quality(first: Entry, second: Entry, margin: float) -> Quality:
    """Is ``first`` not inferior to ``second``? ``margin`` in points of 100."""
    return _quality(first, second, Matched(first, second), margin)


def _quality(first: Entry, second: Entry, matched: Matched, margin: float) -> Quality:
    classified = first.samples.labelled and second.samples.labelled
    metric, column, factor = (
        ("accuracy_percent", "correct", 100.0) if classified else ("rouge_lsum", "rouge_lsum", 1.0)
    )
    reasons = [reason for one in (*first.members, *second.members) if (reason := no_quality_reason(one))]
    paired = matched.paired(column)
    if reasons or not len(paired):
        reason = reasons[0] if reasons else "no sample was scored in both"
        return Quality(metric, "inconclusive", absent(reason), None, None, reason)
    estimate = paired.difference(column, factor, of_shares=classified)
    difference = estimate.measure()
    detectable = decisions.least_detectable_difference(estimate)
    verdict, p = decisions.quality_verdict(difference, margin), decisions.p_not_inferior(estimate, margin)
    reason = f"{'accuracy' if classified else 'ROUGE-Lsum'} {verdicts.points(difference)} points"
    if classified:
        chance = statistics.chance_level([str(label) for label in first.samples.labels])
        level = f"chance level {100 * chance:.1f} %"
        # Near chance there is nothing to be equal to: two coins agree as well as two models.
        if verdict == "not inferior" and _near_chance(paired.pooled(column)[0], chance):
            verdict, p = "inconclusive", 1.0
            reason += f"; {first.label} cannot be told from chance ({level})"
        else:
            reason += f", {level}"
    elif verdict == "not inferior" and float(paired.pooled(column)[1].mean()) <= margin:
        # A model that scores nothing would pass as well.
        verdict, p = "inconclusive", 1.0
        reason += f"; {second.label} itself scores no more than the margin of {margin:g}"
    if detectable is not None:
        reason += f" (the least difference that {len(paired)} samples can show is {detectable:.2g} points)"
    share = decisions.sample_share(estimate)
    return Quality(metric, verdict, difference, p, detectable, reason, share)


def _near_chance(correct: FloatArray, chance: float) -> bool:
    return (statistics.wilson(float(correct.sum()), len(correct)).low or 0.0) <= chance


def _evidence(
    proposed: Entry, other: Entry, kind: EnergyKind, margin: float, repeatability: Repeatability
) -> _Evidence:
    matched = Matched(proposed, other)
    score, energy = _quality(proposed, other, matched, margin), _energy(proposed, other, matched, kind)
    claim = verdicts.claim(energy, score, kind, repeatability)
    return _Evidence(proposed, other, matched, score, energy, claim)


def _energy(proposed: Entry, other: Entry, matched: Matched, kind: EnergyKind) -> Energy:
    paired = matched.paired("energy_j", "new_tokens")
    if kind == "none" or not len(paired):
        reason = "no sample has joules on both sides" if len(matched) else "the two share no sample"
        return Energy(Estimate(None, reason=reason), 0)
    bounds = [bound for entry in (proposed, other) if (bound := _meter_error(entry)) is not None]
    # Errors of two runs need not have one sign.
    return Energy(paired.ratio("energy_j"), len(np.unique(paired.batches)), sum(bounds) if bounds else None)


def _meter_error(entry: Entry) -> float | None:
    """The meter's error bounds of an entry's samples as a share of their joules."""
    joules, bound = entry.samples["energy_j"], entry.samples["energy_error_j"]
    held = np.isfinite(joules) & np.isfinite(bound)
    spent = float(joules[held].sum())
    return float(bound[held].sum()) / spent if spent > 0 else None


def _pair(
    found: _Evidence,
    kind: EnergyKind,
    margin: float,
    repeatability: Repeatability,
    forced: Mapping[str, Forced],
) -> Pair:
    proposed, other, matched = found.proposed, found.other, found.matched
    score, energy = found.quality, found.energy
    ratio = energy.measure
    paired = matched.paired("energy_j", "new_tokens")
    token_ratio, per_token = absent("no new tokens"), absent("no new tokens")
    if all(tokens.sum() > 0 for tokens in paired.pooled("new_tokens")):
        token_ratio = paired.ratio("new_tokens").measure()
        if ratio.value is not None:
            per_token = paired.ratio("energy_j", per="new_tokens").measure()
    gap = _gap(ratio, score, kind)
    length_part, token_part = None, None
    if gap.value is not None and ratio.value and token_ratio.value:
        length_part, token_part = statistics.decompose(ratio.value, token_ratio.value)
    verdict, why = verdicts.verdict(energy, score, found.claim, kind, margin, repeatability)
    timed, written = matched.paired("latency_s"), matched.paired("new_tokens")
    joules = paired.pooled("energy_j")
    tokens, other_tokens = written.pooled("new_tokens")
    equal_length = len(matched) > 0 and np.array_equal(tokens, other_tokens)
    unmetered = absent(f"the joules are {'estimated' if kind == 'estimated' else 'not measured'}")
    forced_length = (
        forced_ratio(forced.get(proposed.label), forced.get(other.label)) if kind == "measured" else unmetered
    )
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
        least_detectable_saving_percent=(
            decisions.least_detectable_saving(energy.ratio, repeatability.value)
            if kind == "measured"
            else None
        ),
        meter_error_percent=None if energy.meter_error is None else 100 * energy.meter_error,
        token_ratio=token_ratio,
        per_token_ratio=per_token,
        forced_length_ratio=forced_length,
        gap_percent=gap,
        length_part_percent=length_part,
        token_part_percent=token_part,
        time_ratio=timed.ratio("latency_s").measure(),
        latency_p99_ratio=timed.tail_ratio("latency_s", 99),
        scope_ratio=_scope_ratio(proposed, other, matched),
        break_even_samples=_break_even(proposed, other, ratio, joules, kind, repeatability),
        equal_length=equal_length,
        at_equal_length=verdicts.at_equal_length(
            equal_length,
            bool(tokens.any()),
            verdict,
            forced_length,
            per_token if kind == "measured" else unmetered,
            repeatability,
        ),
        claim=found.claim,
        verdict=verdict,
        why=why,
        notes=tuple(notes(proposed, other)),
        sample_share=score.sample_share,
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


def _scope_ratio(proposed: Entry, other: Entry, matched: Matched) -> Measure:
    if other.config.role == "base" or other.config.method == "lora":
        return absent(f"the budget counts nothing of {other.config.method}")
    if budgets_differ(proposed, other):
        scopes = f"{proposed.config.scope or 'none'} and {other.config.scope or 'none'}"
        return absent(f"the budgets count different things: scopes {scopes}")
    paired = matched.paired("scope_energy_j")
    if not len(paired):
        return absent("no scope joules on both sides")
    return paired.ratio("scope_energy_j").measure()


def _break_even(
    proposed: Entry,
    other: Entry,
    ratio: Measure,
    joules: tuple[FloatArray, FloatArray],
    kind: EnergyKind,
    repeatability: Repeatability,
) -> Measure:
    if kind != "measured":
        return absent("the joules are not measured")
    if decisions.energy_verdict(ratio, repeatability.value) != "less":
        return absent("no saving is shown")
    spent, other_spent = _training_joules(proposed), _training_joules(other)
    if spent is None or (other_spent is None and other.config.role != "base"):
        return absent("the training joules of one side were not measured")
    saved = float(joules[1].mean() - joules[0].mean())
    return Measure(float(max(0, math.ceil((spent - (other_spent or 0.0)) / saved))), n=len(joules[0]))


def _training_joules(entry: Entry) -> float | None:
    spent = [member.run.train_energy_j for member in entry.members]
    known = [joules for joules in spent if joules is not None]
    return sum(known) / len(known) if len(known) == len(spent) else None
