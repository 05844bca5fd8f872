"""hestctl's engine against transformers' on tiny models: the same tokens, the same states."""

from __future__ import annotations

import pytest
import torch
from agreement import METHODS, adapted, agree, beam_partings, family_backbone, often_stopping

from hestctl.generation.engine import Generator
from hestctl.generation.native import NativeGenerator
from hestctl.model.methods import build_tuner
from hestctl.settings import MethodSettings

NEW = 12
FAMILIES = {
    "mistral": ("MistralForCausalLM", {"sliding_window": None, "head_dim": 24}),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 64}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "llama3-rope": (
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "yarn-rope": (
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
}


def both(backbone, adapters=None, plan=None, **options):
    return Generator(backbone, adapters, plan), NativeGenerator(backbone, adapters, plan, **options)


@pytest.mark.parametrize("static", [False, True], ids=["packed", "static"])
@pytest.mark.parametrize("method", METHODS)
def test_greedy_tokens_and_states_are_those_of_transformers(method, static, backbone, samples):
    rows = samples(6)
    often_stopping(backbone)
    theirs, mine = both(backbone, *adapted(method, backbone, rows), static=static)
    stopped = set()
    for batch in (rows[:1], rows[1:2], rows[:1] * 2, rows):
        for forced in (False, True):
            a, b = (
                engine.generate(batch, new_tokens=NEW, num_beams=1, forced_length=forced)
                for engine in (theirs, mine)
            )
            agree(theirs, batch, a.new_ids, b.new_ids)
            if a.new_ids == b.new_ids:
                assert a.stopped == b.stopped
                assert (a.counts_QLS is None) == (b.counts_QLS is None)
                if a.counts_QLS is not None:
                    assert torch.equal(a.counts_QLS, b.counts_QLS)
            if not forced:
                stopped |= {len(ids) for ids in b.new_ids}
    assert len(stopped) > 1, "the answers are to end at various lengths"


def test_the_ledger_of_these_tests_binds(backbone, samples):
    rows = samples(3)
    adapters, plan = adapted("hest", backbone, rows)
    kept = NativeGenerator(backbone, adapters, plan).generate(rows, new_tokens=NEW, num_beams=1)
    asked = NativeGenerator(backbone, adapters, None).generate(rows, new_tokens=NEW, num_beams=1)
    spent, wished = (plan.joules(out.counts_QLS[0]) for out in (kept, asked))
    assert 0 < spent <= plan.emax_j < wished
    assert (kept.counts_QLS.sum((0, 1)) > 0).all(), "all three states are to be used"


@pytest.mark.parametrize("static", [False, True], ids=["packed", "static"])
@pytest.mark.parametrize("beams", [2, 4])
@pytest.mark.parametrize("method", ["base", "tabs", "hest"])
def test_beams_are_those_of_transformers(method, beams, static, backbone, samples):
    rows = samples(5)
    often_stopping(backbone)
    theirs, mine = both(backbone, *adapted(method, backbone, rows, beams=beams), static=static)
    for batch in (rows[:1], rows):
        for forced in (False, True):
            a, b = (
                engine.generate(batch, new_tokens=NEW, num_beams=beams, forced_length=forced)
                for engine in (theirs, mine)
            )
            found = beam_partings(theirs, batch, a.new_ids, b.new_ids)
            assert all(parting.tie for parting in found), found
            if found or a.counts_QLS is None:
                continue
            # transformers runs the prompt once a beam, this engine once: the steps after it are the same.
            layers, rank = len(backbone.layers), mine.adapters.shape[2]
            for row, states_LS, fewer_LS in zip(batch, a.counts_QLS, b.counts_QLS, strict=True):
                saved = len(row.prompt_ids) * (beams - 1) * rank
                assert (states_LS.sum(1) - fewer_LS.sum(1)).tolist() == [saved] * layers
                assert mine.plan is None or mine.plan.joules(fewer_LS) <= mine.plan.emax_j


@pytest.mark.parametrize("name", FAMILIES)
def test_other_architectures_generate_what_transformers_does(name, samples):
    family, overrides = FAMILIES[name]
    backbone = family_backbone(family, **overrides)
    rows = samples(4)
    theirs, mine = both(backbone, *adapted("tabs", backbone, rows))
    for beams in (1, 3):
        a, b = (engine.generate(rows, new_tokens=NEW, num_beams=beams) for engine in (theirs, mine))
        assert a.new_ids == b.new_ids
    assert torch.allclose(theirs.label_scores(rows)[0], mine.label_scores(rows)[0], atol=1e-4)
    assert mine.answer_nll(rows) == pytest.approx(theirs.answer_nll(rows), abs=1e-4)


def test_a_row_of_a_ragged_batch_is_as_if_alone(backbone, samples):
    rows = samples(5)
    mine = NativeGenerator(backbone, *adapted("tabs", backbone, rows))
    together = mine.generate(rows, new_tokens=NEW, num_beams=1)
    for index, row in enumerate(rows):
        alone = mine.generate([row], new_tokens=NEW, num_beams=1)
        agree(mine, [row], alone.new_ids, [together.new_ids[index]])


def test_a_repetition_penalty_of_the_model_is_kept(backbone, samples):
    rows = samples(2, prompt=30)[:1]
    backbone.model.generation_config.repetition_penalty = 1.3
    theirs, mine = both(backbone)
    for beams in (1, 3):
        a, b = (engine.generate(rows, new_tokens=24, num_beams=beams) for engine in (theirs, mine))
        assert a.new_ids == b.new_ids
    backbone.model.generation_config.repetition_penalty = None
    assert mine.generate(rows, new_tokens=24, num_beams=3).new_ids != b.new_ids


def test_generation_leaves_training_as_it_was(backbone, samples):
    rows = samples(2)
    mine = NativeGenerator(backbone, None, None)
    before = mine.generate(rows, new_tokens=NEW, num_beams=1)
    tuner = build_tuner(
        MethodSettings(name="lora"), backbone.model, layers=2, hidden=64, states=(0, 2), seed=0
    )
    ids = torch.tensor([rows[0].prompt_ids])
    backbone.model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in tuner.named_parameters().values():
            assert parameter.grad is not None
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    tuner.finish()
    after = mine.generate(rows, new_tokens=NEW, num_beams=1)
    assert after.new_ids != before.new_ids
    assert (
        after.new_ids == Generator(backbone, None, None).generate(rows, new_tokens=NEW, num_beams=1).new_ids
    )
