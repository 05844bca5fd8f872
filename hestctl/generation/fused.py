"""From trained adapters and a ledger to the fused adapter steps of decode.

The prompt runs through ``HardPass``; ``FusedDecode.take`` then carries its purses and its log over to the
kernels' registers, which go on with the new tokens.

Shape legend: W rows (Q requests x beams), T tokens, D hidden size, L layers, R directions, S = 3 states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hestctl.hardening.ledger import Ledger
from hestctl.kernels.adapter import AdapterStep, AdapterWeights, GateKind, Registers
from hestctl.kernels.devices import why_no_triton
from hestctl.model.controller import FactorisedController
from hestctl.model.gates import LinearGate, OrdinalGate, StaticGate
from hestctl.model.spectral import SpectralAdapters


def why_not_fused(adapters: SpectralAdapters, device: torch.device) -> str | None:
    """Why these adapters run unfused (``HardPass``) in decode; None where the fused kernel takes them."""
    if adapters.uses_int8:
        return "int8 directions need the whole row's maximum before their product: they run unfused"
    if not isinstance(adapters.gate, OrdinalGate | LinearGate | StaticGate):
        return f"no fused kernel for {type(adapters.gate).__name__}"
    return why_no_triton(device)


class FusedDecode:
    """The fused adapter steps of all layers (``steps[layer](h_W1D, real_W)``) and their registers.

    Made once for a number of requests and beams and kept: a captured graph holds its addresses.
    ``order_LR`` is the ledger's order of directions, None where no ledger binds. ``dtype`` is the model's.
    """

    def __init__(
        self,
        adapters: SpectralAdapters,
        dtype: torch.dtype,
        order_LR: Tensor | None,
        *,
        requests: int,
        beams: int,
        joined: bool | None = None,
    ) -> None:
        layers, _, rank = adapters.shape
        device = adapters.down.device
        self.registers = Registers.zeros(layers, requests, device)
        same = torch.arange(rank, device=device)
        self.steps = [
            AdapterStep(
                _weights(adapters, layer, dtype, same if order_LR is None else order_LR[layer]),
                self.registers,
                layer,
                beams=beams,
                ledger=order_LR is not None,
                joined=joined,
            )
            for layer in range(layers)
        ]

    def take(self, counts_QLS: Tensor, ledger: Ledger | None) -> None:
        """Go on where the prompt's pass ended: its log of states, and its purses."""
        self.registers.counts_LQS.copy_(counts_QLS.transpose(0, 1))
        if ledger is not None:
            self.registers.income_LQ.copy_(ledger.income_LQ)
            self.registers.purse_LQ.copy_(ledger.purse_LQ)
            self.registers.seen_LQ.copy_(ledger.seen_LQ)

    def log(self) -> Tensor:
        """The log of the states applied, prompt included, (Q, L, S)."""
        return self.registers.counts_LQS.transpose(0, 1)


@torch.no_grad()
def _weights(adapters: SpectralAdapters, layer: int, dtype: torch.dtype, order_R: Tensor) -> AdapterWeights:
    gate = adapters.gate
    nothing = torch.zeros(1, device=adapters.down.device)
    kind: GateKind
    controller_DK, mix_K, gap_R, centre_spread = nothing, nothing, nothing, nothing
    if isinstance(gate, OrdinalGate):
        factorised = isinstance(gate.controller, FactorisedController)
        kind = "factorised" if factorised else "unfactorised"
        token = gate.controller.token
        controller_DK = token if factorised else token[layer]
        mix_K = torch.ones_like(controller_DK[0])
        if isinstance(gate.controller, FactorisedController):
            mix_K = torch.sigmoid(gate.controller.layer[layer])
        threshold_R, gap_R = gate.threshold[layer][order_R], F.softplus(gate.gap[layer])[order_R]
        centre_spread = torch.stack((gate.centre_L[layer], gate.spread_L[layer]))
    elif isinstance(gate, LinearGate):
        kind, threshold_R = "linear", nothing.new_zeros(len(order_R))
        controller_DK = gate.weight[layer][:, order_R]
    elif isinstance(gate, StaticGate):
        kind, threshold_R = "static", gate.level[layer][order_R]
        controller_DK = nothing.new_zeros(adapters.shape[1], 0)
    else:
        raise TypeError(f"no fused kernel for {type(gate).__name__}")
    return AdapterWeights(
        gate=kind,
        down_DR=adapters.down[layer][:, order_R].to(dtype).contiguous(),
        up_RD=adapters.up[layer][order_R].to(dtype).contiguous(),
        scale_R=adapters.scale[layer][order_R].to(dtype),
        controller_DK=controller_DK.to(dtype).contiguous(),
        mix_K=mix_K.float(),
        threshold_R=threshold_R.float(),
        gap_R=gap_R.float(),
        centre_spread=centre_spread.float(),
    )
