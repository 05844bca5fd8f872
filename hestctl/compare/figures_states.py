"""The states of directions by depth and by position, and the labels that were answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotnine

from hestctl.compare import frames_states
from hestctl.compare.canvas import Canvas, extremes, labels_of, listed, rows_of
from hestctl.compare.look import Figure, Words
from hestctl.compare.style import SHADES, SMALL
from hestctl.records import PROMPT_PARTS, STATES

p9: Any = plotnine
_BLOCKS_AT: Mapping[str, float] = {"attention": 106.0, "mlp": 122.0}
"""Where the two columns of blocks begin beside the bars, in percent."""
_BLOCK_WIDTH = 13.0
_GAP = 1.5
"""Between the prompt's last bar and the first of new tokens, in bars."""


def depth(canvas: Canvas) -> Figure:
    """Shares of the states layer by layer, and what states the layer's own two blocks are in."""
    frame, left = canvas.chosen(frames_states.depth(canvas.connection, canvas.comparison))
    labels = labels_of(frame)
    shares = frame
    frame = _stacked(frame, "layer")
    layers = int(frame["layer"].max()) + 1
    blocks = frames_states.blocks(canvas.connection, canvas.comparison)
    blocks = blocks[blocks["configuration"].isin(labels)]
    ticks, names = [0.0, 50.0, 100.0], ["0", "50", "100"]
    says, more = "percent of direction-tokens in test generation, input layer at the top", ""
    if len(blocks):
        more = _of_blocks(blocks)
        blocks["start"] = [_BLOCKS_AT[block] for block in blocks["block"]]
        blocks["end"] = blocks["start"] + _BLOCK_WIDTH
        frame = pd.concat([frame, blocks])
        ticks[2:] = [at + _BLOCK_WIDTH / 2 for at in _BLOCKS_AT.values()]
        names[2:] = [block[0].upper() for block in _BLOCKS_AT]
        says += "; columns A and M: the state of the layer's own attention and MLP"
    present = [state for state in STATES if state in set(frame["state"])]
    frame["state"] = pd.Categorical(frame["state"], present)
    off = shares.loc[shares["state"] == "off"].groupby("configuration", observed=True)["share"].mean()
    alt = f"Share of direction-tokens that are off: {extremes(off.reset_index(), 'share', '%')}."
    plot = (
        p9.ggplot(canvas.panels(frame, labels))
        + p9.geom_rect(p9.aes(xmin="start", xmax="end", ymin="layer - 0.5", ymax="layer + 0.5", fill="state"))
        + p9.scale_fill_manual(SHADES[canvas.theme])
        + p9.scale_y_reverse(breaks=_layers(layers), expand=(0, 0.2))
        + p9.scale_x_continuous(breaks=ticks, labels=names, expand=(0, 1))
        + p9.labs(x="percent in each state", y="decoder layer")
        + canvas.facets(len(labels))
        + canvas.look("States by depth", says, left)
        + p9.theme(panel_grid=p9.element_blank(), panel_spacing_x=0.06)
    )
    words = Words(" ".join(filter(None, (alt, more))), more)
    return Figure(plot, 2.1 + (0.8 + 0.016 * layers) * rows_of(len(labels)), words)


def _of_blocks(blocks: pd.DataFrame) -> str:
    """Which configurations chose the same states, and where a column is not what every seed chose."""
    told = [f"{listed(labels)} chose the same blocks." for labels in frames_states.alike(blocks)]
    differ = sorted({str(label) for label in blocks.loc[~blocks["agreed"], "configuration"]})
    if differ:
        told.append(f"Columns show what most seeds chose; seeds differ in {listed(differ)}.")
    return " ".join(told)


