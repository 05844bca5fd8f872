"""The arithmetic of steps: interpolation, its bound, and what is wrong between two steps."""

from __future__ import annotations

import random
import statistics
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hestctl.energy.fake import FakeClock, FakeCounter, Faults
from hestctl.energy.ticks import Tick, TickLog, envelope_j, interpolate, power_range

POLL_S, READ_S = 0.005, 0.0045


def watched(power: object, seconds: float, **counter: object) -> tuple[TickLog, FakeCounter, FakeClock]:
    """A log of ``seconds`` of polling at 5 ms with reads that take 4.5 ms."""
    clock = FakeClock()
    fake = FakeCounter(power, clock, on_read=lambda: clock.spend(READ_S / 2), **counter)  # type: ignore[arg-type]
    log = TickLog(0.1, poll_s=POLL_S, max_w=fake.max_w)

    def poll() -> None:
        begin_s = clock()
        joules = fake.read_j()
        log.add(begin_s, clock(), joules)

    clock.start(poll, POLL_S)
    clock.advance(seconds)
    return log, fake, clock


def test_interpolation_beats_naive_reading_on_samples_of_a_generation() -> None:
    """Samples of 0.15-1.0 s: read at both ends they are off by 5 % and more, interpolated by under 2 %."""
    rng = random.Random(1)
    samples = [(1001 + rng.uniform(0, 25), rng.uniform(0.15, 1.0)) for _ in range(200)]
    log, fake, _ = watched(450.0, 30, jitter_s=0.005)
    naive, ours = [], []
    for begin_s, length_s in samples:
        true_j = fake.true_j(begin_s, begin_s + length_s)
        first, last = log.at(begin_s), log.at(begin_s + length_s)
        assert first is not None and last is not None
        ours.append(abs((last.energy_j - first.energy_j) / true_j - 1))
        shown = [fake._shown(t - 1000) for t in (begin_s, begin_s + length_s)]
        naive.append(abs((shown[1] - shown[0]) / true_j - 1))
    assert statistics.mean(naive) > 0.05
    assert statistics.mean(ours) <= 0.02
    assert max(ours) <= 0.07


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_true_joules_lie_within_the_bound(data: st.DataObject) -> None:
    """For any levels of power that last two steps or longer, wherever the edges fall."""
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    pieces, at_s = [], -1.0
    while at_s < 7:
        pieces.append((at_s, rng.choice([rng.uniform(60, 700), 120.0, 450.0, 700.0])))
        at_s += rng.uniform(0.2, 0.8)
    log, fake, _ = watched(pieces, 6, jitter_s=data.draw(st.floats(0, 0.005)), seed=rng.randrange(1000))
    for _ in range(20):
        begin_s = 1001 + rng.uniform(0, 3)
        end_s = begin_s + rng.uniform(0.01, 1.5)
        first, last = log.at(begin_s), log.at(end_s)
        assert first is not None and last is not None
        off_j = abs(last.energy_j - first.energy_j - fake.true_j(begin_s, end_s))
        assert off_j <= first.error_j + last.error_j


def test_bound_is_wide_where_power_changes_and_narrow_where_it_does_not() -> None:
    log, _, _ = watched([(-1, 120.0), (3.05, 700.0)], 6)
    errors = {}
    for name, around_s in {"steady": 1002.0, "change": 1003.0}.items():
        points = [log.at(around_s + index / 100) for index in range(10)]
        errors[name] = max(point.error_j for point in points if point is not None)
    assert errors["steady"] < 3.0
    assert errors["change"] > 5 * errors["steady"]


@pytest.mark.parametrize("low_w, high_w", [(100.0, 600.0), (0.0, 1e9), (300.0, 300.0)])
def test_envelope_holds_every_two_level_split(low_w: float, high_w: float) -> None:
    """30 J in 0.1 s: any switch between two levels of the range stays within the envelope."""
    levels = [low_w, 200.0, 300.0, 450.0, min(high_w, 800.0)]
    for first_w in levels:
        for second_w in levels:
            if first_w == second_w or not (
                low_w <= min(first_w, second_w) <= max(first_w, second_w) <= high_w
            ):
                continue
            switch_s = (30.0 - second_w * 0.1) / (first_w - second_w)
            if not 0 <= switch_s <= 0.1:
                continue
            for at_s in (0.01, 0.03, 0.05, 0.09):
                true_j = first_w * min(at_s, switch_s) + second_w * max(0.0, at_s - switch_s)
                assert abs(true_j - 300.0 * at_s) <= envelope_j(30.0, 0.1, at_s, low_w, high_w) + 1e-9


