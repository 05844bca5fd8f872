"""Joules at equal quality, the front of quality against joules, and where the joules go."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import plotnine

from hestctl.compare import frames
from hestctl.compare.canvas import Canvas, labels_of
from hestctl.compare.configurations import configurations
from hestctl.compare.labels import Box, place
from hestctl.compare.look import Figure
from hestctl.compare.style import BASE_SIZE, PARTS, WIDTH_IN

p9: Any = plotnine


def energy(canvas: Canvas) -> Figure:
    """Joules per sample, the least at the top; filled where quality is not inferior to the best baseline."""
    frame = canvas.marked(frames.energy(canvas.comparison))
    best, margin = canvas.comparison.best_baseline, canvas.comparison.margin_points
    within = f"{margin:g} point{'' if margin == 1 else 's'}"
    frame["fill"] = frame["colour"].where(frame["equal"], canvas.ink.paper)
    frame["configuration"] = pd.Categorical(frame["configuration"], frame["configuration"][::-1])
    reach = float(frame["high"].max())
    plot = (
        p9.ggplot(frame, p9.aes("joules", "configuration"))
        + p9.geom_segment(p9.aes(x="low", xend="high", yend="configuration"), size=0.7, color=canvas.ink.text)
        + p9.geom_point(p9.aes(color="colour", fill="fill", shape="shape"), size=3, stroke=0.7)
        + p9.geom_text(
            p9.aes(x="high", label="text"),
            ha="left",
            nudge_x=reach * 0.02,
            size=BASE_SIZE - 2,
            color=canvas.ink.text,
        )
        + p9.scale_color_identity()
        + p9.scale_fill_identity()
        + p9.scale_shape_identity()
        + p9.scale_x_continuous(limits=(0, reach * 1.4), expand=(0, 0))
        + p9.labs(x=f"joules per sample, {canvas.word}", y="")
        + canvas.look(
            "Joules at equal quality",
            f"{canvas.metered}; means with {_intervals(canvas)}",
            f"filled: not inferior to {best.label} (best baseline) within {within}; "
            "hollow: inferior or undecided"
            if best
            else "all hollow: there is no baseline to be equal to",
            "in brackets: scope joules as a share of E_max, predicted"
            if frame["text"].str.contains("%").any()
            else "",
        )
    )
    return Figure(plot, 1.6 + 0.21 * len(frame))


def front(canvas: Canvas) -> Figure:
    """Quality against joules, configurations with their seeds: up and to the left is better."""
    comparison = canvas.comparison
    frame = canvas.marked(frames.front(comparison))
    seeds = canvas.marked(frames.front_seeds(comparison))
    best = frame[frame["best"]].sort_values("x")
    title = "accuracy, %" if comparison.task == "classification" else "ROUGE-Lsum, points"
    chance = comparison.rows[0].measure("chance_percent").value
    level = pd.DataFrame({"y": [] if chance is None else [chance]}, dtype=float)
    marks = pd.concat([frame, seeds, level])
    x, y = _ends(marks, "x"), _ends(marks, "y")
    level_bars = frame[["x_low", "y", "x_high", "y"]].to_numpy().tolist()
    upright_bars = frame[["x", "y_low", "x", "y_high"]].to_numpy().tolist()
    height_in = 3.9 + 0.06 * len(frame)
    spots = place(
        list(zip(frame["x"].tolist(), frame["y"].tolist(), strict=True)),
        [str(label) for label in frame["configuration"]],
        bars=[*map(Box._make, level_bars), *map(Box._make, upright_bars), *_steps(best)],
        size_in=(WIDTH_IN - 0.75, height_in - 1.5),
        x=x,
        y=y,
        points_of_type=BASE_SIZE - 2.5,
    )
    frame[["label_x", "label_y", "line_x", "line_y"]] = spots
    plot = p9.ggplot(frame, p9.aes("x", "y"))
    if len(best) > 1:
        plot += p9.geom_step(data=best, direction="hv", size=0.6, linetype="dashed", color=canvas.ink.muted)
    if len(seeds):
        plot += p9.geom_point(p9.aes(color="colour", shape="shape"), data=seeds, size=0.9, alpha=0.45)
    plot += [
        p9.geom_segment(p9.aes(xend="line_x", yend="line_y"), size=0.25, color=canvas.ink.muted),
        p9.geom_segment(p9.aes(x="x_low", xend="x_high", yend="y", color="colour"), size=0.4, alpha=0.6),
        p9.geom_segment(p9.aes(y="y_low", yend="y_high", xend="x", color="colour"), size=0.4, alpha=0.6),
        p9.geom_text(
            p9.aes("label_x", "label_y", label="configuration"), size=BASE_SIZE - 2.5, color=canvas.ink.text
        ),
        p9.geom_point(p9.aes(color="colour", fill="colour", shape="shape"), size=2.4, stroke=0.3),
        p9.scale_color_identity(),
        p9.scale_fill_identity(),
        p9.scale_shape_identity(),
        p9.scale_x_continuous(limits=x, expand=(0, 0)),
        p9.scale_y_continuous(limits=y, expand=(0, 0)),
        p9.labs(x=f"joules per sample, {canvas.word}", y=title),
    ]
    says = f"{'small: seeds; ' if len(seeds) else ''}bars: {_intervals(canvas)}"
    says += "; dashed line: no other has fewer joules and a higher score" if len(best) > 1 else ""
    if chance is not None:
        plot += p9.geom_hline(yintercept=chance, linetype="dotted", color=canvas.ink.muted)
        says += "; dotted: chance level"
    plot += canvas.look("Quality against joules", f"joules {canvas.metered}", says)
    return Figure(plot, height_in)


def _intervals(canvas: Canvas) -> str:
    several = any(one.seeds > 1 for one in configurations(canvas.comparison.rows))
    return "95 % intervals" + (" over seeds" if several else "")


def _steps(best: pd.DataFrame) -> list[Box]:
    """The parts of the front's line."""
    corners = best[["x", "y"]].to_numpy().tolist()
    steps = [((x, y, right, y), (right, y, right, top)) for (x, y), (right, top) in pairwise(corners)]
    return [Box(*edges) for step in steps for edges in step]


