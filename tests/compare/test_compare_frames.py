"""The numbers behind the figures, against SQL and numpy of their own."""

from __future__ import annotations

from collections.abc import Sequence
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
from hestctl.compare.labels import Box, apart, place, width_in
from hestctl.compare.table import compare
from hestctl.records import PROMPT_PARTS


@pytest.fixture(scope="module")
def whole() -> duckdb.DuckDBPyConnection:
    return wide_study(40)


def test_what_is_not_inferior_comes_first_and_then_the_fewest_joules(whole) -> None:
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
    assert (frame["low"] < frame["joules"]).all()
    assert list(dict.fromkeys(frame["verdict"])) == ["not inferior", "inconclusive", "inferior"]
    groups = frame.groupby("verdict", observed=True)["joules"]
    assert groups.apply(lambda joules: joules.is_monotonic_increasing).all()
    assert frame["joules"].idxmin() > 0, "the fewest joules are of one that is inferior"
    assert dict(zip(frame["configuration"], frame["verdict"], strict=True)) == found.equal_quality
    assert found.best_baseline is not None
    of_pairs = {
        pair.proposed: (pair.quality, pair.quality_difference)
        for pair in found.pairs
        if pair.other == found.best_baseline.label
    }
    assert of_pairs
    for label, (verdict, difference) in of_pairs.items():
        assert found.equal_quality[label] == verdict
        assert found.quality_differences[label] == difference
    points = frame.set_index("configuration")["points"]
    assert points[found.best_baseline.label] == 0
    assert points["base"] == pytest.approx(-11.4, abs=1.5)
    inferior = frame[frame["verdict"] == "inferior"]
    assert (inferior["points_high"] < -found.margin_points).all()


def test_without_a_baseline_nothing_is_shown_to_be_equal() -> None:
    connection = empty_store()
    run = a_run("hest", 1)
    add(connection, run, samples=generated(run, 12))
    frame = frames.energy(compare(connection))
    assert frame["verdict"].tolist() == ["inconclusive"]
    assert frame["points"].isna().all()


def test_the_front_is_what_nothing_beats(whole) -> None:
    frame = frames.front(compare(whole))
    for one in frame.itertuples():
        beaten = (
            (frame["x"] <= one.x) & (frame["y"] >= one.y) & (frame["configuration"] != one.configuration)
        ).any()
        assert one.best == (not beaten), one.configuration
    assert 1 < frame["best"].sum() < len(frame)
    assert frame.loc[frame["far"], "configuration"].tolist() == ["base"], "11 points below, the margin is 1"
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
    assert any("prefill" in reason and "hest 0.6" in reason for reason in lacking)
    assert any("idle" in reason and "hest 0.6" in reason for reason in lacking)
    assert any("directions" in reason and "bhsp" in reason for reason in lacking)


def test_joules_over_e_max_are_predicted_by_sample_and_metered_by_batch(whole) -> None:
    found = compare(whole)
    frame = frames_budget.budget(whole, found)
    assert frames_budget.lengths_differ(frame)
    scopes = {row.config_label: row.scope for row in found.rows if row.measure("emax_use_percent").value}
    assert set(frame["configuration"]) == set(scopes)
    metered = frame[frame["kind"] == "measured"]
    assert set(metered["configuration"]) == {label for label, one in scopes.items() if one == "network"}
    uses = frames_budget.uses(frame).set_index(["configuration", "kind"])
    for label in ("hest 0.6", "hest 0.7"):
        rows = [row for row in found.rows if row.config_label == label]
        share = np.mean([row.measure("emax_use_percent").value for row in rows])
        worst = max(row.measure("emax_use_worst_percent").value or 0.0 for row in rows)
        assert uses.loc[(label, "predicted"), "mean"] == pytest.approx(share / 100)
        assert uses.loc[(label, "predicted"), "worst"] == pytest.approx(worst / 100)
    run_ids = [row.run_id for row in found.rows if row.config_label == "hest 0.7"]
    batches = whole.execute(
        "SELECT sum(energy_j) / sum(emax_j) FROM samples WHERE list_contains(?, run_id) "
        "GROUP BY run_id, batch_index",
        [run_ids],
    ).fetchall()
    mine = metered.loc[metered["configuration"] == "hest 0.7", "ratio"]
    assert sorted(mine) == pytest.approx(sorted(ratio for (ratio,) in batches))


