"""The state of the device while it is metered: what a counter reports, and tallies that telescope."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class Conditions:
    """One look at the device. ``None``: the device does not tell.

    ``temperature_c`` in degrees Celsius, ``sm_clock_mhz`` in MHz, ``throttled`` the slowdown reasons in
    words, ``foreign_processes`` the number of other processes that compute on the device.
    """

    temperature_c: float | None = None
    sm_clock_mhz: float | None = None
    throttled: str | None = None
    foreign_processes: int | None = None


@dataclass(frozen=True, slots=True)
class Tally:
    """Running sums over every ``Conditions`` seen so far; immutable, so that an edge can keep one.

    The conditions of a window are the difference of the tallies at its edges, and a run of any length
    needs no list of past looks.
    """

    looks: int = 0
    temperature: tuple[int, float] = (0, 0.0)
    clock: tuple[int, float] = (0, 0.0)
    throttled_looks: int = 0
    throttled: str = ""
    foreign_looks: int = 0
    foreign: int = 0
    latest: Conditions = field(default_factory=Conditions)

    def add(self, seen: Conditions) -> Tally:
        """The tally with one more look in it."""
        return replace(
            self,
            looks=self.looks + 1,
            temperature=_plus(self.temperature, seen.temperature_c),
            clock=_plus(self.clock, seen.sm_clock_mhz),
            throttled_looks=self.throttled_looks + (seen.throttled is not None),
            throttled=seen.throttled or self.throttled,
            foreign_looks=self.foreign_looks + bool(seen.foreign_processes),
            foreign=seen.foreign_processes or self.foreign,
            latest=seen,
        )


def between(start: Tally, end: Tally) -> tuple[Conditions, tuple[str, ...]]:
    """Mean temperature (C) and SM clock (MHz) of a window, and the reasons that demote it.

    ``start`` is the tally when the window began and ``end`` the one at the first look after it ended. The
    look before the window counts as well: a state that held then held when the window began.
    """
    reasons = []
    looks = end.looks - start.looks + (start.looks > 0)
    throttled = end.throttled_looks - start.throttled_looks + (start.latest.throttled is not None)
    if throttled:
        reasons.append(f"throttled ({end.throttled}) in {throttled} of {looks} looks at the device")
    foreign = end.foreign_looks - start.foreign_looks + bool(start.latest.foreign_processes)
    if foreign:
        others = "1 other process" if end.foreign == 1 else f"{end.foreign} other processes"
        reasons.append(f"contention: {others} on the device in {foreign} of {looks} looks")
    seen = Conditions(
        temperature_c=_mean(start.temperature, end.temperature, start.latest.temperature_c),
        sm_clock_mhz=_mean(start.clock, end.clock, start.latest.sm_clock_mhz),
        throttled=end.throttled if throttled else None,
        foreign_processes=end.foreign if foreign else end.latest.foreign_processes,
    )
    return seen, tuple(reasons)


def _plus(total: tuple[int, float], value: float | None) -> tuple[int, float]:
    return total if value is None else (total[0] + 1, total[1] + value)


def _mean(start: tuple[int, float], end: tuple[int, float], latest: float | None) -> float | None:
    count = end[0] - start[0]
    return (end[1] - start[1]) / count if count else latest
