"""The meter put to the test on known relative work: twice the units of work must cost twice the joules."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from hestctl.energy.gauge import Edge, read
from hestctl.energy.meter import Meter
from hestctl.energy.pace import Pace, ThreadPace
from hestctl.energy.protocol import Counter, CounterError, Unavailable
from hestctl.energy.replicate import replicate
from hestctl.records import EnergyKind, Window

_OF_SAMPLES = (
    "naive_error",
    "naive_worst",
    "sample_error",
    "sample_worst",
    "coverage",
    "conservation_j",
    "outer_vs_counter_j",
    "step_j",
)
_OF_RATIOS = ("linearity", "linearity_error", "aa_ratio", "aa_error")
_OF_COST = ("metering_cost",)
MEASURES = (*_OF_SAMPLES, *_OF_RATIOS, *_OF_COST)

_MOST_SAMPLE_ERROR = 0.02
_MOST_COST = 0.01
_NOISE_J = 1e-3
"""What sums of floats may be off by: a counter of 1e10 J, a hundred windows, and the millijoules it shows."""

_WARM_UP_S = 1.0
_TIMED_S = 0.25
_MOST_UNITS = 2**40
_LEAD_IN_S = 0.5
_SAMPLE_S = (0.15, 1.0)
_PART_S = 1.0
_ORDER = (False, True, True, False) * 2
"""Parts without and with the meter: a drift of the clocks that is even in time cancels, also in medians."""
_PRECISION = 0.01
_LEAST_S, _MOST_S = 2.0, 10.0
_NO_BOUND = "an estimate has no bound"
_NO_JOULES = "the counter shows no joules for the work"


@dataclass(frozen=True, slots=True)
class MeterCheck:
    """What ``check_meter`` found; every measure that is None has its reason under its name in ``missing``.

    All of it takes equal joules for equal units of work as the truth, which holds at steady clocks and
    temperature; where it does not hold, the meter looks worse than it is.

    ``units_per_s``: units of work a second. Of the ``samples`` of random length, each against its units
    times the mean joules of a unit: ``naive_error`` and ``naive_worst``, the mean and greatest relative error
    of the counter read at both ends; ``sample_error`` and ``sample_worst`` those of the meter; ``coverage``
    the share of samples whose error is within the meter's bound.

    ``conservation_j``: joules of the window around all samples less those of the samples and the gaps
    between them. ``outer_vs_counter_j``: joules of that window less what the counter showed at its ends;
    ``step_j``: the joules of one counter step and of the time the readings take, which that may come to.

    ``linearity``: joules of twice the units over twice the joules of the units; ``aa_ratio``: joules of the
    same work the second time over the first time; ``linearity_error`` and ``aa_error`` their bounds by the
    meter. ``metering_cost``: 1 - work per second under the meter over work per second without; noise can
    make it slightly negative.
    """

    created_at: str
    counter: str
    kind: EnergyKind
    device_name: str | None = None
    device_uuid: str | None = None
    units_per_s: float | None = None
    samples: int = 0
    naive_error: float | None = None
    naive_worst: float | None = None
    sample_error: float | None = None
    sample_worst: float | None = None
    coverage: float | None = None
    conservation_j: float | None = None
    outer_vs_counter_j: float | None = None
    step_j: float | None = None
    linearity: float | None = None
    linearity_error: float | None = None
    aa_ratio: float | None = None
    aa_error: float | None = None
    metering_cost: float | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The check as a JSON document."""
        return asdict(self)

    def verdicts(self) -> list[tuple[str, bool | None, str]]:
        """For each demand on the meter: its name, whether it is met (None: not measured), and a sentence."""
        return [
            self._samples_verdict(),
            self._ratio_verdict("A/A", "the same work twice", "aa_ratio", "aa_error"),
            self._conservation_verdict(),
            self._ratio_verdict("linearity", "twice the work", "linearity", "linearity_error"),
            self._cost_verdict(),
        ]

    def _samples_verdict(self) -> tuple[str, bool | None, str]:
        if self.sample_error is None or self.sample_worst is None or self.naive_error is None:
            return self._not_measured("samples", "sample_error")
        told = (
            f"{self.samples} samples of {_SAMPLE_S[0]:g}-{_SAMPLE_S[1]:g} s are off by "
            f"{self.sample_error:.1%} on average and {self.sample_worst:.1%} at worst "
            f"({self.naive_error:.1%} on average with the counter read at both ends)"
        )
        return "samples", self.sample_error <= _MOST_SAMPLE_ERROR, f"{told}; {_MOST_SAMPLE_ERROR:.0%} allowed"

    def _ratio_verdict(self, name: str, work: str, ratio: str, error: str) -> tuple[str, bool | None, str]:
        found, bound = getattr(self, ratio), getattr(self, error)
        if found is None:
            return self._not_measured(name, ratio)
        told = f"{work} gives {found:.4f} times the joules expected"
        if bound is None:
            return name, None, f"{told}; no verdict: {self.missing[error]}"
        met = abs(found - 1) <= bound
        return name, met, f"{told}, {'within' if met else 'beyond'} the bound of {bound:.4f}"

    def _conservation_verdict(self) -> tuple[str, bool | None, str]:
        if self.conservation_j is None or self.outer_vs_counter_j is None or self.step_j is None:
            return self._not_measured("conservation", "conservation_j")
        met = abs(self.conservation_j) <= _NOISE_J and abs(self.outer_vs_counter_j) <= self.step_j
        told = (
            f"samples and gaps differ from the window around them by {self.conservation_j:.1e} J, "
            f"and that window from the counter by {self.outer_vs_counter_j:.3g} J"
        )
        return (
            "conservation",
            met,
            f"{told}; {_NOISE_J:g} J and one counter step, {self.step_j:.3g} J, allowed",
        )

    def _cost_verdict(self) -> tuple[str, bool | None, str]:
        if self.metering_cost is None:
            return self._not_measured("metering cost", "metering_cost")
        told = f"metering slows the work by {self.metering_cost:.2%}; {_MOST_COST:.0%} allowed"
        return "metering cost", self.metering_cost <= _MOST_COST, told

    def _not_measured(self, name: str, measure: str) -> tuple[str, None, str]:
        return name, None, f"not measured: {self.missing[measure]}"


