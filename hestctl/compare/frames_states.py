"""What directions, blocks and labels became, as pandas frames."""

from __future__ import annotations

import json

import duckdb
import pandas as pd

from hestctl.compare.frames import ADAPTIVE, NoDataError, of_runs, ordered
from hestctl.compare.results import Comparison
from hestctl.records import BLOCKS, NEW_PART, STATES

MOST_GROUPS = 24
"""Bars for new tokens at most; beyond them neighbours are joined."""


def depth(connection: duckdb.DuckDBPyConnection, comparison: Comparison) -> pd.DataFrame:
    """``configuration, layer, state, share``: percent of the layer's direction-tokens in each state."""
    counts = of_runs(connection, comparison, "layer, state, count", "utilisation")
    return _shares(_some(counts, comparison), "layer")


def position(
    connection: duckdb.DuckDBPyConnection, comparison: Comparison
) -> tuple[pd.DataFrame, int, tuple[str, ...]]:
    """``configuration, phase, place, state, share`` over all layers, the new tokens of one place, what lacks.

    ``place`` is the part of the prompt, or counts groups of new tokens. What lacks are configurations, or
    seeds, that recorded their use of directions by layer alone.
    """
    every = _some(of_runs(connection, comparison, "phase, position, state, count", "utilisation"), comparison)
    counts = every[every["phase"].notna()].copy()
    if counts.empty:
        raise NoDataError("these runs were recorded before positions were: only by layer")
    new = counts["phase"] == "new"
    last = int(counts.loc[new, "position"].max()) if new.any() else 0
    width = NEW_PART * -(-(last // NEW_PART + 1) // MOST_GROUPS)
    counts["place"] = counts["position"].where(~new, counts["position"] // width).astype(int)
    counts["configuration"] = ordered(counts["configuration"], comparison)
    return _shares(counts, "phase", "place"), width, _without_positions(every, counts)


def _without_positions(every: pd.DataFrame, counts: pd.DataFrame) -> tuple[str, ...]:
    runs, held = (
        one.groupby("configuration", observed=True)["run_id"].nunique().rename(str) for one in (every, counts)
    )
    none = [label for label in runs.index if label not in held.index]
    partly = [f"{label} {held[label]} of {runs[label]}" for label in held.index if held[label] < runs[label]]
    told = []
    if none:
        told.append(
            f"not shown, since their runs recorded the use of directions by layer alone: {', '.join(none)}"
        )
    if partly:
        told.append(f"seeds that recorded it by position: {', '.join(partly)}")
    return tuple(told)


def blocks(connection: duckdb.DuckDBPyConnection, comparison: Comparison) -> pd.DataFrame:
    """``configuration, layer, block, state, agreed``: what a layer's own blocks are in, by the plans.

    The state that most seeds chose, the later run's where they tie; ``agreed`` says whether all chose it.
    Empty where every block is in full.
    """
    plans = of_runs(
        connection,
        comparison,
        "(document->'$.blocks')::VARCHAR AS blocks",
        "plans",
        "(document->'$.blocks') IS NOT NULL",
    )
    found = [
        (plan.configuration, layer, block, STATES[state])
        for plan in plans.itertuples()
        for block in BLOCKS
        for layer, state in enumerate(json.loads(str(plan.blocks))[block])
    ]
    frame = pd.DataFrame(found, columns=["configuration", "layer", "block", "state"])
    chosen = {row.config_label for row in comparison.rows if row.scope == "network" and row.method == "hest"}
    partly = set(frame.loc[frame["state"] != "full", "configuration"]) | chosen
    frame = frame[frame["configuration"].isin(partly)]
    if frame.empty:
        return frame
    keys = ["configuration", "layer", "block"]
    states = frame.groupby(keys, sort=False)["state"]
    most = states.agg(lambda chosen: chosen.mode().iloc[-1]).reset_index()
    most["agreed"] = (states.nunique() == 1).to_numpy()
    return most.assign(configuration=ordered(most["configuration"], comparison))


def alike(blocks: pd.DataFrame) -> list[list[str]]:
    """Configurations whose blocks are in the same states, two or more together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for label, part in blocks.groupby("configuration", observed=True):
        states = tuple(part.sort_values(["block", "layer"])["state"])
        groups.setdefault(states, []).append(str(label))
    return [labels for labels in groups.values() if len(labels) > 1]


def confusion(connection: duckdb.DuckDBPyConnection, comparison: Comparison) -> pd.DataFrame:
    """``configuration, truth, answer, count, share``: every pair of labels, zeros included.

    ``count`` adds up the seeds; ``share`` is percent of the samples with that true label.
    """
    pairs = of_runs(
        connection,
        comparison,
        "label AS truth, coalesce(predicted_label, 'no answer') AS answer",
        "samples",
        "split = ? AND label IS NOT NULL",
        [comparison.facts["split"]],
    )
    if pairs.empty:
        raise NoDataError("no sample has a label")
    truths = sorted(set(pairs["truth"]))
    classes = sorted(set(truths) | set(pairs["answer"]))
    frames = []
    for label, part in pairs.groupby("configuration", observed=True):
        grid = pd.crosstab(part["truth"], part["answer"]).reindex(index=truths, columns=classes, fill_value=0)
        shares = 100 * grid.div(grid.sum(axis=1).clip(lower=1), axis=0)
        frame = grid.rename_axis("truth").reset_index().melt("truth", classes, "answer", "count")
        frame["share"] = shares.reset_index().melt("truth", classes, "answer", "share")["share"]
        frames.append(frame.assign(configuration=label))
    whole = pd.concat(frames, ignore_index=True)
    return whole.assign(
        configuration=ordered(whole["configuration"], comparison),
        truth=pd.Categorical(whole["truth"], truths[::-1]),
        answer=pd.Categorical(whole["answer"], classes),
    )


def _some(counts: pd.DataFrame, comparison: Comparison) -> pd.DataFrame:
    """``counts``, or why there are none."""
    if counts.empty or float(counts["count"].sum()) == 0:
        adaptive = any(row.method in ADAPTIVE for row in comparison.rows)
        raise NoDataError(
            "no utilisation was recorded" if adaptive else "none of these methods has directions"
        )
    return counts


def _shares(counts: pd.DataFrame, *keys: str) -> pd.DataFrame:
    """``configuration``, ``keys``, ``state`` and ``share``: percent of the counts under the same keys."""
    by = ["configuration", *keys]
    sums = counts.groupby([*by, "state"], observed=True)["count"].sum().reset_index()
    # A state that never occurs has no place in a legend.
    sums = sums[sums.groupby("state")["count"].transform("sum") > 0].copy()
    sums["share"] = 100 * sums["count"] / sums.groupby(by, observed=True)["count"].transform("sum")
    present = [state for state in STATES if state in set(sums["state"])]
    return sums.assign(state=pd.Categorical(sums["state"], present)).drop(columns="count")
