"""What every figure of a comparison is drawn with: data, theme, and the marks of the configurations."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import duckdb
import pandas as pd
import plotnine

from hestctl.compare import frames
from hestctl.compare.configurations import configurations
from hestctl.compare.look import check_theme, look
from hestctl.compare.results import PRIMARY, Comparison
from hestctl.compare.style import BASE_SIZE, INKS, Theme, marks

p9: Any = plotnine  # typed only in part: under strict mypy its own functions count as untyped

MOST_PANELS = 12
"""Configurations that a figure of panels or boxes shows at most."""
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

    def chosen(self, frame: pd.DataFrame) -> tuple[pd.DataFrame, str]:
        """The rows of at most ``MOST_PANELS`` configurations, and which are left out.

        The best of each side stay, then the one of each kind that spends the fewest joules, then what does.
        """
        every = configurations(self.comparison.rows)
        present = set(frame["configuration"])
        labels = [one.label for one in every if one.label in present]
        if len(labels) <= MOST_PANELS:
            return frame, ""
        found = self.comparison
        bests = (found.best_proposed, found.best_baseline, found.best_control)
        spent = {one.label: one.measure(PRIMARY).value or math.inf for one in every}
        cheapest = {self.marks[label]: label for label in sorted(labels, key=spent.__getitem__, reverse=True)}
        first = [*(best.label for best in bests if best), *cheapest.values()]
        kept = set(sorted(labels, key=lambda label: (label not in first, spent[label]))[:MOST_PANELS])
        left = [label for label in labels if label not in kept]
        says = f"{MOST_PANELS} of {len(labels)}; left out, the dearest of their kinds: {', '.join(left)}"
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
                axis_text=p9.element_text(size=BASE_SIZE - 3, color=self.ink.text),
                strip_text=p9.element_text(size=BASE_SIZE - 3, color=self.ink.text, ha="left", va="bottom"),
                panel_spacing_x=0.045,
            ),
        ]


def rows_of(count: int) -> int:
    """Rows of panels."""
    return -(-count // COLUMNS)


def labels_of(frame: pd.DataFrame) -> list[str]:
    """The configurations of a frame in the order of print."""
    return [str(label) for label in frame["configuration"].cat.categories]
