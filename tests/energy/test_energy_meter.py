"""The demands on the meter, each on the simulated counter. The numbers in the tests' names are theirs."""

from __future__ import annotations

import dataclasses
import inspect
import random
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hestctl.energy.conditions import Conditions
from hestctl.energy.counter import CounterError, CpuTimeCounter, Unavailable
from hestctl.energy.fake import FakeClock, FakeCounter, Faults
from hestctl.energy.meter import Edge, Meter
from hestctl.records import Window

Maker = Callable[..., Any]
READ_S = 0.0045


def assert_not_measured(window: Window, says: str) -> None:
    """No number anywhere, least of all a zero; the reason in its place."""
    assert (window.energy_j, window.net_energy_j, window.error_j) == (None, None, None)
    assert (window.kind, window.method, window.valid) == ("none", "none", False)
    assert window.reason is not None and says in window.reason
    assert window.duration_s > 0


def test_1_unavailable_is_never_zero_joules() -> None:
    meter = Meter(Unavailable("no GPU here"))
    with meter:
        with meter.window("w", "decode") as window:
            time.sleep(0.001)
        assert_not_measured(window.result, "no GPU here")
        assert meter.total_j() is None
    assert (meter.kind, meter.reason) == ("none", "no GPU here")


def test_1_mig_is_refused() -> None:
    with pytest.raises(CounterError, match="MIG"):
        FakeCounter(450.0, FakeClock(), faults=Faults(mig=True))


@pytest.mark.parametrize(
    "faults, says",
    [
        (Faults(reset_at_s=2.0), "reset"),
        (Faults(jump_at_s=2.0), "jumped"),
        (Faults(jump_at_s=2.0, jump_j=-100.0), "fell"),
        (Faults(stuck_s=(2.0, 3.0)), "stuck"),
        (Faults(stuck_s=(2.0, 1e9)), "stuck"),
    ],
)
def test_1_a_faulty_counter_gives_no_joules(bench: Maker, faults: Faults, says: str) -> None:
    b = bench(faults=faults)
    with b.meter as meter:
        healthy = b.run(1.0)
        assert healthy.valid and meter.total_j() is not None
        assert_not_measured(b.run(2.5), says)
        assert meter.total_j() is None
        assert meter.reason is not None and says in meter.reason
        assert healthy.energy_j == pytest.approx(450, rel=0.05)


def test_1_windows_after_a_reset_are_whole_again_but_the_total_is_not(bench: Maker) -> None:
    b = bench(faults=Faults(reset_at_s=2.0))
    with b.meter as meter:
        b.clock.advance(3)
        window = b.run(1.0)
        assert window.valid and abs(window.energy_j - b.true_j(window)) <= window.error_j
        assert meter.total_j() is None


def test_1_a_counter_stuck_from_the_start_says_so(bench: Maker) -> None:
    b = bench(faults=Faults(stuck_s=(-1.0, 1e9)))
    with b.meter as meter:
        assert_not_measured(b.run(1.0), "stuck")
        assert meter.total_j() is None and "stuck" in str(meter.reason)


@pytest.mark.parametrize("reading", [float("nan"), float("inf"), RuntimeError("driver fell over")])
def test_1_nonsense_and_unforeseen_errors_count_as_lost(bench: Maker, reading: Any) -> None:
    b = bench()

    def broken() -> float:
        if isinstance(reading, Exception):
            raise reading
        return float(reading)

    with b.meter:
        b.clock.advance(1)
        type(b.counter).read_j, original = (lambda _: broken()), type(b.counter).read_j
        try:
            assert_not_measured(b.run(1.0), "counter")
        finally:
            type(b.counter).read_j = original


def test_1_an_estimate_is_its_own_kind() -> None:
    meter = Meter(CpuTimeCounter(8.0))
    with meter:
        with meter.window("w", "train") as window:
            sum(range(200_000))
        total_j = meter.total_j()
    result = window.result
    assert (meter.kind, result.kind, result.method) == ("estimated", "estimated", "estimated")
    assert result.energy_j is not None and result.energy_j > 0 and result.valid
    assert result.error_j is None, "nominal watts have no bound"
    assert total_j is not None and total_j >= result.energy_j


