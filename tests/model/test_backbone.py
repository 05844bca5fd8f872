"""Loading from folders: what is accepted, what is refused, and that nothing foreign is ever run."""

from __future__ import annotations

import contextlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hestctl.errors import Exit, HestError
from hestctl.model import backbone as module
from hestctl.model import hub, random_weights
from hestctl.model.backbone import (
    Backbone,
    load_backbone,
    parameter_estimate,
    resolve_device,
    resolve_dtype,
    tiny_backbone,
)
from hestctl.settings import BackboneSettings

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HESTCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model saved as transformers saves it."""
    return saved(tiny_backbone(), tmp_path / "model")


def saved(backbone: Backbone, path: Path, **options: Any) -> Path:
    backbone.model.save_pretrained(path, **options)
    backbone.tokenizer.save_pretrained(path)
    return path


def load(path: Path, **more: Any) -> Backbone:
    return load_backbone(BackboneSettings(name=str(path), device="cpu", **more))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class Bomb:
    """A pickle that leaves a mark when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_folder_loads_as_saved(folder: Path) -> None:
    original, loaded = tiny_backbone(), load(folder)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(original.model(ids).logits, loaded.model(ids).logits)
    assert (loaded.name, loaded.weights) == (str(folder), "pretrained")
    assert (loaded.dtype, loaded.device) == (torch.float32, CPU)
    assert len(loaded.layers) == loaded.num_layers == 2
    assert loaded.hidden_size == 64
    assert loaded.stop_ids == (258,)
    assert loaded.pad_id == 256


def test_backbone_is_frozen_and_in_evaluation_mode(folder: Path) -> None:
    for backbone in (tiny_backbone(), load(folder)):
        assert not any(p.requires_grad for p in backbone.model.parameters())
        assert not backbone.model.training
        assert backbone.model.config._attn_implementation == "sdpa"


def test_progress_is_told_and_nothing_is_printed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []
    load_backbone(BackboneSettings(name=str(folder), device="cpu"), progress=told.append)
    assert told == [f"loading {folder} in float32 on cpu"]
    assert capfd.readouterr() == ("", "")


def test_dtype_is_applied(folder: Path) -> None:
    loaded = load(folder, dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", list(random_weights.FAMILIES))
def test_every_family_loads(tmp_path: Path, family: str) -> None:
    fields = {**random_weights.ARCHITECTURES["tiny"][1], "architectures": [family]}
    (tmp_path / "config.json").write_text(
        json.dumps({**fields, "model_type": family.split("For")[0].lower()})
    )
    made = load(tmp_path, weights="random")
    loaded = load(saved(made, tmp_path / "copy"))
    assert type(loaded.model).__name__ == type(made.model).__name__ == family
    ids = torch.arange(16).view(1, 16)
    with torch.no_grad():
        assert torch.equal(made.model(ids).logits, loaded.model(ids).logits)


def test_sharded_folder_loads_and_a_lost_shard_is_named(tmp_path: Path) -> None:
    path = saved(tiny_backbone(), tmp_path / "model", max_shard_size="100KB")
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 1
    load(path)
    shards[-1].unlink()
    with pytest.raises(HestError, match=shards[-1].name):
        load(path)


def test_fingerprint_follows_the_weights(folder: Path, cache: Path) -> None:
    first = load(folder).fingerprint
    assert load(folder, dtype="bfloat16").fingerprint == first
    assert list(json.loads((cache / "checksums.json").read_text())) == [str(folder / "model.safetensors")]
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder).fingerprint != first


def test_fingerprint_follows_the_configuration(folder: Path) -> None:
    first = load(folder).fingerprint
    edit(folder / "config.json", rms_norm_eps=1e-4)
    assert load(folder).fingerprint != first


def test_checksums_are_taken_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(folder).fingerprint
    monkeypatch.setattr(module, "file_sha256", lambda path: pytest.fail(f"read {path} again"))
    assert load(folder).fingerprint == first


