"""What makes hestctl's engine frugal: shared weights, static steps, few launches, one compilation."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from agreement import METHODS, adapted, family_backbone, often_stopping
from launches import count_launches
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from hestctl.errors import HestError
from hestctl.generation.engine import Generator
from hestctl.generation.native import NativeGenerator, cache, network, unsupported
from hestctl.generation.native.graph import LOOK_EVERY, compiled
from hestctl.generation.native.weights import read_weights
from hestctl.records import FULL, INT8, BlockStates

NEW = 8


def warm(engine, rows, beams=1, new_tokens=NEW):
    """The session of a batch that has been generated once, begun again."""
    engine.generate(rows, new_tokens=new_tokens, num_beams=beams)
    session = next(reversed(engine._sessions.values()))
    with torch.inference_mode():
        session.begin([row.prompt_ids for row in rows])
    return session


class Forbid(TorchDispatchMode):
    """Fails on what a CUDA graph cannot hold: reading a value back, shapes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique"), name
        out = func(*args, **(kwargs or {}))
        assert not isinstance(out, torch.Tensor) or out.device.type == "cpu"
        return out


def test_weights_are_shared_not_copied():
    backbone = family_backbone("Qwen2ForCausalLM", tie_word_embeddings=True)
    state = {name: p.clone() for name, p in backbone.model.named_parameters()}
    weights = read_weights(backbone, BlockStates.uniform(backbone.num_layers))
    for layer, mine in zip(backbone.layers, weights.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        for product, modules in (
            (mine.attention.qkv, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (mine.attention.out, (attention.o_proj,)),
            (mine.mlp.gate_up, (mlp.gate_proj, mlp.up_proj)),
            (mine.mlp.down, (mlp.down_proj,)),
        ):
            storage = product.weight_MD.untyped_storage()
            assert {m.weight.untyped_storage().data_ptr() for m in modules} == {storage.data_ptr()}
            assert storage.nbytes() == sum(m.weight.numel() * m.weight.element_size() for m in modules)
            if product.bias_M is not None:
                biases = {m.bias.untyped_storage().data_ptr() for m in modules}
                assert biases == {product.bias_M.untyped_storage().data_ptr()}
    assert weights.head.weight_MD.data_ptr() == weights.embedding_VD.data_ptr()
    for name, parameter in backbone.model.named_parameters():
        assert torch.equal(parameter, state[name])
    again = read_weights(backbone, BlockStates.uniform(backbone.num_layers))
    assert again.pointers == weights.pointers
    assert (
        again.layers[0].attention.qkv.weight_MD.data_ptr()
        == weights.layers[0].attention.qkv.weight_MD.data_ptr()
    )


def test_generating_holds_no_second_copy_of_the_weights(backbone, samples):
    def held():
        gc.collect()
        storages = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for x in gc.get_objects()
            if type(x) in (torch.Tensor, torch.nn.Parameter)
        }
        return sum(storages.values())

    before = held()
    engine = NativeGenerator(backbone, None, None)
    tables = sum(table.untyped_storage().nbytes() for table in engine._network.rope(1))
    assert held() - before == tables


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_reads_nothing_back_and_stays_in_its_buffers(method, beams, backbone, samples):
    rows = samples(3)
    engine = NativeGenerator(backbone, *adapted(method, backbone, rows, beams=beams), static=True)
    session = warm(engine, rows, beams)
    buffers = {name: x for name, x in vars(session).items() if isinstance(x, torch.Tensor)}
    buffers |= {f"choice.{n}": x for n, x in vars(session.choice).items() if isinstance(x, torch.Tensor)}
    places = {name: x.data_ptr() for name, x in buffers.items()}
    for _ in range(3):
        with torch.inference_mode(), Forbid():
            session.step()
    now = {name: x for name, x in vars(session).items() if isinstance(x, torch.Tensor)}
    now |= {f"choice.{n}": x for n, x in vars(session.choice).items() if isinstance(x, torch.Tensor)}
    assert {name: x.data_ptr() for name, x in now.items()} == places


def test_a_session_serves_every_batch_of_its_bucket(backbone, samples):
    engine = NativeGenerator(backbone, *adapted("hest", backbone, samples(2)), static=True)
    other = samples(2, prompt=40, seed=5)
    first = engine.generate(samples(2), new_tokens=NEW, num_beams=1)
    second = engine.generate(other, new_tokens=NEW, num_beams=1)
    again = engine.generate(samples(2), new_tokens=NEW, num_beams=1)
    assert len(engine._sessions) == 1
    assert again.new_ids == first.new_ids
    assert torch.equal(again.counts_QLS, first.counts_QLS)
    fresh = NativeGenerator(backbone, engine.adapters, engine.plan, static=True)
    assert fresh.generate(other, new_tokens=NEW, num_beams=1).new_ids == second.new_ids


@pytest.mark.parametrize("beams", [1, 2])
def test_late_looks_at_the_stop_flag_cost_few_steps_and_change_nothing(beams, backbone, samples, monkeypatch):
    rows = samples(1)
    often_stopping(backbone, range(10, 320, 2))
    adapters, plan = adapted("hest", backbone, rows, new_tokens=40, beams=beams)
    results, steps = [], []
    for static in (False, True):
        engine = NativeGenerator(backbone, adapters, plan, static=static)
        session = warm(engine, rows, beams, new_tokens=40)
        run, taken = session._run, []
        monkeypatch.setattr(session, "_run", lambda run=run, taken=taken: (taken.append(1), run()))
        results.append(engine.generate(rows, new_tokens=40, num_beams=beams))
        steps.append(len(taken))
    assert steps[0] < 20, "the answer is to end early"
    assert steps[0] <= steps[1] <= steps[0] + 2 * LOOK_EVERY
    assert results[0].new_ids == results[1].new_ids
    assert torch.equal(results[0].counts_QLS, results[1].counts_QLS)


def test_one_compilation_serves_all_layers_and_every_prompt_of_a_bucket(samples, monkeypatch):
    backbone = family_backbone("Qwen2ForCausalLM", num_hidden_layers=5)
    counter = CompileCounter()
    monkeypatch.setattr(network, "compiled", lambda stage: compiled(stage, backend=counter))
    torch._dynamo.reset()
    for state in (FULL, INT8):
        blocks = BlockStates.uniform(5, state)
        eager = NativeGenerator(backbone, None, None, blocks=blocks, static=True)
        engine = NativeGenerator(backbone, None, None, blocks=blocks, static=True)
        engine._network.compile()
        counter.clear()
        rows = samples(2)
        out = engine.generate(rows, new_tokens=NEW, num_beams=1)
        assert out.new_ids == eager.generate(rows, new_tokens=NEW, num_beams=1).new_ids
        assert counter.frame_count == 4, "two halves of a layer, for prompts and for tokens"
        engine.generate(samples(2, prompt=50, seed=3), new_tokens=NEW, num_beams=1)
        assert counter.frame_count == 4, "another length of the same bucket compiles nothing"
        engine.generate(samples(2, prompt=80, seed=3), new_tokens=NEW, num_beams=1)
        assert counter.frame_count == 6, "another bucket compiles the prompt's halves"


def test_a_step_launches_a_fraction_of_what_transformers_does(samples):
    backbone, rows = family_backbone(num_hidden_layers=8), samples(1)

    def a_step(engine):
        few, more = (
            count_launches(
                lambda n=n: engine.generate(rows, new_tokens=n, num_beams=1, forced_length=True)
            ).total()
            for n in (4, 5)
        )
        return more - few

    theirs, mine = (a_step(kind(backbone, None, None)) for kind in (Generator, NativeGenerator))
    print(f"launches a step: {mine}, transformers {theirs}")
    assert mine <= 0.6 * theirs


def test_an_engine_refuses_what_it_does_not_know(backbone, samples):
    def changed(change):
        other = copy.deepcopy(backbone)
        change(other.model)
        return unsupported(other)

    assert unsupported(backbone) is None
    assert "gelu" in changed(lambda m: setattr(m.config, "hidden_act", "gelu"))
    assert "dynamic" in changed(lambda m: setattr(m.model.rotary_emb, "rope_type", "dynamic"))
    assert "caps" in changed(lambda m: setattr(m.config, "final_logit_softcapping", 30.0))
    assert "no_repeat" in changed(lambda m: setattr(m.generation_config, "no_repeat_ngram_size", 3))
    windowed = family_backbone("MistralForCausalLM", sliding_window=30)
    assert unsupported(windowed, 30) is None
    assert "30 tokens" in unsupported(windowed, 31)
    engine = NativeGenerator(windowed, None, None)
    engine.generate(samples(1), new_tokens=6, num_beams=1)
    with pytest.raises(HestError, match="sliding window"):
        engine.generate(samples(1), new_tokens=7, num_beams=1)
    adapted("base", backbone, [])
    from peft import LoraConfig, get_peft_model

    get_peft_model(backbone.model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert "LoRA" in unsupported(backbone)
    with pytest.raises(HestError, match="LoRA") as caught:
        NativeGenerator(backbone, None, None)
    assert "--engine transformers" in caught.value.hint


def test_a_cache_that_does_not_fit_names_what_would(backbone, samples, monkeypatch):
    rows = samples(4)
    row_bytes = 2 * 2 * 2 * (64 + 64) * 16 * 4
    monkeypatch.setattr(cache, "free_bytes", lambda device: int(2.5 * row_bytes))
    engine = NativeGenerator(backbone, None, None)
    with pytest.raises(HestError, match="enough for 2 of them") as caught:
        engine.generate(rows, new_tokens=NEW, num_beams=1)
    assert f"{row_bytes:,} bytes a request" in caught.value.message
    assert "generation.batch_size=2" in caught.value.hint
    engine.generate(rows[:2], new_tokens=NEW, num_beams=1)


def test_beams_share_the_cache_of_the_prompt(backbone, samples):
    rows, engine = samples(2), NativeGenerator(backbone, None, None)
    sizes = [warm(engine, rows, beams)._stores[0].shape for beams in (1, 4)]
    assert sizes[0] == sizes[1]


def test_warming_up_makes_every_session_and_one_cache(backbone, samples):
    rows = [*samples(4), *samples(1, prompt=90)]
    engine = NativeGenerator(backbone, *adapted("hest", backbone, rows), static=True)
    asked = {"new_tokens": NEW, "num_beams": 2}
    assert engine.warm_up(rows, batch_size=2, **asked) == 2
    assert engine.warm_up(rows, batch_size=2, **asked) == 0
    made, memory = dict(engine._sessions), engine._memory.data_ptr()
    results = [engine.generate(rows[start : start + 2], **asked) for start in (0, 2, 4)]
    assert engine._sessions == made
    assert engine._memory.data_ptr() == memory
    fresh = NativeGenerator(backbone, engine.adapters, engine.plan)
    assert fresh.warm_up(rows, batch_size=2, **asked) == 1
    assert fresh.warm_up(rows, batch_size=2, **asked) == 0
    assert [fresh.generate(rows[start : start + 2], **asked).new_ids for start in (0, 2, 4)] == [
        result.new_ids for result in results
    ]


@pytest.mark.parametrize("tokens", [1, 64, 65, 512, 513, 1000, 1025, 4000, 4097])
def test_buckets_waste_little(tokens):
    rounded = cache.bucket(tokens)
    assert tokens <= rounded < tokens + 64 or rounded <= tokens * 9 / 8 + 1
