"""Recorded traces: what is written down, what that is when played again, and what a recording disturbs."""

from __future__ import annotations

import errno
import io
import itertools
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hestctl.energy.conditions import Conditions
from hestctl.energy.fake import FakeClock, FakeCounter, Faults
from hestctl.energy.meter import Meter
from hestctl.energy.protocol import Counter, CounterError, PowerSensor
from hestctl.energy.replay import ReplayCounter, recording
from hestctl.energy.trace import TraceHeader, read_trace
from hestctl.errors import Exit, HestError
from hestctl.records import Window

READ_S = 0.0045
POLL_S = 0.005


def windows_over(
    counter: Counter, clock: FakeClock, lengths: list[float], recorder: Any = None
) -> list[Window]:
    """Windows back to back on a clock that starts with the counter."""
    with Meter(counter, clock=clock, pace=clock, poll_s=POLL_S) as meter:
        clock.advance(1001 - clock())
        edges = [meter.edge()]
        for length in lengths:
            clock.advance(length)
            edges.append(meter.edge())
        windows = [meter.cut(a, b, name=f"w-{i}", phase="p") for i, (a, b) in enumerate(pairwise(edges))]
    for window in windows if recorder else ():
        recorder.window(window.name, window.start_s, window.end_s, work=window.duration_s)
    return windows


def faults_of(window: Window) -> set[str]:
    """What is wrong with a window, without the figures."""
    words = ("contention", "throttled", "reset", "stuck", "lost")
    return {word for word in words if word in str(window.reason)}


@pytest.mark.parametrize(
    "faults, found",
    [
        (Faults(), set()),
        (Faults(foreign_s=(3.0, 5.0), throttled_s=(6.0, 7.0)), {"contention", "throttled"}),
        (Faults(reset_at_s=4.0), {"reset"}),
        (Faults(stuck_s=(4.0, 6.0)), {"stuck"}),
        (Faults(lost_at_s=5.0), {"lost"}),
    ],
)
def test_a_recording_played_again_gives_the_same_windows(
    tmp_path: Path, faults: Faults, found: set[str]
) -> None:
    path = tmp_path / "t.jsonl"
    power = [(0.7 * index - 1, 250.0 + 200 * (index % 2)) for index in range(30)]
    lengths = [0.31, 0.6, 0.123, 1.0, 0.45, 2.0, 0.2, 0.77, 1.5]
    clock = FakeClock()
    fake = FakeCounter(
        power, clock, jitter_s=0.004, faults=faults, on_read=lambda: clock.spend(READ_S / 2), step_s=0.1
    )
    with recording(fake, path, note="a test", clock=clock) as recorder:
        live = windows_over(recorder, clock, lengths, recorder)
    trace = read_trace(path)
    assert [(w.name, w.work) for w in trace.windows] == [(w.name, pytest.approx(w.duration_s)) for w in live]
    assert trace.windows[0].start_s == pytest.approx(1.0)
    clock = FakeClock()
    again = windows_over(ReplayCounter(trace, clock), clock, lengths)
    assert set().union(*map(faults_of, live)) == found
    for a, b in zip(live, again, strict=True):
        assert faults_of(a) == faults_of(b)
        assert (a.valid, a.method, a.temperature_c) == (b.valid, b.method, b.temperature_c)
        assert (a.energy_j is None) == (b.energy_j is None)
        if a.energy_j is not None:
            assert b.energy_j == pytest.approx(a.energy_j, abs=450 * (POLL_S + READ_S))


def test_a_recording_is_the_counter_it_wraps_and_says_whose_it_is(tmp_path: Path) -> None:
    clock = FakeClock()
    fake = FakeCounter(450.0, clock)
    with recording(fake, tmp_path / "t.jsonl", note="decoding", clock=clock) as recorder:
        assert isinstance(recorder, PowerSensor)
        for name in ("name", "kind", "device_name", "device_uuid", "step_s", "max_w", "driver"):
            assert getattr(recorder, name) == getattr(fake, name)
        clock.spend(2.5)
        assert (recorder.read_j(), recorder.power_w()) == (fake.read_j(), 450.0)
        assert recorder.conditions() == fake.conditions()
    trace = read_trace(tmp_path / "t.jsonl")
    assert trace.header == TraceHeader(
        "recorded", "decoding", "fake", "Fake GPU", "GPU-fake", "0.0", 0.1, 1000.0
    )
    assert (trace.readings, trace.powers) == (((2.5, fake.read_j()),), ((2.5, 450.0),))
    assert trace.conditions == ((2.5, fake.conditions()),)
    assert trace.end_s == 2.6
    counter = ReplayCounter(trace)
    assert (counter.kind, counter.name) == ("estimated", "replay of t.jsonl (recorded, fake)")


