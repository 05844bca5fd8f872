"""The energy model against generations whose joules are known, and the key that says what a table is of."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from hestctl.energy.model import (
    AdapterPass,
    Cost,
    EnergyModel,
    GenerationPoint,
    LayerMatmuls,
    PassCosts,
    PhaseJoules,
)
from hestctl.energy.protocol import Unavailable
from hestctl.energy.table import EnergyTable, TableKey

CALL, TOKEN, TOKEN2, STEP, CONTEXT = 3.0, 0.05, 1e-5, 1.5, 2e-4


def true_j(prompt: int, new: int, rows: int = 1) -> tuple[float, float]:
    """Prefill and decode joules, summed step by step as a board would draw them."""
    prefill = CALL + rows * (TOKEN * prompt + TOKEN2 * prompt**2)
    decode = sum(STEP + rows * CONTEXT * (prompt + k) for k in range(1, new))
    return prefill, decode


def cost(joules: float) -> Cost:
    return Cost(joules, joules / 100)


def model(noise: float = 0.0, lengths: tuple[int, ...] = (128, 512, 1024)) -> EnergyModel:
    rng = random.Random(7)
    points = tuple(
        GenerationPoint(
            batch, 1, prompt, new, cost(sum(true_j(prompt, new, batch)) * (1 + rng.uniform(-noise, noise)))
        )
        for batch in (1, 4)
        for prompt in lengths
        for new in (1, 9, 33)
    )
    layers = tuple(range(10))
    return EnergyModel(
        engine="e",
        points=points,
        adapters=(AdapterPass("ordinal", 1, 1, cost(0.001), cost(0.1)),),
        matmuls=(
            LayerMatmuls(layers, "prefill", 256, cost(0.004), cost(0.002)),
            LayerMatmuls(layers, "decode", 1, cost(0.12), cost(0.06)),
        ),
    )


def predicted(found: PhaseJoules | Unavailable) -> PhaseJoules:
    assert isinstance(found, PhaseJoules), found
    return found


@pytest.mark.parametrize("prompt", [64, 128, 300, 2048, 4096])
@pytest.mark.parametrize("new", [1, 2, 64, 200])
@pytest.mark.parametrize("batch", [1, 4])
def test_lengths_between_and_outside_the_calibrated_ones(prompt: int, new: int, batch: int) -> None:
    found = predicted(model().predict([prompt] * batch, [new] * batch))
    prefill, decode = true_j(prompt, new, batch)
    assert found.prefill_j == pytest.approx(prefill, rel=1e-6)
    assert found.decode_j == pytest.approx(decode, rel=1e-6, abs=1e-9)


def test_noise_of_two_percent_in_the_calibration_stays_within_five_in_the_prediction() -> None:
    noisy = model(noise=0.02)
    errors = [
        predicted(noisy.predict([prompt], [new])).total_j / sum(true_j(prompt, new)) - 1
        for prompt in (64, 200, 700, 2048)
        for new in (16, 128)
    ]
    assert sum(map(abs, errors)) / len(errors) < 0.05
    costs = noisy.passes(1, 1)
    assert isinstance(costs, PassCosts)
    assert 0 < costs.worst < 0.05
    assert min(costs.call_j, costs.token_j, costs.token2_j, costs.step_j, costs.context_j) >= 0


def test_two_ways_to_tell_the_prefill_agree_where_the_windows_are_right() -> None:
    assert model().phases_disagree(1, 1) == pytest.approx(0, abs=1e-6)
    # Prefills metered a tenth too high: the regression over longer generations never saw them.
    wrong = tuple(
        replace(p, cost=cost(p.cost.joules * 1.1)) if p.new_tokens == 1 else p for p in model().points
    )
    assert replace(model(), points=wrong).phases_disagree(1, 1) == pytest.approx(0.1 / 1.1)
    short = tuple(p for p in model().points if p.new_tokens < 33)
    assert replace(model(), points=short).phases_disagree(1, 1) is None


def test_a_ragged_batch_runs_to_its_longest() -> None:
    ragged = predicted(model().predict([100, 900, 400, 7], [3, 5, 40, 1]))
    whole = predicted(model().predict([900] * 4, [40] * 4))
    assert ragged == whole


def test_what_was_not_calibrated_is_not_predicted() -> None:
    for found in (
        model().predict([100, 100], [4, 4]),
        model().predict([100], [4], num_beams=4),
        model().predict([100] * 4, [4] * 4, gate="ordinal"),
        model().predict([100], [4], gate="linear"),
    ):
        assert isinstance(found, Unavailable)
        assert "not calibrated" in found.reason
    assert "1 x 1, 4 x 1 was" in str(model().predict([1, 1], [1, 1]))


def test_adapters_ride_on_every_prompt_token_and_every_step() -> None:
    bare = predicted(model().predict([500], [21]))
    gated = predicted(model().predict([500], [21], gate="ordinal"))
    assert gated.prefill_j - bare.prefill_j == pytest.approx(500 * 0.001)
    assert gated.decode_j - bare.decode_j == pytest.approx(20 * 0.1)


def test_states_of_layers_save_their_matmuls() -> None:
    full = predicted(model().predict([500], [21]))
    same = predicted(model().predict([500], [21], layer_states=["full"] * 10))
    assert same == full
    mixed = predicted(model().predict([500], [21], layer_states=["off"] * 2 + ["int8"] * 3 + ["full"] * 5))
    assert full.prefill_j - mixed.prefill_j == pytest.approx(500 * (2 * 0.004 + 3 * 0.002))
    assert full.decode_j - mixed.decode_j == pytest.approx(20 * (2 * 0.12 + 3 * 0.06))
    assert model().matmuls_j("decode", 1, "int8") == pytest.approx(0.6)
    assert model().matmuls_j("prefill", 7, "full") == pytest.approx(0.04)
    assert model().matmuls_j("decode", 4, "full") is None


KEY = TableKey({"device": "GPU-1", "shape": "30x576"}, {"driver": "580", "torch": "2.13"})


def test_a_table_comes_back_from_json() -> None:
    table = EnergyTable(
        "t", KEY.text, "2026", "measured", "m", "d", "u", "float16", 576, 16, 256,
        cost(2.0), cost(1.0), cost(0.1), model(),
    )  # fmt: skip
    for one in (table, replace(table, model=None)):
        assert EnergyTable.from_dict(json.loads(json.dumps(one.as_dict()))) == one


def test_a_key_names_what_changed() -> None:
    newer = replace(KEY, conditions={"driver": "590", "torch": "2.13", "kernels": "x"})
    assert newer.text.startswith(KEY.subject_text)
    assert newer.changes(KEY.text) == ["driver was 580, is 590", "kernels was not recorded, is x"]
    assert KEY.changes(KEY.text) == []


def test_no_subject_begins_like_another() -> None:
    longer = replace(KEY, subject={**KEY.subject, "shape": "30x5760"})
    assert not longer.text.startswith(KEY.subject_text)
    piped = TableKey({"device": "a|b"}, {})
    assert piped.text == "device=a/b||"
