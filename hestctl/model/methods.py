"""The one table that says what each method is made of, and the object that holds what it trains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hestctl.model.blockgate import BlockGate
from hestctl.model.controller import FactorisedController, UnfactorisedController
from hestctl.model.gates import Gate, LinearGate, OrdinalGate, StaticGate
from hestctl.model.spectral import SpectralAdapters
from hestctl.records import FULL, INT8, OFF
from hestctl.settings import MethodSettings


@dataclass(frozen=True, slots=True)
class Method:
    """What a method is: its gate (if any), whether it is LoRA, whether a budget binds it."""

    gate: Literal["ordinal", "linear", "static"] | None = None
    lora: bool = False
    budgeted: bool = False

    @property
    def trained(self) -> bool:
        return self.lora or self.gate is not None


METHODS = {
    "hest": Method(gate="ordinal", budgeted=True),
    "tabs": Method(gate="linear"),
    "bhsp": Method(gate="static"),
    "lora": Method(lora=True),
    "base": Method(),
}
"""TABS and BHSP were found in no publication: these are our implementations."""


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Trainable parameters. ``controller`` is projections and layer weights, ``thresholds`` what turns
    scores into states (with beta), ``adapter`` the directions or LoRA matrices themselves."""

    controller: int
    thresholds: int
    adapter: int


@dataclass(slots=True)
class Tuner:
    """What one run trains on one backbone: spectral adapters, LoRA matrices, or nothing."""

    method: Method
    spectral: SpectralAdapters | None = None
    lora: Any = None
    """A ``peft.PeftModel`` around the very backbone (peft changes it in place)."""
    _unmerged: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    """The backbone's weights that LoRA was merged into, each with a copy on the CPU from before."""

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name."""
        module = self.spectral if self.spectral is not None else self.lora
        if module is None:
            return {}
        return {name: p for name, p in module.named_parameters() if p.requires_grad}

    def state(self) -> dict[str, Tensor]:
        """The trained tensors (and the gates' fixed ones), on the CPU, ready for safetensors."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._tensors().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Put trained tensors back. Raises KeyError where a tensor is missing."""
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(state[name])

    def _tensors(self) -> dict[str, Tensor]:
        return self.named_parameters() if self.spectral is None else self.spectral.state_dict()  # type: ignore[return-value]

    def counts(self) -> ParameterCounts:
        parts = {"controller": 0, "thresholds": 0, "adapter": 0}
        for name, parameter in self.named_parameters().items():
            parts[_part(name, self.method)] += parameter.numel()
        return ParameterCounts(**parts)

    def finish(self) -> None:
        """Merge LoRA into the backbone for generation; spectral adapters stay as they are."""
        if self.lora is not None:
            from peft.tuners.lora import LoraLayer

            changed = [m.get_base_layer().weight for m in self.lora.modules() if isinstance(m, LoraLayer)]
            self._unmerged = [(weight, weight.detach().to("cpu", copy=True)) for weight in changed]
            self.lora.merge_and_unload()
            self.lora = None

    def discard(self) -> None:
        """Give the backbone back bit for bit as it was (between the trials of a search)."""
        if self.lora is not None:
            self.lora.unload()
            self.lora = None
        # Subtracting what was merged would leave its rounding behind.
        for weight, before in self._unmerged:
            weight.data.copy_(before)
        self._unmerged.clear()


def _part(name: str, method: Method) -> str:
    if not name.startswith("gate."):
        return "adapter"
    return "thresholds" if method.gate == "ordinal" and ".controller." not in name else "controller"


def build_tuner(
    settings: MethodSettings,
    model: Any,
    *,
    layers: int,
    hidden: int,
    states: Iterable[int],
    seed: int,
    learns_blocks: bool = False,
) -> Tuner:
    """A fresh tuner for ``settings.name``.

    ``states`` are the states worth offering by the energy table; ``model`` is the backbone's
    transformers model, which LoRA changes in place. ``learns_blocks`` gives an ordinal gate the blocks'.
    """
    method = METHODS[settings.name]
    generator = torch.Generator().manual_seed(seed)
    if method.lora:
        return Tuner(method, lora=_lora(settings, model, seed))
    if method.gate is None:
        return Tuner(method)
    offered = (OFF, FULL) if settings.precision == "fp16-only" else tuple(states)
    gate = build_gate(settings, method, layers, hidden, offered, generator, learns_blocks=learns_blocks)
    spectral = SpectralAdapters(
        layers,
        hidden,
        settings.rank,
        gate,
        uses_int8=method.gate == "ordinal" and INT8 in offered,
        generator=generator,
    )
    return Tuner(method, spectral=spectral)


def build_gate(
    settings: MethodSettings,
    method: Method,
    layers: int,
    hidden: int,
    offered: tuple[int, ...],
    generator: torch.Generator,
    *,
    learns_blocks: bool = False,
) -> Gate:
    """The gate of a spectral method, with its controller, and that of whole blocks where they are learned."""
    if method.gate == "linear":
        return LinearGate(layers, hidden, settings.rank, generator)
    if method.gate == "static":
        return StaticGate(layers, settings.rank)
    kind = FactorisedController if settings.controller == "factorised" else UnfactorisedController
    controller = kind(layers, hidden, settings.controller_width, generator)
    blocks = BlockGate(layers, int8=settings.precision == "mixed") if learns_blocks else None
    return OrdinalGate(controller, layers, settings.rank, tau=settings.tau, states=offered, blocks=blocks)


def _lora(settings: MethodSettings, model: Any, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)