def position(canvas: Canvas) -> Figure:
    """Shares of the states along the prompt and the answer."""
    found, width, lacking = frames_states.position(canvas.connection, canvas.comparison)
    frame, left = canvas.chosen(found)
    labels = labels_of(frame)
    on = frame[frame["state"] != "off"].groupby(["configuration", "phase", "place"], observed=True)["share"]
    used = on.sum().reset_index()
    frame = canvas.panels(_stacked(frame, "phase", "place"), labels)
    new = frame["phase"] == "new"
    frame["x"] = frame["place"] + np.where(new, PROMPT_PARTS + _GAP, 0.0)
    bars = int(frame.loc[new, "place"].max()) + 1 if new.any() else 0
    ticks, names = [PROMPT_PARTS / 2], ["prompt"]
    if bars:
        ticks += [PROMPT_PARTS + _GAP, PROMPT_PARTS + _GAP + bars // 2]
        names += ["0", f"{bars // 2 * width:,}"]
    plot = (
        p9.ggplot(frame)
        + p9.geom_rect(p9.aes(xmin="x", xmax="x + 1", ymin="start", ymax="end", fill="state"))
        + p9.scale_fill_manual(SHADES[canvas.theme])
        + p9.scale_x_continuous(breaks=ticks, labels=names, expand=(0, 0.3))
        + p9.scale_y_continuous(breaks=[0, 50, 100], expand=(0, 0))
        + p9.labs(x="tenths of the prompt, then new tokens", y="percent in each state")
        + canvas.facets(len(labels))
        + canvas.look(
            "States by position",
            f"percent of direction-tokens over all layers in test generation; {width} new tokens a bar",
            left,
            *lacking,
        )
        + p9.theme(panel_grid=p9.element_blank())
    )
    alt = f"Share of direction-tokens that are on, over places: {extremes(used, 'share', '%')}."
    rows = rows_of(len(labels))
    return Figure(plot, 2.2 + (1.1 * rows if rows > 1 else 1.6), Words(alt))


def confusion(canvas: Canvas) -> Figure:
    """True against answered labels, in percent of the true ones."""
    frame, left = canvas.chosen(frames_states.confusion(canvas.connection, canvas.comparison))
    labels = labels_of(frame)
    frame = canvas.panels(frame, labels)
    classes = frame["truth"].nunique()
    plot = (
        p9.ggplot(frame, p9.aes("answer", "truth", fill="share"))
        + p9.geom_tile(color=canvas.ink.paper, size=0.4)
        + p9.scale_fill_gradient(canvas.ink.low, canvas.ink.high, limits=(0, 100))
    )
    if classes <= 4:
        frame["text"] = [f"{share:.0f}" for share in frame["share"]]
        frame["over"] = np.where(frame["share"] > 55, canvas.ink.paper, canvas.ink.text)
        plot += p9.geom_text(p9.aes(label="text", color="over"), size=SMALL)
        plot += p9.scale_color_identity()
    split = canvas.comparison.facts["split"]
    plot += [
        p9.labs(x="answered", y="true label"),
        *canvas.facets(len(labels)),
        *canvas.look("Labels", f"percent of the true label's samples, {split} split; seeds added up", left),
        p9.theme(panel_grid=p9.element_blank(), legend_position="none" if classes <= 4 else "bottom"),
    ]
    if classes <= 4:
        plot += p9.theme(axis_text_x=p9.element_text(rotation=30, ha="right", size=SMALL))
    right = frame[frame["truth"].astype(str) == frame["answer"].astype(str)]
    alt = f"Percent of a true label's samples that are answered with it: {extremes(right, 'share', '%')}."
    return Figure(plot, 1.9 + (0.7 + 0.13 * max(classes, 3)) * rows_of(len(labels)), Words(alt))


def _stacked(frame: pd.DataFrame, *keys: str) -> pd.DataFrame:
    """``start`` and ``end`` (percent) of each state's part of a bar, the dearest first."""
    dear = frame.sort_values("state", ascending=False)
    end = dear.groupby(["configuration", *keys], observed=True)["share"].cumsum()
    return dear.assign(start=end - dear["share"], end=end)


def _layers(count: int) -> list[int]:
    """Breaks of an axis of layers."""
    step = next(step for step in (1, 2, 5, 10, 20) if count / step <= 7)
    return list(range(0, count, step))