def test_2_every_value_carries_its_origin_and_bound(bench: Maker) -> None:
    b = bench(idle_w=120.0)
    with b.meter:
        window = b.run(2.0)
    assert (window.kind, window.method, window.phase) == ("measured", "interpolated", "decode")
    assert (window.device_uuid, window.device_name) == ("GPU-fake", "Fake GPU")
    assert (window.valid, window.reason) == (True, None)
    assert 0 < window.error_j < 0.05 * window.energy_j
    assert window.net_energy_j == pytest.approx(window.energy_j - 240)
    assert abs(window.energy_j - 900) <= window.error_j


def test_2_net_of_idle_is_not_made_up(bench: Maker) -> None:
    b = bench()
    with b.meter:
        assert b.run(1.0).net_energy_j is None


def test_2_a_rest_is_a_window_of_the_idle_device(bench: Maker) -> None:
    b = bench([(-1, 450.0), (1.0, 120.0)])
    with b.meter as meter:
        b.clock.advance(1.5)
        begin_s = b.clock()
        rest = meter.rest(2.0)
    assert (rest.name, rest.phase, rest.start_s) == ("rest", "idle", begin_s)
    assert rest.duration_s == pytest.approx(2.0)
    assert rest.energy_j == pytest.approx(240, rel=0.02)
    with Meter(Unavailable("no GPU here"), clock=b.clock, pace=b.clock) as meter:
        assert_not_measured(meter.rest(2.0), "no GPU here")


@pytest.mark.parametrize("idle_w", [112.0, 120.0, 131.0])
def test_2_idle_that_agrees_within_a_tenth_keeps_net_joules(bench: Maker, idle_w: float) -> None:
    """Checked right after a load, whose last counter step must not count as rest."""
    b = bench([(-1, 700.0), (1.05, 120.0)], idle_w=idle_w)
    with b.meter as meter:
        b.clock.advance(1001.05 - b.clock())
        begin_s = b.clock()
        assert meter.check_idle() is None
        assert 1.0 < b.clock() - begin_s < 2.0
        window = b.run(1.0)
    assert window.net_energy_j == pytest.approx(window.energy_j - idle_w)


@pytest.mark.parametrize("idle_w", [107.0, 136.0])
def test_2_idle_that_has_drifted_takes_net_joules_away(bench: Maker, idle_w: float) -> None:
    b = bench(120.0, idle_w=idle_w)
    with b.meter as meter:
        before = b.run(1.0)
        told = meter.check_idle(2.0)
        after = b.run(1.0)
        assert meter.check_idle() is None, "there is nothing left to check"
    assert told is not None and "120 W" in told and f"{idle_w:.0f} W" in told and "net of idle" in told
    assert before.net_energy_j is not None
    assert after.net_energy_j is None and after.energy_j is not None and after.valid


@pytest.mark.parametrize(
    "options",
    [{"idle_w": None}, {"idle_w": 300.0, "step_s": None}, {"idle_w": 300.0, "faults": Faults(lost_at_s=0.5)}],
)
def test_2_idle_that_cannot_be_checked_stays(bench: Maker, options: dict[str, Any]) -> None:
    b = bench(120.0, **options)
    with b.meter as meter:
        assert meter.check_idle() is None
        assert (b.run(1.0).net_energy_j is None) == ("step_s" not in options)


def test_2_a_contended_rest_proves_nothing(bench: Maker) -> None:
    b = bench(120.0, idle_w=300.0, faults=Faults(foreign_s=(0.0, 2.0)))
    with b.meter as meter:
        assert meter.check_idle() is None
        b.clock.advance(2)
        assert b.run(1.0).net_energy_j is not None


