"""``env``: versions, device, meter, paths and schema, each looked at and not assumed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hestctl.energy.counter import open_counter
from hestctl.energy.protocol import CounterError, Unavailable
from hestctl.errors import HestError
from hestctl.model.smollm2 import cache_root
from hestctl.runs import versions
from hestctl.settings import Settings, profile_dir, profile_names
from hestctl.store.migrations import MIGRATIONS
from hestctl.store.queries import list_runs
from hestctl.store.store import Store

POWERCAP = Path("/sys/class/powercap")
"""Where Linux shows the counters of RAPL."""


def examine(settings: Settings, environment: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Facts by section. What cannot be had is said in place of the value; nothing is raised."""
    store = Store(settings.db)
    folder = settings.db.absolute().parent
    writable = os.access(folder, os.W_OK)
    return {
        "versions": versions(),
        "device": _device(),
        "meter": _meter(settings),
        "paths": {
            "store": str(settings.db.absolute()),
            "store_writable": writable,
            **({} if writable else {"next": _writable_next(folder)}),
            "run_folders": str(store.root.absolute()),
            "cache": str(cache_root()),
            "profiles": f"{profile_dir()}: {', '.join(profile_names())}",
        },
        "store": {"schema": len(MIGRATIONS), "runs": _runs(store)},
        "environment": {k: v for k, v in environment.items() if k.startswith("HESTCTL_")},
    }


def _writable_next(folder: Path) -> str:
    if not folder.exists():
        return f"{folder} is made by the first command that records"
    return "name a store in a folder that you may write to: --db ~/runs.duckdb"


def _device() -> dict[str, Any]:
    import torch

    from hestctl.kernels.choose import on_offer
    from hestctl.kernels.devices import why_no_triton

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    facts: dict[str, Any] = {
        "cpu_threads": torch.get_num_threads(),
        "cuda": cuda,
        "int8_kernels": on_offer(device),
        "own_kernels": why_no_triton(device) or "usable",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "gpu_uuid": str(properties.uuid),
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda_runtime": torch.version.cuda,
        }
    return facts


def _meter(settings: Settings) -> dict[str, Any]:
    import torch

    uuid = str(torch.cuda.get_device_properties(0).uuid) if torch.cuda.is_available() else None
    facts: dict[str, Any] = {}
    for meter in ("nvml", "rapl", "estimate"):
        try:
            counter = open_counter(meter, cuda_uuid=uuid, nominal_watts=settings.energy.nominal_watts)
        except HestError as error:
            named_already = f"the meter '{meter}' cannot serve: "
            facts[meter] = f"not usable: {error.message.removeprefix(named_already)}"
            continue
        if isinstance(counter, Unavailable):
            facts[meter] = f"not usable: {counter.reason}"
            continue
        try:
            counter.read_j()
            facts[meter] = f"{counter.kind}: {counter.name} on {counter.device_name}"
        except CounterError as error:
            facts[meter] = f"not usable: {error}"
    counters = sorted(POWERCAP.glob("*/energy_uj"))
    closed = [path for path in counters if not os.access(path, os.R_OK)]
    facts["rapl_files"] = "readable" if len(closed) < len(counters) else "none readable"
    if not counters:
        facts["rapl"] = f"not usable: no RAPL counter in {POWERCAP}; virtual machines mostly have none"
    elif len(closed) == len(counters):
        facts["rapl"] = f"not usable: no permission to read {closed[0]}"
        facts["next"] = f"sudo chmod a+r {POWERCAP}/*/energy_uj (until the machine starts again)"
    if not any(str(found).startswith("measured") for found in facts.values()):
        measures = "an NVIDIA GPU with an energy counter, or a CPU whose RAPL can be read, measures"
        facts.setdefault("next", f"joules are estimated here: {measures}")
    return facts


def _runs(store: Store) -> str:
    if not store.db.exists():
        return "no store yet"
    try:
        return str(len(list_runs(store)))
    except HestError as error:
        return error.message
