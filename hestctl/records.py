"""The records every room of the program speaks: plain frozen data, units in the names.

``None`` in a measured field means "not measured"; the reason stands in the field beside it.
Zero is never used for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

EnergyKind = Literal["measured", "estimated", "none"]
"""``measured``: an energy counter of the device. ``estimated``: a model of the device (CPU time
times nominal watts), or a counter trace that was replayed. ``none``: there is no number."""

RunStatus = Literal["started", "finished", "failed", "interrupted"]

STATES = ("off", "int8", "full")
"""What one adapter direction may do for one token, and what a layer's block may do for all of them.
``full`` is the backbone's own floating type (fp16 or bf16 on a GPU, fp32 on a CPU)."""

OFF, INT8, FULL = range(3)
"""Indices into ``STATES``; energies and numbers are never less in a later one."""

PROMPT_PARTS = 10
"""Parts of a prompt, of any length, by which the use of directions is recorded."""

NEW_PART = 8
"""New tokens that are recorded together."""

BLOCKS = ("attention", "mlp")
"""The two residual blocks of a decoder layer."""


@dataclass(frozen=True, slots=True)
class BlockStates:
    """The state of every layer's attention and MLP block, layer by layer: OFF, INT8 or FULL.

    A block that is off adds nothing to the residual stream, and an attention that is off keeps no keys and
    values. One state holds for every token and both phases.
    """

    attention: tuple[int, ...]
    mlp: tuple[int, ...]

    @classmethod
    def uniform(cls, layers: int, state: int = FULL) -> BlockStates:
        return cls((state,) * layers, (state,) * layers)

    @property
    def layers(self) -> int:
        return len(self.attention)

    @property
    def all_full(self) -> bool:
        return set(self.attention) | set(self.mlp) == {FULL}

    @property
    def uses_int8(self) -> bool:
        return INT8 in self.attention or INT8 in self.mlp

    def state(self, layer: int, block: int) -> int:
        """Of one block; ``block`` is an index into ``BLOCKS``."""
        return (self.attention, self.mlp)[block][layer]

    def counts(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """How many blocks are (off, int8, full), of attention and of the MLP."""

        def count(states: tuple[int, ...]) -> tuple[int, int, int]:
            return states.count(OFF), states.count(INT8), states.count(FULL)

        return count(self.attention), count(self.mlp)


@dataclass(frozen=True, slots=True)
class Window:
    """One stretch of time under the meter.

    Times are seconds on the monotonic clock; energies are joules. ``energy_j`` is gross,
    ``net_energy_j`` has the idle draw taken off. An invalid window keeps its number for inspection
    but stays out of every mean; ``reason`` says why.
    """

    name: str
    phase: str
    start_s: float
    end_s: float
    kind: EnergyKind
    method: str
    energy_j: float | None = None
    net_energy_j: float | None = None
    error_j: float | None = None
    device_uuid: str | None = None
    device_name: str | None = None
    valid: bool = True
    reason: str | None = None
    temperature_c: float | None = None
    sm_clock_mhz: float | None = None

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(slots=True)
class Run:
    """One invocation of a command: a row of ``runs`` and the manifest of its folder."""

    run_id: str
    command: str
    status: RunStatus
    created_at: str
    parent_run_id: str | None = None
    finished_at: str | None = None
    error: str | None = None
    method: str | None = None
    scope: str | None = None
    precision: str | None = None
    dual: str | None = None
    controller: str | None = None
    backbone: str | None = None
    weights: str | None = None
    dataset: str | None = None
    data_hash: str | None = None
    dtype: str | None = None
    engine: str | None = None
    num_beams: int | None = None
    batch_size: int | None = None
    max_new_tokens: int | None = None
    seed: int | None = None
    device_name: str | None = None
    device_uuid: str | None = None
    meter: str | None = None
    energy_kind: EnergyKind | None = None
    calibration_id: str | None = None
    emax_j: float | None = None
    emax_ratio: float | None = None
    emax_origin: str | None = None
    steps: int | None = None
    controller_parameters: int | None = None
    adapter_parameters: int | None = None
    train_energy_j: float | None = None
    train_time_s: float | None = None
    hardened_ratio: float | None = None
    over_budget_share: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepMetric:
    """One optimiser step, or one evaluation between steps (``split`` = validation).

    ``step`` counts the optimiser steps done: 1 is the first, an evaluation at 0 comes before it.

    ``energy_j`` is the joules per sample within the budget's scope that the gates decide for without
    noise, predicted from the energy table; ``energy_ratio`` is that over E_max. ``train_energy_j`` is
    what training itself has spent so far, by the meter.
    """

    step: int
    split: Literal["train", "validation"]
    epoch: float
    loss: float
    task_loss: float
    learning_rate: float | None = None
    grad_norm: float | None = None
    energy_j: float | None = None
    energy_ratio: float | None = None
    multiplier: float | None = None
    share_off: float | None = None
    share_int8: float | None = None
    share_full: float | None = None
    rouge_lsum: float | None = None
    tokens_per_s: float | None = None
    train_energy_j: float | None = None
    elapsed_s: float | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One generated sample.

    ``energy_j`` is what the meter says of the whole generation (gross, J); ``scope_energy_j`` is
    what the budget counts: the joules of the directions that were applied, predicted from the
    energy table and the log of states. ``prefill_j`` and ``decode_j`` divide ``energy_j`` in the
    proportion of the energy model, which ``phase_method`` says; ``predicted_j`` is that model's own
    figure for the sample. Joules and ``latency_s``, the wall time of the sample's batch, are means where
    the batch was generated ``replicates`` times.
    """

    sample_id: str
    position: int
    split: str
    prompt_tokens: int
    new_tokens: int
    truncated_tokens: int
    batch_index: int
    batch_size: int
    num_beams: int
    engine: str
    latency_s: float
    energy_kind: EnergyKind
    energy_method: str
    energy_j: float | None = None
    energy_net_j: float | None = None
    energy_error_j: float | None = None
    energy_valid: bool = True
    energy_reason: str | None = None
    prefill_j: float | None = None
    decode_j: float | None = None
    phase_method: str | None = None
    predicted_j: float | None = None
    replicates: int = 1
    scope_energy_j: float | None = None
    emax_j: float | None = None
    directions_off: int | None = None
    directions_int8: int | None = None
    directions_full: int | None = None
    finish: Literal["stop", "length", "label"] = "length"
    rouge1: float | None = None
    rouge2: float | None = None
    rouge_l: float | None = None
    rouge_lsum: float | None = None
    nll: float | None = None
    answer_tokens: int | None = None
    label: str | None = None
    predicted_label: str | None = None


@dataclass(frozen=True, slots=True)
class LayerUse:
    """How often the directions of one layer were in one state over a part of a run's test generation.

    ``position`` is which of ``PROMPT_PARTS`` equal parts of its prompt a token is in, or of new tokens the
    first of the ``NEW_PART`` that are counted together, both from 0. ``share`` is the state's among the
    layer's directions there. Stores of before schema 5 have no phase or position: counts of all tokens.
    """

    layer: int
    state: str
    count: int
    share: float
    phase: Literal["prompt", "new"] | None = None
    position: int | None = None
