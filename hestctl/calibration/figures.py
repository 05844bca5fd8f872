"""The pieces of work whose joules the energy table lists, as generation runs them.

Shape legend: N rows of a MatMul, D hidden size, K inputs, L layers, R directions, W rows (batch x beams).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hestctl.budget import Bill, Emax
from hestctl.data.prompts import Encoded
from hestctl.energy.model import GateKind, Phase, Terms
from hestctl.generation.engines import EngineKind
from hestctl.hardening.plan import PLAN_VERSION, Plan
from hestctl.kernels.choose import Choices
from hestctl.kernels.int8 import DEFAULT_KERNEL, Int8Linear
from hestctl.kernels.products import why_not
from hestctl.model.backbone import Backbone
from hestctl.model.controller import FactorisedController
from hestctl.model.gates import OrdinalGate
from hestctl.model.methods import build_tuner
from hestctl.model.spectral import SpectralAdapters
from hestctl.records import BlockStates
from hestctl.settings import MethodName, MethodSettings

TOKENS = 256
"""Tokens in one pass of what is measured by the prompt token."""

NEW_TOKENS = (1, 9, 33)
"""A prefill alone, and two numbers of decode steps, from which regression tells the phases apart as well."""

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Target:
    """What is calibrated: a backbone on one engine, with the adapters of ``method``."""

    backbone: Backbone
    engine: EngineKind
    method: MethodSettings


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure to be measured: ``make`` builds the work, which does ``units`` of it a call."""

    key: str
    make: Callable[[], Work]
    units: int


def direction_figures(target: Target) -> list[Figure]:
    """One layer's adapter with all directions in one state, and the controller alone."""
    backbone, method = target.backbone, target.method
    hidden, rank = backbone.hidden_size, method.rank
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(backbone.device, backbone.dtype)

    x_ND, down_DR, up_RD = random(TOKENS, hidden), random(hidden, rank), random(rank, hidden)
    controller = FactorisedController(backbone.num_layers, hidden, method.controller_width, generator)
    controller = controller.to(backbone.device, backbone.dtype)
    return [
        Figure("direction/full", lambda: lambda: (x_ND @ down_DR) @ up_RD, TOKENS * rank),
        Figure("direction/int8", lambda: _int8_adapter(x_ND, down_DR, up_RD), TOKENS * rank),
        Figure("controller", lambda: lambda: controller(x_ND[None], 0), TOKENS),
    ]


def _int8_adapter(x_ND: Tensor, down_DR: Tensor, up_RD: Tensor) -> Work:
    """The int8 products as generation would run them: real int8 MatMuls, weights quantised once.

    The oracle stands in for shapes that no kernel takes here; it is dear, so that int8 is dropped.
    """
    hidden, rank = down_DR.shape
    whys = (why_not(DEFAULT_KERNEL, x_ND.device, *shape) for shape in ((rank, hidden), (hidden, rank)))
    kernel = "reference" if any(whys) else DEFAULT_KERNEL
    down, up = Int8Linear([down_DR.T], kernel=kernel), Int8Linear([up_RD.T], kernel=kernel)
    return lambda: up(down(x_ND))


def matmul_key(phase: str, rows: int, group: int, state: str) -> str:
    return f"matmuls/{phase}/rows-{rows}/shape-{group}/{state}"


def matmul_figures(target: Target, rows: Iterable[int]) -> list[Figure]:
    """All MatMuls of all layers of one shape, one layer after the other, so that no cache keeps a weight.

    ``rows``: rows (batch x beams) of the decode steps asked for; a prefill is measured with 256. Those in
    int8 run by the target's kernels.
    """
    backbone, choices = target.backbone, target.engine.choices
    figures = []
    for group, layers in enumerate(layer_groups(backbone)):
        modules = [backbone.layers[layer] for layer in layers]
        for phase, count in passes(rows):
            for state in ("full", "int8"):
                figures.append(
                    Figure(
                        matmul_key(phase, count, group, state),
                        partial(_matmuls, modules, count, state, choices),
                        count * len(layers),
                    )
                )
    return figures


def passes(rows: Iterable[int]) -> list[tuple[Phase, int]]:
    """The phases whose MatMuls are measured, each with the rows of its MatMuls."""
    return [("prefill", TOKENS), *(("decode", count) for count in rows)]


def layer_groups(backbone: Backbone) -> list[tuple[int, ...]]:
    """Layer indices, those whose MatMuls have the same shapes together."""
    groups: dict[tuple[torch.Size, ...], list[int]] = {}
    for index, layer in enumerate(backbone.layers):
        groups.setdefault(tuple(w.shape for part in layer_weights(layer) for w in part), []).append(index)
    return [tuple(group) for group in groups.values()]