def test_power_range_of_bursts_pauses_and_unknown_neighbours() -> None:
    assert power_range(100, 200, 300, 700) == (60, 340), "a change, and a fifth of it"
    assert power_range(10, 200, 690, 700) == (0, 700)
    assert power_range(200, 200, 200, 700) == (200, 200)
    assert power_range(100, 200, 100, 700) == (80, 700), "a burst of unknown height"
    assert power_range(300, 200, 300, 700) == (0, 320), "a pause of unknown depth"
    assert power_range(None, 200, 300, 700) == (0, 700)
    assert power_range(100, 900, 100, 700) == (0, 900)


def test_instants_without_steps_around_them_wait() -> None:
    ticks = [Tick(t / 10, 45.0 * t) for t in range(4)]
    assert interpolate(ticks, 0.15, 700) is not None
    assert interpolate(ticks, 0.25, 700) is None
    last = interpolate(ticks, 0.25, 700, final=True)
    middle = interpolate(ticks, 0.15, 700)
    assert last is not None and middle is not None
    assert last.energy_j == pytest.approx(45.0 * 2.5)
    assert last.error_j > middle.error_j
    assert interpolate(ticks, 0.35, 700, final=True) is None
    assert interpolate(ticks, -0.1, 700, final=True) is None
    assert interpolate([], 0.0, 700) is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.05, 0.3), min_size=5, max_size=30), st.lists(st.floats(1, 700), min_size=30))
def test_interpolated_joules_never_fall(spans: list[float], powers: list[float]) -> None:
    ticks = [Tick(0.0, 0.0)]
    for span, power in zip(spans, powers, strict=False):
        ticks.append(Tick(ticks[-1].t_s + span, ticks[-1].energy_j + span * power))
    grid = [ticks[1].t_s + (ticks[-2].t_s - ticks[1].t_s) * index / 50 for index in range(50)]
    points = [point for t in grid if (point := interpolate(ticks, t, None))]
    assert len(points) >= 49
    assert all(b.energy_j >= a.energy_j for a, b in pairwise(points))


def test_steps_are_stamped_within_their_slack() -> None:
    log, fake, _ = watched(450.0, 10, jitter_s=0.01)
    assert len(log.ticks) > 90
    for tick in log.ticks:
        nearest = min(abs(tick.t_s - 1000 - fake._step_at(index)) for index in range(-1, 102))
        assert nearest <= tick.slack_s < 0.01


@pytest.mark.parametrize(
    "faults, says",
    [
        (Faults(reset_at_s=2.0), "reset"),
        (Faults(jump_at_s=2.0), "jumped"),
        (Faults(stuck_s=(2.0, 3.0)), "stuck"),
    ],
)
def test_faults_break_exactly_the_segment_they_are_in(faults: Faults, says: str) -> None:
    log, _, _ = watched(450.0, 6, faults=faults)
    assert [tick.breaks for tick in log.ticks if tick.t_s < 1001.9] == [0] * sum(
        tick.t_s < 1001.9 for tick in log.ticks
    )
    assert log.ticks[-1].breaks == 1
    assert says in log.ticks[-1].why
    assert log.fault is None, "it runs again"


def test_stuck_and_lost_are_told_while_they_last() -> None:
    stuck, _, _ = watched(450.0, 3, faults=Faults(stuck_s=(2.0, 99.0)))
    assert stuck.fault is not None and "stuck" in stuck.fault
    healthy, _, _ = watched(450.0, 3)
    assert healthy.fault is None
    healthy.lose("gone")
    healthy.lose("gone again")
    assert healthy.fault == "gone"


def test_a_late_step_is_no_jump_and_a_starved_poll_is_no_fault() -> None:
    log = TickLog(0.1, poll_s=POLL_S, max_w=500.0)
    for at_s, joules in [(0.0, 0.0), (0.1, 45.0), (0.28, 90.0), (0.3, 180.0), (1.1, 540.0), (1.2, 585.0)]:
        log.add(at_s, at_s + 0.001, joules)
    assert log.ticks[-1].breaks == 0
    assert log.ticks[-1].gap_s == 0.0
    assert log.ticks[-2].slack_s == pytest.approx(0.0755), "one step and a half, not the whole pause"


def test_a_gap_is_counted_and_is_not_mistaken_for_a_stuck_counter() -> None:
    log, _, clock = watched(450.0, 2)
    clock.spend(60)
    clock.advance(2)
    assert log.ticks[-1].gap_s == pytest.approx(60, abs=0.1)
    assert log.ticks[-1].breaks == 0
    same = TickLog(0.1, poll_s=POLL_S, max_w=None)
    for at_s in (0.0, 0.1, 60.0, 60.01):
        same.add(at_s, at_s, 7.0)
    assert same.fault is None


def test_pruning_bounds_memory_and_keeps_what_is_needed() -> None:
    log, _, _ = watched(450.0, 60)
    assert len(log.ticks) > 500
    before = log.at(1030.03)
    log.prune(1030.03)
    assert log.at(1030.03) == before
    assert len(log.ticks) < 310
    log.prune(2000.0)
    assert len(log.ticks) == 8
