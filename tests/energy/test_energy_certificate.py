"""What the certificate finds out about counters whose truth is known."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hestctl.energy.certificate import MEASURES, certify
from hestctl.energy.counter import CpuTimeCounter, Unavailable
from hestctl.energy.fake import FakeClock, FakeCounter, Faults

BUSY = [(-1, 120.0), (9.99, 450.0), (25.0, 120.0)]
"""The watts of a device that rests, works for the certificate, and rests again."""


def certificate(power: Any = 120.0, **counter: Any) -> Any:
    """At rest for 10 s, then for 15 s a load that draws what the pieces say, and at rest again."""
    clock = FakeClock()
    fake = FakeCounter(power, clock, on_read=lambda: clock.spend(0.00225), **counter)
    return certify(fake, clock=clock, pace=clock, load=clock.advance)


def test_a_good_counter_is_certified() -> None:
    found = certificate(BUSY, jitter_s=0.003)
    assert found.missing == {} and found.warnings == ()
    assert found.step_s == pytest.approx(0.1, abs=0.006)
    assert 0 < found.jitter_s < 0.01
    assert found.idle_w == pytest.approx(120, rel=0.01)
    assert 0 < found.noise_j < 120 * 0.02
    assert found.load_w == pytest.approx(450, rel=0.01)
    assert found.polling_ratio == pytest.approx(1, abs=0.01)
    assert found.power_ratio == pytest.approx(1, abs=0.01)
    assert 0.1 < found.least_window_5pct_s < 1.5
    assert found.least_window_1pct_s == pytest.approx(5 * found.least_window_5pct_s)
    assert found.read_s == pytest.approx(0.0045)
    assert found.polling_share == pytest.approx(0.0045 / 0.0095)
    assert found.idle_after_w == pytest.approx(120, rel=0.01)
    assert found.idle_drift == pytest.approx(found.idle_after_w / found.idle_w - 1)
    assert (found.kind, found.device_uuid, found.driver) == ("measured", "GPU-fake", "0.0")


def test_the_least_window_keeps_its_promise() -> None:
    from hestctl.energy.meter import Meter

    found = certificate(BUSY, jitter_s=0.003)
    clock = FakeClock()
    fake = FakeCounter(450.0, clock, jitter_s=0.003, seed=9, on_read=lambda: clock.spend(0.00225))
    with Meter(fake, clock=clock, pace=clock) as meter:
        for _ in range(20):
            with meter.window("w", "p") as window:
                clock.advance(found.least_window_5pct_s)
            assert window.result.error_j is not None and window.result.energy_j is not None
            assert window.result.error_j <= 0.055 * window.result.energy_j


def test_a_board_that_loses_energy_when_polled_is_found_out() -> None:
    found = certificate(BUSY, faults=Faults(lost_per_read_j=0.2))
    assert found.polling_ratio < 0.97
    assert any("polling changes" in warning for warning in found.warnings)


def test_power_that_disagrees_with_the_counter_is_told() -> None:
    assert certificate(450.0, power_gain=0.9).power_ratio == pytest.approx(1 / 0.9, rel=0.01)


@pytest.mark.parametrize("after_w, warned", [(150.0, True), (100.0, True), (128.0, False), (112.0, False)])
def test_idle_that_drifts_beyond_a_tenth_is_warned_of(after_w: float, warned: bool) -> None:
    """The device needs most of a second after the load to come to rest, which must not count."""
    found = certificate([*BUSY[:2], (25.7, after_w)])
    assert found.idle_w == pytest.approx(120, rel=0.01)
    assert found.idle_after_w == pytest.approx(after_w, rel=0.01)
    assert found.idle_drift == pytest.approx(after_w / 120 - 1, abs=0.02)
    drifts = [warning for warning in found.warnings if "idle drifted from 120 W" in warning]
    assert bool(drifts) is warned
    assert not warned or f"to {after_w:.0f} W: joules net of idle are off by that much a second" in drifts[0]


def test_what_polling_occupies_counts_readings_and_looks() -> None:
    """Readings of 2 ms after 3 ms of pause, and a look of 50 ms a second: 45 % of the time."""

    class Looked(FakeCounter):
        def conditions(self) -> Any:
            clock.spend(0.05)
            return super().conditions()

    clock = FakeClock()
    fake = Looked(120.0, clock, on_read=lambda: clock.spend(0.001))
    found = certify(fake, clock=clock, pace=clock, load=clock.advance, poll_s=0.003)
    assert found.read_s == pytest.approx(0.002)
    assert found.polling_share == pytest.approx(0.4 + 0.05)


def test_readings_are_timed_under_load() -> None:
    clock = FakeClock()
    fake = FakeCounter(BUSY, clock, on_read=lambda: clock.spend(0.002 if 1010 <= clock() < 1025 else 0.0001))
    found = certify(fake, clock=clock, pace=clock, load=clock.advance)
    assert found.read_s == pytest.approx(0.004)
    assert clock() - 1000 == pytest.approx(10 + 14.9 + 1 + 5, abs=0.05), "half the first rest, a second later"


def test_one_reading_that_takes_long_is_not_what_readings_take() -> None:
    clock = FakeClock()
    fake = FakeCounter(120.0, clock, on_read=lambda: clock.spend(0.05 if fake.reads % 20 == 0 else 0.001))
    assert certify(fake, clock=clock, pace=clock, load=clock.advance).read_s == pytest.approx(0.002)


def test_contention_is_warned_of() -> None:
    found = certificate(faults=Faults(foreign_s=(-1, 1e9)))
    assert any("contention" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    "faults, says, known",
    [
        (Faults(lost_at_s=2.0), "GPU is lost", set()),
        (Faults(stuck_s=(2.0, 1e9)), "stuck", set()),
        (Faults(reset_at_s=2.0), "reset", set()),
        (Faults(lost_at_s=12.0), "GPU is lost", {"step_s", "jitter_s", "idle_w", "noise_j"}),
        (Faults(lost_at_s=26.0), "GPU is lost", {*MEASURES} - {"idle_after_w", "idle_drift"}),
    ],
)
def test_what_a_failing_counter_cannot_tell_is_missing_with_the_reason(
    faults: Faults, says: str, known: set[str]
) -> None:
    found = certificate(faults=faults)
    for name in MEASURES:
        assert (getattr(found, name) is None) == (name not in known)
        assert name in known or says in found.missing[name]


def test_polling_ends_with_the_certificate_or_with_a_load_that_fails() -> None:
    def broken(seconds: float) -> None:
        clock.advance(seconds / 2)
        raise RuntimeError("out of memory")

    clock = FakeClock()
    fake = FakeCounter(120.0, clock)
    with pytest.raises(RuntimeError, match="out of memory"):
        certify(fake, clock=clock, pace=clock, load=broken)
    reads = fake.reads
    clock.advance(60)
    assert fake.reads == reads


def test_too_short_a_look_is_not_a_certificate() -> None:
    clock = FakeClock()
    found = certify(FakeCounter(120.0, clock), clock=clock, pace=clock, seconds=0.5)
    assert found.step_s is None and "too few" in found.missing["step_s"]


class Powerless:
    """A counter that offers joules and conditions, and no instant power."""

    def __init__(self, inner: FakeCounter) -> None:
        self._inner = inner
        self.name, self.kind, self.device_name = inner.name, inner.kind, inner.device_name
        self.device_uuid, self.step_s, self.max_w = inner.device_uuid, inner.step_s, inner.max_w

    def read_j(self) -> float:
        return self._inner.read_j()

    def conditions(self) -> Any:
        return self._inner.conditions()


def test_a_counter_without_instant_power_has_no_power_ratio() -> None:
    clock = FakeClock()
    fake = FakeCounter(120.0, clock, on_read=lambda: clock.spend(0.00225))
    found = certify(Powerless(fake), clock=clock, pace=clock, load=clock.advance)
    assert found.power_ratio is None and found.driver is None
    assert "no instant power" in found.missing["power_ratio"]
    assert set(found.missing) == {"power_ratio"}


def test_what_was_missing_before_keeps_its_own_reason() -> None:
    clock = FakeClock()
    fake = FakeCounter(120.0, clock, faults=Faults(lost_at_s=26.0))
    found = certify(Powerless(fake), clock=clock, pace=clock, load=clock.advance)
    assert "no instant power" in found.missing["power_ratio"]
    assert found.missing["idle_after_w"] == "GPU is lost"


@pytest.mark.parametrize(
    "counter, kind, says",
    [(Unavailable("no GPU here"), "none", "no GPU here"), (CpuTimeCounter(8.0), "estimated", "estimated")],
)
def test_without_a_counter_there_are_reasons_and_no_numbers(counter: Any, kind: str, says: str) -> None:
    found = certify(counter)
    assert found.kind == kind
    assert all(getattr(found, name) is None and says in found.missing[name] for name in MEASURES)


def test_certificates_are_json() -> None:
    document = json.loads(json.dumps(certificate(faults=Faults(foreign_s=(-1, 1e9))).as_dict()))
    assert document["idle_w"] == pytest.approx(120, rel=0.01)
    assert document["created_at"].endswith("+00:00")
    assert isinstance(document["warnings"], list)
