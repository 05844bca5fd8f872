"""Decoder architectures, and models of them with random weights: no download, same shapes, same joules.

Quality of a random model means nothing; its energy and latency are those of the trained one. Its
tokenizer is built here too: one token a byte, with ChatML turns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hestctl.errors import Exit, HestError

FAMILIES: Mapping[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "LlamaForCausalLM": (LlamaConfig, LlamaForCausalLM),
    "MistralForCausalLM": (MistralConfig, MistralForCausalLM),
    "Qwen2ForCausalLM": (Qwen2Config, Qwen2ForCausalLM),
}
"""The decoders whose layers stand in ``model.model.layers``, by the name their config.json uses."""

_LLAMA_2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
_QWEN25_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
_SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "initializer_range": 1 / 24,
}
# So narrow a model needs a wide draw, or its layers would hardly change the residual stream.
_TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}

ARCHITECTURES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama-2-7b": ("LlamaForCausalLM", _LLAMA_2_7B),
    "qwen2.5-7b": ("Qwen2ForCausalLM", _QWEN25_7B),
    "smollm2-135m": ("LlamaForCausalLM", _SMOLLM2_135M),
    "tiny": ("LlamaForCausalLM", _TINY),
}
"""Architectures that need nothing from anywhere: (class, fields of its configuration)."""

# Keys of a foreign config.json that could pick code, files or kernels; none of them shapes the model.
_UNWANTED = (
    "auto_map",
    "transformers_weights",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_name_or_path",
)

_PIECE = 1 << 24
_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def named_config(name: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of an architecture in ``ARCHITECTURES``, with some of its fields replaced."""
    family, fields = ARCHITECTURES[name]
    return config_from({"architectures": [family], **fields, **overrides}, name)


def config_from(raw: Mapping[str, Any], name: str) -> PreTrainedConfig:
    """A model configuration from the contents of a config.json.

    Raises HestError when the decoder is not of a supported family, is quantised, or has impossible
    values. Code, files and kernels that the contents name are ignored, never loaded.
    """
    listed = raw.get("architectures") or [_family_of(raw.get("model_type"))]
    family = str(listed[0]) if isinstance(listed, list) else str(listed)
    if family not in FAMILIES:
        raise HestError(
            f"{name} is of the kind {family!r} ({raw.get('model_type')!r}), which is not supported",
            f"supported decoders: {', '.join(FAMILIES)}",
            Exit.USAGE,
        )
    if raw.get("quantization_config"):
        raise HestError(
            f"{name} is a quantised checkpoint; the backbone is kept in its own floating type",
            "use the unquantised model it was made from",
            Exit.USAGE,
        )
    try:
        config = FAMILIES[family][0].from_dict({k: v for k, v in raw.items() if k not in _UNWANTED})
        config.architectures = [family]
        sizes = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.vocab_size)
        if min(sizes) < 1:
            raise ValueError("sizes must be positive")
    except Exception as error:  # the library's checks raise types that differ between its versions
        raise HestError(
            f"the configuration of {name} is not usable: {_first_line(error)}",
            "compare its config.json with the original model's",
            Exit.USAGE,
        ) from error
    return config


def read_config(folder: Path, name: str) -> PreTrainedConfig:
    """The configuration in ``folder``. Raises HestError as ``config_from`` does, or when there is none."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise HestError(
            f"{name}: no usable config.json in {folder} ({_first_line(error)})",
            "give the folder of a transformers model as backbone.name",
            Exit.USAGE,
        ) from error
    return config_from(raw, name)


def meta_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without storage: every shape and type, no numbers."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, attn_implementation="sdpa"
        )
    return model


def random_model(
    config: PreTrainedConfig, *, seed: int, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A model of N(0, ``initializer_range``) weights (norms one, biases zero) and a byte tokenizer.

    The model is made on ``device`` in ``dtype`` and filled there piece by piece, so that never more
    than 64 MB is held beside it. One seed gives the same weights in every dtype (rounded to it) on
    devices of one type. Raises HestError when the vocabulary has no room for bytes.
    """
    tokenizer = byte_tokenizer(config)
    model = meta_model(config, dtype)
    model.to_empty(device=device)
    model.tie_weights()
    decoder: Any = model.model
    # Storage made empty leaves the rotary frequencies, which are no parameters, without values.
    decoder.rotary_emb = type(decoder.rotary_emb)(model.config).to(device)
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                _draw(parameter, float(config.initializer_range), generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    for part in (model.config, model.generation_config):
        if part is not None:
            part.bos_token_id = None
            part.eos_token_id = tokenizer.eos_token_id
            part.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _draw(parameter: torch.Tensor, std: float, generator: torch.Generator) -> None:
    # Drawn in float32 whatever the dtype: the streams of the narrow types change between torch versions.
    flat = parameter.view(-1)
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE]
        drawn = torch.empty(piece.shape, dtype=torch.float32, device=piece.device)
        piece.copy_(drawn.normal_(0.0, std, generator=generator))


def byte_tokenizer(config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """One token a byte (ids 0-255), then ``<|endoftext|>`` (padding), ``<|im_start|>``, ``<|im_end|>``.

    Raises HestError when the vocabulary of ``config`` is smaller than that.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    needed = len(alphabet) + len(_SPECIALS)
    if config.vocab_size < needed:
        raise HestError(
            f"a vocabulary of {config.vocab_size} has no room for {needed} byte tokens",
            f"use a vocabulary of at least {needed}",
            Exit.USAGE,
        )
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIALS))
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=_SPECIALS[0],
        eos_token=_SPECIALS[2],
        additional_special_tokens=[_SPECIALS[1]],
        chat_template=_CHATML,
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def _family_of(model_type: object) -> str | None:
    kinds = {config.model_type: family for family, (config, _) in FAMILIES.items()}
    return kinds.get(model_type) if isinstance(model_type, str) else None


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__
