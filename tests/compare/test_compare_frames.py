"""The numbers behind the figures, against SQL and numpy of their own."""

from __future__ import annotations

from dataclasses import replace

import duckdb
import numpy as np
import pandas as pd
import pytest
from simulated_runs import (
    LAYERS,
    a_run,
    add,
    add_plan,
    calibrated,
    empty_store,
    generated,
    metered,
    trained,
    used,
    wide_study,
)

from hestctl.compare import frames, frames_budget, frames_runs, frames_states
from hestctl.compare.labels import Box, apart, place
from hestctl.compare.table import compare
from hestctl.records import PROMPT_PARTS


@pytest.fixture(scope="module")
def whole() -> duckdb.DuckDBPyConnection:
    return wide_study(40)


def test_joules_are_sorted_and_filled_where_quality_is_not_inferior(whole) -> None:
    found = compare(whole)
    frame = frames.energy(found)
    means = whole.execute(
        "SELECT r.run_id, avg(energy_j) FROM runs r JOIN samples s USING (run_id) "
        "WHERE command = 'train' AND r.run_id <> 'lora-0099' GROUP BY r.run_id"
    ).fetchall()
    of_run = {row.run_id: row.config_label for row in found.rows}
    expected = pd.DataFrame(means, columns=["run_id", "joules"]).groupby(
        lambda place: of_run[means[place][0]]
    )["joules"]
    assert frame.set_index("configuration")["joules"].to_dict() == pytest.approx(expected.mean().to_dict())
    assert frame["joules"].is_monotonic_increasing
    assert (frame["low"] < frame["joules"]).all()
    verdicts = dict(zip(frame["configuration"], frame["equal"], strict=True))
    assert found.best_baseline is not None
    assert verdicts[found.best_baseline.label]
    assert not verdicts["base"], "11 points below the best baseline"
    assert not verdicts["lora last 4 off control"]
    assert verdicts == {label: one == "not inferior" for label, one in found.equal_quality.items()}
    assert set(found.equal_quality.values()) == {"not inferior", "inconclusive", "inferior"}
    for pair in found.pairs:
        if pair.other == found.best_baseline.label:
            assert found.equal_quality[pair.proposed] == pair.quality
    text = frame.set_index("configuration")["text"]
    share = np.mean(
        [row.measure("emax_use_percent").value for row in found.rows if row.config_label == "hest 0.6"]
    )
    assert text["hest 0.6"].endswith(f"({share:.0f} %)")
    assert "%" not in text["lora"]


def test_the_front_is_what_nothing_beats(whole) -> None:
    frame = frames.front(compare(whole))
    for one in frame.itertuples():
        beaten = (
            (frame["x"] <= one.x) & (frame["y"] >= one.y) & (frame["configuration"] != one.configuration)
        ).any()
        assert one.best == (not beaten), one.configuration
    assert 1 < frame["best"].sum() < len(frame)
    assert len(frames.front_seeds(compare(whole))) == 48


def test_parts_add_up_to_the_whole_and_directions_are_prices_times_states(whole) -> None:
    found = compare(whole)
    frame, lacking = frames.parts(whole, found)
    assert lacking == []
    sums = frame.groupby(["configuration", "panel"], observed=True)["joules"].sum().unstack()
    spent = frames.energy(found).set_index("configuration")["joules"]
    assert sums["by cause"].to_dict() == pytest.approx(spent.to_dict())
    assert sums["by phase"].to_dict() == pytest.approx(spent.to_dict())
    directions = frame[frame["part"] == "directions"].set_index("configuration")["joules"]
    assert directions["hest 0.6"] == pytest.approx(2000 * 1e-6 + 1000 * 2e-6)
    assert not {"lora", "base"} & set(directions.index)