def check_meter(
    counter: Counter | Unavailable,
    work: Callable[[int], None],
    *,
    clock: Callable[[], float] = time.monotonic,
    pace: Pace | None = None,
    poll_s: float = 0.005,
    samples: int = 30,
    seed: int = 0,
    check: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = lambda stage: None,
) -> MeterCheck:
    """Checks the meter on ``counter`` with work whose relative cost is known; about a minute of work.

    ``work(n)`` does ``n`` equal units of work on the device and returns when they are done, synchronised; a
    unit takes a few milliseconds at most. That equal units cost equal joules is assumed; it holds at steady
    clocks. ``samples`` of 0.15-1.0 s are
    drawn with ``seed``. ``clock`` gives monotonic seconds, ``pace`` polls every ``poll_s`` seconds; no other
    meter may run meanwhile. ``tell`` hears what comes next; ``check`` is called between pieces of work and
    may raise to end it all. Nothing runs where the counter is unavailable; what it cannot tell, or loses, is
    missing with the reason. Raises ValueError where ``work`` takes no time, or for no samples.
    """
    if samples < 1:
        raise ValueError("a check takes one sample at least")
    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    if isinstance(counter, Unavailable):
        return MeterCheck(created_at, "none", "none", missing=dict.fromkeys(MEASURES, counter.reason))
    checker = _Checker(counter, work, clock, pace or ThreadPace(), poll_s, check)
    tell("warming up")
    checker.warm_up()
    found: dict[str, float] = {}
    missing: dict[str, str] = {}
    stages: tuple[tuple[str, tuple[str, ...], Callable[[], dict[str, float]]], ...] = (
        (f"metering {samples} samples", _OF_SAMPLES, lambda: checker.samples(samples, random.Random(seed))),
        ("metering the same work twice, and twice the work", _OF_RATIOS, checker.ratios),
        ("working with and without the meter", _OF_COST, checker.cost),
    )
    for stage, measures, run in stages:
        tell(stage)
        try:
            found |= run()
        except CounterError as error:
            missing |= dict.fromkeys(measures, error.reason)
    missing |= {name: _NO_BOUND for name in MEASURES if name not in found and name not in missing}
    return MeterCheck(
        created_at,
        counter.name,
        counter.kind,
        counter.device_name,
        counter.device_uuid,
        checker.units_per_s,
        samples,
        missing=missing,
        **found,
    )


