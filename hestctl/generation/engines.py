"""Which engine generates: hestctl's own where it knows the model, transformers' as the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from hestctl.data.prompts import Encoded
from hestctl.errors import Exit, HestError
from hestctl.generation.engine import Generated, Generator, Notes
from hestctl.generation.native import NativeGenerator, unsupported
from hestctl.hardening.plan import Plan
from hestctl.kernels.choose import Choices
from hestctl.model.backbone import Backbone
from hestctl.model.spectral import SpectralAdapters
from hestctl.records import BlockStates
from hestctl.settings import BackbonePrecision, EngineName


class Engine(Protocol):
    """What generates: ``Generator`` and ``NativeGenerator`` are such; shapes and errors stand there."""

    engine: str
    backbone: Backbone
    adapters: SpectralAdapters | None
    plan: Plan | None
    notes: Notes

    def warm_up(
        self,
        rows: Sequence[Encoded],
        *,
        batch_size: int,
        new_tokens: int,
        num_beams: int,
        forced_length: bool = False,
    ) -> int: ...

    def warm_up_labels(self, rows: Sequence[Encoded], *, batch_size: int) -> int: ...

    def generate(
        self, rows: Sequence[Encoded], *, new_tokens: int, num_beams: int, forced_length: bool = False
    ) -> Generated: ...

    def label_scores(self, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor | None]: ...

    def answer_nll(self, rows: Sequence[Encoded]) -> list[float]: ...

    def text(self, ids: Sequence[int]) -> str: ...

    def adapter_work(self, batch_size: int, num_beams: int, tokens: int) -> Callable[[], object]:
        """All layers' adapters alone, over prompts of ``tokens`` or, where that is 1, over one step."""
        ...


@dataclass(frozen=True, slots=True)
class EngineKind:
    """Which engine runs a backbone: ``make`` makes one.

    ``reason`` says why it is not hestctl's own where it is not. ``choices`` are the int8 kernels that
    ``calibrate`` found for this backbone on this device; None takes the default one.
    """

    name: str
    reason: str | None
    precision: BackbonePrecision = "full"
    choices: Choices | None = None
    blocks: BlockStates | None = None

    def make(self, backbone: Backbone, adapters: SpectralAdapters | None, plan: Plan | None) -> Engine:
        """Raises HestError (usage) for a backbone that has changed so that the engine cannot run it."""
        if self.name == Generator.engine:
            return Generator(backbone, adapters, plan)
        int8 = self.precision == "int8" or (self.blocks is not None and self.blocks.uses_int8)
        precision: BackbonePrecision = "int8" if int8 else "full"
        return NativeGenerator(backbone, adapters, plan, precision=precision, choices=self.choices)

    def told(self, engine: Engine) -> dict[str, Any]:
        """What was chosen, and why, for the record of a run that ``engine`` generates for."""
        return {"name": self.name, "reason": self.reason, **engine.notes}


def engine_for(backbone: Backbone, wanted: EngineName, precision: BackbonePrecision) -> EngineKind:
    """Which engine runs this backbone, with the default kernels.

    ``auto`` takes hestctl's own where it knows the model. Raises HestError (usage) where the engine that
    was asked for cannot run it, or cannot run it in int8.
    """
    reason = unsupported(backbone)
    if wanted == "hestctl" and reason is not None:
        raise HestError(
            f"hestctl's engine cannot run {backbone.name}: {reason}", "--engine transformers can", Exit.USAGE
        )
    if wanted != "transformers" and reason is None:
        return EngineKind(NativeGenerator.engine, None, precision)
    reason = reason or "--engine transformers was asked for"
    if precision == "int8":
        raise HestError(
            f"only hestctl's engine runs a backbone in int8: {reason}",
            "leave out --backbone-precision int8, or take --engine hestctl",
            Exit.USAGE,
        )
    return EngineKind(Generator.engine, reason)
