"""Joules where both sides write equally many tokens because generation may not stop: profile runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import duckdb
import numpy as np

from hestctl.compare import statistics
from hestctl.compare.results import ProfileRun
from hestctl.compare.statistics import Measure, absent

_CONDITIONS = (
    "device_name", "device_uuid", "backbone", "weights", "dtype", "data_hash", "engine", "meter",
)  # fmt: skip
"""Columns of a profile run in which two must agree before their joules may stand side by side."""


class Work(NamedTuple):
    """One sample of forced length: the ``number``-th of its kind, on what, and how it was generated."""

    conditions: tuple[object, ...]
    batch_size: int
    num_beams: int
    prompt_tokens: int
    new_tokens: int
    number: int

    @property
    def batch(self) -> Work:
        """The first sample of its batch: ``batch_size`` neighbours are generated together."""
        return self._replace(number=self.number - self.number % self.batch_size)


@dataclass(slots=True)
class Forced:
    """Measured joules of one configuration's samples of forced length; several runs of one piece of work."""

    joules: dict[Work, list[float]] = field(default_factory=lambda: defaultdict(list))

    def mean_j(self, work: Work) -> float:
        """Mean joules of one sample (J) over the runs that generated it."""
        return sum(self.joules[work]) / len(self.joules[work])


def read_forced(
    connection: duckdb.DuckDBPyConnection, profiles: Sequence[ProfileRun], configs: Mapping[str, str]
) -> dict[str, Forced]:
    """What the profile runs metered, by the label of the configuration.

    ``configs`` gives that label for the label of a row, which names the seed where there are several.
    """
    found: dict[str, Forced] = defaultdict(Forced)
    for profile in profiles:
        rows = connection.execute(
            f"SELECT [{', '.join(f'r.{name}' for name in _CONDITIONS)}], s.batch_size, s.num_beams, "
            "s.prompt_tokens, s.new_tokens, try_cast(split_part(s.sample_id, '-', -1) AS INTEGER) AS number, "
            "avg(s.energy_j) FROM samples s JOIN runs r USING (run_id, store) "
            "WHERE run_id = ? AND store = ? AND s.new_tokens = r.max_new_tokens "
            "AND s.energy_valid AND s.energy_kind = 'measured' AND s.energy_j IS NOT NULL "
            "GROUP BY ALL HAVING number IS NOT NULL",
            [profile.run_id, profile.store],
        ).fetchall()
        for conditions, *work, joules in rows:
            found[configs[profile.label]].joules[Work(tuple(conditions), *work)].append(float(joules))
    return found


def forced_ratio(first: Forced | None, second: Forced | None) -> Measure:
    """Joules of the first over those of the second on the work that both did, by batch."""
    why = "no profile runs of both sides did the same work: `hestctl profile` for each"
    if first is None or second is None:
        return absent(why)
    shared = [work for work in first.joules if work in second.joules]
    if not shared:
        return absent(why)
    batches = {batch: place for place, batch in enumerate(dict.fromkeys(work.batch for work in shared))}
    return statistics.ratio_of_means(
        np.array([first.mean_j(work) for work in shared]),
        np.array([second.mean_j(work) for work in shared]),
        np.array([batches[work.batch] for work in shared], dtype=np.int64),
    )
