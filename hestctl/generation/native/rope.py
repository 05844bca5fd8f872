"""Cosines and sines of the rotary embedding, from the frequencies of the model's own module.

Shape legend: P positions, E head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hestctl.model.backbone import Backbone

_STEP = 512


def rope_table(backbone: Backbone, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin (P, 1, E) of at least ``positions`` positions, in the model's type.

    The first half of sin is negative: ``x * cos + roll(x, E / 2) * sin`` is the rotation.
    """
    model: Any = backbone.model
    rotary = model.model.rotary_emb
    rows = -(-positions // _STEP) * _STEP
    steps_P = torch.arange(rows, dtype=torch.float32, device=backbone.device)
    half = steps_P[:, None, None] * rotary.inv_freq.to(backbone.device, torch.float32)
    cos, sin = half.cos() * rotary.attention_scaling, half.sin() * rotary.attention_scaling
    return (
        torch.cat((cos, cos), -1).to(backbone.dtype),
        torch.cat((-sin, sin), -1).to(backbone.dtype),
    )