def test_joules_that_do_not_count_are_not_held_against_e_max() -> None:
    connection = empty_store()
    run = a_run("hest", 1, scope="network")
    samples = generated(run, 8, scope_j=0.01, emax_j=0.02)
    samples = [replace(one, energy_valid=one.batch_index > 0) for one in samples]
    add(connection, run, samples=samples)
    plain = a_run("tabs", 2, scope="network")
    add(connection, plain, samples=generated(plain, 8, scope_j=0.01))
    frame = frames_budget.budget(connection, compare(connection))
    assert set(frame["configuration"]) == {"hest 0.6"}, "tabs has no E_max"
    assert frame["kind"].value_counts().to_dict() == {"predicted": 8, "measured": 1}


def test_lengths_that_are_nearly_alike_are_no_lengths() -> None:
    def differ(*tokens: float) -> bool:
        return frames_budget.lengths_differ(pd.DataFrame({"tokens": tokens}))

    assert differ(100, 150)
    assert not differ(100, 149)


def test_batches_have_the_mean_of_their_samples_and_every_seed_is_there(whole) -> None:
    found = compare(whole)
    frame = frames.joules(whole, found)
    assert set(frame["size"]) == {4}
    assert set(frame.groupby("configuration", observed=True)["run_id"].nunique()) == {3}
    run_id = found.rows[0].run_id
    expected = whole.execute(
        "SELECT avg(energy_j) FROM samples WHERE run_id = ? GROUP BY batch_index ORDER BY batch_index",
        [run_id],
    ).fetchall()
    mine = frame.loc[frame["run_id"] == run_id, "value"].tolist()
    assert mine == pytest.approx([joules for (joules,) in expected])
    assert len(mine) == 10
    walls = frames.latency(whole, found)
    assert len(walls) == len(frame)


def test_shares_by_depth_and_position_are_those_of_the_counts(whole) -> None:
    found = compare(whole)
    depth = frames_states.depth(whole, found)
    position, width, lacking = frames_states.position(whole, found)
    assert lacking == ()
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
    frame, width, _ = frames_states.position(connection, compare(connection))
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


def test_what_was_recorded_by_layer_alone_is_named_and_has_no_place() -> None:
    connection = empty_store()
    old = [replace(one, phase=None, position=None) for one in used("hest")]
    for number, uses in enumerate((used("hest"), old, old)):
        run = a_run("hest", number, seed=number)
        add(connection, run, samples=generated(run, 8), utilisation=uses)
    other = a_run("tabs", 9)
    add(connection, other, samples=generated(other, 8), utilisation=old)
    frame, _, lacking = frames_states.position(connection, compare(connection))
    assert list(frame["configuration"].cat.categories) == ["hest 0.6"]
    assert len(lacking) == 2
    assert lacking[0].endswith("by layer alone: tabs")
    assert lacking[1].endswith("hest 0.6 1 of 3")


def test_a_state_that_never_occurs_is_in_no_legend() -> None:
    connection = empty_store()
    run = a_run("tabs", 1)
    uses = [*used("tabs"), *(replace(one, state="int8", count=0) for one in used("tabs"))]
    add(connection, run, samples=generated(run, 8), utilisation=uses)
    found = compare(connection)
    assert list(frames_states.depth(connection, found)["state"].cat.categories) == ["off", "full"]
    assert list(frames_states.position(connection, found)[0]["state"].cat.categories) == ["off", "full"]


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
    assert found.loc[~found["agreed"], ["block", "layer"]].values.tolist() == [
        ["attention", 0],
        ["attention", 2],
    ]


