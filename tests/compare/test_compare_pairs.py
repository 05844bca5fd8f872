"""Seeds, families, A/A pairs, the meter's error and forced lengths: what a verdict takes into account."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import duckdb
import pytest
from simulated_runs import a_run, add, empty_store, generated

from hestctl.compare import verdicts
from hestctl.compare.decisions import REPEATABILITY
from hestctl.compare.repeats import repeatability
from hestctl.compare.results import Claim, Comparison, Pair, Repeatability
from hestctl.compare.statistics import Estimate, Measure
from hestctl.compare.table import as_json, as_rows, compare
from hestctl.compare.verdicts import Energy, Quality
from hestctl.records import Run

SETTINGS = {"backbone": {"name": "smollm2-135m"}, "train": {"seed": 42, "learning_rate": 1e-4}}


def store_of(*runs: tuple[Run, dict[str, Any]], count: int = 120) -> duckdb.DuckDBPyConnection:
    connection = empty_store()
    for run, settings in runs:
        add(connection, run, samples=generated(run, count, **settings))
    return connection


def pair_of(comparison: Comparison, other: str = "tabs") -> Pair:
    return next(one for one in comparison.pairs if one.other == other)


def width(measure: Measure) -> float:
    return math.log(measure.high / measure.low)


# Seeds


def seeded(*joules: tuple[str, int, float]) -> Comparison:
    return compare(
        store_of(
            *(
                (a_run(method, 1 + place, seed=seed), {"joules": spent, "noise": 9 + place})
                for place, (method, seed, spent) in enumerate(joules)
            )
        )
    )


def test_seeds_that_differ_widen_the_interval_beyond_what_samples_tell() -> None:
    alike = seeded(
        *(("hest", seed, 40.0) for seed in (1, 2, 3)), *(("tabs", seed, 60.0) for seed in (1, 2, 3))
    )
    apart = seeded(
        ("hest", 1, 36.0), ("hest", 2, 40.0), ("hest", 3, 44.0), *(("tabs", seed, 60.0) for seed in (1, 2, 3))
    )
    assert width(pair_of(apart).ratio) > 3 * width(pair_of(alike).ratio)
    assert pair_of(apart).ratio.low < 36 / 60


def test_what_both_sides_of_a_seed_share_cancels_where_seeds_are_the_same() -> None:
    spread = {1: 0.85, 2: 1.0, 3: 1.15}
    matched = seeded(
        *(("hest", seed, 40 * level) for seed, level in spread.items()),
        *(("tabs", seed, 60 * level) for seed, level in reversed(spread.items())),
    )
    others = seeded(
        *(("hest", seed, 40 * level) for seed, level in spread.items()),
        *(("tabs", seed + 10, 60 * level) for seed, level in spread.items()),
    )
    assert width(pair_of(matched).ratio) < 0.4 * width(pair_of(others).ratio)


def test_one_seed_is_said_to_tell_nothing_of_another_training() -> None:
    found = seeded(("hest", 1, 40.0), ("hest", 2, 41.0), ("tabs", 1, 60.0))
    assert "tabs has one seed: that says nothing about another training" in pair_of(found).notes
    assert not any(note.startswith("hest 0.6 has") for note in pair_of(found).notes)


# Families


def test_budgets_of_two_scopes_are_never_held_against_each_other() -> None:
    greedy = {"method": {"name": "hest", "scope": "network", "layers": "greedy"}}
    found = compare(
        store_of(
            (a_run("hest", 1, scope="network"), {"joules": 40}),
            (a_run("hest", 2), {"joules": 59}),
            (a_run("hest", 3, scope="network", settings=greedy), {"joules": 41}),
            (a_run("hest", 4, dual="none"), {"joules": 60}),
            (a_run("tabs", 5, scope="network"), {"joules": 60}),
        )
    )
    assert {(pair.proposed, pair.other) for pair in found.pairs} == {
        ("hest 0.6 network", "tabs"),
        ("hest 0.6 network", "hest 0.6 greedy control"),
        ("hest 0.6 adapter", "tabs"),
        ("hest 0.6 adapter", "hest 0.6 no dual"),
    }


def claims_of(runs: list[tuple[Run, dict[str, Any]]]) -> list[Claim]:
    return [pair.claim for pair in compare(store_of(*runs)).pairs]


def test_every_pair_against_baselines_and_controls_is_one_family_and_ablations_another() -> None:
    int8 = a_run("lora", 5, settings={"backbone": {"precision": "int8"}})
    found = compare(
        store_of(
            (a_run("hest", 1), {"joules": 40}),
            (a_run("hest", 2, emax_ratio=0.4), {"joules": 39}),
            (a_run("hest", 3, precision="fp16-only"), {"joules": 45}),
            (a_run("tabs", 4), {"joules": 60}),
            (int8, {"joules": 50}),
        )
    )
    assert all(any("chosen by these joules" in note for note in pair.notes) for pair in found.pairs)
    sizes = {(pair.other_role, pair.claim.family) for pair in found.pairs}
    assert sizes == {("baseline", 4), ("control", 4), ("ablation", 1)}
    assert [pair.proposed for pair in found.pairs if pair.other_role == "ablation"] == ["hest 0.6"]
    for pair in found.pairs:
        assert pair.claim.both == max(pair.claim.energy, pair.claim.quality)
        assert pair.claim.adjusted >= pair.claim.both


ENERGY = Energy(Estimate(0.8, 100, True, ((0.01**2, 24.0),)), 25)
EQUAL = Quality("rouge_lsum", "not inferior", Measure(0.1, -0.5, 0.7, 100), 0.01, 0.9, "ROUGE-Lsum +0.10")
GRANTED = Repeatability(REPEATABILITY, "fixed")


def decided(energy: Energy = ENERGY, score: Quality = EQUAL, adjusted: float = 0.01) -> tuple[str, str]:
    found = Claim(0.001, 0.01, 0.01, adjusted, adjusted, 8)
    return verdicts.verdict(energy, score, found, "measured", 1.0, GRANTED)


def test_a_claim_that_fails_only_among_its_family_says_so() -> None:
    assert decided()[0] == "less energy at equal quality"
    verdict, why = decided(adjusted=0.03)
    assert verdict == "inconclusive"
    assert "by itself less energy at equal quality, but among 8 pairs Holm's p is 0.03, above 0.025" in why
    worse = replace(EQUAL, verdict="inferior")
    assert decided(score=worse)[0] == "less energy, worse quality"
    verdict, why = decided(score=worse, adjusted=0.03)
    assert verdict == "inconclusive"
    assert "by itself less energy, worse quality, but among 8 pairs Holm's p is 0.03" in why


# The meter's error


def test_a_saving_within_the_meters_own_error_is_none() -> None:
    verdict, why = decided(replace(ENERGY, meter_error=0.21))
    assert verdict == "inconclusive"
    assert "the meter's error bounds may shift the ratio by 21.0 %" in why
    assert decided(replace(ENERGY, meter_error=0.19))[0] == "less energy at equal quality"


@pytest.mark.parametrize(("ratio", "called"), [(1.2, "more energy"), (1.0, "no difference")])
def test_the_meters_error_limits_the_other_verdicts_as_well(ratio: float, called: str) -> None:
    energy = replace(ENERGY, ratio=replace(ENERGY.ratio, value=ratio, sources=((0.001**2, 24.0),)))
    assert decided(replace(energy, meter_error=0.04))[0] == called
    assert decided(replace(energy, meter_error=0.21))[0] == "inconclusive"


def test_the_meters_error_is_the_sum_of_both_sides_bounds_each_by_itself() -> None:
    connection = empty_store()
    for run, joules, bound in ((a_run("tabs", 1), 60.0, None), (a_run("hest", 2), 40.0, 16.0)):
        samples = [replace(one, energy_error_j=bound) for one in generated(run, 120, joules=joules)]
        add(connection, run, samples=samples)
    pair = pair_of(compare(connection))
    assert pair.meter_error_percent == pytest.approx(40, rel=0.1)
    assert pair.verdict == "inconclusive"
    connection = empty_store()
    for run, joules, bound in ((a_run("tabs", 1), 60.0, 24.0), (a_run("hest", 2), 40.0, 0.4)):
        samples = [replace(one, energy_error_j=bound) for one in generated(run, 120, joules=joules)]
        add(connection, run, samples=samples)
    pair = pair_of(compare(connection))
    assert pair.meter_error_percent == pytest.approx(41, rel=0.1)
    assert pair.verdict == "inconclusive"


# The A/A control


def repeated(settings: Any = SETTINGS, joules: float = 40.0, **changes: Any) -> Comparison:
    first = a_run("hest", 2, settings=SETTINGS)
    again = a_run("hest", 3, settings=settings, **changes)
    return compare(
        store_of((a_run("tabs", 1), {"joules": 60}), (first, {"joules": 40.0}), (again, {"joules": joules}))
    )


def test_two_runs_of_one_configuration_and_seed_are_an_a_a_pair() -> None:
    found = repeated()
    (repeat,) = found.repeats
    assert repeat.run_ids == ("hest-0002", "hest-0003")
    assert repeat.ratio.low < 1 < repeat.ratio.high
    assert (repeat.energy, repeat.quality) == ("same", "not inferior")
    assert abs(repeat.quality_difference.value) < 1
    assert found.repeatability.value == REPEATABILITY
    assert "no less than 2 % is granted" in found.repeatability.reason
    table = next(one for one in as_rows(found) if one.title == "A/A control")
    assert table.rows[0][0] == "hest 0.6, seed 42 twice"
    assert table.rows[0][2] == "no difference"


def test_an_a_a_pair_that_differs_more_takes_the_place_of_two_percent() -> None:
    found = repeated(joules=44.0)
    assert found.repeatability.value == pytest.approx(0.10, abs=0.01)
    assert "takes the place of 2 %" in found.repeatability.reason
    granted = compare(
        store_of(
            (a_run("tabs", 1), {"joules": 48}),
            (a_run("hest", 2, settings=SETTINGS), {"joules": 40.0}),
            (a_run("hest", 3, settings=SETTINGS), {"joules": 44.5}),
        )
    )
    pair = pair_of(granted)
    assert pair.ratio.high < 1 / (1 + REPEATABILITY)
    assert pair.verdict == "inconclusive"
    assert "by which two runs of one model may differ" in pair.why


def test_which_of_two_runs_came_first_does_not_matter() -> None:
    (repeat,) = repeated().repeats
    granted = [
        repeatability([replace(repeat, ratio=Measure(ratio)), repeat], "measured").value
        for ratio in (1.1, 1 / 1.1)
    ]
    assert granted == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": {**SETTINGS, "train": {"seed": 42, "learning_rate": 3e-4}}},
        {"seed": 43},
        {"versions": {"torch": "2.14"}},
        {"emax_j": 12.50001},
    ],
)
def test_other_settings_seeds_versions_or_budgets_are_no_repetition(changes: dict[str, Any]) -> None:
    found = repeated(**changes)
    assert found.repeats == ()
    assert found.repeatability.value == REPEATABILITY
    assert found.repeatability.reason.startswith("not measured; 2 % is taken from")


def test_seeds_of_an_untrained_model_are_an_a_a_pair() -> None:
    found = compare(
        store_of(
            *(
                (a_run("base", number, seed=number, settings=SETTINGS), {"noise": number})
                for number in (1, 2)
            ),
            (a_run("hest", 3), {}),
        )
    )
    assert [one.kind for one in found.repeats] == ["seeds 1 and 2, untrained"]


def test_estimated_joules_are_shown_twice_and_called_nothing() -> None:
    changes = {"energy_kind": "estimated", "settings": SETTINGS}
    runs = [(a_run("hest", number, **changes), {"joules": 40.0 * number}) for number in (1, 2)]
    found = compare(store_of(*runs))
    (repeat,) = found.repeats
    assert repeat.ratio.value == pytest.approx(2, rel=0.05)
    assert repeat.energy is None
    assert found.repeatability.value == REPEATABILITY
    table = next(one for one in as_rows(found) if one.title == "A/A control")
    assert table.rows[0][2] == "no verdict"
    assert "estimated" in table.headers[1]
    assert "earn no verdict" in table.notes[-1]


def test_without_joules_there_is_no_a_a_pair() -> None:
    changes = {"energy_kind": "none", "settings": SETTINGS}
    runs = [(a_run("hest", number, **changes), {}) for number in (1, 2)]
    assert compare(store_of(*runs)).repeats == ()


def test_estimated_joules_claim_nothing() -> None:
    changes = {"energy_kind": "estimated", "meter": "estimate"}
    pair = pair_of(
        compare(
            store_of(
                (a_run("tabs", 1, **changes), {"joules": 60}), (a_run("hest", 2, **changes), {"joules": 40})
            )
        )
    )
    assert pair.claim.energy is None
    assert pair.claim.adjusted is None
    assert pair.least_detectable_saving_percent is None


# Forced length


def profiled(connection: duckdb.DuckDBPyConnection, run: Run, joules: float, **changes: Any) -> None:
    profile = replace(
        run,
        run_id=f"profile-{run.run_id}",
        command="profile",
        parent_run_id=run.run_id,
        max_new_tokens=128,
        **changes,
    )
    samples = []
    for length in (128, 512):
        for number, one in enumerate(generated(run, 12, joules=joules)):
            factor = joules * length / 128
            samples.append(
                replace(
                    one,
                    sample_id=f"len{length}-{number}",
                    split="profile",
                    prompt_tokens=length,
                    new_tokens=128,
                    energy_j=factor * (1 + 0.001 * (number % 3)),
                )
            )
    add(connection, profile, samples=samples)


def test_profile_runs_of_both_sides_give_the_ratio_at_forced_length() -> None:
    tabs, hest = a_run("tabs", 1), a_run("hest", 2)
    connection = store_of((tabs, {"joules": 60, "tokens": 100}), (hest, {"joules": 40, "tokens": 70}))
    without = pair_of(compare(connection))
    assert without.forced_length_ratio.value is None
    assert "`hestctl profile`" in without.forced_length_ratio.reason
    assert "the nearest answer is per new token" in without.at_equal_length
    profiled(connection, tabs, 60.0)
    profiled(connection, hest, 54.0)
    pair = pair_of(compare(connection))
    assert pair.forced_length_ratio.value == pytest.approx(0.9)
    assert pair.forced_length_ratio.n == 24
    assert pair.at_equal_length.startswith("at forced equal length: less energy, 10.0 % fewer joules [")


@pytest.mark.parametrize("changes", [{"device_uuid": "GPU-2"}, {"data_hash": "0000"}, {"max_new_tokens": 64}])
def test_profile_runs_of_other_work_or_devices_are_not_set_side_by_side(changes: dict[str, Any]) -> None:
    tabs, hest = a_run("tabs", 1), a_run("hest", 2)
    connection = store_of((tabs, {"joules": 60}), (hest, {"joules": 40}))
    profiled(connection, tabs, 60.0)
    profile = replace(hest, run_id="p", command="profile", parent_run_id=hest.run_id)
    samples = [
        replace(one, sample_id=f"len128-{number}", new_tokens=128, prompt_tokens=128)
        for number, one in enumerate(generated(hest, 12))
    ]
    add(connection, replace(profile, **changes), samples=samples)
    assert pair_of(compare(connection)).forced_length_ratio.value is None


# What stands beside every verdict


@pytest.mark.parametrize("joules", [30.0, 57.0, 59.9, 90.0])
def test_every_pair_says_what_it_could_have_found(joules: float) -> None:
    pair = pair_of(
        compare(store_of((a_run("tabs", 1), {"joules": 60}), (a_run("hest", 2), {"joules": joules})))
    )
    assert "the least saving that 30 batches can show is" in pair.why
    assert "the least difference that 120 samples can show is" in pair.why
    assert 2 < pair.least_detectable_saving_percent < 10
    assert 0 < pair.least_detectable_points < 3


def engine(kernel: str, adapter: str = "fused") -> dict[str, Any]:
    told = f"16 rows: {kernel} (the fewest joules; 3 tried); 128 rows: triton (quickest)"
    return {"engine": {"name": "hestctl", "adapter": adapter, "kernels": {"576x576": told}}}


@pytest.mark.parametrize(
    ("summary", "note"),
    [
        (engine("triton"), None),
        (engine("torchao"), "run int8 products of 576x576 by other kernels"),
        (
            {"engine": {"kernels": "default: not calibrated"}},
            "run int8 products of every shape by other kernels",
        ),
        (engine("triton", "unfused: no device"), "fused, of the other not"),
        ({}, None),
    ],
)
def test_runs_by_other_kernels_are_told_apart(summary: dict[str, Any], note: str | None) -> None:
    pair = pair_of(
        compare(
            store_of(
                (a_run("tabs", 1, summary=engine("triton")), {}),
                (a_run("hest", 2, summary=summary), {}),
                count=16,
            )
        )
    )
    found = [one for one in pair.notes if "kernels" in one or "fused" in one]
    assert (not found) if note is None else (note in found[0])


def test_the_document_has_what_the_verdict_took_into_account() -> None:
    document = json.loads(json.dumps(as_json(repeated()), allow_nan=False))
    (pair,) = document["pairs"]
    assert set(pair["p_one_sided"]) == {
        *("energy", "quality", "both", "adjusted_energy", "adjusted", "family")
    }
    assert pair["least_detectable_saving_percent"] > 0
    assert pair["meter_error_percent"] > 0
    assert pair["energy_ratio_at_forced_length"]["value"] is None
    assert document["aa_control"][0]["run_ids"] == ["hest-0002", "hest-0003"]
    assert document["repeatability"] == REPEATABILITY
