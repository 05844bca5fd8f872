"""Joules at any instant from a counter that moves in steps.

A reading of a stepped counter is up to one step old: read at both ends of a short window it is wrong by
a step's joules. The time of the step itself, caught by polling, is known to a few milliseconds, and
between two steps the counter has gone up by just what was drawn, so interpolation is off only by how
unevenly power was spent within that one step.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

_STUCK_STEPS = 5
_GAP_STEPS = 10
_KEPT_TICKS = 8
_UNLIMITED_W = 1e9
_MEANS_MARGIN = 0.2


@dataclass(frozen=True, slots=True)
class Tick:
    """One step of the counter.

    It came within ``slack_s`` seconds of ``t_s`` and brought the counter to ``energy_j`` joules.
    ``breaks`` counts the faults up to here that cost joules, ``why`` is the last of them; ``gap_s`` sums the
    seconds in which nobody looked. Both are running sums, so that windows need only their two edges.
    """

    t_s: float
    energy_j: float
    slack_s: float = 0.0
    breaks: int = 0
    why: str = ""
    gap_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Point:
    """The counter at one instant: joules, and the joules by which that may be wrong at most.

    ``slack_s`` is the uncertainty of the instant itself, in seconds, where the counter was read at it.
    ``breaks`` and ``gap_s`` are pairs of running sums: up to the step before the instant, and up to the
    step after it. A window is broken where its end's second differs from its start's first.
    """

    energy_j: float
    error_j: float
    slack_s: float = 0.0
    breaks: tuple[int, int] = (0, 0)
    why: str = ""
    gap_s: tuple[float, float] = (0.0, 0.0)


def envelope_j(energy_j: float, span_s: float, at_s: float, low_w: float, high_w: float) -> float:
    """Greatest error in joules of the straight line through a segment, ``at_s`` seconds into it.

    The segment lasts ``span_s`` seconds and holds ``energy_j`` joules. Power within it is anything between
    ``low_w`` and ``high_w`` watts: what was drawn by ``at_s`` is at least ``low_w`` throughout, and leaves
    no more than ``high_w`` for the rest; and the other way round.
    """
    rest_s = span_s - at_s
    line = energy_j * at_s / span_s
    most = min(high_w * at_s, energy_j - low_w * rest_s)
    least = max(low_w * at_s, energy_j - high_w * rest_s)
    return max(most - line, line - least, 0.0)


def power_range(
    before_w: float | None, within_w: float, after_w: float | None, max_w: float | None
) -> tuple[float, float]:
    """Least and greatest power (W) to be expected within a segment, from its neighbours' means.

    A change from one level to another lies between them, give or take how well their means are known. A mean
    above both neighbours is a burst of unknown height, one below both a pause of unknown depth. An unknown
    neighbour excludes nothing. So every power that keeps its level for two steps is covered, and one that
    alternates faster than the steps is not.
    """
    ceiling = _UNLIMITED_W if max_w is None else max(max_w, within_w)
    if before_w is None or after_w is None:
        return 0.0, ceiling
    low, high = min(before_w, after_w), max(before_w, after_w)
    # The means are no better than the stamps of their steps, so a change may be larger than it looks.
    margin = _MEANS_MARGIN * (max(high, within_w) - min(low, within_w))
    return (
        0.0 if within_w < low else max(0.0, low - margin),
        ceiling if within_w > high else min(ceiling, high + margin),
    )


def interpolate(ticks: list[Tick], t_s: float, max_w: float | None, *, final: bool = False) -> Point | None:
    """The counter at ``t_s``, or None while the steps around it have not arrived.

    One whole segment on either side of the one that holds ``t_s`` tells how steady power was. With
    ``final`` no more steps will come and one neighbour may be missing, at the price of a wider error.
    """
    right = bisect_right(ticks, t_s, key=lambda tick: tick.t_s)
    left = right - 1
    if left < 0 or right >= len(ticks) or (right + 1 >= len(ticks) and not final):
        return None
    a, b = ticks[left], ticks[right]
    span, at = b.t_s - a.t_s, t_s - a.t_s
    before, within, after = _mean_w(ticks, left), _mean_w(ticks, right), _mean_w(ticks, right + 1)
    share = at / span
    broken = within is None
    error = 0.0
    if within is not None:
        low, high = power_range(before, within, after, max_w)
        local = max(power for power in (before, within, after) if power is not None)
        error = envelope_j(b.energy_j - a.energy_j, span, at, low, high)
        error += local * ((1 - share) * a.slack_s + share * b.slack_s)
    return Point(
        energy_j=a.energy_j if broken else a.energy_j + (b.energy_j - a.energy_j) * share,
        error_j=error,
        breaks=(a.breaks, b.breaks),
        why=b.why,
        gap_s=(a.gap_s, b.gap_s),
    )


def _mean_w(ticks: list[Tick], index: int) -> float | None:
    """Mean power of the segment that ends at ``index``; None where there is none or it is broken."""
    if not 0 < index < len(ticks) or ticks[index].breaks != ticks[index - 1].breaks:
        return None
    a, b = ticks[index - 1], ticks[index]
    return (b.energy_j - a.energy_j) / (b.t_s - a.t_s)


@dataclass(slots=True)
class _Reading:
    begin_s: float
    """Begin of the latest read that showed this value."""
    seen_s: float
    """End of that read."""
    energy_j: float
    since_s: float
    """End of the first read that showed this value."""


class TickLog:
    """Turns readings into ticks, and says what was wrong between them. Not locked: the meter does that.

    ``step_s`` is the counter's nominal step and ``poll_s`` the time between readings, in seconds; ``max_w``
    the greatest plausible power in watts. A value is stuck when readings show no step for more than five
    steps (ten polls at least), time is a gap when nothing was read for more than ten (200 polls at least).
    """

    def __init__(self, step_s: float, *, poll_s: float, max_w: float | None) -> None:
        self.step_s = step_s
        self.max_w = max_w
        self.stuck_after_s = max(_STUCK_STEPS * step_s, 10 * poll_s)
        self.gap_after_s = max(_GAP_STEPS * step_s, 200 * poll_s)
        self.ticks: list[Tick] = []
        self.lost: str | None = None
        self._last: _Reading | None = None
        self._gap_s = 0.0
        self._stuck = False

    def add(self, begin_s: float, end_s: float, energy_j: float) -> bool:
        """Takes one reading (J), made between ``begin_s`` and ``end_s``; True where the counter stepped."""
        last = self._last
        if last is None:
            self._last = _Reading(begin_s, end_s, energy_j, end_s)
            return False
        if begin_s - last.seen_s > self.gap_after_s:
            self._gap_s += begin_s - last.seen_s
            last.since_s = end_s
        if energy_j == last.energy_j:
            last.begin_s, last.seen_s = begin_s, end_s
            self._stuck = self._stuck or end_s - last.since_s > self.stuck_after_s
            return False
        # Where readings are sparser than steps, the step that brought this value is one step old at most.
        earliest = max(last.begin_s, begin_s - 1.5 * self.step_s)
        t_s, slack_s = (earliest + end_s) / 2, (end_s - earliest) / 2
        previous = self.ticks[-1] if self.ticks else Tick(t_s, last.energy_j)
        why = self._fault(previous, t_s, energy_j)
        self.ticks.append(
            Tick(
                t_s,
                energy_j,
                slack_s,
                breaks=previous.breaks + (why is not None),
                why=why or previous.why,
                gap_s=self._gap_s,
            )
        )
        self._last = _Reading(begin_s, end_s, energy_j, end_s)
        self._stuck = False
        return True

    def _fault(self, previous: Tick, t_s: float, energy_j: float) -> str | None:
        delta = energy_j - previous.energy_j
        if delta < 0:
            return f"the counter was reset: it fell by {-delta:.3g} J"
        if self._stuck:
            return f"the counter was stuck for {t_s - previous.t_s:.1f} s"
        # A whole step of tolerance: a board may show a step late without having missed a joule.
        if self.ticks and self.max_w is not None:
            span = t_s - previous.t_s
            if delta > self.max_w * (span + self.step_s):
                return (
                    f"the counter jumped by {delta:.4g} J in {span:.2f} s; "
                    f"the device can draw {self.max_w:.0f} W"
                )
        return None

    def lose(self, reason: str) -> None:
        """No more readings will come, for ``reason``."""
        self.lost = self.lost or reason

    @property
    def fault(self) -> str | None:
        """Why no joules can be had now: the counter is lost, or stuck. None while it runs."""
        if self.lost is not None:
            return self.lost
        if self._stuck and self._last is not None:
            return f"the counter is stuck: no step for {self._last.seen_s - self._last.since_s:.1f} s"
        return None

    def at(self, t_s: float, *, final: bool = False) -> Point | None:
        """The counter at ``t_s``, as ``interpolate`` tells it."""
        return interpolate(self.ticks, t_s, self.max_w, final=final)

    def prune(self, before_s: float) -> None:
        """Forgets ticks that no instant from ``before_s`` on can need; the last few always stay."""
        keep_from = bisect_right(self.ticks, before_s, key=lambda tick: tick.t_s) - 2
        del self.ticks[: max(0, min(keep_from, len(self.ticks) - _KEPT_TICKS))]
