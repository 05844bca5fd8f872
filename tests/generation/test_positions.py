"""Where in a generation directions are used: the log by position against the states of single tokens."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from torch import Tensor

from hestctl.generation.engine import Generator
from hestctl.generation.native import NativeGenerator
from hestctl.generation.positions import layer_use
from hestctl.model.methods import build_tuner
from hestctl.model.spectral import SpectralAdapters
from hestctl.records import NEW_PART, PROMPT_PARTS, STATES
from hestctl.settings import MethodSettings

NEW = 2 * NEW_PART + 3


def adapters_of(backbone) -> SpectralAdapters:
    tuner = build_tuner(
        MethodSettings(name="tabs"), backbone.model, layers=2, hidden=64, states=(0, 2), seed=0
    )
    return tuner.spectral


def decided(gate, monkeypatch) -> list[tuple[int, Tensor]]:
    """The layer and the states (tokens, R) of every decision to come, one request at a time."""
    seen: list[tuple[int, Tensor]] = []
    real = gate.decide

    def told(x_BTD: Tensor, layer: int) -> Tensor:
        states = real(x_BTD, layer)
        seen.append((layer, states.reshape(-1, states.shape[-1])))
        return states

    monkeypatch.setattr(gate, "decide", told)
    return seen


@pytest.mark.parametrize("kind", [Generator, NativeGenerator])
def test_the_log_says_which_states_each_part_of_prompt_and_answer_ran_in(
    kind, backbone, samples, monkeypatch
):
    (row,) = samples(1)
    adapters = adapters_of(backbone)
    engine = kind(backbone, adapters, None)
    asked = {"new_tokens": NEW, "num_beams": 1, "forced_length": True}
    engine.generate([row], **asked)  # what a first batch warms up would be seen too
    seen = decided(adapters.gate, monkeypatch)
    out = engine.generate([row], **asked)
    expected: Counter[tuple[str, int, int, str]] = Counter()
    calls = [0, 0]
    for layer, states_TR in seen:
        for nth, states_R in enumerate(states_TR):
            place = ("new", (calls[layer] - 1) // NEW_PART * NEW_PART)
            if calls[layer] == 0:
                place = ("prompt", nth * PROMPT_PARTS // len(row.prompt_ids))
            expected.update((*place, layer, STATES[int(state)]) for state in states_R)
        calls[layer] += 1
    assert calls == [NEW, NEW], "the prompt, and every new token but the last"
    uses = layer_use([out.log_PQLS])
    assert {(one.phase, one.position) for one in uses} == {
        *(("prompt", part) for part in range(PROMPT_PARTS)),
        *(("new", first) for first in range(0, NEW, NEW_PART)),
    }
    found = Counter({(one.phase, one.position, one.layer, one.state): one.count for one in uses})
    assert +found == expected
    for one in uses:
        whole = sum(found[one.phase, one.position, one.layer, state] for state in STATES)
        assert one.share == pytest.approx(one.count / whole)


@pytest.mark.parametrize("static", [False, True], ids=["packed", "static"])
@pytest.mark.parametrize("beams", [1, 2])
def test_both_engines_log_ragged_batches_alike(beams, static, backbone, samples):
    rows = samples(5)
    assert len({len(row.prompt_ids) for row in rows}) > 1
    adapters = adapters_of(backbone)
    engines = Generator(backbone, adapters, None), NativeGenerator(backbone, adapters, None, static=static)
    logs = [
        engine.generate(rows, new_tokens=NEW, num_beams=beams, forced_length=True).log_PQLS
        for engine in engines
    ]
    # transformers runs a prompt once a beam, the native engine once a request.
    logs[0] = torch.cat((logs[0][:PROMPT_PARTS] // beams, logs[0][PROMPT_PARTS:]))
    assert torch.equal(*logs)
    logs = [engine.label_scores(rows)[1] for engine in engines]
    assert torch.equal(*logs)
    assert len(logs[0]) == PROMPT_PARTS


def test_a_short_prompt_leaves_parts_without_a_record(backbone, samples):
    row = samples(1)[0]
    short = dataclasses.replace(row, prompt_ids=(5, 6, 7))
    for kind in (Generator, NativeGenerator):
        _, log = kind(backbone, adapters_of(backbone), None).label_scores([short])
        assert {one.position for one in layer_use([log])} == {0, 3, 6}


def test_batches_of_unequal_length_are_added_up():
    a, b = torch.ones(PROMPT_PARTS, 1, 2, 3, dtype=torch.int64), torch.ones(12, 2, 2, 3, dtype=torch.int64)
    uses = layer_use([a, b])
    assert {one.count for one in uses if one.phase == "prompt"} == {3}
    assert [one.position for one in uses if one.phase == "new" and one.count == 2] == [0] * 6 + [8] * 6
    assert layer_use([]) == []
