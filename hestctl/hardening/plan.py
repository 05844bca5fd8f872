"""The plan: what hardening decided, and the ledger and certificate that follow from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hestctl.errors import Exit, HestError
from hestctl.hardening.ledger import Ledger, Tariff, incomes

PLAN_VERSION = 1


@dataclass(frozen=True, slots=True)
class Energies:
    """Joules per sample on the reference prompts, translated to generation lengths.

    ``expected_j``: by the gates' probabilities. ``decided_j``: by their hard decisions before repair.
    ``hardened_j``: after repair, under the ledger; ``worst_j`` is the largest sample's.
    """

    expected_j: float
    decided_j: float
    hardened_j: float
    worst_j: float
    samples: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Hardened decisions of one run in adapter scope; loads back bit for bit.

    ``pace`` is each layer's share of the budget; ``order`` ranks the directions of each layer, the
    most important first; ``shift`` is what repair added to the thresholds, in units of each layer's
    spread of scores. ``costs_j`` are joules per direction and token of (off, int8, full).
    """

    version: int
    run_id: str
    method: str
    scope: str
    backbone: str
    fingerprint: str
    device_name: str
    calibration_id: str
    energy_kind: str
    costs_j: tuple[float, float, float]
    uses_int8: bool
    emax_j: float | None
    emax_origin: str | None
    margin: float
    pace: tuple[float, ...]
    order: tuple[tuple[int, ...], ...]
    shift: float
    energies: Energies | None

    @property
    def tariff(self) -> Tariff:
        return Tariff.from_costs(self.costs_j, uses_int8=self.uses_int8)

    @property
    def moved(self) -> float | None:
        """How far repair moved the energy, as a share of what the gates decided; above 0.1 is flagged."""
        if self.energies is None or self.energies.decided_j <= 0:
            return None
        return self.energies.hardened_j / self.energies.decided_j - 1

    def ledger(self, work_Q: Tensor) -> Ledger | None:
        """A fresh ledger for requests of at most ``work_Q`` token positions; None where nothing binds."""
        if self.emax_j is None:
            return None
        device = work_Q.device
        pace_L = torch.tensor(self.pace, dtype=torch.float64, device=device)
        income_LQ = incomes(self.emax_j, self.margin, pace_L, work_Q, self.tariff)
        order_LR = torch.tensor(self.order, device=device)
        return Ledger(income_LQ, order_LR, self.tariff, uses_int8=self.uses_int8)

    def joules(self, counts: Tensor) -> float:
        """Joules of logged state counts (..., S), by the energy table."""
        _, int8, full = counts.reshape(-1, 3).sum(0).tolist()
        return float(int8 * self.costs_j[1] + full * self.costs_j[2])

    def certificate(
        self, lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    ) -> list[dict[str, Any]]:
        """The bound at each length (token positions of one sample): J, and J as a share of E_max.

        ``open_share`` is the part of all directions that the income affords at that length.
        """
        if self.emax_j is None:
            return []
        rows = []
        pace_L = torch.tensor(self.pace, dtype=torch.float64)
        for length in lengths:
            work = torch.tensor([length])
            income_L1 = incomes(self.emax_j, self.margin, pace_L, work, self.tariff)
            units = int(((income_L1 * length) >> 20).sum())
            everything = length * len(self.pace) * len(self.order[0]) * self.tariff.full
            bound_j = min(units, everything) * self.tariff.unit_j
            rows.append(
                {
                    "length_tokens": length,
                    "bound_j": bound_j,
                    "bound_over_emax": bound_j / self.emax_j,
                    "open_share": min(1.0, units / everything),
                }
            )
        return rows

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Plan:
        """Raises HestError for a plan of another version."""
        if document.get("version") != PLAN_VERSION:
            raise HestError(
                f"this plan has version {document.get('version')}, not {PLAN_VERSION}",
                "`hestctl harden` makes a new one",
            )
        known = {field.name for field in dataclasses.fields(cls)}
        fields = {name: value for name, value in document.items() if name in known}
        energies = fields.pop("energies")
        return cls(
            **{
                **fields,
                "costs_j": tuple(fields["costs_j"]),
                "pace": tuple(fields["pace"]),
                "order": tuple(tuple(row) for row in fields["order"]),
                "energies": None if energies is None else Energies(**energies),
            }
        )

    def check(self, fingerprint: str, device_name: str) -> None:
        """Refuse a backbone or a device the plan was not made for."""
        for what, mine, theirs in (
            ("backbone", self.fingerprint, fingerprint),
            ("device", self.device_name, device_name),
        ):
            if mine != theirs:
                raise HestError(
                    f"the plan of run {self.run_id} was made for another {what} ({mine}, not {theirs})",
                    f"`hestctl harden --run {self.run_id}` makes one for this {what}",
                    Exit.USAGE,
                )


def read_plan(path: Path) -> Plan:
    """Raises HestError when the file is missing or damaged."""
    try:
        return Plan.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HestError(f"no readable plan at {path}: {error}", "run `hestctl harden` on that run") from None
