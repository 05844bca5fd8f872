"""The meter's certificate: what the counter of this device does, found out by watching it."""

from __future__ import annotations

import math
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from hestctl.energy.conditions import Tally, between
from hestctl.energy.gauge import LOOK_EVERY_S, read
from hestctl.energy.pace import Pace, ThreadPace
from hestctl.energy.protocol import Counter, CounterError, PowerSensor, Unavailable
from hestctl.energy.ticks import Tick, TickLog
from hestctl.records import EnergyKind

MEASURES = (
    "step_s",
    "jitter_s",
    "idle_w",
    "noise_j",
    "read_s",
    "polling_share",
    "load_w",
    "polling_ratio",
    "power_ratio",
    "least_window_5pct_s",
    "least_window_1pct_s",
    "idle_after_w",
    "idle_drift",
)
_TOLERATED = 0.02
_TOLERATED_DRIFT = 0.1
_NOISE_STEPS = 5
_REST_S = 1.0


@dataclass(frozen=True, slots=True)
class MeterCertificate:
    """What ``certify`` found; every measure that is None has its reason under its name in ``missing``.

    ``step_s``, ``jitter_s``: median time between counter steps and its standard deviation (s), as seen by
    polling. ``idle_w``: mean power of the device at rest (W). ``noise_j``: root mean square difference of
    neighbouring windows of five steps at rest (J): what A against A differs by. ``load_w``: mean power in
    the second part (W), at rest too where no load was given. ``read_s``: median time of one reading then (s).
    ``polling_share``: the share of its time that a meter's thread spends in readings and in looks at the
    device, with the meter's poll period: what it takes of a core at most, for a driver may wait without
    working. ``polling_ratio``: power by the counter while it is polled over power while it is left alone.
    ``power_ratio``: joules by the counter over the integral of instant power: consistency, not accuracy, for
    both may hang on one sensor. ``least_window_*``: seconds from which on the error bound of a window is
    within 5 % or 1 % of its joules at ``load_w``. ``idle_after_w``: mean power at rest again, from a second
    after the load on (W); ``idle_drift``: by how much that is above ``idle_w``, relative to it.
    """

    created_at: str
    counter: str
    kind: EnergyKind
    device_name: str | None = None
    device_uuid: str | None = None
    driver: str | None = None
    step_s: float | None = None
    jitter_s: float | None = None
    idle_w: float | None = None
    noise_j: float | None = None
    read_s: float | None = None
    polling_share: float | None = None
    load_w: float | None = None
    polling_ratio: float | None = None
    power_ratio: float | None = None
    least_window_5pct_s: float | None = None
    least_window_1pct_s: float | None = None
    idle_after_w: float | None = None
    idle_drift: float | None = None
    warnings: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The certificate as a JSON document."""
        return asdict(self) | {"warnings": list(self.warnings)}


def certify(
    counter: Counter | Unavailable,
    *,
    clock: Callable[[], float] = time.monotonic,
    pace: Pace | None = None,
    seconds: float = 10.0,
    poll_s: float = 0.005,
    load: Callable[[float], None] | None = None,
) -> MeterCertificate:
    """Watches the counter: ``seconds`` at rest, five quarters of that under ``load``, half of that at rest.

    The device must be at rest when this is called. ``load`` keeps it evenly busy for the seconds it is
    given; without it the second part is at rest as well. A counter that fails, or moves in no steps, gives a
    certificate that says so. ``clock`` gives monotonic seconds, ``pace`` polls, ``poll_s`` is the poll
    period of the meter (s).
    """
    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    if isinstance(counter, Unavailable):
        return MeterCertificate(created_at, "none", "none", missing=dict.fromkeys(MEASURES, counter.reason))
    found: dict[str, float] = {}
    missing: dict[str, str] = {}
    warnings: tuple[str, ...] = ()
    if counter.step_s is None:
        why = (
            f"the joules are estimated ({counter.name}): no counter was watched"
            if counter.kind == "estimated"
            else "the counter moves in no steps: it is read where a window begins and ends"
        )
        missing = dict.fromkeys(MEASURES, why)
    else:
        watch = _Watch(counter, counter.step_s, clock, pace or ThreadPace(), min(poll_s, counter.step_s / 5))
        try:
            before = Tally().add(counter.conditions())
            found |= watch.at_rest(seconds)
            found |= watch.under_load(seconds / 4, load or watch.pace.wait, missing)
            begin_s = clock()
            warnings = between(before, before.add(counter.conditions()))[1]
            look_s = clock() - begin_s
            # A poll comes ``poll_s`` after the one before has returned.
            found["polling_share"] = found["read_s"] / (found["read_s"] + poll_s) + look_s / LOOK_EVERY_S
            found |= watch.at_rest_again(seconds / 2, found["idle_w"])
        except CounterError as error:
            missing = dict.fromkeys((name for name in MEASURES if name not in found), error.reason) | missing
    ratio = found.get("polling_ratio", 1.0)
    if abs(ratio - 1) > _TOLERATED:
        warnings += (f"polling changes what the counter shows: {ratio:.3f} of its power when left alone",)
    if abs(found.get("idle_drift", 0.0)) > _TOLERATED_DRIFT:
        warnings += (
            f"idle drifted from {found['idle_w']:.0f} W to {found['idle_after_w']:.0f} W: "
            "joules net of idle are off by that much a second",
        )
    return MeterCertificate(
        created_at,
        counter.name,
        counter.kind,
        counter.device_name,
        counter.device_uuid,
        counter.driver if isinstance(counter, PowerSensor) else None,
        warnings=warnings,
        missing=missing,
        **found,
    )


@dataclass(slots=True)
class _Watch:
    """Watches one counter, with ``poll_s`` seconds between readings."""

    counter: Counter
    step_s: float
    clock: Callable[[], float]
    pace: Pace
    poll_s: float
    reads_s: list[float] = field(default_factory=list)
    """How long the readings of the latest run took (s)."""

    def at_rest(self, seconds: float) -> dict[str, float]:
        ticks = self._rest(seconds)
        if len(ticks) <= 2 * _NOISE_STEPS:
            raise CounterError(f"the counter stepped {len(ticks)} times in {seconds:g} s, too few to judge")
        steps = [b.t_s - a.t_s for a, b in pairwise(ticks)]
        windows = [b.energy_j - a.energy_j for a, b in pairwise(ticks[::_NOISE_STEPS])]
        return {
            "step_s": statistics.median(steps),
            "jitter_s": statistics.stdev(steps),
            "idle_w": _mean_w(ticks[0], ticks[-1]),
            "noise_j": _rms([b - a for a, b in pairwise(windows)]),
        }

    def at_rest_again(self, seconds: float, idle_w: float) -> dict[str, float]:
        """Lets a second pass, in which the clocks fall, and finds the idle watts once more."""
        self.pace.wait(_REST_S)
        ticks = self._rest(seconds)
        last = self._last_before(ticks, math.inf)
        after_w = _mean_w(ticks[0], last)
        return {"idle_after_w": after_w, "idle_drift": after_w / idle_w - 1}

    def _rest(self, seconds: float) -> list[Tick]:
        log = TickLog(self.step_s, poll_s=self.poll_s, max_w=self.counter.max_w)
        self._run(log, lambda _: True, lambda: self.pace.wait(seconds))
        return log.ticks

    def under_load(
        self, part_s: float, load: Callable[[float], None], missing: dict[str, str]
    ) -> dict[str, float]:
        """Alternates parts in which nobody reads with parts that are polled, and ends with one for power.

        Each part begins with a short polled stretch, which times the steps between which it is judged.
        """
        stretch_s = max(4 * self.step_s, 20 * self.poll_s)
        period_s = stretch_s + part_s
        log = TickLog(self.step_s, poll_s=self.poll_s, max_w=self.counter.max_w)
        log.gap_after_s = log.stuck_after_s = float("inf")
        begin_s = self.clock()
        powers: list[tuple[float, float]] = []
        sensor = self.counter if isinstance(self.counter, PowerSensor) else None

        def wanted(now_s: float) -> bool:
            part, within_s = divmod(now_s - begin_s, period_s)
            if part >= 4 and sensor is not None and "power_ratio" not in missing:
                try:
                    powers.append((now_s, sensor.power_w()))
                except CounterError as error:
                    missing["power_ratio"] = error.reason
            return part % 2 == 1 or part >= 4 or within_s < stretch_s

        self._run(log, wanted, lambda: load(5 * period_s + stretch_s))
        bounds = [self._last_before(log.ticks, begin_s + part * period_s + stretch_s) for part in range(6)]
        alone = [_mean_w(bounds[part], bounds[part + 1]) for part in (0, 2)]
        polled = [_mean_w(bounds[part], bounds[part + 1]) for part in (1, 3)]
        found = {"read_s": statistics.median(self.reads_s), "load_w": statistics.mean(polled)}
        found["polling_ratio"] = found["load_w"] / statistics.mean(alone)
        errors = [
            point.error_j
            for index in range(100)
            if (point := log.at(bounds[3].t_s + (bounds[4].t_s - bounds[3].t_s) * index / 100))
        ]
        bound_j = 2 * statistics.quantiles(errors, n=20)[-1]
        found["least_window_5pct_s"] = bound_j / (0.05 * found["load_w"])
        found["least_window_1pct_s"] = bound_j / (0.01 * found["load_w"])
        if sensor is None:
            missing["power_ratio"] = "the device tells no instant power"
        elif "power_ratio" not in missing:
            first, last = bounds[4], bounds[5]
            found["power_ratio"] = (last.energy_j - first.energy_j) / _integral_j(powers, first.t_s, last.t_s)
        return found

    def _run(self, log: TickLog, wanted: Callable[[float], bool], work: Callable[[], None]) -> None:
        def poll() -> None:
            if log.lost is not None or not wanted(self.clock()):
                return
            begin_s = self.clock()
            try:
                energy_j = read(self.counter)
            except CounterError as error:
                log.lose(error.reason)
            else:
                end_s = self.clock()
                self.reads_s.append(end_s - begin_s)
                log.add(begin_s, end_s, energy_j)

        self.reads_s.clear()
        self.pace.start(poll, self.poll_s)
        try:
            work()
        finally:
            self.pace.stop()
        fault = log.fault or next((tick.why for tick in log.ticks if tick.why), None)
        if fault is not None:
            raise CounterError(fault)

    @staticmethod
    def _last_before(ticks: list[Tick], t_s: float) -> Tick:
        index = bisect_left(ticks, t_s, key=lambda tick: tick.t_s) - 1
        if index < 0:
            raise CounterError("the counter did not step while it was watched")
        return ticks[index]


def _mean_w(a: Tick, b: Tick) -> float:
    if b.t_s <= a.t_s:
        raise CounterError("the counter did not step while it was watched")
    return (b.energy_j - a.energy_j) / (b.t_s - a.t_s)


def _integral_j(powers: list[tuple[float, float]], start_s: float, end_s: float) -> float:
    """Trapezoids over the readings between two times; the ends take the nearest reading."""
    inside = [power for power in powers if start_s <= power[0] <= end_s]
    if not inside:
        raise CounterError("instant power was not read while it was watched")
    points = [(start_s, inside[0][1]), *inside, (end_s, inside[-1][1])]
    return sum((t1 - t0) * (w0 + w1) / 2 for (t0, w0), (t1, w1) in pairwise(points))


def _rms(values: list[float]) -> float:
    return math.sqrt(statistics.fmean(value * value for value in values))
