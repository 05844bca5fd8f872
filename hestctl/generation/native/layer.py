"""One decoder layer as pure functions of tensors: what stands before attention and what follows it.

Attention itself is left to ``prompts`` and ``session``, where prompt and single token differ. The same
functions run eagerly on a CPU and, compiled once for all layers, on a GPU.

Shape legend: N tokens (of all requests), D hidden size, H query heads, K key and value heads, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hestctl.generation.native.weights import Heads, LayerWeights


def before_attention(
    x_ND: Tensor, layer: LayerWeights, cos_N1E: Tensor, sin_N1E: Tensor, heads: Heads
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries (N, H, E), rotated keys and values (N, K, E).

    ``sin`` carries the sign of the rotation in its first half, so that one roll serves.
    """
    qkv = layer.qkv.normed(x_ND, layer.norm_in_D, heads.epsilon).view(
        -1, heads.query + 2 * heads.kv, heads.size
    )
    turning = heads.query + heads.kv
    qk, v = qkv[:, :turning], qkv[:, turning:]
    qk = torch.addcmul(qk * cos_N1E, qk.roll(heads.size // 2, -1), sin_N1E)
    return qk[:, : heads.query], qk[:, heads.query :], v


def after_attention(x_ND: Tensor, mixed: Tensor, layer: LayerWeights, heads: Heads) -> Tensor:
    """The layer's output (N, D) from its input and what attention mixed (N, H * E)."""
    x_ND, gate_up = layer.gate_up.summed(x_ND, layer.out(mixed), layer.norm_mid_D, heads.epsilon)
    return x_ND + layer.down.gated(gate_up)
