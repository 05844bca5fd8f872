"""Work repeated until the bound holds, on a simulated counter whose truth is known."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from hestctl.energy.counter import CounterError, Unavailable
from hestctl.energy.fake import FakeClock, FakeCounter, Faults
from hestctl.energy.meter import Meter
from hestctl.energy.replicate import Replicated, replicate
from hestctl.records import Window

Maker = Callable[..., Any]


class Work:
    """Takes ``seconds`` each time; counts, and remembers when it ran."""

    def __init__(self, clock: FakeClock, *seconds: float) -> None:
        self.clock, self.seconds = clock, seconds
        self.began_s: list[float] = []

    def __call__(self) -> None:
        self.began_s.append(self.clock())
        self.clock.advance(self.seconds[min(len(self.began_s), len(self.seconds)) - 1])

    @property
    def count(self) -> int:
        return len(self.began_s)


def repeated(
    b: Any, work: Callable[[], object], precision: float | None = 0.05, **options: Any
) -> Replicated:
    with b.meter as meter:
        b.clock.advance(0.5)
        return replicate(work, meter, name="sample", phase="decode", precision=precision, **options)


def cuts_of(meter: Meter) -> list[Window]:
    """Every window that the meter cuts from now on."""
    kept: list[Window] = []
    cut = meter.cut

    def keep(*edges: Any, **names: str) -> Window:
        kept.append(cut(*edges, **names))
        return kept[-1]

    meter.cut = keep  # type: ignore[method-assign]
    return kept


@pytest.mark.parametrize("step_s", [0.1, None])
@pytest.mark.parametrize("precision", [0.05, 0.01])
@pytest.mark.parametrize("seconds", [0.003, 0.07, 0.4])
def test_the_precision_is_reached_and_the_value_right(
    bench: Maker, seconds: float, precision: float, step_s: float | None
) -> None:
    b = bench(jitter_s=0.004, step_s=step_s)
    found = repeated(b, Work(b.clock, seconds), precision)
    assert found.window.valid and found.precision is not None and found.precision <= precision
    assert abs(found.energy_j - b.true_j(found.window) / found.count) <= found.error_j
    if step_s is not None:
        assert abs(found.energy_j - 450 * seconds) <= found.error_j, "edges take no time"
    assert found.window.energy_j == pytest.approx(found.energy_j * found.count)
    assert found.window.error_j == pytest.approx(found.error_j * found.count)
    assert found.window.duration_s == pytest.approx(seconds * found.count, abs=0.03)
    assert (found.window.method == "replicated") == (found.count > 1)
    assert found.count > 1 or (seconds, precision, step_s) == (0.4, 0.05, None)
    assert (found.window.name, found.window.phase) == ("sample", "decode")
    assert found.window.duration_s < 15, "and no more is run than that takes"


def test_a_tighter_precision_takes_a_longer_window(bench: Maker) -> None:
    lengths = []
    for precision in (0.05, 0.01):
        b = bench(jitter_s=0.004)
        lengths.append(repeated(b, Work(b.clock, 0.07), precision).window.duration_s)
    assert lengths[1] > 2 * lengths[0]


@pytest.mark.parametrize("excess, growth", [(1.01, 1.5), (3.0, 3.6)])
def test_repetitions_grow_by_what_the_bound_exceeds_the_precision(
    bench: Maker, excess: float, growth: float
) -> None:
    def measured(precision: float | None) -> Replicated:
        b = bench(jitter_s=0.004)
        return repeated(b, Work(b.clock, 0.05), precision, least_s=1.99)

    first = measured(None)
    assert first.count == 40
    assert measured(first.precision / excess).count == round(40 * growth)


def test_nothing_grows_where_the_bound_already_holds(bench: Maker) -> None:
    b = bench()
    work = Work(b.clock, 3.0)
    found = repeated(b, work, 0.05)
    assert (found.count, work.count) == (1, 2), "a pilot, and the measurement"
    assert found.window.method == "interpolated" and found.window.valid
    assert found.spread_j is None, "one part has no spread"


def test_the_least_length_and_count_are_kept(bench: Maker) -> None:
    b = bench()
    work = Work(b.clock, 0.3)
    found = repeated(b, work, 0.5, least_s=2.0)
    assert (found.count, work.count) == (7, 8)
    b = bench()
    work = Work(b.clock, 0.3)
    found = repeated(b, work, 0.5, least_s=2.0, least_count=12)
    assert (found.count, work.count) == (12, 13)


def test_a_slow_pilot_does_not_shorten_the_window(bench: Maker) -> None:
    b = bench()
    found = repeated(b, Work(b.clock, 8.0, 0.1), None, least_s=2.0)
    assert found.window.duration_s == pytest.approx(2.0, abs=0.11)
    b = bench()
    work = Work(b.clock, 0.11, 0.1)
    found = repeated(b, work, None, least_s=2.0)
    assert work.count == 1 + found.count == 20, "1.9 s for 2 s are enough"


def test_one_attempt_lasts_no_longer_than_allowed(bench: Maker) -> None:
    b = bench()
    work = Work(b.clock, 0.05)
    found = repeated(b, work, 0.0001, most_s=4.0)
    assert 3.0 < found.window.duration_s <= 4.0
    assert found.window.valid and found.precision > 0.0001, "told, not hidden"
    b = bench()
    assert repeated(b, Work(b.clock, 0.05), 0.5, least_count=1000, most_s=4.0).window.duration_s <= 4.0
    b = bench()
    assert repeated(b, Work(b.clock, 9.0), 0.0001, most_s=4.0).count == 1, "less than once cannot be"
    b = bench()
    assert repeated(b, Work(b.clock, 9.0), None, least_count=30, most_s=float("inf")).count == 30


def test_an_attempt_that_turns_out_slow_ends_before_the_limit(bench: Maker) -> None:
    b = bench()
    cuts = cuts_of(b.meter)
    work = Work(b.clock, *[0.05] * 30, 0.1)
    found = repeated(b, work, None, least_s=3.5, most_s=4.0)
    assert 2.5 < cuts[0].duration_s <= 4.0, "cut short"
    assert 3.0 < found.window.duration_s <= 4.0, "and made again at the true pace"
    assert found.window.energy_j == pytest.approx(450 * found.window.duration_s, rel=0.02)
    assert found.energy_j == pytest.approx(found.window.energy_j / found.count)


def test_repetitions_are_back_to_back_and_the_parts_add_up(bench: Maker) -> None:
    b = bench([(-1, 300.0), *((index * 0.3, 300.0 + 20 * (index % 7)) for index in range(99))])
    cuts = cuts_of(b.meter)
    work = Work(b.clock, 0.07)
    found = repeated(b, work, 0.5, least_s=3.0, parts=4)
    assert work.began_s[-found.count] == found.window.start_s
    begun = work.began_s[-found.count :]
    assert all(later - earlier == pytest.approx(0.07) for earlier, later in pairwise(begun))
    outer, *parts = cuts
    assert len(parts) == 4
    assert all(first.end_s == second.start_s for first, second in pairwise(parts))
    assert (parts[0].start_s, parts[-1].end_s) == (found.window.start_s, found.window.end_s)
    assert sum(part.energy_j for part in parts) == pytest.approx(outer.energy_j, abs=1e-9)
    sizes = [round(part.duration_s / 0.07) for part in parts]
    assert sum(sizes) == found.count and max(sizes) - min(sizes) <= 1


def test_the_spread_is_the_standard_error_over_the_parts(bench: Maker) -> None:
    """Two levels of 2 s each, in four parts of 1 s: 400, 400, 500 and 500 J."""
    b = bench([(-1, 450.0), (1.5, 400.0), (3.5, 500.0)])
    with b.meter as meter:
        b.clock.advance(1.5 - 0.5 - (b.clock() - 1000))
        found = replicate(
            Work(b.clock, 0.5), meter, name="s", phase="p", precision=None, least_s=4.0, parts=4
        )
    assert found.count == 8
    assert found.energy_j == pytest.approx(225, rel=0.02)
    assert found.spread_j == pytest.approx(28.87 / 2, rel=0.05)


def test_a_spread_needs_two_valid_parts(bench: Maker) -> None:
    b = bench(faults=Faults(foreign_s=(0.0, 1e9)))
    found = repeated(b, Work(b.clock, 0.5), 0.05, least_s=3.0)
    assert found.energy_j is not None and found.spread_j is None


@pytest.mark.parametrize(
    "faults, says",
    [
        (Faults(foreign_s=(0.0, 4.0)), "contention"),
        (Faults(throttled_s=(0.0, 4.0)), "throttled"),
        (Faults(reset_at_s=2.5), "reset"),
    ],
)
def test_an_invalid_window_is_tried_again(bench: Maker, faults: Faults, says: str) -> None:
    b = bench(faults=faults)
    cuts = cuts_of(b.meter)
    found = repeated(b, Work(b.clock, 0.5), 0.05, least_s=3.0)
    assert not cuts[0].valid and says in str(cuts[0].reason)
    assert found.window.valid and found.window.reason is None
    assert found.energy_j == pytest.approx(225, rel=0.02)


@pytest.mark.parametrize("precision", [0.05, None])
@pytest.mark.parametrize(
    "faults, says, measured",
    [
        (Faults(foreign_s=(0.0, 1e9)), "contention", True),
        (Faults(stuck_s=(1.0, 1e9)), "stuck", False),
        (Faults(lost_at_s=1.0), "GPU is lost", False),
    ],
)
def test_a_window_that_stays_invalid_is_returned_marked(
    bench: Maker, faults: Faults, says: str, measured: bool, precision: float | None
) -> None:
    b = bench(faults=faults)
    work = Work(b.clock, 0.5)
    found = repeated(b, work, precision, least_s=3.0)
    assert work.count == 1 + 3 * 6, "a pilot and three attempts"
    assert not found.window.valid and says in str(found.window.reason)
    assert (found.energy_j is not None) == (found.error_j is not None) == measured
    assert (found.precision is not None) == measured
    assert found.window.method == ("replicated" if measured else "none")


def test_an_estimate_is_attempted_once_and_has_no_bound() -> None:
    clock = FakeClock()
    counter = FakeCounter(8.0, clock, step_s=None, kind="estimated")
    work = Work(clock, 0.1)
    with Meter(counter, clock=clock, pace=clock) as meter:
        found = replicate(work, meter, name="s", phase="p", precision=0.01, least_s=1.05)
    assert (found.count, work.count) == (11, 12)
    assert (found.error_j, found.precision) == (None, None)
    assert found.energy_j == pytest.approx(0.8)
    assert (found.window.kind, found.window.valid) == ("estimated", True)


def test_without_a_meter_the_work_is_done_and_nothing_made_up() -> None:
    clock = FakeClock()
    work = Work(clock, 0.1)
    with Meter(Unavailable("no GPU here"), clock=clock) as meter:
        found = replicate(
            work, meter, name="s", phase="p", precision=0.01, least_s=5.0, most_s=0.1, least_count=3
        )
    assert (found.count, work.count) == (3, 3)
    assert (found.energy_j, found.error_j, found.spread_j, found.precision) == (None, None, None, None)
    assert (found.window.kind, found.window.method, found.window.reason) == ("none", "none", "no GPU here")


def test_work_that_draws_nothing_grows_to_the_limit_and_ends() -> None:
    clock = FakeClock()
    counter = FakeCounter(0.0, clock, step_s=None)
    work = Work(clock, 0.1)
    with Meter(counter, clock=clock, pace=clock) as meter:
        found = replicate(work, meter, name="s", phase="p", precision=0.05, most_s=3.0)
    assert found.energy_j == 0 and found.precision is None
    assert 2.0 < found.window.duration_s <= 3.0


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("allowed", [0, 1, 4])
def test_check_ends_it_at_once(bench: Maker, allowed: int) -> None:
    b = bench()
    work = Work(b.clock, 0.5)

    def check() -> None:
        if work.count == allowed:
            raise Interrupted

    with pytest.raises(Interrupted):
        repeated(b, work, 0.001, check=check)
    assert work.count == allowed
    reads = b.counter.reads
    b.clock.advance(10)
    assert b.counter.reads == reads, "and the meter has stopped"


def test_errors_of_the_work_pass_through(bench: Maker) -> None:
    def work() -> None:
        raise CounterError("out of memory")

    b = bench()
    with pytest.raises(CounterError, match="out of memory"):
        repeated(b, work)


@pytest.mark.parametrize("senseless", [{"precision": 0.0}, {"least_count": 0}, {"parts": 0}])
def test_senseless_numbers_are_refused(bench: Maker, senseless: dict[str, Any]) -> None:
    b = bench()
    work = Work(b.clock, 0.5)
    with pytest.raises(ValueError, match="positive"):
        repeated(b, work, **senseless)
    assert work.count == 0
