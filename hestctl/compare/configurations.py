"""Rows of the same configuration joined over their seeds: one line, with the interval of its mean."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy import special

from hestctl.compare.results import METRICS, Role, Row
from hestctl.compare.statistics import FEWEST, LEVEL, Measure, absent, wilson

_WORST: Final = ("emax_use_worst_percent",)
"""Measures of which the seeds' largest counts, not their mean."""
_SHARES: Final = ("over_budget_percent",)
"""Shares of samples: all seeds at 0 % would have a t interval of no width."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """The runs of one configuration as one line; it reads like a ``Row``.

    Measures of one run are that run's, with its interval over samples. Those of several seeds are means
    with a t interval over the seeds, which speaks of other trainings on these samples.
    """

    label: str
    method: str
    role: Role
    scope: str | None
    rows: tuple[Row, ...]
    measures: Mapping[str, Measure]

    @property
    def seeds(self) -> int:
        return len(self.rows)

    @property
    def samples(self) -> int:
        """Samples of a run, the fewest where runs differ."""
        return min(row.samples for row in self.rows)

    @property
    def run_ids(self) -> tuple[str, ...]:
        return tuple(row.run_id for row in self.rows)

    @property
    def notes(self) -> tuple[str, ...]:
        """Every run's notes once, with the run they are of where there are several."""
        if self.seeds == 1:
            return self.rows[0].notes
        held: dict[str, list[str]] = defaultdict(list)
        for row in self.rows:
            for note in row.notes:
                held[note].append(str(row.seed))
        return tuple(f"seed {', '.join(seeds)}: {note}" for note, seeds in held.items())

    def measure(self, name: str) -> Measure:
        """The measure ``name``, absent with a reason where the runs cannot have it."""
        return self.measures.get(name, absent("does not apply to this task"))


def configurations(rows: Sequence[Row]) -> tuple[Configuration, ...]:
    """One configuration for each ``config_label``, in the order of their first rows."""
    held: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        held[row.config_label].append(row)
    return tuple(_joined(label, members) for label, members in held.items())


def above_budget(lines: Sequence[Row | Configuration]) -> Iterator[str]:
    """A sentence on the budgets that are kept by prediction and not by the meter, if there are any."""
    metered = [(line.label, line.measure("meter_of_emax_percent").value) for line in lines]
    above = [f"{label} ({use:.0f} %)" for label, use in metered if use is not None and use > 100]
    if above:
        yield f"by the meter the mean sample is above its E_max, by prediction not: {', '.join(above)}"


def _joined(label: str, rows: Sequence[Row]) -> Configuration:
    first = rows[0]
    measures = first.measures
    if len(rows) > 1:
        names = [name for name in METRICS if any(name in row.measures for row in rows)]
        measures = {name: _over_seeds(name, rows) for name in names}
    return Configuration(label, first.method, first.role, first.scope, tuple(rows), measures)


def _over_seeds(name: str, rows: Sequence[Row]) -> Measure:
    found = [row.measure(name) for row in rows]
    lacking = [(row, one) for row, one in zip(rows, found, strict=True) if one.value is None]
    if lacking:
        # A mean over some of the seeds would stand for other trainings than the line beside it.
        reason = lacking[0][1].reason or "no reason was recorded"
        if len(lacking) == len(rows):
            return absent(reason)
        seeds = ", ".join(str(row.seed) for row, _ in lacking)
        return absent(f"{len(lacking)} of {len(rows)} seeds have none (seed {seeds}: {reason})")
    values = np.array([one.value for one in found], dtype=np.float64)
    samples = min(one.n for one in found)
    if name in _WORST:
        return Measure(float(values.max()), n=samples, reason="the largest of the seeds")
    mean = float(values.mean())
    if name in _SHARES and samples:
        # Seeds share their samples: they count once.
        return wilson(mean / 100 * samples, samples).scaled(100)
    if len(values) < FEWEST:
        return Measure(mean, n=samples, reason=f"an interval over seeds needs at least {FEWEST}")
    spread = float(values.std(ddof=1))
    if spread == 0:
        return Measure(mean, n=samples)
    half = float(special.stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * spread / math.sqrt(len(values))
    # What cannot be below zero is not, whatever a few seeds make of its spread; net joules can.
    low = mean - half if values.min() < 0 else max(0.0, mean - half)
    return Measure(mean, low, mean + half, samples)
