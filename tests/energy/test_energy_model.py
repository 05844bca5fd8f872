"""The energy model against generations whose joules are known, and the key that says what a table is of."""

from __future__ import annotations

import json
import random
from dataclasses import astuple, replace

import pytest

from hestctl.energy.model import (
    VARIANTS,
    AdapterPass,
    Cost,
    EnergyModel,
    GenerationPoint,
    PhaseJoules,
    State,
    Terms,
    uniform,
)
from hestctl.energy.protocol import Unavailable
from hestctl.energy.table import EnergyTable, TableKey
from hestctl.records import FULL, INT8, OFF, STATES, BlockStates

LAYERS, LENGTHS = 10, (128, 512, 1024)
BLOCK_J: dict[State, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "off": ((0, 0, 0, 0, 0), (0, 0, 0, 0, 0)),
    "int8": ((0.02, 0.002, 1e-6, 0.04, 2e-5), (0.03, 0.003, 0, 0.05, 0)),
    "full": ((0.025, 0.004, 1e-6, 0.06, 2e-5), (0.04, 0.006, 0, 0.09, 0)),
}
"""call, token, token2, step and context of one layer's attention and MLP (J)."""
REST_J = (1.2, 0.003, 0, 0.4, 0)
MIXED = BlockStates((OFF, INT8, FULL, FULL, OFF, INT8, INT8, FULL, OFF, FULL), (INT8,) * 4 + (FULL, OFF) * 3)


def true_j(
    prompt: int, new: int, rows: int = 1, blocks: BlockStates | None = None, dear: bool = False
) -> tuple[float, float]:
    """Prefill and decode joules, summed block by block and step by step as a board would draw them.

    ``dear``: an MLP in int8 costs 1.3 times a full one.
    """
    states = BlockStates.uniform(LAYERS) if blocks is None else blocks
    parts = [REST_J]
    for layer in range(LAYERS):
        for block in (0, 1):
            joules = BLOCK_J[STATES[states.state(layer, block)]][block]  # type: ignore[index]
            if dear and block == 1 and states.state(layer, block) == INT8:
                joules = tuple(1.3 * j for j in BLOCK_J["full"][1])
            parts.append(joules)
    prefill = decode = 0.0
    for call, token, token2, step, context in parts:
        prefill += call + rows * (token * prompt + token2 * prompt**2)
        decode += sum(step + rows * context * (prompt + k) for k in range(1, new))
    return prefill, decode


def cost(joules: float) -> Cost:
    return Cost(joules, joules / 100)


def model(
    noise: float = 0.0,
    lengths: tuple[int, ...] = LENGTHS,
    variants: tuple[tuple[State, State], ...] = VARIANTS,
    seed: int = 7,
    dear: bool = False,
) -> EnergyModel:
    rng = random.Random(seed)
    points = []
    for batch in (1, 4):
        for attention, mlp in variants:
            full = (attention, mlp) == ("full", "full")
            for prompt in lengths if full else (min(lengths), max(lengths)):
                for new in (1, 9, 33) if full else (1, 33):
                    true = sum(true_j(prompt, new, batch, uniform(LAYERS, attention, mlp), dear))
                    shown = cost(true * (1 + rng.uniform(-noise, noise)))
                    points.append(GenerationPoint(batch, 1, prompt, new, shown, attention, mlp))
    return EnergyModel(
        engine="e",
        layers=LAYERS,
        points=tuple(points),
        adapters=(AdapterPass("ordinal", 1, 1, cost(0.001), cost(0.1)),),
    )


def predicted(found: PhaseJoules | Unavailable) -> PhaseJoules:
    assert isinstance(found, PhaseJoules), found
    return found


def known(found: Terms | Unavailable) -> Terms:
    assert isinstance(found, Terms), found
    return found


FULL_ALONE = VARIANTS[:1]


