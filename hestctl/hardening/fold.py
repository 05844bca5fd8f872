"""Directions that no token moves: decided once, so that the engine need not ask their gates.

Shape legend: L layers, N tokens of the reference, R directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hestctl.model.gates import OrdinalGate
from hestctl.records import FULL, OFF

_ALWAYS = 0.999
"""Share of the reference's tokens from which on a direction counts as always in one state."""

_SPREADS = 1e4
"""A threshold that no score reaches, and with which arithmetic stays finite in every type."""


@torch.no_grad()
def fold(gate: OrdinalGate, state_LNR: Tensor) -> tuple[tuple[int, ...] | None, ...]:
    """Fix the directions that are always full or always off on the reference, by their thresholds, in place.

    Returns each layer's states where all of its directions are fixed, None where a token still decides.
    """
    always_LR, never_LR = ((state_LNR == state).double().mean(1) >= _ALWAYS for state in (FULL, OFF))
    threshold = gate.threshold
    threshold[always_LR.to(threshold.device)] = -_SPREADS
    threshold[never_LR.to(threshold.device)] = _SPREADS
    fixed: list[tuple[int, ...] | None] = []
    for always_R, never_R in zip(always_LR, never_LR, strict=True):
        whole = bool((always_R | never_R).all())
        fixed.append(tuple(FULL if on else OFF for on in always_R.tolist()) if whole else None)
    return tuple(fixed)
