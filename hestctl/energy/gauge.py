"""Puts the counter's joules to instants: read on the spot, or interpolated between polled steps."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from hestctl.energy.conditions import Tally
from hestctl.energy.pace import Pace
from hestctl.energy.protocol import Counter, CounterError
from hestctl.energy.ticks import Point, TickLog

LOOK_EVERY_S = 1.0
"""Seconds between looks at the state of the device, each of which takes as long as several readings."""
_PATIENCE_S = 2.0


@dataclass(slots=True, eq=False)
class Edge:
    """One instant, ``at_s`` seconds on the meter's clock, between two windows or at the end of one.

    Windows that meet share an edge, so that their joules add up to those of the window around them. The
    meter fills in ``point`` (J) once the counter has stepped past the edge, or ``lost``: why it never will.
    ``before`` and ``after`` are what was known of the device at the edge and at the next look at it.
    """

    at_s: float
    before: Tally = field(default_factory=Tally, repr=False)
    after: Tally | None = field(default=None, repr=False)
    point: Point | None = field(default=None, repr=False)
    lost: str | None = field(default=None, repr=False)

    @property
    def pending(self) -> bool:
        """True while the counter's next steps, or the next look at the device, may still tell more."""
        return self.lost is None and (self.point is None or self.after is None)


class Gauge(Protocol):
    """A running counter. ``reason``: why joules since the start are not known, None while they are."""

    @property
    def reason(self) -> str | None: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def stamp(self) -> Edge:
        """An edge at this instant."""
        ...

    def settle(self) -> None:
        """Returns when every edge so far has its point and a look after it, or the reason why not."""
        ...

    def total_j(self) -> float | None:
        """Joules since ``start``, or None."""
        ...


def read(counter: Counter) -> float:
    """A reading in joules. Raises CounterError, and nothing else, where there is none.

    Whatever a driver library raises in mid-run costs this reading and must not end the thread that polls:
    a thread that dies unseen leaves every later window waiting.
    """
    try:
        energy_j = counter.read_j()
    except CounterError:
        raise
    except Exception as error:
        raise CounterError(f"the counter failed: {type(error).__name__}: {error}") from error
    if not math.isfinite(energy_j):
        raise CounterError(f"the counter reads {energy_j}")
    return energy_j


class DirectGauge:
    """A continuous counter, read at each edge; no thread."""

    def __init__(self, counter: Counter, clock: Callable[[], float]) -> None:
        self._counter = counter
        self._clock = clock
        self._start: Point | None = None
        self._last: Point | None = None
        self._lost: str | None = None
        self._tally = Tally()

    @property
    def reason(self) -> str | None:
        if self._lost is not None or self._start is None or self._last is None:
            return self._lost
        return self._last.why if self._last.breaks != self._start.breaks else None

    def start(self) -> None:
        self._start = self.stamp().point

    def stop(self) -> None:
        """Nothing runs between the edges."""

    def stamp(self) -> Edge:
        self._tally = self._tally.add(self._counter.conditions())
        begin_s = self._clock()
        point = self._point(begin_s)
        return Edge((begin_s + self._clock()) / 2, self._tally, self._tally, point, self._lost)

    def settle(self) -> None:
        """Every edge has its point from the start."""

    def total_j(self) -> float | None:
        point = self._point(self._clock())
        if point is None or self._start is None or self.reason is not None:
            return None
        return point.energy_j - self._start.energy_j

    def _point(self, begin_s: float) -> Point | None:
        if self._lost is None:
            try:
                energy_j = read(self._counter)
            except CounterError as error:
                self._lost = error.reason
        if self._lost is not None:
            return None
        last = self._last or Point(energy_j, 0.0)
        fell_j = last.energy_j - energy_j
        breaks = last.breaks[1] + (fell_j > 0)
        self._last = Point(
            energy_j,
            0.0,
            slack_s=(self._clock() - begin_s) / 2,
            breaks=(breaks, breaks),
            why=f"the counter was reset: it fell by {fell_j:.3g} J" if fell_j > 0 else last.why,
        )
        return self._last


