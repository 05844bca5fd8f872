"""Joules where both sides write equally many tokens because generation may not stop: profile runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import duckdb
import numpy as np

from hestctl.compare import statistics
from hestctl.compare.results import ProfileRun
from hestctl.compare.statistics import Measure, absent

Work: TypeAlias = tuple[object, ...]
"""What was generated, and on what: device, data and engine, batch, beams, lengths, number of the sample."""

_CONDITIONS = (
    "device_name", "device_uuid", "backbone", "weights", "dtype", "data_hash", "engine", "meter",
)  # fmt: skip
"""Columns of a profile run in which two must agree before their joules may stand side by side."""


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
        for *work, sample_id, joules in connection.execute(
            f"SELECT {', '.join(f'r.{name}' for name in _CONDITIONS)}, s.batch_size, s.num_beams, "
            "s.prompt_tokens, s.new_tokens, s.sample_id, avg(s.energy_j) "
            "FROM samples s JOIN runs r USING (run_id, store) WHERE run_id = ? AND store = ? "
            "AND s.energy_valid AND s.energy_kind = 'measured' AND s.energy_j IS NOT NULL "
            "AND s.new_tokens = r.max_new_tokens GROUP BY ALL",
            [profile.run_id, profile.store],
        ).fetchall():
            # Its number within the length: `batch_size` neighbours were generated together.
            number = int(str(sample_id).rpartition("-")[2])
            found[configs[profile.label]].joules[*work, number].append(float(joules))
    return found


def forced_ratio(first: Forced | None, second: Forced | None) -> Measure:
    """Joules of the first over those of the second on the work that both did, by batch."""
    shared = sorted(first.joules.keys() & second.joules.keys(), key=str) if first and second else []
    if first is None or second is None or not shared:
        return absent("no profile runs of both sides did the same work: `hestctl profile` for each")
    batches = [(*work[:-1], int(str(work[-1])) // int(str(work[len(_CONDITIONS)]))) for work in shared]
    numbers = {batch: place for place, batch in enumerate(dict.fromkeys(batches))}
    return statistics.ratio_of_means(
        np.array([first.mean_j(work) for work in shared]),
        np.array([second.mean_j(work) for work in shared]),
        np.array([numbers[batch] for batch in batches], dtype=np.int64),
    )
