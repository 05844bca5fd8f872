"""What a claim must not rest on: unequal samples, steps of quality, other settings, other plans."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import duckdb
import numpy as np
import pytest
from simulated_runs import a_run, add, empty_store, generated

from hestctl.compare import evidence
from hestctl.compare.configurations import configurations
from hestctl.compare.results import Comparison, Pair
from hestctl.compare.table import compare
from hestctl.errors import HestError
from hestctl.records import Run, Sample

INT8 = {"backbone": {"precision": "int8"}}
GREEDY = {"method": {"name": "hest", "scope": "network", "layers": "greedy"}}


def store_of(*runs: tuple[Run, dict[str, Any]], count: int = 120) -> duckdb.DuckDBPyConnection:
    connection = empty_store()
    for run, settings in runs:
        add(connection, run, samples=generated(run, count, **settings))
    return connection


def pair_of(comparison: Comparison, other: str) -> Pair:
    return next(one for one in comparison.pairs if one.other == other)


def test_a_baseline_whose_cheap_samples_alone_are_valid_is_not_the_cheapest() -> None:
    connection = store_of(
        (a_run("hest", 1), {"joules": 54}),
        (a_run("tabs", 2), {"joules": 50}),
        (a_run("lora", 4, settings=INT8), {"joules": 70}),
        count=300,
    )
    lora = a_run("lora", 3)
    samples = generated(lora, 300, joules=62)
    cut = np.quantile([one.energy_j for one in samples], 0.05)
    add(
        connection,
        lora,
        samples=[
            one if one.energy_j < cut else replace(one, energy_valid=False, energy_reason="throttled")
            for one in samples
        ],
    )
    found = compare(connection)
    assert found.best_baseline is not None
    assert found.best_baseline.label == "tabs"
    assert found.conclusion.startswith("Not shown that HEST saves energy: more energy against tabs")


def test_two_steps_within_the_margin_are_no_equal_quality() -> None:
    """lora is within the margin of tabs and hest within that of lora, but hest is worse than tabs."""
    runs = (
        (a_run("hest", 1), {"joules": 30, "score": 28.8, "spread": 1.0}),
        (a_run("tabs", 2), {"joules": 63, "score": 30.1, "spread": 1.0}),
        (a_run("lora", 3), {"joules": 46, "score": 29.3, "spread": 1.0}),
        (a_run("lora", 4, settings=INT8), {"joules": 60, "score": 28.8, "spread": 1.0}),
    )
    found = compare(store_of(*runs, count=2000))
    assert pair_of(found, "lora").verdict == "less energy at equal quality"
    assert pair_of(found, "tabs").quality == "inferior"
    assert found.gap.percent.value is None
    assert found.gap.reason.startswith("quality is inferior to that of tabs")
    assert found.conclusion.startswith(
        "Not shown that HEST saves energy: quality is inferior to that of tabs"
    )


def test_a_claim_from_single_trainings_says_so() -> None:
    runs = [
        (a_run("hest", 1, seed=1), {"joules": 30}),
        (a_run("tabs", 2, seed=1), {"joules": 60}),
        (a_run("lora", 3, settings=INT8, seed=1), {"joules": 50}),
    ]
    single = compare(store_of(*runs, count=400)).conclusion
    assert "HEST saves energy: " in single
    assert single.endswith(
        "One training each of hest 0.6, tabs, lora int8 control: other seeds may differ by more than these "
        "samples do."
    )
    more = [
        (a_run(run.method, 10 + place, seed=2, settings=run.settings), said)
        for place, (run, said) in enumerate(runs)
    ]
    three = [
        (a_run(run.method, 20 + place, seed=3, settings=run.settings), said)
        for place, (run, said) in enumerate(runs)
    ]
    found = compare(store_of(*runs, *more, *three, count=400))
    assert "HEST saves energy: " in found.conclusion
    assert "One training" not in found.conclusion


def test_the_best_control_is_one_that_may_be_held_against_the_best() -> None:
    runs = (
        (a_run("hest", 1), {"joules": 30}),
        (a_run("tabs", 2), {"joules": 60}),
        (a_run("lora", 3, settings=INT8), {"joules": 50}),
        (a_run("hest", 4, scope="network", settings=GREEDY), {"joules": 45}),
    )
    found = compare(store_of(*runs, count=400))
    assert found.best_control is not None
    assert found.best_control.label == "lora int8 control"
    assert found.gap_vs_controls.percent.value == pytest.approx(40, abs=3)


def test_models_that_score_nothing_are_not_equally_good() -> None:
    nothing = {"score": 0.0, "random": False}
    runs = (a_run("hest", 1), {"joules": 40, **nothing}), (a_run("tabs", 2), {"joules": 60, **nothing})
    pair = pair_of(compare(store_of(*runs)), "tabs")
    assert (pair.quality, pair.verdict) == ("inconclusive", "inconclusive")
    assert "tabs itself scores no more than the margin of 1" in pair.why


def test_other_settings_are_another_configuration_and_supersede_nothing() -> None:
    def trained(rate: float, rank: int = 16, **more: Any) -> dict[str, Any]:
        return {"train": {"learning_rate": rate, **more}, "method": {"name": "hest", "rank": rank}}

    found = compare(
        store_of(
            (a_run("hest", 1, seed=1, settings=trained(1e-4, seed=1, save_steps=5)), {}),
            (a_run("hest", 2, seed=2, settings=trained(1e-4, seed=2, save_steps=9)), {}),
            (a_run("hest", 3, seed=2, settings=trained(1e-2)), {}),
            (a_run("tabs", 4, seed=1), {}),
        )
    )
    assert {one.label: one.seeds for one in configurations(found.rows)} == {
        "hest 0.6 learning_rate 0.0001": 2,
        "hest 0.6 learning_rate 0.01": 1,
        "tabs": 1,
    }
    assert not found.set_apart
    many = compare(
        store_of(
            (a_run("hest", 1, settings=trained(1e-4, 16, epochs=1)), {}),
            (a_run("hest", 2, settings=trained(1e-3, 4, epochs=2)), {}),
            (a_run("tabs", 4), {}),
        )
    )
    assert [row.label for row in many.rows][:2] == ["hest 0.6 settings 1", "hest 0.6 settings 2"]


def test_every_two_runs_of_one_configuration_are_an_a_a_pair() -> None:
    settings = {"train": {"learning_rate": 1e-4}}
    runs = [
        (a_run("tabs", number, settings=settings), {"joules": joules, "noise": 5})
        for number, joules in ((1, 57.0), (2, 63.0), (3, 60.0))
    ]
    found = compare(store_of(*runs, (a_run("hest", 4, settings=settings), {})))
    assert [one.run_ids for one in found.repeats] == [
        ("tabs-0001", "tabs-0002"),
        ("tabs-0001", "tabs-0003"),
        ("tabs-0002", "tabs-0003"),
    ]
    assert found.repeatability.value == pytest.approx(63 / 57 - 1)


def profiled(run: Run, joules: float) -> list[Sample]:
    return [
        replace(one, sample_id=f"512-{place}", split="profile", new_tokens=128, energy_j=joules + place)
        for place, one in enumerate(generated(run, 12))
    ]


@pytest.mark.parametrize(("ratio", "shown"), [(0.6, True), (0.3, False)])
def test_a_profile_of_another_budgets_plan_is_not_the_runs_own(ratio: float, shown: bool) -> None:
    hest = a_run("hest", 1, settings={"budget": {"emax_ratio": 0.6}})
    connection = store_of((hest, {"joules": 60}), (a_run("tabs", 2), {"joules": 60}))
    hardened = a_run(
        "hest", 3, command="harden", parent_run_id="hest-0001", settings={"budget": {"emax_ratio": ratio}}
    )
    add(connection, hardened)
    for number, method, parent, joules in ((4, "hest", "hest-0003", 30.0), (5, "tabs", "tabs-0002", 60.0)):
        run = a_run(method, number, command="profile", parent_run_id=parent)
        add(connection, run, samples=profiled(run, joules))
    found = compare(connection)
    assert ("hest 0.6" in {one.label for one in found.profile_runs}) == shown
    assert ("at forced equal length" in pair_of(found, "tabs").at_equal_length) == shown


def test_an_infinite_margin_is_refused() -> None:
    with pytest.raises(HestError, match="finite"):
        compare(store_of((a_run("hest", 1), {}), (a_run("tabs", 2), {})), margin=float("inf"))


def test_net_joules_below_zero_keep_their_interval() -> None:
    connection = store_of((a_run("tabs", 9), {}))
    for seed in range(3):
        run = a_run("hest", seed + 1, seed=seed)
        samples = [replace(one, energy_net_j=-1.0 - seed) for one in generated(run, 60)]
        add(connection, run, samples=samples)
    net = next(
        one.measure("energy_net_j_per_sample")
        for one in configurations(compare(connection).rows)
        if one.label == "hest 0.6"
    )
    assert net.value == pytest.approx(-2)
    assert net.low < -2 < net.high


def test_a_run_without_valid_joules_is_not_called_valid() -> None:
    connection = store_of((a_run("hest", 1), {}))
    run = a_run("tabs", 2)
    add(connection, run, samples=[replace(one, energy_valid=False) for one in generated(run, 60)])
    told = " ".join(evidence._of_energy(compare(connection)))
    assert "Every sample has valid joules" not in told


def test_measured_joules_decide_though_more_configurations_were_estimated() -> None:
    estimated = {"energy_kind": "estimated", "meter": "CPU time x 8 W"}
    found = compare(
        store_of(
            (a_run("hest", 1), {}),
            (a_run("tabs", 2), {}),
            *(
                (a_run(method, 5 + place, **estimated), {})
                for place, method in enumerate(("hest", "tabs", "lora", "bhsp"))
            ),
        )
    )
    assert found.energy_kind == "measured"
