"""What every figure of a comparison is drawn with: data, theme, and the marks of the configurations."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import duckdb
import pandas as pd
import plotnine

from hestctl.compare import frames
from hestctl.compare.configurations import configurations
from hestctl.compare.labels import apart, width_in
from hestctl.compare.look import check_theme, look
from hestctl.compare.results import PRIMARY, Comparison
from hestctl.compare.style import INKS, SMALL, WIDTH_IN, Theme, marks
from hestctl.compare.text import number

p9: Any = plotnine  # typed only in part: under strict mypy its own functions count as untyped

MOST_PANELS = 12
"""Configurations that a figure of panels shows at most."""
MOST_ROWS = 30
"""Configurations that a figure with a row, or a line, for each shows at most."""
COLUMNS = 3
_STRIP = 24
"""Letters of a panel's title in a line."""


class Canvas:
    """A comparison in one theme. Raises HestError (usage) for a theme that there is not."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, comparison: Comparison, theme: Theme) -> None:
        self.connection = connection
        self.comparison = comparison
        self.theme = check_theme(theme)
        self.ink = INKS[theme]
        self.marks = marks(comparison.rows)
        facts = comparison.facts
        self.setting = f"{facts['backbone'].rsplit('/', 1)[-1]} on {facts['dataset']}"
        self.word = comparison.energy_word
        self.metered = f"{comparison.energy_word} (meter: {facts['meter']})"

    def look(self, title: str, *says: str) -> list[Any]:
        """Title, what is compared, and what else is to be said of a figure."""
        return look(self.ink, title, (self.setting, *filter(None, says)))

    def marked(self, frame: pd.DataFrame) -> pd.DataFrame:
        """``frame`` with ``colour``, ``shape`` and ``line`` of its configurations, for identity scales."""
        found = [self.marks[label] for label in frame["configuration"]]
        return frame.assign(
            colour=[mark.colour for mark in found],
            shape=[mark.shape for mark in found],
            line=[mark.line for mark in found],
        )

    def chosen(self, frame: pd.DataFrame, most: int = MOST_PANELS) -> tuple[pd.DataFrame, str]:
        """The rows of at most ``most`` configurations, and which are left out and why.

        The best of each side stay, then the one of each kind that spends the fewest joules, then what does.
        """
        every = configurations(self.comparison.rows)
        present = set(frame["configuration"])
        labels = [one.label for one in every if one.label in present]
        if len(labels) <= most:
            return frame, ""
        found = self.comparison
        bests = (found.best_proposed, found.best_baseline, found.best_control)
        spent = {one.label: one.measure(PRIMARY).value or math.inf for one in every}
        cheapest = {self.marks[label]: label for label in sorted(labels, key=spent.__getitem__, reverse=True)}
        first = [*(best.label for best in bests if best), *cheapest.values()]
        kept = set(sorted(labels, key=lambda label: (label not in first, spent[label]))[:most])
        left = [label for label in labels if label not in kept]
        says = (
            f"{most} of {len(labels)} configurations fit: the best, one of each kind, then those with the "
            f"fewest joules; not shown: {', '.join(left)}"
        )
        part = frame[frame["configuration"].isin(kept)]
        return part.assign(configuration=frames.ordered(part["configuration"], found)), says

    def panels(self, frame: pd.DataFrame, order: Sequence[str]) -> pd.DataFrame:
        """``frame`` with ``panel``, the wrapped titles of panels for the configurations in ``order``."""
        titles = {label: textwrap.fill(label, _STRIP) for label in order}
        named = [titles[label] for label in frame["configuration"]]
        return frame.assign(panel=pd.Categorical(named, [titles[label] for label in order]))

    def facets(self, count: int, **options: Any) -> list[Any]:
        """Panels by ``panel``, three in a row, and their small type."""
        return [
            p9.facet_wrap("panel", ncol=min(count, COLUMNS), **options),
            p9.theme(
                axis_text=p9.element_text(size=SMALL, color=self.ink.text),
                strip_text=p9.element_text(size=SMALL, color=self.ink.text, ha="left", va="bottom"),
                panel_spacing_x=0.045,
            ),
        ]

    def named_lines(self, ends: pd.DataFrame, gap: float, limits: tuple[float, float]) -> list[Any]:
        """Names at the right ends of lines, ``gap`` apart, each with a line to its own end.

        ``ends`` has ``step``, ``value`` and ``configuration``, of one panel; names stay between ``limits``.
        """
        span = float(ends["step"].max()) or 1.0
        told = ends.assign(
            at=apart(ends["value"].tolist(), gap, limits), start=ends["step"] + 0.01 * span, name=1.09 * span
        )
        return [
            p9.geom_segment(
                p9.aes(x="start", y="value", xend="name", yend="at"), data=told, size=0.3,
                color=self.ink.muted, inherit_aes=False,
            ),
            p9.geom_text(
                p9.aes("name", "at", label="configuration"), data=told, ha="left", nudge_x=0.01 * span,
                size=SMALL, color=self.ink.text, inherit_aes=False,
            ),
        ]  # fmt: skip


def names_room(labels: Iterable[str]) -> float:
    """How much wider than its lines a panel must be, as a share of them, for ``named_lines``."""
    widest_in = max(width_in(label, SMALL) for label in labels) + 0.1
    return 0.1 + 1.1 * widest_in / (WIDTH_IN - 0.8 - widest_in)


def rows_of(count: int) -> int:
    """Rows of panels."""
    return -(-count // COLUMNS)


def labels_of(frame: pd.DataFrame) -> list[str]:
    """The configurations of a frame in the order of print."""
    return [str(label) for label in frame["configuration"].cat.categories]


def extremes(frame: pd.DataFrame, column: str, unit: str) -> str:
    """Such as ``hest 0.45 2.92 J to tabs 6.17 J``: the least and the largest of ``column``."""
    known = frame.dropna(subset=[column]).reset_index(drop=True)
    if known.empty:
        return "none"
    ends = [known.iloc[int(place)] for place in (known[column].argmin(), known[column].argmax())]
    told = [f"{end['configuration']} {number(float(end[column]))} {unit}".rstrip() for end in ends]
    if len(known) > 1 and known[column].nunique() == 1:
        return f"all {number(float(known[column].iloc[0]))} {unit}".rstrip()
    return told[0] if told[0] == told[1] else " to ".join(told)


def listed(names: Sequence[str]) -> str:
    """Such as ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
