"""How training went, and what the meter's figures are worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotnine
from matplotlib.ticker import MaxNLocator

from hestctl.compare import frames_runs
from hestctl.compare.canvas import MOST_ROWS, Canvas, extremes, labels_of, names_room
from hestctl.compare.frames import NoDataError
from hestctl.compare.look import Figure, Words
from hestctl.compare.style import SMALL, thousands

p9: Any = plotnine
_LINE_IN = 0.15
"""Between the names of two lines."""
_RATIO = "J / E_max, predicted"
_MULTIPLIER = "multiplier"
_TITLES = {
    frames_runs.REPEATS: "A/A pairs apart, %\nof {word} joules",
    frames_runs.PREDICTED: "{word} over\npredicted joules",
    frames_runs.ERROR: "error bound of\na sample, %",
    frames_runs.INVALID: "windows that\ndo not count, %",
    frames_runs.STEPS: "window length,\ncounter steps",
}
"""What the panels of the meter are called."""


def learning_loss(canvas: Canvas) -> Figure:
    """Task loss over the optimiser steps, a line a configuration."""
    found = frames_runs.learning(canvas.connection, canvas.comparison, "task_loss")
    frame, left = canvas.chosen(found[found["split"] == "train"], MOST_ROWS)
    curves, window = frames_runs.smoothed(frames_runs.means(frame))
    height_in = max(2.4, _LINE_IN * 1.05 * curves["configuration"].nunique())
    plot, ends = _lines(canvas, curves.assign(panel="task loss, nats a token"), height_in)
    smooth = f"means over {window} recorded steps" if window > 1 else "steps as recorded"
    plot += p9.labs(x="optimiser step", y="task loss, nats a token")
    plot += canvas.look("Task loss in training", f"training split; mean over seeds; {smooth}", left)
    plot += p9.theme(strip_text=p9.element_blank())
    alt = f"Task loss at the last step, nats a token: {extremes(ends, 'value', '')}."
    return Figure(plot, 1.5 + height_in, Words(alt))


def learning_budget(canvas: Canvas) -> Figure:
    """Joules over E_max as the gates decide, and the multiplier that pressed them there."""
    parts = []
    for column, panel in (("energy_ratio", _RATIO), ("multiplier", _MULTIPLIER)):
        found = frames_runs.learning(canvas.connection, canvas.comparison, column)
        parts.append(found[found["split"] == "train"].assign(panel=panel))
    frame, left = canvas.chosen(pd.concat(parts, ignore_index=True), MOST_ROWS)
    curves = pd.concat(
        [frames_runs.means(part).assign(panel=panel) for panel, part in frame.groupby("panel", sort=False)],
        ignore_index=True,
    )
    curves["panel"] = pd.Categorical(curves["panel"], [_RATIO, _MULTIPLIER])
    height_in = max(1.6, _LINE_IN * 1.05 * curves["configuration"].nunique())
    plot, ends = _lines(canvas, curves, height_in)
    level = ends[ends["panel"] == _RATIO].nlargest(1, "step").assign(value=1.0, start=0.0)
    plot += p9.geom_segment(
        p9.aes("start", "value", xend="step", yend="value"), data=level, size=0.5, color=canvas.ink.text
    )
    says = "mean over seeds; joules are predicted; level line: E_max"
    settled = frames_runs.settled(canvas.connection, canvas.comparison)
    if settled:
        plot += p9.geom_vline(xintercept=settled, linetype="dotted", size=0.5, color=canvas.ink.muted)
        says += "; dotted: the step at which blocks settle"
    plot += p9.labs(x="optimiser step", y="")
    plot += canvas.look("The budget in training", says, left)
    told = [
        f"{panel} at the last step: {extremes(part, 'value', '')}"
        for panel, part in ends.groupby("panel", observed=True)
    ]
    return Figure(plot, 1.6 + 2 * (height_in + 0.25), Words(f"{'; '.join(told)}."))


def _lines(canvas: Canvas, curves: pd.DataFrame, height_in: float) -> tuple[Any, pd.DataFrame]:
    """A line a configuration in panels of ``height_in``, named at its end; and those ends."""
    curves = canvas.marked(curves[curves["split"] == "train"])
    if curves.empty:
        raise NoDataError("the seeds recorded no step that all of them have")
    curves["panel"] = curves["panel"].astype("category")
    ends = curves.loc[curves.groupby(["panel", "configuration"], observed=True)["step"].idxmax()]
    last = float(curves["step"].max())
    plot = p9.ggplot(curves, p9.aes("step", "value", color="colour"))
    # A line needs two points.
    many = curves[curves.groupby(["panel", "configuration"], observed=True)["step"].transform("size") > 1]
    if len(many):
        plot += p9.geom_line(p9.aes(group="configuration", linetype="line"), data=many, size=0.7)
    for _, part in ends.groupby("panel", observed=True):
        values = curves.loc[curves["panel"] == part["panel"].iloc[0], "value"]
        low, high = float(values.min()), float(values.max())
        span = high - low or abs(high) or 1.0
        plot += canvas.named_lines(part, 1.1 * span * _LINE_IN / height_in, (low, low + span))
    plot += [
        p9.geom_point(data=ends, size=0.9),
        p9.facet_wrap("panel", ncol=1, scales="free_y"),
        p9.scale_color_identity(),
        p9.scale_linetype_identity(),
        p9.scale_x_continuous(
            breaks=_steps(last), labels=thousands, limits=(0, (1 + names_room(labels_of(ends))) * last),
            expand=(0.02, 0, 0, 0),
        ),
        p9.theme(strip_text=p9.element_text(size=SMALL + 0.5, ha="left", color=canvas.ink.text)),
    ]  # fmt: skip
    return plot, ends


def _steps(last: float) -> list[float]:
    """Breaks of an axis of steps that goes on, for names, beyond the last."""
    ticks = MaxNLocator(nbins=4, integer=True).tick_values(0, last)
    return [float(tick) for tick in ticks if 0 <= tick <= last]


def meter(canvas: Canvas) -> Figure:
    """A/A pairs, the meter beside the energy model, and what is known of a counter, run by run."""
    frame, reasons = frames_runs.meter(canvas.connection, canvas.comparison)
    frame = canvas.marked(frame)
    labels = labels_of(frame)
    kinds = [str(panel) for panel in frame["panel"].cat.categories]
    columns = 2 if len(kinds) == 4 else min(len(kinds), 3)
    names = {panel: _TITLES[panel].format(word=canvas.word) for panel in kinds}
    frame["panel"] = frame["panel"].cat.rename_categories(names)
    frame["configuration"] = pd.Categorical(frame["configuration"], labels[::-1])
    # What is counted begins at 0, and a panel of nothing but zeros is no reason for an axis from -0.5 to 0.5.
    # A ratio is seen beside 1.
    high = frame.groupby("panel", observed=True)["high"].max().clip(lower=1.0).reset_index(name="value")
    ratio = high["panel"] == names.get(frames_runs.PREDICTED)
    ends = pd.concat([high[~ratio], high.assign(value=np.where(ratio, 1.0, 0.0))])
    ends["configuration"] = frame["configuration"].iloc[0]
    alike = pd.DataFrame(
        {"panel": [names[kind] for kind in kinds if kind == frames_runs.PREDICTED], "at": 1.0}
    )
    alike["panel"] = pd.Categorical(alike["panel"], list(names.values()))
    plot = (
        p9.ggplot(frame, p9.aes("value", "configuration"))
        + p9.geom_blank(data=ends)
        + p9.geom_vline(p9.aes(xintercept="at"), data=alike, color=canvas.ink.muted, size=0.5)
        + p9.geom_segment(
            p9.aes(x="low", xend="high", yend="configuration", color="colour"), size=0.5, alpha=0.6
        )
        + p9.geom_point(p9.aes(shape="shape", fill="colour", color="colour"), size=1.6, alpha=0.9, stroke=0.2)
        + p9.facet_wrap("panel", ncol=columns, scales="free_x")
        + p9.scale_color_identity()
        + p9.scale_fill_identity()
        + p9.scale_shape_identity()
        + p9.scale_x_continuous(breaks=_few_breaks)
        + p9.labs(x="", y="")
        + canvas.look(
            "How far the joules can be trusted",
            f"joules {canvas.metered}; a mark is a run, or an A/A pair: one model twice",
            *reasons,
        )
        + p9.theme(
            strip_text=p9.element_text(size=SMALL, color=canvas.ink.text, ha="left"),
            axis_text=p9.element_text(size=SMALL, color=canvas.ink.text),
            panel_spacing_x=0.04,
        )
    )
    told = [
        f"{' '.join(str(panel).split())}: {extremes(part, 'value', '')}"
        for panel, part in frame.groupby("panel", observed=True)
    ]
    height_in = 1.6 + (0.55 + 0.15 * len(labels)) * -(-len(kinds) // columns)
    return Figure(plot, height_in, Words(f"{'; '.join(told)}."))


def _few_breaks(limits: tuple[float, float]) -> list[float]:
    return [float(tick) for tick in MaxNLocator(nbins=3, steps=[1, 2, 5, 10]).tick_values(*limits)]
