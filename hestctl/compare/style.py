"""Colours, shapes and line types of the figures: plain data, the same method the same in every figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from hestctl.compare.results import Row

Theme: TypeAlias = Literal["light", "dark"]

BASE_SIZE: Final = 10
"""Points; at ``WIDTH_IN`` a figure set to a column of 85 mm still reads at 7 points."""
SMALL: Final = BASE_SIZE - 2
"""The smallest type, in points."""
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
    """How a configuration is drawn: colour, and for those who see none shape and line, tell its kind."""

    colour: str
    shape: str
    line: str


INKS: Final[Mapping[Theme, Ink]] = {
    "light": Ink("#FFFFFF", "#1A1A1A", "#5F5F5F", "#E3E3E3", "#F2F6FA", "#08457E"),
    "dark": Ink("#14171C", "#ECECEC", "#A8ABB0", "#31363E", "#1D2733", "#8CC8FF"),
}

# Okabe and Ito's palette, safe for the common colour blindnesses. Two dozen configurations outrun any
# palette: the mark tells the kind, a label at the mark or above the panel which one it is.
_KINDS: Final[Mapping[str, Mark]] = {
    "hest": Mark("#0072B2", "o", "solid"),
    "ablation": Mark("#8C6BB1", "v", "dashdot"),
    "tabs": Mark("#D55E00", "s", "dashed"),
    "bhsp": Mark("#009E73", "^", "dotted"),
    "lora": Mark("#CC79A7", "D", "dashdot"),
    "control": Mark("#B8860B", ">", "dashed"),
    "base": Mark("#8A8A8A", "p", "dotted"),
}

SHADES: Final[Mapping[Theme, Mapping[str, str]]] = {
    "light": {"off": "#E4E7EB", "int8": "#6BAED6", "full": "#08457E"},
    "dark": {"off": "#2E343D", "int8": "#4A83B5", "full": "#BFE0FF"},
}
"""Shades of the states, further from the paper for more joules: they read in grey as well."""

PARTS: Final[Mapping[Theme, Mapping[str, str]]] = {
    "light": {
        "prefill": "#08457E",
        "decode": "#9ECAE1",
        "idle": "#BDBDBD",
        "directions": "#8C2D04",
        "all else": "#56799B",
    },
    "dark": {
        "prefill": "#BFE0FF",
        "decode": "#3F6E9A",
        "idle": "#5A6068",
        "directions": "#FFC08A",
        "all else": "#6F8CA8",
    },
}
"""Where joules go."""

TRIALS: Final[Mapping[str, Mark]] = {
    "reached the baseline": Mark("#0072B2", "o", "solid"),
    "below the baseline": Mark("#D55E00", "^", "solid"),
    "failed": Mark("#8A8A8A", "x", "solid"),
}
"""How the trials of a search are drawn, by what became of them."""


def marks(rows: Sequence[Row]) -> dict[str, Mark]:
    """The mark of every configuration by its label."""
    return {
        row.config_label: _KINDS[row.role if row.role in ("ablation", "control") else row.method]
        for row in rows
    }


def thousands(ticks: Sequence[float]) -> list[str]:
    """Labels of an axis of whole numbers."""
    return [f"{tick:,.0f}" for tick in ticks]


def joule_unit(largest_j: float) -> tuple[float, str]:
    """The factor and the unit in which the largest value reads without a row of zeros."""
    for factor, unit in ((1.0, "joules"), (1e3, "mJ"), (1e6, "µJ")):
        if largest_j * factor >= 0.1:
            return factor, unit
    return 1e9, "nJ"
