"""How every figure looks, and how figures are written to files.

Every figure says in its subtitle whether its joules are measured, estimated or predicted.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import plotnine
from matplotlib.ticker import MaxNLocator

from hestctl.compare.frames import NoDataError
from hestctl.compare.style import BASE_SIZE, DPI, INKS, WIDTH_IN, Ink, Theme
from hestctl.errors import Exit, HestError

p9: Any = plotnine  # typed only in part: under strict mypy its own functions count as untyped
FORMATS: Final = ("png", "pdf", "svg")


@dataclass(frozen=True, slots=True)
class Words:
    """What a figure shows, for readers who cannot see it (``alt``), and what its caption adds of the data."""

    alt: str = ""
    more: str = ""


class Drawn(list[Path]):
    """The files that were written, the ``words`` to each by topic, ``reasons`` where nothing was drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: dict[str, str] = {}
        self.words: dict[str, Words] = {}


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot, its size in inches, and its words."""

    plot: Any
    height_in: float
    words: Words = Words()
    width_in: float = WIDTH_IN


def check_theme(theme: Theme) -> Theme:
    """The theme, if there is such a one. Raises HestError (usage)."""
    if theme not in INKS:
        raise HestError(f"unknown theme '{theme}'", f"themes: {', '.join(INKS)}", Exit.USAGE)
    return theme


def write(
    topics: Sequence[tuple[str, Callable[[], Figure]]],
    out_dir: Path,
    *,
    formats: Sequence[str] = ("png",),
    dpi: int = DPI,
) -> Drawn:
    """Draw every topic that has data into ``out_dir``; a topic's name is its file's, without suffix.

    Raises HestError (usage) for a format that figures do not have.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise HestError(f"unknown figure format '{unknown[0]}'", f"formats: {', '.join(FORMATS)}", Exit.USAGE)
    mpl.use("agg")
    out_dir.mkdir(parents=True, exist_ok=True)
    drawn = Drawn()
    for name, paint in topics:
        try:
            figure = paint()
        except NoDataError as nothing:
            drawn.reasons[name] = str(nothing)
            continue
        for suffix in formats:
            # A run id of several stores ends in the store's path.
            path = out_dir / f"{name.replace('/', '-')}.{suffix}"
            figure.plot.save(path, width=figure.width_in, height=figure.height_in, dpi=dpi, verbose=False)
            drawn.append(path)
        drawn.words[name.replace("/", "-")] = figure.words
    return drawn


def look(ink: Ink, title: str, says: Sequence[str]) -> list[Any]:
    """Title, subtitle (a line or more for each of ``says``) and theme of a figure."""
    subtitle = "\n".join(line for text in says for line in textwrap.wrap(text, 76))
    paper = p9.element_rect(fill=ink.paper, color=ink.paper)
    return [
        p9.labs(title=title, subtitle=subtitle),
        p9.theme_minimal(base_size=BASE_SIZE),
        p9.theme(
            plot_background=paper,
            panel_background=paper,
            legend_background=paper,
            legend_key=paper,
            text=p9.element_text(color=ink.text),
            axis_text=p9.element_text(color=ink.text),
            axis_title=p9.element_text(color=ink.text, size=BASE_SIZE - 0.5),
            strip_text=p9.element_text(color=ink.text, ha="left"),
            plot_title=p9.element_text(size=BASE_SIZE + 1, weight="bold", ha="left", color=ink.text),
            plot_subtitle=p9.element_text(
                size=BASE_SIZE - 2, ha="left", color=ink.muted, margin={"b": 8, "units": "pt"}
            ),
            panel_spacing_y=0.035,
            plot_title_position="plot",
            panel_grid_major=p9.element_line(color=ink.grid, size=0.5),
            panel_grid_minor=p9.element_blank(),
            legend_position="bottom",
            legend_title=p9.element_blank(),
            legend_text=p9.element_text(color=ink.text, size=BASE_SIZE - 1.5),
            legend_key_size=10,
        ),
    ]


def few_whole(limits: tuple[float, float]) -> list[float]:
    """Breaks of an axis of whole numbers in a small panel."""
    return whole(limits, most=3)


def whole(limits: tuple[float, float], most: int = 5) -> list[float]:
    """About ``most`` breaks of an axis of whole numbers."""
    low, high = limits
    ticks = MaxNLocator(nbins=most, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in ticks if low <= tick <= high and float(tick).is_integer()]
