"""The meter's self-check: a sound meter passes, and each broken demand fails its own verdict."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from hestctl.energy import check
from hestctl.energy.check import MEASURES, MeterCheck, check_meter
from hestctl.energy.counter import Unavailable
from hestctl.energy.fake import FakeClock, FakeCounter, Faults
from hestctl.energy.meter import Edge, Meter
from hestctl.records import Window

UNIT_S = 0.002
DEMANDS = ["samples", "A/A", "conservation", "linearity", "metering cost"]


def set_power(counter: FakeCounter, watts: float) -> None:
    """From now on the device draws ``watts``."""
    at_s = counter.clock() - counter._origin_s
    counter._pieces.append((at_s, watts, counter._integral(at_s)))


@dataclass
class Device:
    """Units of work on a simulated device; ``before`` runs with the number of pieces of work done so far."""

    clock: FakeClock
    counter: FakeCounter
    before: Callable[[int], None] = lambda done: None
    read_costs_s: float = 0.0
    pieces: int = 0
    stage: str = ""

    def work(self, units: int) -> None:
        self.before(self.pieces)
        self.pieces += 1
        reads = self.counter.reads
        self.clock.advance(units * UNIT_S)
        self.clock.spend((self.counter.reads - reads) * self.read_costs_s)

    def tell(self, stage: str) -> None:
        self.stage = stage


def device(read_s: float = 0.0045, **counter: Any) -> Device:
    clock = FakeClock()
    options: dict[str, Any] = {"jitter_s": 0.003, **counter}
    fake = FakeCounter(options.pop("power", 450.0), clock, on_read=lambda: clock.spend(read_s / 2), **options)
    return Device(clock, fake)


def checked(d: Device, **options: Any) -> MeterCheck:
    return check_meter(d.counter, d.work, clock=d.clock, pace=d.clock, tell=d.tell, **options)


def verdicts(found: MeterCheck) -> dict[str, bool | None]:
    return {name: met for name, met, _ in found.verdicts()}


def sentence(found: MeterCheck, name: str) -> str:
    return next(told for demand, _, told in found.verdicts() if demand == name)


@pytest.mark.parametrize(
    "counter", [{}, {"jitter_s": 0.0}, {"read_s": 0.0}, {"step_s": None, "read_s": 0.0004}]
)
def test_a_sound_meter_meets_every_demand(counter: dict[str, Any]) -> None:
    d = device(**counter)
    found = checked(d)
    assert found.missing == {}
    assert verdicts(found) == dict.fromkeys(DEMANDS, True)
    assert found.units_per_s == pytest.approx(1 / UNIT_S)
    assert (found.counter, found.kind, found.device_uuid) == ("fake", "measured", "GPU-fake")
    assert found.samples == 30 and found.coverage >= 0.95
    assert found.sample_error <= found.sample_worst < 0.05
    assert abs(found.conservation_j) < 1e-6
    assert found.linearity == pytest.approx(1, abs=0.005) and 0 < found.linearity_error < 0.02
    assert found.aa_ratio == pytest.approx(1, abs=0.005) and 0 < found.aa_error < 0.02
    assert abs(found.metering_cost) < 0.001
    assert d.clock() - 1000 < 70, "about a minute"


def test_interpolation_is_told_apart_from_reading_at_both_ends() -> None:
    found = checked(device(), samples=100)
    assert found.naive_error > 0.04 and found.naive_worst > 0.12
    assert found.sample_error < 0.01
    assert f"{found.sample_error:.1%} on average" in sentence(found, "samples")
    assert f"{found.naive_error:.1%} on average" in sentence(found, "samples")


def test_the_seed_draws_the_samples() -> None:
    first, second, other = (checked(device(), seed=seed).naive_error for seed in (1, 1, 2))
    assert first == second != other


def test_one_step_is_what_outer_window_and_counter_may_differ_by() -> None:
    found = checked(device())
    assert found.step_j == pytest.approx(450 * 0.1, rel=0.12)
    assert 0 < abs(found.outer_vs_counter_j) < found.step_j
    direct = checked(device(step_s=None, read_s=0.004))
    assert direct.step_j == pytest.approx(450 * 4 * 0.004), "two readings at either end"


def test_samples_that_cost_unlike_their_units_fail_the_samples() -> None:
    """Every other sample draws a tenth more."""
    d = device()
    d.before = lambda done: set_power(d.counter, 450 + 45 * (done % 2)) if "samples" in d.stage else None
    found = checked(d)
    assert verdicts(found)["samples"] is False
    assert found.sample_error == pytest.approx(0.05, abs=0.015)
    assert found.coverage < 0.5
    assert verdicts(found)["conservation"] is True


def power_of_runs(monkeypatch: pytest.MonkeyPatch, d: Device, **watts: float) -> None:
    """The device draws other watts in the runs named: once, double, again."""
    real = check.replicate

    def replicate(*work: Any, name: str, **options: Any) -> Any:
        set_power(d.counter, watts.get(name, 450.0))
        return real(*work, name=name, **options)

    monkeypatch.setattr(check, "replicate", replicate)


@pytest.mark.parametrize("watts, same", [(470.0, False), (430.0, False), (452.0, True)])
def test_joules_that_differ_beyond_the_bound_fail_a_against_a(
    monkeypatch: pytest.MonkeyPatch, watts: float, same: bool
) -> None:
    d = device()
    power_of_runs(monkeypatch, d, again=watts)
    found = checked(d)
    assert verdicts(found)["A/A"] is same
    assert found.aa_ratio == pytest.approx(watts / 450, abs=0.006)
    assert f"{found.aa_ratio:.4f}" in sentence(found, "A/A")
    assert ("within" if same else "beyond") in sentence(found, "A/A")


@pytest.mark.parametrize("watts, linear", [(470.0, False), (430.0, False), (452.0, True)])
def test_twice_the_work_for_other_than_twice_the_joules_fails_linearity(
    monkeypatch: pytest.MonkeyPatch, watts: float, linear: bool
) -> None:
    d = device()
    power_of_runs(monkeypatch, d, double=watts)
    found = checked(d)
    assert verdicts(found) == dict.fromkeys(DEMANDS, True) | {"linearity": linear}
    assert found.linearity == pytest.approx(watts / 450, abs=0.006)


def test_linearity_is_free_of_an_even_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    d = device()
    power_of_runs(monkeypatch, d, once=450.0, double=468.0, again=486.0)
    found = checked(d)
    assert found.linearity == pytest.approx(1, abs=0.006)
    assert verdicts(found) == dict.fromkeys(DEMANDS, True) | {"A/A": False}


def test_twice_the_work_is_twice_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter that loses the same joules in every window, however long, is not linear."""
    real = check.replicate

    def replicate(*work: Any, **options: Any) -> Any:
        found = real(*work, **options)
        return replace(found, window=replace(found.window, energy_j=found.window.energy_j - 90))

    monkeypatch.setattr(check, "replicate", replicate)
    found = checked(device())
    assert verdicts(found)["linearity"] is False and found.linearity > 1.01
    assert verdicts(found)["A/A"] is True


