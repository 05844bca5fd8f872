"""A simulated counter and clock, so that every fault can be met without a GPU or a second's wait."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hestctl.energy.conditions import Conditions
from hestctl.energy.protocol import CounterError
from hestctl.records import EnergyKind

Interval = tuple[float, float]


class FakeClock:
    """A monotonic clock (s) that moves when told to, and the ``Pace`` of a meter that polls along with it."""

    def __init__(self, start_s: float = 1000.0) -> None:
        self._now_s = start_s
        self._poll: Callable[[], None] | None = None
        self._period_s = 0.0
        self._next_s = 0.0

    def __call__(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Lets ``seconds`` pass, with the polls that fall due."""
        begin_s, target_s = self._now_s, self._now_s + seconds
        while self._poll is not None and self._next_s <= target_s:
            self._now_s = max(self._next_s, begin_s)
            self._poll()
            self._next_s = self._now_s + self._period_s
        # A poll that is still at work at the target overlaps with the caller, as a thread's would.
        self._now_s = target_s

    def spend(self, seconds: float) -> None:
        """Lets ``seconds`` pass without a poll: a call that takes time, a starved thread, a suspend."""
        self._now_s += seconds

    def start(self, poll: Callable[[], None], period_s: float) -> None:
        self._poll, self._period_s, self._next_s = poll, period_s, self._now_s + period_s

    def stop(self) -> None:
        self._poll = None

    def wait(self, seconds: float) -> None:
        self.advance(seconds)


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong, in seconds after the counter was made; ``None`` or empty: it does not happen."""

    mig: bool = False
    reset_at_s: float | None = None
    lost_at_s: float | None = None
    jump_at_s: float | None = None
    jump_j: float = 1e6
    stuck_s: Interval | None = None
    foreign_s: Interval | None = None
    throttled_s: Interval | None = None
    lost_per_read_j: float = 0.0
    """Joules that go missing with every read, as reported of an RTX 4090."""


@dataclass(slots=True)
class FakeCounter:
    """A counter over a known power: constant watts, or ``(from_s, watts)`` pieces after its making.

    It shows the true joules up to its last step; steps come every ``step_s`` seconds, each off by up to
    ``jitter_s``. ``step_s=None`` makes it continuous. ``on_read`` runs before and after a value is taken, to
    let a read take time. ``power_gain`` is the ratio of the power it tells to the true one.
    Raises CounterError when made with ``faults.mig``, and from ``read_j`` once it is lost.
    """

    power: float | Sequence[tuple[float, float]]
    clock: Callable[[], float]
    step_s: float | None = 0.1
    jitter_s: float = 0.0
    seed: int = 0
    faults: Faults = field(default_factory=Faults)
    max_w: float | None = 1000.0
    start_j: float = 5000.0
    power_gain: float = 1.0
    on_read: Callable[[], None] | None = None
    name: str = "fake"
    kind: EnergyKind = "measured"
    device_name: str = "Fake GPU"
    device_uuid: str = "GPU-fake"
    driver: str = "0.0"
    reads: int = field(default=0, init=False)
    _origin_s: float = field(init=False)
    _pieces: list[tuple[float, float, float]] = field(init=False)
    _shown_step_s: float = field(default=math.nan, init=False)
    _reads_missed: int = field(default=0, init=False)
    _steps: dict[int, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.faults.mig:
            raise CounterError("MIG is enabled: the counter tells of the whole GPU, not of a slice")
        self._origin_s = self.clock()
        pieces = [(-1e9, float(self.power))] if isinstance(self.power, int | float) else list(self.power)
        self._pieces = []
        joules = 0.0
        for index, (from_s, watts) in enumerate(pieces):
            if index:
                joules += pieces[index - 1][1] * (from_s - pieces[index - 1][0])
            self._pieces.append((from_s, watts, joules))

    def true_j(self, start_s: float, end_s: float) -> float:
        """Joules really drawn between two times of the clock."""
        return self._integral(end_s - self._origin_s) - self._integral(start_s - self._origin_s)

    def read_j(self) -> float:
        self.reads += 1
        if self.on_read is not None:
            self.on_read()
        at_s = self.clock() - self._origin_s
        value = self._shown(at_s)
        if self.on_read is not None:
            self.on_read()
        return value

    def power_w(self) -> float:
        return self._piece(self._step_before(self.clock() - self._origin_s))[1] * self.power_gain

    def conditions(self) -> Conditions:
        at_s = self.clock() - self._origin_s
        return Conditions(
            temperature_c=50.0,
            sm_clock_mhz=1500.0,
            throttled="HW thermal slowdown" if _within(at_s, self.faults.throttled_s) else None,
            foreign_processes=int(_within(at_s, self.faults.foreign_s)),
        )

    def _shown(self, at_s: float) -> float:
        faults = self.faults
        if faults.lost_at_s is not None and at_s >= faults.lost_at_s:
            raise CounterError("GPU is lost")
        if _within(at_s, faults.stuck_s) and faults.stuck_s is not None:
            at_s = faults.stuck_s[0]
        step_s = self._step_before(at_s)
        joules = self.start_j + self._integral(step_s)
        if faults.reset_at_s is not None and step_s >= faults.reset_at_s:
            joules -= self.start_j + self._integral(faults.reset_at_s)
        if faults.jump_at_s is not None and step_s >= faults.jump_at_s:
            joules += faults.jump_j
        if step_s != self._shown_step_s:
            self._shown_step_s, self._reads_missed = step_s, self.reads
        return joules - self._reads_missed * faults.lost_per_read_j

    def _step_before(self, at_s: float) -> float:
        if self.step_s is None:
            return at_s
        index = math.floor(at_s / self.step_s) + 1
        while (step_at_s := self._step_at(index)) > at_s:
            index -= 1
        return step_at_s

    def _step_at(self, index: int) -> float:
        if index not in self._steps:
            offset = random.Random(self.seed * 1_000_003 + index).uniform(-self.jitter_s, self.jitter_s)
            self._steps[index] = index * (self.step_s or 0.0) + offset
        return self._steps[index]

    def _piece(self, at_s: float) -> tuple[float, float, float]:
        return self._pieces[max(0, bisect_right(self._pieces, at_s, key=lambda piece: piece[0]) - 1)]

    def _integral(self, at_s: float) -> float:
        from_s, watts, joules = self._piece(at_s)
        return joules + watts * (at_s - from_s)


def _within(at_s: float, interval: Interval | None) -> bool:
    return interval is not None and interval[0] <= at_s < interval[1]
