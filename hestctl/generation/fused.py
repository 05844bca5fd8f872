"""From trained adapters and a ledger to the fused adapter steps of decode.

The prompt runs unfused; the kernels go on with its purses and its log, in the memory it wrote them to.

Shape legend: W rows (Q requests x beams), T tokens, D hidden size, L layers, R directions, S = 3 states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hestctl.hardening.ledger import Ledger
from hestctl.kernels.adapter import (
    MOST_RANK,
    MOST_WIDTH,
    AdapterStep,
    AdapterWeights,
    GateKind,
    Registers,
)
from hestctl.kernels.devices import why_no_triton
from hestctl.model.controller import FactorisedController
from hestctl.model.gates import LinearGate, OrdinalGate, StaticGate
from hestctl.model.spectral import SpectralAdapters


def why_not_fused(adapters: SpectralAdapters, device: torch.device) -> str | None:
    """Why these adapters run unfused in decode; None where the fused kernel takes them."""
    gate, rank = adapters.gate, adapters.shape[2]
    if adapters.uses_int8:
        return "int8 directions need the whole row's maximum before their product"
    if not isinstance(gate, OrdinalGate | LinearGate | StaticGate):
        return f"no fused kernel for {type(gate).__name__}"
    width = gate.controller.token.shape[-1] if isinstance(gate, OrdinalGate) else 0
    for what, value, most in (
        ("directions", rank, MOST_RANK),
        ("columns of the controller", width, MOST_WIDTH),
    ):
        if value > most:
            return f"{value} {what}: the fused adapter takes at most {most}"
    return why_no_triton(device)


class FusedDecode:
    """The fused adapter steps of all layers: ``steps[layer](h_W1D, real_W)``.

    They go on wherever the prompt's pass ended, for they share its memory: the purses, incomes and tokens
    served of ``ledger`` (None where none binds) and the log of states ``counts_LQS`` (int64, contiguous). So
    log and ledger are right at all times, and a captured graph holds their addresses. ``weights`` are those
    of ``fused_weights``.
    """

    def __init__(
        self,
        weights: Sequence[AdapterWeights],
        ledger: Ledger | None,
        counts_LQS: Tensor,
        *,
        beams: int,
        joined: bool | None = None,
    ) -> None:
        nothing_LQ = torch.zeros_like(counts_LQS[..., 0])
        registers = Registers(
            income_LQ=nothing_LQ if ledger is None else ledger.income_LQ,
            purse_LQ=nothing_LQ if ledger is None else ledger.purse_LQ,
            seen_LQ=nothing_LQ if ledger is None else ledger.seen_LQ,
            counts_LQS=counts_LQS,
        )
        self.steps = [
            AdapterStep(
                layer_weights, registers, layer, beams=beams, ledger=ledger is not None, joined=joined
            )
            for layer, layer_weights in enumerate(weights)
        ]


@torch.no_grad()
def fused_weights(
    adapters: SpectralAdapters, dtype: torch.dtype, order_LR: Tensor | None
) -> list[AdapterWeights]:
    """Every layer's adapter as the kernel takes it, in the model's type ``dtype``.

    ``order_LR`` is the ledger's order of directions, None where no ledger binds. Raises TypeError for a gate
    that ``why_not_fused`` has a reason against.
    """
    layers, _, rank = adapters.shape
    same_R = torch.arange(rank, device=adapters.down.device)
    shared = None
    if isinstance(adapters.gate, OrdinalGate) and isinstance(adapters.gate.controller, FactorisedController):
        shared = adapters.gate.controller.token.to(dtype).contiguous()  # once for all layers: caches keep it
    return [
        _weights(adapters, layer, dtype, same_R if order_LR is None else order_LR[layer], shared)
        for layer in range(layers)
    ]


def _weights(
    adapters: SpectralAdapters, layer: int, dtype: torch.dtype, order_R: Tensor, shared_DK: Tensor | None
) -> AdapterWeights:
    gate = adapters.gate
    nothing = torch.zeros(1, device=adapters.down.device)
    kind: GateKind
    controller_DK, mix_K, gap_R, centre_spread = nothing, nothing, nothing, nothing
    if isinstance(gate, OrdinalGate):
        kind = "unfactorised" if shared_DK is None else "factorised"
        controller_DK = gate.controller.token[layer] if shared_DK is None else shared_DK
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
