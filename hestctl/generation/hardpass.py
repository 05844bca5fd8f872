"""One forward pass of the hardened adapters: gates decide, the ledger allows, the states are logged.

Shape legend: Q requests, W rows of the batch (Q * beams), T tokens, D hidden size, L layers, R
directions, S = 3 states, P positions as ``generation.positions`` has them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from hestctl.generation.positions import prompt_parts
from hestctl.hardening.ledger import Ledger
from hestctl.model.spectral import SpectralAdapters, normalise
from hestctl.records import NEW_PART, PROMPT_PARTS


class HardPass:
    """Give this to ``model.spectral.applied`` around one generation or one scoring of a batch.

    ``mask_WT`` marks the real tokens of the first call (the prompt); later tokens are all real.
    ``fixed`` are the states (R,) of layers whose gates need not be asked (``Plan.fixed_states``).
    ``log`` is of the states applied, the only source of a sample's scope energy.
    """

    def __init__(
        self,
        adapters: SpectralAdapters,
        mask_WT: Tensor,
        requests: int,
        ledger: Ledger | None,
        fixed: Mapping[int, Tensor],
    ) -> None:
        layers, _, _ = adapters.shape
        self._adapters = adapters
        self._mask_WT = mask_WT.bool()
        self._ledger = ledger
        self._fixed = fixed
        self._seen_L = [0] * layers  # calls of each layer: the prompt's, then one a new token
        self._parts = [
            torch.zeros(PROMPT_PARTS, requests, layers, 3, dtype=torch.int64, device=mask_WT.device)
        ]

    def log(self) -> Tensor:
        """How often which states were applied, (P, Q, L, S)."""
        return torch.cat(self._parts)

    def __call__(self, layer: int, hidden_WTD: Tensor) -> Tensor:
        rows, tokens, _ = hidden_WTD.shape
        prompt = self._seen_L[layer] == 0
        real_WT = self._mask_WT
        if not prompt:
            real_WT = torch.ones(rows, tokens, dtype=torch.bool, device=hidden_WTD.device)
        x_WTD = normalise(hidden_WTD)
        if layer in self._fixed:
            state_WTR = self._fixed[layer].expand(rows, tokens, -1) * real_WT[..., None]
        else:
            state_WTR = self._adapters.gate.decide(x_WTD, layer) * real_WT[..., None]
        if self._ledger is not None:
            state_WTR = self._ledger.allow(layer, state_WTR, real_WT)
        one_hot_WTRS = F.one_hot(state_WTR, 3)
        self._note(
            layer, (one_hot_WTRS * real_WT[..., None, None]).sum(2), prompt_parts(real_WT) if prompt else None
        )
        return hidden_WTD + self._adapters.delta(x_WTD, layer, one_hot_WTRS)

    def _note(self, layer: int, used_WTS: Tensor, part_WT: Tensor | None) -> None:
        """Add to the log; ``part_WT`` is where the prompt's tokens are, None for a new token."""
        first = self._parts[0]
        requests = first.shape[1]
        if part_WT is None:
            nth = (self._seen_L[layer] - 1) // NEW_PART + 1
            if nth == len(self._parts):
                self._parts.append(torch.zeros_like(first[:1]))
            self._parts[nth][0, :, layer] += used_WTS.view(requests, -1, 3).sum(1)
        else:
            request_W1 = torch.arange(len(part_WT), device=part_WT.device)[:, None] // (
                len(part_WT) // requests
            )
            first[:, :, layer].index_put_((part_WT, request_W1.expand_as(part_WT)), used_WTS, accumulate=True)
        self._seen_L[layer] += 1
