"""Measures the energy table on the device at hand, figure by figure, so that a stop loses one at most."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import torch
import transformers

from hestctl import __version__
from hestctl.calibration.figures import (
    GATES,
    NEW_TOKENS,
    TOKENS,
    Figure,
    Target,
    Whole,
    Work,
    adapter_figures,
    adapter_key,
    direction_figures,
    generation_figures,
    runs_blocks,
    whole_generations,
)
from hestctl.calibration.kernels import choose_kernels, metered
from hestctl.energy.meter import Meter
from hestctl.energy.model import MODEL, AdapterPass, Cost, EnergyModel, GenerationPoint
from hestctl.energy.replicate import replicate
from hestctl.energy.table import EnergyTable, TableKey
from hestctl.errors import Exit, HestError
from hestctl.kernels.choose import Choices, on_offer
from hestctl.progress import Progress
from hestctl.settings import EnergySettings

_PARTS = 5
_CALL_S = 0.005
"""Work shorter than this is repeated within a call, so that calling costs nothing beside it."""


def table_key(target: Target, meter: Meter) -> TableKey:
    """What a table of this target on this device is of, and what else its figures depend on.

    One table serves the backbone in every state of its blocks.
    """
    backbone, method = target.backbone, target.method
    config = backbone.model.config
    return TableKey(
        subject={
            "device": meter.device_uuid,
            "shape": f"{backbone.num_layers}x{backbone.hidden_size}x{config.intermediate_size}"
            f"/{config.num_attention_heads}:{config.num_key_value_heads}/{config.vocab_size}",
            "dtype": str(backbone.dtype).removeprefix("torch."),
            "engine": target.engine.name,
            "rank": str(method.rank),
            "width": str(method.controller_width),
            "controller": method.controller,
            "directions": method.precision,
        },
        conditions={
            "hestctl": __version__,
            "model": MODEL,
            "meter": meter.counter_name,
            "driver": meter.driver,
            "kernels": on_offer(backbone.device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


@dataclass(slots=True)
class Calibration:
    """Measures figures under a running meter, and keeps them.

    ``found`` and ``choices`` hold what an interrupted calibration measured before; ``keep`` and
    ``keep_choices`` are called with all of it after each figure or choice of kernel. ``check`` is polled and
    may raise Interrupted.
    """

    target: Target
    energy: EnergySettings
    meter: Meter
    progress: Progress
    check: Callable[[], None]
    found: dict[str, Cost] = field(default_factory=dict)
    keep: Callable[[dict[str, Cost]], None] = lambda found: None
    choices: Choices | None = None
    keep_choices: Callable[[Choices], None] = lambda choices: None

    def directions(self) -> EnergyTable:
        """The prices of directions and controller alone: what training and hardening need.

        Raises HestError (no device) when the meter gives no joules.
        """
        self._measure(direction_figures(self.target))
        return self._table(None)

    def full(self, num_beams: int) -> EnergyTable:
        """The whole table with the energy model, for the batch sizes and lengths in ``energy``.

        Where the engine runs blocks in int8 their kernels are chosen first, and everything is measured with
        them.
        Each figure is metered for at least five times ``energy.calibration_s``, and on until the meter's
        bound is within ``energy.calibration_precision``; its error is the bound and the standard error over
        five parts together. Raises HestError (no device) when the meter gives no joules.
        """
        batches, lengths = self.energy.batch_sizes, self._lengths()
        if runs_blocks(self.target):
            self._choose([batch * num_beams for batch in batches])
        wholes = whole_generations(self.target, batches, num_beams, lengths)
        directions = direction_figures(self.target)
        adapters = len(GATES) * len(batches) * 2
        total = len(directions) + len(wholes) + adapters
        self.progress.note(
            f"calibrating: {total} figures, at least {total * _PARTS * self.energy.calibration_s:.0f} s"
        )
        self._measure(directions, total)
        states = self._table(None).states
        self._measure(generation_figures(self.target, wholes), total)
        self._measure(adapter_figures(self.target, states, batches, num_beams), total)
        return self._table(self._model(num_beams, wholes))

    def _choose(self, rows: Sequence[int]) -> None:
        measure = metered(self.meter, self.energy.calibration_s, self.check)
        with torch.inference_mode():
            self.choices = choose_kernels(
                self.target, rows, measure, self.choices, self.keep_choices, self.progress
            )
        engine = replace(self.target.engine, choices=self.choices)
        self.target = replace(self.target, engine=engine)

    def _lengths(self) -> list[int]:
        context = self.target.backbone.model.config.max_position_embeddings
        lengths = [length for length in self.energy.lengths if length + max(NEW_TOKENS) <= context]
        if not lengths:
            raise HestError(
                f"no length of {self.energy.lengths} fits the context of {context} tokens",
                "--set energy.lengths=16,32",
                Exit.USAGE,
            )
        return lengths

    def _measure(self, figures: Sequence[Figure], total: int | None = None) -> None:
        started, measured = time.monotonic(), 0
        with torch.inference_mode():
            for figure in figures:
                if figure.key not in self.found:
                    self.found[figure.key] = self._figure(figure)
                    self.keep(self.found)
                    measured += 1
                all_of_them = len(figures) if total is None else total
                once_s = (time.monotonic() - started) / max(1, measured)
                left_s = once_s * (all_of_them - len(self.found))
                self.progress.advance("calibrating", len(self.found), all_of_them, {"s_left": left_s})

    def _figure(self, figure: Figure) -> Cost:
        call, repeats = _lengthened(figure.make())
        measured = replicate(
            call,
            self.meter,
            name=figure.key,
            phase="calibration",
            precision=self.energy.calibration_precision,
            least_s=_PARTS * self.energy.calibration_s,
            parts=_PARTS,
            least_count=2,
            check=self.check,
        )
        if measured.energy_j is None or not measured.window.valid:
            raise HestError(
                f"calibration gave no joules for {figure.key}: {measured.window.reason}",
                "`hestctl env` shows the meter; `hestctl calibrate --resume` goes on; "
                "--meter estimate takes CPU time instead",
                Exit.NO_DEVICE,
            )
        if measured.precision is not None and measured.precision > self.energy.calibration_precision:
            self.progress.note(f"{figure.key}: known to {100 * measured.precision:.1f} % only")
        units = figure.units * repeats
        error_j = math.hypot(measured.error_j or 0.0, measured.spread_j or 0.0)
        return Cost(measured.energy_j / units, error_j / units)

    def _model(self, num_beams: int, wholes: Sequence[Whole]) -> EnergyModel:
        found, batches = self.found, self.energy.batch_sizes
        return EnergyModel(
            engine=self.target.engine.name,
            layers=self.target.backbone.num_layers,
            points=tuple(
                GenerationPoint(
                    w.batch_size,
                    w.num_beams,
                    w.prompt_tokens,
                    w.new_tokens,
                    found[w.key],
                    w.attention,
                    w.mlp,
                )
                for w in wholes
            ),
            adapters=tuple(
                AdapterPass(
                    gate,
                    b,
                    num_beams,
                    prefill=found[adapter_key(gate, b, num_beams, "prefill")],
                    decode=found[adapter_key(gate, b, num_beams, "decode")],
                )
                for gate in GATES
                for b in batches
            ),
        )

    def _table(self, model: EnergyModel | None) -> EnergyTable:
        now, meter = datetime.now(UTC), self.meter
        return EnergyTable(
            calibration_id=f"table-{now:%Y%m%d-%H%M%S-%f}",
            key=table_key(self.target, meter).text,
            created_at=now.isoformat(),
            kind=meter.kind,
            meter=meter.counter_name,
            device_name=meter.device_name,
            device_uuid=meter.device_uuid,
            dtype=str(self.target.backbone.dtype).removeprefix("torch."),
            hidden=self.target.backbone.hidden_size,
            rank=self.target.method.rank,
            tokens=TOKENS,
            full=self.found["direction/full"],
            int8=self.found["direction/int8"],
            controller=self.found["controller"],
            model=model,
            kernels=None if self.choices is None else self.choices.as_dict(),
        )


def _lengthened(work: Work) -> tuple[Work, int]:
    """``work`` repeated to a few milliseconds a call, and how often; runs it a few times to warm up."""
    for _ in range(2):
        started = time.perf_counter()
        work()
        once_s = time.perf_counter() - started
    repeats = max(1, math.ceil(_CALL_S / max(once_s, 1e-7)))
    if repeats == 1:
        return work, 1

    def call() -> None:
        for _ in range(repeats):
            work()

    return call, repeats


def as_document(found: dict[str, Cost]) -> dict[str, Any]:
    """Figures by key as JSON-able data; ``from_document`` reads them back."""
    return {key: [cost.joules, cost.error_j] for key, cost in found.items()}


def from_document(document: dict[str, Any]) -> dict[str, Cost]:
    return {key: Cost(*pair) for key, pair in document.items()}
