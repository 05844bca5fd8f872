"""The energy table: what ``calibrate`` measured on one device, and what these figures hold for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hestctl.energy.model import Cost, EnergyModel
from hestctl.records import EnergyKind


@dataclass(frozen=True, slots=True)
class TableKey:
    """What figures are of (``subject``: device, shapes), and what else they hang on (``conditions``).

    A table of the same subject under other conditions (driver, versions, kernels) is stale.
    """

    subject: Mapping[str, str]
    conditions: Mapping[str, str]

    @property
    def subject_text(self) -> str:
        """The part of ``text`` that tables of the same subject share, stale or not."""
        return _joined(self.subject) + "||"

    @property
    def text(self) -> str:
        return self.subject_text + _joined(self.conditions)

    def changes(self, stored: str) -> list[str]:
        """What is not as it was for a table that was ``stored`` under this text, in words."""
        then = dict(pair.partition("=")[::2] for pair in stored.partition("||")[2].split("|"))
        return [
            f"{name} was {then.get(name, 'not recorded')}, is {value}"
            for name, value in self.conditions.items()
            if then.get(name) != value
        ]


def _joined(parts: Mapping[str, str]) -> str:
    return "|".join(f"{name}={value.replace('|', '/')}" for name, value in parts.items())


@dataclass(frozen=True, slots=True)
class EnergyTable:
    """What ``calibrate`` found. ``kind`` says whether a counter measured it or CPU time estimated it.

    ``key`` is the text of a ``TableKey``: everything the figures depend on. ``model`` predicts whole
    generations; None where only the prices of directions were measured, on the way of a training.
    ``kernels`` is the document of the int8 kernels chosen, with which all was measured; None where the
    default one stands for all.
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
    """Joules per direction and token; so is ``int8``."""
    int8: Cost
    controller: Cost
    """Joules per token of the factorised controller."""
    model: EnergyModel | None = None
    kernels: Mapping[str, Any] | None = None

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
        model = document.get("model")
        return cls(**{**document, **parts, "model": None if model is None else EnergyModel.from_dict(model)})
