"""Blocks in their states in hestctl's engine: the tokens of transformers', and nothing run that is off."""

from __future__ import annotations

import math
import random

import pytest
import torch
from agreement import adapted, agree, beam_partings, family_backbone, often_stopping
from launches import count_launches
from torch._dynamo.testing import CompileCounter

from hestctl.generation.engine import Generator
from hestctl.generation.native import NativeGenerator, network
from hestctl.generation.native.graph import compiled
from hestctl.model.blocks import Int8Codes, in_states
from hestctl.records import FULL, INT8, OFF, BlockStates

LAYERS, NEW = 5, 10


def drawn(seed):
    """Random states; every seed has another mix, and the first layer often has no attention."""
    draw = random.Random(seed)
    states = [[draw.choice((OFF, INT8, FULL)) for _ in range(LAYERS)] for _ in range(2)]
    return BlockStates(tuple(states[0]), tuple(states[1]))


STATES = {
    **{f"drawn{seed}": drawn(seed) for seed in range(3)},
    "mixed": BlockStates((OFF, FULL, INT8, OFF, FULL), (INT8, FULL, OFF, OFF, INT8)),
    "no-attention": BlockStates((OFF,) * LAYERS, (FULL, INT8, OFF, FULL, INT8)),
    "no-mlp": BlockStates((FULL, INT8, OFF, FULL, INT8), (OFF,) * LAYERS),
    "nothing": BlockStates.uniform(LAYERS, OFF),
}


def both(backbone, states, adapters=None, plan=None, **options):
    return (
        Generator(backbone, adapters, plan, states),
        NativeGenerator(backbone, adapters, plan, blocks=states, **options),
    )


@pytest.fixture
def backbone():
    return family_backbone(num_hidden_layers=LAYERS)


@pytest.mark.parametrize("static", [False, True], ids=["packed", "static"])
@pytest.mark.parametrize("method", ["base", "tabs", "hest"])
@pytest.mark.parametrize("name", STATES)
def test_greedy_tokens_are_those_of_transformers(name, method, static, backbone, samples):
    rows, states = samples(4), STATES[name]
    often_stopping(backbone)
    theirs, mine = both(backbone, states, *adapted(method, backbone, rows), static=static)
    for batch in (rows[:1], rows):
        a, b = (engine.generate(batch, new_tokens=NEW, num_beams=1) for engine in (theirs, mine))
        agree(theirs, batch, a.new_ids, b.new_ids)
        assert a.blocks == b.blocks == states
        if a.counts_QLS is not None and a.new_ids == b.new_ids:
            assert torch.equal(a.counts_QLS, b.counts_QLS)
            assert mine.plan is None or b.counts_QLS[..., FULL].sum() > 0


@pytest.mark.parametrize("static", [False, True], ids=["packed", "static"])
@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("name", ["drawn0", "mixed", "no-attention", "nothing"])
def test_beams_are_those_of_transformers(name, beams, static, backbone, samples):
    rows = samples(3)
    often_stopping(backbone)
    arguments = adapted("hest", backbone, rows, beams=beams)
    theirs, mine = both(backbone, STATES[name], *arguments, static=static)
    for batch in (rows[:1], rows):
        a, b = (engine.generate(batch, new_tokens=NEW, num_beams=beams) for engine in (theirs, mine))
        found = beam_partings(theirs, batch, a.new_ids, b.new_ids)
        assert all(parting.tie for parting in found), found


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize("name", STATES)
def test_scores_and_likelihoods_are_those_of_transformers(name, family, samples):
    rows, backbone = samples(4), family_backbone(family, num_hidden_layers=LAYERS)
    arguments = adapted("hest", backbone, rows, new_tokens=0)
    theirs, mine = both(backbone, STATES[name], *arguments)
    full = NativeGenerator(backbone, *arguments)
    (scores, counts), (own, own_counts) = theirs.label_scores(rows), mine.label_scores(rows)
    # Where the two engines round an activation differently, an int8 code moves by one step.
    moved = (full.label_scores(rows)[0] - scores).abs().mean()
    assert (own - scores).abs().mean() < 0.01 * moved
    assert torch.equal(counts, own_counts)
    assert mine.answer_nll(rows) == pytest.approx(theirs.answer_nll(rows), rel=1e-3)


def begun(engine, rows):
    """The session of a batch, begun."""
    engine.generate(rows, new_tokens=NEW, num_beams=1)
    session = next(reversed(engine._sessions.values()))
    with torch.inference_mode():
        session.begin([row.prompt_ids for row in rows])
    return session


