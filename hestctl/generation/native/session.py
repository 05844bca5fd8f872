"""The buffers of one shape of batch, and the decode step over them.

The step reads and writes nothing but tensors that stay where they are: on a GPU it is captured in one
graph, on a CPU it simply runs, there over the slots in use only.

All beams of a request share one row of the cache. After the prompt's slots, step t has B slots, one a
beam; the mask is the table of ancestry: a beam sees the slots of the beams it goes on from, and a
reordering of beams is a reordering of the mask's rows.

Shape legend: Q requests, B beams, W rows (Q * B), C slots, D hidden size, H query heads, K key and value
heads, G = H / K, E head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hestctl.generation.native.beams import BeamSearch
from hestctl.generation.native.cache import CacheShape, bucket, cache_shape
from hestctl.generation.native.choice import Choice, Greedy, Rules
from hestctl.generation.native.gates import Gates
from hestctl.generation.native.graph import LateStop, PromptStop, Replay
from hestctl.generation.native.network import Network
from hestctl.generation.native.prompts import lay_out


class Shape(NamedTuple):
    """What a session is made for. ``prompt_slots`` is the length bucket of its prompts."""

    requests: int
    beams: int
    prompt_slots: int
    rules: Rules

    def cache(self, network: Network) -> CacheShape:
        """The cache it needs: the prompt's slots once, and a slot for each beam and new token."""
        slots = self.prompt_slots + bucket(self.rules.new_tokens * self.beams)
        weights = network.weights
        return cache_shape(weights.attending, self.requests, slots, weights.heads)


class Session:
    """``begin`` runs the prompts and takes the first tokens; ``decode`` every further one.

    ``static`` is how a GPU wants it: prompts padded to their bucket, attention over all slots under a
    mask, stops looked at late. ``memory`` is flat and holds the cache; sessions that never run at once
    may share it.
    """

    def __init__(
        self, network: Network, shape: Shape, gates: Gates | None, memory: Tensor, *, static: bool
    ) -> None:
        device, dtype = network.backbone.device, network.backbone.dtype
        requests, beams, slots, rules = shape
        vocabulary = network.weights.head.weight_MD.shape[0]
        self._network, self._shape, self._static = network, shape, static
        self.gates = gates
        cached = shape.cache(network)
        room = cached.slots
        self._stores = memory[: math.prod(cached)].view(cached).unbind(0)
        self._cos, self._sin = network.rope(slots + rules.new_tokens)
        self.choice: Choice = (
            Greedy(rules, requests, vocabulary, device)
            if beams == 1
            else BeamSearch(rules, requests, beams, vocabulary, device)
        )
        rows = requests * beams
        self._position_W = torch.zeros(rows, dtype=torch.int64, device=device)
        self._slots_B = torch.arange(slots, slots + beams, device=device)
        self._mask_QBC = torch.full((requests, beams, room), -torch.inf, dtype=dtype, device=device)
        own_BB = torch.full((beams, beams), -torch.inf, dtype=dtype, device=device).fill_diagonal_(0.0)
        self._own_QBB = own_BB.expand(requests, -1, -1)
        self._masked, self._used = True, room
        self._run = Replay(self.step, self._rewind) if device.type == "cuda" else self.step

    def begin(self, sequences: Sequence[Sequence[int]]) -> None:
        """Run the prompts and take the first new tokens."""
        _, beams, slots, rules = self._shape
        width = slots if self._static else None
        prompts = lay_out(sequences, self._position_W.device, width=width, grid="left")
        if self.gates is not None:
            self.gates.begin(prompts, rules.new_tokens)
        x_ND = self._network.over(prompts, self.gates, self._stores)
        logits_QV = self._network.logits(x_ND[prompts.last_Q])
        lengths_Q = torch.tensor(prompts.lengths, device=self._position_W.device)
        self._position_W.copy_(lengths_Q.repeat_interleave(beams))
        first = slots if self._static else prompts.longest
        torch.arange(first, first + beams, out=self._slots_B)
        places_C = torch.arange(self._mask_QBC.shape[2], device=lengths_Q.device)
        hidden_QC = places_C >= lengths_Q[:, None]
        self._mask_QBC.zero_().masked_fill_(hidden_QC[:, None], -torch.inf)
        if not self._static:
            self._used = first
            self._masked = beams > 1 or min(prompts.lengths) < first
        self.choice.begin(prompts)
        self.choice.choose(logits_QV)

    def stop(self) -> LateStop | PromptStop:
        """What says, before each step, that there is nothing left to decode."""
        return LateStop(self.choice.alive) if self._static else PromptStop(self.choice.alive)

    def decode(self) -> None:
        """One more token for every row."""
        if self.gates is not None:
            self.gates.step()
        if not self._static:
            self._used += self._shape.beams
        self._run()

    def step(self) -> None:
        """Embedding, layers with their gates, choice, and everything's move to the next position."""
        network = self._network
        if self.gates is not None:
            self.gates.start(self.choice.alive)
        turns = self._cos[self._position_W], self._sin[self._position_W]
        mask = self._visible()

        def mix(nth: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._attend(self._stores[nth], q, k, v, mask)

        adapt = None if self.gates is None else self.gates.token
        x_WD = network.through(self.choice.tokens_W, turns, mix, adapt)
        if self.gates is not None:
            self.gates.tally()
        parents_QB = self.choice.choose(network.logits(x_WD))
        if parents_QB is not None:
            self._mask_QBC.copy_(self._mask_QBC.gather(1, parents_QB[..., None].expand_as(self._mask_QBC)))
        self._position_W += 1
        self._slots_B += self._shape.beams

    def _visible(self) -> Tensor | None:
        """The mask (Q, 1, B * G, C) of this step, each beam's own slot added; None where all is seen."""
        if not self._masked:
            return None
        self._mask_QBC.index_copy_(2, self._slots_B, self._own_QBB)
        mask = self._mask_QBC[:, None, :, : self._used]
        if self._shape.beams == 1:
            return mask
        heads = self._network.weights.heads
        return mask[:, :, :, None].expand(-1, -1, -1, heads.query // heads.kv, -1).flatten(2, 3)

    def _attend(
        self, store: Tensor, q_WHE: Tensor, k_WKE: Tensor, v_WKE: Tensor, mask: Tensor | None
    ) -> Tensor:
        beams, (rows, heads, size) = self._shape.beams, k_WKE.shape
        for cached, new in zip(store, (k_WKE, v_WKE), strict=True):
            cached.index_copy_(2, self._slots_B, new.view(-1, beams, heads, size).transpose(1, 2))
        # The queries that share a key head, beam by beam, are rows of one small MatMul.
        q = q_WHE.reshape(rows // beams, beams, heads, -1, size).transpose(1, 2)
        k, v = store[:, :, :, : self._used].unbind(0)
        mixed = F.scaled_dot_product_attention(q.flatten(2, 3), k, v, attn_mask=mask)
        return mixed.view(q.shape).transpose(1, 2).reshape(rows, -1)

    def _rewind(self) -> None:
        """The state of a batch without prompts: enough for a step that counts for nothing."""
        slots, beams = self._shape.prompt_slots, self._shape.beams
        self._position_W.zero_()
        torch.arange(slots, slots + beams, out=self._slots_B)
        self._mask_QBC.fill_(-torch.inf)
        self.choice.begin(None)