@pytest.mark.parametrize("leak_j", [0.01, -0.01])
def test_windows_that_do_not_add_up_fail_conservation(monkeypatch: pytest.MonkeyPatch, leak_j: float) -> None:
    cut = Meter.cut

    def leaky(meter: Meter, start: Edge, end: Edge, *, name: str, phase: str) -> Window:
        window = cut(meter, start, end, name=name, phase=phase)
        return replace(window, energy_j=window.energy_j - leak_j) if name == "gap" else window

    monkeypatch.setattr(Meter, "cut", leaky)
    found = checked(device())
    assert found.conservation_j == pytest.approx(29 * leak_j)
    assert verdicts(found) == dict.fromkeys(DEMANDS, True) | {"conservation": False}


def test_a_window_that_disagrees_with_the_counter_fails_conservation() -> None:
    """The counter steps every 0.4 s and says 0.1: what it shows at the ends is off by more than a step."""

    class Slow(FakeCounter):
        def _step_before(self, at_s: float) -> float:
            return at_s // 0.4 * 0.4

    clock = FakeClock()
    counter = Slow(450.0, clock, on_read=lambda: clock.spend(0.00225))
    found = [
        check_meter(counter, Device(clock, counter).work, clock=clock, pace=clock, seed=seed)
        for seed in range(6)
    ]
    beyond = [abs(one.outer_vs_counter_j) > one.step_j for one in found]
    assert any(beyond)
    assert [verdicts(one)["conservation"] for one in found] == [not over for over in beyond]


def test_polling_that_slows_the_work_is_its_cost() -> None:
    for costs_s, met in ((0.0003, False), (0.00004, True)):
        d = device()
        d.read_costs_s = costs_s
        found = checked(d)
        reads_per_s = 1 / (0.005 + 0.0045)
        assert found.metering_cost == pytest.approx(reads_per_s * costs_s, rel=0.1)
        assert verdicts(found)["metering cost"] is met
        assert f"{found.metering_cost:.2%}" in sentence(found, "metering cost")


@pytest.mark.parametrize("held_up", range(8))
def test_one_part_that_was_held_up_is_no_cost_of_metering(held_up: int) -> None:
    d = device()
    parts: list[int] = []

    def work(units: int) -> None:
        d.work(units)
        if "without" in d.stage and units == round(1 / UNIT_S):
            parts.append(units)
            d.clock.spend(0.4 if len(parts) == held_up + 1 else 0.0)

    found = check_meter(d.counter, work, clock=d.clock, pace=d.clock, tell=d.tell)
    assert len(parts) == 8
    assert abs(found.metering_cost) < 0.001


def test_the_readings_at_the_edges_are_a_cost_of_metering_too() -> None:
    found = checked(device(step_s=None, read_s=0.02))
    assert found.metering_cost == pytest.approx(0.04 / 1.04, rel=0.01)