@dataclass(frozen=True, slots=True)
class _Sound:
    """Joules that are known and valid, of one of ``count`` repetitions, and their bound (J)."""

    energy_j: float
    error_j: float | None
    duration_s: float
    count: int = 1


def _sound(window: Window) -> _Sound:
    if window.energy_j is None or not window.valid:
        raise CounterError(window.reason or "the meter gives no joules")
    return _Sound(window.energy_j, window.error_j, window.duration_s)


@dataclass(slots=True)
class _Checker:
    """Meters pieces of ``work``, ``units_per_s`` of them a second. Raises CounterError without joules."""

    counter: Counter
    work: Callable[[int], None]
    clock: Callable[[], float]
    pace: Pace
    poll_s: float
    check: Callable[[], None]
    units_per_s: float = 0.0

    def warm_up(self) -> None:
        """Finds the rate of work once the clocks have had time to rise."""
        # What the first call alone has to do (compile, allocate) says nothing of the rate.
        self._timed(1)
        begin_s, units = self.clock(), 1
        while True:
            took_s = self._timed(units)
            if took_s < _TIMED_S:
                units *= 2
            elif self.clock() - begin_s >= _WARM_UP_S:
                self.units_per_s = units / took_s
                return
            if units > _MOST_UNITS:
                raise ValueError("the work takes no time")

    def samples(self, count: int, rng: random.Random) -> dict[str, float]:
        """Meters ``count`` samples of random length, and reads the counter before and after each."""
        units = [self._units(rng.uniform(*_SAMPLE_S)) for _ in range(count)]
        spans: list[tuple[Edge, Edge]] = []
        inside_s: list[float] = []
        with self._meter() as meter:
            self._timed(self._units(_LEAD_IN_S))
            begin_s = self.clock()
            readings_j = [read(self.counter)]
            for n in units:
                start = meter.edge()
                inside_s.append(self.clock())
                self._timed(n)
                inside_s.append(self.clock())
                spans.append((start, meter.edge()))
                readings_j.append(read(self.counter))
            end_s = self.clock()
            # The steps around the last edge shall be those of a busy device, as around every other.
            self._timed(self._units(_LEAD_IN_S))
        pauses = [(a[1], b[0]) for a, b in pairwise(spans) if b[0].at_s > a[1].at_s]
        outer = _sound(meter.cut(spans[0][0], spans[-1][1], name="samples", phase="check"))
        taken = [_sound(meter.cut(*span, name="sample", phase="check")) for span in spans]
        gaps = [_sound(meter.cut(*pause, name="gap", phase="check")) for pause in pauses]
        unit_j = sum(sample.energy_j for sample in taken) / sum(units)
        if unit_j <= 0:
            raise CounterError(_NO_JOULES)
        due_j = [n * unit_j for n in units]
        naive = [abs((b - a) / due - 1) for due, (a, b) in zip(due_j, pairwise(readings_j), strict=True)]
        off_j = [abs(sample.energy_j - due) for due, sample in zip(due_j, taken, strict=True)]
        off = [error / due for error, due in zip(off_j, due_j, strict=True)]
        within = [
            error <= sample.error_j
            for error, sample in zip(off_j, taken, strict=True)
            if sample.error_j is not None
        ]
        # An edge of a continuous counter is itself a reading, somewhere within the time that it takes.
        outside_s = inside_s[0] - begin_s + end_s - inside_s[-1] + (self.counter.step_s or 0.0)
        found = {
            "naive_error": statistics.fmean(naive),
            "naive_worst": max(naive),
            "sample_error": statistics.fmean(off),
            "sample_worst": max(off),
            "conservation_j": outer.energy_j - sum(window.energy_j for window in (*taken, *gaps)),
            "outer_vs_counter_j": outer.energy_j - (readings_j[-1] - readings_j[0]),
            "step_j": outer.energy_j / outer.duration_s * outside_s,
        }
        return found | ({"coverage": statistics.fmean(within)} if within else {})

    def ratios(self) -> dict[str, float]:
        """Meters the same work twice, and twice the work in between, where an even drift cancels."""
        with self._meter() as meter:
            once = self._repeated(meter, "once", precision=_PRECISION, least_s=_LEAST_S, most_s=_MOST_S)
            double = self._repeated(meter, "double", least_count=2 * once.count)
            again = self._repeated(meter, "again", least_count=once.count)
        single_j = (once.energy_j + again.energy_j) / 2
        found = {"linearity": double.energy_j / single_j, "aa_ratio": again.energy_j / once.energy_j}
        if once.error_j is None or double.error_j is None or again.error_j is None:
            return found
        single = (once.error_j + again.error_j) / 2 / single_j
        return found | {
            "linearity_error": found["linearity"] * (single + double.error_j / double.energy_j),
            "aa_error": found["aa_ratio"] * (once.error_j / once.energy_j + again.error_j / again.energy_j),
        }

    def cost(self) -> dict[str, float]:
        """Times the same work with the meter and without."""
        units = self._units(_PART_S)
        took_s: dict[bool, list[float]] = {False: [], True: []}
        for metered in _ORDER:
            with self._meter() if metered else nullcontext() as meter:
                self._timed(self._units(_LEAD_IN_S))
                begin_s = self.clock()
                if meter is not None:
                    meter.edge()
                self._timed(units)
                if meter is not None:
                    meter.edge()
                took_s[metered].append(self.clock() - begin_s)
            if meter is not None and meter.reason is not None:
                raise CounterError(meter.reason)
        # Medians: one part that something else held up does not count.
        return {"metering_cost": 1 - statistics.median(took_s[False]) / statistics.median(took_s[True])}

    def _repeated(
        self,
        meter: Meter,
        name: str,
        *,
        precision: float | None = None,
        least_s: float = 0.0,
        most_s: float = math.inf,
        least_count: int = 1,
    ) -> _Sound:
        """Joules of a quarter of a second's work. Raises CounterError where there are none."""
        units = self._units(_TIMED_S)
        found = replicate(
            lambda: self.work(units),
            meter,
            name=name,
            phase="check",
            precision=precision,
            least_s=least_s,
            most_s=most_s,
            least_count=least_count,
            # Edges within the window would cost once and twice the work the same, not twice as much.
            parts=1,
            check=self.check,
        )
        whole = _sound(found.window)
        if whole.energy_j <= 0:
            raise CounterError(_NO_JOULES)
        return _Sound(whole.energy_j / found.count, found.error_j, whole.duration_s, found.count)

    def _meter(self) -> Meter:
        return Meter(self.counter, clock=self.clock, pace=self.pace, poll_s=self.poll_s)

    def _units(self, seconds: float) -> int:
        return max(1, round(seconds * self.units_per_s))

    def _timed(self, units: int) -> float:
        """Does so many units of work; their seconds."""
        self.check()
        begin_s = self.clock()
        self.work(units)
        return self.clock() - begin_s
