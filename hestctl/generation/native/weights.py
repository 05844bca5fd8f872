"""A backbone's weights as the engine uses them: the same storage that transformers' modules hold.

Projections that share their input (q, k, v; gate, up) stand in one tensor each, and the modules'
parameters are views of it: one MatMul instead of three, no second copy, and training or transformers'
own generation go on as before.

Shape legend: D hidden size, M outputs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hestctl.kernels.int8 import Int8Linear
from hestctl.model.backbone import Backbone

Precision = Literal["full", "int8"]


class Product:
    """``x @ weight.T + bias`` in the weights' own type."""

    def __init__(self, weight_MD: Tensor, bias_M: Tensor | None) -> None:
        self.weight_MD, self.bias_M = weight_MD, bias_M

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_MD, self.bias_M)


class Int8Product:
    """The same in int8, by the numerics of ``kernels.reference``; the bias is added in the type of ``x``.

    Keeps its own int8 codes: a quarter to a half of the weights' bytes beside them.
    """

    def __init__(self, weight_MD: Tensor, bias_M: Tensor | None) -> None:
        self.linear, self.bias_M = Int8Linear([weight_MD]), bias_M

    def __call__(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if self.bias_M is None else y + self.bias_M


class LayerWeights(NamedTuple):
    """One decoder layer."""

    norm_in_D: Tensor
    qkv: Product | Int8Product
    out: Product | Int8Product
    norm_mid_D: Tensor
    gate_up: Product | Int8Product
    down: Product | Int8Product


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


def read_weights(backbone: Backbone, precision: Precision) -> Weights:
    """The weights of a model that ``unsupported`` has no objection to.

    Takes at most one layer's projections of extra memory on the way. int8 codes are made here, once, for
    the MatMuls of the decoder layers alone: embeddings, norms and head stay as they are.
    """
    # Parameters made under inference mode could never be trained again.
    with torch.inference_mode(False), torch.no_grad():
        model: Any = backbone.model
        kind = Product if precision == "full" else Int8Product
        layers = tuple(_layer(layer, kind) for layer in backbone.layers)
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


def _layer(layer: Any, kind: type[Product] | type[Int8Product]) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    return LayerWeights(
        norm_in_D=layer.input_layernorm.weight.data,
        qkv=_product(kind, attention.q_proj, attention.k_proj, attention.v_proj),
        out=_product(kind, attention.o_proj),
        norm_mid_D=layer.post_attention_layernorm.weight.data,
        gate_up=_product(kind, mlp.gate_proj, mlp.up_proj),
        down=_product(kind, mlp.down_proj),
    )


def _product(kind: type[Product] | type[Int8Product], *modules: nn.Linear) -> Product | Int8Product:
    biases = [module.bias for module in modules if module.bias is not None]
    weight_MD = _joined([module.weight for module in modules])
    return kind(weight_MD, _joined(biases) if biases else None)


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