def test_2_a_continuous_counter_is_read_at_the_edges(bench: Maker) -> None:
    b = bench(step_s=None)
    with b.meter as meter:
        reads = b.counter.reads
        window = b.run(0.03)
        assert b.counter.reads == reads + 2
        assert window.method == "read"
        assert abs(window.energy_j - b.true_j(window)) <= window.error_j < 0.2 * window.energy_j
        assert window.error_j > 0, "the read itself takes time"
        total = meter.total_j()
        assert total is not None and total >= window.energy_j
        b.counter.faults = Faults(reset_at_s=b.clock() - 1000 + 0.5)
        assert_not_measured(b.run(1.0), "reset")
        assert meter.total_j() is None
        b.counter.faults = Faults(lost_at_s=0.0)
        assert_not_measured(b.run(1.0), "lost")
        assert "lost" in str(meter.reason)


def test_3_a_short_window_carries_a_wide_bound(bench: Maker) -> None:
    b = bench()
    with b.meter:
        short, long = b.run(0.02), b.run(5.0)
    assert short.error_j > 0.2 * short.energy_j
    assert long.error_j < 0.02 * long.energy_j


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.floats(0.001, 0.7), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_3_and_4_windows_that_share_edges_add_up(bench: Maker, lengths: list[float], seed: int) -> None:
    rng = random.Random(seed)
    power = [(index * 0.2 - 1, rng.uniform(100, 700)) for index in range(60)]
    b = bench(power, jitter_s=0.004, seed=seed)
    with b.meter as meter:
        edges = [meter.edge()]
        for length in lengths:
            b.clock.advance(length)
            edges.append(meter.edge())
        windows = [meter.cut(x, y, name=str(i), phase="decode") for i, (x, y) in enumerate(pairwise(edges))]
        outer = meter.cut(edges[0], edges[-1], name="outer", phase="decode")
    for window, first, last in zip(windows, edges[:-1], edges[1:], strict=True):
        assert window.error_j == pytest.approx(first.point.error_j + last.point.error_j)
    assert sum(window.energy_j for window in windows) == pytest.approx(outer.energy_j, abs=1e-6)
    assert abs(outer.energy_j - b.true_j(outer)) <= outer.error_j


def test_4_samples_and_gaps_conserve_the_outer_window_within_a_step(bench: Maker) -> None:
    """Samples with edges of their own and pauses between them, against an independent outer reading."""
    b = bench(
        [(-1, 120.0), *((k * 0.8 + lift, w) for k in range(20) for lift, w in ((0, 450.0), (0.5, 120.0)))]
    )
    with b.meter as meter:
        edges = []
        with meter.window("outer", "all") as outer:
            for _ in range(10):
                edges.append(meter.edge())
                b.clock.advance(0.5)
                edges.append(meter.edge())
                b.clock.advance(0.3)
            edges.append(meter.edge())
        parts = [meter.cut(x, y, name="part", phase="p") for x, y in pairwise(edges)]
    step_j = 450 * 0.1
    assert abs(sum(part.energy_j for part in parts) - outer.result.energy_j) < 1e-6
    assert abs(outer.result.energy_j - b.true_j(outer.result)) < step_j


def test_4_twice_the_tokens_cost_twice_the_joules_within_the_bound(bench: Maker) -> None:
    b = bench([(-1, 120.0), (0.9, 450.0)], jitter_s=0.004)
    with b.meter:
        b.clock.advance(2)
        once, twice = b.run(1.3), b.run(2.6)
    assert abs(twice.energy_j - 2 * once.energy_j) <= twice.error_j + 2 * once.error_j
    assert twice.energy_j / once.energy_j == pytest.approx(2, rel=0.02)


def test_4_the_same_twice_gives_no_difference(bench: Maker) -> None:
    b = bench(jitter_s=0.005)
    with b.meter:
        pairs = [(b.run(0.6), b.run(0.6)) for _ in range(20)]
    assert all(abs(x.energy_j - y.energy_j) <= x.error_j + y.error_j for x, y in pairs)
    means = [sum(pair[side].energy_j for pair in pairs) / 20 for side in (0, 1)]
    assert means[0] == pytest.approx(means[1], rel=0.005)


def test_5_the_device_is_synchronised_before_each_edge_is_stamped(bench: Maker) -> None:
    stamps: list[float] = []

    def synchronise() -> None:
        b.clock.advance(0.2)
        stamps.append(b.clock())

    b = bench(synchronise=synchronise)
    with b.meter as meter:
        window = b.run(1.0)
        edge = meter.edge()
    assert stamps == [window.start_s, window.end_s, edge.at_s]
    assert window.duration_s == pytest.approx(1.2), "the work still queued belongs to the window"


