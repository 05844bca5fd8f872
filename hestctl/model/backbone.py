"""The frozen causal LM that everything else adapts: found, checked, loaded, fingerprinted.

Weights come from safetensors files, from the one pinned GGUF, or from a seed. Code that a model
brings along is never run, and pickled weights are never opened.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import utils as hub_utils
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from hestctl.durable import file_sha256
from hestctl.errors import Exit, HestError
from hestctl.model import hub, random_weights, smollm2
from hestctl.model.hub import Say, first_line, weight_files
from hestctl.settings import BackboneSettings

_ALIAS, _ALIAS_GGUF = "smollm2-135m", "smollm2-135m-gguf"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end_of_turn|>", "<end_of_turn>")
# What of a configuration changes the function that given weights compute.
_SHAPING = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias"),
    *("hidden_act", "sliding_window"),
)


@dataclass(frozen=True, eq=False)
class Backbone:
    """A causal LM without trainable parameters, in evaluation mode, and its tokenizer.

    ``fingerprint`` names configuration and weights: plans and energy tables hold for it alone.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    weights: str
    dtype: torch.dtype
    device: torch.device
    fingerprint: str

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, first to last."""
        return cast(nn.ModuleList, cast(Any, self.model).model.layers)

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream."""
        return int(self.model.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return len(self.layers)

    @property
    def pad_id(self) -> int:
        """The id that fills batches up."""
        return int(cast(int, self.tokenizer.pad_token_id))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: end of text and end of turn."""
        ids: list[Any] = [self.tokenizer.eos_token_id]
        for source in (self.model.generation_config, self.model.config):
            given = getattr(source, "eos_token_id", None)
            ids += given if isinstance(given, list) else [given]
        for token in _END_OF_TURN:
            known = self.tokenizer.convert_tokens_to_ids(token)
            if known is not None and self.tokenizer.convert_ids_to_tokens(known) == token:
                ids.append(known)
        return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


@dataclass(frozen=True)
class _Source:
    folder: Path
    name: str
    identity: Mapping[str, str] | None = None


def load_backbone(settings: BackboneSettings, *, seed: int = 0, progress: Say | None = None) -> Backbone:
    """The backbone that ``settings`` describe; ``seed`` draws random weights and is unused otherwise.

    ``progress`` is told in words what takes long. Raises HestError when there is no such model or
    device, the hub cannot be reached, the weights are not safe or whole, or memory or disk is short.
    """
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    say = progress or (lambda _: None)
    with _quiet(), _enough_memory(settings, device):
        if settings.weights == "random":
            return _random(_shape(settings, say), settings.name, seed=seed, device=device, dtype=dtype)
        source = _find(settings, say)
        say(f"loading {source.name} in {_short(dtype)} on {device}")
        config = random_weights.read_config(source.folder, source.name)
        identity = source.identity or _checksums(weight_files(source.folder, source.name))
        model = _load_model(source, config, dtype).to(device)  # type: ignore[arg-type]
        tokenizer = _load_tokenizer(source, config)
        return _frozen(model, tokenizer, source.name, "pretrained", identity)


def tiny_backbone(seed: int = 0, **overrides: Any) -> Backbone:
    """The ``tiny`` random Llama on the CPU in float32; ``overrides`` replace configuration fields."""
    config = random_weights.named_config("tiny", **overrides)
    return _random(config, "tiny", seed=seed, device=torch.device("cpu"), dtype=torch.float32)


def resolve_device(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` as a device. Raises HestError (no device) where cuda is missing."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise HestError(
            "backbone.device is cuda, and torch finds no CUDA device",
            "set backbone.device to auto or cpu, or look at `nvidia-smi` and CUDA_VISIBLE_DEVICES",
            Exit.NO_DEVICE,
        )
    return torch.device("cuda", torch.cuda.current_device())


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The floating type of ``name``; ``auto``: float32 on a CPU, bfloat16 or else float16 on a GPU."""
    if name != "auto":
        return _DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def parameter_estimate(settings: BackboneSettings) -> tuple[int, int] | None:
    """Parameters and their bytes, from the configuration alone; None where it cannot be had.

    Loads no weights and needs no device. Raises HestError for an unknown name or an unsupported model.
    """
    with _quiet():
        try:
            config = _shape(settings, lambda _: None)
        except HestError as error:
            if error.exit_code == Exit.USAGE:
                raise
            return None
        on_gpu = settings.device == "cuda" or (settings.device == "auto" and torch.cuda.is_available())
        automatic = torch.bfloat16 if on_gpu else torch.float32
        dtype = _DTYPES.get(settings.dtype, automatic)
        count = sum(p.numel() for p in random_weights.meta_model(config, dtype).parameters())
    return count, count * dtype.itemsize


def _shape(settings: BackboneSettings, say: Say) -> PreTrainedConfig:
    """The configuration alone, from our own tables, a folder, or the hub's config.json."""
    name, path = settings.name, Path(settings.name).expanduser()
    if name == _ALIAS_GGUF or _is_gguf(path):
        return random_weights.named_config(_ALIAS)
    if name in random_weights.ARCHITECTURES:
        if settings.weights == "pretrained" and name != _ALIAS:
            raise _no_weights(name)
        return random_weights.named_config(name)
    folder = (
        path if name and path.is_dir() else hub.fetch(_hub_id(name), settings.revision, say, weights=False)
    )
    return random_weights.read_config(folder, name)


def _find(settings: BackboneSettings, say: Say) -> _Source:
    name, path = settings.name, Path(settings.name).expanduser()
    if settings.revision is not None and (name == _ALIAS_GGUF or path.exists()):
        raise HestError(
            f"backbone.revision is {settings.revision!r}, and {name} is not a hub model",
            "unset backbone.revision",
            Exit.USAGE,
        )
    if name in (_ALIAS, _ALIAS_GGUF):
        return _find_alias(settings, say)
    if name in random_weights.ARCHITECTURES:
        raise _no_weights(name)
    if _is_gguf(path):
        return _dequantised(smollm2.converted_folder(say, path))
    if name and path.is_dir():
        return _Source(path, name)
    return _Source(hub.fetch(_hub_id(name), settings.revision, say), name)


def _find_alias(settings: BackboneSettings, say: Say) -> _Source:
    forced = settings.name == _ALIAS_GGUF
    cached = smollm2.cached_folder() if settings.revision is None else None
    if cached is None and not forced:
        try:
            return _Source(hub.fetch(smollm2.HUB_ID, settings.revision, say), _ALIAS)
        except HestError as error:
            if settings.revision is not None:
                raise
            say(f"{error.message}; using the 4-bit copy from PyPI instead")
    return _dequantised(cached or smollm2.converted_folder(say))


def _dequantised(folder: Path) -> _Source:
    return _Source(folder, smollm2.NAME, {"gguf": smollm2.GGUF_SHA256})


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def _no_weights(name: str) -> HestError:
    return HestError(
        f"'{name}' names an architecture, not trained weights",
        "set backbone.weights to random, or give a hub id such as meta-llama/Llama-2-7b-chat-hf",
        Exit.USAGE,
    )


def _hub_id(name: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?<!\.gguf)", name):
        return name
    known = [_ALIAS_GGUF, *random_weights.ARCHITECTURES]
    near = difflib.get_close_matches(name, known, n=1)
    raise HestError(
        f"no backbone called {name!r}" + (f"; did you mean '{near[0]}'?" if near else ""),
        f"give a hub id (org/name), a folder, or one of {', '.join(sorted(known))}",
        Exit.USAGE,
    )


def _load_model(source: _Source, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    _, family = random_weights.FAMILIES[cast(list[str], config.architectures)[0]]
    try:
        model, info = cast(Any, family).from_pretrained(
            source.folder,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise HestError(
            f"{source.name}: its weights cannot be read ({first_line(error)})", "fetch the model again"
        ) from error
    absent = sorted(str(key) for part in ("missing_keys", "mismatched_keys") for key in info[part])
    if absent:
        raise HestError(
            f"{source.name}: {len(absent)} tensors are missing or of the wrong shape, first {absent[0]}",
            "fetch the model again",
        )
    return cast(PreTrainedModel, model)


def _load_tokenizer(source: _Source, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # each tokenizer class has its own way to fail on a missing or odd file
        raise HestError(
            f"{source.name}: its tokenizer cannot be loaded ({first_line(error)})",
            "the folder needs tokenizer.json and tokenizer_config.json; code of its own is never run",
        ) from error
    if len(tokenizer) > config.vocab_size:
        raise HestError(
            f"{source.name}: {len(tokenizer):,} tokens in the tokenizer, {config.vocab_size:,} in the model",
            "use the tokenizer that belongs to these weights",
        )
    if tokenizer.eos_token_id is None:
        raise HestError(
            f"{source.name}: its tokenizer has no end-of-text token", "name one in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _random(
    config: PreTrainedConfig, name: str, *, seed: int, device: torch.device, dtype: torch.dtype
) -> Backbone:
    model, tokenizer = random_weights.random_model(config, seed=seed, device=device, dtype=dtype)
    drawn = {"seed": str(seed), "drawn_on": device.type, "std": str(config.initializer_range)}
    return _frozen(model, tokenizer, name, "random", drawn)


def _frozen(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    weights: str,
    identity: Mapping[str, str],
) -> Backbone:
    model.requires_grad_(False)
    model.train(False)
    config = model.config
    shape = {key: getattr(config, key, None) for key in _SHAPING} | {
        "architecture": cast(list[str], config.architectures)[0],
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    }
    text = json.dumps({"config": shape, "weights": dict(identity)}, sort_keys=True, default=str)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    return Backbone(model, tokenizer, name, weights, model.dtype, model.device, fingerprint)


def _checksums(files: list[Path]) -> dict[str, str]:
    """The SHA-256 of each file, remembered in the cache for as long as its size and time stay."""
    store = smollm2.cache_root() / "checksums.json"
    try:
        known = dict(json.loads(store.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        known = {}
    sums: dict[str, str] = {}
    for path in files:
        real = path.resolve()
        stat = real.stat()
        found = known.get(str(real))
        if re.fullmatch(r"[0-9a-f]{64}", real.name):  # the hub's cache names large files by their SHA-256
            sums[path.name] = real.name
        elif isinstance(found, list) and found[:2] == [stat.st_size, stat.st_mtime_ns]:
            sums[path.name] = str(found[2])
        else:
            sums[path.name] = file_sha256(real)
            known[str(real)] = [stat.st_size, stat.st_mtime_ns, sums[path.name]]
            with contextlib.suppress(OSError):
                store.parent.mkdir(parents=True, exist_ok=True)
                aside = store.with_suffix(f".{os.getpid()}")
                aside.write_text(json.dumps(known), encoding="utf-8")
                aside.replace(store)
    return sums


@contextlib.contextmanager
def _enough_memory(settings: BackboneSettings, device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        estimate = parameter_estimate(settings)
        need = f"{estimate[1]:,} bytes for its weights alone" if estimate else "more memory"
        raise HestError(
            f"{settings.name} does not fit on {device}: it needs {need}",
            "free the device, or choose a smaller backbone or bfloat16",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' bars and warnings off the terminal; what matters is said through ``progress``."""
    local: Any = transformers_logging
    client: Any = hub_utils
    levels = local.get_verbosity(), client.logging.get_verbosity()
    bars = local.is_progress_bar_enabled(), not client.are_progress_bars_disabled()
    local.set_verbosity_error()
    local.disable_progress_bar()
    client.logging.set_verbosity_error()
    client.disable_progress_bars()
    try:
        yield
    finally:
        local.set_verbosity(levels[0])
        client.logging.set_verbosity(levels[1])
        if bars[0]:
            local.enable_progress_bar()
        if bars[1]:
            client.enable_progress_bars()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