def test_what_is_not_measured_is_no_part_and_named() -> None:
    connection = empty_store()
    run = a_run("hest", 1)
    add(
        connection,
        run,
        samples=[replace(one, energy_net_j=None, prefill_j=None) for one in generated(run, 12)],
    )
    other = a_run("bhsp", 2)
    add(connection, other, samples=generated(other, 12))
    frame, lacking = frames.parts(connection, compare(connection))
    assert set(frame["configuration"]) == {"bhsp"}
    assert set(frame["part"]) == {"prefill", "decode", "idle", "all else"}
    assert any("phases" in reason and "hest 0.6" in reason for reason in lacking)
    assert any("idle" in reason and "hest 0.6" in reason for reason in lacking)
    assert any("directions" in reason and "bhsp" in reason for reason in lacking)


def test_a_level_budget_is_one_line_an_envelope_follows_the_lengths_and_tabs_stands_beside() -> None:
    connection = empty_store()
    level, envelope, tabs = a_run("hest", 1), a_run("hest", 2, emax_ratio=0.4), a_run("tabs", 3)
    add(connection, level, samples=generated(level, 60, scope_j=0.01, emax_j=0.02))
    matched = [
        replace(one, emax_j=1e-5 * (one.prompt_tokens + one.new_tokens))
        for one in generated(envelope, 60, scope_j=0.01, emax_j=0.02)
    ]
    add(connection, envelope, samples=matched)
    add(connection, tabs, samples=generated(tabs, 60, scope_j=0.03))
    found = compare(connection)
    frame = frames_budget.budget(connection, found, "adapter")
    lines = frames_budget.limits(frame)
    flat, rising = (lines[lines["configuration"] == label] for label in ("hest 0.6", "hest 0.4"))
    assert flat["joules"].tolist() == [0.02, 0.02]
    assert rising["joules"].tolist() == pytest.approx((1e-5 * rising["tokens"]).tolist(), rel=0.02)
    assert len(rising) > 5
    assert "tabs" not in set(lines["configuration"])
    beside = frames_budget.beside(frame, found)
    assert set(beside["configuration"]) == {"hest 0.6", "hest 0.4"}
    assert (beside["joules"] / beside["tokens"]).tolist() == pytest.approx([3e-5] * len(beside), rel=0.15)
    with pytest.raises(frames.NoDataError, match="scope network"):
        frames_budget.budget(connection, found, "network")


def test_only_tabs_of_the_same_scope_stands_beside(whole) -> None:
    found = compare(whole)
    for scope, per_token in (("adapter", 3e-5), ("network", 0.06)):
        beside = frames_budget.beside(frames_budget.budget(whole, found, scope), found)
        assert (beside["joules"] / beside["tokens"]).median() == pytest.approx(per_token, rel=0.1)


def test_shares_by_depth_and_position_are_those_of_the_counts(whole) -> None:
    found = compare(whole)
    depth = frames_states.depth(whole, found)
    position, width = frames_states.position(whole, found)
    run_ids = [row.run_id for row in found.rows if row.config_label == "hest 0.6"]
    assert len(run_ids) == 3
    off, every = whole.execute(
        "SELECT sum(count) FILTER (state = 'off'), sum(count) FROM utilisation "
        "WHERE list_contains(?, run_id) AND layer = 7",
        [run_ids],
    ).fetchall()[0]
    mine = depth[(depth["configuration"] == "hest 0.6") & (depth["layer"] == 7)].set_index("state")["share"]
    assert mine["off"] == pytest.approx(100 * off / every)
    assert mine.sum() == pytest.approx(100)
    assert width == 8
    off, every = whole.execute(
        "SELECT sum(count) FILTER (state = 'off'), sum(count) FROM utilisation "
        "WHERE list_contains(?, run_id) AND phase = 'new' AND position = 64",
        [run_ids],
    ).fetchall()[0]
    there = position[
        (position["configuration"] == "hest 0.6") & (position["phase"] == "new") & (position["place"] == 8)
    ]
    assert there.set_index("state")["share"]["off"] == pytest.approx(100 * off / every)
    assert set(position.loc[position["phase"] == "prompt", "place"]) == set(range(PROMPT_PARTS))


