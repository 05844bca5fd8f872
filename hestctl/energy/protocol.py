"""What every counter of joules looks like to the meter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from hestctl.energy.conditions import Conditions
from hestctl.records import EnergyKind


class CounterError(Exception):
    """The counter gives no joules, for ``reason``: refused when it was opened, or lost later."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Unavailable:
    """There is no number, for ``reason``. Takes the place of the number's source."""

    reason: str


class Counter(Protocol):
    """A cumulative counter of joules.

    ``step_s`` is the nominal time between its updates in seconds, None where every read is current.
    ``max_w`` is the most power in watts that it can plausibly show, None where that is unknown.
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> EnergyKind: ...

    @property
    def device_name(self) -> str: ...

    @property
    def device_uuid(self) -> str: ...

    @property
    def step_s(self) -> float | None: ...

    @property
    def max_w(self) -> float | None: ...

    def read_j(self) -> float:
        """Joules since an arbitrary origin. Raises CounterError when there is no such number."""
        ...

    def conditions(self) -> Conditions:
        """The state of the device now; never raises, what cannot be read is None."""
        ...


@runtime_checkable
class PowerSensor(Protocol):
    """A counter whose device tells its power as well, for the certificate's cross-check."""

    @property
    def driver(self) -> str: ...

    def power_w(self) -> float:
        """Instantaneous power in watts. Raises CounterError when there is no such number."""
        ...
