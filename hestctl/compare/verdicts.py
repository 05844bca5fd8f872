"""What a pair comes to, in one of five verdicts, each with the sentence that says why."""

from __future__ import annotations

from dataclasses import dataclass

from hestctl.compare import decisions
from hestctl.compare.decisions import ALPHA, QualityVerdict
from hestctl.compare.results import Claim, Repeatability, Verdict
from hestctl.compare.statistics import Estimate, Measure
from hestctl.records import EnergyKind


@dataclass(frozen=True, slots=True)
class Quality:
    """The difference in points (first minus second) and what it says at ``margin``.

    ``p`` is that of being inferior; 1 where scores near chance can show nothing.
    """

    metric: str
    verdict: QualityVerdict
    difference: Measure
    p: float | None
    detectable_points: float | None
    reason: str
    sample_share: float | None = None


@dataclass(frozen=True, slots=True)
class Energy:
    """The ratio of joules and what it says.

    ``meter_error`` is by how much (relative) the meter's error bounds of both sides may shift the ratio;
    ``None`` where the meter gave none.
    """

    ratio: Estimate
    batches: int
    meter_error: float | None = None

    @property
    def measure(self) -> Measure:
        return self.ratio.measure()


def claim(energy: Energy, score: Quality, kind: EnergyKind, repeatability: Repeatability) -> Claim:
    """The p-values of a pair by itself; estimated joules claim nothing."""
    if kind != "measured":
        return Claim(None, score.p)
    fewer = decisions.p_fewer_joules(energy.ratio, repeatability.value)
    both = None if fewer is None or score.p is None else max(fewer, score.p)
    return Claim(fewer, score.p, both)


def verdict(
    energy: Energy,
    score: Quality,
    found: Claim,
    kind: EnergyKind,
    margin: float,
    repeatability: Repeatability,
) -> tuple[Verdict, str]:
    """The verdict and why; ``found`` is adjusted for its family."""
    if kind != "measured":
        word = "estimated" if kind == "estimated" else "not measured"
        return "inconclusive", f"the joules are {word}; {score.reason}"
    ratio = energy.measure
    if ratio.value is None:
        return "inconclusive", f"{ratio.reason}; {score.reason}"
    joules = saving(ratio) + _least_saving(energy, repeatability)
    decided = decisions.energy_verdict(ratio, repeatability.value)
    if decided == "unclear":
        return "inconclusive", f"{joules}: {_unclear(ratio, repeatability)}; {score.reason}"
    room = decisions.SAME_WITHIN if decided == "same" else abs(1 - ratio.value)
    if energy.meter_error is not None and energy.meter_error >= room:
        bound = f"the meter's error bounds may shift the ratio by {100 * energy.meter_error:.1f} %"
        return "inconclusive", f"{joules}, but {bound}; {score.reason}"
    if decided == "more":
        return "more energy", f"{joules}; {score.reason}"
    if decided == "same":
        within = f"within {100 * decisions.SAME_WITHIN:g} % and what two runs of one model differ by"
        return "no difference", f"{joules}, {within}; {score.reason}"
    if score.verdict == "inferior":
        if _fails(found.adjusted_energy):
            alone = "less energy, worse quality"
            return "inconclusive", f"{joules}; {score.reason}: {_among(alone, found.adjusted_energy, found)}"
        return "less energy, worse quality", f"{joules}; {score.reason}, beyond the margin of {margin:g}"
    if score.verdict != "not inferior":
        return "inconclusive", f"{joules}, but quality is undecided: {score.reason}"
    if _fails(found.adjusted):
        alone = "less energy at equal quality"
        return "inconclusive", f"{joules}; {score.reason}: {_among(alone, found.adjusted, found)}"
    return "less energy at equal quality", f"{joules}; {score.reason}, within the margin of {margin:g}"


def at_equal_length(
    equal_length: bool,
    written: bool,
    found: Verdict,
    forced: Measure,
    per_token: Measure,
    repeatability: Repeatability,
) -> str:
    """The verdict where both write equally many tokens: as it came, or forced to it in profile runs."""
    if equal_length and not written:
        return f"at equal length: {found} (labels are scored: no token was written)"
    if equal_length:
        return f"at equal length: {found} (both wrote the same number of tokens)"
    if forced.value is not None:
        word = decisions.ENERGY_WORDS[decisions.energy_verdict(forced, repeatability.value)]
        return f"at forced equal length: {word}, {saving(forced)} over {forced.n} samples of profile runs"
    if per_token.value is None:
        return "at equal length: not measured"
    return (
        "at equal length: not measured (the outputs differ in length); the nearest answer is "
        f"per new token, {saving(per_token)}"
    )


def saving(ratio: Measure) -> str:
    """Such as ``33.1 % fewer joules [31.0, 35.2]``, of a ratio of joules."""
    percent = 100 * (1 - (ratio.value or 0.0))
    word = "fewer" if percent >= 0 else "more"
    text = f"{abs(percent):.1f} % {word} joules"
    if ratio.low is None or ratio.high is None:
        return text
    edges = sorted((100 * (1 - ratio.low), 100 * (1 - ratio.high)))
    if percent < 0:
        edges = sorted(-edge for edge in edges)
    return f"{text} [{edges[0]:.1f}, {edges[1]:.1f}]"


def points(difference: Measure) -> str:
    """Such as ``+0.21 [-0.40, +0.82]``."""
    text = f"{difference.value:+.2f}"
    if difference.low is None or difference.high is None:
        return text
    return f"{text} [{difference.low:+.2f}, {difference.high:+.2f}]"


def _fails(adjusted: float | None) -> bool:
    return adjusted is None or adjusted > ALPHA


def _among(alone: str, adjusted: float | None, found: Claim) -> str:
    p = 1.0 if adjusted is None else adjusted
    return f"by itself {alone}, but among {found.family} pairs Holm's p is {p:.2g}, above {ALPHA:g}"


def _least_saving(energy: Energy, repeatability: Repeatability) -> str:
    least = decisions.least_detectable_saving(energy.ratio, repeatability.value)
    if least is None:
        return ""
    return f" (the least saving that {energy.batches} batches can show is {least:.2g} %)"


def _unclear(ratio: Measure, repeatability: Repeatability) -> str:
    if ratio.low is None or ratio.high is None:
        return ratio.reason or "there is no interval"
    if ratio.high < 1 or ratio.low > 1:
        percent = 100 * repeatability.value
        return f"too small beside the {percent:.2g} % by which two runs of one model may differ"
    return "the samples are too few or too noisy to tell"
