"""The meter: windows of joules between edges, each with a bound, a kind, and a reason where not valid."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from hestctl.energy.conditions import between
from hestctl.energy.cpu import CpuTimeCounter
from hestctl.energy.gauge import DirectGauge, Edge, Gauge, SteppedGauge
from hestctl.energy.pace import Pace, ThreadPace
from hestctl.energy.protocol import Counter, PowerSensor, Unavailable
from hestctl.energy.ticks import Point
from hestctl.records import EnergyKind, Window

__all__ = ["Edge", "Meter", "OpenWindow"]

_GAP_SHARE = 0.01
_IDLE_DRIFT = 0.1
_STEPS_TO_REST = 3


class OpenWindow:
    """What ``Meter.window`` yields; ``result`` is the Window once the block has ended."""

    def __init__(self, meter: Meter, name: str, phase: str) -> None:
        self._meter = meter
        self._name = name
        self._phase = phase
        self._start = meter.edge()
        self._end: Edge | None = None
        self._result: Window | None = None

    def close(self) -> None:
        """Ends the window here."""
        self._end = self._meter.edge()

    @property
    def result(self) -> Window:
        """The window (J, s). Waits for the next counter steps where they have not arrived yet.

        Raises RuntimeError inside the block, and after a block that ended by an exception.
        """
        if self._end is None:
            raise RuntimeError(f"window {self._name!r} has not ended")
        if self._result is None:
            self._result = self._meter.cut(self._start, self._end, name=self._name, phase=self._phase)
        return self._result


class Meter:
    """Joules of whatever runs between two edges.

    ``idle_w``: watts of the idle device, for joules net of idle; ``synchronise`` waits for the device and is
    called before each edge is stamped; ``poll_s``: seconds between readings of a counter that moves in steps
    (a continuous one is read at the edges); ``clock``: monotonic seconds; ``pace``: who polls.

    A context manager. Entering waits for the first steps of the counter, leaving for those that close the
    last edge. With ``Unavailable`` every window says why there are no joules, and nothing is read.
    """

    def __init__(
        self,
        counter: Counter | Unavailable,
        *,
        idle_w: float | None = None,
        synchronise: Callable[[], None] | None = None,
        poll_s: float = 0.005,
        clock: Callable[[], float] = time.monotonic,
        pace: Pace | None = None,
    ) -> None:
        self._counter = counter
        self._idle_w = idle_w
        self._synchronise = synchronise
        self._clock = clock
        self._pace = pace or ThreadPace()
        self._running = False
        self._gauge: Gauge | None = None
        if not isinstance(counter, Unavailable):
            if counter.step_s is None:
                self._gauge = DirectGauge(counter, clock)
            else:
                self._gauge = SteppedGauge(counter, counter.step_s, poll_s, clock, self._pace)

    @property
    def kind(self) -> EnergyKind:
        return "none" if isinstance(self._counter, Unavailable) else self._counter.kind

    @property
    def counter_name(self) -> str:
        return "none" if isinstance(self._counter, Unavailable) else self._counter.name

    @property
    def device_name(self) -> str:
        return "none" if isinstance(self._counter, Unavailable) else self._counter.device_name

    @property
    def device_uuid(self) -> str:
        return "none" if isinstance(self._counter, Unavailable) else self._counter.device_uuid

    @property
    def driver(self) -> str:
        """The version of the driver that the counter is read through; "none" where there is none."""
        return self._counter.driver if isinstance(self._counter, PowerSensor) else "none"

    @property
    def bounded(self) -> bool:
        """Whether windows carry an error bound: those of a counter do, an estimate's do not."""
        return self._method not in ("none", "estimated")

    @property
    def counts_process(self) -> bool:
        """Whether the joules are this process's alone, and not those of all that runs on the device."""
        return isinstance(self._counter, CpuTimeCounter)

    @property
    def reason(self) -> str | None:
        """Why joules since the start are not known; None while they are."""
        if isinstance(self._counter, Unavailable):
            return self._counter.reason
        return self._gauge.reason if self._gauge is not None else None

    def __enter__(self) -> Meter:
        if self._gauge is not None:
            self._gauge.start()
        self._running = True
        return self

    def __exit__(self, *exception: object) -> None:
        self._running = False
        if self._gauge is not None:
            try:
                self._gauge.settle()
            finally:
                self._gauge.stop()

    def edge(self) -> Edge:
        """Synchronises the device and stamps the clock. Raises RuntimeError outside the ``with`` block."""
        if not self._running:
            raise RuntimeError("the meter is not running: use it in a `with` block")
        if self._synchronise is not None:
            self._synchronise()
        return Edge(self._clock()) if self._gauge is None else self._gauge.stamp()

    def settle(self) -> None:
        """Waits until the counter steps that close the last edge have arrived.

        Two steps of the counter, a fraction of a second; given up when the counter is lost or stuck.
        """
        if self._gauge is not None:
            self._gauge.settle()

    def cut(self, start: Edge, end: Edge, *, name: str, phase: str) -> Window:
        """The window between two edges: energies in J, times in s. Settles first where that is needed.

        ``error_j`` bounds the error of timing: from the counter's steps, when they were seen, and how power
        changed around the edges. A gain error of the board's sensor (up to 5 %, the same on one board, so
        that ratios on it are free of it) is not in it, and power that alternates faster than the counter
        steps can exceed it. None for an estimate without steps: nominal watts have no bound.
        Raises ValueError where ``end`` lies before ``start``.
        """
        if end.at_s < start.at_s:
            raise ValueError(f"window {name!r} ends {start.at_s - end.at_s:.6f} s before it starts")
        known = not isinstance(self._counter, Unavailable)
        empty = Window(
            name=name,
            phase=phase,
            start_s=start.at_s,
            end_s=end.at_s,
            kind="none",
            method="none",
            device_uuid=self.device_uuid if known else None,
            device_name=self.device_name if known else None,
            valid=False,
        )
        if self._gauge is None:
            return replace(empty, reason=self.reason)
        if start.pending or end.pending:
            self._gauge.settle()
        if start.point is None or end.point is None:
            return replace(empty, reason=start.lost or end.lost)
        if start.point.breaks[0] != end.point.breaks[1]:
            return replace(empty, reason=end.point.why)
        if empty.duration_s == 0:
            return replace(empty, reason="the window has no length")
        return self._filled(empty, start, start.point, end, end.point)

    @contextmanager
    def window(self, name: str, phase: str) -> Iterator[OpenWindow]:
        """Meters the block; the object yielded has the Window in ``result`` afterwards."""
        opened = OpenWindow(self, name, phase)
        yield opened
        opened.close()

    def rest(self, seconds: float) -> Window:
        """A window of ``seconds`` in which the caller waits: the joules of the device at rest."""
        with self.window("rest", "idle") as window:
            self._pace.wait(seconds)
        return window.result

    def check_idle(self, seconds: float = 1.0) -> str | None:
        """Rests for ``seconds`` and compares the mean watts with the idle watts that net joules rest on.

        Beyond 10 % joules net of idle are given no more, and the sentence that says so is returned; None
        where the two agree, where the rest cannot be judged (no valid joules), where the idle watts are not
        known, and for a counter that does not move in steps. The device must have nothing to do.
        """
        if self._idle_w is None or isinstance(self._counter, Unavailable) or self._counter.step_s is None:
            return None
        # What ran before must lie outside the steps next to the window, or its power widens the first edge.
        self._pace.wait(_STEPS_TO_REST * self._counter.step_s)
        rest = self.rest(seconds)
        if rest.energy_j is None or not rest.valid:
            return None
        now_w = rest.energy_j / rest.duration_s
        if abs(now_w - self._idle_w) <= _IDLE_DRIFT * self._idle_w:
            return None
        was_w, self._idle_w = self._idle_w, None
        return (
            f"at rest the device draws {now_w:.0f} W, not the {was_w:.0f} W measured before: "
            "joules net of idle are not given"
        )

    def total_j(self) -> float | None:
        """Joules since the meter was started, up to the counter's last step; None: ``reason`` says why."""
        return None if self._gauge is None else self._gauge.total_j()

    @property
    def _method(self) -> str:
        if isinstance(self._counter, Unavailable):
            return "none"
        if self._counter.step_s is not None:
            return "interpolated"
        return "estimated" if self._counter.kind == "estimated" else "read"

    def _filled(self, empty: Window, start: Edge, first: Point, end: Edge, last: Point) -> Window:
        duration_s = empty.duration_s
        energy_j = last.energy_j - first.energy_j
        error_j = first.error_j + last.error_j + (first.slack_s + last.slack_s) * energy_j / duration_s
        seen, reasons = between(start.before, end.after or end.before)
        gap_s = last.gap_s[1] - first.gap_s[0]
        if gap_s > _GAP_SHARE * duration_s:
            reasons += (f"gap: the counter was not read for {gap_s:.1f} s (starved of CPU)",)
        return replace(
            empty,
            kind=self.kind,
            method=self._method,
            energy_j=energy_j,
            net_energy_j=None if self._idle_w is None else energy_j - self._idle_w * duration_s,
            error_j=None if self._method == "estimated" else error_j,
            valid=not reasons,
            reason="; ".join(reasons) or None,
            temperature_c=seen.temperature_c,
            sm_clock_mhz=seen.sm_clock_mhz,
        )
