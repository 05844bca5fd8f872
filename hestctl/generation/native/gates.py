"""The adapters inside the engine: gates decide, the ledger allows, the states are logged.

The decisions are those of ``hardpass.HardPass``; what differs is that buffers stay where they are, so
that a CUDA graph can hold the one-token step, and that a prompt runs once per request however many
beams follow. The ledger still pays for a prompt as often as there are beams (E_max was made for that);
the log counts what ran.

Shape legend: Q requests, B beams, W rows (Q * B), N tokens of the prompts with padding, M real ones,
T the ledger's grid, D hidden size, L layers, R directions, S = 3 states, P positions as
``generation.positions`` has them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hestctl.generation.fused import FusedDecode, fused_weights
from hestctl.generation.native.prompts import Prompts
from hestctl.hardening.plan import Plan
from hestctl.kernels.adapter import AdapterWeights
from hestctl.kernels.int8 import Int8Linear
from hestctl.model.spectral import SpectralAdapters, normalise
from hestctl.records import FULL, INT8, NEW_PART, PROMPT_PARTS


class Directions:
    """The adapters' matrices in the backbone's type, their int8 codes made once.

    Made anew when the adapters have changed.
    """

    def __init__(self, adapters: SpectralAdapters, dtype: torch.dtype) -> None:
        self.gate, self.shape = adapters.gate, adapters.shape
        self._adapters, self._dtype = adapters, dtype
        self._step_L: Sequence[AdapterWeights] | None = None
        self._down_LDR = adapters.down.detach().to(dtype).unbind(0)
        self._up_LRD = adapters.up.detach().to(dtype).unbind(0)
        self._scale_LR = adapters.scale.detach().to(dtype).unbind(0)
        self._int8_L = [
            (Int8Linear([down.T]), Int8Linear([up.T]))
            for down, up in zip(self._down_LDR, self._up_LRD, strict=True)
            if adapters.uses_int8
        ]

    def delta(self, x_ND: Tensor, layer: int, state_NR: Tensor) -> Tensor:
        """What the layer's directions add under the given states, as ``SpectralAdapters.delta`` does."""
        scale_R = self._scale_LR[layer]
        out_ND = (x_ND @ self._down_LDR[layer] * scale_R * (state_NR == FULL)) @ self._up_LRD[layer]
        if self._int8_L:
            down, up = self._int8_L[layer]
            out_ND = out_ND + up(down(x_ND) * scale_R * (state_NR == INT8))
        return out_ND

    def step_weights(self, order_LR: Tensor | None) -> Sequence[AdapterWeights]:
        """What the fused step reads, the same for all shapes of batch: made at the first call."""
        if self._step_L is None:
            self._step_L = fused_weights(self._adapters, self._dtype, order_LR)
        return self._step_L


