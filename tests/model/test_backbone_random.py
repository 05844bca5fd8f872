"""Random weights: deterministic, exact in shape, and with a tokenizer that fits them."""

from __future__ import annotations

import time

import pytest
import torch

from hestctl.errors import HestError
from hestctl.model import random_weights
from hestctl.model.backbone import load_backbone, tiny_backbone
from hestctl.settings import BackboneSettings

CPU = torch.device("cpu")


def weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    config = random_weights.named_config("tiny")
    model, _ = random_weights.random_model(config, seed=seed, device=CPU, dtype=dtype)
    return model.state_dict()


def test_tiny_is_quick() -> None:
    tiny_backbone()
    start = time.monotonic()
    tiny_backbone()
    assert time.monotonic() - start < 0.5


def test_tiny_by_name_is_the_same_model() -> None:
    settings = BackboneSettings(name="tiny", weights="random", device="cpu")
    named, direct = load_backbone(settings, seed=3), tiny_backbone(3)
    assert (named.name, named.weights) == (direct.name, direct.weights) == ("tiny", "random")
    assert named.fingerprint == direct.fingerprint
    for key, value in named.model.state_dict().items():
        assert torch.equal(value, direct.model.state_dict()[key])


def test_seed_decides_weights_and_fingerprint() -> None:
    first, again, other = weights(), weights(), weights(seed=1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert tiny_backbone(0).fingerprint == tiny_backbone(0).fingerprint != tiny_backbone(1).fingerprint
    assert tiny_backbone(0).fingerprint != tiny_backbone(0, num_hidden_layers=3).fingerprint


def test_global_random_state_is_neither_used_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weights()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(weights()["lm_head.weight"], first["lm_head.weight"])


def test_narrow_dtype_is_the_rounded_wide_one() -> None:
    wide, narrow = weights(), weights(torch.bfloat16)
    assert all(torch.equal(wide[key].bfloat16(), narrow[key]) for key in wide)


def test_piecewise_drawing_fills_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_weights, "_PIECE", 1000)
    for name, value in weights().items():
        if value.dim() > 1:
            assert value.std().item() == pytest.approx(0.1, rel=0.1), name
            assert abs(value.mean().item()) < 0.01, name
        else:
            assert torch.equal(value, torch.ones_like(value)), name


def test_biases_are_zero_and_rotary_frequencies_exact() -> None:
    _, fields = random_weights.ARCHITECTURES["tiny"]
    config = random_weights.config_from({"architectures": ["Qwen2ForCausalLM"], **fields}, "small qwen")
    model, _ = random_weights.random_model(config, seed=0, device=CPU, dtype=torch.bfloat16)
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert biases
    assert all(not bias.any() for bias in biases)
    expected = 1.0 / 10000.0 ** (torch.arange(0, 16, 2, dtype=torch.float32) / 16)
    frequencies = model.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    assert torch.allclose(frequencies, expected)


def test_tied_embeddings_stay_one_tensor() -> None:
    tied = tiny_backbone(tie_word_embeddings=True).model
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    free = tiny_backbone().model
    assert free.lm_head.weight is not free.model.embed_tokens.weight


@pytest.mark.parametrize("name", sorted(random_weights.ARCHITECTURES))
def test_architectures_are_complete(name: str) -> None:
    config = random_weights.named_config(name)
    model = random_weights.meta_model(config, torch.bfloat16)
    assert type(model).__name__ == random_weights.ARCHITECTURES[name][0]
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    assert len(model.model.layers) == config.num_hidden_layers
    tokenizer = random_weights.byte_tokenizer(config)
    assert len(tokenizer) == 259 <= config.vocab_size


@pytest.mark.parametrize(
    "text", ["plain", "naïve 日本語 😀", " two  spaces\n\ttab ", "it 's n't , .", "\x00\x7f"]
)
def test_byte_tokenizer_round_trips(text: str) -> None:
    tokenizer = tiny_backbone().tokenizer
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert max(ids) < 256
    assert tokenizer.decode(ids) == text


def test_chat_turns_are_chatml() -> None:
    backbone = tiny_backbone()
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    text = backbone.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = backbone.tokenizer(text, add_special_tokens=False).input_ids
    assert ids.count(backbone.stop_ids[0]) == 2
    assert backbone.tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi\nassistant\nyo\nassistant\n"


def test_ids_beyond_the_tokenizer_decode_to_nothing() -> None:
    assert tiny_backbone().tokenizer.decode([65, 300, 319]) == tiny_backbone().tokenizer.decode([65])


def test_generation_stops_and_pads_with_the_tokenizer_s_own() -> None:
    backbone = tiny_backbone()
    ids = backbone.tokenizer("abc", return_tensors="pt").input_ids
    out = backbone.model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert out.shape == (1, 8)
    assert backbone.model.generation_config.eos_token_id == 258
    assert backbone.model.config.pad_token_id == 256


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(HestError, match="no room for 259 byte tokens"):
        tiny_backbone(vocab_size=128)