@pytest.mark.parametrize("prompt", [64, 128, 300, 2048, 4096])
@pytest.mark.parametrize("new", [1, 2, 64, 200])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("variants", [VARIANTS, FULL_ALONE])
def test_lengths_between_and_outside_the_calibrated_ones(
    prompt: int, new: int, batch: int, variants: tuple[tuple[State, State], ...]
) -> None:
    found = predicted(model(variants=variants).predict([prompt] * batch, [new] * batch))
    prefill, decode = true_j(prompt, new, batch)
    assert found.prefill_j == pytest.approx(prefill, rel=1e-6)
    assert found.decode_j == pytest.approx(decode, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    "blocks", [MIXED, BlockStates.uniform(LAYERS, INT8), BlockStates.uniform(LAYERS, OFF)]
)
@pytest.mark.parametrize("batch", [1, 4])
def test_blocks_in_any_mix_of_states(blocks: BlockStates, batch: int) -> None:
    for prompt, new in ((64, 16), (300, 2), (700, 128), (4096, 64)):
        found = predicted(model().predict([prompt] * batch, [new] * batch, blocks=blocks))
        prefill, decode = true_j(prompt, new, batch, blocks)
        assert found.prefill_j == pytest.approx(prefill, rel=1e-6)
        assert found.decode_j == pytest.approx(decode, rel=1e-6)


def random_blocks(rng: random.Random) -> BlockStates:
    attention, mlp = (tuple(rng.choices((OFF, INT8, FULL), k=LAYERS)) for _ in range(2))
    return BlockStates(attention, mlp)


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_two_percent_in_the_calibration_is_less_in_the_prediction_of_mixed_blocks(seed: int) -> None:
    noisy, rng = model(noise=0.02, seed=seed), random.Random(seed)
    asked = [None, MIXED, BlockStates.uniform(LAYERS, INT8), BlockStates.uniform(LAYERS, OFF)]
    for blocks in [*asked, *(random_blocks(rng) for _ in range(8))]:
        errors = [
            predicted(noisy.predict([prompt], [new], blocks=blocks)).total_j
            / sum(true_j(prompt, new, 1, blocks))
            - 1
            for prompt in (200, 400, 900)
            for new in (16, 64, 128)
        ]
        assert sum(map(abs, errors)) / len(errors) < 0.015
    worst = noisy.fit_error(1, 1)
    assert isinstance(worst, float)
    assert 0.005 < worst < 0.04
    for block in (0, 1):
        for state in (OFF, INT8, FULL):
            assert min(astuple(known(noisy.component(1, 1, block, state)))) >= 0


def test_no_coefficient_is_below_zero_however_noisy_the_calibration() -> None:
    for seed in range(5):
        noisy = model(noise=0.4, seed=seed)
        parts = [known(noisy.component(1, 1, block, state)) for block in (0, 1) for state in (INT8, FULL)]
        rest = known(noisy.generation(1, 1, None, BlockStates.uniform(LAYERS, OFF)))
        assert min(min(astuple(part)) for part in [*parts, rest]) >= 0


def test_the_components_are_those_of_one_layer() -> None:
    for block in (0, 1):
        for state, name in enumerate(STATES):
            found = astuple(known(model().component(1, 1, block, state)))
            assert found == pytest.approx(BLOCK_J[name][block], rel=1e-6, abs=1e-12)  # type: ignore[index]
    assert model().fit_error(1, 1) == pytest.approx(0, abs=1e-9)


def test_an_int8_block_that_costs_more_than_a_full_one_is_told_so() -> None:
    dear = model(noise=0.02, dear=True)
    full, int8 = (known(dear.component(1, 1, 1, state)) for state in (FULL, INT8))
    assert int8.total_j(512, 64) / full.total_j(512, 64) == pytest.approx(1.3, rel=0.05)
    all_int8 = BlockStates((FULL,) * LAYERS, (INT8,) * LAYERS)
    assert (
        predicted(dear.predict([512], [64], blocks=all_int8)).total_j
        > predicted(dear.predict([512], [64])).total_j
    )
    attention = [known(dear.component(1, 1, 0, state)).total_j(512, 64) for state in (OFF, INT8, FULL)]
    assert attention == sorted(attention)


def test_a_bill_is_the_sum_of_its_parts() -> None:
    found = known(model().generation(1, 1, None, MIXED))
    parts = known(model().generation(1, 1, None, BlockStates.uniform(LAYERS, OFF)))
    for block, counts in enumerate(MIXED.counts()):
        for state, count in enumerate(counts):
            parts = parts.plus(known(model().component(1, 1, block, state)).times(count))
    assert astuple(found) == pytest.approx(astuple(parts))
    assert found.total_j(300, 20) == pytest.approx(sum(true_j(300, 20, 1, MIXED)), rel=1e-6)


