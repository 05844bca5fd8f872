"""Where labels stand beside their marks so that each is plainly of its own: the same places every time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

from matplotlib.textpath import TextPath
from scipy.optimize import isotonic_regression

_ANGLES: Final = 16
_REACHES_IN: Final = (0.0, 0.1, 0.22, 0.36, 0.52, 0.72, 0.95, 1.2)
"""How far from its mark a label may go."""
_MARK_IN: Final = 0.07
_THIN_IN: Final = 0.01
_LEAST_LINE_IN: Final = 0.01
_ROUNDS: Final = 3
"""How often every label may move once the others are placed."""

Point = tuple[float, float]


class Box(NamedTuple):
    """Edges, in one unit."""

    left: float
    bottom: float
    right: float
    top: float

    def nearest(self, point: Point) -> Point:
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
    points: Sequence[Point],
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
    its line crosses the fewest, and no other mark is nearer to it; then as near its own mark as can be.
    """
    scale = size_in[0] / (x[1] - x[0]), size_in[1] / (y[1] - y[0])

    def inches(px: float, py: float) -> Point:
        return (px - x[0]) * scale[0], (py - y[0]) * scale[1]

    thin = [
        Box(left - _THIN_IN, bottom - _THIN_IN, right + _THIN_IN, top + _THIN_IN)
        for bar in bars
        for (left, bottom), (right, top) in [(inches(bar.left, bar.bottom), inches(bar.right, bar.top))]
    ]
    panel = _Panel([inches(*point) for point in points], thin, size_in)
    halves = [(width_in(text, points_of_type) / 2, points_of_type * 1.2 / 144) for text in texts]
    spots = []
    for mark, box in zip(panel.marks, panel.filled(halves), strict=True):
        end = box.nearest(mark)
        if math.dist(end, mark) - _MARK_IN < _LEAST_LINE_IN:
            end = mark
        centre = (box.left + box.right) / 2, (box.bottom + box.top) / 2
        ends = [x[0] + end[0] / scale[0], y[0] + end[1] / scale[1]]
        spots.append(Spot(x[0] + centre[0] / scale[0], y[0] + centre[1] / scale[1], *ends))
    return spots


def width_in(text: str, points_of_type: float) -> float:
    """How wide a text is, in inches."""
    return float(TextPath((0.0, 0.0), text, size=points_of_type).get_extents().width) / 72


def apart(values: Sequence[float], gap: float, ends: tuple[float, float]) -> list[float]:
    """``values`` moved as little as it takes for neighbours to be ``gap`` apart, in their own order.

    The sum of squares of the moves is the least there is. They stay between ``ends`` where there is room.
    """
    if not len(values):
        return []
    low, high = ends[0], ends[1] - (len(values) - 1) * gap
    if high < low:
        low = high = (low + high) / 2
    order = sorted(range(len(values)), key=lambda nth: values[nth])
    level = isotonic_regression([values[nth] - place * gap for place, nth in enumerate(order)]).x.clip(
        low, high
    )
    moved = [0.0] * len(values)
    for place, nth in enumerate(order):
        moved[nth] = float(level[place]) + place * gap
    return moved


class _Panel:
    """Marks and bare lines of a panel in inches, and what a label costs where it stands."""

    def __init__(self, marks: Sequence[Point], bars: Sequence[Box], size_in: tuple[float, float]) -> None:
        self.marks = marks
        self.bars = bars
        self.size_in = size_in
        self.boxes = [Box(x - _MARK_IN, y - _MARK_IN, x + _MARK_IN, y + _MARK_IN) for x, y in marks]

    def filled(self, halves: Sequence[Point]) -> list[Box]:
        """The labels, each ``halves`` wide and high to either side of its centre."""
        middle = tuple(sum(one[axis] for one in self.marks) / max(1, len(self.marks)) for axis in (0, 1))
        # From the outside in: labels of the middle have the least room to move, and move last.
        order = sorted(range(len(halves)), key=lambda nth: -math.dist(self.marks[nth], middle))
        every = [_candidates(mark, half) for mark, half in zip(self.marks, halves, strict=True)]
        costs = [[self._alone(nth, box) for box in boxes] for nth, boxes in enumerate(every)]
        found: dict[int, Box] = {}
        for _ in range(_ROUNDS):
            before = dict(found)
            for nth in order:
                others = [(found[other], self.marks[other]) for other in found if other != nth]
                priced = [
                    alone + self._beside(self.marks[nth], box, others)
                    for alone, box in zip(costs[nth], every[nth], strict=True)
                ]
                found[nth] = every[nth][min(range(len(priced)), key=priced.__getitem__)]
            if found == before:
                break
        return [found[nth] for nth in range(len(halves))]

    def _alone(self, nth: int, box: Box) -> float:
        """What the box costs whatever the other labels do."""
        mark = self.marks[nth]
        area = (box.right - box.left) * (box.top - box.bottom)
        covered = area - box.overlap(Box(0.0, 0.0, *self.size_in))
        covered += sum(box.overlap(other) for other in self.boxes)
        end = box.nearest(mark)
        reach = math.dist(end, mark)
        others = [other for place, other in enumerate(self.marks) if place != nth and other != mark]
        crossed = sum(_from_line(other, mark, end) < _MARK_IN for other in others)
        nearer = sum(math.dist(box.nearest(other), other) < max(reach, 2 * _MARK_IN) for other in others)
        bars = sum(box.overlap(bar) > 0 for bar in self.bars)
        return 40 * covered / area + 2 * crossed + 0.3 * nearer + reach + 0.35 * bars

    @staticmethod
    def _beside(mark: Point, box: Box, others: Sequence[tuple[Box, Point]]) -> float:
        """What it costs because of where the other labels and their lines are."""
        area = (box.right - box.left) * (box.top - box.bottom)
        end = box.nearest(mark)
        cost = 0.0
        for other, other_mark in others:
            other_end = other.nearest(other_mark)
            cost += 40 * box.overlap(other) / area
            cost += 2 * _meet(mark, end, other_mark, other_end)
            cost += 2 * (_through(other, mark, end) + _through(box, other_mark, other_end))
        return cost


def _candidates(mark: Point, half: Point) -> list[Box]:
    boxes = []
    for reach in _REACHES_IN:
        for step in range(_ANGLES):
            angle = 2 * math.pi * step / _ANGLES
            px = mark[0] + math.cos(angle) * (half[0] + _MARK_IN + reach)
            py = mark[1] + math.sin(angle) * (half[1] + _MARK_IN + reach)
            boxes.append(Box(px - half[0], py - half[1], px + half[0], py + half[1]))
    return boxes


def _from_line(point: Point, start: Point, end: Point) -> float:
    """Distance of a point from a line between two others."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = dx * dx + dy * dy
    along = 0.0 if length == 0 else ((point[0] - start[0]) * dx + (point[1] - start[1]) * dy) / length
    along = min(1.0, max(0.0, along))
    return math.dist(point, (start[0] + along * dx, start[1] + along * dy))


def _side(a: Point, b: Point, c: Point) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _meet(a: Point, b: Point, c: Point, d: Point) -> bool:
    """Whether the lines a-b and c-d cross."""
    return _side(a, b, c) * _side(a, b, d) < 0 and _side(c, d, a) * _side(c, d, b) < 0


def _through(box: Box, start: Point, end: Point) -> bool:
    """Whether a line goes through a box."""
    diagonals = (
        ((box.left, box.bottom), (box.right, box.top)),
        ((box.left, box.top), (box.right, box.bottom)),
    )
    return any(_meet(start, end, *diagonal) for diagonal in diagonals)
