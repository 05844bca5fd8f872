"""The backbone in given states, against blocks that are put together by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hestctl.kernels.reference import int8_linear
from hestctl.model import random_weights
from hestctl.model.backbone import _random as random_backbone
from hestctl.model.blocks import Int8Codes, in_states
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


def by_hand(model: Any, states: BlockStates) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
    """Final hidden states, and what each block would add to the residual stream, of a causal pass."""
    inner, added = model.model, {}
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
            added[index, block] = out
            if states.state(index, block) != OFF:
                x = x + out
    return inner.norm(x), added


def hidden(model: Any) -> Tensor:
    out: Tensor = model.model(input_ids=IDS, use_cache=False).last_hidden_state
    return out


@pytest.mark.parametrize("cached", [False, True])
def test_the_states_are_what_they_say(model: Any, cached: bool) -> None:
    expected, _ = by_hand(model, STATES)
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


def target_loss(x: Tensor) -> Tensor:
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    return (x * weights).sum()


def gradients(model: Any, *, trained: nn.Parameter | None = None) -> tuple[Tensor, Tensor | None]:
    on_L2 = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    with in_states(model.model.layers, STATES, Int8Codes(), on_L2=on_L2):
        target_loss(hidden(model)).backward()
    assert on_L2.grad is not None
    return on_L2.grad, None if trained is None else trained.grad


def test_the_gradient_of_being_on_is_what_a_block_would_add(model: Any) -> None:
    """<g, Delta>, with g the loss's gradient at the sum that the block would join."""
    found, _ = gradients(model)
    _, added = by_hand(model, STATES)
    for index, block in ((1, 0), (2, 1)):
        probe = torch.zeros_like(added[index, block], requires_grad=True)
        layer = model.model.layers[index]
        part = (layer.self_attn, layer.mlp)[block]

        def joined(_module: nn.Module, _args: Any, out: Any, probe: Tensor = probe) -> Any:
            return (probe, *out[1:]) if isinstance(out, tuple) else probe

        kept = BlockStates(
            tuple(FULL if (index, block) == (i, 0) else s for i, s in enumerate(STATES.attention)),
            tuple(FULL if (index, block) == (i, 1) else s for i, s in enumerate(STATES.mlp)),
        )
        hook = part.register_forward_hook(joined)
        with in_states(model.model.layers, kept, Int8Codes()):
            target_loss(hidden(model)).backward()
        hook.remove()
        assert probe.grad is not None
        assert float(found[index, block]) == pytest.approx(
            float((probe.grad * added[index, block]).sum()), rel=1e-4
        )
        assert abs(float(found[index, block])) > 1e-3


def test_gradients_flow_past_what_is_off_and_through_what_is_int8(model: Any) -> None:
    """A trained weight before it all; the int8 block's own Jacobian is the unquantised one's."""
    norm = model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    found, by_states = gradients(model, trained=norm)
    assert by_states is not None and by_states.abs().max() > 0
    norm.grad = None
    with in_states(model.model.layers, STATES, Int8Codes()):
        target_loss(hidden(model)).backward()
    # Off: neither its value nor its gradient; so with and without ``on_L2`` the rest learns the same.
    assert norm.grad is not None
    assert torch.allclose(by_states, norm.grad, rtol=1e-4, atol=1e-5)
    assert (found != 0).all()


def test_checkpointing_changes_no_gradient(model: Any) -> None:
    norm = model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    model.train()
    plain, plain_norm = gradients(model, trained=norm)
    norm.grad = None
    model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed = []
    hook = model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: recomputed.append(1))
    found, found_norm = gradients(model, trained=norm)
    hook.remove()
    assert len(recomputed) == 2, "the layers are to be run again in the backward pass"
    assert torch.equal(found, plain)
    assert found_norm is not None and plain_norm is not None
    assert torch.equal(found_norm, plain_norm)


def test_what_is_trained_beside_a_weight_stays_in_full(model: Any) -> None:
    """As LoRA's matrices do: they change with every step, and need their gradient."""
    q_proj = model.model.layers[2].self_attn.q_proj
    extra = nn.Linear(q_proj.in_features, q_proj.out_features, bias=False)
    q_proj.add_module("lora", extra)
    q_proj.register_forward_hook(lambda module, args, out: out + module.lora(args[0]))
    with in_states(model.model.layers, STATES, Int8Codes()):
        target_loss(hidden(model)).backward()
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


@pytest.mark.parametrize("with_on", [False, True])
def test_nothing_stays_patched_after_an_exception(model: Any, with_on: bool) -> None:
    on_L2 = torch.ones(3, 2) if with_on else None

    def opened() -> AbstractContextManager[None]:
        return in_states(model.model.layers, STATES, Int8Codes(), on_L2=on_L2)

    with pytest.raises(ZeroDivisionError), failing(model), opened():
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
