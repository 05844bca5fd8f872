"""Joules that can be stood behind: counters, interpolated windows, validity and the meter's certificate."""

from __future__ import annotations

from hestctl.energy.counter import open_counter
from hestctl.energy.meter import Meter
from hestctl.energy.protocol import CounterError, Unavailable
from hestctl.records import Window

__all__ = ["CounterError", "Meter", "Unavailable", "Window", "open_counter"]
