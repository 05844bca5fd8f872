"""The pieces of work whose joules the energy table lists, as generation runs them.

Shape legend: N rows of a MatMul, D hidden size, R directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hestctl.budget import Bill, Emax
from hestctl.data.prompts import Encoded
from hestctl.energy.model import VARIANTS, GateKind, Phase, State, Terms, uniform
from hestctl.generation.engines import EngineKind
from hestctl.generation.native import NativeGenerator
from hestctl.hardening.plan import PLAN_VERSION, Plan
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
        bound=(1, 1),
        bills=(Bill(1, 1, Terms.zero(), Emax(Terms.zero(), Terms(call_j=emax_j))),),
        blocks=BlockStates.uniform(layers),
        pace=(1 / layers,) * layers,
        order=(tuple(range(rank)),) * layers,
        shift=0.0,
        energies=None,
    )


class Whole(NamedTuple):
    """One forced generation to be metered: its lengths, and the states of all layers' blocks."""

    batch_size: int
    num_beams: int
    prompt_tokens: int
    new_tokens: int
    attention: State
    mlp: State

    @property
    def key(self) -> str:
        lengths = f"prompt-{self.prompt_tokens}/new-{self.new_tokens}"
        states = f"attention-{self.attention}/mlp-{self.mlp}"
        return f"generation/batch-{self.batch_size}/beams-{self.num_beams}/{lengths}/{states}"


def whole_generations(
    target: Target, batch_sizes: Sequence[int], num_beams: int, lengths: Sequence[int]
) -> list[Whole]:
    """What the energy model is fitted to; the longest come first.

    Full blocks at all lengths; other states, where the engine runs them, at the shortest and the longest.
    """
    found = []
    for attention, mlp in VARIANTS if runs_blocks(target) else VARIANTS[:1]:
        whole = (attention, mlp) == VARIANTS[0]
        prompts = lengths if whole else {min(lengths), max(lengths)}
        news = NEW_TOKENS if whole else {min(NEW_TOKENS), max(NEW_TOKENS)}
        found += [
            Whole(batch, num_beams, prompt, new, attention, mlp)
            for batch in batch_sizes
            for prompt in sorted(prompts, reverse=True)
            for new in sorted(news, reverse=True)
        ]
    return found


def runs_blocks(target: Target) -> bool:
    """Whether the engine runs blocks in int8 or not at all, and saves by it: hestctl's own does."""
    return target.engine.name == NativeGenerator.engine


def generation_figures(target: Target, generations: Sequence[Whole]) -> list[Figure]:
    """Whole generations of the bare backbone, forced to their length."""
    return [Figure(whole.key, partial(_generation, target, whole), 1) for whole in generations]


def _generation(target: Target, whole: Whole) -> Work:
    """Prompts of random tokens: what they say is of no matter to the joules."""
    backbone, size = target.backbone, (whole.batch_size, whole.prompt_tokens)
    generator = torch.Generator().manual_seed(whole.prompt_tokens)
    ids = torch.randint(10, backbone.model.config.vocab_size, size, generator=generator)
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
    kind = target.engine
    if (whole.attention, whole.mlp) != VARIANTS[0]:
        kind = replace(kind, blocks=uniform(backbone.num_layers, whole.attention, whole.mlp))
    engine = kind.make(backbone, None, None)
    return lambda: engine.generate(
        rows, new_tokens=whole.new_tokens, num_beams=whole.num_beams, forced_length=True
    )