def test_5_time_is_monotonic(bench: Maker) -> None:
    assert inspect.signature(Meter).parameters["clock"].default is time.monotonic
    b = bench()
    with b.meter as meter:
        start = meter.edge()
        b.clock.advance(0.5)
        end = meter.edge()
        with pytest.raises(ValueError, match="before it starts"):
            meter.cut(end, start, name="w", phase="p")
        nothing = meter.cut(end, end, name="w", phase="p")
        assert nothing.energy_j is None and nothing.reason == "the window has no length"


def test_5_a_suspend_is_flagged_where_it_weighs(bench: Maker) -> None:
    b = bench()
    with b.meter as meter:
        outer = meter.edge()
        b.clock.advance(1)
        with meter.window("w", "p") as window:
            b.clock.advance(0.5)
            b.clock.spend(3)
            b.clock.advance(0.5)
        assert not window.result.valid and "gap" in window.result.reason
        after = b.run(1.0)
        assert after.valid
        b.clock.advance(400)
        whole = meter.cut(outer, meter.edge(), name="run", phase="train")
        assert whole.valid, "3 s of 400: the counter went on, and the bound covers the edges"


@pytest.mark.parametrize(
    "faults, says",
    [
        (Faults(foreign_s=(3.0, 6.0)), "contention: 1 other process"),
        (Faults(throttled_s=(3.0, 6.0)), "throttled (HW thermal slowdown)"),
    ],
)
def test_6_contention_and_throttling_demote_the_windows_they_touch(
    bench: Maker, faults: Faults, says: str
) -> None:
    b = bench(faults=faults)
    with b.meter as meter:
        edges = [meter.edge()]
        for _ in range(24):
            b.clock.advance(0.4)
            edges.append(meter.edge())
        windows = [meter.cut(x, y, name="w", phase="p") for x, y in pairwise(edges)]
        outer = meter.cut(edges[0], edges[-1], name="outer", phase="p")
    origin = 1000.0
    for window in windows:
        if window.end_s > origin + 3.0 and window.start_s < origin + 6.0:
            assert not window.valid and window.reason.startswith(says)
            assert window.energy_j > 0, "kept for inspection"
        if window.end_s < origin + 1.9 or window.start_s > origin + 7.2:
            assert window.valid
    assert not outer.valid and outer.reason.startswith(says)


def test_6_temperature_and_clock_are_recorded(bench: Maker) -> None:
    b = bench()
    with b.meter:
        short, long = b.run(0.05), b.run(5.0)
    for window in (short, long):
        assert (window.temperature_c, window.sm_clock_mhz) == (50.0, 1500.0)


def test_7_a_counter_lost_in_mid_run_keeps_the_finished_windows(bench: Maker) -> None:
    b = bench(faults=Faults(lost_at_s=3.0))
    with b.meter as meter:
        edges = [meter.edge()]
        for _ in range(12):
            b.clock.advance(0.4)
            edges.append(meter.edge())
        windows = [meter.cut(x, y, name="w", phase="p") for x, y in pairwise(edges)]
        assert meter.total_j() is None and meter.reason == "GPU is lost"
    done = [window for window in windows if window.end_s < 1002.8]
    rest = [window for window in windows if window.end_s > 1003.0]
    assert len(done) >= 6 and len(rest) >= 4
    for window in done:
        assert window.valid and abs(window.energy_j - b.true_j(window)) <= window.error_j
    for window in rest:
        assert_not_measured(window, "GPU is lost")


def test_8_edges_read_nothing_and_polls_keep_their_distance(bench: Maker) -> None:
    b = bench()
    with b.meter as meter:
        reads = b.counter.reads
        edges = [meter.edge() for _ in range(1000)]
        assert b.counter.reads == reads
        b.clock.advance(10)
        assert b.counter.reads - reads <= 10 / (0.005 + READ_S) + 1
    assert edges[0].point is not None


