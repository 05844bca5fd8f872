"""The backbone with its blocks in given states, as training and the reference engine run it.

transformers' own modules are used; while the context is open, a block that is off adds nothing, and the
linear layers of a block in int8 compute exactly what the int8 kernels compute.

Shape legend: L layers, B batch, T tokens, N rows (tokens), K inputs, M outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hestctl.kernels.int8 import Int8Linear
from hestctl.records import BLOCKS, INT8, OFF, BlockStates

MODULES = ("self_attn", "mlp")
"""What transformers calls the two ``BLOCKS`` in a decoder layer of the families known here."""


class Int8Codes:
    """int8 codes of a backbone's linear layers, each made when it is first needed and kept."""

    def __init__(self) -> None:
        self._by_module: dict[nn.Linear, Int8Linear] = {}

    def of(self, module: nn.Linear) -> Int8Linear:
        if module not in self._by_module:
            self._by_module[module] = Int8Linear([module.weight], [module.bias])
        return self._by_module[module]


class _StraightThrough(torch.autograd.Function):
    """The int8 product with the gradient of the unquantised one; the weight itself is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_MK: Tensor, linear: Int8Linear) -> Tensor:
        ctx.weight_MK = weight_MK
        return linear(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return grad @ ctx.weight_MK.to(grad.dtype), None, None


@contextmanager
def in_states(
    layers: nn.ModuleList,
    states: BlockStates,
    codes: Int8Codes,
    *,
    cached: bool = False,
) -> Iterator[None]:
    """While open, every block of ``layers`` runs in its state.

    A block that is off is not computed, unless ``cached``: transformers' cache counts positions in its
    first layer, and would miss them there.
    """
    with ExitStack() as undo:
        for index, layer in enumerate(layers):
            for block, name in enumerate(MODULES):
                module = getattr(layer, name)
                state = states.state(index, block)
                if state == INT8:
                    undo.enter_context(int8_inside(module, codes))
                elif state == OFF:
                    nothing = _computed_nothing if cached else _nothing
                    _patch(module, partial(nothing, module.forward, block), undo)
        yield


@contextmanager
def int8_inside(block: nn.Module, codes: Int8Codes) -> Iterator[None]:
    """While open, the linear layers of one attention or MLP compute in int8."""
    with ExitStack() as undo:
        for linear in block.modules():
            # What is trained beside a weight (LoRA's matrices) changes too often to have codes.
            if isinstance(linear, nn.Linear) and not linear.weight.requires_grad:
                _patch(linear, partial(_int8_forward, linear, codes), undo)
        yield


def _patch(module: nn.Module, forward: Callable[..., Any], undo: ExitStack) -> None:
    # On the instance: nn.Module calls self.forward, and deleting it shows the class's own again.
    before = vars(module).get("forward")
    module.forward = forward
    if before is None:
        undo.callback(delattr, module, "forward")
    else:
        undo.callback(setattr, module, "forward", before)


def _int8_forward(module: nn.Linear, codes: Int8Codes, x: Tensor) -> Tensor:
    out: Tensor = _StraightThrough.apply(x, module.weight, codes.of(module))  # type: ignore[no-untyped-call]
    return out


def _nothing(_original: Callable[..., Any], block: int, *args: Any, **kwargs: Any) -> Any:
    hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    zero = torch.zeros_like(hidden)
    return (zero, None) if BLOCKS[block] == "attention" else zero


def _computed_nothing(original: Callable[..., Any], _block: int, *args: Any, **kwargs: Any) -> Any:
    out = original(*args, **kwargs)
    return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)