def test_configurations_that_chose_the_same_blocks_are_told() -> None:
    connection = empty_store()
    for number, (ratio, states) in enumerate(((0.5, [2, 1]), (0.6, [2, 0]), (0.7, [2, 1]))):
        run = a_run("hest", number, scope="network", emax_ratio=ratio)
        add(connection, run, samples=generated(run, 8))
        add_plan(connection, run, blocks={"attention": states, "mlp": [2, 2]})
    blocks = frames_states.blocks(connection, compare(connection))
    assert frames_states.alike(blocks) == [["hest 0.5", "hest 0.7"]]


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
    assert frames_runs.settled(connection, found) == [600]
    train = frames_runs.means(train)
    smooth, window = frames_runs.smoothed(train)
    assert window == 15
    middle = train.sort_values("step")["value"].iloc[53:68].mean()
    assert smooth["value"].iloc[60] == pytest.approx(middle)
    assert len(smooth) == len(train)


def test_every_seed_tells_where_its_blocks_settled() -> None:
    connection = empty_store()
    for seed, step in ((1, 600), (2, 500), (3, 600)):
        run = a_run("hest", seed, seed=seed, summary={"settlement": {"step": step}})
        add(connection, run, samples=generated(run, 8))
    assert frames_runs.settled(connection, compare(connection)) == [500, 600]


def test_the_meter_is_judged_by_its_bound_its_windows_and_its_step() -> None:
    connection = empty_store()
    run = a_run("hest", 1)
    samples = [replace(one, predicted_j=50.0) for one in generated(run, 40)]
    samples[0] = replace(samples[0], energy_valid=False, predicted_j=9e9)
    windows = metered(run, samples, invalid=2)
    training = replace(windows[0], phase="training", end_s=900.0)
    add(connection, run, samples=samples, windows=[training, *windows])
    add(connection, replace(calibrated(step_s=0.2), created_at="2025-11-19T10:00:00+00:00"))
    add(connection, replace(calibrated(91, step_s=9.0), device_uuid="GPU-2"))
    add(connection, replace(calibrated(89, step_s=5.0), created_at="2025-11-18T10:00:00+00:00"))
    frame, reasons = frames_runs.meter(connection, compare(connection))
    assert reasons == ["no A/A pair: train one run again with the same settings and seed"]
    panels = frame.set_index("panel")
    mean = np.mean([one.energy_j for one in samples[1:]])
    assert panels["value"][frames_runs.PREDICTED] == pytest.approx(mean / 50)
    assert panels["value"][frames_runs.ERROR] == pytest.approx(100 * 0.5 / mean)
    assert panels["value"][frames_runs.INVALID] == pytest.approx(100 * 2 / 10)
    lengths = np.array([one.duration_s for one in windows]) / 0.2
    found = panels.loc[frames_runs.STEPS, ["value", "low", "high"]].tolist()
    assert found == pytest.approx([np.median(lengths), lengths.min(), lengths.max()])


def test_without_the_step_of_the_counter_no_length_of_windows_is_shown() -> None:
    connection = empty_store()
    run = a_run("hest", 1)
    samples = generated(run, 40)
    add(connection, run, samples=samples, windows=metered(run, samples))
    frame, reasons = frames_runs.meter(connection, compare(connection))
    assert set(frame["panel"]) == {frames_runs.ERROR, frames_runs.INVALID}
    assert reasons[1:] == [
        "no predicted joules to compare with: run `hestctl calibrate` before training",
        "the step of the counter is not known: these stores hold no calibration of this device",
    ]
    summary = {"certificate": {"step_s": None, "missing": {"step_s": "it moves in no steps"}}}
    add(connection, replace(calibrated(), summary=summary))
    assert frames_runs.meter(connection, compare(connection))[1][-1] == (
        "the step of the counter is not known: it moves in no steps"
    )


