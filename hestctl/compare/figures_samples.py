"""Batches and samples: the spread of joules and latency, joules against E_max, and by length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotnine

from hestctl.compare import frames, frames_budget
from hestctl.compare.canvas import (
    MOST_PANELS,
    MOST_ROWS,
    Canvas,
    extremes,
    labels_of,
    listed,
    rows_of,
)
from hestctl.compare.configurations import configurations
from hestctl.compare.labels import apart
from hestctl.compare.look import Figure, Words, few_whole
from hestctl.compare.statistics import TAIL_MINIMUM
from hestctl.compare.style import SMALL, thousands
from hestctl.compare.text import number

p9: Any = plotnine
_POINTS = 150
"""At most so many points a configuration: boxes and means are of every batch all the same."""
_BESIDE = 0.18
"""How far above and below the middle of its row a mark stands where there are two."""


def energy_distribution(canvas: Canvas) -> Figure:
    """The spread of joules over generated batches, with the mean."""
    frame = frames.joules(canvas.connection, canvas.comparison)
    return _spread(canvas, frame, f"joules per sample, {canvas.word}", "Joules over the batches",
                   f"joules {canvas.metered}; ", "J", tail=False)  # fmt: skip


def latency(canvas: Canvas) -> Figure:
    """The spread of latency over generated batches, with p99 where there are enough of them."""
    frame = frames.latency(canvas.connection, canvas.comparison)
    return _spread(canvas, frame, "seconds a batch, measured", "Latency over the batches",
                   "wall time; ", "s", tail=True)  # fmt: skip


def budget(canvas: Canvas) -> Figure:
    """Joules over E_max, predicted and by the meter: by length where lengths differ, else in one strip."""
    found = frames_budget.budget(canvas.connection, canvas.comparison)
    by_length = frames_budget.lengths_differ(found)
    frame, left = canvas.chosen(found, MOST_PANELS if by_length else MOST_ROWS)
    kinds = list(dict.fromkeys(frame["kind"]))
    metered = f"; filled: batches, {canvas.word}" if len(kinds) > 1 else ""
    says = [f"hollow: samples, predicted by the energy table{metered}"]
    if not by_length:
        says.append("marks and numbers: means; lines end at the largest")
    outside = sorted({str(one) for one in frame.loc[frame["scope"] == "adapter", "configuration"]})
    if outside:
        says.append(
            f"predicted only, since the meter sees more than a budget of directions: {listed(outside)}"
        )
    axis = f"joules over E_max, {' and '.join(kinds)}"
    draw = _budget_by_length if by_length else _budget_strip
    plot, height_in = draw(canvas, frame, axis)
    plot += canvas.look("Joules against the budget", *says, left)
    told = frames_budget.uses(frame)
    ends = [
        f"{kind} means: {extremes(part, 'mean', '')}, the largest value {extremes(part, 'worst', '')}"
        for kind, part in told.groupby("kind", sort=False)
    ]
    longest, shortest = frame["tokens"].max(), frame["tokens"].min()
    more = (
        ""
        if by_length
        else f"Samples have {shortest:.0f} to {longest:.0f} tokens: lengths tell nothing apart."
    )
    return Figure(plot, height_in, Words(f"Joules over E_max. {'; '.join(ends)}.", more))


def _budget_by_length(canvas: Canvas, frame: pd.DataFrame, axis: str) -> tuple[Any, float]:
    labels = labels_of(frame)
    points = canvas.panels(canvas.marked(_few(frame, "configuration", "kind")), labels)
    points["fill"] = points["colour"].where(points["kind"] != frames_budget.PREDICTED, "none")
    plot = (
        p9.ggplot(points, p9.aes("tokens", "ratio"))
        + p9.geom_hline(yintercept=1.0, color=canvas.ink.text, size=0.6)
        + p9.geom_point(p9.aes(color="colour", shape="shape", fill="fill"), size=1.1, alpha=0.6, stroke=0.3)
        + p9.scale_color_identity()
        + p9.scale_fill_identity()
        + p9.scale_shape_identity()
        + p9.scale_x_continuous(breaks=few_whole, labels=thousands)
        + p9.scale_y_continuous(limits=(0, None))
        + p9.labs(x="prompt and new tokens", y=axis)
        + canvas.facets(len(labels))
    )
    rows = rows_of(len(labels))
    return plot, 1.7 + (1.3 * rows if rows > 1 else 2.2)


def _budget_strip(canvas: Canvas, frame: pd.DataFrame, axis: str) -> tuple[Any, float]:
    labels = labels_of(frame)[::-1]
    told = canvas.marked(frames_budget.uses(frame))
    predicted = told["kind"] == frames_budget.PREDICTED
    both = told["configuration"].map(told["configuration"].value_counts()).astype(int) > 1
    shift = np.where(predicted, _BESIDE, -_BESIDE) * both
    told["row"] = [labels.index(str(label)) for label in told["configuration"]] + shift
    told["fill"] = told["colour"].where(~predicted, canvas.ink.paper)
    told["text"] = [number(mean) for mean in told["mean"]]
    told["side"] = 1.04 * told["worst"].max()
    plot = (
        p9.ggplot(told, p9.aes("mean", "row"))
        + p9.geom_vline(xintercept=1.0, color=canvas.ink.text, size=0.6)
        + p9.geom_segment(p9.aes(xend="worst", yend="row", color="colour"), size=0.6)
        + p9.geom_point(p9.aes(color="colour", shape="shape", fill="fill"), size=2, stroke=0.5)
        + p9.geom_text(p9.aes("side", label="text"), ha="left", size=SMALL, color=canvas.ink.text)
        + p9.scale_color_identity()
        + p9.scale_fill_identity()
        + p9.scale_shape_identity()
        + p9.scale_x_continuous(limits=(0, None), expand=(0, 0, 0.14, 0))
        + p9.scale_y_continuous(breaks=range(len(labels)), labels=labels, expand=(0, 0.5))
        + p9.labs(x=axis, y="")
        + p9.theme(panel_grid_major_y=p9.element_blank())
    )
    return plot, 1.7 + 0.3 * len(labels)


def length(canvas: Canvas) -> Figure:
    """Whole joules of generation by sequence length, from profile runs."""
    frame = canvas.marked(frames_budget.length(canvas.connection, canvas.comparison))
    batches = frame["batch"].nunique()
    by = ["configuration", "colour", "line", "batch", "tokens"]
    means = frame.groupby(by, observed=True)["joules"].mean().reset_index()
    last = means.groupby(["configuration", "batch"], observed=True)["tokens"].transform("max")
    ends = means[means["tokens"] == last]
    panel_in = 2.2 if batches == 1 else 1.5
    gap = float(frame["joules"].max()) * 0.13 / panel_in
    limits = (0.0, float(frame["joules"].max()))
    ends = pd.concat(
        part.assign(joules=apart(part["joules"].tolist(), gap, limits)) for _, part in ends.groupby("batch")
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
            size=SMALL,
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
    alt = f"Joules per sample, {canvas.word}, by length in profile runs: {extremes(means, 'joules', 'J')}."
    return Figure(plot, 1.2 + (panel_in + 0.4) * batches, Words(alt))


def _few(frame: pd.DataFrame, *keys: str) -> pd.DataFrame:
    """At most ``_POINTS`` rows of each group, by chance."""
    order = frame.sample(frac=1.0, random_state=1)
    return order[order.groupby(list(keys), observed=True).cumcount() < _POINTS]


def _spread(
    canvas: Canvas, frame: pd.DataFrame, axis: str, title: str, says: str, unit: str, *, tail: bool
) -> Figure:
    """Batches of all seeds with their quartiles and their mean; ``tail`` adds the 99th percentile."""
    frame, left = canvas.chosen(frame, MOST_ROWS)
    labels = labels_of(frame)
    frame["configuration"] = pd.Categorical(frame["configuration"], labels[::-1])
    points = canvas.marked(_few(frame, "configuration"))
    means = frame.groupby("configuration", observed=True)["value"].mean().reset_index()
    plot = (
        p9.ggplot(frame, p9.aes("configuration", "value"))
        + p9.geom_jitter(
            p9.aes(color="colour", shape="shape", fill="colour"),
            data=points,
            width=0.22,
            height=0,
            random_state=1,
            size=0.9,
            alpha=0.7,
            stroke=0.1,
        )
        + p9.geom_boxplot(
            fill="none", color=canvas.ink.text, width=0.6, size=0.4, outlier_shape="", show_legend=False
        )
        + p9.geom_point(data=means, shape="D", size=1.7, fill=canvas.ink.paper, color=canvas.ink.text)
        + p9.coord_flip()
        + p9.scale_color_identity()
        + p9.scale_fill_identity()
        + p9.scale_shape_identity()
    )
    sizes = sorted(set(frame["size"]))
    says += f"a point: a batch of {' or '.join(map(str, sizes))}, all seeds"
    says += f", {_POINTS} by chance" if len(points) < len(frame) else ""
    says += "; box: quartiles, diamond: mean"
    alt = f"Means: {extremes(means, 'value', unit)}; batches: {extremes(frame, 'value', unit)}."
    if tail:
        tails = _tails(canvas, labels)
        if len(tails):
            plot += p9.geom_point(data=tails, shape="|", size=5, stroke=1.2, color=canvas.ink.text)
            plot += p9.geom_text(
                p9.aes(label="text"), data=tails, ha="left", size=SMALL, color=canvas.ink.text,
                nudge_y=float(frame["value"].max()) * 0.015,
            )  # fmt: skip
            alt += f" p99: {extremes(tails, 'value', unit)}."
            says += "; long bar: p99"
        if len(tails) < len(labels):
            says += f"; no p99 below {TAIL_MINIMUM} batches a run"
    plot += p9.scale_y_continuous(limits=(0, None), expand=(0, 0, 0.1 if tail else 0.06, 0))
    plot += p9.labs(x="", y=axis)
    plot += canvas.look(title, says, left)
    return Figure(plot, 1.7 + 0.24 * len(labels), Words(f"{axis[0].upper()}{axis[1:]}. {alt}"))


def _tails(canvas: Canvas, labels: Sequence[str]) -> pd.DataFrame:
    """``configuration, value, text``: p99 of the configurations that the table gives one."""
    found = [
        (one.label, value, number(value))
        for one in configurations(canvas.comparison.rows)
        if one.label in labels and (value := one.measure("latency_p99_s").value) is not None
    ]
    frame = pd.DataFrame(found, columns=["configuration", "value", "text"])
    return frame.assign(configuration=pd.Categorical(frame["configuration"], list(labels[::-1])))
