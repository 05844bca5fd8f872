"""A backbone's weights as the engine uses them: the same storage that transformers' modules hold.

Projections that share their input (q, k, v; gate, up) stand in one tensor each, and the modules'
parameters are views of it: one MatMul instead of three, no second copy, and training or transformers'
own generation go on as before.

Shape legend: D hidden size, M outputs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hestctl.generation.native.products import Int8Product, Product
from hestctl.hardening.artefact import Codes
from hestctl.kernels.choose import Choices
from hestctl.kernels.int8 import DEFAULT_KERNEL, Int8Linear
from hestctl.kernels.products import Int8Weight
from hestctl.model.backbone import Backbone
from hestctl.records import FULL, INT8, OFF, BlockStates

LayerProduct = Product | Int8Product
_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")


class AttentionWeights(NamedTuple):
    """The attention block of a layer."""

    norm_D: Tensor
    qkv: LayerProduct
    out: LayerProduct


class MlpWeights(NamedTuple):
    """The MLP block of a layer."""

    norm_D: Tensor
    gate_up: LayerProduct
    down: LayerProduct


class LayerWeights(NamedTuple):
    """One decoder layer; a block that is off is None."""

    attention: AttentionWeights | None
    mlp: MlpWeights | None


class Heads(NamedTuple):
    """Attention's sizes and the epsilon of the RMS norms."""

    query: int
    kv: int
    size: int
    epsilon: float


class Weights(NamedTuple):
    """All that a forward pass reads. ``pointers`` tells whether the modules still hold the same tensors."""

    embedding_VD: Tensor
    layers: tuple[LayerWeights, ...]
    norm_D: Tensor
    head: Product
    heads: Heads
    pointers: tuple[int, ...]

    @property
    def attending(self) -> int:
        """How many layers attend: so many need a cache."""
        return sum(layer.attention is not None for layer in self.layers)

    @property
    def blocks(self) -> BlockStates:
        """The states of all blocks, by the products that stand here."""
        return BlockStates(
            tuple(_state(layer.attention) for layer in self.layers),
            tuple(_state(layer.mlp) for layer in self.layers),
        )


def pointers(backbone: Backbone) -> tuple[int, ...]:
    """Where the model's parameters lie; merging LoRA or loading weights may move them."""
    return tuple(parameter.data_ptr() for parameter in backbone.model.parameters())


def read_weights(
    backbone: Backbone, blocks: BlockStates, choices: Choices | None = None, codes: Codes | None = None
) -> Weights:
    """The weights of a model that ``unsupported`` has no objection to, each block's in its state.

    Takes at most one layer's projections of extra memory on the way. int8 products are made here, once, from
    ``codes`` or, where that is None, from the weights; embeddings, norms and head stay as they are.
    ``choices`` has the kernels of these products, the default one where it is None. Raises KeyError where it
    lacks a shape or ``codes`` a block, and ValueError for a kernel that cannot run.
    """

    def product(layer: int, state: int, part: Any, *names: str) -> LayerProduct:
        weight_MD, bias_M = _together([getattr(part, name) for name in names])
        if state == FULL:
            return Product(weight_MD, bias_M)
        kernel = DEFAULT_KERNEL if choices is None else choices.kernels(*weight_MD.shape)
        if codes is None:
            return Int8Product(Int8Linear([weight_MD], [bias_M], kernel=kernel))
        q_MK, scale_M = (torch.cat(parts) for parts in zip(*(codes[layer, n] for n in names), strict=True))
        device = weight_MD.device
        weight = Int8Weight(q_MK.to(device), scale_M.to(device), bias_M)
        return Int8Product(Int8Linear.quantised(weight, kernel=kernel))

    def attention(layer: int, module: Any) -> AttentionWeights | None:
        state, part = blocks.attention[layer], module.self_attn
        if state == OFF:
            return None
        return AttentionWeights(
            norm_D=module.input_layernorm.weight.data,
            qkv=product(layer, state, part, *_QKV),
            out=product(layer, state, part, "o_proj"),
        )

    def mlp(layer: int, module: Any) -> MlpWeights | None:
        state, part = blocks.mlp[layer], module.mlp
        if state == OFF:
            return None
        return MlpWeights(
            norm_D=module.post_attention_layernorm.weight.data,
            gate_up=product(layer, state, part, *_GATE_UP),
            down=product(layer, state, part, "down_proj"),
        )

    # Parameters made under inference mode could never be trained again.
    with torch.inference_mode(False), torch.no_grad():
        model: Any = backbone.model
        for module in backbone.layers:
            _place(module)
        layers = tuple(LayerWeights(attention(i, m), mlp(i, m)) for i, m in enumerate(backbone.layers))
        first: Any = backbone.layers[0]
        head, sizes = model.lm_head, first.self_attn
        return Weights(
            embedding_VD=model.model.embed_tokens.weight.data,
            layers=layers,
            norm_D=model.model.norm.weight.data,
            head=Product(head.weight.data, None if head.bias is None else head.bias.data),
            heads=Heads(
                query=sizes.q_proj.out_features // sizes.head_dim,
                kv=sizes.k_proj.out_features // sizes.head_dim,
                size=sizes.head_dim,
                epsilon=first.input_layernorm.variance_epsilon,
            ),
            pointers=pointers(backbone),
        )


def _place(layer: Any) -> None:
    """Projections side by side even where they do not run: an engine that runs them must not move them."""
    _together([getattr(layer.self_attn, name) for name in _QKV])
    _together([getattr(layer.mlp, name) for name in _GATE_UP])


def kernel_note(weights: Weights, choices: Choices | None) -> str | dict[str, str]:
    """Which kernels run the layers' MatMuls, and why; by outputs and inputs where they were chosen."""
    shapes = {
        tuple(product.linear.weight.q_MK.shape)
        for layer in weights.layers
        for block in layer
        for product in _products(block)
        if isinstance(product, Int8Product)
    }
    if not shapes:
        return "full precision: torch's own"
    if choices is None:
        return "default: not calibrated"
    return {f"{outputs}x{inputs}": choices.told(outputs, inputs) for outputs, inputs in sorted(shapes)}


def _products(block: AttentionWeights | MlpWeights | None) -> tuple[LayerProduct, ...]:
    return () if block is None else block[1:]


def _state(block: AttentionWeights | MlpWeights | None) -> int:
    if block is None:
        return OFF
    (state,) = {INT8 if isinstance(product, Int8Product) else FULL for product in _products(block)}
    return state


def _together(modules: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of all modules, side by side."""
    biases = [module.bias for module in modules if module.bias is not None]
    return _joined([module.weight for module in modules]), _joined(biases) if biases else None


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor of all rows, of which the parameters are views from now on."""
    first, rows = parameters[0].data, sum(len(parameter) for parameter in parameters)
    if _adjacent(parameters):
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    whole = torch.cat([parameter.data for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = whole[start : start + len(parameter)]
        start += len(parameter)
    return whole


def _adjacent(parameters: Sequence[Tensor]) -> bool:
    storage, end = parameters[0].untyped_storage().data_ptr(), parameters[0].data_ptr()
    for parameter in parameters:
        if (
            parameter.untyped_storage().data_ptr() != storage
            or parameter.data_ptr() != end
            or not parameter.is_contiguous()
        ):
            return False
        end += parameter.numel() * parameter.element_size()
    return True
