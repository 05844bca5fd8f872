"""The energy counter of an NVIDIA GPU, read through Zeus, and the board's state, read through NVML."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

from hestctl.energy.conditions import Conditions
from hestctl.energy.protocol import CounterError
from hestctl.records import EnergyKind

T = TypeVar("T")

_SLOWDOWNS = {
    "nvmlClocksEventReasonHwSlowdown": "HW slowdown",
    "nvmlClocksEventReasonSwThermalSlowdown": "SW thermal slowdown",
    "nvmlClocksEventReasonHwThermalSlowdown": "HW thermal slowdown",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "HW power brake",
}
"""What demotes a window. The software power cap is not among them: a board at its power limit does what
it is built for, and every dense fp16 matmul takes an H100 there."""

_MAX_W_MARGIN = 1.25
"""Power overshoots the limit for less than the regulation's reaction time."""

_FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""PROC_PID_INIT_INO in Linux's include/linux/proc_ns.h: the host's own process numbers."""


class NvmlCounter:
    """Joules of one whole GPU since its driver was loaded.

    ``device``: the GPU's UUID, as NVML or as torch writes it, or its NVML index. The UUID decides in every
    case: CUDA numbers devices otherwise than NVML, and ``CUDA_VISIBLE_DEVICES`` renumbers them. The Zeus
    object is made for NVML's index of that UUID and checked against it; ``zeus.device.get_gpus`` is passed
    by, for it filters by ``CUDA_VISIBLE_DEVICES`` and fails where that holds UUIDs or MIG slices.
    Raises CounterError, with the reason, where there is no driver, no such GPU or no counter, where MIG is
    enabled (the counter tells of the whole GPU) and where the counter reads 0.
    """

    kind: EnergyKind = "measured"
    step_s: float | None = 0.1
    name = "NVML total energy"

    def __init__(self, device: str | int) -> None:
        if isinstance(device, str) and device.upper().startswith("MIG-"):
            raise CounterError("MIG: the energy counter tells of the whole GPU, not of a slice")
        try:
            self._open(device)
        except CounterError:
            raise
        except Exception as error:
            raise CounterError(f"NVML gives no energy counter for {device}: {error}") from error

    def _open(self, device: str | int) -> None:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        self._nvml = nvml
        if isinstance(device, int):
            handle = nvml.nvmlDeviceGetHandleByIndex(device)
        else:
            handle = nvml.nvmlDeviceGetHandleByUUID(_nvml_uuid(device))
        self.device_uuid = _text(nvml.nvmlDeviceGetUUID(handle))
        try:
            mig = nvml.nvmlDeviceGetMigMode(handle)[0]
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
            mig = nvml.NVML_DEVICE_MIG_DISABLE
        if mig != nvml.NVML_DEVICE_MIG_DISABLE:
            raise CounterError("MIG is enabled: the energy counter tells of the whole GPU, not of a slice")
        zeus: Any = importlib.import_module("zeus.device.gpu.nvidia")
        self._gpu = zeus.NVIDIAGPU(nvml.nvmlDeviceGetIndex(handle))
        self._handle = self._gpu.handle
        if _text(nvml.nvmlDeviceGetUUID(self._handle)) != self.device_uuid:
            raise CounterError(f"Zeus opened another GPU than {self.device_uuid}")
        if not self._gpu.supports_get_total_energy_consumption():
            raise CounterError("this GPU has no energy counter (it came with Volta)")
        self.device_name = _text(self._gpu.get_name())
        self.driver = _text(nvml.nvmlSystemGetDriverVersion())
        limits = self._quietly(self._gpu.get_power_management_limit_constraints)
        self.max_w: float | None = limits[1] / 1000 * _MAX_W_MARGIN if limits and limits[1] > 0 else None
        self.read_j()

    def read_j(self) -> float:
        """Joules since the driver was loaded. Raises CounterError on an error of NVML, and on 0."""
        return self._positive("the energy counter", self._gpu.get_total_energy_consumption)

    def power_w(self) -> float:
        """Instantaneous power in watts, itself updated every 100 ms. Raises CounterError."""
        return self._positive("instant power", self._gpu.get_instant_power_usage)

    def conditions(self) -> Conditions:
        nvml, handle = self._nvml, self._handle
        return Conditions(
            temperature_c=self._quietly(
                lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
            ),
            sm_clock_mhz=self._quietly(
                lambda: float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
            ),
            throttled=self._quietly(self._slowdowns),
            foreign_processes=self._quietly(self._foreign_processes),
        )

    def _slowdowns(self) -> str | None:
        mask = self._nvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle)
        words = [text for name, text in _SLOWDOWNS.items() if mask & getattr(self._nvml, name)]
        return ", ".join(words) or None

    def _foreign_processes(self) -> int:
        running = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        return foreign_count({int(process.pid) for process in running}, os.getpid(), _host_pids())

    def _positive(self, what: str, milli: Callable[[], float]) -> float:
        try:
            value = milli()
        except Exception as error:
            # Zeus maps NVML's errors to exceptions of its own, and lets others through.
            raise CounterError(f"{what} cannot be read: {error}") from error
        if not value > 0:
            raise CounterError(f"{what} reads {value}")
        return value / 1000

    def _quietly(self, query: Callable[[], T]) -> T | None:
        """The answer to a side question; None where this board, or its driver by now, has none."""
        try:
            return query()
        except Exception:
            return None


def foreign_count(pids: set[int], own_pid: int, comparable: bool) -> int:
    """How many of the processes on a GPU are not this one.

    In a container NVML may list the host's numbers, among which this process cannot find its own: then
    (``comparable`` false) one of those listed is taken for it.
    """
    others = pids - {own_pid}
    unrecognised = own_pid not in pids and not comparable
    return max(0, len(others) - unrecognised)


def _host_pids() -> bool:
    """True where this process's numbers are those that the driver sees."""
    try:
        return os.readlink("/proc/self/ns/pid") == _FIRST_PID_NAMESPACE
    except OSError:
        return True


def _nvml_uuid(uuid: str) -> str:
    """NVML's spelling; torch leaves out the prefix."""
    return uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
