"""Generation: the engine against transformers, stops, labels; the evaluation's records; ROUGE."""

from __future__ import annotations

import pytest
import torch

from hestctl.energy.counter import Unavailable, open_counter
from hestctl.energy.meter import Meter
from hestctl.errors import HestError
from hestctl.generation.engine import Generator
from hestctl.generation.evaluate import evaluate
from hestctl.generation.native import NativeGenerator
from hestctl.generation.quality import RougeScorer, first_token_of_labels
from hestctl.model.methods import build_tuner
from hestctl.settings import GenerationSettings, MethodSettings
from hestctl.workflows.summary import summarise


class Silent:
    def note(self, text):
        pass

    def advance(self, stage, done, total, figures):
        pass


def run(generator, rows, meter, labels=(), **asked):
    settings = GenerationSettings(**{"new_tokens": 5, **asked})
    return evaluate(
        generator, rows, settings, meter, split="test", labels=labels, progress=Silent(), check=lambda: None
    )


def test_greedy_tokens_are_those_of_transformers(backbone, samples):
    rows = samples(4)
    ours = Generator(backbone, None, None)
    for row in rows:
        ids = torch.tensor([row.prompt_ids])
        theirs = backbone.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )[0, ids.shape[1] :].tolist()
        mine = ours.generate([row], new_tokens=6, num_beams=1).new_ids[0]
        assert mine == theirs[: len(mine)]
    together = ours.generate(rows, new_tokens=6, num_beams=1)
    assert together.new_ids == [ours.generate([r], new_tokens=6, num_beams=1).new_ids[0] for r in rows]


def test_generation_stops_at_the_stop_token_and_says_so(backbone, samples):
    rows = samples(1)
    generator = Generator(backbone, None, None)
    with torch.no_grad():
        bias = torch.zeros(backbone.model.config.vocab_size)
        bias[backbone.stop_ids[0]] = 1e4
        backbone.model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    out = generator.generate(rows, new_tokens=6, num_beams=1)
    assert out.new_ids == [[backbone.stop_ids[0]]]
    assert out.stopped == [True]
    forced = generator.generate(rows, new_tokens=6, num_beams=1, forced_length=True)
    assert len(forced.new_ids[0]) == 6


def test_likelihood_is_that_of_the_full_logits(backbone, samples):
    rows = samples(3)
    generator = Generator(backbone, None, None)
    for row, nll in zip(rows, generator.answer_nll(rows), strict=True):
        ids = torch.tensor([row.prompt_ids + row.answer_ids])
        with torch.no_grad():
            logits = backbone.model(ids).logits[0].log_softmax(-1)
        start = len(row.prompt_ids)
        expected = -sum(logits[start - 1 + i, token].item() for i, token in enumerate(row.answer_ids))
        assert nll == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_sample_is_recorded_and_joules_add_up(batch_size, backbone, samples):
    rows = samples(5)
    tuner = build_tuner(
        MethodSettings(name="tabs"), backbone.model, layers=2, hidden=64, states=(0, 2), seed=0
    )
    with Meter(open_counter("estimate", cuda_uuid=None, nominal_watts=8.0)) as meter:
        result = run(Generator(backbone, tuner.spectral, None), rows, meter, batch_size=batch_size)
    assert [s.sample_id for s in result.samples] == [row.sample_id for row in rows]
    assert [s.position for s in result.samples] == list(range(5))
    assert sum(s.energy_j for s in result.samples) == pytest.approx(sum(w.energy_j for w in result.windows))
    assert {s.energy_kind for s in result.samples} == {"estimated"}
    assert all(s.energy_error_j is None for s in result.samples)
    assert all(
        s.energy_method == ("estimated" if s.batch_size == 1 else "apportioned") for s in result.samples
    )
    for sample, row in zip(result.samples, rows, strict=True):
        directions = sample.directions_off + sample.directions_int8 + sample.directions_full
        assert sample.directions_int8 == 0
        positions = sample.prompt_tokens + sample.new_tokens - 1  # the last token is never fed back
        if sample.batch_size == 1:
            assert directions == positions * 2 * 16
        assert sample.nll > 0
        assert sample.answer_tokens == len(row.answer_ids)
    assert sum(use.count for use in result.layer_use) == sum(
        s.directions_off + s.directions_int8 + s.directions_full for s in result.samples
    )


@pytest.mark.parametrize("kind", [Generator, NativeGenerator])
@pytest.mark.parametrize("labels", [(), ("yes", "no")])
def test_an_engine_warms_up_before_the_meter_reads(kind, labels, backbone, samples, monkeypatch):
    engine, order = kind(backbone, None, None), []
    meter = Meter(Unavailable("no counter here"))
    for owner, name in ((engine, "generate"), (engine, "label_scores"), (meter, "edge")):
        real = getattr(owner, name)

        def told(*arguments, name=name, real=real, **options):
            order.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, told)
    work = "label_scores" if labels else "generate"
    with meter:
        for warm in ([work], []):
            order.clear()
            run(engine, samples(1), meter, labels=labels)
            assert order == [*warm, "edge", work, "edge"]


def test_without_a_meter_joules_are_none_with_the_reason(backbone, samples):
    with Meter(Unavailable("no counter here")) as meter:
        result = run(Generator(backbone, None, None), samples(2), meter)
    for sample in result.samples:
        assert sample.energy_j is None
        assert sample.energy_kind == "none"
        assert not sample.energy_valid
        assert "no counter here" in sample.energy_reason
    assert summarise(result.samples)["energy_j_per_sample"] is None


def test_labels_are_told_apart_by_their_first_token():
    assert first_token_of_labels({"a": (5, 9), "b": (6, 9)}) == {5: "a", 6: "b"}
    with pytest.raises(HestError, match="'a' and 'b' begin with the same token"):
        first_token_of_labels({"a": (5, 1), "b": (5, 2)})


def test_rouge_lsum_splits_generated_text_at_sentences():
    scorer = RougeScorer()
    reference = "The cat sat on the mat.\nThe dog ran away."
    swapped = scorer.score(reference, "The dog ran away. The cat sat on the mat.")
    assert swapped.rouge_lsum == pytest.approx(100)
    assert swapped.rouge_l < 100
    assert scorer.score(reference, "").rouge1 == 0
