"""Joules beside quality, the front of quality against joules, and where the joules go."""

from __future__ import annotations

import textwrap
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import plotnine
from matplotlib.ticker import MaxNLocator

from hestctl.compare import frames
from hestctl.compare.canvas import Canvas, extremes, labels_of, listed
from hestctl.compare.configurations import configurations
from hestctl.compare.labels import Box, place, width_in
from hestctl.compare.look import Figure, Words
from hestctl.compare.results import METRICS
from hestctl.compare.style import PARTS, SMALL, WIDTH_IN
from hestctl.compare.text import number

p9: Any = plotnine
_PANEL_TITLE = 24
"""Letters of a panel's title in a line."""
_PANEL_IN = 1.6
"""How wide the panel of quality is, about."""
_VERDICTS = {"inconclusive": "undecided"}


def energy(canvas: Canvas) -> Figure:
    """Joules per sample beside the quality they buy: the not inferior first, the others in grey."""
    comparison = canvas.comparison
    frame = canvas.marked(frames.energy(comparison))
    best, margin = comparison.best_baseline, comparison.margin_points
    equal = frame["verdict"] == "not inferior"
    frame["colour"] = frame["colour"].where(equal, canvas.ink.muted)
    frame["fill"] = frame["colour"].where(equal, canvas.ink.paper)
    frame["configuration"] = pd.Categorical(frame["configuration"], frame["configuration"][::-1])
    titles = [f"{canvas.word} joules per sample"]
    if frame["points"].notna().any() and best is not None:
        titles.append(f"{_score(canvas)} less that of {best.label}, points")
    titles = [textwrap.fill(title, _PANEL_TITLE) for title in titles]
    spent = frame.assign(value=frame["joules"])
    score = frame.assign(value=frame["points"], low=frame["points_low"], high=frame["points_high"])
    panels = [part.assign(panel=title) for part, title in zip((spent, score), titles, strict=False)]
    long = pd.concat(panels)
    reach = float(frame["high"].max())
    texts = spent.assign(text=[number(joules) for joules in spent["joules"]], side="left", panel=titles[0])
    texts["value"] = texts["high"] + 0.05 * reach
    room = [(titles[0], 0.0), (titles[0], 1.3 * reach)]
    if len(panels) == 2:
        words, ends = _words(score, margin)
        texts = pd.concat([texts, words.assign(panel=titles[1])])
        room += [(titles[1], end) for end in ends]
    blank = pd.DataFrame(room, columns=["panel", "value"]).assign(
        configuration=frame["configuration"].iloc[0]
    )
    for part in (long, texts, blank):
        part["panel"] = pd.Categorical(part["panel"], titles)
    plot = (
        p9.ggplot(long.dropna(subset=["value"]), p9.aes("value", "configuration"))
        + p9.geom_blank(data=blank)
        + _zero(canvas, titles, margin)
        + p9.geom_hline(yintercept=_borders(frame), color=canvas.ink.muted, size=0.3)
        + p9.geom_segment(p9.aes(x="low", xend="high", yend="configuration", color="colour"), size=0.7)
        + p9.geom_point(p9.aes(color="colour", fill="fill", shape="shape"), size=2.6, stroke=0.6)
        + [
            p9.geom_text(p9.aes(label="text"), data=part, ha=str(side), size=SMALL, color=canvas.ink.text)
            for side, part in texts.groupby("side")
        ]
        + p9.facet_wrap("panel", ncol=2, scales="free_x")
        + p9.scale_color_identity()
        + p9.scale_fill_identity()
        + p9.scale_shape_identity()
        + p9.labs(x="", y="")
        + canvas.look(
            "Joules at equal quality",
            f"{canvas.metered}; means with {_intervals(canvas)}",
            f"filled: shown not inferior to {best.label} within {_points(margin)} (dotted); grey: not shown"
            if best
            else "all grey: there is no baseline to be equal to",
        )
        + _strips(canvas)
    )
    shown = [str(label) for label in frame.loc[equal, "configuration"]]
    alt = f"Mean joules per sample, {canvas.word}: {extremes(frame, 'joules', 'J')}."
    if len(titles) == 2 and best is not None:
        differences = extremes(frame, "points", "points")
        alt += f" {_score(canvas)} less that of {best.label}: {differences}."
        alt += f" Shown not inferior: {listed(shown)}."
    return Figure(plot, 1.75 + 0.19 * len(frame), Words(alt))


def _words(score: pd.DataFrame, margin: float) -> tuple[pd.DataFrame, tuple[float, float]]:
    """The verdicts beside the first row that has them, where there is room, and the ends of their axis."""
    known = score.dropna(subset=["value"])
    left, right = min(-margin, float(known["low"].min())), max(margin, float(known["high"].max()))
    span = right - left
    found = []
    # A verdict stands once, so that its rows are seen as a group.
    for _, row in known.drop_duplicates("verdict").iterrows():
        text = _VERDICTS.get(row["verdict"], row["verdict"])
        wide = span * (width_in(text, SMALL) + 0.15) / _PANEL_IN
        if row["low"] - wide >= left:
            found.append((row["configuration"], row["low"] - 0.06 * span, text, "right"))
        else:
            found.append((row["configuration"], row["high"] + 0.06 * span, text, "left"))
            right = max(right, row["high"] + wide)
    words = pd.DataFrame(found, columns=["configuration", "value", "text", "side"])
    words["configuration"] = pd.Categorical(words["configuration"], score["configuration"].cat.categories)
    return words, (left, right)