class Gates:
    """The adapters of one batch shape: ``begin`` a batch, then ``prompt`` layer by layer.

    A decode step is ``start``, ``token`` layer by layer, ``tally``; where ``fused``, by the kernel of
    ``generation.fused`` (``why_not_fused`` has no objection then). ``log`` is of the states that ran;
    ``step`` before each step keeps its positions apart, from outside a graph.
    """

    def __init__(
        self,
        directions: Directions,
        plan: Plan | None,
        requests: int,
        beams: int,
        device: torch.device,
        *,
        fused: bool,
    ) -> None:
        layers, _, _ = directions.shape
        self._directions, self._plan = directions, plan
        self._beams, self._device = beams, device
        self._real_W = torch.ones(requests * beams, dtype=torch.bool, device=device)
        self._states_S = torch.arange(3, device=device)
        self._step_LWR: list[Tensor] = []
        self._fixed = {} if plan is None else plan.fixed_states(device)
        self._ledger = None if plan is None else plan.ledger([1] * requests, 0, None, device)
        self._requests, self._steps = requests, 0
        self._prompt_LCS = torch.zeros(
            layers, requests * PROMPT_PARTS, 3, dtype=torch.int64, device=device
        )  # C: a part of one request's prompt
        self._decoded_LQS = torch.zeros(layers, requests, 3, dtype=torch.int64, device=device)
        self._marks_LQS: list[Tensor] = []
        self._fused = None
        if fused:
            order_LR = None if self._ledger is None else self._ledger.order_LR
            weights = directions.step_weights(order_LR)
            self._fused = FusedDecode(weights, self._ledger, self._decoded_LQS, beams=beams)

    def begin(self, prompts: Prompts, new_tokens: int) -> None:
        """A new batch of at most ``new_tokens`` each (0: scored alone): empty log, fresh purses."""
        self._prompts = prompts
        cells = [
            row * PROMPT_PARTS + torch.arange(length) * PROMPT_PARTS // length
            for row, length in enumerate(prompts.lengths)
        ]
        self._cell_M = torch.cat(cells).to(self._device)
        self._prompt_LCS.zero_()
        self._decoded_LQS.zero_()
        self._marks_LQS.clear()
        self._steps = 0
        if self._plan is not None and self._ledger is not None:
            beams = self._beams if new_tokens else None
            fresh = self._plan.ledger(prompts.lengths, new_tokens, beams, self._device)
            assert fresh is not None
            self._ledger.restart(fresh)
            self._real_QT = torch.zeros(
                len(prompts.lengths), prompts.longest, dtype=torch.bool, device=self._device
            )
            self._real_QT[prompts.row_R, prompts.column_R] = True

    def prompt(self, layer: int, hidden_ND: Tensor) -> Tensor:
        """A layer's output over all prompts, with its directions added to the real tokens."""
        real_M = self._prompts.real_R
        x_MD = normalise(hidden_ND if real_M is None else hidden_ND[real_M])
        state_MR = self._decide(x_MD[None], layer)[0]
        if self._ledger is not None:
            state_MR = self._allowed(layer, state_MR)
        used_MS = (state_MR[..., None] == self._states_S).sum(1)
        self._prompt_LCS[layer].index_add_(0, self._cell_M, used_MS)
        delta_MD = self._directions.delta(x_MD, layer, state_MR)
        if real_M is None:
            return hidden_ND + delta_MD
        return hidden_ND.index_add(0, real_M, delta_MD)

    def step(self) -> None:
        """Count one step; what was decoded before each ``NEW_PART`` is kept."""
        if self._steps % NEW_PART == 0:
            self._marks_LQS.append(self._decoded_LQS.clone())
        self._steps += 1

    def log(self) -> Tensor:
        """How often which states ran since ``begin``, (P, Q, L, S) on the device."""
        layers = len(self._prompt_LCS)
        prompt_PQLS = self._prompt_LCS.view(layers, self._requests, PROMPT_PARTS, 3).permute(2, 1, 0, 3)
        if not self._marks_LQS:
            return prompt_PQLS
        new_PLQS = torch.stack([*self._marks_LQS, self._decoded_LQS]).diff(dim=0)
        return torch.cat((prompt_PQLS, new_PLQS.transpose(1, 2)))

    def start(self, alive: Tensor) -> None:
        """A step begins; once ``alive`` () is false nothing is open or paid for."""
        self._real_W.copy_(alive)

    def token(self, layer: int, hidden_WD: Tensor) -> Tensor:
        """A layer's output for one token a row."""
        if self._fused is not None:
            return self._fused.steps[layer](hidden_WD, self._real_W)
        x_WD, real_W1 = normalise(hidden_WD), self._real_W[:, None]
        state_W1R = self._decide(x_WD[:, None], layer) * real_W1[..., None]
        if self._ledger is not None:
            state_W1R = self._ledger.allow(layer, state_W1R, real_W1)
        state_WR = state_W1R[:, 0]
        self._step_LWR.append(state_WR)
        return hidden_WD + self._directions.delta(x_WD, layer, state_WR)

    def tally(self) -> None:
        """Log the states of the step that ends here; the fused kernel has logged its own."""
        if self._fused is not None:
            return
        state_LWR = torch.stack(self._step_LWR)
        self._step_LWR.clear()
        used_LWRS = (state_LWR[..., None] == self._states_S) * self._real_W[:, None, None]
        self._decoded_LQS += used_LWRS.view(len(state_LWR), self._requests, -1, 3).sum(2)

    def _decide(self, x_BTD: Tensor, layer: int) -> Tensor:
        if layer in self._fixed:
            return self._fixed[layer].expand(*x_BTD.shape[:2], -1)
        return self._directions.gate.decide(x_BTD, layer)

    def _allowed(self, layer: int, state_MR: Tensor) -> Tensor:
        assert self._ledger is not None
        row_M, column_M = self._prompts.row_R, self._prompts.column_R
        asked_QTR = state_MR.new_zeros(*self._real_QT.shape, state_MR.shape[1])
        asked_QTR[row_M, column_M] = state_MR
        # Every beam has the prompt's bill; what the first of them may run is what all of them see.
        asked_WTR, real_WT = (x.repeat_interleave(self._beams, 0) for x in (asked_QTR, self._real_QT))
        allowed_WTR = self._ledger.allow(layer, asked_WTR, real_WT)
        return allowed_WTR[:: self._beams][row_M, column_M]
