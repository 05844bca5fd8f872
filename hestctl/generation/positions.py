"""Where in a generation the directions were in which state: parts of the prompt, then steps of new tokens.

A new token is where its own hidden state passes the layers, so the last one of an answer is never there.

Shape legend: Q requests, W rows (Q * beams), T tokens, L layers, S = 3 states, P positions: the
``PROMPT_PARTS`` of the prompt, then as many steps of ``NEW_PART`` new tokens as the batch ran.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hestctl.records import NEW_PART, PROMPT_PARTS, STATES, LayerUse


def prompt_parts(real_WT: Tensor) -> Tensor:
    """Which part of its prompt each token is in, (W, T); padding is in part 0."""
    nth_WT = (real_WT.cumsum(1) - 1).clamp_min(0)
    return nth_WT * PROMPT_PARTS // real_WT.sum(1, keepdim=True)


def layer_use(logs_PQLS: Sequence[Tensor]) -> list[LayerUse]:
    """The logs of batches as records; positions that no token reached have none."""
    if not logs_PQLS:
        return []
    _, _, layers, states = logs_PQLS[0].shape
    total_PLS = torch.zeros(max(map(len, logs_PQLS)), layers, states, dtype=torch.int64)
    for log_PQLS in logs_PQLS:
        total_PLS[: len(log_PQLS)] += log_PQLS.sum(1)
    uses = []
    for place, part_LS in enumerate(total_PLS.tolist()):
        new = place >= PROMPT_PARTS
        phase: Literal["prompt", "new"] = "new" if new else "prompt"
        position = (place - PROMPT_PARTS) * NEW_PART if new else place
        for layer, counts in enumerate(part_LS):
            uses += [
                LayerUse(layer, state, count, count / sum(counts), phase, position)
                for state, count in zip(STATES, counts, strict=True)
                if sum(counts)
            ]
    return uses
