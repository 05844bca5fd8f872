"""int8 codes of a backbone's blocks on disk: written once, verified whenever they are read.

One safetensors file a block, ``layer-003-mlp.safetensors``, holds ``<module>.q`` (int8) and
``<module>.scale`` (fp32) of each linear layer. A folder is of one backbone and serves all its plans. The
codes are those of the backbone as it was loaded: one that LoRA was merged into has other weights under the
same fingerprint.

Shape legend: M outputs, K inputs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hestctl.durable import sync
from hestctl.errors import HestError
from hestctl.kernels.reference import quantise_rows
from hestctl.model.backbone import Backbone
from hestctl.model.blocks import MODULES
from hestctl.records import BLOCKS, INT8, BlockStates

Codes = Mapping[tuple[int, str], tuple[Tensor, Tensor]]
"""int8 values (M, K) and fp32 scales (M,) by layer and module name, such as (3, "gate_proj")."""


def write_codes(folder: Path, backbone: Backbone, blocks: BlockStates) -> None:
    """Put the codes of every int8 block into ``folder``; what is there and whole stays.

    Each file is there whole or not at all, and processes that write at once take turns. Raises HestError
    when one cannot be written.
    """
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            for left_by_a_killed_writer in folder.glob(".*.aside"):
                left_by_a_killed_writer.unlink()
            for path, layer, block in _files(folder, blocks):
                if not _is_whole(path, backbone):
                    _write(path, _quantised(backbone, layer, block), backbone.fingerprint)
            sync(folder)
    except (OSError, SafetensorError) as error:
        raise HestError(
            f"cannot write int8 codes to {folder}: {error}",
            "free space there or mend its permissions; what was written before is intact",
        ) from error


def read_codes(folder: Path, backbone: Backbone, blocks: BlockStates) -> Codes:
    """The codes of every int8 block, on the CPU.

    Raises HestError, naming the file, where one is missing, damaged or another backbone's.
    """
    codes: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    for path, layer, _ in _files(folder, blocks):
        tensors = _read(path, backbone)
        for name in (key.removesuffix(".q") for key in tensors if key.endswith(".q")):
            codes[layer, name] = tensors[f"{name}.q"], tensors[f"{name}.scale"]
    return codes


def _files(folder: Path, blocks: BlockStates) -> list[tuple[Path, int, int]]:
    """Where the codes of each int8 block stand, with its layer and its index into ``BLOCKS``."""
    return [
        (folder / f"layer-{layer:03d}-{name}.safetensors", layer, block)
        for layer in range(blocks.layers)
        for block, name in enumerate(BLOCKS)
        if blocks.state(layer, block) == INT8
    ]


def _quantised(backbone: Backbone, layer: int, block: int) -> dict[str, Tensor]:
    tensors = {}
    for name, module in getattr(backbone.layers[layer], MODULES[block]).named_children():
        if isinstance(module, nn.Linear):
            q_MK, scale_M1 = quantise_rows(module.weight.detach())
            tensors[f"{name}.q"], tensors[f"{name}.scale"] = q_MK.cpu(), scale_M1[:, 0].cpu().contiguous()
    return tensors


def _write(path: Path, tensors: Mapping[str, Tensor], fingerprint: str) -> None:
    aside = path.with_name(f".{path.name}.aside")
    try:
        save_file(dict(tensors), aside, {"fingerprint": fingerprint, "sha256": _sha256(path.stem, tensors)})
        sync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _is_whole(path: Path, backbone: Backbone) -> bool:
    try:
        _read(path, backbone)
    except HestError:
        return False
    return True


def _read(path: Path, backbone: Backbone) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError:
        raise _refused(path, "it is not there") from None
    except (OSError, SafetensorError) as error:
        raise _refused(path, str(error)) from None
    if metadata.get("fingerprint") != backbone.fingerprint:
        raise _refused(path, f"they are of another backbone than {backbone.name}")
    if metadata.get("sha256") != _sha256(path.stem, tensors):
        raise _refused(path, "the checksum differs")
    return tensors


def _refused(path: Path, why: str) -> HestError:
    return HestError(f"no int8 codes to be had from {path}: {why}", "`hestctl harden` writes it again")


def _sha256(stem: str, tensors: Mapping[str, Tensor]) -> str:
    """Over the block's name too: a file that was renamed is another block's."""
    found = hashlib.sha256(stem.encode())
    for name in sorted(tensors):
        found.update(f"{name} {list(tensors[name].shape)} {tensors[name].dtype}".encode())
        found.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
