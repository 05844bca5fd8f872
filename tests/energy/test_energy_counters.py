"""The real counters: NVML and RAPL through the real Zeus over a faked driver, and CPU time in earnest."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import zeus.device.cpu
import zeus.device.cpu.rapl

from hestctl.energy.counter import (
    CounterError,
    CpuTimeCounter,
    NvmlCounter,
    PowerSensor,
    RaplCounter,
    Unavailable,
    open_counter,
)
from hestctl.energy.fake import FakeClock
from hestctl.energy.meter import Meter
from hestctl.energy.nvml import foreign_count
from hestctl.energy.rapl import unwrapped
from hestctl.errors import Exit, HestError

UUIDS = ["GPU-aaaa", "GPU-bbbb"]
NOT_SUPPORTED = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
NO_PERMISSION = pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
LOST = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)


class FakeDriver:
    """Two boards behind pynvml's functions; where an attribute holds an exception, the function raises it."""

    def __init__(self) -> None:
        self.energy_mj: list[Any] = [111_000, 222_000]
        self.power_mw: list[Any] = [100_000, 420_000]
        self.mig: Any = NOT_SUPPORTED
        self.architecture = pynvml.NVML_DEVICE_ARCH_HOPPER
        self.pids: Any = [os.getpid()]
        self.reasons: Any = pynvml.nvmlClocksEventReasonSwPowerCap
        self.temperature: Any = 55
        self.limits: Any = (200_000, 700_000)
        self.zeus_shift = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        functions = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlSystemGetDriverVersion": lambda: "580.159.04",
            "nvmlDeviceGetHandleByIndex": lambda index: index + self.zeus_shift,
            "nvmlDeviceGetHandleByUUID": self.by_uuid,
            "nvmlDeviceGetIndex": lambda handle: handle,
            "nvmlDeviceGetUUID": lambda handle: UUIDS[handle].encode(),
            "nvmlDeviceGetName": lambda handle: f"H100 number {handle}",
            "nvmlDeviceGetMigMode": lambda handle: self.value(self.mig),
            "nvmlDeviceGetC2cModeInfoV": lambda handle: SimpleNamespace(isC2cEnabled=False),
            "nvmlDeviceGetArchitecture": lambda handle: self.architecture,
            "nvmlDeviceGetPowerManagementLimitConstraints": lambda handle: self.value(self.limits),
            "nvmlDeviceGetTotalEnergyConsumption": lambda handle: self.value(self.energy_mj[handle]),
            "nvmlDeviceGetFieldValues": lambda handle, fields: [
                SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=self.power_mw[handle]))
            ],
            "nvmlDeviceGetTemperature": lambda handle, sensor: self.value(self.temperature),
            "nvmlDeviceGetClockInfo": lambda handle, kind: 1980,
            "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: self.value(self.reasons),
            "nvmlDeviceGetComputeRunningProcesses": lambda handle: [
                SimpleNamespace(pid=pid) for pid in self.value(self.pids)
            ],
        }
        for name, function in functions.items():
            monkeypatch.setattr(pynvml, name, function)

    @staticmethod
    def value(value: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    @staticmethod
    def by_uuid(uuid: str) -> int:
        if uuid not in UUIDS:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return UUIDS.index(uuid)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    fake.install(monkeypatch)
    return fake


class TestNvml:
    @pytest.mark.parametrize("visible", [None, "1,0", "1", "GPU-bbbb,GPU-aaaa", ""])
    def test_the_uuid_decides_whatever_cuda_may_see(
        self, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, visible: str | None
    ) -> None:
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        for uuid, joules in zip(UUIDS, (111.0, 222.0), strict=True):
            for spelling in (uuid, uuid.removeprefix("GPU-")):
                counter = NvmlCounter(spelling)
                assert (counter.device_uuid, counter.read_j()) == (uuid, joules)

    def test_an_index_is_nvmls(self, driver: FakeDriver) -> None:
        counter = NvmlCounter(1)
        assert (counter.device_uuid, counter.device_name) == ("GPU-bbbb", "H100 number 1")

    def test_what_it_tells(self, driver: FakeDriver) -> None:
        counter = NvmlCounter("GPU-bbbb")
        assert (counter.kind, counter.step_s, counter.driver) == ("measured", 0.1, "580.159.04")
        assert counter.max_w == 875.0
        assert counter.power_w() == 420.0
        assert isinstance(counter, PowerSensor)
        seen = counter.conditions()
        assert (seen.temperature_c, seen.sm_clock_mhz, seen.foreign_processes) == (55.0, 1980.0, 0)
        assert seen.throttled is None, "the power cap is how a board works at full load"

    @pytest.mark.parametrize("uuid", ["MIG-GPU-aaaa/1/0", "mig-123", "GPU-aaaa"])
    def test_mig_is_refused(self, driver: FakeDriver, uuid: str) -> None:
        driver.mig = [pynvml.NVML_DEVICE_MIG_ENABLE, pynvml.NVML_DEVICE_MIG_ENABLE]
        with pytest.raises(CounterError, match="the whole GPU, not"):
            NvmlCounter(uuid)

    def test_mig_switched_off_is_not(self, driver: FakeDriver) -> None:
        driver.mig = [pynvml.NVML_DEVICE_MIG_DISABLE, pynvml.NVML_DEVICE_MIG_ENABLE]
        assert NvmlCounter("GPU-aaaa").read_j() == 111.0

    @pytest.mark.parametrize(
        "change, says",
        [
            ({"architecture": 4}, "Volta"),
            ({"energy_mj": [0, 0]}, "reads 0"),
            ({"energy_mj": [NOT_SUPPORTED] * 2}, "Not Supported"),
            ({"zeus_shift": 1}, "another GPU"),
            ({"mig": NO_PERMISSION}, "Insufficient Permissions"),
        ],
    )
    def test_a_counter_that_is_not_there_is_refused(
        self, driver: FakeDriver, change: dict[str, Any], says: str
    ) -> None:
        for name, value in change.items():
            setattr(driver, name, value)
        with pytest.raises(CounterError, match=says):
            NvmlCounter("GPU-aaaa")

    def test_an_unknown_gpu_is_refused(self, driver: FakeDriver) -> None:
        with pytest.raises(CounterError, match="GPU-cccc"):
            NvmlCounter("GPU-cccc")

    def test_no_driver_is_a_reason(self) -> None:
        if Path("/dev/nvidiactl").exists():
            pytest.skip("there is a driver here")
        with pytest.raises(CounterError, match="NVML"):
            NvmlCounter("GPU-aaaa")

    @pytest.mark.parametrize("value", [LOST, 0])
    def test_errors_and_zeros_in_mid_run_are_no_reading(self, driver: FakeDriver, value: Any) -> None:
        counter = NvmlCounter("GPU-aaaa")
        driver.energy_mj[0] = value
        with pytest.raises(CounterError):
            counter.read_j()
        driver.power_mw[0] = 0
        with pytest.raises(CounterError, match="instant power"):
            counter.power_w()

    def test_conditions_that_cannot_be_read_are_unknown(self, driver: FakeDriver) -> None:
        driver.limits = driver.temperature = NOT_SUPPORTED
        driver.reasons = driver.pids = NO_PERMISSION
        counter = NvmlCounter("GPU-aaaa")
        seen = counter.conditions()
        assert (seen.temperature_c, seen.throttled, seen.foreign_processes) == (None, None, None)
        assert seen.sm_clock_mhz == 1980.0
        assert counter.max_w is None

    def test_slowdowns_are_told_in_words(self, driver: FakeDriver) -> None:
        driver.reasons = (
            pynvml.nvmlClocksEventReasonHwThermalSlowdown | pynvml.nvmlClocksEventReasonHwSlowdown
        )
        assert NvmlCounter("GPU-aaaa").conditions().throttled == "HW slowdown, HW thermal slowdown"

    def test_other_processes_are_counted(self, driver: FakeDriver) -> None:
        driver.pids = [os.getpid(), 4_000_001, 4_000_002]
        assert NvmlCounter("GPU-aaaa").conditions().foreign_processes == 2

    def test_a_window_over_the_faked_driver(self, driver: FakeDriver) -> None:
        """The whole way: driver in mJ, Zeus, counter, ticks, window in J; then the GPU falls off the bus."""
        clock = FakeClock()
        counter = NvmlCounter("GPU-bbbb")

        def steps() -> int:
            return 222_000 + 45_000 * int((clock() - 1000) * 10 + 1e-6)

        class Moving(list[Any]):
            def __getitem__(self, index: Any) -> Any:
                return steps() if clock() < 1010 else LOST

        driver.energy_mj = Moving([0, 0])
        with Meter(counter, clock=clock, pace=clock) as meter:
            with meter.window("w", "decode") as window:
                clock.advance(3)
            assert window.result.energy_j == pytest.approx(1350, rel=0.01)
            assert (window.result.device_uuid, window.result.sm_clock_mhz) == ("GPU-bbbb", 1980.0)
            clock.advance(20)
            assert meter.reason is not None and "lost" in meter.reason.lower()
            assert window.result.valid


@pytest.mark.parametrize(
    "pids, comparable, foreign",
    [
        (set(), True, 0),
        (set(), False, 0),
        ({7}, True, 0),
        ({7, 8}, True, 1),
        ({8}, True, 1),
        ({900}, False, 0),
        ({900, 901}, False, 1),
        ({7, 901}, False, 1),
    ],
)
def test_foreign_processes_in_and_out_of_containers(pids: set[int], comparable: bool, foreign: int) -> None:
    assert foreign_count(pids, 7, comparable) == foreign


class TestRapl:
    @pytest.fixture
    def zones(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        """Two packages of which one has DRAM, and a psys zone that holds them once more."""
        for zone, name, joules in [
            ("intel-rapl:0", "package-0", 100),
            ("intel-rapl:0/intel-rapl:0:0", "core", 55),
            ("intel-rapl:0/intel-rapl:0:1", "dram", 7),
            ("intel-rapl:1", "package-1", 50),
            ("intel-rapl:2", "psys", 999),
        ]:
            folder = tmp_path / zone
            folder.mkdir(parents=True)
            (folder / "name").write_text(f"{name}\n")
            (folder / "energy_uj").write_text(f"{joules * 1_000_000}\n")
            (folder / "max_energy_range_uj").write_text("200000000\n")
        monkeypatch.setattr(zeus.device.cpu.rapl, "RAPL_DIR", str(tmp_path))
        monkeypatch.setattr(zeus.device.cpu, "_cpus", None)
        zeus.device.cpu.rapl.rapl_is_available.cache_clear()
        yield tmp_path
        zeus.device.cpu.rapl.rapl_is_available.cache_clear()

    def test_packages_and_memory_add_up_without_psys(self, zones: Path) -> None:
        counter = RaplCounter()
        assert counter.read_j() == pytest.approx(157)
        assert (counter.kind, counter.name, counter.max_w) == ("measured", "RAPL package + DRAM", 2000.0)
        assert counter.conditions().foreign_processes is None

    def test_wraparound_goes_on_counting(self, zones: Path) -> None:
        counter = RaplCounter()
        (zones / "intel-rapl:0" / "energy_uj").write_text("199000000")
        before = counter.read_j()
        (zones / "intel-rapl:0" / "energy_uj").write_text("3000000")
        assert counter.read_j() - before == pytest.approx(4)

    def test_a_file_that_goes_away_is_a_lost_counter(self, zones: Path) -> None:
        counter = RaplCounter()
        (zones / "intel-rapl:1" / "energy_uj").unlink()
        with pytest.raises(CounterError, match="RAPL cannot be read"):
            counter.read_j()

    def test_zeros_are_refused(self, zones: Path) -> None:
        for path in zones.rglob("energy_uj"):
            path.write_text("0")
        with pytest.raises(CounterError, match="0 J"):
            RaplCounter()

    def test_without_a_package_zone_it_is_refused(self, zones: Path) -> None:
        for path in zones.glob("*/name"):
            path.write_text("psys")
        with pytest.raises(CounterError, match="no CPU package"):
            RaplCounter()

    def test_the_daemon_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(zeus.device.cpu, "_cpus", SimpleNamespace(cpus=[SimpleNamespace()]))
        with pytest.raises(CounterError, match="daemon"):
            RaplCounter()

    def test_only_root_may_read(self, zones: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refused(path: str) -> None:
            raise PermissionError(path)

        monkeypatch.setattr(zeus.device.cpu.rapl, "RAPLFile", refused)
        with pytest.raises(CounterError, match="RAPL cannot be read"):
            RaplCounter()

    def test_auto_takes_it_for_work_on_the_cpu(self, zones: Path) -> None:
        assert isinstance(open_counter("auto", cuda_uuid=None, nominal_watts=8), RaplCounter)
        assert isinstance(open_counter("rapl", cuda_uuid=None, nominal_watts=8), RaplCounter)


def test_unwrapping_counts_every_turn() -> None:
    raw = iter([5.0, 90.0, 10.0, 50.0, 2.0])
    read = unwrapped(lambda: next(raw), 100.0)
    assert [read() for _ in range(5)] == [5, 90, 110, 150, 202]


def burn(seconds: float) -> None:
    begin_s = time.thread_time()
    while time.thread_time() - begin_s < seconds:
        sum(range(1000))


class TestCpuTime:
    def test_own_work_is_counted_and_sleep_is_not(self) -> None:
        counter = CpuTimeCounter(8.0)
        first = counter.read_j()
        burn(0.05)
        worked = counter.read_j() - first
        assert 0.4 <= worked < 0.4 + 8 * 0.05
        assert (counter.kind, counter.name, counter.step_s) == ("estimated", "CPU time x 8 W", None)
        assert counter.device_uuid.startswith("CPU-") and counter.device_name

    def test_threads_are_counted(self) -> None:
        counter = CpuTimeCounter(8.0)
        first = counter.read_j()
        threads = [threading.Thread(target=burn, args=(0.05,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counter.read_j() - first >= 8 * 0.1

    @pytest.mark.skipif(sys.platform != "linux", reason="running children are found in /proc")
    def test_children_are_counted_while_they_run_and_once_only(self) -> None:
        counter = CpuTimeCounter(10.0)
        first = counter.read_j()
        work = "while time.process_time() < 0.3: sum(range(1000))"
        program = f"import time\n{work}\nprint('done', flush=True)\ninput()"
        with subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None and child.stdout.readline() == "done\n"
            running = counter.read_j() - first
            child.communicate("\n")
        ended = counter.read_j() - first
        assert running >= 10 * 0.25
        assert running <= ended <= running + 10 * 0.25

    def test_it_never_falls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        counter = CpuTimeCounter(8.0)
        first = counter.read_j()
        monkeypatch.setattr(time, "process_time", lambda: 0.0)
        assert counter.read_j() == first

    @pytest.mark.parametrize("watts", [0.0, -1.0, float("nan"), float("inf")])
    def test_senseless_watts_are_refused(self, watts: float) -> None:
        with pytest.raises(CounterError):
            CpuTimeCounter(watts)


class TestOpenCounter:
    def test_auto_takes_the_gpus_own_counter(self, driver: FakeDriver) -> None:
        counter = open_counter("auto", cuda_uuid="bbbb", nominal_watts=8)
        assert isinstance(counter, NvmlCounter) and counter.device_uuid == "GPU-bbbb"

    def test_auto_never_answers_for_a_gpu_with_the_cpu(self, driver: FakeDriver) -> None:
        driver.mig = [1, 1]
        answer = open_counter("auto", cuda_uuid="GPU-aaaa", nominal_watts=8)
        assert isinstance(answer, Unavailable) and "MIG" in answer.reason

    def test_auto_estimates_on_a_cpu_without_rapl(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(zeus.device.cpu, "_cpus", SimpleNamespace(cpus=[]))
        assert isinstance(open_counter("auto", cuda_uuid=None, nominal_watts=8), CpuTimeCounter)
        answer = open_counter("auto", cuda_uuid=None, nominal_watts=-1)
        assert isinstance(answer, Unavailable)

    @pytest.mark.parametrize("cuda_uuid", [None, "GPU-aaaa"])
    @pytest.mark.parametrize(
        "word, near",
        [("nvlm", "; did you mean 'nvml'?"), ("replay:", "; did you mean 'replay:FILE'?"), ("", "")],
    )
    def test_a_word_that_is_no_meter_is_a_usage_error(
        self, word: str, near: str, cuda_uuid: str | None
    ) -> None:
        with pytest.raises(HestError) as caught:
            open_counter(word, cuda_uuid=cuda_uuid, nominal_watts=8)
        assert caught.value.exit_code == Exit.USAGE
        assert caught.value.message == f"unknown meter '{word}'{near}"
        assert caught.value.hint == "meters: auto, nvml, rapl, estimate, none, replay:FILE"

    def test_none_is_none(self) -> None:
        answer = open_counter("none", cuda_uuid="GPU-aaaa", nominal_watts=8)
        assert isinstance(answer, Unavailable) and "none" in answer.reason

    @pytest.mark.parametrize(
        "meter, cuda_uuid, watts",
        [
            ("nvml", None, 8.0),
            ("nvml", "GPU-cccc", 8.0),
            ("rapl", None, 8.0),
            ("rapl", "GPU-aaaa", 8.0),
            ("estimate", "GPU-aaaa", 8.0),
            ("estimate", None, 0.0),
        ],
    )
    def test_a_meter_demanded_and_not_there_ends_with_its_exit_code(
        self,
        driver: FakeDriver,
        monkeypatch: pytest.MonkeyPatch,
        meter: Any,
        cuda_uuid: str | None,
        watts: float,
    ) -> None:
        monkeypatch.setattr(zeus.device.cpu, "_cpus", SimpleNamespace(cpus=[]))
        with pytest.raises(HestError) as caught:
            open_counter(meter, cuda_uuid=cuda_uuid, nominal_watts=watts)
        assert caught.value.exit_code == Exit.NO_DEVICE
        assert caught.value.hint and meter in caught.value.message


def test_importing_the_meter_imports_neither_torch_nor_drivers() -> None:
    program = (
        "import pkgutil, importlib, sys, hestctl.energy as package\n"
        "from hestctl.energy import CounterError, Meter, Unavailable, Window, open_counter\n"
        "print(*{'numpy', 'pydantic'} & set(sys.modules))\n"
        "for module in pkgutil.iter_modules(package.__path__):\n"
        "    importlib.import_module(f'hestctl.energy.{module.name}')\n"
        "print(*sorted({'torch', 'transformers', 'zeus', 'pynvml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