def _score(canvas: Canvas) -> str:
    return METRICS[canvas.comparison.quality_metric].title


def _points(margin: float) -> str:
    return f"{margin:g} point{'' if margin == 1 else 's'}"


def _borders(frame: pd.DataFrame) -> list[float]:
    """Where one verdict ends and the next begins, in rows from the bottom."""
    counts = frame["verdict"].value_counts(sort=False)[::-1].cumsum()
    return [float(count) + 0.5 for count in counts.unique() if 0 < count < len(frame)]


def _zero(canvas: Canvas, titles: list[str], margin: float) -> list[Any]:
    """Lines of no difference and of the margin, in the panel of differences alone."""
    if len(titles) < 2:
        return []
    lines = pd.DataFrame({"panel": pd.Categorical([titles[1]] * 2, titles), "at": [0.0, -margin]})
    return [
        p9.geom_vline(p9.aes(xintercept="at"), data=lines[:1], color=canvas.ink.muted, size=0.4),
        p9.geom_vline(
            p9.aes(xintercept="at"), data=lines[1:], color=canvas.ink.text, size=0.5, linetype="dotted"
        ),
    ]


def _strips(canvas: Canvas) -> Any:
    return p9.theme(
        strip_text=p9.element_text(size=SMALL + 0.5, color=canvas.ink.text, ha="left"),
        axis_text=p9.element_text(size=SMALL, color=canvas.ink.text),
        panel_spacing_x=0.03,
    )


def front(canvas: Canvas) -> Figure:
    """Quality against joules, configurations with their seeds: up and to the left is better."""
    comparison = canvas.comparison
    frame = canvas.marked(frames.front(comparison))
    near = frame[~frame["far"]]
    seeds = canvas.marked(frames.front_seeds(comparison))
    seeds = seeds[seeds["configuration"].isin(near["configuration"])]
    best = near[near["best"]].sort_values("x")
    chance = comparison.rows[0].measure("chance_percent").value
    level = pd.DataFrame({"y": [] if chance is None else [chance]}, dtype=float)
    marks = pd.concat([near, seeds, level])
    x, y = _ends(pd.concat([frame, seeds]), "x"), _ends(marks, "y")
    told = frame["configuration"].astype(str)
    foot = y[0]
    if frame["far"].any():
        # Below a line, in the order of their scores but not to scale: they would press the others together.
        rank = frame.loc[frame["far"], "y"].rank(method="first", ascending=False)
        step = 0.07 * (y[1] - foot)
        told[frame["far"]] += [f": {number(score)} points" for score in frame.loc[frame["far"], "y"]]
        frame.loc[frame["far"], "y"] = foot - step * rank
        y = (foot - step * (len(rank) + 0.7), y[1])
        frame["y_low"] = frame["y_low"].where(~frame["far"], frame["y"])
        frame["y_high"] = frame["y_high"].where(~frame["far"], frame["y"])
    level_bars = frame[["x_low", "y", "x_high", "y"]].to_numpy().tolist()
    upright_bars = frame[["x", "y_low", "x", "y_high"]].to_numpy().tolist()
    height_in = 3.9 + 0.09 * len(frame)
    spots = place(
        list(zip(frame["x"].tolist(), frame["y"].tolist(), strict=True)),
        told.tolist(),
        bars=[*map(Box._make, level_bars), *map(Box._make, upright_bars), *_steps(best)],
        size_in=(WIDTH_IN - 0.75, height_in - 1.5),
        x=x,
        y=y,
        points_of_type=SMALL,
    )
    frame[["label_x", "label_y", "line_x", "line_y"]] = spots
    frame["label"] = told
    plot = p9.ggplot(frame, p9.aes("x", "y"))
    if len(best) > 1:
        plot += p9.geom_step(data=best, direction="hv", size=0.6, linetype="dashed", color=canvas.ink.muted)
    if len(seeds):
        plot += p9.geom_point(p9.aes(color="colour", shape="shape"), data=seeds, size=0.9, alpha=0.45)
    if frame["far"].any():
        plot += p9.geom_hline(yintercept=foot, color=canvas.ink.text, size=0.5)
    plot += [
        p9.geom_segment(p9.aes(xend="line_x", yend="line_y"), size=0.35, color=canvas.ink.text),
        p9.geom_segment(p9.aes(x="x_low", xend="x_high", yend="y", color="colour"), size=0.4, alpha=0.6),
        p9.geom_segment(p9.aes(y="y_low", yend="y_high", xend="x", color="colour"), size=0.4, alpha=0.6),
        p9.geom_text(p9.aes("label_x", "label_y", label="label"), size=SMALL, color=canvas.ink.text),
        p9.geom_point(p9.aes(color="colour", fill="colour", shape="shape"), size=2.4, stroke=0.3),
        p9.scale_color_identity(),
        p9.scale_fill_identity(),
        p9.scale_shape_identity(),
        p9.scale_x_continuous(limits=x, expand=(0, 0)),
        p9.scale_y_continuous(limits=y, expand=(0, 0), breaks=_above(foot, y[1])),
        p9.labs(
            x=f"joules per sample, {canvas.word}",
            y="accuracy, %" if comparison.task == "classification" else "ROUGE-Lsum, points",
        ),
    ]
    says = f"{'small: seeds; ' if len(seeds) else ''}bars: {_intervals(canvas)}"
    says += "; dashed line: no other has fewer joules and a higher score" if len(best) > 1 else ""
    if chance is not None:
        plot += p9.geom_hline(yintercept=chance, linetype="dotted", color=canvas.ink.muted)
        says += "; dotted: chance level"
    below = ""
    if frame["far"].any():
        lost = _points(frames.FAR_MARGINS * comparison.margin_points)
        below = f"below the level line, not to scale: shown to lose more than {lost}"
    plot += canvas.look("Quality against joules", f"joules {canvas.metered}", says, below)
    alt = (
        f"Joules per sample, {canvas.word}: {extremes(frame, 'x', 'J')}. {_score(canvas)}: "
        f"{extremes(near, 'y', '')}. No other has fewer joules and a higher score than "
        f"{listed(best['configuration'].astype(str).tolist())}."
    )
    return Figure(plot, height_in, Words(alt))


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


