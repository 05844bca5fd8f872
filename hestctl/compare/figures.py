"""The figures of a comparison, drawn with plotnine.

Every figure says in its subtitle whether its joules are measured, estimated or predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import plotnine

from hestctl.compare import frames
from hestctl.compare.look import Drawn, Figure, check_theme, look, whole, write
from hestctl.compare.results import Comparison, Row
from hestctl.compare.statistics import TAIL_MINIMUM
from hestctl.compare.style import BASE_SIZE, DPI, INKS, WIDTH_IN, Theme, joule_unit, marks, thousands
from hestctl.compare.text import number

p9: Any = plotnine  # typed only in part: under strict mypy its own functions count as untyped
_MANY = 60
"""From here on single samples are drawn as faint points, else as solid ones."""
_POINTS = 600
"""At most so many points a run where boxes tell the rest."""


def draw(
    connection: duckdb.DuckDBPyConnection,
    comparison: Comparison,
    out_dir: Path,
    *,
    theme: Theme = "light",
    formats: Sequence[str] = ("png",),
    dpi: int = DPI,
    only: Callable[[str], bool] | None = None,
) -> Drawn:
    """Write every figure that has data to ``out_dir`` and return the files; ``only`` chooses topics.

    Files are ``comparison_{topic}.png`` over all runs and ``{run_id}_{topic}.png`` for one. The
    returned list has ``reasons``: the topics that drew nothing, and why.
    """
    painter = _Painter(connection, comparison, check_theme(theme))
    topics = [(name, paint) for name, paint in painter.topics() if only is None or only(name)]
    return write(topics, out_dir, formats=formats, dpi=dpi)


class _Painter:
    """Builds the figures of one comparison in one theme."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, comparison: Comparison, theme: Theme) -> None:
        self.connection = connection
        self.comparison = comparison
        self.ink = INKS[theme]
        self.marks = marks(comparison.rows)
        self.labels = [row.label for row in comparison.rows]
        facts = comparison.facts
        self.setting = f"{facts['backbone'].rsplit('/', 1)[-1]} on {facts['dataset']}"
        self.word = comparison.energy_word
        self.metered = f"{comparison.energy_word} (meter: {facts['meter']})"

    def topics(self) -> list[tuple[str, Callable[[], Figure]]]:
        """File name without suffix, and what draws it."""
        named: list[tuple[str, Callable[[], Figure]]] = [
            ("comparison_energy", self.energy),
            ("comparison_energy_distribution", self.energy_distribution),
            ("comparison_latency", self.latency),
            ("comparison_quality_energy", self.quality_energy),
            ("comparison_budget", self.budget),
            ("comparison_length", self.length),
        ]
        for row in self.comparison.rows:
            named.append((f"{row.run_id}_learning", partial(self.learning, row)))
            named.append((f"{row.run_id}_utilisation", partial(self.utilisation, row)))
            if self.comparison.task == "classification":
                named.append((f"{row.run_id}_confusion", partial(self.confusion, row)))
        return named

    def energy(self) -> Figure:
        """Joules per sample with 95 % intervals and value labels."""
        frame = frames.energy(self.comparison)
        frame["run"] = self._ordered(frame["run"], down=True)
        plot = (
            p9.ggplot(frame, p9.aes("run", "joules", fill="run"))
            + p9.geom_col(width=0.68, show_legend=False)
            + p9.geom_errorbar(p9.aes(ymin="low", ymax="high"), width=0.22, size=0.5, color=self.ink.text)
            + p9.geom_text(
                p9.aes(y="high", label="text"),
                ha="left",
                nudge_y=float(frame["high"].max()) * 0.015,
                size=BASE_SIZE - 1,
                color=self.ink.text,
            )
            + p9.coord_flip()
            + p9.scale_y_continuous(expand=(0, 0, 0.14, 0))
            + p9.labs(x="", y=f"joules per sample, {self.word}")
            + self._scales(points=False)
            + self._look("Joules per sample", f"{self.metered}; mean with 95 % interval")
        )
        return Figure(plot, 1.5 + 0.32 * len(frame))

    def energy_distribution(self) -> Figure:
        """The spread of joules over samples."""
        frame = frames.joules(self.connection, self.comparison)
        return self._spread(
            frame, f"joules per sample, {self.word}", "Joules over the samples", self.metered, tail=False
        )

    def latency(self) -> Figure:
        """The spread of latency over samples, with p99 where there are enough of them."""
        frame = frames.latency(self.connection, self.comparison)
        says = "measured wall time of each sample's batch"
        return self._spread(frame, "seconds, measured", "Latency over the samples", says, tail=True)

    def quality_energy(self) -> Figure:
        """Quality against joules, both with intervals: up and to the left is better."""
        frame = frames.quality_energy(self.comparison)
        frame["run"] = self._ordered(frame["run"])
        title = "accuracy, %" if self.comparison.task == "classification" else "ROUGE-Lsum, points"
        plot = (
            p9.ggplot(frame, p9.aes("x", "y", color="run", shape="run", fill="run"))
            + p9.geom_segment(p9.aes(x="x_low", xend="x_high", yend="y"), size=0.6, show_legend=False)
            + p9.geom_linerange(p9.aes(ymin="y_low", ymax="y_high"), size=0.6, show_legend=False)
            + p9.geom_point(size=2.8, stroke=0.3)
            + p9.labs(x=f"joules per sample, {self.word}", y=title)
            + self._scales()
        )
        legend, legend_in = self._legend(frame)
        says = f"joules {self.metered}; bars: 95 % intervals"
        chance = self.comparison.rows[0].measure("chance_percent").value
        if chance is not None:
            plot += p9.geom_hline(yintercept=chance, linetype="dashed", color=self.ink.muted)
            says += "; dashed: chance level"
        plot += self._look("Quality against joules", says)
        return Figure(plot + legend, 3.4 + legend_in)

    def learning(self, row: Row) -> Figure:
        """Loss, expected energy over E_max, and the multiplier over the optimiser steps."""
        frame = frames.learning(self.connection, row)
        panels = list(frame["panel"].cat.categories)
        energy = [panel for panel in panels if "E_max" in panel]
        lines, points = frame[frame["split"] == "train"], frame[frame["split"] == "validation"]
        plot = p9.ggplot(frame, p9.aes("step", "value"))
        if energy:
            limit = pd.DataFrame({"panel": pd.Categorical(energy, panels), "one": [1.0]})
            line = p9.aes(yintercept="one")
            plot += p9.geom_hline(line, data=limit, linetype="dashed", color=self.ink.muted)
        colour = self.marks[row.label].colour
        if len(lines) > len(panels):
            plot += p9.geom_line(p9.aes(group="panel"), data=lines, color=colour, size=0.6)
        if len(lines) <= 12 * len(panels):
            plot += p9.geom_point(data=lines, color=colour, size=1)
        plot += p9.geom_point(data=points, shape="D", size=1.8, fill=self.ink.paper, color=self.ink.text)
        says = ["line: training"] if len(lines) else []
        says += ["diamonds: validation"] if len(points) else []
        says += ["joules are predicted; dashed: E_max"] if energy else []
        plot += p9.facet_wrap("panel", ncol=1, scales="free_y")
        plot += p9.scale_x_continuous(breaks=whole, labels=thousands)
        plot += p9.labs(x="optimiser step", y="")
        plot += self._look(f"Training of {row.label}", "; ".join(says))
        return Figure(plot, 1.4 + 1.25 * len(panels))

    def utilisation(self, row: Row) -> Figure:
        """Share of each state by depth."""
        frame = frames.utilisation(self.connection, row)
        frame["text"] = [f"{share:.0f}" for share in frame["share"]]
        frame["over"] = np.where(frame["share"] > 55, "dark tile", "light tile")
        layers = int(frame["layer"].max()) + 1
        plot = (
            p9.ggplot(frame, p9.aes("state", "layer", fill="share"))
            + p9.geom_tile(color=self.ink.paper, size=0.4)
            + p9.geom_text(p9.aes(label="text", color="over"), size=BASE_SIZE - 2.5)
            + p9.scale_color_manual({"dark tile": self.ink.paper, "light tile": self.ink.text})
            + p9.scale_fill_gradient(self.ink.low, self.ink.high, limits=(0, 100))
            + p9.scale_y_reverse(breaks=list(range(0, layers, 5 if layers > 12 else 1)), expand=(0, 0.1))
            + p9.scale_x_discrete(expand=(0, 0))
            + p9.labs(x="state of a direction for a token", y="decoder layer (input at the top)")
            + self._look(f"States by depth, {row.label}", "percent of direction-tokens in test generation")
            + p9.theme(panel_grid=p9.element_blank(), legend_position="none")
        )
        return Figure(plot, max(2.8, 1.5 + 0.16 * layers), 4.0)

    def budget(self) -> Figure:
        """Scope joules by sequence length against E_max."""
        frame = frames.budget(self.connection, self.comparison)
        limits = frames.limits(frame)
        frame["run"] = self._ordered(frame["run"])
        scopes = frame["scope"].nunique()
        crowded = len(frame) > _MANY * frame["run"].nunique()
        factor, unit = joule_unit(float(frame["joules"].max()))
        frame["joules"] *= factor
        plot = p9.ggplot(frame, p9.aes("tokens", "joules", color="run", shape="run", fill="run"))
        plot += p9.geom_point(size=1.3, alpha=0.35 if crowded else 0.85, stroke=0.2)
        if not limits.empty:
            limits["run"] = self._ordered(limits["run"])
            limits["joules"] *= factor
            plot += p9.geom_line(p9.aes(linetype="run"), data=limits, size=0.9, show_legend=False)
        if scopes > 1:
            plot += p9.facet_wrap("scope", ncol=1, scales="free_y")
        lines = "lines: E_max of the run" if not limits.empty else "no run has an E_max"
        plot += p9.scale_x_continuous(labels=thousands)
        plot += p9.labs(x="prompt and new tokens", y=f"scope {unit} per sample, predicted")
        plot += self._scales(lines=not limits.empty)
        plot += self._look("Scope joules by length", f"predicted from the energy table; {lines}")
        legend, legend_in = self._legend(frame)
        return Figure(plot + legend, (3.6 if scopes == 1 else 5.1) + legend_in)

    def length(self) -> Figure:
        """Whole joules of generation by sequence length, from profile runs."""
        frame = frames.length(self.connection, self.comparison)
        frame["run"] = self._ordered(frame["run"])
        means = frame.groupby(["run", "batch", "tokens"], observed=True, as_index=False)["joules"].mean()
        batches = frame["batch"].nunique()
        plot = (
            p9.ggplot(frame, p9.aes("tokens", "joules", color="run", shape="run", fill="run"))
            + p9.geom_point(size=1.8, alpha=0.7, stroke=0.2)
            + p9.geom_line(p9.aes(linetype="run"), data=means, size=0.6)
            + p9.scale_x_continuous(labels=thousands)
            + p9.labs(x="prompt and new tokens", y=f"joules per sample, {self.word}")
            + self._scales(lines=True)
            + self._look("Joules by length", f"{self.metered}, profile runs; lines join means")
        )
        if batches > 1:
            plot += p9.facet_wrap("batch", ncol=1, scales="free_y")
        legend, legend_in = self._legend(frame, lines=True)
        return Figure(plot + legend, (3.4 if batches == 1 else 1.2 + 1.9 * batches) + legend_in)

    def confusion(self, row: Row) -> Figure:
        """Counts of true against answered labels."""
        frame = frames.confusion(self.connection, row, self.comparison.facts["split"])
        frame["over"] = np.where(frame["count"] > 0.55 * frame["count"].max(), "dark tile", "light tile")
        classes = frame["truth"].nunique()
        plot = (
            p9.ggplot(frame, p9.aes("answer", "truth", fill="count"))
            + p9.geom_tile(color=self.ink.paper, size=0.6)
            + p9.geom_text(p9.aes(label="count", color="over"), size=BASE_SIZE - 1)
            + p9.scale_color_manual({"dark tile": self.ink.paper, "light tile": self.ink.text})
            + p9.scale_fill_gradient(self.ink.low, self.ink.high, limits=(0, None))
            + p9.labs(x="answered", y="true label")
            + self._look(
                f"Labels, {row.label}",
                f"{row.samples} samples of the {self.comparison.facts['split']} split, counts",
            )
            + p9.theme(panel_grid=p9.element_blank(), legend_position="none")
        )
        return Figure(plot, 1.6 + 0.36 * max(classes, 3))

    def _spread(self, frame: pd.DataFrame, axis: str, title: str, says: str, *, tail: bool) -> Figure:
        """Boxes with their samples; ``tail`` adds the 99th percentile."""
        groups = frame.groupby("run")["value"]
        frame["run"] = self._ordered(frame["run"], down=True)
        crowded = int(groups.size().max()) > _MANY
        # All of a full test split would be one blot; boxes and p99 are of every sample all the same.
        order = frame.sample(frac=1.0, random_state=1)
        points = order[order.groupby("run", observed=True).cumcount() < _POINTS]
        plot = (
            p9.ggplot(frame, p9.aes("run", "value"))
            + p9.geom_jitter(
                p9.aes(color="run", shape="run", fill="run"),
                data=points,
                width=0.22,
                height=0,
                random_state=1,
                size=0.9 if crowded else 1.8,
                alpha=0.25 if crowded else 0.8,
                stroke=0.1,
                show_legend=False,
            )
            + p9.geom_boxplot(
                fill="none", color=self.ink.text, width=0.55, size=0.45, outlier_shape="", show_legend=False
            )
            + p9.coord_flip()
        )
        says += "; box: quartiles, line: median"
        says += f"; points: {_POINTS} by chance" if len(points) < len(frame) else ""
        if tail:
            counts = groups.size()
            held = counts[counts >= TAIL_MINIMUM].index
            tails = groups.quantile(0.99).loc[held].reset_index()
            if len(tails):
                tails["run"] = self._ordered(tails["run"], down=True)
                tails["text"] = [number(float(value)) for value in tails["value"]]
                plot += p9.geom_point(
                    data=tails, shape="|", size=7, stroke=1.2, color=self.ink.text, show_legend=False
                )
                plot += p9.geom_text(
                    p9.aes(label="text"), data=tails, va="bottom", nudge_x=0.28, size=BASE_SIZE - 2.5,
                    color=self.ink.text,
                )  # fmt: skip
            says += "; long bar: p99" if len(tails) else f"; p99 needs {TAIL_MINIMUM} samples"
        plot += p9.scale_y_continuous(limits=(0, None), expand=(0, 0, 0.06, 0))
        plot += p9.labs(x="", y=axis)
        plot += self._scales()
        plot += self._look(title, says)
        return Figure(plot, 1.6 + 0.42 * frame["run"].nunique())

    def _ordered(self, runs: pd.Series[Any], *, down: bool = False) -> pd.Categorical:
        """Labels in the order of the table; ``down`` for an axis that is drawn upwards."""
        present = set(runs)
        order = [label for label in self.labels if label in present]
        return pd.Categorical(runs, order[::-1] if down else order)

    def _scales(self, *, points: bool = True, lines: bool = False) -> list[Any]:
        """The marks of the runs; a scale whose aesthetic is not mapped would warn."""
        colours = {label: mark.colour for label, mark in self.marks.items()}
        scales = [p9.scale_fill_manual(colours)]
        if points:
            shapes = {label: mark.shape for label, mark in self.marks.items()}
            scales += [p9.scale_color_manual(colours), p9.scale_shape_manual(shapes)]
        if lines:
            scales.append(p9.scale_linetype_manual({label: mark.line for label, mark in self.marks.items()}))
        return scales

    def _legend(self, frame: pd.DataFrame, *, lines: bool = False) -> tuple[Any, float]:
        """A legend of as many columns as the width holds, and the height it takes in inches."""
        present = [label for label in self.labels if label in set(frame["run"])]
        widths = [0.34 + 0.07 * len(label) for label in present]
        columns = len(present) if sum(widths) < WIDTH_IN else max(1, int(WIDTH_IN / max(widths)))
        mapped = ("shape", "fill", "linetype") if lines else ("shape", "fill")
        guides = {name: p9.guide_legend(ncol=columns) for name in mapped}
        # The keys of faint or small points are drawn solid, on one guide only: they all merge.
        solid = {"alpha": 1} if lines else {"alpha": 1, "size": 2.4}
        guides["color"] = p9.guide_legend(ncol=columns, override_aes=solid)
        return p9.guides(**guides), 0.3 + 0.19 * -(-len(present) // columns)

    def _look(self, title: str, says: str) -> list[Any]:
        return look(self.ink, title, (self.setting, says))