def test_the_rate_is_that_of_the_warm_device() -> None:
    """The first call compiles for 3 s, and the clocks need most of a second to rise."""
    d = device()
    first_s: list[float] = []

    def work(units: int) -> None:
        if not first_s:
            d.clock.advance(3.0)
            first_s.append(d.clock())
        d.clock.advance(units * UNIT_S * (1 if d.clock() - first_s[0] > 0.7 else 4))

    found = check_meter(d.counter, work, clock=d.clock, pace=d.clock)
    assert found.units_per_s == pytest.approx(1 / UNIT_S)


def test_a_clock_that_falls_evenly_is_not_taken_for_the_cost_of_metering() -> None:
    d = device()

    def work(units: int) -> None:
        d.work(units)
        if "without" in d.stage:
            d.pieces += 1
            d.clock.spend(units * UNIT_S * 0.01 * d.pieces)

    found = check_meter(d.counter, work, clock=d.clock, pace=d.clock, tell=d.tell)
    assert abs(found.metering_cost) < 0.005


@pytest.mark.parametrize(
    "faults, says, known",
    [
        (Faults(lost_at_s=0.0), "GPU is lost", set()),
        (Faults(stuck_s=(0.0, 1e9)), "stuck", set()),
        (Faults(foreign_s=(0.0, 1e9)), "contention", {"metering_cost"}),
        (Faults(lost_at_s=15.0), "GPU is lost", set()),
        (Faults(throttled_s=(10.0, 12.0)), "throttled", set(MEASURES[8:])),
        (Faults(lost_at_s=30.0), "GPU is lost", set(MEASURES[:8])),
    ],
)
def test_what_a_failing_counter_cannot_tell_is_missing_with_the_reason(
    faults: Faults, says: str, known: set[str]
) -> None:
    found = checked(device(faults=faults))
    for name in MEASURES:
        assert (getattr(found, name) is None) == (name in found.missing) == (name not in known)
        assert name in known or says in found.missing[name]
    for name, met, told in found.verdicts():
        assert (met is None) == (says in told), name


def test_a_board_at_rest_has_nothing_to_check() -> None:
    found = checked(device(power=0.0, step_s=None))
    assert set(found.missing) == set(MEASURES) - {"metering_cost"}
    assert all("no joules" in reason for reason in found.missing.values())


def test_an_estimate_has_figures_and_no_bounds() -> None:
    found = checked(device(step_s=None, kind="estimated", read_s=0.0004))
    assert set(found.missing) == {"coverage", "linearity_error", "aa_error"}
    assert found.kind == "estimated" and found.linearity == pytest.approx(1, abs=0.01)
    judged = verdicts(found)
    assert judged["A/A"] is None and judged["linearity"] is None
    assert "estimate has no bound" in sentence(found, "A/A")
    assert judged["samples"] is True


def test_without_a_counter_nothing_runs() -> None:
    def work(units: int) -> None:
        raise AssertionError("there is nothing to meter")

    found = check_meter(Unavailable("no GPU here"), work)
    assert found.kind == "none" and found.missing == dict.fromkeys(MEASURES, "no GPU here")
    assert all(getattr(found, name) is None for name in MEASURES)
    assert [met for _, met, _ in found.verdicts()] == [None] * 5
    assert all("no GPU here" in told for _, _, told in found.verdicts())


def test_stages_are_told_and_check_ends_them() -> None:
    stages: list[str] = []
    d = device()
    check_meter(d.counter, d.work, clock=d.clock, pace=d.clock, tell=stages.append)
    assert len(stages) == len(set(stages)) == 4

    class Interrupted(Exception):
        pass

    for last in stages:
        d = device()

        def stop(d: Device = d, last: str = last) -> None:
            if d.stage == last:
                raise Interrupted

        with pytest.raises(Interrupted):
            checked(d, check=stop)
        reads = d.counter.reads
        d.clock.advance(10)
        assert d.counter.reads == reads, "the meter has stopped"


def test_work_that_takes_no_time_is_refused() -> None:
    d = device()
    with pytest.raises(ValueError, match="no time"):
        check_meter(d.counter, lambda units: None, clock=d.clock, pace=d.clock)
    with pytest.raises(ValueError, match="one sample"):
        checked(d, samples=0)


def test_slow_units_still_make_samples() -> None:
    """A unit longer than the shortest sample: each sample is one unit at least."""
    d = device()
    found = check_meter(d.counter, lambda units: d.clock.advance(units * 0.7), clock=d.clock, pace=d.clock)
    assert found.missing == {} and found.units_per_s == pytest.approx(1 / 0.7)
    assert verdicts(found) == dict.fromkeys(DEMANDS, True)


def test_errors_of_the_work_pass_through() -> None:
    d = device()

    def broken(done: int) -> None:
        if done == 20:
            raise RuntimeError("out of memory")

    d.before = broken
    with pytest.raises(RuntimeError, match="out of memory"):
        checked(d)


def test_checks_are_json() -> None:
    found = checked(device(faults=Faults(lost_at_s=30.0)))
    document = json.loads(json.dumps(found.as_dict()))
    assert document["sample_error"] == found.sample_error and document["linearity"] is None
    assert "GPU is lost" in document["missing"]["linearity"]