class Scripted:
    """A counter that shows what it is told to, one reading after the other; it tells no power."""

    name = "scripted"
    kind = "measured"
    device_name = "d"
    device_uuid = "GPU-d"
    step_s = None
    max_w = None

    def __init__(self, clock: FakeClock, readings: list[Any]) -> None:
        self._clock = clock
        self._readings = iter(readings)

    def read_j(self) -> float:
        self._clock.spend(0.5)
        reading = next(self._readings)
        if isinstance(reading, Exception):
            raise reading
        return float(reading)

    def conditions(self) -> Conditions:
        return Conditions()


def test_changes_alone_are_recorded_each_at_the_end_of_its_read(tmp_path: Path) -> None:
    clock = FakeClock()
    readings = [
        7,
        7,
        8,
        CounterError("gone"),
        CounterError("gone"),
        RuntimeError("fell over"),
        float("nan"),
        8,
    ]
    with recording(Scripted(clock, readings), tmp_path / "t.jsonl", note="", clock=clock) as recorder:
        assert not isinstance(recorder, PowerSensor)
        for reading in readings:
            try:
                assert recorder.read_j() == reading
            except CounterError as error:
                assert isinstance(reading, Exception) or error.reason == "the counter reads nan"
            recorder.conditions()
    trace = read_trace(tmp_path / "t.jsonl")
    failed = "the counter failed: RuntimeError: fell over"
    assert trace.readings == (
        (0.5, 7.0),
        (1.5, 8.0),
        (2.0, "gone"),
        (3.0, failed),
        (3.5, "the counter reads nan"),
        (4.0, 8.0),
    )
    assert trace.conditions == ((0.5, Conditions()),)


def test_a_continuous_counter_is_played_as_the_estimate_it_is(tmp_path: Path) -> None:
    clock = FakeClock()
    readings = range(1, 20)
    with recording(Scripted(clock, [*readings]), tmp_path / "t.jsonl", note="", clock=clock) as recorder:
        for _ in readings:
            recorder.read_j()
    clock = FakeClock()
    meter = Meter(ReplayCounter(read_trace(tmp_path / "t.jsonl"), clock), clock=clock)
    with meter, meter.window("w", "p") as window:
        clock.spend(5)
    result = window.result
    assert (result.kind, result.method, result.energy_j, result.error_j) == (
        "estimated",
        "estimated",
        9,
        None,
    )


def test_threads_record_rows_in_order(tmp_path: Path) -> None:
    class Moving(FakeCounter):
        def read_j(self) -> float:
            return float(next(count))

        def conditions(self) -> Conditions:
            return Conditions(temperature_c=next(count))

    def read(counter: Counter) -> None:
        for _ in range(500):
            counter.read_j()
            counter.conditions()

    def clock() -> float:
        now_s = time.monotonic()
        time.sleep(0)  # lets another thread take a later time first
        return now_s

    count = itertools.count()
    with recording(Moving(1.0, clock), tmp_path / "t.jsonl", note="", clock=clock) as recorder:
        threads = [threading.Thread(target=read, args=(recorder,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    trace = read_trace(tmp_path / "t.jsonl")
    assert len(trace.readings) == len(trace.conditions) == 2000
    recorder.read_j()
    with pytest.raises(ValueError, match="'late' comes after the end"):
        recorder.window("late", 0.0, 1.0, work=1)
    assert read_trace(tmp_path / "t.jsonl").digest == trace.digest, "what comes after the end is not recorded"


def test_a_full_disk_ends_the_recording_and_not_the_metering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            asked.append(text)
            if text.startswith("["):
                raise OSError(errno.ENOSPC, "No space left on device")
            return len(text)

    monkeypatch.setattr(Path, "open", lambda *_, **__: Full())
    clock = FakeClock()
    with (
        pytest.raises(HestError, match=r"t\.jsonl is not whole: No space left on device"),
        recording(FakeCounter(450.0, clock), tmp_path / "t.jsonl", note="", clock=clock) as recorder,
    ):
        (window,) = windows_over(recorder, clock, [1.0])
        assert window.valid
        recorder.window("w", 0.0, 1.0, work=1)
    assert asked[-1].startswith("["), "a trace with a hole would pass for a whole one"


@pytest.mark.parametrize("name, says", [("there.jsonl", "File exists"), ("no/t.jsonl", "No such file")])
def test_a_recording_that_cannot_be_made(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "there.jsonl").write_text("precious")
    with (
        pytest.raises(HestError, match=says) as caught,
        recording(FakeCounter(450.0, FakeClock()), tmp_path / name, note=""),
    ):
        pytest.fail("it began")
    assert caught.value.exit_code == Exit.USAGE and caught.value.hint
    assert (tmp_path / "there.jsonl").read_text() == "precious"