def _ends(marks: pd.DataFrame, axis: str) -> tuple[float, float]:
    """Ends of an axis with room for the marks, their intervals and their labels."""
    columns = [axis, f"{axis}_low", f"{axis}_high"]
    values = marks[[column for column in columns if column in marks]]
    low, high = float(values.min().min()), float(values.max().max())
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def parts(canvas: Canvas) -> Figure:
    """Mean joules per sample by phase and by cause."""
    frame, lacking = frames.parts(canvas.connection, canvas.comparison)
    labels = labels_of(frame)
    colours = PARTS[canvas.theme]
    shares = frame.pivot_table(
        index=["configuration", "panel"], columns="part", values="joules", observed=True
    )
    names = {"directions": "directions (predicted)"}
    present = [part for part in colours if part in set(frame["part"])]
    frame["part"] = pd.Categorical(
        [names.get(part, part) for part in frame["part"]], [names.get(part, part) for part in present][::-1]
    )
    frame["configuration"] = pd.Categorical(frame["configuration"], labels[::-1])
    plot = (
        p9.ggplot(frame, p9.aes("configuration", "joules", fill="part"))
        + p9.geom_col(width=0.7)
        + p9.coord_flip()
        + p9.facet_wrap("panel", ncol=2)
        + p9.scale_fill_manual({names.get(part, part): colours[part] for part in present})
        + p9.scale_y_continuous(expand=(0, 0, 0.42, 0))
        + p9.labs(x="", y=f"joules per sample, {canvas.word}")
        + p9.guides(fill=p9.guide_legend(nrow=2, reverse=True))
    )
    says = ["phases are apportioned by the energy model; idle is gross less net"]
    if "directions" in shares:
        told = _direction_shares(shares, labels)
        plot += p9.geom_text(
            p9.aes("configuration", "joules", label="text"),
            data=told,
            inherit_aes=False,
            ha="left",
            nudge_y=float(told["joules"].max()) * 0.02,
            size=BASE_SIZE - 3,
            color=canvas.ink.text,
        )
        says.append("number at a bar: share of the adapters' directions, predicted from the energy table")
    says += [f"left out: {reason}" for reason in lacking]
    plot += canvas.look("Where the joules go", f"{canvas.metered}; {says[0]}", *says[1:])
    return Figure(plot, 2.5 + 0.2 * len(labels))


def _direction_shares(shares: pd.DataFrame, labels: list[str]) -> pd.DataFrame:
    """Where and how the directions' share stands beside a bar by cause."""
    whole = shares.sum(axis=1)
    percent = 100 * shares["directions"] / whole
    told = pd.DataFrame({"joules": whole, "percent": percent}).reset_index()
    told = told[told["percent"] > 0]
    told["text"] = np.where(told["percent"] >= 0.01, [f"{one:.2g} %" for one in told["percent"]], "< 0.01 %")
    return told.assign(configuration=pd.Categorical(told["configuration"], labels[::-1]))
