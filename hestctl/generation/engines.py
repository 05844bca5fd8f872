"""Which engine generates: hestctl's own where it knows the model, transformers' as the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from hestctl.data.prompts import Encoded
from hestctl.errors import Exit, HestError
from hestctl.generation.engine import Generated, Generator, Notes
from hestctl.generation.native import NativeGenerator, unsupported
from hestctl.hardening.artefact import Codes
from hestctl.hardening.plan import Plan
from hestctl.kernels.choose import Choices
from hestctl.model.backbone import Backbone
from hestctl.model.spectral import SpectralAdapters
from hestctl.records import BlockStates
from hestctl.settings import EngineName


class Engine(Protocol):
    """What generates: ``Generator`` and ``NativeGenerator`` are such; shapes and errors stand there."""

    engine: str
    backbone: Backbone
    adapters: SpectralAdapters | None
    plan: Plan | None
    notes: Notes

    @property
    def blocks(self) -> BlockStates:
        """The states that the layers' blocks run in."""
        ...

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

    ``reason`` says why it is not hestctl's own where it is not. ``blocks`` are the states that the layers'
    blocks run in, None for all in full. ``choices`` are the int8 kernels that ``calibrate`` found for this
    backbone on this device; None takes the default one. ``codes`` are the backbone's int8 codes where they
    are on disk (never those of one that LoRA is merged into); None makes them anew.
    """

    name: str
    reason: str | None
    blocks: BlockStates | None = None
    choices: Choices | None = None
    codes: Codes | None = None

    def make(self, backbone: Backbone, adapters: SpectralAdapters | None, plan: Plan | None) -> Engine:
        """Raises HestError (usage) for a backbone that has changed so that the engine cannot run it."""
        if self.name == Generator.engine:
            return Generator(backbone, adapters, plan, self.blocks)
        return NativeGenerator(
            backbone, adapters, plan, blocks=self.blocks, choices=self.choices, codes=self.codes
        )

    def running(self, blocks: BlockStates | None) -> EngineKind:
        """This engine with its blocks in these states, whose int8 codes are made anew.

        Raises HestError (usage) for transformers' unless all are in full: it would save nothing by them.
        """
        if self.name == Generator.engine and blocks is not None and not blocks.all_full:
            raise HestError(
                f"only hestctl's engine saves joules by blocks in int8 or off: {self.reason}",
                "take --engine hestctl, or leave out --backbone-precision int8, backbone.skip_last and "
                "scope network",
                Exit.USAGE,
            )
        return replace(self, blocks=blocks, codes=None)

    def told(self, engine: Engine) -> dict[str, Any]:
        """What was chosen, and why, for the record of a run that ``engine`` generates for."""
        return {"name": self.name, "reason": self.reason, **engine.notes}


def engine_for(backbone: Backbone, wanted: EngineName, blocks: BlockStates | None) -> EngineKind:
    """Which engine runs this backbone with its blocks in these states, None for all in full.

    Its kernels are the default ones. ``auto`` takes hestctl's own where it knows the model. Raises HestError
    (usage) where the engine that was asked for cannot run it, or would save nothing by such blocks.
    """
    reason = unsupported(backbone)
    if wanted == "hestctl" and reason is not None:
        raise HestError(
            f"hestctl's engine cannot run {backbone.name}: {reason}", "--engine transformers can", Exit.USAGE
        )
    kind = EngineKind(NativeGenerator.engine, None)
    if wanted == "transformers" or reason is not None:
        kind = EngineKind(Generator.engine, reason or "--engine transformers was asked for")
    return kind.running(blocks)