def test_8_the_device_is_looked_at_once_a_second() -> None:
    looks: list[float] = []

    class Looking(FakeCounter):
        def conditions(self) -> Conditions:
            looks.append(self.clock())
            return super().conditions()

    clock = FakeClock()
    with Meter(Looking(450.0, clock), clock=clock, pace=clock):
        looks.clear()
        clock.advance(20)
    assert 18 <= len(looks) <= 22


def test_8_a_poll_costs_less_than_one_percent_of_a_core() -> None:
    """CPU time of the polling itself, at 200 polls a second, steps and their bookkeeping included."""

    class Cheap(FakeCounter):
        def read_j(self) -> float:
            return 5000.0 + int(self.clock() * 10)

    polls: list[Callable[[], None]] = []

    class Capture(FakeClock):
        def start(self, poll: Callable[[], None], period_s: float) -> None:
            polls.append(poll)
            super().start(poll, period_s)

    clock = Capture()
    with Meter(Cheap(10.0, clock), clock=clock, pace=clock):
        count, costs = 2000, []
        for _ in range(3):
            begin_s = time.thread_time()
            for _ in range(count):
                clock.spend(0.005)
                polls[0]()
            costs.append((time.thread_time() - begin_s) / count)
    assert min(costs) / 0.005 < 0.01


def test_memory_stays_bounded_over_a_long_run(bench: Maker) -> None:
    b = bench()
    with b.meter as meter:
        first = meter.edge()
        for _ in range(300):
            b.clock.advance(1)
            meter.edge()
        gauge = meter._gauge
        assert len(gauge._log.ticks) < 20
        assert len(gauge._unresolved) < 5 and len(gauge._unlooked) < 5
        whole = meter.cut(first, meter.edge(), name="run", phase="train")
    assert whole.energy_j == pytest.approx(450 * 300, rel=0.001)


def test_settle_gives_up_when_nobody_polls(bench: Maker) -> None:
    b = bench()
    with b.meter as meter:
        start = meter.edge()
        b.clock.advance(0.5)
        end = meter.edge()
        b.clock.stop()
        assert_not_measured(meter.cut(start, end, name="w", phase="p"), "no counter step")


def test_windows_can_be_cut_after_the_meter_has_stopped(bench: Maker) -> None:
    b = bench()
    with b.meter, b.meter.window("w", "p") as window:
        b.clock.advance(1)
        with pytest.raises(RuntimeError, match="not ended"):
            _ = window.result
    assert window.result.valid
    with pytest.raises(RuntimeError, match="not running"):
        b.meter.edge()
    assert b.meter.total_j() >= window.result.energy_j


def test_total_follows_the_work(bench: Maker) -> None:
    b = bench()
    assert b.meter.reason is None, "before the start nothing is wrong"
    with b.meter as meter:
        assert meter.total_j() == 0
        b.clock.advance(10)
        assert meter.total_j() == pytest.approx(4500, rel=0.02)
        assert meter.reason is None


def test_a_real_thread_polls_a_real_clock_and_ends() -> None:
    counter = FakeCounter(100.0, time.monotonic, step_s=0.01)
    meter = Meter(counter, poll_s=0.001)
    with meter:
        assert "hestctl-meter" in {thread.name for thread in threading.enumerate()}
        with meter.window("w", "p") as window:
            time.sleep(0.03)
        edge = meter.edge()
        meter.settle()
        assert edge.point is not None
    assert "hestctl-meter" not in {thread.name for thread in threading.enumerate()}
    result = window.result
    assert result.valid
    assert result.energy_j is not None
    assert result.error_j is not None
    assert abs(result.energy_j - counter.true_j(result.start_s, result.end_s)) <= result.error_j


def test_an_exception_in_a_window_passes_through(bench: Maker) -> None:
    b = bench()
    with pytest.raises(KeyError), b.meter, b.meter.window("w", "p") as window:
        raise KeyError("work failed")
    with pytest.raises(RuntimeError, match="not ended"):
        _ = window.result


def test_windows_are_plain_records(bench: Maker) -> None:
    b = bench()
    with b.meter:
        assert dataclasses.asdict(b.run(0.5))["name"] == "w"
    assert isinstance(Edge(1.0).at_s, float)
