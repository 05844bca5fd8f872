"""What training has spent: joules by the live meter, and seconds, over all attempts of a run.

The account stands in a small file of the run's folder after every optimiser step, for an attempt that is
killed has spent its joules all the same; and in every checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hestctl.energy.meter import Meter
from hestctl.errors import Exit, HestError
from hestctl.records import EnergyKind, Window
from hestctl.training.ranks import JointMeter

SPENT_FILE = "spent.json"

Stage = Literal["step", "evaluation", "checkpoint"]


class JoulesUnknown(HestError):
    """A training budget cannot be held: what was spent, or what will be, is not known."""


def demand_live_counter(meter: Meter | JointMeter) -> None:
    """Raises HestError (no device) where no counter tells what a budgeted training spends."""
    if meter.total_j() is None:
        raise JoulesUnknown(
            f"a training budget cannot be held without a live counter: {meter.reason}",
            "on a CPU take --meter estimate; or leave out --max-train-joules",
            Exit.NO_DEVICE,
        )


@dataclass(slots=True)
class _Sum:
    """``counted_j`` is what a budget counts. With ``unread`` (why some joules were not read) that is no
    longer what was spent, and None where nobody can say how much is missing."""

    kind: EnergyKind
    counted_j: float | None = 0.0
    seconds: float = 0.0
    unread: str | None = None
    dearest_j: dict[str, float] = field(default_factory=dict)


class Account:
    """Counts from its making on; ``budget_j`` is what all attempts together may spend (J), None any sum.

    ``path`` is the account's file. It survives the death of the process, a checkpoint that of the machine.
    """

    def __init__(self, meter: Meter | JointMeter, path: Path, budget_j: float | None) -> None:
        self.budget_j = budget_j
        self._meter = meter
        self._path = path
        self._opened_s = time.monotonic()
        self._start = meter.edge()
        self._last_j = meter.total_j()
        self._sum = _Sum(meter.kind)
        if self._last_j is None:
            self._sum.counted_j, self._sum.unread = None, self._reason
        self._before_j, self._before_s = self._sum.counted_j, 0.0
        self._closed = False

    @property
    def joules(self) -> float | None:
        """Spent in all attempts (J); None where some were not read: ``unread`` says why."""
        return None if self._sum.unread is not None else self._sum.counted_j

    @property
    def unread(self) -> str | None:
        return self._sum.unread

    @property
    def seconds(self) -> float:
        """Time that all attempts took (s)."""
        return self._sum.seconds

    @property
    def overshoot_j(self) -> float | None:
        """Joules over the budget, 0 within it; None without a budget, or where the joules are not known."""
        if self.budget_j is None or self._sum.counted_j is None:
            return None
        return max(0.0, self._sum.counted_j - self.budget_j)

    def go_on(self, checkpoint: Mapping[str, Any] | None) -> str | None:
        """Add what earlier attempts spent: the checkpoint's account, or that of the file where it is later.

        Returns what there is to tell of it, None for a first attempt. The file stays as it is until the next
        entry: an attempt that ``check`` refuses leaves no trace.
        """
        own, damaged = self._sum, None
        found = [] if checkpoint is None else [_Sum(**checkpoint)]
        try:
            found.append(_Sum(**json.loads(self._path.read_bytes())))
        except FileNotFoundError:
            if not found:
                return None
        except (OSError, ValueError, TypeError):
            damaged = f"{self._path.name} is damaged"
        earlier = max(found, key=lambda one: one.seconds, default=_Sum(own.kind))
        mixed = None
        if earlier.kind != own.kind:
            mixed = f"joules of an earlier attempt are {earlier.kind}, of this one {own.kind}"
        reason = damaged or own.unread or mixed
        if reason is not None:
            earlier.counted_j, earlier.unread = None, earlier.unread or reason
        earlier.kind = own.kind
        self._sum, self._before_j, self._before_s = earlier, earlier.counted_j, earlier.seconds
        if self.joules is None:
            return f"what training has spent is not known: {self.unread}"
        return f"training has spent {_in_j(self.joules)} ({own.kind}) in {self.seconds:,.0f} s so far"

    def check(self) -> None:
        """Raises JoulesUnknown (no device) where there is a budget, and nobody could say when it is spent."""
        if self.budget_j is None:
            return
        if self._last_j is None:
            raise JoulesUnknown(
                f"a training budget cannot be held without a live counter: {self._reason}",
                "nothing is lost: the same command with --resume goes on, once the counter is back",
                Exit.NO_DEVICE,
            )
        if self._sum.counted_j is None:
            raise JoulesUnknown(
                f"a training budget cannot be held: what training has spent is not known ({self.unread})",
                "leave out --max-train-joules to go on without one",
                Exit.NO_DEVICE,
            )

    def affords_step(self) -> bool:
        """Whether the budget pays for one more step, and for the evaluation and checkpoint that end training.

        Each is taken to cost what the dearest so far did. Raises JoulesUnknown as ``check`` does.
        """
        self.check()
        spent_j = self._sum.counted_j
        if self.budget_j is None or spent_j is None:
            return True
        return spent_j < self.budget_j and spent_j + sum(self._sum.dearest_j.values()) <= self.budget_j

    def book(self, stage: Stage | None = None) -> None:
        """Count what was spent since the last entry, as the price of one ``stage`` where that is named.

        Raises HestError where the file cannot be written.
        """
        before_j, self._last_j = self._last_j, self._meter.total_j()
        self._sum.seconds = self._before_s + time.monotonic() - self._opened_s
        if before_j is None or self._last_j is None:
            # Between two stages of a training that has lost its counter, next to nothing is spent.
            if before_j is not None or stage is not None:
                self._miss(stage)
        else:
            cost_j = self._last_j - before_j
            if self._sum.counted_j is not None:
                self._sum.counted_j += cost_j
            if stage is not None:
                self._sum.dearest_j[stage] = max(cost_j, self._sum.dearest_j.get(stage, 0.0))
        self._keep()

    def close(self, others: Sequence[Window] = ()) -> Window:
        """End the attempt: its window, with which the sum is settled, and those of ``others`` devices.

        The live counter lags behind by up to one of its own steps, the window does not. A window that is
        not valid (contention, throttling) leaves the sum to the budget, and no figure to report.
        """
        end = self._meter.edge()
        self.book()
        window = self._meter.cut(self._start, end, name="training", phase="training")
        windows = (window, *others)
        energies_j = [one.energy_j for one in windows if one.energy_j is not None]
        if len(energies_j) < len(windows):
            self.book()  # the counter may have been lost while the window waited for it
        elif self.joules is not None and self._before_j is not None:
            self._sum.counted_j = max(self.joules, self._before_j + sum(energies_j))
            invalid = next((one for one in windows if not one.valid), None)
            if invalid is not None:
                self._sum.unread = f"the window is not valid: {invalid.reason}"
            self._keep()
        self._closed = True
        return window

    def leave(self) -> None:
        """Count the rest of an attempt that ends before its time; the error that ends it is not hidden."""
        if not self._closed:
            with suppress(HestError):
                self.book()

    def as_state(self) -> dict[str, Any]:
        """The account for a checkpoint, JSON-able."""
        return asdict(self._sum)

    def told(self, steps: str) -> str:
        """The budget and what became of it, in one line; ``steps`` says how far training came."""
        spent_j, kind = self._sum.counted_j, self._sum.kind
        if self.budget_j is None or spent_j is None:
            return f"what training has spent is not known: {self.unread}"
        line = f"training budget: {_in_j(spent_j)} of {_in_j(self.budget_j)} spent ({kind}) after {steps}; "
        if self.overshoot_j:
            line += f"overshot by {_in_j(self.overshoot_j)}"
        else:
            next_j = sum(self._sum.dearest_j.values())
            line += f"the next step, and what ends training, would take about {_in_j(next_j)}"
        return line + (f"; some joules are a guess: {self.unread}" if self.unread else "")

    @property
    def _reason(self) -> str:
        return self._meter.reason or "the counter gave no reading"

    def _miss(self, stage: Stage | None) -> None:
        """Joules since the last entry were not read.

        A budgeted training stops as soon as that happens: its budget counts the stretch as the dearest one
        so far, so that it can go on. Any other training goes on, and may miss any number of stretches.
        """
        dearest_j = self._sum.dearest_j
        if self.budget_j is None or not dearest_j or self._sum.counted_j is None:
            self._sum.counted_j = None
        else:
            self._sum.counted_j += dearest_j.get(stage or "", max(dearest_j.values()))
        self._sum.unread = self._sum.unread or self._reason

    def _keep(self) -> None:
        """Without fsync: safety from power cuts as well would cost every step a wait for the disk."""
        aside = self._path.with_name(f".{self._path.name}")
        try:
            aside.write_text(json.dumps(self.as_state()))
            aside.replace(self._path)
        except OSError as error:
            raise HestError(
                f"cannot write {self._path}: {error.strerror or error}",
                "free space, or check the folder's permissions; then --resume goes on",
            ) from error


def _in_j(joules: float) -> str:
    return f"{joules:,.0f} J" if joules >= 1000 else f"{joules:.4g} J"
