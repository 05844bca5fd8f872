"""One line for all seeds of a configuration: its mean, its interval, and what it is absent for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from scipy import stats
from simulated_runs import a_run, add, empty_store, generated

from hestctl.compare.configurations import Configuration, configurations
from hestctl.compare.results import PRIMARY, Row
from hestctl.compare.statistics import Measure, absent
from hestctl.compare.table import compare


def a_row(seed: int, **measures: Measure) -> Row:
    return Row(
        f"hest-{seed}", "runs", "hest", f"hest 0.6 seed {seed}", "hest 0.6", "proposed", "network", seed,
        "bfloat16", "2025-11-20", 300, 50, "apportioned", measures,
    )  # fmt: skip


def joined(*rows: Row) -> Configuration:
    (found,) = configurations(rows)
    return found


def test_several_seeds_have_the_t_interval_of_their_mean() -> None:
    values = (40.0, 43.0, 41.0)
    found = joined(*(a_row(seed, latency_p50_s=Measure(value, n=50)) for seed, value in enumerate(values)))
    measure = found.measure("latency_p50_s")
    spread = math.sqrt(sum((value - 124 / 3) ** 2 for value in values) / 2)
    half = stats.t.ppf(0.975, 2) * spread / math.sqrt(3)
    assert measure.value == pytest.approx(124 / 3)
    assert (measure.low, measure.high) == pytest.approx((124 / 3 - half, 124 / 3 + half))
    assert (found.seeds, found.samples, found.run_ids) == (3, 50, ("hest-0", "hest-1", "hest-2"))


def test_one_seed_keeps_its_interval_over_samples_and_two_have_none() -> None:
    connection = empty_store()
    for run in (a_run("tabs", 1), a_run("hest", 2, seed=1), a_run("hest", 3, seed=2)):
        add(connection, run, samples=generated(run, 40))
    found = compare(connection)
    hest, tabs = configurations(found.rows)
    assert tabs.measure(PRIMARY) == found.rows[2].measure(PRIMARY)
    both = [row.measure(PRIMARY).value or 0 for row in found.rows[:2]]
    assert hest.measure(PRIMARY).value == pytest.approx(sum(both) / 2)
    assert hest.measure(PRIMARY).low is None
    assert "at least 3" in (hest.measure(PRIMARY).reason or "")


def test_a_mean_over_some_of_the_seeds_is_no_number() -> None:
    found = joined(
        a_row(1, energy_j_per_sample=Measure(40.0)), a_row(2, energy_j_per_sample=absent("throttled"))
    )
    assert found.measure(PRIMARY).value is None
    assert found.measure(PRIMARY).reason == "1 of 2 seeds have none (seed 2: throttled)"
    none = joined(
        a_row(1, energy_j_per_sample=absent("no meter")), a_row(2, energy_j_per_sample=absent("no meter"))
    )
    assert none.measure(PRIMARY).reason == "no meter"


def test_the_worst_of_the_seeds_counts_and_shares_of_nothing_keep_an_interval() -> None:
    rows = [
        a_row(
            seed, emax_use_worst_percent=Measure(worst, n=50), over_budget_percent=Measure(0.0, 0.0, 7.0, 50)
        )
        for seed, worst in enumerate((97.0, 140.0, 99.0))
    ]
    found = joined(*rows)
    assert found.measure("emax_use_worst_percent").value == 140.0
    over = found.measure("over_budget_percent")
    assert over.value == 0.0
    assert (over.high or 0.0) == pytest.approx(7.1, abs=0.1)


def test_notes_name_the_seeds_they_are_of() -> None:
    rows = [replace(a_row(seed), notes=("throttled",) if seed else ()) for seed in range(3)]
    assert joined(*rows).notes == ("seed 1, 2: throttled",)