class SteppedGauge:
    """A counter that moves in steps, polled beside the caller."""

    def __init__(
        self, counter: Counter, step_s: float, poll_s: float, clock: Callable[[], float], pace: Pace
    ) -> None:
        self._counter = counter
        self._poll_s = poll_s
        self._clock = clock
        self._pace = pace
        self._lock = threading.Lock()
        self._log = TickLog(step_s, poll_s=poll_s, max_w=counter.max_w)
        self._started = False
        self._start: tuple[float, int] | None = None
        self._look_at_s = -math.inf
        self._unresolved: list[Edge] = []
        self._unlooked: list[Edge] = []
        self._tally = Tally()

    @property
    def reason(self) -> str | None:
        with self._lock:
            if self._log.fault is not None or not self._started:
                return self._log.fault
            if self._start is None:
                return "the counter did not step when the meter was started"
            last = self._log.ticks[-1]
            return last.why if last.breaks != self._start[1] else None

    def start(self) -> None:
        self._look()
        self._poll()
        self._pace.start(self._poll, self._poll_s)
        # A whole segment must lie before the first edge, so that its neighbourhood is known.
        self._wait(lambda: len(self._log.ticks) >= 2)
        with self._lock:
            self._started = True
            if self._log.ticks:
                self._start = self._log.ticks[-1].energy_j, self._log.ticks[-1].breaks

    def stop(self) -> None:
        self._pace.stop()
        with self._lock:
            self._resolve(final=True)

    def stamp(self) -> Edge:
        with self._lock:
            # Stamped under the lock: the log cannot forget ticks that an edge not yet in the list needs.
            edge = Edge(self._clock(), self._tally, lost=self._log.fault)
            if edge.lost is None:
                self._unresolved.append(edge)
                self._unlooked.append(edge)
        return edge

    def settle(self) -> None:
        if not self._unresolved and not self._unlooked:
            return
        self._wait(lambda: not self._unresolved)
        self._look()
        with self._lock:
            self._resolve(final=True)

    def total_j(self) -> float | None:
        if self.reason is not None or self._start is None:
            return None
        with self._lock:
            return self._log.ticks[-1].energy_j - self._start[0]

    def _poll(self) -> None:
        if self._log.lost is not None:
            return
        begin_s = self._clock()
        try:
            energy_j = read(self._counter)
        except CounterError as error:
            with self._lock:
                self._log.lose(error.reason)
            return
        end_s = self._clock()
        with self._lock:
            stepped = self._log.add(begin_s, end_s, energy_j)
            if stepped:
                self._resolve(final=False)
                self._log.prune(self._unresolved[0].at_s if self._unresolved else end_s)
        # Looking takes as long as several polls; right after a step the next one is furthest away.
        if stepped and end_s >= self._look_at_s:
            self._look()

    def _resolve(self, *, final: bool) -> None:
        """Gives edges their points; with ``final`` those that remain get the reason instead."""
        waiting = []
        for edge in self._unresolved:
            edge.point = self._log.at(edge.at_s, final=final)
            if edge.point is None and final:
                edge.lost = self._log.fault or "no counter step followed in time"
            elif edge.point is None:
                waiting.append(edge)
        self._unresolved = waiting

    def _look(self) -> None:
        seen = self._counter.conditions()
        with self._lock:
            self._tally = self._tally.add(seen)
            self._look_at_s = self._clock() + LOOK_EVERY_S
            for edge in self._unlooked:
                edge.after = self._tally
            self._unlooked.clear()

    def _wait(self, done: Callable[[], bool]) -> None:
        """Until ``done``, or the counter is lost or stuck, or polls have plainly ceased."""
        until_s = self._clock() + max(_PATIENCE_S, 2 * self._log.stuck_after_s)
        while not done() and self._log.fault is None and self._clock() < until_s:
            self._pace.wait(self._poll_s)
