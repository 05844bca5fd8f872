"""An estimate where there is no counter: CPU time times nominal watts."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

from hestctl.energy.conditions import Conditions
from hestctl.energy.protocol import CounterError
from hestctl.records import EnergyKind


class CpuTimeCounter:
    """Estimated joules: CPU seconds of this process, its threads and its children, times watts per core.

    ``nominal_watts`` is what one busy core is taken to draw (W); nothing is measured. Children that run are
    counted from Linux's /proc to the kernel's 10 ms; elsewhere they count once they have ended.
    Raises CounterError for watts that are not a positive number.
    """

    kind: EnergyKind = "estimated"
    step_s: float | None = None
    max_w: float | None = None

    def __init__(self, nominal_watts: float) -> None:
        if not 0 < nominal_watts < float("inf"):
            raise CounterError(f"{nominal_watts} W is no power that a core can draw")
        self._watts = nominal_watts
        self._most_s = 0.0
        self.name = f"CPU time x {nominal_watts:g} W"
        self.device_name = cpu_name()
        self.device_uuid = cpu_id()

    def read_j(self) -> float:
        """Estimated joules since the process began."""
        ended = os.times()
        seconds = time.process_time() + ended.children_user + ended.children_system + _running_children_s()
        # A child that ends between the two looks is in neither, for one reading: time cannot fall.
        self._most_s = max(self._most_s, seconds)
        return self._most_s * self._watts

    def conditions(self) -> Conditions:
        return Conditions()


def cpu_name() -> str:
    """The processor's model as Linux names it, else the machine's architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def cpu_id() -> str:
    """Tells the CPUs of one host from another's; processors have no UUID."""
    return f"CPU-{platform.node()}"


def _running_children_s() -> float:
    """CPU seconds of all descendants that still run, and of those which these have waited for."""
    ticks = 0
    waiting = ["self"]
    while waiting:
        process = Path("/proc", waiting.pop())
        try:
            for task in (process / "task").iterdir():
                for child in (task / "children").read_text(encoding="ascii").split():
                    # The name in parentheses may hold blanks. utime, stime, cutime, cstime: 12th after it.
                    stat = Path("/proc", child, "stat").read_text(encoding="utf-8", errors="replace")
                    ticks += sum(int(value) for value in stat.rpartition(")")[2].split()[11:15])
                    waiting.append(child)
        except (OSError, ValueError):
            # Not Linux, or a process that ended while it was looked at.
            continue
    return ticks / os.sysconf("SC_CLK_TCK") if ticks else 0.0
