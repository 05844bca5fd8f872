"""The counters of joules there are, and which of them serves."""

from __future__ import annotations

import difflib
from pathlib import Path

from hestctl.energy.conditions import Conditions
from hestctl.energy.cpu import CpuTimeCounter
from hestctl.energy.nvml import NvmlCounter
from hestctl.energy.protocol import Counter, CounterError, PowerSensor, Unavailable
from hestctl.energy.rapl import RaplCounter
from hestctl.energy.replay import ReplayCounter
from hestctl.energy.trace import read_trace
from hestctl.errors import Exit, HestError

__all__ = [
    "Conditions",
    "Counter",
    "CounterError",
    "CpuTimeCounter",
    "NvmlCounter",
    "PowerSensor",
    "RaplCounter",
    "ReplayCounter",
    "Unavailable",
    "open_counter",
]

_METERS = ("auto", "nvml", "rapl", "estimate", "none", "replay:FILE")
"""What a meter may be asked for as."""


def open_counter(meter: str, *, cuda_uuid: str | None, nominal_watts: float) -> Counter | Unavailable:
    """The counter for work on the GPU ``cuda_uuid``, or on the CPU where that is None.

    ``auto`` takes the GPU's own counter for work on a GPU, and otherwise RAPL where it can be read, else an
    estimate from CPU time at ``nominal_watts`` (W) per busy core. It never falls back from a GPU to a
    counter of the CPU: the answer is then Unavailable, with the reason, as it is for ``none``.
    ``replay:FILE`` plays a counter trace, whatever the device, from the moment it is opened.
    Raises HestError (no device) where the meter asked for is not there, or does not see that work, and
    (usage) for a word that names no meter and a file that is no trace.
    """
    if meter == "none":
        return Unavailable("metering is switched off (meter: none)")
    if meter == "auto":
        return _best(cuda_uuid, nominal_watts)
    word, _, file = meter.partition(":")
    if meter not in _METERS and not (word == "replay" and file):
        near = difflib.get_close_matches(meter, _METERS, n=1)
        raise HestError(
            f"unknown meter '{meter}'" + (f"; did you mean '{near[0]}'?" if near else ""),
            f"meters: {', '.join(_METERS)}",
            Exit.USAGE,
        )
    try:
        if word == "replay":
            return ReplayCounter(read_trace(Path(file).expanduser()))
        if meter == "nvml":
            if cuda_uuid is None:
                raise CounterError("the work runs on the CPU, which NVML does not see")
            return NvmlCounter(cuda_uuid)
        if cuda_uuid is not None:
            raise CounterError(f"the work runs on GPU {cuda_uuid}, which it does not see")
        return RaplCounter() if meter == "rapl" else CpuTimeCounter(nominal_watts)
    except CounterError as error:
        raise HestError(
            f"the meter '{meter}' cannot serve: {error.reason}", _HINTS[word], Exit.NO_DEVICE
        ) from error


def _best(cuda_uuid: str | None, nominal_watts: float) -> Counter | Unavailable:
    try:
        if cuda_uuid is not None:
            return NvmlCounter(cuda_uuid)
    except CounterError as error:
        return Unavailable(error.reason)
    try:
        return RaplCounter()
    except CounterError:
        pass
    try:
        return CpuTimeCounter(nominal_watts)
    except CounterError as error:
        return Unavailable(error.reason)


_HINTS = {
    "nvml": "run on a whole NVIDIA GPU (Volta or later), or go without joules: --meter none",
    "rapl": "make /sys/class/powercap/intel-rapl*/energy_uj readable (root only by default), "
    "or take the estimate: --meter estimate",
    "estimate": "give the watts of a busy core as a positive number, or let hestctl choose: --meter auto",
    "replay": "replay the trace of a counter that could be opened",
}
