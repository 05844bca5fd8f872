"""Sensitivities against blocks that are taken out by hand, and differences of losses.

Shape legend: L layers, 2 blocks (attention, MLP), B batch, T tokens, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hestctl.data.prompts import Encoded, train_batch
from hestctl.kernels.reference import int8_linear
from hestctl.model import random_weights
from hestctl.model.backbone import Backbone
from hestctl.model.backbone import _random as random_backbone
from hestctl.model.likelihood import answer_loss
from hestctl.model.sensitivity import Sensitivities, by_gradients, exact, uniform

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
LAST = (("self_attn", "o_proj"), ("mlp", "down_proj"))
"""The linear layer through which all of a block's output goes."""

Samples = Callable[..., list[Encoded]]


@pytest.fixture(params=FAMILIES)
def known(request: pytest.FixtureRequest) -> Backbone:
    """Three layers whose blocks are worth something: larger weights than a fresh model has."""
    _, fields = random_weights.ARCHITECTURES["tiny"]
    config = random_weights.config_from(
        {"architectures": [request.param], **fields, "num_hidden_layers": 3}, "tiny"
    )
    made = random_backbone(config, "tiny", seed=0, device=torch.device("cpu"), dtype=torch.float32)
    for parameter in made.model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 3
    return made


def never() -> None:
    """No one interrupts."""


def loss_of(backbone: Backbone, row: Encoded) -> Tensor:
    """Nats per answer token."""
    return answer_loss(backbone, train_batch([row], backbone.pad_id)) / len(row.answer_ids)


def over_blocks(backbone: Backbone, of: Callable[[int, int], float]) -> Tensor:
    return torch.tensor([[of(layer, block) for block in range(2)] for layer in range(backbone.num_layers)])


def last_linear(backbone: Backbone, layer: int, block: int) -> torch.nn.Linear:
    part, name = LAST[block]
    found = getattr(getattr(backbone.layers[layer], part), name)
    assert isinstance(found, torch.nn.Linear)
    return found


@torch.no_grad()
def without(backbone: Backbone, row: Encoded, layer: int, block: int) -> float:
    """The loss with a block whose last weights are zero."""
    linear = last_linear(backbone, layer, block)
    kept = linear.weight.clone()
    linear.weight.zero_()
    loss = float(loss_of(backbone, row))
    linear.weight.copy_(kept)
    return loss


def test_exact_is_the_loss_of_each_block_left_out(known: Backbone, samples: Samples) -> None:
    rows = samples(3)
    found = exact(known, rows, "data", never)
    whole = [float(loss_of(known, row)) for row in rows]
    each = [
        over_blocks(known, lambda i, b, row=row, base=base: without(known, row, i, b) - base)  # type: ignore[misc]
        for row, base in zip(rows, whole, strict=True)
    ]
    assert torch.allclose(torch.tensor(found.off), torch.stack(each).mean(0), atol=2e-5)
    assert torch.allclose(torch.tensor(found.off_error), torch.stack(each).std(0) / 3**0.5, atol=2e-5)
    assert torch.tensor(found.off).abs().max() > 0.05, "blocks that are worth nothing tell nothing"
    assert (found.kind, found.samples, found.data_hash) == ("exact", 3, "data")
    assert found.fingerprint == known.fingerprint
    assert found.int8 == by_gradients(known, rows, "data", never).int8
    assert [float(loss_of(known, row)) for row in rows] == whole, "afterwards it is as it was"


