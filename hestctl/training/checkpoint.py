"""Atomic checkpoints: written aside, manifest last, renamed; a damaged one is skipped for the one before.

Tensors are safetensors, the rest is JSON: nothing that could run code is ever loaded.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hestctl.durable import file_sha256, sync
from hestctl.errors import HestError

_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Tensors by name and a JSON-able state, as they were at one optimiser step."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write ``folder/step-00000012`` so that it is there whole or not at all.

    Raises HestError when the disk is full; earlier checkpoints stay.
    """
    final = folder / f"step-{step:08d}"
    aside = folder / f".aside-{step:08d}-{os.getpid()}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside / _TENSORS)
        (aside / _STATE).write_text(json.dumps({"step": step, **state}))
        sums = {name: file_sha256(aside / name) for name in (_TENSORS, _STATE)}
        (aside / _MANIFEST).write_text(json.dumps(sums))
        for name in (_TENSORS, _STATE, _MANIFEST):
            sync(aside / name)
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise HestError(
            f"cannot write the checkpoint {final}: {error}",
            f"it needs {size:,} bytes; the earlier checkpoints are untouched: free space, then --resume",
        ) from error
    return final


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and a warning for each newer one that is damaged."""
    warnings: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        problem = _problem(path)
        if problem is None:
            state = json.loads((path / _STATE).read_text())
            return Checkpoint(state["step"], load_file(path / _TENSORS), state), warnings
        warnings.append(f"checkpoint {path} is damaged ({problem}): taking the one before")
    return None, warnings


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep``, oldest first, and what a killed writer left behind."""
    paths = sorted(folder.glob("step-*"))
    for path in [*paths[: max(0, len(paths) - keep)], *folder.glob(".aside-*")]:
        shutil.rmtree(path, ignore_errors=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """One safetensors file, written aside and renamed."""
    aside = path.with_name(f".{path.name}.aside")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, aside, metadata=dict(metadata))
    sync(aside)
    os.replace(aside, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises HestError when it is missing, damaged, or something else."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise HestError(f"no adapter at {path}", "train the method again") from None
    except (SafetensorError, OSError) as error:
        raise HestError(
            f"{path} is not a whole safetensors file: {error}", "train the method again"
        ) from None


def _problem(path: Path) -> str | None:
    try:
        sums = json.loads((path / _MANIFEST).read_text())
    except (OSError, ValueError):
        return "no readable manifest"
    for name in (_TENSORS, _STATE):
        if not (path / name).is_file():
            return f"{name} is missing"
        if file_sha256(path / name) != sums.get(name):
            return f"the checksum of {name} differs"
    return None
