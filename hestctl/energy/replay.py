"""A counter that plays a trace, and one that records a trace of another while it is read."""

from __future__ import annotations

import json
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO, TypeVar

from hestctl.energy.conditions import Conditions
from hestctl.energy.gauge import read
from hestctl.energy.protocol import Counter, CounterError, PowerSensor
from hestctl.energy.trace import VERSION, Trace, TraceHeader
from hestctl.errors import Exit, HestError
from hestctl.records import EnergyKind

T = TypeVar("T")


class ReplayCounter:
    """Plays a trace from the moment it is made, on ``clock`` (monotonic seconds).

    Its kind is always ``estimated``: the joules belong to the work of back then, not to what runs now, and
    its UUID is no board's. Raises CounterError where the trace tells that there was no counter to open.
    """

    kind: EnergyKind = "estimated"

    def __init__(self, trace: Trace, clock: Callable[[], float] = time.monotonic) -> None:
        header = trace.header
        if header.refused is not None:
            raise CounterError(header.refused)
        self.name = f"replay of {trace.file} ({header.origin}, {header.counter})"
        self.device_name = f"{header.device_name} (replayed)"
        self.device_uuid = f"replay-{trace.digest[:12]}"
        self.driver = header.driver or "none"
        self.step_s = header.step_s
        self.max_w = header.max_w
        self._trace = trace
        self._clock = clock
        self._begin_s = clock()

    def read_j(self) -> float:
        """Joules, before the first reading those of it. Raises CounterError where the trace does or ends."""
        at_s = self._at_s()
        if at_s >= self._trace.end_s:
            raise CounterError(f"the trace ends after {self._trace.end_s:.4g} s")
        reading = _latest(self._trace.readings, at_s) or self._trace.readings[0]
        if isinstance(reading[1], str):
            raise CounterError(reading[1])
        return reading[1]

    def power_w(self) -> float:
        """Instantaneous power in watts. Raises CounterError where the trace has none, or no joules."""
        self.read_j()
        power = _latest(self._trace.powers, self._at_s())
        if power is None:
            raise CounterError("the trace tells no instant power")
        return power[1]

    def conditions(self) -> Conditions:
        seen = _latest(self._trace.conditions, self._at_s())
        return Conditions() if seen is None else seen[1]

    def _at_s(self) -> float:
        return self._clock() - self._begin_s


def _latest(rows: Sequence[tuple[float, T]], at_s: float) -> tuple[float, T] | None:
    index = bisect_right(rows, at_s, key=lambda row: row[0])
    return rows[index - 1] if index else None


class RecordingCounter:
    """A counter that writes down what it shows, and otherwise behaves as the one it wraps.

    ``recording`` makes it. Any thread may read it. Changes alone are written, each with the time at which
    the read that saw it ended: a trace is as fine as the polling was. A disk that fails ends the recording
    (``failure``) and not the metering.
    """

    def __init__(self, counter: Counter, file: TextIO, note: str, clock: Callable[[], float]) -> None:
        self.name = counter.name
        self.kind: EnergyKind = counter.kind
        self.device_name = counter.device_name
        self.device_uuid = counter.device_uuid
        self.step_s = counter.step_s
        self.max_w = counter.max_w
        self.failure: OSError | None = None
        self._counter = counter
        self._file = file
        self._clock = clock
        self._lock = threading.Lock()
        self._shown: dict[str, object] = {}
        driver = counter.driver if isinstance(counter, PowerSensor) else None
        header = TraceHeader(
            "recorded", note, self.name, self.device_name, self.device_uuid, driver, self.step_s, self.max_w
        )
        self._write({"hestctl_trace": VERSION} | asdict(header))
        self._begin_s = clock()

    def read_j(self) -> float:
        """Joules by the wrapped counter. Raises CounterError where it fails, for whatever reason."""
        try:
            energy_j = read(self._counter)
        except CounterError as error:
            self._row("reading", error.reason, {"error": error.reason})
            raise
        self._row("reading", energy_j, energy_j)
        return energy_j

    def conditions(self) -> Conditions:
        seen = self._counter.conditions()
        self._row("conditions", seen, asdict(seen))
        return seen

    def window(self, name: str, start_s: float, end_s: float, *, work: float) -> None:
        """Writes down that so much relative work was done between two times of the clock (s).

        Raises ValueError once the recording has ended.
        """
        start_s, end_s = (round(at_s - self._begin_s, 6) for at_s in (start_s, end_s))
        with self._lock:
            if self._file.closed:
                raise ValueError(f"window {name!r} comes after the end of the recording")
            self._write({"window": name, "start_s": start_s, "end_s": end_s, "work": work})

    def close(self) -> None:
        """Ends the recording; reads go on."""
        with self._lock:
            try:
                self._file.close()
            except OSError as error:
                self.failure = self.failure or error

    def _row(self, sort: str, value: object, row: float | dict[str, Any]) -> None:
        with self._lock:
            if sort not in self._shown or self._shown[sort] != value:
                self._shown[sort] = value
                # Timed under the lock, so that the rows of two threads stand in order.
                t_s = round(self._clock() - self._begin_s, 6)
                self._write({"t_s": t_s} | row if isinstance(row, dict) else [t_s, row])

    def _write(self, line: object) -> None:
        if self.failure is None and not self._file.closed:
            try:
                self._file.write(json.dumps(line) + "\n")
            except OSError as error:
                self.failure = error


class _RecordingSensor(RecordingCounter):
    """The same around a counter whose device tells its power as well."""

    @property
    def driver(self) -> str:
        return self._sensor.driver

    def power_w(self) -> float:
        """Instantaneous power in watts. Raises CounterError when there is no such number."""
        power_w = self._sensor.power_w()
        self._row("power", power_w, {"power_w": power_w})
        return power_w

    @property
    def _sensor(self) -> PowerSensor:
        assert isinstance(self._counter, PowerSensor)
        return self._counter


@contextmanager
def recording(
    counter: Counter, path: Path, *, note: str, clock: Callable[[], float] = time.monotonic
) -> Iterator[RecordingCounter]:
    """Records what the counter shows into a new file while the block runs; ``note`` says what ran.

    ``clock`` gives monotonic seconds, the same as the meter's. Raises HestError where the file is there
    already (no recording is overwritten), cannot be made, or could not be written to its end.
    """
    try:
        file = path.open("x", encoding="utf-8")
    except OSError as error:
        raise HestError(
            f"the trace {path} cannot be made: {error.strerror}",
            "name a new file in a folder that is there",
            Exit.USAGE,
        ) from None
    kind = _RecordingSensor if isinstance(counter, PowerSensor) else RecordingCounter
    recorder = kind(counter, file, note, clock)
    try:
        yield recorder
    finally:
        recorder.close()
    if recorder.failure is not None:
        raise HestError(
            f"the trace {path} is not whole: {recorder.failure.strerror}",
            "free some space and record it again",
        )
