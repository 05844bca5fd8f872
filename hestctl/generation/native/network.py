"""The backbone as the engine runs it: weights, rotary table, and the layers over prompts.

Shape legend: N tokens, D hidden size, V vocabulary, E head size.
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
from hestctl.generation.native.weights import pointers, read_weights
from hestctl.hardening.artefact import Codes
from hestctl.kernels.choose import Choices
from hestctl.model.backbone import Backbone
from hestctl.records import BlockStates

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``attend(n, q, k, v)``: what the n-th of the layers that attend mixes, (N, H * E)."""


class Network:
    """A backbone with its blocks in given states.

    ``moved`` says that its parameters have been put elsewhere since. Arguments and errors as
    ``read_weights``.
    """

    def __init__(
        self,
        backbone: Backbone,
        blocks: BlockStates,
        choices: Choices | None = None,
        codes: Codes | None = None,
    ) -> None:
        self.backbone = backbone
        self.weights = read_weights(backbone, blocks, choices, codes)
        self._rope = rope_table(backbone, 1)
        self.before_attention: Callable[..., Any] = stages.before_attention
        self.after_attention: Callable[..., Any] = stages.after_attention
        self.mlp_alone: Callable[..., Any] = stages.mlp_alone
        if backbone.device.type == "cuda":
            # Sessions of former engines hold themselves in cycles, with graphs and int8 codes; and what the
            # joined projections stood in before is free now.
            gc.collect()
            torch.cuda.empty_cache()
            self.compile()

    def compile(self) -> None:
        """Compile the parts of a layer; each kind of layer and shape of input at its first use."""
        self.before_attention = compiled(stages.before_attention)
        self.after_attention = compiled(stages.after_attention)
        self.mlp_alone = compiled(stages.mlp_alone)

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

        Keys and values go to ``stores``, one a layer that attends, where given.
        """

        def mix(nth: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(prompts, q, k, v, None if stores is None else stores[nth])

        tables = self.rope(prompts.width or prompts.longest)
        turns = tables[0][prompts.position_N], tables[1][prompts.position_N]
        return self.through(prompts.ids_N, turns, mix, None if gates is None else gates.prompt)

    def through(
        self,
        ids_N: Tensor,
        turns: tuple[Tensor, Tensor],
        mix: Attend,
        adapt: Callable[[int, Tensor], Tensor] | None,
    ) -> Tensor:
        """Hidden states (N, D) of the tokens after the last layer, before the final norm.

        ``turns`` are cos and sin (N, 1, E) of their positions; ``adapt(layer, x_ND)`` is what the adapters
        make of a layer's output.
        """
        heads, attended = self.weights.heads, 0
        x_ND = F.embedding(ids_N, self.weights.embedding_VD)
        for index, (attention, mlp) in enumerate(self.weights.layers):
            if attention is not None:
                q, k, v = self.before_attention(x_ND, attention, *turns, heads)
                x_ND = self.after_attention(x_ND, mix(attended, q, k, v), attention, mlp, heads)
                attended += 1
            elif mlp is not None:
                x_ND = self.mlp_alone(x_ND, mlp, heads)
            if adapt is not None:
                x_ND = adapt(index, x_ND)
        return x_ND

    def logits(self, x_ND: Tensor) -> Tensor:
        """Logits (N, V) of hidden states, in the model's type."""
        return self.weights.head(rms_norm(x_ND, self.weights.norm_D, self.weights.heads.epsilon))
