"""Which engine generates: hestctl's own where it knows the model, transformers' as the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from hestctl.data.prompts import Encoded
from hestctl.errors import Exit, HestError
from hestctl.generation.engine import Generated, Generator
from hestctl.generation.native import NativeGenerator, unsupported
from hestctl.hardening.plan import Plan
from hestctl.model.backbone import Backbone
from hestctl.model.spectral import SpectralAdapters
from hestctl.settings import BackbonePrecision, EngineName


class Engine(Protocol):
    """What generates: ``Generator`` and ``NativeGenerator`` are such; shapes and errors stand there."""

    engine: str
    backbone: Backbone
    adapters: SpectralAdapters | None
    plan: Plan | None

    def generate(
        self, rows: Sequence[Encoded], *, new_tokens: int, num_beams: int, forced_length: bool = False
    ) -> Generated: ...

    def label_scores(self, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor | None]: ...

    def answer_nll(self, rows: Sequence[Encoded]) -> list[float]: ...

    def text(self, ids: Sequence[int]) -> str: ...

    def adapter_work(self, batch_size: int, num_beams: int, tokens: int) -> Callable[[], object]:
        """All layers' adapters alone, over prompts of ``tokens`` or, where that is 1, over one step."""
        ...


MakeEngine = Callable[[Backbone, SpectralAdapters | None, Plan | None], Engine]


def engine_for(
    backbone: Backbone, wanted: EngineName, precision: BackbonePrecision
) -> tuple[MakeEngine, str, str | None]:
    """How engines are made for this backbone, their name, and why it is not hestctl's own where it is not.

    ``auto`` takes hestctl's own where it knows the model. Raises HestError (usage) where the engine that
    was asked for cannot run it, or cannot run it in int8.
    """
    reason = unsupported(backbone)
    if wanted == "hestctl" and reason is not None:
        raise HestError(
            f"hestctl's engine cannot run {backbone.name}: {reason}", "--engine transformers can", Exit.USAGE
        )
    if wanted == "transformers" or reason is not None:
        if precision == "int8":
            why = reason or "--engine transformers was asked for"
            raise HestError(
                f"only hestctl's engine runs a backbone in int8: {why}",
                "leave out --backbone-precision int8, or take --engine hestctl",
                Exit.USAGE,
            )
        return Generator, Generator.engine, reason

    def native(backbone: Backbone, adapters: SpectralAdapters | None, plan: Plan | None) -> Engine:
        return NativeGenerator(backbone, adapters, plan, precision=precision)

    return native, NativeGenerator.engine, None