def test_terms() -> None:
    terms = Terms(2.0, 3.0, 5.0, 7.0, 11.0)
    assert terms.prefill_j(10) == 2 + 30 + 500
    # Steps look back on 11, 12 and 13 tokens.
    assert terms.decode_j(10, 4) == 3 * 7 + 11 * (11 + 12 + 13)
    assert terms.total_j(10, 4) == terms.prefill_j(10) + terms.decode_j(10, 4)
    assert terms.decode_j(10, 1) == terms.decode_j(10, 0) == 0
    assert terms.plus(terms) == terms.times(2)
    assert terms.times(0) == Terms.zero() == Terms()


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
    ragged = predicted(model().predict([100, 900, 400, 7], [3, 5, 40, 1], blocks=MIXED))
    whole = predicted(model().predict([900] * 4, [40] * 4, blocks=MIXED))
    assert ragged == whole


def test_what_was_not_calibrated_is_not_predicted() -> None:
    for found in (
        model().predict([100, 100], [4, 4]),
        model().predict([100], [4], num_beams=4),
        model().predict([100] * 4, [4] * 4, gate="ordinal"),
        model().predict([100], [4], gate="linear"),
        model().generation(2, 1, None, None),
        model().component(1, 4, 0, FULL),
        model().fit_error(3, 1),
        model().padded(5, 1),
        model().padded(1, 2),
    ):
        assert isinstance(found, Unavailable)
        assert "calibrated" in found.reason
    assert "1 x 1, 4 x 1 was" in str(model().predict([1, 1], [1, 1]))
    with pytest.raises(ValueError, match="states of 9 layers for a model of 10"):
        model().generation(1, 1, None, BlockStates.uniform(9))


@pytest.mark.parametrize("variants", [FULL_ALONE, VARIANTS[:6]])
def test_without_all_states_measured_only_full_blocks_are_known(
    variants: tuple[tuple[State, State], ...],
) -> None:
    full_alone = model(variants=variants)
    assert predicted(full_alone.predict([100], [4], blocks=BlockStates.uniform(LAYERS))) == predicted(
        full_alone.predict([100], [4])
    )
    assert predicted(full_alone.predict([100], [4])).total_j == pytest.approx(sum(true_j(100, 4)))
    for found in (
        full_alone.predict([100], [4], blocks=MIXED),
        full_alone.component(1, 1, 0, FULL),
        full_alone.component(1, 1, 1, OFF),
    ):
        assert isinstance(found, Unavailable)
        assert found.reason == "batch 1 x 1 was calibrated with full blocks alone (e engine)"


def test_a_batch_is_padded_to_the_next_calibrated_one() -> None:
    assert [model().padded(size, 1) for size in (1, 2, 3, 4)] == [1, 4, 4, 4]
    assert "no batch of 5 or more with 1 beams was calibrated (1 x 1, 4 x 1 was)" in str(model().padded(5, 1))


def test_adapters_ride_on_every_prompt_token_and_every_step() -> None:
    for blocks in (None, MIXED):
        bare = predicted(model().predict([500], [21], blocks=blocks))
        gated = predicted(model().predict([500], [21], gate="ordinal", blocks=blocks))
        assert gated.prefill_j - bare.prefill_j == pytest.approx(500 * 0.001)
        assert gated.decode_j - bare.decode_j == pytest.approx(20 * 0.1)


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


def test_a_newer_model_keeps_the_batches_that_it_did_not_measure():
    cost, other = Cost(1.0, 0.0), Cost(2.0, 0.0)

    def model(batches, cost):
        points = tuple(GenerationPoint(b, n, 64, 1, cost) for b, n in batches)
        adapters = tuple(AdapterPass("linear", b, n, cost, cost) for b, n in batches)
        return EnergyModel("hestctl", 2, points, adapters)

    newer = model([(1, 4)], cost).with_batches_of(model([(1, 1), (4, 1), (1, 4)], other))
    found = {(p.batch_size, p.num_beams): p.cost for p in newer.points}
    assert found == {(1, 4): cost, (1, 1): other, (4, 1): other}
    assert {(a.batch_size, a.num_beams): a.prefill for a in newer.adapters} == found
    assert len(newer.points) == len(newer.adapters) == 3
