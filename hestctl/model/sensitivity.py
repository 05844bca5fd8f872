"""How much likelihood each block is worth: the loss increase when it alone is off, or in int8.

Shape legend: L layers, 2 blocks (attention, MLP).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hestctl.data.prompts import Encoded, TrainBatch, train_batch
from hestctl.model.backbone import Backbone
from hestctl.model.blocks import MODULES, Int8Codes, in_states, int8_inside
from hestctl.model.likelihood import answer_loss
from hestctl.records import FULL, INT8, OFF, BlockStates

Pairs = tuple[tuple[float, float], ...]
"""(attention, MLP) of every layer."""

Kind = Literal["first-order", "exact", "uniform"]


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """Loss increases in nats per answer token, and their standard errors over the samples they come from.

    ``first-order``: gradients times what would change. ``exact``: the loss itself, block after block.
    ``uniform``: nothing is known (random weights), every block counts alike. They hold for the weights of
    ``fingerprint`` alone.
    """

    kind: Kind
    fingerprint: str
    data_hash: str
    samples: int
    off: Pairs
    off_error: Pairs
    int8: Pairs
    int8_error: Pairs

    def int8_harms(self, layer: int, block: int) -> bool:
        """Whether int8 costs this block likelihood beyond twice its error; unknown counts as harm."""
        if self.kind == "uniform":
            return True
        return self.int8[layer][block] > 2 * self.int8_error[layer][block]

    def harm(self, layer: int, block: int) -> tuple[float, float] | None:
        """What (int8, off) costs this block alone; None where nobody knows."""
        return None if self.kind == "uniform" else (self.int8[layer][block], self.off[layer][block])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Sensitivities:
        pairs = ("off", "off_error", "int8", "int8_error")
        read = {name: tuple((float(a), float(m)) for a, m in document[name]) for name in pairs}
        return cls(**{**document, **read})


def uniform(backbone: Backbone) -> Sensitivities:
    """All blocks alike: what is known of random weights."""
    same: Pairs = ((1.0, 1.0),) * backbone.num_layers
    none: Pairs = ((0.0, 0.0),) * backbone.num_layers
    return Sensitivities("uniform", backbone.fingerprint, "", 0, same, none, none, none)


def first_order(
    backbone: Backbone, rows: Sequence[Encoded], data_hash: str, check: Callable[[], None]
) -> Sensitivities:
    """From one backward pass a row: ``-<g, D>`` for off and ``<g, D_int8 - D>`` for int8.

    D is what a block adds to the residual stream, g the gradient of the loss with respect to it. Taylor's
    first term: right for small changes such as int8, and no more than a ranking for a block left out.
    ``check`` is polled between rows.
    """
    codes, layers = Int8Codes(), backbone.num_layers
    found = []
    for row in rows:
        check()
        batch = _batch(backbone, row)
        on_L2 = torch.ones(layers, 2, device=backbone.device, requires_grad=True)
        rounded_L2 = torch.zeros(layers, 2, device=backbone.device, requires_grad=True)
        with _measured(backbone.layers, codes, on_L2, rounded_L2):
            loss = answer_loss(backbone, batch) / len(row.answer_ids)
            off_L2, int8_L2 = torch.autograd.grad(loss, (on_L2, rounded_L2))
        found.append((-off_L2.double().cpu(), int8_L2.double().cpu()))
    return _over(found, "first-order", backbone, data_hash)


@torch.inference_mode()
def exact(
    backbone: Backbone, rows: Sequence[Encoded], data_hash: str, check: Callable[[], None]
) -> Sensitivities:
    """The loss with one block changed, for every block and both changes: 4 L + 1 passes a row.

    ``check`` is polled between passes.
    """
    codes, layers = Int8Codes(), backbone.num_layers
    found = []
    for row in rows:
        batch = _batch(backbone, row)

        def loss(states: BlockStates, batch: TrainBatch = batch, tokens: int = len(row.answer_ids)) -> float:
            check()
            with in_states(backbone.layers, states, codes):
                return float(answer_loss(backbone, batch)) / tokens

        whole = loss(BlockStates.uniform(layers))
        changed = [
            torch.tensor(
                [
                    [loss(_alone(layers, layer, block, state)) - whole for block in range(2)]
                    for layer in range(layers)
                ],
                dtype=torch.float64,
            )
            for state in (OFF, INT8)
        ]
        found.append((changed[0], changed[1]))
    return _over(found, "exact", backbone, data_hash)


def _alone(layers: int, layer: int, block: int, state: int) -> BlockStates:
    """All blocks at full but one."""
    states = [[FULL] * layers, [FULL] * layers]
    states[block][layer] = state
    return BlockStates(tuple(states[0]), tuple(states[1]))


def _batch(backbone: Backbone, row: Encoded) -> TrainBatch:
    return train_batch([row], backbone.pad_id).to(backbone.device)


@contextmanager
def _measured(layers: nn.ModuleList, codes: Int8Codes, on_L2: Tensor, rounded_L2: Tensor) -> Iterator[None]:
    """Every block's output D becomes ``on * D + rounded * (D_int8 - D)``, with on = 1 and rounded = 0."""

    def hook(index: int, block: int) -> Callable[..., Any]:
        def run(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            with torch.no_grad(), int8_inside(module, codes):
                rounded = module.forward(*args, **kwargs)
            exact, rounded = (out[0] if isinstance(out, tuple) else out for out in (output, rounded))
            change = rounded - exact.detach()
            found = exact * on_L2[index, block] + change * rounded_L2[index, block]
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
    """Means over rows, and their standard errors (infinite for a single row)."""

    def pairs(x_L2: Tensor) -> Pairs:
        return tuple((a, m) for a, m in x_L2.tolist())

    columns = [torch.stack(values) for values in zip(*found, strict=True)]
    means = [column.mean(0) for column in columns]
    errors = [
        column.std(0) / len(found) ** 0.5 if len(found) > 1 else torch.full_like(column[0], torch.inf)
        for column in columns
    ]
    return Sensitivities(
        kind,
        backbone.fingerprint,
        data_hash,
        len(found),
        off=pairs(means[0]),
        off_error=pairs(errors[0]),
        int8=pairs(means[1]),
        int8_error=pairs(errors[1]),
    )