def _above(foot: float, top: float) -> list[float]:
    """Breaks of an axis from its foot on: what lies below is not to scale."""
    return [float(tick) for tick in MaxNLocator(nbins=6).tick_values(foot, top) if foot <= tick <= top]


def parts(canvas: Canvas) -> Figure:
    """Mean joules per sample by phase and, where the idle draw is known, by cause."""
    frame, lacking = frames.parts(canvas.connection, canvas.comparison)
    labels = labels_of(frame)
    colours = PARTS[canvas.theme]
    shares = frame.pivot_table(
        index=["configuration", "panel"], columns="part", values="joules", observed=True
    )
    present_panels = [panel for panel in frame["panel"].cat.categories if panel in set(frame["panel"])]
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
        + p9.scale_fill_manual({names.get(part, part): colours[part] for part in present})
        + p9.scale_y_continuous(expand=(0, 0, 0.42 if "directions" in shares else 0.05, 0))
        + p9.labs(x="", y=f"joules per sample, {canvas.word}")
        + p9.guides(fill=p9.guide_legend(nrow=1 if len(present) < 3 else 2, reverse=True))
    )
    says = []
    if "by phase" in present_panels:
        says.append("phases are apportioned by the energy model, not metered apart")
    if "by cause" in present_panels:
        says.append("idle is gross less net")
    if len(present_panels) > 1:
        plot += p9.facet_wrap("panel", ncol=2)
    if "directions" in shares:
        told = _direction_shares(shares, labels)
        plot += p9.geom_text(
            p9.aes("configuration", "joules", label="text"),
            data=told,
            inherit_aes=False,
            ha="left",
            nudge_y=float(told["joules"].max()) * 0.02,
            size=SMALL,
            color=canvas.ink.text,
        )
        says.append("number at a bar: share of the adapters' directions, predicted from the energy table")
    left = [f"left out: {reason}" for reason in lacking]
    plot += canvas.look("Where the joules go", f"{canvas.metered}; {'; '.join(says)}", *left)
    ordered = frame.groupby(["panel", "configuration", "part"], observed=True)["joules"].sum().reset_index()
    ends = [
        f"{part}: {extremes(some, 'joules', 'J')}" for part, some in ordered.groupby("part", observed=True)
    ]
    alt = f"Mean joules per sample, {canvas.word}, {listed(present_panels)}. {'; '.join(ends[::-1])}."
    more = f"The bars are {listed(present_panels)}."
    if "by cause" not in present_panels:
        more += " By cause (idle, directions, the rest) nothing can be drawn: the idle draw is not known."
    return Figure(plot, (2.1 if len(present) < 3 else 2.5) + 0.19 * len(labels), Words(alt, more))


def _direction_shares(shares: pd.DataFrame, labels: list[str]) -> pd.DataFrame:
    """Where and how the directions' share stands beside a bar by cause."""
    whole = shares.sum(axis=1)
    percent = 100 * shares["directions"] / whole
    told = pd.DataFrame({"joules": whole, "percent": percent}).reset_index()
    told = told[told["percent"] > 0]
    told["text"] = np.where(told["percent"] >= 0.01, [f"{one:.2g} %" for one in told["percent"]], "< 0.01 %")
    return told.assign(configuration=pd.Categorical(told["configuration"], labels[::-1]))