def test_long_answers_have_wider_bars() -> None:
    connection = empty_store()
    run = a_run("hest", 1)
    uses = [replace(one, position=one.position * 9) if one.phase == "new" else one for one in used("hest")]
    add(connection, run, samples=generated(run, 8), utilisation=uses)
    frame, width = frames_states.position(connection, compare(connection))
    new = frame[frame["phase"] == "new"]
    assert width == 48
    assert new["place"].max() == 120 * 9 // 48
    assert new.groupby("place")["share"].sum().tolist() == pytest.approx([100.0] * new["place"].nunique())


def test_uses_of_before_positions_are_shown_by_depth_alone() -> None:
    connection = empty_store()
    run = a_run("hest", 1)
    old = [replace(one, phase=None, position=None) for one in used("hest")]
    add(connection, run, samples=generated(run, 8), utilisation=old)
    found = compare(connection)
    assert set(frames_states.depth(connection, found)["layer"]) == set(range(LAYERS))
    with pytest.raises(frames.NoDataError, match="before positions were"):
        frames_states.position(connection, found)


def test_blocks_are_in_the_state_that_most_seeds_chose() -> None:
    connection = empty_store()
    for seed, states in enumerate(([2, 1, 0], [2, 1, 1], [1, 1, 1])):
        run = a_run("hest", seed + 1, seed=seed, scope="network")
        add(connection, run, samples=generated(run, 8))
        add_plan(connection, run, blocks={"attention": states, "mlp": [2, 2, 2]})
    plain = a_run("tabs", 9)
    add(connection, plain, samples=generated(plain, 8))
    add_plan(connection, plain, blocks={"attention": [2, 2, 2], "mlp": [2, 2, 2]})
    found = frames_states.blocks(connection, compare(connection))
    states = found.pivot(index="block", columns="layer", values="state")
    assert states.loc["attention"].tolist() == ["full", "int8", "int8"]
    assert states.loc["mlp"].tolist() == ["full"] * 3
    assert set(found["configuration"]) == {"hest 0.6"}


def test_learning_is_thinned_joined_and_marked() -> None:
    connection = empty_store()
    for seed in (1, 2):
        run = a_run(
            "hest", seed, seed=seed, steps=3000, summary={"warmup_steps": 50, "settlement": {"step": 600}}
        )
        steps = trained(run)
        add(connection, run, samples=generated(run, 8), steps=steps)
    found = compare(connection)
    curves = frames_runs.learning(connection, found, "task_loss")
    train = curves[curves["split"] == "train"]
    assert train.groupby("run_id").size().tolist() == [frames_runs.MOST_STEPS] * 2
    assert (train.groupby("run_id")["step"].max() == 3000).all()
    means = frames_runs.means(curves).set_index(["split", "step"])["value"]
    expected = connection.execute(
        "SELECT avg(task_loss) FROM steps WHERE split = 'train' AND step = 3000"
    ).fetchall()[0][0]
    assert means["train", 3000] == pytest.approx(expected)
    lone = curves.drop(curves.index[(curves["step"] == 3000) & (curves["run_id"] == "hest-0001")])
    assert ("train", 3000) not in frames_runs.means(lone).set_index(["split", "step"]).index
    turns = frames_runs.turns(connection, found).set_index("what")["step"]
    assert turns.to_dict() == {"warmup": 50, "settled": 600}


