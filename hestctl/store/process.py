"""Tells whether the process that owns a run is still there."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Liveness = Literal["alive", "dead", "elsewhere"]
"""``elsewhere``: the process ran on another host, so nothing can be said from this one."""


def identity() -> dict[str, Any]:
    """This process, told apart from a later one that gets the same PID.

    ``start_ticks`` (clock ticks since boot) and ``boot_id`` are None where the system has no /proc.
    """
    pid = os.getpid()
    return {"pid": pid, "host": platform.node(), "boot_id": _boot_id(), "start_ticks": _start_ticks(pid)}


def liveness(owner: Mapping[str, Any]) -> Liveness:
    """Whether the process that ``identity`` described is still running."""
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return "dead"
    if owner.get("host") != platform.node():
        return "elsewhere"
    if owner.get("boot_id") != _boot_id():
        return "dead"
    if owner.get("start_ticks") is not None:
        return "alive" if _start_ticks(pid) == owner["start_ticks"] else "dead"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "dead"
    except PermissionError:
        pass
    return "alive"


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _start_ticks(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None when it is gone or only a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name in parentheses may hold spaces and parentheses itself, so fields count from the last one.
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])
