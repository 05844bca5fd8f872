"""The energy table: joules of one direction for one token in each state, as measured on one device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hestctl.records import EnergyKind


@dataclass(frozen=True, slots=True)
class Cost:
    """Joules per direction and token, and the error of that figure (J, one standard error)."""

    joules: float
    error_j: float


@dataclass(frozen=True, slots=True)
class EnergyTable:
    """What ``calibrate`` found. ``kind`` says whether a counter measured it or CPU time estimated it.

    ``key`` names everything the figures depend on (device, shape, type, kernels, library versions);
    another key means another table.
    """

    calibration_id: str
    key: str
    created_at: str
    kind: EnergyKind
    meter: str
    device_name: str
    device_uuid: str
    dtype: str
    hidden: int
    rank: int
    tokens: int
    full: Cost
    int8: Cost
    controller: Cost
    """Joules per token of the factorised controller."""

    @property
    def int8_pays(self) -> bool:
        """True where an int8 direction is cheaper than a full one beyond the error of both."""
        spread = math.hypot(self.int8.error_j, self.full.error_j)
        return self.int8.joules + 2 * spread < self.full.joules

    @property
    def states(self) -> tuple[int, ...]:
        """States worth offering: 0 off, 1 int8 (only where it pays), 2 full."""
        return (0, 1, 2) if self.int8_pays else (0, 2)

    @property
    def costs_j(self) -> tuple[float, float, float]:
        """Joules per direction and token of (off, int8, full)."""
        return 0.0, self.int8.joules, self.full.joules

    def verdict(self) -> str:
        """One sentence on int8, for the terminal."""
        ratio = self.int8.joules / self.full.joules
        told = f"an int8 direction costs {ratio:.2f} x a full one here ({self.kind})"
        return f"{told}: offered" if self.int8_pays else f"{told}: int8 is dropped"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> EnergyTable:
        parts = {name: Cost(**document[name]) for name in ("full", "int8", "controller")}
        return cls(**{**document, **parts})
