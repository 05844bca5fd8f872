"""What a comparison comes to in a few lines: which configuration, against which, why, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from hestctl.compare.decisions import ALPHA
from hestctl.compare.results import METRICS, Best, Comparison, Gap, Pair
from hestctl.compare.text import with_interval
from hestctl.compare.verdicts import points, saving

Side: TypeAlias = Literal["baseline", "control"]

_MISSING: Final[dict[str, str]] = {
    "proposed": "a run of the proposed method: hestctl train --method hest",
    "baseline": "a baseline: hestctl train --method tabs",
    "control": "a control, which tells choosing from quantising: "
    "hestctl train --method lora --backbone-precision int8",
}


@dataclass(frozen=True, slots=True)
class Standing:
    """The best proposed configuration against the best of one side; a sentence each on joules and quality.

    ``pair`` is ``None`` where the side has no configuration to stand against; ``energy`` then says why.
    ``saves``: less energy at equal quality is shown, and no other of the side is of better quality.
    """

    side: Side
    title: str
    energy: str
    quality: str | None
    pair: Pair | None
    saves: bool = False


@dataclass(frozen=True, slots=True)
class Headline:
    """The one sentence, why this configuration stands for HEST (if there was a choice), both sides, and what
    would settle what is open."""

    sentence: str
    chosen: str | None
    standings: tuple[Standing, ...]
    next: tuple[str, ...]

    def lines(self) -> list[tuple[str, str]]:
        """The lines of a terminal: what leads each, with the blanks up to its text, and the text."""
        lines = [("", self.sentence)]
        if self.chosen:
            lines.append(("", self.chosen))
        for one in self.standings:
            lines += [("", one.title), (_lead("energy"), one.energy)]
            if one.quality:
                lines.append((_lead("quality"), one.quality))
        return [*lines, *((_lead("" if place else "next"), text) for place, text in enumerate(self.next))]

    def reasons(self) -> list[str]:
        """What the sentence rests on, a line each, as for a page."""
        told = [self.chosen] if self.chosen else []
        for one in self.standings:
            told.append("; ".join(filter(None, (one.title, f"energy: {one.energy}", one.quality))))
            if one.pair is not None and one.side == "baseline":
                told.append(f"{one.pair.proposed} against {one.pair.other} {one.pair.at_equal_length}")
        return [*told, *(f"next: {text}" for text in self.next)]


def _lead(name: str) -> str:
    return f"  {name:<9}"


def headline(comparison: Comparison) -> Headline:
    """HEST saves energy only if it saves against the best baseline and against the best control."""
    standings = (
        _standing(comparison, "baseline", comparison.best_baseline, comparison.gap),
        _standing(comparison, "control", comparison.best_control, comparison.gap_vs_controls),
    )
    return Headline(_sentence(*standings), _chosen(comparison), standings, _next(comparison, standings))


def _standing(comparison: Comparison, side: Side, other: Best | None, gap: Gap) -> Standing:
    best = comparison.best_proposed
    pair = None
    if best is not None and other is not None:
        names = (best.label, other.label)
        pair = next((one for one in comparison.pairs if (one.proposed, one.other) == names), None)
    if pair is None:
        reason = f"not measured: {gap.reason}"
        return Standing(
            side, f"inconclusive: {best.label if best else 'HEST'} against the {side}s", reason, None, None
        )
    title = f"{pair.verdict}: {pair.proposed} against {pair.other}, the best {side}"
    claimed, quality = pair.verdict == "less energy at equal quality", _quality(comparison, pair)
    if claimed and gap.reason:
        quality += f"; but {gap.reason}"
    return Standing(side, title, _energy(comparison, pair), quality, pair, claimed and not gap.reason)


def _sentence(baseline: Standing, control: Standing) -> str:
    if baseline.pair is None or not baseline.saves:
        return "Not shown that HEST saves energy."
    if not control.saves:
        other = baseline.pair.other
        return f"HEST uses less energy than {other}; not shown that choosing saves beyond quantising."
    return "HEST saves energy."


def _chosen(comparison: Comparison) -> str | None:
    """Why this one of several proposed configurations."""
    proposed = {row.config_label for row in comparison.rows if row.role == "proposed"}
    best, other = comparison.best_proposed, comparison.best_baseline
    if best is None or other is None or len(proposed) < 2:
        return None
    worse = {
        one.proposed for one in comparison.pairs if one.other_role == "baseline" and one.quality == "inferior"
    }
    equal = {
        one.proposed for one in comparison.pairs if one.other == other.label and one.quality == "not inferior"
    } - worse
    if best.label in equal:
        word = "estimated joules" if comparison.energy_kind == "estimated" else "joules"
        return (
            f"{best.label} takes the fewest {word} of the {len(equal)} of {len(proposed)} proposed "
            f"configurations that are shown not inferior to {other.label}"
        )
    return (
        f"none of {len(proposed)} proposed configurations is shown not inferior to {other.label}; "
        f"{best.label} is the surest to be near"
    )


def _energy(comparison: Comparison, pair: Pair) -> str:
    if comparison.energy_kind == "estimated":
        why = f"not measured: the joules are estimated ({comparison.facts['meter']})"
        return f"{why}; time ratio {with_interval(pair.time_ratio)}"
    if pair.ratio.value is None:
        return f"not measured: {pair.ratio.reason}"
    told = [saving(pair.ratio)]
    if pair.least_detectable_saving_percent is not None:
        told.append(f"{_extent(pair)} can show {pair.least_detectable_saving_percent:.2g} %")
    if _within_meter_error(pair):
        told.append(f"the meter's error bounds may shift it by {pair.meter_error_percent:.1f} %")
    p = _lost_among_pairs(pair)
    if p is not None:
        told.append(f"among {pair.claim.family} pairs Holm's p is {p:.2g}")
    return "; ".join(told)


def _quality(comparison: Comparison, pair: Pair) -> str:
    margin = f"{pair.quality}; margin {comparison.margin_points:g}"
    if pair.quality_difference.value is None:
        return f"not measured: {pair.quality_difference.reason}"
    if comparison.task == "classification":
        # The chance level stands in this reason alone.
        return f"{pair.quality_reason}, {margin}"
    told = f"{METRICS[pair.quality_metric].title} {points(pair.quality_difference)}, {margin}"
    if pair.least_detectable_points is None:
        return told
    return f"{told}; {_extent(pair)} can show {pair.least_detectable_points:.2g}"


def _extent(pair: Pair) -> str:
    """How much a pair rests on: ``100 samples``, or ``3 x 100 samples`` where a side has 3 seeds."""
    seeds = max(len(pair.proposed_run_ids), len(pair.other_run_ids))
    return f"{pair.samples:,} samples" if seeds == 1 else f"{seeds} x {pair.samples:,} samples"


def _within_meter_error(pair: Pair) -> bool:
    """Whether nothing is decided and the meter could have made all of the difference."""
    value, error = pair.ratio.value, pair.meter_error_percent
    if value is None or error is None or pair.verdict != "inconclusive":
        return False
    return error >= 100 * abs(1 - value)


def _lost_among_pairs(pair: Pair) -> float | None:
    """The adjusted p-value of a claim that would stand by itself and does not among the others."""
    alone, adjusted = pair.claim.both, pair.claim.adjusted
    if pair.quality == "inferior":
        alone, adjusted = pair.claim.energy, pair.claim.adjusted_energy
    lost = alone is not None and adjusted is not None and alone <= ALPHA < adjusted
    return adjusted if lost and pair.verdict == "inconclusive" else None


def _next(comparison: Comparison, standings: Sequence[Standing]) -> tuple[str, ...]:
    """What would settle what is open, in the order in which it is worth doing."""
    roles = {row.role for row in comparison.rows}
    advice = [text for role, text in _MISSING.items() if role not in roles]
    if comparison.energy_kind != "measured":
        advice.append("a device with an energy counter: hestctl env says which meter there is")
    pairs = [one.pair for one in standings if one.pair is not None]
    if comparison.facts["weights"] == "random":
        advice.append("pretrained weights: random ones have no quality")
    advice += _more_samples(comparison, [pair for pair in pairs if pair.quality == "inconclusive"])
    if comparison.energy_kind == "measured":
        advice += _more_joules(pairs)
    if any(pair.quality == "inferior" for pair in pairs):
        advice.append("less loss of quality: a larger --emax-ratio, or more steps of training")
    if any(len(runs) == 1 for pair in pairs for runs in (pair.proposed_run_ids, pair.other_run_ids)):
        advice.append("more seeds (--seed): one training says nothing about another")
    return tuple(advice)


def _more_joules(pairs: Sequence[Pair]) -> list[str]:
    """What could decide about the joules of pairs that are metered."""
    open_ = [pair for pair in pairs if pair.verdict == "inconclusive" and pair.quality == "not inferior"]
    advice = []
    if any(_within_meter_error(pair) for pair in open_):
        advice.append("a smaller error bound of the meter: larger batches (--set generation.batch_size=N)")
    if any(not _within_meter_error(pair) for pair in open_):
        advice.append("more test samples in every run (--set data.test_samples=N), or more seeds")
    if any(pair.verdict in ("more energy", "no difference") for pair in pairs):
        advice.append("fewer joules: a smaller --emax-ratio; more samples will not change this")
    return advice


def _more_samples(comparison: Comparison, pairs: Sequence[Pair]) -> list[str]:
    """How many samples would show a difference of the margin, where samples can."""
    known = [pair for pair in pairs if pair.least_detectable_points is not None]
    wide = [pair for pair in known if (pair.least_detectable_points or 0.0) > comparison.margin_points]
    if not wide:
        return []
    counts = [_enough(pair, comparison.margin_points) for pair in wide]
    if None in counts:
        return ["more seeds or test samples in every run: seeds differ too much for samples alone"]
    most = max(count for count in counts if count is not None)
    return [f"about {most:,} test samples in every run: --set data.test_samples={most}"]


def _enough(pair: Pair, margin: float) -> int | None:
    """Samples with which the least detectable difference is the margin, to two digits; ``None`` where more
    samples alone would not get there, for seeds are the larger source of chance."""
    share, least = pair.sample_share, pair.least_detectable_points
    if share is None or least is None or share < 0.5:
        return None
    left = margin**2 - (1 - share) * least**2
    if left <= 0:
        return None
    count = pair.samples * share * least**2 / left
    step = int(10 ** max(0, math.floor(math.log10(count)) - 1))
    return math.ceil(count / step) * step
