"""The backbone as the engine runs it: weights, rotary table, and the layers over prompts.

Shape legend: N tokens of all prompts, D hidden size, V vocabulary, L layers, C slots of the cache.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hestctl.generation.native import layer as stages
from hestctl.generation.native.gates import Gates
from hestctl.generation.native.graph import compiled
from hestctl.generation.native.products import rms_norm
from hestctl.generation.native.prompts import Prompts, attend
from hestctl.generation.native.rope import rope_table
from hestctl.generation.native.weights import Precision, pointers, read_weights
from hestctl.kernels.choose import Choices
from hestctl.model.backbone import Backbone


class Network:
    """A backbone in one precision. ``moved`` says that its parameters have been put elsewhere since.

    Arguments and errors as ``read_weights``.
    """

    def __init__(self, backbone: Backbone, precision: Precision, choices: Choices | None = None) -> None:
        self.backbone = backbone
        self.weights = read_weights(backbone, precision, choices)
        self._rope = rope_table(backbone, 1)
        self.before_attention: Callable[..., Any] = stages.before_attention
        self.after_attention: Callable[..., Any] = stages.after_attention
        if backbone.device.type == "cuda":
            # Sessions of former engines hold themselves in cycles, with graphs and int8 codes; and what the
            # joined projections stood in before is free now.
            gc.collect()
            torch.cuda.empty_cache()
            self.compile()

    def compile(self) -> None:
        """Compile the two halves of a layer; each shape of input is compiled at its first use."""
        self.before_attention = compiled(stages.before_attention)
        self.after_attention = compiled(stages.after_attention)

    @property
    def moved(self) -> bool:
        return self.weights.pointers != pointers(self.backbone)

    def rope(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin of at least that many positions; a longer table replaces a shorter one."""
        if len(self._rope[0]) < positions:
            self._rope = rope_table(self.backbone, positions)
        return self._rope

    def over(self, prompts: Prompts, gates: Gates | None, stores: Sequence[Tensor] | None) -> Tensor:
        """Hidden states (N, D) after the last layer, before the final norm.

        Keys and values go to ``stores``, one a layer, where given.
        """
        weights = self.weights
        cos, sin = (table[prompts.position_N] for table in self.rope(prompts.width or prompts.longest))
        x_ND = F.embedding(prompts.ids_N, weights.embedding_VD)
        for index, layer in enumerate(weights.layers):
            q, k, v = self.before_attention(x_ND, layer, cos, sin, weights.heads)
            mixed = attend(prompts, q, k, v, None if stores is None else stores[index])
            x_ND = self.after_attention(x_ND, mixed, layer, weights.heads)
            if gates is not None:
                x_ND = gates.prompt(index, x_ND)
        return x_ND

    def logits(self, x_ND: Tensor) -> Tensor:
        """Logits (N, V) of hidden states, in the model's type."""
        return self.weights.head(rms_norm(x_ND, self.weights.norm_D, self.weights.heads.epsilon))
