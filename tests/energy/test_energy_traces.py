"""Trace files: how their rows are read and played, and what a bad file is told."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from hestctl.energy.conditions import Conditions
from hestctl.energy.fake import FakeClock
from hestctl.energy.meter import Meter
from hestctl.energy.protocol import CounterError
from hestctl.energy.replay import ReplayCounter
from hestctl.energy.trace import Trace, TraceHeader, TraceWindow, read_trace
from hestctl.errors import Exit, HestError

HEADER = TraceHeader("recorded", "", "c", "d", "GPU-d", None, 0.5, None)
SMALL = Trace(
    "small.jsonl",
    "0" * 64,
    HEADER,
    readings=((1.0, 10.0), (2.0, 20.0), (3.0, "gone"), (4.0, 40.0)),
    powers=((2.0, 300.0),),
    conditions=((2.0, Conditions(temperature_c=50)),),
    windows=(),
    end_s=4.5,
)


def test_each_row_holds_until_the_next_of_its_sort() -> None:
    clock = FakeClock()
    counter = ReplayCounter(SMALL, clock)
    shown = []
    for _ in range(20):
        row: list[Any] = []
        for reading in (counter.read_j, counter.power_w):
            try:
                row.append(reading())
            except CounterError as error:
                row.append(error.reason)
        shown.append((*row, counter.conditions().temperature_c))
        clock.spend(0.25)
    powerless, ended = "the trace tells no instant power", "the trace ends after 4.5 s"
    assert shown == [
        *[(10.0, powerless, None)] * 8,
        *[(20.0, 300.0, 50)] * 4,
        *[("gone", "gone", 50)] * 4,
        *[(40.0, 300.0, 50)] * 2,
        *[(ended, ended, 50)] * 2,
    ]
    assert counter.driver == "none"


def test_after_the_end_joules_are_not_measured() -> None:
    steps = tuple((index / 10, index * 45.0) for index in range(40))
    trace = Trace("t.jsonl", "0" * 64, HEADER, steps, (), (), (), end_s=4.0)
    clock = FakeClock()
    with Meter(ReplayCounter(trace, clock), clock=clock, pace=clock) as meter:
        with meter.window("inside", "p") as inside:
            clock.advance(2)
        clock.advance(2)
        with meter.window("after", "p") as after:
            clock.advance(1)
        assert inside.result.energy_j == pytest.approx(900, rel=0.02)
        assert (after.result.energy_j, after.result.reason) == (None, "the trace ends after 4 s")
        assert meter.total_j() is None


def test_it_plays_on_the_real_clock_beside_a_real_thread() -> None:
    steps = tuple((index / 100, index * 2.0) for index in range(6000))
    header = TraceHeader("recorded", "", "c", "d", "GPU-d", None, 0.01, None)
    trace = Trace("long.jsonl", "0" * 64, header, steps, (), (), (), end_s=60.0)
    with Meter(ReplayCounter(trace), poll_s=0.001) as meter:
        with meter.window("w", "p") as window:
            time.sleep(0.05)
        result = window.result
    assert (result.kind, result.method) == ("estimated", "interpolated")
    assert result.energy_j is not None and result.error_j is not None
    assert abs(result.energy_j - 200 * result.duration_s) <= result.error_j


GOOD = {
    "hestctl_trace": 1,
    "origin": "simulated",
    "note": "",
    "counter": "c",
    "device_name": "d",
    "device_uuid": "u",
    "driver": None,
    "step_s": 0.1,
    "max_w": None,
}
ROW = b"[0.5, 10]\n"


def header(**changes: Any) -> bytes:
    kept = {name: value for name, value in {**GOOD, **changes}.items() if value is not ...}
    return json.dumps(kept).encode() + b"\n"


def test_every_sort_of_line_is_read(tmp_path: Path) -> None:
    rows = (
        b'{"window": "a", "start_s": 0.1, "end_s": 0.6, "work": 3}\n[0.5, 10]\n{"t_s": 0.5, "power_w": 9}\n'
        b'{"t_s": 1, "throttled": "hot", "foreign_processes": 2}\n{"t_s": 1.5, "error": "gone"}\n'
        b'{"window": "b", "start_s": 0, "end_s": 9, "work": 1, "true_j": 5.5}'
    )
    path = tmp_path / "t.jsonl"
    path.write_bytes(header(refused="no") + rows)
    trace = read_trace(path)
    assert (trace.file, trace.header.refused, trace.end_s) == ("t.jsonl", "no", 1.6)
    assert trace.readings == ((0.5, 10.0), (1.5, "gone"))
    assert trace.powers == ((0.5, 9.0),)
    assert trace.conditions == ((1.0, Conditions(None, None, "hot", 2)),)
    assert trace.windows == (TraceWindow("a", 0.1, 0.6, 3.0), TraceWindow("b", 0.0, 9.0, 1.0, 5.5))


@pytest.mark.parametrize(
    "content, line, says",
    [
        (b"", 1, "the file is empty"),
        (b"\n \n", 1, "the file is empty"),
        (b"\x80\x04\x95\x0b\x00", 1, "not valid JSON"),
        (b"[" * 100_000, 1, "not valid JSON: '[[["),
        (b"time,joules\n", 1, "not valid JSON: 'time,joules'"),
        (b"[1, 2]\n", 1, "not the header of a counter trace: [1, 2]"),
        (b'{"id": 3}\n', 1, "not the header of a counter trace"),
        (header(hestctl_trace=2), 1, "trace format 2; this hestctl reads format 1"),
        (header(max_w=...), 1, "the header lacks 'max_w'"),
        (header(maxw=3), 1, "the header has an unknown key 'maxw'"),
        (header(origin="guessed"), 1, "the header's origin cannot be 'guessed'"),
        (header(step_s=0), 1, "the header's step_s cannot be 0"),
        (header(max_w="700"), 1, "max_w must be a finite number, not '700'"),
        (header(note=3), 1, "the header's note cannot be 3"),
        (header(device_name=None), 1, "the header's device_name cannot be None"),
        (header(), 1, "without a reading"),
        (header() + b'{"t_s": 1, "power_w": 4}\n', 2, "without a reading"),
        (header() + ROW + b"[1.0, 1", 3, "not valid JSON: '[1.0, 1'"),
        (header() + ROW + b"\n[1, 2]", 3, "not valid JSON: ''"),
        (header() + b"[1]", 2, "neither reading, error, power, conditions nor window: [1]"),
        (header() + b'[1, "5"]', 2, "energy_j must be a finite number, not '5'"),
        (header() + b"[1, NaN]", 2, "energy_j must be a finite number, not nan"),
        (header() + b"[1, 1e999]", 2, "energy_j must be a finite number, not inf"),
        (header() + b"[1, 1" + b"0" * 400 + b"]", 2, "too large"),
        (header() + b"[true, 5]", 2, "a time must be a finite number, not True"),
        (header() + b"[-1, 5]", 2, "a time cannot be -1 s"),
        (header() + ROW + b"[0.4, 11]", 3, "0.4 s comes after 0.5 s"),
        (header() + b'{"t_s": 1, "eror": "lost"}', 2, "neither reading"),
        (header() + b'{"t_s": 1, "error": 5}', 2, "neither reading"),
        (header() + b'{"t_s": 1, "power_w": null}', 2, "power_w must be a finite number"),
        (header() + b'{"t_s": 1, "temperature_c": "hot"}', 2, "temperature_c must be a finite number"),
        (header() + b'{"t_s": 1, "throttled": 1}', 2, "throttled must be words or null, not 1"),
        (header() + b'{"window": "a", "start_s": 1, "end_s": 2}', 2, "neither reading"),
        (header() + b'{"window": "a", "start_s": 1, "end_s": 2, "work": 1, "j": 2}', 2, "neither reading"),
    ],
)
def test_a_bad_file_is_told_where_and_why(tmp_path: Path, content: bytes, line: int, says: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(HestError) as caught:
        read_trace(path)
    assert caught.value.message.startswith(f"{path}, line {line}: ")
    assert says in caught.value.message and len(caught.value.message) < 250
    assert caught.value.exit_code == Exit.USAGE
    header_is_at_fault = line == 1 and "without a reading" not in says
    assert caught.value.hint and ("begins with a header" in caught.value.hint) == header_is_at_fault


@pytest.mark.parametrize("name, says", [("missing.jsonl", "No such file"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(HestError, match=f"cannot be read: {says}") as caught:
        read_trace(tmp_path / name)
    assert caught.value.exit_code == Exit.USAGE and "replay:FILE" in (caught.value.hint or "")
