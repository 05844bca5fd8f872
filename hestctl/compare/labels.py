"""Where labels stand beside their marks so that none covers another: the same places every time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Final, NamedTuple

_LETTER: Final = 0.53
"""Width of a letter in heights of the type."""
_ANGLES: Final = 16
_REACHES_IN: Final = (0.0, 0.08, 0.18, 0.3, 0.45, 0.65, 0.9)
"""How far from its mark a label may go."""
_MARK_IN: Final = 0.07
_THIN_IN: Final = 0.01
_LEAST_LINE_IN: Final = 0.1


class Box(NamedTuple):
    """Edges, in one unit."""

    left: float
    bottom: float
    right: float
    top: float

    def nearest(self, point: tuple[float, float]) -> tuple[float, float]:
        """The point of the box next to another."""
        return min(max(point[0], self.left), self.right), min(max(point[1], self.bottom), self.top)

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, wide) * max(0.0, high)


class Spot(NamedTuple):
    """The centre of a label, and where the line from its mark ends: at the label's edge, or at the mark."""

    x: float
    y: float
    line_x: float
    line_y: float


def place(
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    *,
    bars: Sequence[Box] = (),
    size_in: tuple[float, float],
    x: tuple[float, float],
    y: tuple[float, float],
    points_of_type: float,
) -> list[Spot]:
    """Where each text goes, in the units of the axes.

    ``points`` are the marks, ``bars`` lines that are better left bare, ``x`` and ``y`` the ends of the axes,
    ``size_in`` what the panel measures in inches. Each text goes where it covers the fewest marks and texts,
    then the fewest bars, as near its own mark as can be.
    """
    scale = size_in[0] / (x[1] - x[0]), size_in[1] / (y[1] - y[0])
    marks_in = [((px - x[0]) * scale[0], (py - y[0]) * scale[1]) for px, py in points]
    taken = [Box(px - _MARK_IN, py - _MARK_IN, px + _MARK_IN, py + _MARK_IN) for px, py in marks_in]
    bars_in = [
        Box(
            (bar.left - x[0]) * scale[0] - _THIN_IN,
            (bar.bottom - y[0]) * scale[1] - _THIN_IN,
            (bar.right - x[0]) * scale[0] + _THIN_IN,
            (bar.top - y[0]) * scale[1] + _THIN_IN,
        )
        for bar in bars
    ]
    spots: dict[int, Spot] = {}
    # From the outside in: labels of the middle have the least room to move, and move last.
    middle = tuple(sum(one[axis] for one in marks_in) / max(1, len(marks_in)) for axis in (0, 1))
    for nth in sorted(range(len(texts)), key=lambda nth: -math.dist(marks_in[nth], middle)):
        mark = marks_in[nth]
        half = _LETTER * len(texts[nth]) * points_of_type / 144, points_of_type * 1.2 / 144
        cost = partial(_cost, mark=mark, taken=taken, bars=bars_in, size_in=size_in)
        best = min(_candidates(mark, half), key=cost)
        taken.append(best)
        end = best.nearest(mark)
        if math.dist(end, mark) < _LEAST_LINE_IN:
            end = mark
        centre = (best.left + best.right) / 2, (best.bottom + best.top) / 2
        ends = [x[0] + end[0] / scale[0], y[0] + end[1] / scale[1]]
        spots[nth] = Spot(x[0] + centre[0] / scale[0], y[0] + centre[1] / scale[1], *ends)
    return [spots[nth] for nth in range(len(texts))]


def apart(values: Sequence[float], gap: float) -> list[float]:
    """``values`` moved up as little as it takes for neighbours to be ``gap`` apart, in their own order."""
    moved = [0.0] * len(values)
    floor = -math.inf
    for nth in sorted(range(len(values)), key=lambda nth: values[nth]):
        moved[nth] = max(values[nth], floor)
        floor = moved[nth] + gap
    return moved


def _candidates(mark: tuple[float, float], half: tuple[float, float]) -> list[Box]:
    boxes = []
    for reach in _REACHES_IN:
        for step in range(_ANGLES):
            angle = 2 * math.pi * step / _ANGLES
            px = mark[0] + math.cos(angle) * (half[0] + _MARK_IN + reach)
            py = mark[1] + math.sin(angle) * (half[1] + _MARK_IN + reach)
            boxes.append(Box(px - half[0], py - half[1], px + half[0], py + half[1]))
    return boxes


def _cost(
    box: Box,
    *,
    mark: tuple[float, float],
    taken: Sequence[Box],
    bars: Sequence[Box],
    size_in: tuple[float, float],
) -> tuple[float, float]:
    """What the box covers or what of it is cut off, then how far from its mark and across bars it is."""
    area = (box.right - box.left) * (box.top - box.bottom)
    cut = area - box.overlap(Box(0.0, 0.0, *size_in))
    covered = cut + sum(box.overlap(other) for other in taken)
    crossed = sum(box.overlap(bar) for bar in bars) / (2 * _THIN_IN)
    return round(covered, 3), round(math.dist(box.nearest(mark), mark) + crossed, 3)