def test_the_meter_is_judged_by_its_bound_its_windows_and_its_step() -> None:
    connection = empty_store()
    run = a_run("hest", 1)
    samples = generated(run, 40)
    windows = metered(run, samples, invalid=2)
    add(connection, run, samples=samples, windows=windows)
    add(connection, replace(calibrated(step_s=0.2), created_at="2025-11-19T10:00:00+00:00"))
    add(connection, replace(calibrated(91, step_s=9.0), device_uuid="GPU-2"))
    add(connection, replace(calibrated(89, step_s=5.0), created_at="2025-11-18T10:00:00+00:00"))
    frame, reasons = frames_runs.meter(connection, compare(connection))
    assert reasons == []
    panels = frame.set_index("panel")
    mean = np.mean([one.energy_j for one in samples])
    assert panels["value"][frames_runs.ERROR] == pytest.approx(100 * 0.5 / mean)
    assert panels["value"][frames_runs.INVALID] == pytest.approx(100 * 2 / 10)
    lengths = np.array([one.duration_s for one in windows]) / 0.2
    found = panels.loc[frames_runs.STEPS, ["value", "low", "high"]].tolist()
    assert found == pytest.approx([np.median(lengths), lengths.min(), lengths.max()])


def test_windows_are_in_seconds_where_no_certificate_tells_the_step() -> None:
    connection = empty_store()
    run = a_run("hest", 1)
    samples = generated(run, 40)
    add(connection, run, samples=samples, windows=metered(run, samples))
    frame, reasons = frames_runs.meter(connection, compare(connection))
    assert frames_runs.SECONDS in set(frame["panel"])
    assert reasons == [
        "the step of the counter is not known: these stores hold no calibration of this device"
    ]
    summary = {"certificate": {"step_s": None, "missing": {"step_s": "it moves in no steps"}}}
    add(connection, replace(calibrated(), summary=summary))
    assert frames_runs.meter(connection, compare(connection))[1] == [
        "the step of the counter is not known: it moves in no steps"
    ]


def test_pairs_of_one_model_show_what_is_no_difference(whole) -> None:
    found = compare(whole)
    frame, _ = frames_runs.meter(whole, found)
    repeats = frame[frame["panel"] == frames_runs.REPEATS]
    mean = dict(whole.execute("SELECT run_id, avg(energy_j) FROM samples GROUP BY run_id").fetchall())
    for one, pair in zip(repeats.itertuples(), found.repeats, strict=True):
        first, second = (mean[run_id] for run_id in pair.run_ids)
        assert one.configuration == pair.label
        assert one.value == pytest.approx(100 * (max(first, second) / min(first, second) - 1))
    assert set(repeats["configuration"]) == {"base", "lora"}


def test_labels_cover_neither_one_another_nor_marks_and_stay_inside() -> None:
    points = [(1.0, 1.0), (1.05, 1.0), (1.1, 1.02), (1.9, 1.9), (0.05, 0.05), (1.0, 1.1)]
    texts = [
        "hest unfactorised",
        "hest fp16-only",
        "hest no dual",
        "tabs",
        "lora last 4 off control",
        "hest 0.6",
    ]
    asked = {"size_in": (4.0, 3.0), "x": (0.0, 2.0), "y": (0.0, 2.0), "points_of_type": 7.5}
    spots = place(points, texts, **asked)
    assert spots == place(points, texts, **asked)
    boxes = []
    for spot, text in zip(spots, texts, strict=True):
        half = 0.5 * len(text) * 7.5 / 144, 7.5 / 144
        x, y = spot.x * 2.0, spot.y * 1.5
        boxes.append(Box(x - half[0], y - half[1], x + half[0], y + half[1]))
    for nth, box in enumerate(boxes):
        assert box.left >= 0, texts[nth]
        assert box.bottom >= 0, texts[nth]
        assert box.right <= 4.0, texts[nth]
        assert box.top <= 3.0, texts[nth]
        assert all(box.overlap(other) == 0 for other in boxes[nth + 1 :]), texts[nth]
        for x, y in points:
            assert box.overlap(Box(x * 2 - 0.03, y * 1.5 - 0.03, x * 2 + 0.03, y * 1.5 + 0.03)) == 0


def test_neighbours_are_moved_apart_in_their_order() -> None:
    assert apart([3.0, 1.0, 1.1], 0.5) == [3.0, 1.0, 1.5]
    assert apart([1.0, 1.0, 1.0], 1.0) == [1.0, 2.0, 3.0]
    assert apart([], 1.0) == []
