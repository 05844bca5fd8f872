"""Repeats short work back to back until the meter's bound on its joules is as narrow as asked for."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

from hestctl.energy.meter import Edge, Meter
from hestctl.records import Window

_RETRIES = 2
_LEAST_GROWTH = 1.5
_GROWTH_MARGIN = 1.2
_GROWTH_FROM_ZERO = 10.0
_ROOM = 0.95
"""The share of ``most_s`` that is planned, so that somewhat slower repetitions still fit."""
_WORTH = 1.1
"""Another attempt is longer by this factor at least; a pilot may be that much slower than the rest."""


@dataclass(frozen=True, slots=True)
class Replicated:
    """Joules of one repetition out of ``count``, from one window over all of them.

    ``window`` is that outer window; its ``valid`` and ``reason`` hold, and an invalid one keeps its numbers
    for inspection. ``energy_j``: joules of one repetition; None: ``window.reason`` says why. ``error_j``:
    bound of the meter on it (J), None for an estimate, which has none. ``spread_j``: standard error of
    ``energy_j`` (J) from the valid ones of the parts that the window consists of; None with fewer than two.
    """

    window: Window
    count: int
    energy_j: float | None
    error_j: float | None
    spread_j: float | None

    @property
    def precision(self) -> float | None:
        """``error_j`` relative to ``energy_j``; None where either is not known or there are no joules."""
        if self.error_j is None or not self.energy_j:
            return None
        return self.error_j / self.energy_j


def replicate(
    work: Callable[[], object],
    meter: Meter,
    *,
    name: str,
    phase: str,
    precision: float | None,
    least_s: float = 0.0,
    most_s: float = 60.0,
    parts: int = 5,
    least_count: int = 1,
    check: Callable[[], None] = lambda: None,
) -> Replicated:
    """Repeats ``work`` under the running ``meter`` until ``error_j <= precision * energy_j``.

    A first, unmeasured repetition warms up and tells the duration. Then come ``least_count`` repetitions or
    as many as fill ``least_s`` seconds, and more in each further attempt while the bound is too wide. The
    plan keeps to ``most_s`` seconds for one attempt, before ``least_s`` and ``least_count``; a single
    repetition is always made. An attempt without joules, or demoted (contention, throttling), is made again
    twice at most and the last one is returned as it is. Without ``precision``, or from a meter that gives no
    bound (an estimate), the first sound attempt of about ``least_s`` counts. A meter of kind "none" runs
    ``least_count`` repetitions, for the sake of what they do.

    The window is cut into ``parts``, equal give or take a repetition, at edges that synchronise the device
    (and take the time of a reading where the counter is continuous); between them repetitions follow each
    other directly. ``check`` is called before every repetition and may
    raise to end it all. Raises ValueError for a precision, count or number of parts that is not positive,
    and RuntimeError where the meter is not running.
    """
    if (precision is not None and not precision > 0) or least_count < 1 or parts < 1:
        raise ValueError("precision, least_count and parts must be positive")
    if meter.kind == "none":
        return _Series(work, meter, name, phase, parts, math.inf, check).attempt(least_count)
    series = _Series(work, meter, name, phase, parts, most_s, check)
    pilot_s = series.pilot()
    count = min(max(least_count, math.ceil(least_s / pilot_s)), series.most_count(pilot_s))
    retries = _RETRIES
    while True:
        found = series.attempt(count)
        if found.energy_j is None or not found.window.valid:
            if retries == 0:
                return found
            retries -= 1
            continue
        once_s = found.window.duration_s / found.count
        count = min(math.ceil(found.count * _growth(found, precision, least_s)), series.most_count(once_s))
        if count < found.count * _WORTH:
            return found


def _growth(found: Replicated, precision: float | None, least_s: float) -> float:
    """The factor by which the repetitions have to grow; 1 where they suffice."""
    growth = max(1.0, least_s / found.window.duration_s)
    if precision is None or found.error_j is None or found.energy_j is None:
        return growth
    if found.energy_j <= 0:
        return max(growth, _GROWTH_FROM_ZERO)
    excess = found.error_j / (precision * found.energy_j)
    return growth if excess <= 1 else max(growth, excess * _GROWTH_MARGIN, _LEAST_GROWTH)


@dataclass(slots=True)
class _Series:
    """Attempts at one piece of work."""

    work: Callable[[], object]
    meter: Meter
    name: str
    phase: str
    parts: int
    most_s: float
    check: Callable[[], None]

    def pilot(self) -> float:
        """Runs the work once; its seconds."""
        start = self.meter.edge()
        self._run(1)
        return max(self.meter.edge().at_s - start.at_s, 1e-6)

    def most_count(self, once_s: float) -> int:
        """Repetitions of ``once_s`` seconds that one attempt may plan."""
        return max(1, int(min(_ROOM * self.most_s / once_s, sys.maxsize)))

    def attempt(self, count: int) -> Replicated:
        """``count`` repetitions, or fewer where they turn out too slow for ``most_s``."""
        parts = min(self.parts, count)
        edges = [self.meter.edge()]
        sizes: list[int] = []
        for index in range(parts):
            size = count * (index + 1) // parts - count * index // parts
            if sizes:
                once_s = (edges[-1].at_s - edges[-2].at_s) / sizes[-1]
                if edges[-1].at_s - edges[0].at_s + size * once_s > self.most_s:
                    break
            self._run(size)
            edges.append(self.meter.edge())
            sizes.append(size)
        return self._result(edges, sizes)

    def _run(self, count: int) -> None:
        for _ in range(count):
            self.check()
            self.work()

    def _result(self, edges: list[Edge], sizes: list[int]) -> Replicated:
        count = sum(sizes)
        window = self.meter.cut(edges[0], edges[-1], name=self.name, phase=self.phase)
        if count > 1 and window.energy_j is not None:
            window = replace(window, method="replicated")
        cuts = [self.meter.cut(a, b, name=self.name, phase=self.phase) for a, b in pairwise(edges)]
        once = [
            part.energy_j / size
            for part, size in zip(cuts, sizes, strict=True)
            if part.valid and part.energy_j is not None
        ]
        return Replicated(
            window,
            count,
            energy_j=None if window.energy_j is None else window.energy_j / count,
            error_j=None if window.error_j is None else window.error_j / count,
            spread_j=statistics.stdev(once) / math.sqrt(len(once)) if len(once) > 1 else None,
        )
