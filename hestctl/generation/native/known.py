"""Which models the engine knows, and the reasons, in words, why it leaves another to transformers."""

from __future__ import annotations

from typing import Any

from torch import nn

from hestctl.model.backbone import Backbone
from hestctl.model.random_weights import FAMILIES

_FIXED_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary variants whose frequencies do not change with the length of the input."""

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")

# What generation_config.json may ask for that changes the choice of a token, and its neutral values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "min_length": (None, 0),
    "length_penalty": (None, 1.0),
    "early_stopping": (None, False),
    "guidance_scale": (None, 1, 1.0),
    "renormalize_logits": (None, False),
    "stop_strings": (None,),
    "max_time": (None,),
    "watermarking_config": (None,),
}


def unsupported(backbone: Backbone, positions: int | None = None) -> str | None:
    """Why the engine cannot run this model, or None where it can.

    ``positions``, where given, is the longest prompt plus its new tokens.
    """
    model: Any = backbone.model
    kind, config = type(model).__name__, model.config
    if kind not in FAMILIES:
        return f"{kind} is not an architecture it knows ({', '.join(FAMILIES)})"
    for what in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, what, None):
            return f"the model caps its logits ({what})"
    if config.hidden_act != "silu":
        return f"the model's activation is {config.hidden_act}, not silu"
    rope = model.model.rotary_emb.rope_type
    if rope not in _FIXED_ROPE:
        return f"the model's rotary embedding is of the kind {rope!r}, which changes with the length"
    first: Any = backbone.layers[0]
    if 2 * model.model.rotary_emb.inv_freq.numel() != first.self_attn.head_dim:
        return "the model rotates a part of each head only"
    window = sliding_window(backbone)
    if window is not None and positions is not None and positions > window:
        return f"the model looks back {window} tokens only (sliding window), and {positions} are asked for"
    for key, neutral in _NEUTRAL.items():
        if getattr(model.generation_config, key, None) not in neutral:
            return f"the model's generation_config.json sets {key}"
    return _unknown_part(backbone)


def sliding_window(backbone: Backbone) -> int | None:
    """The shortest window of any layer in tokens, or None where every layer sees everything."""
    config = backbone.model.config
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    window = getattr(config, "sliding_window", None)
    return None if window is None else int(window)


def repetition_penalty(backbone: Backbone) -> float:
    """What transformers' own ``generate`` applies for this model, 1.0 where nothing."""
    penalty = getattr(backbone.model.generation_config, "repetition_penalty", None)
    return 1.0 if penalty is None else float(penalty)


def _unknown_part(backbone: Backbone) -> str | None:
    for index, layer in enumerate(backbone.layers):
        part: Any = layer
        linears = {
            **{f"self_attn.{name}": getattr(part.self_attn, name) for name in _ATTENTION},
            **{f"mlp.{name}": getattr(part.mlp, name) for name in _MLP},
        }
        for name, module in linears.items():
            if type(module) is not nn.Linear:
                return f"layer {index} has a {type(module).__name__} as {name} (LoRA is to be merged first)"
            if not module.weight.is_floating_point():
                return f"layer {index} keeps {name} in {module.weight.dtype}"
        biased = {
            name for name in ("q_proj", "k_proj", "v_proj") if linears[f"self_attn.{name}"].bias is not None
        }
        if biased and len(biased) < 3:
            return f"layer {index} has biases on {', '.join(sorted(biased))} only"
    return None
