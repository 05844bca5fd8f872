"""How text fits a width: cells are folded at words, never cut; a table too wide becomes blocks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rich.cells import cell_len, chop_cells

_NAME: Final = 40
"""A word of the first column breaks only where it is longer: an id is there to be copied."""
_WORD: Final = 24
"""A word of another column breaks only where it is longer: no number is."""
_RULED: Final = 3
_BARE: Final = 2
"""Columns between two cells, with rules and without."""
_TOKEN: Final = re.compile(r"not measured\S*|\S*\[[^\]\n]{1,24}\]\S*|\S+")
"""One word each: what broken would read as "measured", and an interval, which would read as two numbers."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A table as it will be drawn: every cell folded to its column, and whether rules stand between."""

    widths: tuple[int, ...]
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    ruled: bool


def fit(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Layout | None:
    """The table in ``width`` terminal columns with as few lines as can be; ``None`` where it cannot fit.

    Rules go before a word breaks.
    """
    columns = [list(column) for column in zip(headers, *rows, strict=True)]
    least = [
        min(max((cell_len(word) for cell in column for word in _words(cell)), default=1), whole)
        for column, whole in zip(columns, (_NAME, *[_WORD] * len(columns)), strict=False)
    ]
    between = len(columns) - 1
    for ruled, taken in ((True, _RULED * between + 4), (False, _BARE * between)):
        if sum(least) + taken <= width:
            folded = _shrunk(columns, least, width - taken)
            lines = tuple(zip(*(tuple(column) for column in folded), strict=True))
            return Layout(tuple(_width(column) for column in folded), lines[0], lines[1:], ruled)
    return None


def blocks(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """A table as one block a row, a line a cell: what is left where columns do not fit side by side."""
    names = ["  " * bool(index) + " ".join(header.split()) for index, header in enumerate(headers)]
    room = max(cell_len(name) for name in names) + 2
    lines: list[str] = []
    for row in rows:
        for name, cell in zip(names, row, strict=True):
            value = " ".join(cell.split())
            if room + _WORD <= width:
                first, *more = fold(value, width - room).split("\n")
                lines.append(f"{name}{' ' * (room - cell_len(name))}{first}")
                lines += [f"{' ' * room}{line}" for line in more]
            else:
                lines += [f"  {line}" for line in fold(f"{name}: {value}", width - 2).split("\n")]
    return lines


def fold(text: str, width: int) -> str:
    """``text`` broken at words into lines of at most ``width``; within a word only where it is longer."""
    lines = []
    for part in text.split("\n"):
        line = ""
        for word in _words(part):
            if line and cell_len(line) + 1 + cell_len(word) <= width:
                line += f" {word}"
                continue
            if line:
                lines.append(line)
            *full, line = chop_cells(word, width) if cell_len(word) > width else [word]
            lines += full
        lines.append(line)
    return "\n".join(lines)


def _shrunk(columns: list[list[str]], least: Sequence[int], room: int) -> list[list[str]]:
    """The columns folded until they fit ``room``, each time the one that costs the fewest lines a column."""
    spare = room - sum(least)
    folded = [_folded(column, most + spare) for column, most in zip(columns, least, strict=True)]
    while sum(map(_width, folded)) > room:
        heights = [[cell.count("\n") for cell in column] for column in folded]
        lines = sum(map(max, zip(*heights, strict=True)))
        found: list[tuple[float, int, list[str]]] = []
        for index, column in enumerate(folded):
            wide = _width(column)
            if wide <= least[index]:
                continue
            narrower = _folded(columns[index], wide - 1)
            after = [*heights[:index], [cell.count("\n") for cell in narrower], *heights[index + 1 :]]
            added = sum(map(max, zip(*after, strict=True))) - lines
            found.append((added / (wide - _width(narrower)), index, narrower))
        _, index, narrower = min(found, key=lambda one: one[:2])
        folded[index] = narrower
    return folded


def _folded(column: Sequence[str], width: int) -> list[str]:
    """The cells of one column at most ``width`` wide; where one interval goes below its value, all do."""
    if any(" [" in cell and _width([cell]) > width for cell in column[1:]):
        column = [column[0], *(cell.replace(" [", "\n[") for cell in column[1:])]
    return [fold(cell, width) for cell in column]


def _words(cell: str) -> list[str]:
    return _TOKEN.findall(cell)


def _width(column: Sequence[str]) -> int:
    return max((cell_len(line) for cell in column for line in cell.split("\n")), default=0)
