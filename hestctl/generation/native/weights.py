"""A backbone's weights as the engine uses them: the same storage that transformers' modules hold.

Projections that share their input (q, k, v; gate, up) stand in one tensor each, and the modules'
parameters are views of it: one MatMul instead of three, no second copy, and training or transformers'
own generation go on as before.

Shape legend: D hidden size, M outputs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hestctl.generation.native.products import Int8Product, Product
from hestctl.kernels.choose import Choices
from hestctl.kernels.int8 import DEFAULT_KERNEL
from hestctl.model.backbone import Backbone

Precision = Literal["full", "int8"]
LayerProduct = Product | Int8Product
_Make = Callable[[Tensor, Tensor | None], LayerProduct]


class LayerWeights(NamedTuple):
    """One decoder layer."""

    norm_in_D: Tensor
    qkv: LayerProduct
    out: LayerProduct
    norm_mid_D: Tensor
    gate_up: LayerProduct
    down: LayerProduct


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


def pointers(backbone: Backbone) -> tuple[int, ...]:
    """Where the model's parameters lie; merging LoRA or loading weights may move them."""
    return tuple(parameter.data_ptr() for parameter in backbone.model.parameters())


def read_weights(backbone: Backbone, precision: Precision, choices: Choices | None = None) -> Weights:
    """The weights of a model that ``unsupported`` has no objection to.

    Takes at most one layer's projections of extra memory on the way. int8 codes are made here, once, for
    the MatMuls of the decoder layers alone: embeddings, norms and head stay as they are. ``choices`` has the
    kernels of these products, the default one where it is None. Raises KeyError where it lacks a shape, and
    ValueError for a kernel that cannot run.
    """

    def int8(weight_MD: Tensor, bias_M: Tensor | None) -> Int8Product:
        kernel = DEFAULT_KERNEL if choices is None else choices.kernels(*weight_MD.shape)
        return Int8Product(weight_MD, bias_M, kernel)

    # Parameters made under inference mode could never be trained again.
    with torch.inference_mode(False), torch.no_grad():
        model: Any = backbone.model
        make: _Make = Product if precision == "full" else int8
        layers = tuple(_layer(layer, make) for layer in backbone.layers)
        first: Any = backbone.layers[0]
        attention, head = first.self_attn, model.lm_head
        return Weights(
            embedding_VD=model.model.embed_tokens.weight.data,
            layers=layers,
            norm_D=model.model.norm.weight.data,
            head=Product(head.weight.data, None if head.bias is None else head.bias.data),
            heads=Heads(
                query=attention.q_proj.out_features // attention.head_dim,
                kv=attention.k_proj.out_features // attention.head_dim,
                size=attention.head_dim,
                epsilon=first.input_layernorm.variance_epsilon,
            ),
            pointers=pointers(backbone),
        )


def kernel_note(weights: Weights, choices: Choices | None) -> str | dict[str, str]:
    """Which kernels run the layers' MatMuls, and why; by outputs and inputs where they were chosen."""
    products = [p for layer in weights.layers for p in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    shapes = {tuple(p.linear.weight.q_MK.shape) for p in products if isinstance(p, Int8Product)}
    if not shapes:
        return "full precision: torch's own"
    if choices is None:
        return "default: not calibrated"
    return {f"{outputs}x{inputs}": choices.told(outputs, inputs) for outputs, inputs in sorted(shapes)}


def _layer(layer: Any, make: _Make) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    return LayerWeights(
        norm_in_D=layer.input_layernorm.weight.data,
        qkv=_product(make, attention.q_proj, attention.k_proj, attention.v_proj),
        out=_product(make, attention.o_proj),
        norm_mid_D=layer.post_attention_layernorm.weight.data,
        gate_up=_product(make, mlp.gate_proj, mlp.up_proj),
        down=_product(make, mlp.down_proj),
    )


def _product(make: _Make, *modules: nn.Linear) -> LayerProduct:
    biases = [module.bias for module in modules if module.bias is not None]
    weight_MD = _joined([module.weight for module in modules])
    return make(weight_MD, _joined(biases) if biases else None)


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
