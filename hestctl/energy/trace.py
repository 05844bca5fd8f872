"""Counter traces: files of what a counter showed, and when.

A trace is JSON lines. The first is the header::

    {"hestctl_trace": 1, "origin": "recorded", "note": "fp16 matmuls", "counter": "NVML total energy",
     "device_name": "NVIDIA H100", "device_uuid": "GPU-...", "driver": "580.1", "step_s": 0.1, "max_w": 875.0}

``origin`` is ``recorded`` or ``simulated``; ``driver``, ``step_s`` (s) and ``max_w`` (W) may be null. With
``"refused": REASON`` there was no counter to open. The other lines are in order of time, ``t_s`` in seconds
since the trace began; what one says holds until the next of its sort:

``[t_s, energy_j]``
    the counter reads so many joules
``{"t_s": 2.5, "error": "GPU is lost"}``
    the counter cannot be read, until a reading follows
``{"t_s": 2.5, "power_w": 431.0}``
    the instant power
``{"t_s": 2.5, "temperature_c": 55, "sm_clock_mhz": 1980, "throttled": null, "foreign_processes": 0}``
    the state of the device; what is left out is not known
``{"window": "s-3", "start_s": 1.2, "end_s": 1.9, "work": 12, "true_j": 301.2}``
    anywhere: a stretch of known relative work, with its true joules where the trace is simulated
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hestctl.energy.conditions import Conditions
from hestctl.errors import Exit, HestError

VERSION = 1


@dataclass(frozen=True, slots=True)
class TraceHeader:
    """Whose counter a trace shows and how the trace came to be; ``step_s`` in seconds, ``max_w`` in watts."""

    origin: str
    note: str
    counter: str
    device_name: str
    device_uuid: str
    driver: str | None
    step_s: float | None
    max_w: float | None
    refused: str | None = None


@dataclass(frozen=True, slots=True)
class TraceWindow:
    """Relative ``work`` between two times of the trace (s); ``true_j`` (J) is None where it was recorded."""

    name: str
    start_s: float
    end_s: float
    work: float
    true_j: float | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace in memory. A row begins with its time (s); a reading is joules, or why there are none."""

    file: str
    digest: str
    header: TraceHeader
    readings: Sequence[tuple[float, float | str]]
    powers: Sequence[tuple[float, float]]
    conditions: Sequence[tuple[float, Conditions]]
    windows: Sequence[TraceWindow]
    end_s: float
    """When the step after the last row would have been due: from then on nothing is known."""


def read_trace(path: Path) -> Trace:
    """Raises HestError (usage) with file and line for a file that is missing, empty, damaged or no trace."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise HestError(
            f"the trace {path} cannot be read: {error.strerror}",
            "give the path of a counter trace: --meter replay:FILE",
            Exit.USAGE,
        ) from None
    rows: dict[str, list[Any]] = {"readings": [], "powers": [], "conditions": [], "windows": []}
    header: TraceHeader | None = None
    number, last_s = 1, 0.0
    try:
        if not content.strip():
            raise ValueError("the file is empty")
        first, *rest = content.splitlines()
        header = _header(_json(first))
        for line in rest:
            number += 1
            sort, row = _row(_json(line))
            rows[sort].append(row)
            if sort != "windows":
                if row[0] < last_s:
                    raise ValueError(f"{row[0]:g} s comes after {last_s:g} s: rows stand in order of time")
                last_s = row[0]
        if not rows["readings"] and header.refused is None:
            raise ValueError("the trace ends without a reading of the counter")
    except (ValueError, OverflowError) as error:
        hint = "mend or remove that line, or record the trace again"
        if header is None:
            hint = f'a counter trace begins with a header, {{"hestctl_trace": {VERSION}, ...}}'
        raise HestError(f"{path}, line {number}: {error}", hint, Exit.USAGE) from None
    return Trace(
        path.name,
        hashlib.sha256(content).hexdigest(),
        header,
        **{sort: tuple(found) for sort, found in rows.items()},
        end_s=last_s + (header.step_s or 0.0),
    )


def _json(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"not valid JSON: {_shown(line.decode(errors='replace'))}") from None


def _header(document: object) -> TraceHeader:
    if not isinstance(document, dict) or "hestctl_trace" not in document:
        raise ValueError(f"not the header of a counter trace: {_shown(document)}")
    version = document.pop("hestctl_trace")
    if version != VERSION:
        raise ValueError(f"trace format {_shown(version)}; this hestctl reads format {VERSION}")
    names = {one.name for one in fields(TraceHeader)}
    if missing := names - {"refused"} - document.keys():
        raise ValueError(f"the header lacks {min(missing)!r}")
    if unknown := document.keys() - names:
        raise ValueError(f"the header has an unknown key {min(unknown)!r}")
    for name, value in document.items():
        if name in ("step_s", "max_w"):
            good = value is None or _number(value, name) > 0
        elif name == "origin":
            good = value in ("recorded", "simulated")
        else:
            good = isinstance(value, str) or (value is None and name in ("driver", "refused"))
        if not good:
            raise ValueError(f"the header's {name} cannot be {_shown(value)}")
    return TraceHeader(**document)


def _row(document: object) -> tuple[str, Any]:
    """The field of ``Trace`` that a line belongs to, and its row there. Raises ValueError."""
    match document:
        case [t_s, energy_j]:
            return "readings", (_time(t_s), _number(energy_j, "energy_j"))
        case {"t_s": t_s, "error": str(reason), **more} if not more:
            return "readings", (_time(t_s), reason)
        case {"t_s": t_s, "power_w": power_w, **more} if not more:
            return "powers", (_time(t_s), _number(power_w, "power_w"))
        case {"t_s": t_s, **seen} if seen.keys() <= {one.name for one in fields(Conditions)}:
            return "conditions", (_time(t_s), _conditions(seen))
        case {"window": str(name), "start_s": start_s, "end_s": end_s, "work": work, **more} if (
            more.keys() <= {"true_j"}
        ):
            true_j = more.get("true_j")
            return "windows", TraceWindow(
                name,
                _time(start_s),
                _time(end_s),
                _number(work, "work"),
                None if true_j is None else _number(true_j, "true_j"),
            )
    raise ValueError(f"neither reading, error, power, conditions nor window: {_shown(document)}")


def _conditions(seen: dict[Any, Any]) -> Conditions:
    for name, value in seen.items():
        if name == "throttled" and not isinstance(value, str | None):
            raise ValueError(f"throttled must be words or null, not {_shown(value)}")
        if name != "throttled" and value is not None:
            _number(value, name)
    return Conditions(**seen)


def _time(value: object) -> float:
    t_s = _number(value, "a time")
    if t_s < 0:
        raise ValueError(f"a time cannot be {t_s:g} s: it counts from the trace's begin")
    return t_s


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, not {_shown(value)}")
    return float(value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