def test_estimated_joules_are_judged_by_pairs_and_predictions_alone() -> None:
    connection = empty_store()
    for number in (1, 2):
        run = a_run("base", number, seed=number, energy_kind="estimated", versions={"hestctl": "0.1.0"})
        samples = [replace(one, predicted_j=50.0) for one in generated(run, 40, joules=53.0 - number)]
        add(connection, run, samples=samples, windows=metered(run, samples))
    found = compare(connection)
    assert len(found.repeats) == 1
    frame, reasons = frames_runs.meter(connection, found)
    assert set(frame["panel"]) == {frames_runs.REPEATS, frames_runs.PREDICTED}
    assert reasons == ["no counter: the estimated joules cannot be judged beyond that"]
    ratio = found.repeats[0].ratio.value
    assert ratio is not None
    assert ratio < 1, "the later run took less"
    (apart_by,) = frame[frame["panel"] == frames_runs.REPEATS].itertuples()
    assert apart_by.value == pytest.approx(100 * (1 / ratio - 1))
    assert apart_by.low < apart_by.value < apart_by.high


def test_pairs_of_one_model_show_what_is_no_difference(whole) -> None:
    found = compare(whole)
    frame, _ = frames_runs.meter(whole, found)
    repeats = frame[frame["panel"] == frames_runs.REPEATS]
    mean = dict(whole.execute("SELECT run_id, avg(energy_j) FROM samples GROUP BY run_id").fetchall())
    for one, pair in zip(repeats.itertuples(), found.repeats, strict=True):
        first, second = (mean[run_id] for run_id in pair.run_ids)
        assert one.configuration == pair.label
        assert one.value == pytest.approx(100 * (max(first, second) / min(first, second) - 1))
        assert one.low < one.value < one.high
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
        half = width_in(text, 7.5) / 2, 7.5 / 144
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


def test_lines_to_labels_do_not_cross_and_end_at_their_own() -> None:
    drawn = np.random.default_rng(1).normal(1, 0.12, (14, 2)).tolist()
    points = [(float(x), float(y)) for x, y in drawn]
    texts = [f"hest 0.{nth:02d} network" for nth in range(14)]
    asked = {"size_in": (4.0, 3.0), "x": (0.0, 2.0), "y": (0.0, 2.0), "points_of_type": 8}
    spots = place(points, texts, **asked)
    lines = [(*mark, spot.line_x, spot.line_y) for mark, spot in zip(points, spots, strict=True)]
    for nth, (x, y, end_x, end_y) in enumerate(lines):
        wide, high = width_in(texts[nth], 8) / 2 / 2, 8 * 1.2 / 144 / 1.5
        assert abs(end_x - spots[nth].x) <= wide + 1e-6 or (end_x, end_y) == (x, y)
        assert abs(end_y - spots[nth].y) <= high + 1e-6 or (end_x, end_y) == (x, y)
        for other in lines[nth + 1 :]:
            assert not crossing((x, y), (end_x, end_y), other[:2], other[2:])


def crossing(a: Sequence[float], b: Sequence[float], c: Sequence[float], d: Sequence[float]) -> bool:
    def turn(p: Sequence[float], q: Sequence[float], r: Sequence[float]) -> float:
        return float(np.cross([q[0] - p[0], q[1] - p[1], 0], [r[0] - p[0], r[1] - p[1], 0])[2])

    return turn(a, b, c) * turn(a, b, d) < 0 and turn(c, d, a) * turn(c, d, b) < 0


def test_neighbours_are_moved_apart_in_their_order() -> None:
    assert apart([3.0, 1.0, 1.1], 0.5, (0.0, 4.0)) == pytest.approx([3.0, 0.8, 1.3])
    assert apart([1.0, 1.0, 1.0], 1.0, (0.0, 4.0)) == pytest.approx([0.0, 1.0, 2.0])
    assert apart([1.0, 1.0, 1.0], 1.0, (0.5, 4.0)) == pytest.approx([0.5, 1.5, 2.5])
    assert apart([4.0, 4.0], 1.0, (0.0, 4.0)) == pytest.approx([3.0, 4.0])
    assert apart([1.0, 1.0, 1.0], 2.0, (0.0, 2.0)) == pytest.approx([-1.0, 1.0, 3.0])
    assert apart([], 1.0, (0.0, 1.0)) == []
