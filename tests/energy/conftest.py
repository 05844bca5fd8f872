"""A meter on a simulated counter: time passes when a test says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from hestctl.energy.fake import FakeClock, FakeCounter
from hestctl.energy.meter import Meter
from hestctl.records import Window

READ_S = 0.0045
"""What one reading takes on an H100 while it is busy."""


@dataclass
class Bench:
    clock: FakeClock
    counter: FakeCounter
    meter: Meter

    def true_j(self, window: Window) -> float:
        return self.counter.true_j(window.start_s, window.end_s)

    def run(self, seconds: float, name: str = "w") -> Window:
        """One window of ``seconds``, settled."""
        with self.meter.window(name, "decode") as window:
            self.clock.advance(seconds)
        return window.result


@pytest.fixture
def bench() -> Callable[..., Bench]:
    def make(
        power: Any = 450.0, *, idle_w: float | None = None, synchronise: Any = None, **counter: Any
    ) -> Bench:
        clock = FakeClock()
        fake = FakeCounter(power, clock, on_read=lambda: clock.spend(READ_S / 2), **counter)
        return Bench(
            clock, fake, Meter(fake, idle_w=idle_w, synchronise=synchronise, clock=clock, pace=clock)
        )

    return make
