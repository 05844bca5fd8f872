"""int8 codes on disk: bit for bit those of quantising anew, refused when damaged, never half written."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hestctl.data.prompts import Encoded
from hestctl.errors import HestError
from hestctl.generation.native import NativeGenerator
from hestctl.hardening import artefact
from hestctl.hardening.artefact import read_codes, write_codes
from hestctl.kernels.int8 import Int8Linear
from hestctl.kernels.products import Int8Weight
from hestctl.model.backbone import Backbone
from hestctl.records import FULL, INT8, OFF, BlockStates

BLOCKS = BlockStates((INT8, FULL), (OFF, INT8))
FILES = {"layer-000-attention.safetensors", "layer-001-mlp.safetensors"}


def stored(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".lock")}


def test_codes_are_those_of_the_weights_bit_for_bit(backbone: Backbone, tmp_path: Path) -> None:
    folder = tmp_path / "int8"
    write_codes(folder, backbone, BLOCKS)
    assert stored(folder) == FILES
    codes = read_codes(folder, backbone, BLOCKS)
    expected = {(0, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    assert set(codes) == expected | {(1, name) for name in ("gate_proj", "up_proj", "down_proj")}
    for (layer, name), (q_MK, scale_M) in codes.items():
        part = backbone.layers[layer].self_attn if layer == 0 else backbone.layers[layer].mlp
        module = getattr(part, name)
        assert isinstance(module, nn.Linear)
        anew = Int8Linear([module.weight])
        assert torch.equal(q_MK, anew.weight.q_MK) and q_MK.dtype == torch.int8
        assert torch.equal(scale_M, anew.weight.scale_M) and scale_M.dtype == torch.float32
        x = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(0))
        assert torch.equal(Int8Linear.quantised(Int8Weight(q_MK, scale_M))(x), anew(x))


def test_an_engine_of_codes_is_the_engine_that_quantises(
    tmp_path: Path, backbone: Backbone, samples: Callable[..., list[Encoded]]
) -> None:
    write_codes(tmp_path, backbone, BLOCKS)
    codes = read_codes(tmp_path, backbone, BLOCKS)
    rows = samples(3)
    anew, read = (NativeGenerator(backbone, None, None, blocks=BLOCKS, codes=c) for c in (None, codes))
    assert torch.equal(anew.label_scores(rows)[0], read.label_scores(rows)[0])
    # It is the codes that run, not the weights beside them.
    other = {key: (torch.zeros_like(q_MK), scale_M) for key, (q_MK, scale_M) in codes.items()}
    changed = NativeGenerator(backbone, None, None, blocks=BLOCKS, codes=other)
    assert not torch.equal(changed.label_scores(rows)[0], read.label_scores(rows)[0])


def test_a_folder_serves_all_plans_and_is_written_once(backbone: Backbone, tmp_path: Path) -> None:
    write_codes(tmp_path, backbone, BLOCKS)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in FILES}
    more = BlockStates((INT8, FULL), (INT8, INT8))
    write_codes(tmp_path, backbone, more)
    assert stored(tmp_path) == FILES | {"layer-000-mlp.safetensors"}
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in FILES} == before
    assert len(read_codes(tmp_path, backbone, more)) == 10
    write_codes(tmp_path / "none", backbone, BlockStates.uniform(2))
    assert read_codes(tmp_path / "none", backbone, BlockStates.uniform(2)) == {}


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def unsigned(path: Path) -> None:
    save_file(load_file(path), path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flipped, "the checksum differs"),
        (halved, "incomplete"),
        (Path.unlink, "it is not there"),
        (unsigned, "they are of another backbone than tiny"),
        (lambda path: path.write_bytes(b""), "header"),
    ],
)
def test_damage_is_refused_and_mended(
    damage: Callable[[Path], object], says: str, backbone: Backbone, tmp_path: Path
) -> None:
    write_codes(tmp_path, backbone, BLOCKS)
    path = tmp_path / "layer-001-mlp.safetensors"
    whole = safetensors.torch.load(path.read_bytes())
    damage(path)
    in_place = path.stat().st_ino if path.exists() else None
    with pytest.raises(HestError, match=says) as refused:
        read_codes(tmp_path, backbone, BLOCKS)
    assert str(path) in refused.value.message
    assert refused.value.hint == "`hestctl harden` writes it again"
    write_codes(tmp_path, backbone, BLOCKS)
    assert path.stat().st_ino != in_place, "whoever reads the damaged file must not see it change"
    mended = load_file(path)
    assert set(mended) == set(whole)
    assert all(torch.equal(mended[name], whole[name]) for name in whole)


def test_another_backbone_s_and_another_block_s_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    uniform = BlockStates.uniform(2, INT8)
    write_codes(tmp_path, backbone, uniform)
    with pytest.raises(HestError, match="another backbone"):
        read_codes(tmp_path, replace(backbone, fingerprint="0" * 64), uniform)
    (tmp_path / "layer-000-mlp.safetensors").replace(tmp_path / "layer-001-mlp.safetensors")
    with pytest.raises(HestError, match=r"layer-001-mlp\.safetensors: the checksum differs"):
        read_codes(tmp_path, backbone, BlockStates((FULL, FULL), (FULL, INT8)))


def test_a_full_disk_leaves_what_was_there(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_codes(tmp_path, backbone, BLOCKS)

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artefact, "save_file", full)
    with pytest.raises(HestError, match="No space left"):
        write_codes(tmp_path, backbone, BlockStates.uniform(2, INT8))
    assert stored(tmp_path) == FILES
    assert len(read_codes(tmp_path, backbone, BLOCKS)) == 7


KILLED = """
import os, signal, sys
from pathlib import Path
from hestctl.hardening import artefact
from hestctl.model.backbone import tiny_backbone
from hestctl.records import INT8, BlockStates

save, written = artefact.save_file, []

def half(tensors, path, metadata):
    save(tensors, path, metadata)
    if written:
        path.write_bytes(path.read_bytes()[:1000])
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(path)

artefact.save_file = half
artefact.write_codes(Path(sys.argv[1]), tiny_backbone(), BlockStates.uniform(2, INT8))
"""


def test_a_killed_writer_leaves_no_half_file(backbone: Backbone, tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    left = {path.name for path in tmp_path.glob("*.safetensors")}
    assert left == {"layer-000-attention.safetensors"}
    read_codes(tmp_path, backbone, BlockStates((INT8, FULL), (FULL, FULL)))
    (tmp_path / ".layer-007-mlp.safetensors.aside").write_bytes(b"of a plan that nobody makes again")
    write_codes(tmp_path, backbone, BlockStates.uniform(2, INT8))
    assert len(read_codes(tmp_path, backbone, BlockStates.uniform(2, INT8))) == 14
    assert not list(tmp_path.glob(".*.aside")), "nothing of the killed writer stays"
