"""How much likelihood each block is worth: the loss increase when it alone is off, or in int8.

Shape legend: L layers, 2 blocks (attention, MLP).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hestctl.data.prompts import Encoded, TrainBatch, train_batch
from hestctl.model.backbone import Backbone
from hestctl.model.blocks import MODULES, Int8Codes, in_states, int8_inside
from hestctl.model.likelihood import answer_loss, loss_of_hidden
from hestctl.records import FULL, OFF, BlockStates

Pairs = tuple[tuple[float, float], ...]
"""(attention, MLP) of every layer."""

Kind = Literal["gradient", "exact", "uniform"]


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """Loss increases in nats per answer token, and their standard errors over the samples they come from,
    None where a single sample has none to give.

    ``gradient``: Taylor's terms. ``exact``: the loss itself, block after block. ``uniform``: nothing is
    known (random weights), every block counts alike. They hold for the weights of ``fingerprint`` alone.
    """

    kind: Kind
    fingerprint: str
    data_hash: str
    samples: int
    off: Pairs
    off_error: Pairs | None
    int8: Pairs
    int8_error: Pairs | None

    def int8_harms(self, layer: int, block: int) -> bool:
        """Whether int8 costs this block likelihood beyond twice its error; unknown counts as harm."""
        if self.kind == "uniform" or self.int8_error is None:
            return True
        return self.int8[layer][block] > 2 * self.int8_error[layer][block]

    def harm(self, layer: int, block: int) -> tuple[float, float] | None:
        """What (int8, off) costs this block alone; None where nobody knows."""
        return None if self.kind == "uniform" else (self.int8[layer][block], self.off[layer][block])

    def with_off(self, off_L2: Tensor) -> Sensitivities:
        """The same with other loss increases of blocks left out, (L, 2)."""
        return replace(self, off=tuple((a, m) for a, m in off_L2.tolist()))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Sensitivities:
        pairs = [name for name in ("off", "off_error", "int8", "int8_error") if document[name] is not None]
        read = {name: tuple((float(a), float(m)) for a, m in document[name]) for name in pairs}
        return cls(**{**document, **read})


def uniform(backbone: Backbone) -> Sensitivities:
    """All blocks alike: what is known of random weights."""
    same: Pairs = ((1.0, 1.0),) * backbone.num_layers
    none: Pairs = ((0.0, 0.0),) * backbone.num_layers
    return Sensitivities("uniform", backbone.fingerprint, "", 0, same, none, none, none)


def by_gradients(
    backbone: Backbone, rows: Sequence[Encoded], data_hash: str, check: Callable[[], None]
) -> Sensitivities:
    """From one backward pass a row.

    With D what a block adds to the residual stream at a token, and g the gradient of the row's loss there:
    int8 costs ``sum <g, D_int8 - D>``, Taylor's first term, for the change is small. A block left out is no
    small change, and its first term ``-sum <g, D>`` has little to do with what happens (it calls the first
    attention of SmolLM2 harmful, without which nothing works). So off is the second term with the empirical
    Fisher information in the Hessian's place, ``n / 2 * sum <g, D>^2`` over tokens, n the answer's tokens.
    ``check`` is polled between rows.
    """
    codes = Int8Codes()
    found = []
    for row in rows:
        check()
        slope_L2T, int8_L2 = _gradients(backbone, row, codes)
        fisher_L2 = 0.5 * len(row.answer_ids) * slope_L2T.pow(2).sum(-1)
        found.append((fisher_L2, int8_L2))
    return _over(found, "gradient", backbone, data_hash)


def exact(
    backbone: Backbone, rows: Sequence[Encoded], data_hash: str, check: Callable[[], None]
) -> Sensitivities:
    """The loss with one block left out, block after block: 2 L passes a row, from that block onwards.

    int8 as in ``by_gradients``, where that is right. ``check`` is polled between passes.
    """
    codes = Int8Codes()
    found = []
    for row in rows:
        _, int8_L2 = _gradients(backbone, row, codes)
        found.append((_left_out(backbone, row, codes, check), int8_L2))
    return _over(found, "exact", backbone, data_hash)


def _gradients(backbone: Backbone, row: Encoded, codes: Int8Codes) -> tuple[Tensor, Tensor]:
    """``<g, D>`` of every token (L, 2, T), and ``sum <g, D_int8 - D>`` (L, 2); float64 on the CPU."""
    batch, layers = _batch(backbone, row), backbone.num_layers
    tokens = batch.input_ids.shape[1]
    on_L2T1 = torch.ones(layers, 2, tokens, 1, device=backbone.device, requires_grad=True)
    rounded_L2 = torch.zeros(layers, 2, device=backbone.device, requires_grad=True)
    with _measured(backbone.layers, codes, on_L2T1, rounded_L2):
        loss = answer_loss(backbone, batch) / len(row.answer_ids)
        slope_L2T1, int8_L2 = torch.autograd.grad(loss, (on_L2T1, rounded_L2))
    return slope_L2T1[..., 0].double().cpu(), int8_L2.double().cpu()


@torch.inference_mode()
def _left_out(backbone: Backbone, row: Encoded, codes: Int8Codes, check: Callable[[], None]) -> Tensor:
    """Loss increases (L, 2) with one block off, float64."""
    batch, layers = _batch(backbone, row), backbone.num_layers
    inputs: dict[int, tuple[Tensor, dict[str, Any]]] = {}

    def keep(index: int) -> Callable[..., None]:
        def run(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = dict(kwargs)
            hidden = args[0] if args else rest.pop("hidden_states")
            inputs[index] = hidden, rest

        return run

    handles = [
        layer.register_forward_pre_hook(keep(index), with_kwargs=True)
        for index, layer in enumerate(backbone.layers)
    ]
    try:
        whole = float(answer_loss(backbone, batch))
    finally:
        for handle in handles:
            handle.remove()
    model: Any = backbone.model.model
    change_L2 = torch.zeros(layers, 2, dtype=torch.float64)
    for first in range(layers):
        for block in range(2):
            check()
            with in_states(backbone.layers, _alone_off(layers, first, block), codes):
                hidden = inputs[first][0]
                for index in range(first, layers):
                    out = backbone.layers[index](hidden, **inputs[index][1])
                    hidden = out[0] if isinstance(out, tuple) else out
                loss = loss_of_hidden(backbone, batch, model.norm(hidden))
            change_L2[first, block] = (float(loss) - whole) / len(row.answer_ids)
    return change_L2


def _alone_off(layers: int, layer: int, block: int) -> BlockStates:
    states = [[FULL] * layers, [FULL] * layers]
    states[block][layer] = OFF
    return BlockStates(tuple(states[0]), tuple(states[1]))


def _batch(backbone: Backbone, row: Encoded) -> TrainBatch:
    return train_batch([row], backbone.pad_id).to(backbone.device)


@contextmanager
def _measured(layers: nn.ModuleList, codes: Int8Codes, on_L2T1: Tensor, rounded_L2: Tensor) -> Iterator[None]:
    """Every block's output D becomes ``on * D + rounded * (D_int8 - D)``, with on = 1 and rounded = 0."""

    def hook(index: int, block: int) -> Callable[..., Any]:
        def run(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            with torch.no_grad(), int8_inside(module, codes):
                rounded = module.forward(*args, **kwargs)
            exact, rounded = (out[0] if isinstance(out, tuple) else out for out in (output, rounded))
            change = rounded - exact.detach()
            found = exact * on_L2T1[index, block] + change * rounded_L2[index, block]
            return (found, *output[1:]) if isinstance(output, tuple) else found

        return run

    handles = [
        getattr(layer, name).register_forward_hook(hook(index, block), with_kwargs=True)
        for index, layer in enumerate(layers)
        for block, name in enumerate(MODULES)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _over(
    found: Sequence[tuple[Tensor, Tensor]], kind: Kind, backbone: Backbone, data_hash: str
) -> Sensitivities:
    """Means over rows, and their standard errors."""

    def pairs(x_L2: Tensor) -> Pairs:
        return tuple((a, m) for a, m in x_L2.tolist())

    columns = [torch.stack(values) for values in zip(*found, strict=True)]
    means = [column.mean(0) for column in columns]
    errors = [pairs(column.std(0) / len(found) ** 0.5) if len(found) > 1 else None for column in columns]
    return Sensitivities(
        kind,
        backbone.fingerprint,
        data_hash,
        len(found),
        off=pairs(means[0]),
        off_error=errors[0],
        int8=pairs(means[1]),
        int8_error=errors[1],
    )
