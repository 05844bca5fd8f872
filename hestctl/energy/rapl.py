"""The energy counters of the CPU package and its memory (RAPL), found through Zeus."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hestctl.energy.conditions import Conditions
from hestctl.energy.cpu import cpu_id, cpu_name
from hestctl.energy.protocol import CounterError
from hestctl.records import EnergyKind

_PACKAGE_MAX_W = 1000.0


class RaplCounter:
    """Joules of all CPU packages and their DRAM.

    Zeus finds the zones; the files are read here, because its own reading starts a child process per file
    to count wraparounds, and that process sees a wrap up to a second after the reading did. Zones that are
    not a package are left out: ``psys`` holds the packages once more.
    Raises CounterError where there is no RAPL, or where only root may read it.
    """

    kind: EnergyKind = "measured"
    step_s: float | None = 0.001

    def __init__(self) -> None:
        try:
            cpus: list[Any] = list(importlib.import_module("zeus.device").get_cpus().cpus)
        except Exception as error:
            raise CounterError(f"RAPL cannot be read: {error}") from error
        if any(not hasattr(cpu, "rapl_file") for cpu in cpus):
            raise CounterError("RAPL through the Zeus daemon does not tell packages from other zones")
        packages = [cpu for cpu in cpus if str(cpu.rapl_file.name).startswith("package")]
        if not packages:
            raise CounterError("RAPL has no CPU package")
        memories = [cpu.dram for cpu in packages if cpu.dram is not None]
        zones = [cpu.rapl_file for cpu in packages] + memories
        self._zones = [
            unwrapped(_microjoules(Path(zone.energy_uj_path)), float(zone.max_energy_range_uj))
            for zone in zones
        ]
        self.max_w: float | None = _PACKAGE_MAX_W * len(packages)
        self.name = "RAPL package + DRAM" if memories else "RAPL package"
        self.device_name = cpu_name()
        self.device_uuid = cpu_id()
        if self.read_j() <= 0:
            raise CounterError("RAPL reads 0 J")

    def read_j(self) -> float:
        """Joules since an arbitrary origin; must be called once per wraparound, minutes apart at least."""
        try:
            return sum(zone() for zone in self._zones) / 1e6
        except (OSError, ValueError) as error:
            raise CounterError(f"RAPL cannot be read: {error}") from error

    def conditions(self) -> Conditions:
        return Conditions()


def unwrapped(raw: Callable[[], float], span: float) -> Callable[[], float]:
    """``raw`` made to rise on where it begins again at zero after ``span``, in the units of both.

    A reset looks the same; it shows as a jump beyond what the device can draw.
    """
    turns, last = 0, 0.0

    def read() -> float:
        nonlocal turns, last
        value = raw()
        turns += value < last
        last = value
        return value + turns * span

    return read


def _microjoules(path: Path) -> Callable[[], float]:
    return lambda: float(path.read_text(encoding="ascii"))
