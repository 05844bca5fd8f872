"""How training went, and what the meter's figures are worth."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotnine
from matplotlib.ticker import MaxNLocator

from hestctl.compare import frames_runs
from hestctl.compare.canvas import Canvas, labels_of, rows_of
from hestctl.compare.look import Figure, few_whole
from hestctl.compare.style import BASE_SIZE, thousands

p9: Any = plotnine
_TURNS = {"warmup": "dotted", "settled": "dashed"}


def learning_loss(canvas: Canvas) -> Figure:
    """Task loss over the optimiser steps."""
    return _learning(canvas, "task_loss", "task loss, nats a token", "Task loss in training")


def learning_energy(canvas: Canvas) -> Figure:
    """Joules over E_max as the gates decide, over the optimiser steps."""
    return _learning(canvas, "energy_ratio", "J / E_max, predicted", "Joules over E_max in training")


def learning_multiplier(canvas: Canvas) -> Figure:
    """The multiplier of the budget over the optimiser steps."""
    return _learning(canvas, "multiplier", "multiplier", "The budget's multiplier in training")


def meter(canvas: Canvas) -> Figure:
    """The error bound, windows that do not count, and windows against the counter's step, run by run."""
    frame, reasons = frames_runs.meter(canvas.connection, canvas.comparison)
    frame = canvas.marked(frame)
    labels = labels_of(frame)
    panels = frame["panel"].nunique()
    columns = 2 if panels == 4 else 3
    frame["configuration"] = pd.Categorical(frame["configuration"], labels[::-1])
    # A panel of nothing but zeros is no reason for an axis from -0.5 to 0.5.
    ends = frame.groupby("panel", observed=True)["high"].max().clip(lower=1.0).reset_index(name="value")
    ends["configuration"] = frame["configuration"].iloc[0]
    plot = (
        p9.ggplot(frame, p9.aes("value", "configuration"))
        + p9.geom_blank(data=ends)
        + p9.geom_segment(
            p9.aes(x="low", xend="high", yend="configuration", color="colour"), size=0.5, alpha=0.6
        )
        + p9.geom_point(
            p9.aes(shape="shape", fill="colour", color="colour"), size=1.5, alpha=0.75, stroke=0.2
        )
        + p9.facet_wrap("panel", ncol=columns, scales="free_x")
        + p9.scale_color_identity()
        + p9.scale_fill_identity()
        + p9.scale_shape_identity()
        + p9.scale_x_continuous(limits=(0, None), breaks=_few_breaks)
        + p9.labs(x="", y="")
        + canvas.look(
            "What the meter's figures are worth",
            f"joules {canvas.metered}; a mark is a run; bars: the shortest to the longest window",
            *reasons,
        )
        + p9.theme(
            strip_text=p9.element_text(size=BASE_SIZE - 2, color=canvas.ink.text, ha="left"),
            axis_text=p9.element_text(size=BASE_SIZE - 2, color=canvas.ink.text),
            panel_spacing_x=0.04,
        )
    )
    return Figure(plot, 1.6 + (0.55 + 0.15 * len(labels)) * -(-panels // columns))


def _learning(canvas: Canvas, column: str, axis: str, title: str) -> Figure:
    found = frames_runs.learning(canvas.connection, canvas.comparison, column)
    frame, left = canvas.chosen(found)
    labels = labels_of(frame)
    means = canvas.panels(canvas.marked(frames_runs.means(frame)), labels)
    frame = canvas.panels(canvas.marked(frame), labels)
    seeds = frame[frame["split"] == "train"]
    train, held_out = (means[means["split"] == split] for split in ("train", "validation"))
    turns = frames_runs.turns(canvas.connection, canvas.comparison)
    turns = turns[turns["configuration"].isin(labels)]
    plot = p9.ggplot(frame, p9.aes("step", "value", color="colour"))
    says = []
    if column == "energy_ratio":
        plot += p9.geom_hline(yintercept=1.0, color=canvas.ink.muted, size=0.5)
        says.append("joules are predicted; level line: E_max")
    for what, line in _TURNS.items():
        part = turns[turns["what"] == what]
        if len(part):
            plot += p9.geom_vline(
                p9.aes(xintercept="step"), data=canvas.panels(part, labels), linetype=line, size=0.5,
                color=canvas.ink.muted,
            )  # fmt: skip
            says.append(f"{line} line: " + ("warm-up ends" if what == "warmup" else "blocks settle"))
    curves = _curves(seeds, "run_id")
    if curves["run_id"].nunique() > curves["configuration"].nunique():
        plot += p9.geom_line(p9.aes(group="run_id"), data=curves, size=0.3, alpha=0.55)
        says.append("thin: seeds, bold: mean")
    if len(_curves(train, "configuration")):
        plot += p9.geom_line(p9.aes(group="configuration"), data=_curves(train, "configuration"), size=0.9)
    if (train.groupby("configuration", observed=True).size() < 8).any():
        plot += p9.geom_point(data=train, size=1)
    if len(held_out):
        plot += p9.geom_point(
            data=held_out, shape="D", size=1.1, fill=canvas.ink.paper, color=canvas.ink.text
        )
        says.append("diamonds: validation")
    plot += [
        p9.scale_color_identity(),
        p9.scale_x_continuous(breaks=few_whole, labels=thousands),
        p9.labs(x="optimiser step", y=axis),
        *canvas.facets(len(labels)),
        *canvas.look(title, "; ".join(says), left),
    ]
    return Figure(plot, 1.6 + 1.2 * rows_of(len(labels)))


def _curves(frame: pd.DataFrame, by: str) -> pd.DataFrame:
    """The rows of what has more than one: a line needs two points."""
    return frame[frame.groupby(by, observed=True)["step"].transform("size") > 1]


def _few_breaks(limits: tuple[float, float]) -> list[float]:
    return [float(tick) for tick in MaxNLocator(nbins=3, steps=[1, 2, 5, 10]).tick_values(*limits)]
