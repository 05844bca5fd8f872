"""Samples and their lengths: the spread of joules and latency, joules against E_max, and by length."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotnine

from hestctl.compare import frames, frames_budget
from hestctl.compare.canvas import Canvas, labels_of, rows_of
from hestctl.compare.labels import apart
from hestctl.compare.look import Figure, few_whole
from hestctl.compare.statistics import TAIL_MINIMUM
from hestctl.compare.style import BASE_SIZE, TABS, joule_unit, thousands
from hestctl.compare.text import number
from hestctl.settings import Scope

p9: Any = plotnine
_POINTS = 150
"""At most so many points a configuration: boxes and lines are of every sample all the same."""


def energy_distribution(canvas: Canvas) -> Figure:
    """The spread of joules over samples."""
    frame = frames.joules(canvas.connection, canvas.comparison)
    return _spread(canvas, frame, f"joules per sample, {canvas.word}", "Joules over the samples",
                   canvas.metered, tail=False)  # fmt: skip


def latency(canvas: Canvas) -> Figure:
    """The spread of latency over samples, with p99 where there are enough of them."""
    frame = frames.latency(canvas.connection, canvas.comparison)
    says = "measured wall time of each sample's batch"
    return _spread(canvas, frame, "seconds, measured", "Latency over the samples", says, tail=True)


def budget(canvas: Canvas, scope: Scope) -> Figure:
    """Joules of a scope by sequence length against E_max, what TABS takes beside them."""
    every = frames_budget.budget(canvas.connection, canvas.comparison, scope)
    frame, left = canvas.chosen(every)
    labels = labels_of(frame)
    limits = frames_budget.limits(frame)
    beside = frames_budget.beside(every, canvas.comparison)
    beside = beside[beside["configuration"].isin(labels)]
    factor, unit = joule_unit(float(frame["joules"].max()))
    for one in (frame, limits, beside):
        one["joules"] *= factor
    points = canvas.panels(canvas.marked(_few(frame)), labels)
    plot = p9.ggplot(points, p9.aes("tokens", "joules"))
    plot += p9.geom_point(p9.aes(color="colour", shape="shape"), size=0.8, alpha=0.5, stroke=0.2)
    says = ["points: samples"]
    if len(beside):
        lines = canvas.panels(beside, labels)
        plot += p9.geom_line(data=lines, color=TABS.colour, linetype=TABS.line, size=0.7)
        says.append(f"{TABS.line}: tabs")
    if len(limits):
        plot += p9.geom_line(data=canvas.panels(limits, labels), color=canvas.ink.text, size=0.7)
        says.append("line: E_max of the run")
    else:
        says.append("no run has an E_max")
    counted = "whole generation" if scope == "network" else "adapters' directions"
    plot += [
        p9.scale_color_identity(),
        p9.scale_shape_identity(),
        p9.scale_x_continuous(breaks=few_whole, labels=thousands),
        p9.scale_y_continuous(limits=(0, None)),
        p9.labs(x="prompt and new tokens", y=f"scope {unit} per sample, predicted"),
        *canvas.facets(len(labels)),
        *canvas.look(
            "Scope joules by length",
            f"scope {scope}: {counted}, predicted from the energy table; {'; '.join(says)}",
            left,
        ),
    ]
    rows = rows_of(len(labels))
    return Figure(plot, 1.6 + (1.3 * rows if rows > 1 else 2.2))


def length(canvas: Canvas) -> Figure:
    """Whole joules of generation by sequence length, from profile runs."""
    frame = canvas.marked(frames_budget.length(canvas.connection, canvas.comparison))
    batches = frame["batch"].nunique()
    by = ["configuration", "colour", "line", "batch", "tokens"]
    means = frame.groupby(by, observed=True, as_index=False)["joules"].mean()
    last = means.groupby(["configuration", "batch"], observed=True)["tokens"].transform("max")
    ends = means[means["tokens"] == last]
    panel_in = 2.2 if batches == 1 else 1.5
    gap = float(frame["joules"].max()) * 0.13 / panel_in
    ends = pd.concat(
        part.assign(joules=apart(part["joules"].tolist(), gap)) for _, part in ends.groupby("batch")
    )
    plot = (
        p9.ggplot(frame, p9.aes("tokens", "joules", color="colour"))
        + p9.geom_point(p9.aes(shape="shape", fill="colour"), size=1.5, alpha=0.7, stroke=0.2)
        + p9.geom_line(p9.aes(linetype="line", group="configuration"), data=means, size=0.6)
        + p9.geom_text(
            p9.aes(label="configuration"),
            data=ends,
            ha="left",
            nudge_x=float(frame["tokens"].max()) * 0.02,
            size=BASE_SIZE - 2.5,
        )
        + p9.scale_color_identity()
        + p9.scale_fill_identity()
        + p9.scale_shape_identity()
        + p9.scale_linetype_identity()
        + p9.scale_x_continuous(labels=thousands, expand=(0.04, 0, 0.4, 0))
        + p9.scale_y_continuous(limits=(0, None))
        + p9.labs(x="prompt and new tokens", y=f"joules per sample, {canvas.word}")
        + canvas.look("Joules by length", f"{canvas.metered}, profile runs; lines join means")
    )
    if batches > 1:
        plot += p9.facet_wrap("batch", ncol=1, scales="free_y")
    return Figure(plot, 1.2 + (panel_in + 0.4) * batches)


def _few(frame: pd.DataFrame) -> pd.DataFrame:
    """At most ``_POINTS`` rows a configuration, by chance."""
    order = frame.sample(frac=1.0, random_state=1)
    return order[order.groupby("configuration", observed=True).cumcount() < _POINTS]


def _spread(canvas: Canvas, frame: pd.DataFrame, axis: str, title: str, says: str, *, tail: bool) -> Figure:
    """Boxes with their samples; ``tail`` adds the 99th percentile."""
    frame, left = canvas.chosen(frame)
    labels = labels_of(frame)
    frame["configuration"] = pd.Categorical(frame["configuration"], labels[::-1])
    points = canvas.marked(_few(frame))
    groups = frame.groupby("configuration", observed=True)["value"]
    plot = (
        p9.ggplot(frame, p9.aes("configuration", "value"))
        + p9.geom_jitter(
            p9.aes(color="colour", shape="shape", fill="colour"),
            data=points,
            width=0.22,
            height=0,
            random_state=1,
            size=0.9,
            alpha=0.4,
            stroke=0.1,
        )
        + p9.geom_boxplot(
            fill="none", color=canvas.ink.text, width=0.55, size=0.45, outlier_shape="", show_legend=False
        )
        + p9.coord_flip()
        + p9.scale_color_identity()
        + p9.scale_fill_identity()
        + p9.scale_shape_identity()
    )
    says += "; box: quartiles, line: median"
    says += f"; points: {_POINTS} by chance" if len(points) < len(frame) else ""
    if tail:
        counts = groups.size()
        tails = groups.quantile(0.99).loc[counts[counts >= TAIL_MINIMUM].index].reset_index()
        if len(tails):
            tails["text"] = [number(float(value)) for value in tails["value"]]
            plot += p9.geom_point(data=tails, shape="|", size=5, stroke=1.2, color=canvas.ink.text)
            plot += p9.geom_text(
                p9.aes(label="text"), data=tails, ha="left", size=BASE_SIZE - 2.5, color=canvas.ink.text,
                nudge_y=float(frame["value"].max()) * 0.015,
            )  # fmt: skip
        says += "; long bar: p99" if len(tails) else f"; p99 needs {TAIL_MINIMUM} samples"
    plot += p9.scale_y_continuous(limits=(0, None), expand=(0, 0, 0.1 if tail else 0.06, 0))
    plot += p9.labs(x="", y=axis)
    plot += canvas.look(title, says, left)
    return Figure(plot, 1.7 + 0.3 * len(labels))