def layer_weights(layer: Any) -> list[list[Tensor]]:
    """A decoder layer's weights (M x K), those with the same input together."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        [p.weight for p in part]
        for part in (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        )
    ]


def _matmuls(layers: Sequence[nn.Module], rows: int, state: str, choices: Choices | None) -> Work:
    parts = [part for layer in layers for part in layer_weights(layer)]
    x_by_K = {part[0].shape[1]: part[0].new_full((rows, part[0].shape[1]), 0.01) for part in parts}
    if state == "int8":
        int8 = [(Int8Linear(part, kernel=_kernel(part, choices)), x_by_K[part[0].shape[1]]) for part in parts]
        return lambda: [linear(x) for linear, x in int8]
    return lambda: [F.linear(x_by_K[w.shape[1]], w) for part in parts for w in part]


def _kernel(part: Sequence[Tensor], choices: Choices | None) -> str | Mapping[int, str]:
    if choices is None:
        return DEFAULT_KERNEL
    return choices.kernels(sum(len(weight) for weight in part), part[0].shape[1])


GATES: dict[GateKind, MethodName] = {"ordinal": "hest", "linear": "tabs", "static": "bhsp"}
"""Whose adapters stand for each kind of gate."""


def adapter_key(gate: GateKind, batch_size: int, num_beams: int, phase: Phase) -> str:
    return f"adapters/{gate}/batch-{batch_size}/beams-{num_beams}/{phase}"


def adapter_figures(
    target: Target, states: tuple[int, ...], batch_sizes: Sequence[int], num_beams: int
) -> list[Figure]:
    """All layers' adapters of each kind of gate, ledger included, over a prompt and over one step."""
    phases: tuple[tuple[Phase, int], ...] = (("prefill", TOKENS), ("decode", 1))
    figures = []
    for gate, name in GATES.items():
        method = target.method.model_copy(update={"name": name})
        for batch in batch_sizes:
            for phase, tokens in phases:
                figures.append(
                    Figure(
                        adapter_key(gate, batch, num_beams, phase),
                        partial(_adapters, target, method, states, batch, num_beams, tokens),
                        tokens,
                    )
                )
    return figures


def _adapters(
    target: Target,
    method: MethodSettings,
    states: tuple[int, ...],
    batch_size: int,
    num_beams: int,
    tokens: int,
) -> Work:
    """The adapters as the target's engine runs them, on hidden states of ones."""
    backbone = target.backbone
    tuner = build_tuner(
        method,
        backbone.model,
        layers=backbone.num_layers,
        hidden=backbone.hidden_size,
        states=states,
        seed=0,
    )
    spectral = tuner.spectral
    assert spectral is not None
    spectral.to(backbone.device)
    plan = _open_plan(spectral) if isinstance(spectral.gate, OrdinalGate) else None
    engine = target.engine.make(backbone, spectral, plan)
    return engine.adapter_work(batch_size, num_beams, tokens)


def _open_plan(spectral: SpectralAdapters) -> Plan:
    """A plan whose budget allows everything: what a ledger costs does not hang on what it allows."""
    layers, _, rank = spectral.shape
    emax_j = 1e8
    return Plan(
        version=PLAN_VERSION,
        run_id="calibration",
        method="hest",
        scope="adapter",
        envelope="absolute",
        backbone="",
        fingerprint="",
        device_name="",
        calibration_id="",
        table_key="",
        energy_kind="none",
        costs_j=(0.0, 0.5, 1.0),
        uses_int8=spectral.uses_int8,
        emax_j=emax_j,
        emax_origin=None,
        margin=0.0,
        batch_size=1,
        num_beams=1,
        max_new_tokens=1,
        bills=(Bill(1, 1, Terms.zero(), Emax(Terms.zero(), Terms(call_j=emax_j))),),
        blocks=BlockStates.uniform(layers),
        pace=(1 / layers,) * layers,
        order=(tuple(range(rank)),) * layers,
        shift=0.0,
        energies=None,
    )


def generation_key(batch_size: int, num_beams: int, prompt_tokens: int, new_tokens: int) -> str:
    return f"generation/batch-{batch_size}/beams-{num_beams}/prompt-{prompt_tokens}/new-{new_tokens}"


def generation_figures(
    target: Target, batch_sizes: Sequence[int], num_beams: int, lengths: Sequence[int]
) -> list[Figure]:
    """Whole generations of the bare backbone, forced to their length; the longest come first."""
    return [
        Figure(
            generation_key(batch, num_beams, prompt, new),
            partial(_generation, target, batch, num_beams, prompt, new),
            1,
        )
        for batch in batch_sizes
        for prompt in sorted(lengths, reverse=True)
        for new in sorted(NEW_TOKENS, reverse=True)
    ]


def _generation(target: Target, batch: int, num_beams: int, prompt: int, new: int) -> Work:
    """Prompts of random tokens: what they say is of no matter to the joules."""
    generator = torch.Generator().manual_seed(prompt)
    ids = torch.randint(10, target.backbone.model.config.vocab_size, (batch, prompt), generator=generator)
    rows = [
        Encoded(
            sample_id=f"random-{i}",
            prompt_ids=tuple(row),
            answer_ids=(),
            truncated_tokens=0,
            reference="",
            label=None,
        )
        for i, row in enumerate(ids.tolist())
    ]
    engine = target.engine.make(target.backbone, None, None)
    return lambda: engine.generate(rows, new_tokens=new, num_beams=num_beams, forced_length=True)
