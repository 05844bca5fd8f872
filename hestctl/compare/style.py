"""Colours, shapes and line types of the figures: plain data, the same method the same in every figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from hestctl.compare.results import Row

Theme: TypeAlias = Literal["light", "dark"]

BASE_SIZE: Final = 10
"""Points; at ``WIDTH_IN`` a figure set to a column of 85 mm still reads at 7 points."""
WIDTH_IN: Final = 4.8
DPI: Final = 200


@dataclass(frozen=True, slots=True)
class Ink:
    """The colours of a theme that carry no data."""

    paper: str
    text: str
    muted: str
    grid: str
    low: str
    high: str


@dataclass(frozen=True, slots=True)
class Mark:
    """How one run is drawn: told apart by colour, and in grey by shape and line type."""

    colour: str
    shape: str
    line: str


INKS: Final[Mapping[Theme, Ink]] = {
    "light": Ink("#FFFFFF", "#1A1A1A", "#5F5F5F", "#E3E3E3", "#F2F6FA", "#08457E"),
    "dark": Ink("#14171C", "#ECECEC", "#A8ABB0", "#31363E", "#1D2733", "#8CC8FF"),
}

# Okabe and Ito's palette, safe for the common colour blindnesses; tints tell siblings apart.
_FAMILIES: Final[Mapping[str, Sequence[str]]] = {
    "hest": ("#0072B2", "#56B4E9", "#2B4C9B", "#7FA8D1"),
    "ablation": ("#8C6BB1", "#B39BCF", "#6A4C93"),
    "tabs": ("#D55E00", "#E8915B"),
    "bhsp": ("#009E73", "#5CC3A3"),
    "lora": ("#CC79A7", "#E0A9C8"),
    "control": ("#B8860B", "#DDBB55"),
    "base": ("#8A8A8A", "#B5B5B5"),
}
_SHAPES: Final = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "*", "p")
_LINES: Final = ("solid", "dashed", "dotted", "dashdot")

TRIALS: Final[Mapping[str, Mark]] = {
    "reached the baseline": Mark("#0072B2", "o", "solid"),
    "below the baseline": Mark("#D55E00", "^", "solid"),
    "failed": Mark("#8A8A8A", "x", "solid"),
}
"""How the trials of a search are drawn, by what became of them."""


def marks(rows: Sequence[Row]) -> dict[str, Mark]:
    """The mark of every run by its label."""
    seen: Counter[str] = Counter()
    found: dict[str, Mark] = {}
    for place, row in enumerate(rows):
        family = row.role if row.role in ("ablation", "control") else row.method
        tints = _FAMILIES.get(family, _FAMILIES["base"])
        found[row.label] = Mark(
            tints[seen[family] % len(tints)], _SHAPES[place % len(_SHAPES)], _LINES[place % len(_LINES)]
        )
        seen[family] += 1
    return found


def thousands(ticks: Sequence[float]) -> list[str]:
    """Labels of an axis of whole numbers."""
    return [f"{tick:,.0f}" for tick in ticks]


def joule_unit(largest_j: float) -> tuple[float, str]:
    """The factor and the unit in which the largest value reads without a row of zeros."""
    for factor, unit in ((1.0, "joules"), (1e3, "mJ"), (1e6, "µJ")):
        if largest_j * factor >= 0.1:
            return factor, unit
    return 1e9, "nJ"