@torch.no_grad()
def rounded(backbone: Backbone, row: Encoded, layer: int, block: int, share: float) -> float:
    """The loss where that share of what int8 changes in a block's output is added to it."""
    part = getattr(backbone.layers[layer], LAST[block][0])

    def move(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        linears = [one for one in module.modules() if isinstance(one, torch.nn.Linear)]
        for linear in linears:
            linear.forward = lambda x, one=linear: by_oracle(one, x)  # type: ignore[method-assign, misc]
        changed = module.forward(*args, **kwargs)
        for linear in linears:
            del linear.forward
        plain, other = (out[0] if isinstance(out, tuple) else out for out in (output, changed))
        moved = plain + share * (other - plain)
        return (moved, None) if isinstance(output, tuple) else moved

    hook = part.register_forward_hook(move, with_kwargs=True)
    loss = float(loss_of(backbone, row).double())
    hook.remove()
    return loss


def by_oracle(linear: torch.nn.Linear, x: Tensor) -> Tensor:
    y = int8_linear(x.flatten(0, -2), linear.weight).view(*x.shape[:-1], -1)
    return y if linear.bias is None else y + linear.bias


def test_int8_is_the_slope_towards_it_and_nearly_the_loss_in_it(known: Backbone, samples: Samples) -> None:
    (row,) = rows = samples(1)
    found = torch.tensor(by_gradients(known, rows, "data", never).int8)
    # A step of 1 is int8 itself; float32 can tell no smaller differences than those of a few steps.
    both = [over_blocks(known, lambda i, b, s=s: rounded(known, row, i, b, s)) for s in (-2.0, 2.0)]  # type: ignore[misc]
    slope = (both[1] - both[0]) / 4
    assert torch.linalg.norm(found - slope) < 0.05 * torch.linalg.norm(slope)
    whole = float(loss_of(known, row))
    itself = over_blocks(known, lambda i, b: rounded(known, row, i, b, 1.0)) - whole
    assert torch.linalg.norm(found - itself) < 0.3 * torch.linalg.norm(itself)


def test_off_by_gradients_is_half_the_fisher_information_along_the_block(
    known: Backbone, samples: Samples
) -> None:
    (row,) = rows = samples(1)
    outputs: dict[tuple[int, int], Tensor] = {}

    def keep(layer: int, block: int) -> Callable[..., None]:
        def run(_module: object, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            outputs[layer, block] = output[0] if isinstance(output, tuple) else output

        return run

    hooks = [
        getattr(layer, LAST[block][0]).register_forward_hook(keep(index, block))
        for index, layer in enumerate(known.layers)
        for block in range(2)
    ]
    norm: Any = known.layers[0].input_layernorm
    norm.weight.requires_grad_(True)  # else there is no graph
    loss = loss_of(known, row)
    slopes = torch.autograd.grad(loss, list(outputs.values()))
    for hook in hooks:
        hook.remove()
    norm.weight.requires_grad_(False)
    expected = [
        len(row.answer_ids) / 2 * float((g_BTD * d_BTD.detach()).sum(-1).pow(2).sum())
        for g_BTD, d_BTD in zip(slopes, outputs.values(), strict=True)
    ]
    found = by_gradients(known, rows, "data", never)
    assert found.kind == "gradient"
    assert torch.tensor(found.off).flatten().tolist() == pytest.approx(expected, rel=1e-3)


def test_errors_shrink_with_samples_and_one_sample_has_none_to_give(
    backbone: Backbone, samples: Samples
) -> None:
    rows = samples(2)
    alone = [torch.tensor(by_gradients(backbone, [row], "data", never).int8) for row in rows]
    both = by_gradients(backbone, rows, "data", never)
    assert torch.allclose(torch.tensor(both.int8), (alone[0] + alone[1]) / 2)
    # Of two values the standard error of the mean is half their distance.
    assert torch.allclose(torch.tensor(both.int8_error), (alone[0] - alone[1]).abs() / 2, rtol=1e-4)
    one = by_gradients(backbone, rows[:1], "data", never)
    assert all(one.int8_harms(layer, block) for layer in range(backbone.num_layers) for block in range(2))


def test_int8_harms_beyond_twice_its_error(backbone: Backbone) -> None:
    pairs = ((0.21, 0.19), (-0.5, 0.0))
    errors = ((0.1, 0.1), (0.1, 0.0))
    known = Sensitivities("exact", "-", "-", 8, off=pairs, off_error=errors, int8=pairs, int8_error=errors)
    harms = [known.int8_harms(layer, block) for layer in range(2) for block in range(2)]
    assert harms == [True, False, False, False]
    assert known.harm(0, 1) == (0.19, 0.19)


def test_of_random_weights_nothing_is_known(backbone: Backbone) -> None:
    found = uniform(backbone)
    assert set(found.off) == {(1.0, 1.0)}
    assert len(found.off) == len(found.int8) == backbone.num_layers
    assert found.int8_harms(0, 0)
    assert found.harm(0, 0) is None
    assert (found.kind, found.samples, found.fingerprint) == ("uniform", 0, backbone.fingerprint)


@pytest.mark.parametrize("count", [1, 3])
def test_they_come_back_from_json_as_they_were(count: int, backbone: Backbone, samples: Samples) -> None:
    for known in (uniform(backbone), by_gradients(backbone, samples(count), "data", never)):
        text = json.dumps(known.as_dict(), allow_nan=False)
        assert Sensitivities.from_dict(json.loads(text)) == known


def test_they_stop_when_they_are_asked_to(backbone: Backbone, samples: Samples) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    for measure in (by_gradients, exact):
        with pytest.raises(KeyboardInterrupt):
            measure(backbone, samples(1), "data", stop)
    forward = [name for name, module in backbone.model.named_modules() if "forward" in vars(module)]
    hooked = [name for name, module in backbone.model.named_modules() if module._forward_hooks]
    assert (forward, hooked) == ([], [])
