"""The plan: what hardening decided, and the ledger that follows from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hestctl.budget import Bill, Envelope, allowance_j, bill_for, by_new_tokens
from hestctl.errors import Exit, HestError
from hestctl.hardening.ledger import Ledger, Tariff, incomes
from hestctl.records import BlockStates
from hestctl.settings import Scope

PLAN_VERSION = 2


@dataclass(frozen=True, slots=True)
class Energies:
    """Joules per sample on the reference prompts, translated to generation lengths.

    ``expected_j``: by the gates' probabilities. ``decided_j``: by their hard decisions before repair.
    ``hardened_j``: after repair, under the ledger; ``worst_j`` is the largest sample's and ``worst_ratio``
    the largest share that a sample takes of its own E_max. ``emax_j`` is the mean E_max. All in the joules of
    the plan's scope; those of E_max are None where no budget binds.
    """

    expected_j: float
    decided_j: float
    hardened_j: float
    worst_j: float
    samples: int
    emax_j: float | None = None
    worst_ratio: float | None = None


Why = Literal["gate", "dear", "free", "budget", "spare", "fixed"]
"""Why a block is in its state: the gate decided so; a better state costs no more; int8 does no measurable
harm; the budget asked for less, or had joules to spare; settings fixed it."""


@dataclass(frozen=True, slots=True)
class BlockChoice:
    """One block of one layer, for ``harden --explain``.

    ``decided`` is the gate's own state. ``margins`` are its log-odds of full over int8 and of on (the better
    of the two) over off. ``saved_j`` is what the state saves of a sample against full at the reference's mean
    lengths. ``harm`` is the loss increase (nats per answer token) of the block alone in int8, and off. None
    is what nobody knows.
    """

    state: int
    decided: int
    why: Why
    margins: tuple[float, float] | None = None
    saved_j: float | None = None
    harm: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Hardened decisions of one run; loads back bit for bit.

    ``emax_j`` is E_max as it is told (see ``Budget``), ``bills`` what batches cost and may cost in the
    scope's joules, ``bound`` the least and the most prompt tokens at which that is known to fit (beyond them
    generation refuses what does not), ``margin`` the part of E_max that is left to the energy model's error.
    ``blocks`` are the states of the layers' blocks, ``choices`` how each came by its own. ``pace`` is each
    layer's share of what is left for the directions; ``order`` ranks the directions of each layer, the most
    important first; ``shift`` is what repair added to the thresholds, in spreads of each layer's scores.
    ``fixed`` are the states of a layer's directions where no token moves any of them, else None. ``costs_j``
    are joules per direction and token of (off, int8, full).
    """

    version: int
    run_id: str
    method: str
    scope: Scope
    envelope: Envelope | None
    backbone: str
    fingerprint: str
    device_name: str
    calibration_id: str
    table_key: str
    energy_kind: str
    costs_j: tuple[float, float, float]
    uses_int8: bool
    emax_j: float | None
    emax_origin: str | None
    margin: float
    batch_size: int
    num_beams: int
    max_new_tokens: int
    bound: tuple[int, int]
    bills: tuple[Bill, ...]
    blocks: BlockStates
    pace: tuple[float, ...]
    order: tuple[tuple[int, ...], ...]
    shift: float
    energies: Energies | None
    sensitivities: str | None = None
    choices: tuple[tuple[BlockChoice, BlockChoice], ...] = ()
    fixed: tuple[tuple[int, ...] | None, ...] | None = None

    @property
    def tariff(self) -> Tariff:
        return Tariff.from_costs(self.costs_j, uses_int8=self.uses_int8)

    @property
    def moved(self) -> float | None:
        """How far repair moved the energy, as a share of what the gates decided; above 0.1 is flagged."""
        if self.energies is None or self.energies.decided_j <= 0:
            return None
        return self.energies.hardened_j / self.energies.decided_j - 1

    def bill(self, requests: int, num_beams: int | None) -> Bill:
        """What a batch costs and may cost; ``num_beams`` None for prompts that are scored alone.

        Raises HestError (usage) for a batch that was not calibrated.
        """
        if num_beams is None:
            num_beams = 1 if self.scope == "adapter" else self.num_beams
        return bill_for(self.bills, self.scope, self.envelope, requests, num_beams)

    def allowances_j(
        self, prompt_tokens: Sequence[int], new_tokens: int, num_beams: int | None
    ) -> list[float]:
        """Joules that each request of a batch may spend on its directions per billed token position.

        In scope network all prompts run padded to the longest, and what that costs is shared alike.
        """
        requests = len(prompt_tokens)
        bill = self.bill(requests, num_beams)
        if self.scope == "adapter":
            spare = bill.spare(1, self.margin)
            return [allowance_j(spare, 1, bill.num_beams, p, new_tokens) for p in prompt_tokens]
        spare = bill.spare(requests, self.margin)
        return [allowance_j(spare, requests, bill.num_beams, max(prompt_tokens), new_tokens)] * requests

    def ledger(
        self, prompt_tokens: Sequence[int], new_tokens: int, num_beams: int | None, device: torch.device
    ) -> Ledger | None:
        """A fresh ledger for a batch of these prompts and at most ``new_tokens`` new tokens each.

        None where nothing binds. Raises HestError (usage) for a batch that was not calibrated.
        """
        if self.emax_j is None:
            return None
        return self.ledger_of(self.allowances_j(prompt_tokens, new_tokens, num_beams), device)

    def ledger_of(self, allowances_j: Sequence[float], device: torch.device) -> Ledger:
        """A fresh ledger of requests that may spend so much per token position (J)."""
        allowance_Q = torch.tensor(allowances_j, dtype=torch.float64)
        pace_L = torch.tensor(self.pace, dtype=torch.float64)
        income_LQ = incomes(allowance_Q, pace_L, len(self.order[0]), self.tariff)
        order_LR = torch.tensor(self.order, device=device)
        return Ledger(income_LQ.to(device), order_LR, self.tariff, uses_int8=self.uses_int8)

    def max_new_tokens_for(
        self, prompt_tokens: Sequence[int], num_beams: int | None, asked: int, names: Sequence[str] = ()
    ) -> int:
        """The most new tokens, ``asked`` at most, at which a batch is within E_max wherever it stops.

        ``names`` are the samples'. Raises HestError: exit 5 where not even the first token fits, usage for a
        batch that was not calibrated.
        """
        if self.emax_j is None or self.scope == "adapter":
            return asked
        requests, longest = len(prompt_tokens), max(prompt_tokens)
        bill = self.bill(requests, num_beams)
        fits = by_new_tokens(bill.spare(requests, self.margin), longest, asked) >= 0
        most = asked if fits.all() else int(fits.argmin())
        if most == 0:
            assert bill.emax is not None
            least_j, emax_j = (t.total_j(longest, 1) / requests for t in (bill.base, bill.emax.of(requests)))
            which = f"sample {names[list(prompt_tokens).index(longest)]}" if names else "a sample"
            hint = "harden again with a larger --emax, or shorten prompts with --set data.max_tokens"
            if longest < self.bound[0]:
                hint = (
                    f"the plan was made for {self.bound[0]:,} prompt tokens and more: hestctl harden "
                    f"--set budget.shortest={longest} makes one that starts there"
                )
            raise HestError(
                f"not even one new token of {which} ({longest} prompt tokens, batch of {requests}) fits its "
                f"E_max: it takes {least_j:.4g} J, and {100 * self.margin:.2g} % of {emax_j:.4g} J stay in "
                "reserve",
                hint,
                Exit.OVER_BUDGET,
            )
        return most

    def fixed_states(self, device: torch.device) -> dict[int, Tensor]:
        """The states (R,) of every layer whose directions no token moves."""
        return {
            layer: torch.tensor(states, device=device)
            for layer, states in enumerate(self.fixed or ())
            if states is not None
        }

    def joules(self, counts: Tensor) -> float:
        """Joules of logged state counts (..., S), by the energy table."""
        _, int8, full = counts.reshape(-1, 3).sum(0).tolist()
        return float(int8 * self.costs_j[1] + full * self.costs_j[2])

    def scope_joules(
        self, counts: Tensor, requests: int, num_beams: int | None, prompt_tokens: int, new_tokens: int
    ) -> tuple[float, float | None]:
        """What one sample of a batch spent in the plan's scope, and its E_max (J; None without a budget).

        ``counts`` (..., S) are its logged states; the batch ran ``prompt_tokens``, the longest prompt, and
        ``new_tokens``, the most. Every row runs as far as the longest, so all have the same share.
        """
        if self.scope == "adapter" and self.envelope != "matched":
            return self.joules(counts), self.emax_j
        bill = self.bill(requests, num_beams)
        base_j, emax_j = (
            None if terms is None else terms.total_j(prompt_tokens, new_tokens) / requests
            for terms in (bill.base, None if bill.emax is None else bill.emax.of(requests))
        )
        assert base_j is not None
        return base_j + self.joules(counts), emax_j

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
        energies, fixed, blocks = fields["energies"], fields["fixed"], fields["blocks"]
        return cls(
            **{
                **fields,
                "costs_j": tuple(fields["costs_j"]),
                "bound": tuple(fields["bound"]),
                "pace": tuple(fields["pace"]),
                "order": tuple(tuple(row) for row in fields["order"]),
                "energies": None if energies is None else Energies(**energies),
                "bills": tuple(Bill.from_dict(bill) for bill in fields["bills"]),
                "blocks": BlockStates(tuple(blocks["attention"]), tuple(blocks["mlp"])),
                "choices": tuple((_choice(a), _choice(m)) for a, m in fields["choices"]),
                "fixed": None
                if fixed is None
                else tuple(None if states is None else tuple(states) for states in fixed),
            }
        )

    def check(self, fingerprint: str, device_name: str, table_key: str | None) -> None:
        """Refuse a backbone, a device or an energy table that the plan was not made for.

        ``table_key`` is the key of the table of today, None where there is none to compare with.
        """
        for what, mine, theirs in (
            ("backbone", self.fingerprint, fingerprint),
            ("device", self.device_name, device_name),
            ("energy table", self.table_key, table_key or self.table_key),
        ):
            if mine != theirs:
                raise HestError(
                    f"the plan of run {self.run_id} was made for another {what} ({mine}, not {theirs})",
                    f"`hestctl harden --run {self.run_id}` makes one for this {what}",
                    Exit.USAGE,
                )


def _choice(document: Mapping[str, Any]) -> BlockChoice:
    pairs = {name: document[name] and tuple(document[name]) for name in ("margins", "harm")}
    return BlockChoice(**{**document, **pairs})


def read_plan(path: Path) -> Plan:
    """Raises HestError when the file is missing or damaged."""
    try:
        return Plan.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HestError(f"no readable plan at {path}: {error}", "run `hestctl harden` on that run") from None
