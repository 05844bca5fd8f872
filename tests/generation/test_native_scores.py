"""Label scores and likelihoods of hestctl's engine, and its int8 precision."""

from __future__ import annotations

import copy

import pytest
import torch
from agreement import METHODS, adapted, agree, family_backbone
from torch import nn

from hestctl.generation.engine import Generator
from hestctl.generation.native import NativeGenerator
from hestctl.kernels.reference import int8_linear
from hestctl.records import INT8, BlockStates


class Oracle(nn.Module):
    """A linear layer by the oracle of int8."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        y = int8_linear(x.reshape(-1, x.shape[-1]), self.linear.weight).to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.linear.bias is None else y + self.linear.bias


def with_oracles(backbone):
    """A copy whose decoder MatMuls are the oracle's."""
    made = copy.deepcopy(backbone)
    for layer in made.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(part, name, Oracle(module))
    return made


@pytest.mark.parametrize("static", [False, True], ids=["packed", "static"])
@pytest.mark.parametrize("method", METHODS)
def test_scores_and_likelihoods_are_those_of_transformers(method, static, backbone, samples):
    rows = samples(5)
    adapters, plan = adapted(method, backbone, rows, new_tokens=0)
    theirs = Generator(backbone, adapters, plan)
    mine = NativeGenerator(backbone, adapters, plan, static=static)
    for batch in (rows[:1], rows):
        (scores, states), (own_scores, own_states) = theirs.label_scores(batch), mine.label_scores(batch)
        assert torch.allclose(scores, own_scores, atol=1e-4)
        assert (states is None) == (own_states is None)
        assert states is None or torch.equal(states, own_states)
        assert mine.answer_nll(batch) == pytest.approx(theirs.answer_nll(batch), abs=1e-4)


@pytest.mark.parametrize("static", [False, True], ids=["packed", "static"])
@pytest.mark.parametrize("family", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize("method", ["base", "hest"])
def test_int8_is_the_model_whose_matmuls_are_the_oracle(method, family, static, samples):
    rows = samples(5)
    backbone = family_backbone(family)
    adapters, plan = adapted(method, backbone, rows)
    theirs = Generator(with_oracles(backbone), adapters, plan)
    mine = NativeGenerator(
        backbone, adapters, plan, blocks=BlockStates.uniform(backbone.num_layers, INT8), static=static
    )
    full = NativeGenerator(backbone, adapters, plan, static=static)
    for beams in (1, 2):
        a, b = (engine.generate(rows, new_tokens=8, num_beams=beams) for engine in (theirs, mine))
        if beams == 1:
            agree(theirs, rows, a.new_ids, b.new_ids)
        else:
            assert a.new_ids == b.new_ids
    # A rounding of the activations can move an int8 code by one; that is far less than int8 itself moves.
    scores = [engine.label_scores(rows)[0] for engine in (theirs, mine, full)]
    moved = (scores[2] - scores[0]).abs().mean()
    assert (scores[1] - scores[0]).abs().mean() < 0.05 * moved
    assert mine.answer_nll(rows) == pytest.approx(theirs.answer_nll(rows), rel=1e-3)
