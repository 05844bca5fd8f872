"""One decoder layer as pure functions of tensors: what stands before attention and what follows it.

Attention itself is left to ``prompts`` and ``session``, where prompt and single token differ. The same
functions run eagerly on a CPU and, compiled once for all layers of a kind, on a GPU. A block that is off has
no weights, and the layer is what remains.

Shape legend: N tokens (of all requests), D hidden size, H query heads, K key and value heads, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hestctl.generation.native.weights import AttentionWeights, Heads, MlpWeights


def before_attention(
    x_ND: Tensor, attention: AttentionWeights, cos_N1E: Tensor, sin_N1E: Tensor, heads: Heads
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries (N, H, E), rotated keys and values (N, K, E).

    ``sin`` carries the sign of the rotation in its first half, so that one roll serves.
    """
    qkv = attention.qkv.normed(x_ND, attention.norm_D, heads.epsilon).view(
        -1, heads.query + 2 * heads.kv, heads.size
    )
    turning = heads.query + heads.kv
    qk, v = qkv[:, :turning], qkv[:, turning:]
    qk = torch.addcmul(qk * cos_N1E, qk.roll(heads.size // 2, -1), sin_N1E)
    return qk[:, : heads.query], qk[:, heads.query :], v


def after_attention(
    x_ND: Tensor, mixed: Tensor, attention: AttentionWeights, mlp: MlpWeights | None, heads: Heads
) -> Tensor:
    """The layer's output (N, D) from its input and what attention mixed (N, H * E)."""
    if mlp is None:
        return x_ND + attention.out(mixed)
    x_ND, gate_up = mlp.gate_up.summed(x_ND, attention.out(mixed), mlp.norm_D, heads.epsilon)
    return x_ND + mlp.down.gated(gate_up)


def mlp_alone(x_ND: Tensor, mlp: MlpWeights, heads: Heads) -> Tensor:
    """The output (N, D) of a layer whose attention is off."""
    return x_ND + mlp.down.gated(mlp.gate_up.normed(x_ND, mlp.norm_D, heads.epsilon))
