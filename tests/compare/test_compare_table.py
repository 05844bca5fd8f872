"""Which runs stand side by side, what a pair says, and what is printed where there is nothing."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import duckdb
import pytest
from simulated_runs import a_run, add, classified, empty_store, generated, study

from hestctl.cli.layout import fit
from hestctl.compare.headline import headline
from hestctl.compare.results import METRICS, Comparison, Pair
from hestctl.compare.row_tables import summary_table
from hestctl.compare.table import (
    TextTable,
    as_json,
    as_rows,
    compare,
    compared_lines,
    gap_tables,
)
from hestctl.errors import HestError
from hestctl.records import Run, Window


def store_of(*runs: tuple[Run, dict[str, Any]], count: int = 120) -> duckdb.DuckDBPyConnection:
    connection = empty_store()
    for run, settings in runs:
        add(connection, run, samples=generated(run, count, **settings))
    return connection


def pair_of(comparison: Comparison, other: str = "tabs", proposed: str | None = None) -> Pair:
    return next(one for one in comparison.pairs if one.other == other and proposed in (None, one.proposed))


def every_table(comparison: Comparison, runs: bool = False) -> list[TextTable]:
    summary = summary_table(comparison, runs=runs)
    return [*gap_tables(comparison, every=True), summary, *as_rows(comparison, runs=runs)]


def table_of(comparison: Comparison, title: str, runs: bool = False) -> TextTable:
    return next(table for table in every_table(comparison, runs) if table.title.startswith(title))


def every_text(comparison: Comparison) -> str:
    tables = every_table(comparison)
    cells = [cell for table in tables for row in table.rows for cell in row]
    told = [text for _, text in headline(comparison).lines()]
    lines = [*told, *compared_lines(comparison)]
    return "\n".join([*lines, *cells, *(note for table in tables for note in table.notes)])


# Verdicts on planted effects


def test_a_planted_saving_at_equal_quality_is_found() -> None:
    found = compare(store_of((a_run("tabs", 1), {"joules": 60}), (a_run("hest", 2), {"joules": 40})))
    pair = pair_of(found)
    assert pair.verdict == "less energy at equal quality"
    assert pair.gap_percent.low < 100 / 3 < pair.gap_percent.high
    assert found.gap.percent.value == pytest.approx(100 / 3, abs=2)
    assert found.gap.reason is None
    assert "% fewer joules" in pair.why


def test_the_same_model_twice_is_not_less_energy() -> None:
    verdicts = []
    for seed in range(8):
        tabs, hest = (a_run("tabs", 1), {"noise": 100 + seed}), (a_run("hest", 2), {"noise": 200 + seed})
        verdicts.append(pair_of(compare(store_of(tabs, hest, count=100))).verdict)
    assert set(verdicts) <= {"no difference", "inconclusive"}
    assert verdicts.count("no difference") >= 6


def test_a_saving_that_costs_quality_is_no_gap() -> None:
    found = compare(
        store_of((a_run("tabs", 1), {"joules": 60}), (a_run("hest", 2), {"joules": 40, "score": 25}))
    )
    assert pair_of(found).verdict == "less energy, worse quality"
    assert found.gap.percent.value is None
    assert found.gap.reason is not None
    assert "quality is inferior" in found.gap.reason
    assert "not shown" in found.conclusion.lower()


def test_too_few_samples_are_inconclusive_and_say_what_they_could_show() -> None:
    found = compare(
        store_of((a_run("tabs", 1), {"joules": 60}), (a_run("hest", 2), {"joules": 40}), count=12)
    )
    pair = pair_of(found)
    assert pair.verdict == "inconclusive"
    assert "the least difference that 12 samples can show is" in pair.why


def test_more_energy_is_called_that() -> None:
    found = compare(store_of((a_run("lora", 1), {"joules": 40}), (a_run("hest", 2), {"joules": 50})))
    assert pair_of(found, "lora").verdict == "more energy"
    assert found.gap.percent.value < 0
    assert "not shown" in found.conclusion.lower()


def test_a_gap_by_shorter_answers_is_told_apart() -> None:
    found = compare(
        store_of(
            (a_run("tabs", 1), {"joules": 60, "tokens": 100}),
            (a_run("hest", 2), {"joules": 45, "tokens": 75}),
        )
    )
    pair = pair_of(found)
    assert pair.length_part_percent + pair.token_part_percent == pytest.approx(pair.gap_percent.value)
    assert pair.length_part_percent > 0.85 * pair.gap_percent.value
    assert not pair.equal_length
    assert "not measured (the outputs differ in length)" in pair.at_equal_length


def test_at_equal_length_the_verdict_holds_there_too() -> None:
    connection = empty_store()
    for run, joules in ((a_run("tabs", 1), 60.0), (a_run("hest", 2), 40.0)):
        samples = [replace(one, new_tokens=128) for one in generated(run, 200, joules=joules)]
        add(connection, run, samples=samples)
    pair = pair_of(compare(connection))
    assert pair.equal_length
    assert "less energy at equal quality" in pair.at_equal_length


def test_training_joules_are_repaid_after_so_many_samples() -> None:
    tabs, hest = a_run("tabs", 1, train_energy_j=50_000.0), a_run("hest", 2, train_energy_j=60_000.0)
    found = compare(store_of((tabs, {"joules": 60}), (hest, {"joules": 40})))
    mean = {row.label: row.measure("energy_j_per_sample").value for row in found.rows}
    saved = mean["tabs"] - mean["hest 0.6"]
    assert pair_of(found).break_even_samples.value == math.ceil(10_000 / saved)


# Best, gaps, controls, ablations, seeds


def test_base_is_shown_and_never_the_best_baseline() -> None:
    found = compare(
        store_of(
            (a_run("base", 1), {"joules": 10}),
            (a_run("tabs", 2), {"joules": 60}),
            (a_run("hest", 3), {"joules": 40}),
        )
    )
    assert {row.label for row in found.rows} == {"base", "tabs", "hest 0.6"}
    assert found.best_baseline is not None
    assert found.best_baseline.label == "tabs"
    assert [(pair.other, pair.claim.family) for pair in found.pairs] == [("tabs", 1), ("base", 1)]


def test_a_cheap_baseline_that_is_worse_is_no_yardstick_but_an_undecided_one_is() -> None:
    tabs, hest = (a_run("tabs", 1), {"joules": 60}), (a_run("hest", 3), {"joules": 45})
    worse = compare(store_of(tabs, (a_run("lora", 2), {"joules": 30, "score": 20}), hest))
    assert worse.best_baseline is not None
    assert worse.best_baseline.label == "tabs"
    undecided = compare(store_of(tabs, (a_run("lora", 2), {"joules": 30, "score": 29}), hest, count=16))
    assert undecided.best_baseline is not None
    assert undecided.best_baseline.label == "lora"


def test_saving_needs_the_controls_too() -> None:
    tabs, hest = (a_run("tabs", 1), {"joules": 60}), (a_run("hest", 2), {"joules": 40})
    without = compare(store_of(tabs, hest))
    assert without.gap_vs_controls.percent.value is None
    assert "no control" in (without.gap_vs_controls.reason or "")
    assert not without.conclusion.startswith("HEST saves energy")

    int8 = {"backbone": {"precision": "int8"}}
    control = a_run("lora", 3, settings=int8)
    with_control = compare(store_of(tabs, hest, (control, {"joules": 50})))
    assert next(row for row in with_control.rows if row.role == "control").label == "lora int8 control"
    assert with_control.gap_vs_controls.percent.value > 0
    assert with_control.conclusion.startswith("HEST saves energy")
    cheaper = compare(store_of(tabs, hest, (control, {"joules": 35})))
    assert cheaper.gap_vs_controls.percent.value < 0
    assert "beyond quantising" in cheaper.conclusion


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"precision": "fp16-only"}, "hest 0.6 fp16-only"),
        ({"dual": "none"}, "hest 0.6 no dual"),
        ({"controller": "unfactorised"}, "hest 0.6 unfactorised"),
    ],
)
def test_ablations_are_not_proposed(changes: dict[str, str], label: str) -> None:
    found = compare(
        store_of(
            (a_run("tabs", 1), {"joules": 60}),
            (a_run("hest", 2), {"joules": 45}),
            (a_run("hest", 3, **changes), {"joules": 30}),
        )
    )
    assert found.best_proposed is not None
    assert found.best_proposed.label == "hest 0.6"
    assert next(row for row in found.rows if row.label == label).role == "ablation"
    assert pair_of(found, label).other_role == "ablation"


def test_labels_stay_apart_when_two_configurations_share_a_budget() -> None:
    found = compare(
        store_of(
            (a_run("hest", 1), {}),
            (a_run("hest", 2, dual="plain"), {}),
            (a_run("hest", 3, emax_ratio=None, emax_j=0.25), {}),
        )
    )
    assert {row.label for row in found.rows} == {"hest 0.6 clamp", "hest 0.6 plain", "hest 0.25 J predicted"}


def test_seeds_are_pooled_per_sample_and_shown_by_run() -> None:
    found = compare(
        store_of(
            (a_run("tabs", 1), {"joules": 60}),
            (a_run("hest", 2, seed=42), {"joules": 38}),
            (a_run("hest", 3, seed=43), {"joules": 42}),
        )
    )
    assert [row.label for row in found.rows] == ["hest 0.6 seed 42", "hest 0.6 seed 43", "tabs"]
    pair = pair_of(found)
    assert pair.proposed == "hest 0.6"
    assert pair.proposed_run_ids == ("hest-0002", "hest-0003")
    assert pair.ratio.value == pytest.approx(40 / 60, abs=0.02)
    assert not any(note.startswith("hest 0.6 has one seed") for note in pair.notes)


def test_the_latest_of_a_kind_counts_and_the_older_is_listed() -> None:
    found = compare(
        store_of(
            (a_run("tabs", 1), {}), (a_run("hest", 2), {"joules": 50}), (a_run("hest", 3), {"joules": 40})
        )
    )
    assert [row.run_id for row in found.rows] == ["hest-0003", "tabs-0001"]
    assert [(one.run_id, one.kind) for one in found.set_apart] == [("hest-0002", "superseded")]
    assert "hest-0003" in found.set_apart[0].reason


# What may not be compared


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device_uuid": "GPU-2"}, "device is"),
        ({"backbone": "Qwen/Qwen2.5-7B-Instruct"}, "backbone is"),
        ({"weights": "random"}, "weights is random, not pretrained"),
        ({"data_hash": "0000"}, "data hash is 0000, not 9f3c"),
        ({"num_beams": 4}, "beams is 4, not 1"),
        ({"max_new_tokens": 64}, "new tokens at most is 64, not 128"),
        ({"batch_size": 1}, "batch size is 1, not 4"),
        ({"meter": "zeus"}, "meter is zeus, not nvml"),
        ({"energy_kind": "estimated"}, "energy kind is estimated, not measured"),
        ({"engine": "eager"}, "engine is eager, not graph"),
    ],
)
def test_runs_that_may_not_be_compared_are_set_apart(changes: dict[str, Any], reason: str) -> None:
    found = compare(
        store_of(
            (a_run("tabs", 1), {"joules": 60}),
            (a_run("hest", 2), {"joules": 40}),
            (a_run("hest", 3, emax_ratio=0.4, **changes), {"joules": 1}),
            count=24,
        )
    )
    assert [row.label for row in found.rows] == ["hest 0.6", "tabs"]
    assert [(one.run_id, one.kind) for one in found.set_apart] == [("hest-0003", "not comparable")]
    assert reason in found.set_apart[0].reason


def test_the_group_that_can_decide_comes_before_a_larger_one_and_then_the_larger() -> None:
    other = {"device_uuid": "GPU-2"}
    found = compare(
        store_of(
            (a_run("tabs", 1), {}),
            (a_run("hest", 2), {}),
            (a_run("lora", 3, **other), {}),
            (a_run("tabs", 4, **other), {}),
            (a_run("bhsp", 5, **other), {}),
            count=12,
        )
    )
    assert {row.run_id for row in found.rows} == {"tabs-0001", "hest-0002"}


def test_scopes_are_not_compared_in_predicted_joules() -> None:
    found = compare(
        store_of(
            (a_run("tabs", 1, scope="network"), {"joules": 60, "scope_j": 50.0}),
            (a_run("hest", 2), {"joules": 40, "scope_j": 0.01}),
        )
    )
    pair = pair_of(found)
    assert pair.gap_percent.value is not None
    assert pair.scope_ratio.value is None
    assert "scopes adapter and network" in (pair.scope_ratio.reason or "")


def test_unfinished_runs_and_runs_without_samples_are_named() -> None:
    connection = store_of((a_run("tabs", 1), {}), (a_run("hest", 2), {}), count=12)
    add(connection, a_run("lora", 3, status="failed", error="out of memory"))
    add(connection, a_run("bhsp", 4))
    add(connection, a_run("hest", 5, command="evaluate"))
    kinds = {one.run_id: (one.kind, one.reason) for one in compare(connection).set_apart}
    assert kinds["lora-0003"] == ("unfinished", "failed: out of memory")
    assert kinds["bhsp-0004"][0] == "without samples"
    assert "hest-0005" not in kinds


def test_an_empty_store_says_what_to_type() -> None:
    with pytest.raises(HestError) as caught:
        compare(empty_store())
    assert "hestctl train" in (caught.value.hint or "")


def test_a_store_of_unfinished_runs_says_what_to_type() -> None:
    connection = empty_store()
    add(connection, a_run("hest", 1, status="interrupted"))
    with pytest.raises(HestError) as caught:
        compare(connection)
    assert "hestctl train --method hest" in (caught.value.hint or "")


def test_filters_that_leave_nothing_name_what_there_is() -> None:
    connection = store_of((a_run("tabs", 1), {}), count=12)
    with pytest.raises(HestError) as caught:
        compare(connection, methods=["hest"])
    assert "tabs on cnn_dailymail" in (caught.value.hint or "")
    with pytest.raises(HestError):
        compare(connection, margin=0)


def test_filters_narrow_the_rows() -> None:
    connection = store_of((a_run("tabs", 1), {}), (a_run("hest", 2), {}), (a_run("lora", 3), {}), count=12)
    found = compare(connection, methods=["hest", "tabs"], dataset="cnn_dailymail")
    assert {row.method for row in found.rows} == {"hest", "tabs"}


# Energy that is not measured


def test_estimated_energy_gives_a_time_ratio_and_no_gap() -> None:
    changes = {"energy_kind": "estimated", "meter": "estimate"}
    found = compare(
        store_of((a_run("tabs", 1, **changes), {"joules": 60}), (a_run("hest", 2, **changes), {"joules": 40}))
    )
    assert found.gap.percent.value is None
    assert "estimated" in (found.gap.reason or "")
    assert 0.5 < (found.estimated_time_ratio.value or 0) < 0.9
    assert pair_of(found).verdict == "inconclusive"
    document = as_json(found)
    assert document["gap"] is None
    assert document["energy_kind"] == "estimated"
    text = every_text(found)
    assert "time ratio 0." in text
    assert "J/sample estimated" in table_of(found, "Energy").headers[1]


def test_no_meter_means_no_joules_and_a_reason() -> None:
    changes = {"energy_kind": "none", "meter": "none", "train_energy_j": None}
    found = compare(store_of((a_run("tabs", 1, **changes), {}), (a_run("hest", 2, **changes), {}), count=12))
    joules = found.rows[0].measure("energy_j_per_sample")
    assert joules.value is None
    assert joules.reason == "the run had no energy meter: no device"
    assert "not measured" in every_text(found)


def test_invalid_joules_stay_out_and_are_counted() -> None:
    connection = store_of((a_run("tabs", 1), {}), count=16)
    run = a_run("hest", 2)
    samples = generated(run, 16)
    samples[3] = replace(samples[3], energy_j=1e9, energy_valid=False, energy_reason="another process")
    samples[4] = replace(samples[4], energy_j=1e9, energy_kind="estimated")
    window = Window("test", "generation", 0, 1, "measured", "counter", valid=False, reason="throttled")
    add(connection, run, samples=samples, windows=[window])
    row = next(row for row in compare(connection).rows if row.method == "hest")
    assert row.measure("energy_j_per_sample").n == 14
    assert row.measure("energy_j_per_sample").value < 1e3
    assert any("2 of 16 samples have no valid joules" in note for note in row.notes)
    assert any("throttled" in note for note in row.notes)


def test_random_weights_have_joules_and_no_quality() -> None:
    changes = {"weights": "random"}
    found = compare(
        store_of((a_run("tabs", 1, **changes), {"joules": 60}), (a_run("hest", 2, **changes), {"joules": 40}))
    )
    assert found.rows[0].measure("rouge_lsum").value is None
    assert "random" in (found.rows[0].measure("rouge_lsum").reason or "")
    assert pair_of(found).verdict == "inconclusive"
    assert found.gap.percent.value is None


def test_answer_likelihood_is_per_token() -> None:
    found = compare(store_of((a_run("tabs", 1), {"score": 30}), count=12))
    assert found.rows[0].measure("answer_nll_nats").value == pytest.approx(2.4 - 30 / 60)


def test_a_batch_takes_its_wall_time_once() -> None:
    run = a_run("tabs", 1, batch_size=4)
    samples = [replace(one, latency_s=2.0, new_tokens=50) for one in generated(run, 16)]
    connection = empty_store()
    add(connection, run, samples=samples)
    assert compare(connection).rows[0].measure("tokens_per_s").value == pytest.approx(100)


# Classification


def test_classification_shows_accuracy_beside_chance() -> None:
    connection = empty_store()
    for run in (a_run("tabs", 1, dataset="lra-text"), a_run("hest", 2, dataset="lra-text")):
        add(connection, run, samples=classified(run, 400, 0.85))
    found = compare(connection, margin=10)
    assert found.task == "classification"
    accuracy = found.rows[0].measure("accuracy_percent")
    assert accuracy.low < 85 < accuracy.high
    assert found.rows[0].measure("chance_percent").value == pytest.approx(50, abs=6)
    assert pair_of(found).quality == "not inferior"
    assert "chance %" in table_of(found, "Quality").headers
    assert found.rows[0].measure("energy_j_per_new_token").value is None
    assert "chance level" in pair_of(found).quality_reason
    assert "no token was written" in pair_of(found).at_equal_length
    assert "labels scored (no tokens written), batch 4" in compared_lines(found)[1]
    told = outcomes(found)
    outcome, reason = told["the same accuracy as TABS"]
    assert outcome == "confirmed"
    assert "chance level" in reason
    (score,) = [reason for text, (_, reason) in told.items() if text.startswith("ROUGE-L about")]
    assert "accuracy takes its place: 8" in score
    document = as_json(found)
    assert document["quality_metric"] == "accuracy_percent"
    assert {*document["metrics"]["chance_percent"].values()} != {None}
    assert {*document["metrics"]["rouge_lsum"].values()} == {None}


def test_eight_answers_alike_are_not_equal_quality() -> None:
    """All of few samples right on both sides: above chance, and still nothing about the margin."""
    connection = empty_store()
    for run in (a_run("tabs", 1, dataset="lra-text"), a_run("hest", 2, dataset="lra-text")):
        add(connection, run, samples=classified(run, 12, 1.0))
    pair = pair_of(compare(connection, margin=5))
    assert pair.quality == "inconclusive"
    assert pair.least_detectable_points > 5
    assert "chance level" in pair.quality_reason


def test_two_coins_are_not_equally_accurate() -> None:
    connection = empty_store()
    for run in (a_run("tabs", 1, dataset="lra-text"), a_run("hest", 2, dataset="lra-text")):
        add(connection, run, samples=classified(run, 400, 0.5))
    pair = pair_of(compare(connection, margin=20))
    assert pair.quality == "inconclusive"
    assert "cannot be told from chance" in pair.why


# Expectations


def outcomes(comparison: Comparison) -> dict[str, tuple[str, str]]:
    return {line.text: (line.outcome, line.reason) for line in comparison.expectations}


def test_expectations_are_confirmed_refuted_or_not_measured_with_a_reason() -> None:
    found = outcomes(compare(study(500)))
    assert found["ROUGE-L about 44.3 (the original's code computes ROUGE-Lsum)"][0] == "not measured"
    assert found["the same quality as TABS"][0] == "confirmed"
    assert found["at least 40 % less mean energy than TABS"][0] == "refuted"
    assert found["90 % fewer controller parameters than TABS"][0] == "confirmed"
    outcome, reason = found["at 4k tokens never above E_max"]
    assert outcome == "not measured"
    assert "hestctl profile --seq-len 4096" in reason


def test_the_original_score_is_judged_on_the_original_model_alone() -> None:
    model = {"backbone": "meta-llama/Llama-2-7b-chat-hf"}
    runs = (a_run("tabs", 1, **model), {}), (a_run("hest", 2, **model), {"score": 44.5})
    line = compare(store_of(*runs, count=2000)).expectations[0]
    assert line.outcome == "confirmed"
    assert "ROUGE-Lsum lies in" in line.reason
    few = compare(store_of(*runs, count=8)).expectations[0]
    assert few.outcome == "not measured"
    assert "the interval holds both answers" in few.reason


def test_profiles_at_4k_decide_about_the_budget_even_through_a_harden_run() -> None:
    connection = study(24)
    add(connection, a_run("hest", 20, command="harden", parent_run_id="hest-0004"))
    for parent, method, joules in (("hest-0020", "hest", 0.03), ("tabs-0003", "tabs", 0.09)):
        run = a_run(method, 30, command="profile", parent_run_id=parent)
        samples = [
            replace(one, prompt_tokens=4_000, split="profile", scope_energy_j=joules, emax_j=0.04)
            for one in generated(run, 6)
        ]
        add(connection, run, samples=samples)
    found = compare(connection, methods=["hest", "tabs"])
    assert {one.label for one in found.profile_runs} == {"hest 0.6", "tabs"}
    assert found.best_proposed is not None
    lines = outcomes(found)
    if found.best_proposed.label == "hest 0.6":
        assert lines["at 4k tokens never above E_max"][0] == "confirmed"
        assert lines["at 4k tokens TABS stands 1.8 x above E_max"][0] == "confirmed"
        assert "arithmetic of lengths" in lines["at 4k tokens TABS stands 1.8 x above E_max"][1]


# JSON and text


@pytest.fixture(scope="module")
def whole() -> Comparison:
    return compare(study(480))


def test_the_document_keeps_the_original_shape(whole: Comparison) -> None:
    document = json.loads(json.dumps(as_json(whole), allow_nan=False))
    assert list(document)[:5] == ["primary_metric", "metrics", "best_proposed", "best_baseline", "gap"]
    assert document["primary_metric"] == "energy_j_per_sample"
    assert {"run_id", "value"} <= set(document["best_proposed"])
    best = document["best_proposed"]
    assert document["metrics"]["energy_j_per_sample"][best["run_id"]] == best["value"]
    assert set(document["metrics"]) == set(METRICS)
    assert {
        "gap_vs_controls",
        "gap_reason",
        "energy_kind",
        "runs",
        "pairs",
        "set_apart",
        "expectations",
    } <= set(document)
    run = document["runs"][best["run_id"]]["measures"]
    assert run["energy_j_per_sample"]["energy_kind"] == "measured"
    assert run["scope_energy_j_per_sample"]["energy_kind"] == "predicted"
    assert all(entry["value"] is not None or entry["reason"] for entry in run.values())


def test_an_open_interval_is_null_in_json(whole: Comparison) -> None:
    document = as_json(whole)
    tails = [run["measures"]["latency_p99_s"] for run in document["runs"].values()]
    assert any(tail["value"] is not None and tail["high"] is None for tail in tails)


@pytest.mark.parametrize("runs", [False, True])
def test_every_empty_cell_says_not_measured_and_why(whole: Comparison, runs: bool) -> None:
    letters = 0
    for table in every_table(whole, runs):
        assert all(len(row) == len(table.headers) for row in table.rows)
        text = "\n".join(table.notes)
        for cell in (cell.replace("\n", " ") for row in table.rows for cell in row):
            if cell.startswith("not measured"):
                assert f"{cell.removeprefix('not measured ')} " in text
            elif re.fullmatch(r"\(\w+\)", cell):
                letters += 1
                assert f"{cell} not measured: " in text or f"{cell} no gap: " in text
    assert letters > 10
    assert "nan" not in every_text(whole).lower().split()


@pytest.mark.parametrize("runs", [False, True])
def test_the_tables_fit_eighty_columns(whole: Comparison, runs: bool) -> None:
    for table in every_table(whole, runs):
        assert fit(table.headers, table.rows, 80) is not None, table.title
        wide = fit(table.headers, table.rows, 100)
        assert wide is not None, table.title
        assert wide.ruled, table.title


def test_the_gap_table_has_the_best_first_against_baselines_then_controls_then_ablations() -> None:
    control = a_run("lora", 9, settings={"backbone": {"precision": "int8"}})
    found = compare(
        store_of(
            (a_run("tabs", 1), {"joules": 60}),
            (a_run("lora", 2), {"joules": 58}),
            (control, {"joules": 50}),
            (a_run("hest", 3), {"joules": 40}),
            (a_run("hest", 4, emax_ratio=0.9), {"joules": 47}),
            (a_run("hest", 5, dual="none"), {"joules": 45}),
        )
    )
    (first,) = gap_tables(found)
    assert first.title == "Gap at equal quality: hest 0.6 against the others"
    assert [row[0] for row in first.rows] == ["tabs", "lora", "lora int8 control", "hest 0.6 no dual"]
    assert "each has one seed: that says nothing about another training" in first.notes
    further = gap_tables(found, every=True)[1]
    assert [row[0] for row in further.rows] == [
        "hest 0.9 : tabs",
        "hest 0.9 : lora",
        "hest 0.9 : lora int8 control",
    ]


def test_what_says_the_same_in_every_row_is_a_note_and_no_column() -> None:
    changes = {"energy_kind": "estimated", "meter": "estimate"}
    runs = [(a_run(method, place, **changes), {}) for place, method in enumerate(("tabs", "lora", "hest"))]
    found = compare(store_of(*runs, count=24))
    (gaps,) = gap_tables(found)
    assert gaps.headers[:2] == ("against", "time ratio [95 %]")
    assert "verdict" not in gaps.headers
    told = (
        "the same in every row: gap % (no gap: the joules are estimated, not measured); quality "
        "and verdict (inconclusive)"
    )
    assert told in gaps.notes
    summary = table_of(found, "Configurations")
    assert {row[summary.headers.index("seeds")] for row in summary.rows} == {"1"}, "numbers stay"
    alone = compare(store_of((a_run("tabs", 1, **changes), {}), (a_run("hest", 2, **changes), {}), count=24))
    assert "verdict" in gap_tables(alone)[0].headers, "one row has nothing to be the same as"


def test_seeds_are_one_row_of_their_means_and_a_row_each_on_demand() -> None:
    found = compare(
        store_of(
            (a_run("tabs", 1), {"joules": 60}),
            *((a_run("hest", 2 + seed, seed=seed), {"joules": 38 + 2 * seed}) for seed in range(3)),
        )
    )
    joined = table_of(found, "Energy")
    assert [row[0] for row in joined.rows] == ["hest 0.6", "tabs"]
    assert table_of(found, "Quality").rows[0][:2] == ("hest 0.6", "3")
    means = [row.measure("energy_j_per_sample").value for row in found.rows[:3]]
    assert joined.rows[0][1].startswith(f"{sum(means) / 3:.1f} [")
    assert [row[0] for row in table_of(found, "Energy", runs=True).rows][:2] == [
        "hest 0.6 seed 0",
        "hest 0.6 seed 1",
    ]


def test_run_of_two_stores_counts_once() -> None:
    connection = empty_store()
    for store in ("a", "b"):
        run = a_run("tabs", 1)
        add(connection, run, store=store, samples=generated(run, 12))
    assert len(compare(connection).rows) == 1


def test_only_the_figures_import_plotnine() -> None:
    code = (
        "import sys, hestctl.compare.table, hestctl.compare.statistics, hestctl.compare.style; "
        "sys.exit(any(name in sys.modules for name in ('plotnine', 'pandas', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_sentences_of_pairs_are_told_on_demand() -> None:
    others = [
        (a_run("lora", 10 + place, settings={"backbone": {"skip_last": 1 + place}}), {}) for place in range(6)
    ]
    found = compare(store_of((a_run("tabs", 1), {}), (a_run("hest", 2), {"joules": 40}), *others, count=16))
    first = [pair for pair in found.pairs if pair.proposed == "hest 0.6"]
    assert len(first) == 7
    assert first[0].why not in "\n".join(gap_tables(found)[0].notes)
    assert all(pair.why in "\n".join(gap_tables(found, every=True)[0].notes) for pair in first)