def test_unwritable_cache_does_not_matter(folder: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    assert load(folder).fingerprint


def test_missing_pad_token_becomes_the_end_token(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", pad_token=None)
    assert load(folder).pad_id == 258


def test_stop_ids_hold_every_end(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[258, 7])
    edit(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    assert load(folder).stop_ids == (256, 258, 7)


def test_foreign_code_is_never_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    edit(
        folder / "config.json",
        auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
        attn_implementation="someone/kernels",
    )
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    assert load(folder).num_layers == 2
    load(folder, weights="random")
    edit(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    with contextlib.suppress(HestError):  # refusing it is as good as ignoring its class
        load(folder)
    edit(folder / "config.json", architectures=["EvilForCausalLM"], model_type="evil")
    for weights in ("pretrained", "random"):
        with pytest.raises(HestError, match="EvilForCausalLM") as caught:
            load(folder, weights=weights)
        assert "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM" in (caught.value.hint or "")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickled_weights_are_refused_unopened(folder: Path, tmp_path: Path, name: str) -> None:
    mark = tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(HestError, match=f"pickled weights.*{name}.*refused") as caught:
        load(folder)
    assert "safetensors" in (caught.value.hint or "")
    assert not mark.exists()


@pytest.mark.parametrize("shard", ["pytorch_model-1.bin", "../model.safetensors", "/etc/x.safetensors"])
def test_index_may_name_only_safetensors_beside_it(folder: Path, tmp_path: Path, shard: str) -> None:
    mark = tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model-1.bin").write_bytes(pickle.dumps(Bomb(mark)))
    index = {"metadata": {}, "weight_map": {"model.norm.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HestError, match="which is not read"):
        load(folder)
    assert not mark.exists()


def test_pickle_named_safetensors_is_refused_unopened(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(HestError, match="cannot be read"):
        load(folder)
    assert not mark.exists()


def test_truncated_weights_are_refused(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1000])
    with pytest.raises(HestError, match="cannot be read"):
        load(folder)


def test_absent_tensors_are_not_made_up(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HestError, match=r"1 tensors are missing.*layers\.1\.mlp\.up_proj"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ("config.json", {"hidden_size": "wide"}, "not usable"),
        ("config.json", {"hidden_size": -64}, "not usable"),
        ("config.json", {"hidden_size": 128}, "cannot be read|wrong shape"),
        ("config.json", {"architectures": ["BertModel"]}, "BertModel"),
        ("config.json", {"architectures": None, "model_type": "gpt2"}, "gpt2"),
        ("config.json", {"architectures": "LlamaForSequenceClassification"}, "LlamaForSequence"),
    ],
)
def test_unfit_configurations_are_refused(folder: Path, file: str, changes: Any, message: str) -> None:
    edit(folder / file, **changes)
    with pytest.raises(HestError, match=message):
        load(folder)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_damaged_config_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(HestError, match=r"no usable config\.json"):
        load(folder)


def test_base_checkpoint_without_architectures_is_known_by_its_type(folder: Path) -> None:
    edit(folder / "config.json", architectures=None)
    assert type(load(folder).model).__name__ == "LlamaForCausalLM"


def test_adapter_folder_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(HestError, match="is an adapter") as caught:
        load(folder)
    assert "merge_and_unload" in (caught.value.hint or "")


def test_tokenizer_must_be_there_and_fit(folder: Path) -> None:
    extra = tiny_backbone().tokenizer
    extra.add_tokens([f"<{i}>" for i in range(100)])
    extra.save_pretrained(folder)
    with pytest.raises(HestError, match="359 tokens in the tokenizer, 320 in the model"):
        load(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(HestError, match="tokenizer"):
        load(folder)


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HestError, match=r"config\.json") as caught:
        load(tmp_path)
    assert caught.value.exit_code == Exit.USAGE


def test_revision_of_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(HestError, match="not a hub model"):
        load(folder, revision="main")


@pytest.mark.parametrize(
    "name", ["smollm2-135", "nope", "a/b/c", "../x", "./missing/folder", "http://x/y", "x/y.gguf", ""]
)
def test_unknown_names_are_refused_without_asking_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(hub, "HfApi", lambda: pytest.fail("asked the hub"))
    for call in (load_backbone, parameter_estimate):
        with pytest.raises(HestError, match="no backbone called") as caught:
            call(BackboneSettings(name=name))
        assert caught.value.exit_code == Exit.USAGE
    if name == "smollm2-135":
        assert "did you mean 'smollm2-135m'" in caught.value.message


def test_architectures_have_no_trained_weights() -> None:
    for call in (load_backbone, parameter_estimate):
        with pytest.raises(HestError, match="not trained weights"):
            call(BackboneSettings(name="llama-2-7b"))


def test_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    with pytest.raises(HestError, match="no CUDA device") as caught:
        resolve_device("cuda")
    assert caught.value.exit_code == Exit.NO_DEVICE
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("float16", CPU) == torch.float16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    gpu = resolve_device("auto")
    assert gpu == resolve_device("cuda") == torch.device("cuda:1")
    for capability, dtype in (((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert resolve_dtype("auto", gpu) == dtype


def test_out_of_memory_names_the_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "_load_model", full)
    with pytest.raises(HestError, match=r"does not fit on cpu: it needs 509,184 bytes"):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "parameters", "size_bytes"),
    [
        ({"name": "llama-2-7b", "weights": "random", "dtype": "bfloat16"}, 6_738_415_616, 13_476_831_232),
        ({"name": "qwen2.5-7b", "weights": "random", "dtype": "float16"}, 7_615_616_512, 15_231_233_024),
        ({"name": "smollm2-135m", "device": "cpu"}, 134_515_008, 538_060_032),
        ({"name": "smollm2-135m", "device": "cuda"}, 134_515_008, 269_030_016),
        ({"name": "smollm2-135m-gguf", "device": "cpu"}, 134_515_008, 538_060_032),
    ],
)
def test_estimate_needs_nothing_but_the_name(settings: Any, parameters: int, size_bytes: int) -> None:
    assert parameter_estimate(BackboneSettings(**settings)) == (parameters, size_bytes)


def test_estimate_of_a_folder_reads_only_its_config(folder: Path) -> None:
    expected = sum(p.numel() for p in tiny_backbone().model.parameters())
    (folder / "model.safetensors").unlink()
    estimate = parameter_estimate(BackboneSettings(name=str(folder), dtype="float32"))
    assert estimate == (expected, 4 * expected)
