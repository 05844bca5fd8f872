"""Measures the energy table on the device at hand: what a direction costs in each state."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime

import torch
from torch import Tensor

from hestctl.energy.meter import Meter
from hestctl.energy.table import Cost, EnergyTable
from hestctl.errors import Exit, HestError
from hestctl.kernels.reference import quantise_rows
from hestctl.model.backbone import Backbone
from hestctl.model.controller import FactorisedController
from hestctl.progress import Progress
from hestctl.settings import EnergySettings, MethodSettings

_TOKENS = 256
_WINDOWS = 5


def table_key(backbone: Backbone, method: MethodSettings, meter: Meter) -> str:
    """Everything the figures of a table depend on; a stored table serves while this is the same."""
    parts = (
        meter.device_uuid,
        meter.counter_name,
        str(backbone.dtype).removeprefix("torch."),
        f"hidden={backbone.hidden_size}",
        f"rank={method.rank}",
        f"width={method.controller_width}",
        f"torch={torch.__version__}",
    )
    return "|".join(str(part) for part in parts)


def measure_table(
    backbone: Backbone,
    method: MethodSettings,
    energy: EnergySettings,
    meter: Meter,
    progress: Progress,
) -> EnergyTable:
    """Joules per direction and token in full precision and in int8, and of the controller.

    Each figure is the mean over windows of at least ``energy.calibration_s`` s in which one layer's
    adapter runs with all its directions in that state; the error is the standard error over windows
    together with the meter's bound. Raises HestError (no device) when the meter gives no joules.
    """
    device, dtype, hidden, rank = backbone.device, backbone.dtype, backbone.hidden_size, method.rank
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TOKENS, hidden, generator=generator).to(device, dtype)
    down = torch.randn(hidden, rank, generator=generator).to(device, dtype)
    up = torch.randn(rank, hidden, generator=generator).to(device, dtype)
    controller = FactorisedController(backbone.num_layers, hidden, method.controller_width, generator)
    controller = controller.to(device, dtype)
    runs = {
        "full": lambda: (x @ down) @ up,
        "int8": _int8_adapter(x, down, up),
        "controller": lambda: controller(x[None], 0),
    }
    figures = {}
    with torch.inference_mode():
        for name, run in runs.items():
            progress.note(f"calibrating: {name}, {_WINDOWS} windows of {energy.calibration_s:g} s")
            figures[name] = _joules_per_call(run, name, energy.calibration_s, meter)
    per_direction = _TOKENS * rank
    now = datetime.now(UTC)
    return EnergyTable(
        calibration_id=f"table-{now:%Y%m%d-%H%M%S-%f}",
        key=table_key(backbone, method, meter),
        created_at=now.isoformat(),
        kind=meter.kind,
        meter=meter.counter_name,
        device_name=meter.device_name,
        device_uuid=meter.device_uuid,
        dtype=str(dtype).removeprefix("torch."),
        hidden=hidden,
        rank=rank,
        tokens=_TOKENS,
        full=_per(figures["full"], per_direction),
        int8=_per(figures["int8"], per_direction),
        controller=_per(figures["controller"], _TOKENS),
    )


def _int8_adapter(x: Tensor, down: Tensor, up: Tensor) -> Callable[[], Tensor]:
    """The int8 products as generation would run them: real int8 matmuls, weights quantised once."""
    q_down, s_down = quantise_rows(down.T)
    q_up, s_up = quantise_rows(up.T)
    q_down_KM, q_up_KM = q_down.T.contiguous(), q_up.T.contiguous()

    def run() -> Tensor:
        q_x, s_x = quantise_rows(x)
        z = torch._int_mm(q_x, q_down_KM).float() * s_x * s_down.T
        q_z, s_z = quantise_rows(z)
        return torch._int_mm(q_z, q_up_KM).float() * s_z * s_up.T

    return run


def _joules_per_call(run: Callable[[], object], name: str, seconds: float, meter: Meter) -> Cost:
    for _ in range(20):
        run()
    start = time.perf_counter()
    for _ in range(20):
        run()
    meter.edge()
    calls = max(20, int(20 * seconds / max(time.perf_counter() - start, 1e-6)))
    joules, bounds = [], []
    for _ in range(_WINDOWS):
        with meter.window(name, "calibration") as window:
            for _ in range(calls):
                run()
        result = window.result
        if not result.valid or result.energy_j is None:
            raise HestError(
                f"calibration gave no joules: {result.reason}",
                "`hestctl env` shows the meter; --meter estimate takes CPU time instead",
                Exit.NO_DEVICE,
            )
        joules.append(result.energy_j / calls)
        bounds.append((result.error_j or 0.0) / calls)
    mean = sum(joules) / len(joules)
    spread = (sum((j - mean) ** 2 for j in joules) / (len(joules) - 1)) ** 0.5 / len(joules) ** 0.5
    return Cost(mean, (spread**2 + (sum(bounds) / len(bounds)) ** 2) ** 0.5)


def _per(cost: Cost, count: int) -> Cost:
    return Cost(cost.joules / count, cost.error_j / count)
