"""Where labels stand beside their marks so that none covers another: the same places every time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

_LETTER: Final = 0.6
"""Width of a letter and of a space together, in heights of the type: wide rather than narrow."""
_ANGLES: Final = 16
_REACHES_IN: Final = (0.0, 0.08, 0.18, 0.3, 0.45, 0.65, 0.9)
"""How far from its mark a label may go."""
_MARK_IN: Final = 0.07


class Box(NamedTuple):
    """Edges in inches."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, wide) * max(0.0, high)


def place(
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    *,
    size_in: tuple[float, float],
    x: tuple[float, float],
    y: tuple[float, float],
    points_of_type: float,
) -> list[tuple[float, float]]:
    """The centre of each text, in the units of the axes.

    ``points`` are the marks, ``x`` and ``y`` the ends of the axes, ``size_in`` what the panel measures in
    inches. Each text goes where it covers the fewest marks and texts, as near its own mark as can be.
    """
    scale = size_in[0] / (x[1] - x[0]), size_in[1] / (y[1] - y[0])
    marks_in = [((px - x[0]) * scale[0], (py - y[0]) * scale[1]) for px, py in points]
    taken = [Box(px - _MARK_IN, py - _MARK_IN, px + _MARK_IN, py + _MARK_IN) for px, py in marks_in]
    centres: dict[int, tuple[float, float]] = {}
    # From the outside in: labels of the middle have the least room to move, and move last.
    middle = tuple(sum(one[axis] for one in marks_in) / max(1, len(marks_in)) for axis in (0, 1))
    for nth in sorted(range(len(texts)), key=lambda nth: -math.dist(marks_in[nth], middle)):
        half = _LETTER * len(texts[nth]) * points_of_type / 144, points_of_type * 1.2 / 144
        mark = marks_in[nth]
        _, best = min((_cost(box, mark, taken, size_in), box) for box in _candidates(mark, half))
        taken.append(best)
        centres[nth] = (best.left + best.right) / 2, (best.bottom + best.top) / 2
    return [
        (x[0] + centres[nth][0] / scale[0], y[0] + centres[nth][1] / scale[1]) for nth in range(len(texts))
    ]


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
    box: Box, mark: tuple[float, float], taken: Sequence[Box], size_in: tuple[float, float]
) -> tuple[float, float]:
    """What the box covers or what of it is cut off, then how far its edge is from its mark."""
    area = (box.right - box.left) * (box.top - box.bottom)
    cut = area - box.overlap(Box(0.0, 0.0, *size_in))
    covered = cut + sum(box.overlap(other) for other in taken)
    near = (
        max(box.left - mark[0], mark[0] - box.right, 0.0),
        max(box.bottom - mark[1], mark[1] - box.top, 0.0),
    )
    return round(covered, 3), math.hypot(*near)
