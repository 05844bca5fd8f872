"""The backbone in given states, against blocks that are put together by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hestctl.kernels.reference import int8_linear
from hestctl.model import random_weights
from hestctl.model.backbone import _random as random_backbone
from hestctl.model.blocks import Int8Codes, in_states, int8_inside
from hestctl.records import FULL, INT8, OFF, BlockStates

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
STATES = BlockStates((FULL, OFF, INT8), (INT8, FULL, OFF))
IDS = torch.randint(10, 300, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    """A tiny model of three layers, its biases and norms drawn as well."""
    _, fields = random_weights.ARCHITECTURES["tiny"]
    config = random_weights.config_from(
        {"architectures": [request.param], **fields, "num_hidden_layers": 3}, "tiny"
    )
    made = random_backbone(config, "tiny", seed=0, device=torch.device("cpu"), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.3, generator=generator)
        elif parameter.dim() == 1:
            parameter.data.normal_(mean=1.0, std=0.1, generator=generator)
    return made.model


def in_int8(part: nn.Module) -> dict[nn.Linear, Callable[[Tensor], Tensor]]:
    """Each linear layer by the oracle of int8."""

    def by_oracle(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            y = int8_linear(x.flatten(0, -2), linear.weight).view(*x.shape[:-1], -1)
            return y if linear.bias is None else y + linear.bias

        return run

    return {m: by_oracle(m) for m in part.modules() if isinstance(m, nn.Linear)}


def by_hand(model: Any, states: BlockStates) -> Tensor:
    """Final hidden states of a causal pass."""
    inner = model.model
    x = inner.embed_tokens(IDS)
    turns = inner.rotary_emb(x, position_ids=torch.arange(IDS.shape[1])[None])
    for index, layer in enumerate(inner.layers):
        for block, (norm, part) in enumerate(
            ((layer.input_layernorm, layer.self_attn), (layer.post_attention_layernorm, layer.mlp))
        ):
            replaced = in_int8(part) if states.state(index, block) == INT8 else {}
            for linear, run in replaced.items():
                linear.forward = run  # type: ignore[method-assign]
            out = (
                part(hidden_states=norm(x), position_embeddings=turns, attention_mask=None)[0]
                if block == 0
                else part(norm(x))
            )
            for linear in replaced:
                del linear.forward
            if states.state(index, block) != OFF:
                x = x + out
    out: Tensor = inner.norm(x)
    return out


def hidden(model: Any) -> Tensor:
    out: Tensor = model.model(input_ids=IDS, use_cache=False).last_hidden_state
    return out


@pytest.mark.parametrize("cached", [False, True])
def test_the_states_are_what_they_say(model: Any, cached: bool) -> None:
    expected = by_hand(model, STATES)
    whole = hidden(model)
    with in_states(model.model.layers, STATES, Int8Codes(), cached=cached):
        mine = hidden(model)
    assert torch.allclose(mine, expected, atol=1e-5)
    assert (mine - whole).abs().max() > 0.1
    assert torch.equal(hidden(model), whole), "afterwards it is as it was"


def test_what_is_off_is_not_computed_unless_it_is_cached(model: Any) -> None:
    layers, ran = model.model.layers, []
    for index, layer in enumerate(layers):
        for name in ("q_proj", "o_proj"):
            getattr(layer.self_attn, name).register_forward_hook(lambda *_, i=index: ran.append((i, 0)))
        layer.mlp.down_proj.register_forward_hook(lambda *_, i=index: ran.append((i, 1)))
    for cached, expected in ((False, {(0, 0), (0, 1), (1, 1), (2, 0)}), (True, None)):
        ran.clear()
        with in_states(layers, STATES, Int8Codes(), cached=cached):
            hidden(model)
        assert set(ran) == (expected or {(index, block) for index in range(3) for block in range(2)})


@pytest.mark.parametrize("beams", [1, 3])
def test_a_cache_gives_the_tokens_of_no_cache(model: Any, beams: int) -> None:
    asked = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    with torch.no_grad():
        with in_states(model.model.layers, STATES, Int8Codes(), cached=True):
            with_cache = model.generate(input_ids=IDS, attention_mask=mask, **asked)
        with in_states(model.model.layers, STATES, Int8Codes()):
            without = model.generate(input_ids=IDS, attention_mask=mask, use_cache=False, **asked)
    assert torch.equal(with_cache, without)


def gradient(model: Any, states: BlockStates) -> Tensor:
    """Of a weight before all blocks, under some loss of the last hidden states."""
    norm = model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    norm.grad = None
    with in_states(model.model.layers, states, Int8Codes()):
        some_loss(hidden(model)).backward()
    found: Tensor = norm.grad
    return found


def some_loss(x: Tensor) -> Tensor:
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    return (x * weights).sum()


def test_gradients_pass_by_what_is_off(model: Any) -> None:
    states = BlockStates((FULL, OFF, FULL), (FULL, FULL, OFF))
    found = gradient(model, states)
    model.model.layers[0].input_layernorm.weight.grad = None
    some_loss(by_hand(model, states)).backward()
    assert torch.allclose(found, model.model.layers[0].input_layernorm.weight.grad, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, gradient(model, BlockStates.uniform(3)), rtol=1e-1)


def test_the_gradient_through_int8_is_that_of_the_weight(model: Any) -> None:
    linear = model.model.layers[0].mlp.gate_proj
    x = torch.randn(2, 3, linear.in_features, requires_grad=True)
    with int8_inside(model.model.layers[0].mlp, Int8Codes()):
        y = linear(x)
    weights = torch.randn(y.shape)
    (y * weights).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, weights @ linear.weight, atol=1e-5)


def test_checkpointing_changes_no_gradient(model: Any) -> None:
    model.train()
    plain = gradient(model, STATES)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ran: list[int] = []
    hook = model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: ran.append(1))
    found = gradient(model, STATES)
    hook.remove()
    assert len(ran) == 2, "the layers are to be run again in the backward pass"
    assert torch.equal(found, plain)


def test_what_is_trained_beside_a_weight_stays_in_full(model: Any) -> None:
    """As LoRA's matrices do: they change with every step, and need their gradient."""
    q_proj = model.model.layers[2].self_attn.q_proj
    extra = nn.Linear(q_proj.in_features, q_proj.out_features, bias=False)
    q_proj.add_module("lora", extra)
    q_proj.register_forward_hook(lambda module, args, out: out + module.lora(args[0]))
    with in_states(model.model.layers, STATES, Int8Codes()):
        some_loss(hidden(model)).backward()
    assert extra.weight.grad is not None and extra.weight.grad.abs().max() > 0


def patched(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@contextmanager
def failing(model: Any) -> Iterator[None]:
    hook = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        yield
    finally:
        hook.remove()


def test_nothing_stays_patched_after_an_exception(model: Any) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        failing(model),
        in_states(model.model.layers, STATES, Int8Codes()),
    ):
        assert patched(model)
        hidden(model)
    assert patched(model) == []
    # Fewer states than layers: what was patched before the fault was found is put back as well.
    with pytest.raises(IndexError), in_states(model.model.layers, BlockStates((OFF,), (INT8,)), Int8Codes()):
        pass
    assert patched(model) == []


def test_a_forward_that_stood_there_before_stands_there_after(model: Any) -> None:
    part = model.model.layers[1].self_attn
    own, calls = part.forward, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    part.forward = counted
    with in_states(model.model.layers, STATES, Int8Codes()):
        hidden(model)
        assert not calls
    hidden(model)
    assert len(calls) == 1
