"""hestctl's engine with the project's own kernels, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from agreement import adapted, family_backbone, often_stopping, partings
from torch._dynamo.testing import CompileCounter

from hestctl.generation.native import NativeGenerator, generator, network
from hestctl.generation.native.graph import compiled
from hestctl.kernels.choose import Choice, Choices, Shape
from hestctl.records import FULL, INT8, OFF, BlockStates

pytest.importorskip("triton", reason="triton is not installed")
NEW = 8
SMALL = {1: "triton.decode/16x256-w4-s3", 32: "triton.prefill/128x256x64-w4-s3"}


def plain(monkeypatch, *arguments, **options):
    """An engine whose adapters run unfused."""
    with monkeypatch.context() as patch:
        patch.setattr(generator, "why_not_fused", lambda adapters, device: "asked for")
        engine = NativeGenerator(*arguments, static=True, **options)
    assert engine.notes["adapter"] == "unfused: asked for"
    return engine


def ledger_of(engine):
    return next(reversed(engine._sessions.values())).gates._ledger


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("method", ["tabs", "bhsp", "hest-fp16"])
def test_fused_adapters_change_no_token_no_state_and_no_purse(method, beams, backbone, samples, monkeypatch):
    rows = samples(5)
    often_stopping(backbone)
    adapters, plan = adapted(method, backbone, rows, new_tokens=NEW, beams=beams)
    fused = NativeGenerator(backbone, adapters, plan, static=True)
    unfused = plain(monkeypatch, backbone, adapters, plan)
    assert fused.notes["adapter"] == "fused"
    assert fused.warm_up(rows, batch_size=2, new_tokens=NEW, num_beams=beams) == 2
    for session in fused._sessions.values():
        # What precedes the capture of a graph, and the capture itself.
        for _ in range(3):
            with torch.inference_mode():
                session._rewind()
                session.step()
    bound = False
    for batch in (rows[:2], rows[4:], rows[2:4]):
        for forced in (False, True):
            asked = {"new_tokens": NEW, "num_beams": beams, "forced_length": forced}
            mine, theirs = (engine.generate(batch, **asked) for engine in (fused, unfused))
            assert mine.new_ids == theirs.new_ids
            assert torch.equal(mine.counts_QLS, theirs.counts_QLS)
            if plan is not None:
                a, b = ledger_of(fused), ledger_of(unfused)
                assert torch.equal(a.purse_LQ, b.purse_LQ)
                assert torch.equal(a.seen_LQ, b.seen_LQ)
                free = NativeGenerator(backbone, adapters, None).generate(batch, **asked)
                bound |= bool((mine.counts_QLS[..., 2] < free.counts_QLS[..., 2]).any())
    assert bound == (plan is not None), "the ledger is to bind"


def test_nothing_is_open_or_paid_for_once_all_rows_have_stopped(backbone, samples):
    rows = samples(1)
    often_stopping(backbone, range(10, 320, 2))
    engine = NativeGenerator(backbone, *adapted("hest-fp16", backbone, rows), static=True)
    out = engine.generate(rows, new_tokens=40, num_beams=1)
    session = next(reversed(engine._sessions.values()))
    assert out.stopped == [True]
    assert not session.choice.alive
    steps = len(rows[0].prompt_ids) + len(out.new_ids[0]) - 1
    layers, _, rank = engine.adapters.shape
    assert out.counts_QLS.sum((0, 2)).tolist() == [steps * rank] * layers
    purse_LQ = ledger_of(engine).purse_LQ.clone()
    with torch.inference_mode():
        session.step()
    assert torch.equal(session.gates.log().sum(0), out.counts_QLS)
    assert torch.equal(ledger_of(engine).purse_LQ, purse_LQ)


def test_other_adapters_say_why_they_are_not_fused(backbone, samples):
    adapters, plan = adapted("hest", backbone, samples(1))
    notes = NativeGenerator(backbone, adapters, plan, static=True).notes
    assert notes["adapter"].startswith("unfused: int8 directions")
    assert NativeGenerator(backbone, None, None).notes["adapter"] == "none"


def own_kernels(backbone):
    """Choices as ``calibrate`` makes them, all for our own kernels."""
    layer = backbone.layers[0]
    parts = (
        (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
        (layer.self_attn.o_proj,),
        (layer.mlp.gate_proj, layer.mlp.up_proj),
        (layer.mlp.down_proj,),
    )
    found = {}
    for part in parts:
        for rows, name in SMALL.items():
            shape = Shape(rows, sum(m.out_features for m in part), part[0].in_features)
            found[shape.key] = Choice(name, None, None, None, "asked for", {}, {})
    return Choices("cpu", found)


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_own_int8_kernels_generate_what_the_library_s_do(family, samples):
    backbone, rows = family_backbone(family), samples(2, prompt=9)
    int8 = BlockStates.uniform(backbone.num_layers, INT8)
    default = NativeGenerator(backbone, None, None, blocks=int8)
    own = NativeGenerator(backbone, None, None, blocks=int8, choices=own_kernels(backbone))
    assert default.notes["kernels"] == "default: not calibrated"
    assert set(own.notes["kernels"].values()) == {
        f"16 rows: {SMALL[1]} (asked for); 32 rows: {SMALL[32]} (asked for)"
    }
    theirs, mine = (engine.label_scores(rows)[0] for engine in (default, own))
    # A norm within the quantising kernel may move a code by one step.
    assert (theirs - mine).norm() < 0.01 * theirs.norm()
    a, b = (engine.generate(rows, new_tokens=6, num_beams=1).new_ids for engine in (default, own))
    assert all(parting.tie for parting in partings(default, rows, a, b, rounding=0.02))


def test_mixed_blocks_run_own_and_fused_kernels_beside_the_library_s(samples, monkeypatch):
    states = BlockStates((FULL, INT8, OFF, OFF, FULL), (INT8, FULL, INT8, OFF, OFF))
    backbone, rows = family_backbone(num_hidden_layers=5), samples(2, prompt=9)
    adapters, plan = adapted("hest-fp16", backbone, rows, new_tokens=6)
    default = plain(monkeypatch, backbone, adapters, plan, blocks=states)
    own = NativeGenerator(backbone, adapters, plan, blocks=states, choices=own_kernels(backbone), static=True)
    assert own.notes["adapter"] == "fused"
    theirs, mine = (engine.label_scores(rows)[0] for engine in (default, own))
    assert (theirs - mine).norm() < 0.01 * theirs.norm()
    a, b = (engine.generate(rows, new_tokens=6, num_beams=1) for engine in (default, own))
    assert all(parting.tie for parting in partings(default, rows, a.new_ids, b.new_ids, rounding=0.02))
    assert b.blocks == states


def test_own_kernels_stand_in_the_layer_s_one_graph(samples, monkeypatch):
    backbone, rows = family_backbone(num_hidden_layers=3), samples(1)
    counter = CompileCounter()
    monkeypatch.setattr(network, "compiled", lambda stage: compiled(stage, backend=counter))
    torch._dynamo.reset()
    options = {"blocks": BlockStates.uniform(3, INT8), "choices": own_kernels(backbone), "static": True}
    eager, engine = (NativeGenerator(backbone, None, None, **options) for _ in range(2))
    engine._network.compile()
    out = engine.generate(rows, new_tokens=3, num_beams=1)
    assert counter.frame_count == 4, "two halves of a layer, for prompts and for tokens"
    assert out.new_ids == eager.generate(rows, new_tokens=3, num_beams=1).new_ids
