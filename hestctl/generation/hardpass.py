"""One forward pass of the hardened adapters: gates decide, the ledger allows, the states are logged.

Shape legend: Q requests, W rows of the batch (Q * beams), T tokens, D hidden size, L layers, R
directions, S = 3 states.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from hestctl.hardening.ledger import Ledger
from hestctl.model.spectral import SpectralAdapters, normalise


class HardPass:
    """Give this to ``model.spectral.applied`` around one generation or one scoring of a batch.

    ``mask_WT`` marks the real tokens of the first call (the prompt); later tokens are all real.
    ``fixed`` are the states (R,) of layers whose gates need not be asked (``Plan.fixed_states``).
    ``counts_QLS`` is the log of the states applied, the only source of a sample's scope energy.
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
        self._prompt_done = [False] * layers
        self.counts_QLS = torch.zeros(requests, layers, 3, dtype=torch.int64, device=mask_WT.device)

    def __call__(self, layer: int, hidden_WTD: Tensor) -> Tensor:
        rows, tokens, _ = hidden_WTD.shape
        if self._prompt_done[layer]:
            real_WT = torch.ones(rows, tokens, dtype=torch.bool, device=hidden_WTD.device)
        else:
            real_WT = self._mask_WT
            self._prompt_done[layer] = True
        x_WTD = normalise(hidden_WTD)
        if layer in self._fixed:
            state_WTR = self._fixed[layer].expand(rows, tokens, -1) * real_WT[..., None]
        else:
            state_WTR = self._adapters.gate.decide(x_WTD, layer) * real_WT[..., None]
        if self._ledger is not None:
            state_WTR = self._ledger.allow(layer, state_WTR, real_WT)
        one_hot_WTRS = F.one_hot(state_WTR, 3)
        requests = self.counts_QLS.shape[0]
        self.counts_QLS[:, layer] += (
            (one_hot_WTRS * real_WT[..., None, None]).view(requests, -1, state_WTR.shape[2], 3).sum((1, 2))
        )
        return hidden_WTD + self._adapters.delta(x_WTD, layer, one_hot_WTRS)