@pytest.mark.parametrize("static", [False, True], ids=["packed", "static"])
def test_a_block_that_is_off_is_not_computed_and_an_attention_keeps_no_cache(static, backbone, samples):
    full = begun(NativeGenerator(backbone, None, None, static=static), samples(2))
    per_layer = math.prod(full._shape.cache(full._network)) // LAYERS
    for states in (STATES["mixed"], STATES["no-attention"], STATES["no-mlp"], STATES["nothing"]):
        attention, mlp = (tuple(min(1, s) * FULL for s in part) for part in (states.attention, states.mlp))
        states = BlockStates(attention, mlp)
        engine = NativeGenerator(backbone, None, None, blocks=states, static=static)
        session = begun(engine, samples(2))
        (_, _, attending), (_, _, mlps) = states.counts()
        assert len(session._stores) == attending
        assert len(engine._memory) == attending * per_layer
        ran = count_launches(session.decode)
        expected = {
            "linear": 2 * attending + 2 * mlps + 1,  # two products a block, and the head
            "scaled_dot_product_attention": attending,
            "silu": mlps,
            "rms_norm": attending + mlps + 1,
        }
        assert {name: ran[name] for name in expected} == expected
        with torch.inference_mode():
            prompt = count_launches(lambda engine=engine: engine.label_scores(samples(1)))
        assert {name: prompt[name] for name in expected} == expected


def test_the_states_told_are_those_of_the_products_that_ran(backbone, samples):
    rows, states = samples(1), STATES["mixed"]
    engine = NativeGenerator(backbone, None, None, blocks=states)
    layers = list(engine._network.weights.layers)
    layers[1] = layers[1]._replace(mlp=None)
    engine._network.weights = engine._network.weights._replace(layers=tuple(layers))
    told = engine.generate(rows, new_tokens=2, num_beams=1).blocks
    assert told == BlockStates(states.attention, (INT8, OFF, OFF, OFF, INT8))


def test_weights_that_moved_are_read_again_in_the_same_states(backbone, samples):
    rows, states = samples(2), STATES["mixed"]
    engine = NativeGenerator(backbone, None, None, blocks=states)
    before = engine.generate(rows, new_tokens=NEW, num_beams=1)
    for parameter in backbone.model.parameters():
        parameter.data = parameter.data.clone()
    after = engine.generate(rows, new_tokens=NEW, num_beams=1)
    assert (after.new_ids, after.blocks) == (before.new_ids, states)
    # A second engine in other states leaves the weights where they are: nothing is read again.
    first = engine._network
    NativeGenerator(backbone, None, None).generate(rows, new_tokens=2, num_beams=1)
    engine.generate(rows, new_tokens=2, num_beams=1)
    assert engine._network is first


def test_each_kind_of_layer_compiles_once(monkeypatch, samples):
    states = BlockStates(
        (FULL, FULL, FULL, OFF, OFF, INT8, FULL, OFF, FULL, FULL),
        (FULL, FULL, OFF, FULL, OFF, FULL, INT8, FULL, OFF, FULL),
    )
    backbone = family_backbone(num_hidden_layers=states.layers)
    counter = CompileCounter()
    monkeypatch.setattr(network, "compiled", lambda stage: compiled(stage, backend=counter))
    torch._dynamo.reset()
    eager, engine = (NativeGenerator(backbone, None, None, blocks=states, static=True) for _ in range(2))
    engine._network.compile()
    rows = samples(2)
    out = engine.generate(rows, new_tokens=4, num_beams=1)
    assert out.new_ids == eager.generate(rows, new_tokens=4, num_beams=1).new_ids
    # Before attention: full, int8. After it: full + full, full, int8 + full, full + int8. The MLP alone.
    assert counter.frame_count == 2 * (2 + 4 + 1), "for prompts and for tokens"
    engine.generate(samples(2, prompt=40, seed=3), new_tokens=4, num_beams=1)
    assert counter.frame_count == 2 * (2 + 4 + 1), "another length of the same bucket compiles nothing"


def test_the_reference_leaves_the_backbone_as_it_was(backbone, samples):
    rows = samples(2)
    before = Generator(backbone, None, None).label_scores(rows)[0]
    theirs = Generator(backbone, None, None, STATES["mixed"])
    with in_states(backbone.layers, STATES["mixed"], Int8Codes()):
        inside = Generator(backbone, None, None).label_scores(rows)[0]
    assert torch.equal(theirs.label_scores(rows)[0], inside)
    theirs.generate(rows, new_tokens=2, num_beams=1)
    assert torch.equal(Generator(backbone, None, None).label_scores(rows)[0], before)
    assert not torch.equal(inside, before)
