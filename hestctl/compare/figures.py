"""The figures of a comparison, drawn with plotnine: each answers one question, of configurations.

Every figure says in its subtitle whether its joules are measured, estimated or predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import duckdb

from hestctl.compare import figures_energy, figures_runs, figures_samples, figures_states
from hestctl.compare.canvas import Canvas
from hestctl.compare.look import Drawn, Figure, write
from hestctl.compare.results import Comparison
from hestctl.compare.style import DPI, Theme

TOPICS: Final[Mapping[str, Callable[[Canvas], Figure]]] = {
    "energy": figures_energy.energy,
    "front": figures_energy.front,
    "parts": figures_energy.parts,
    "energy_distribution": figures_samples.energy_distribution,
    "latency": figures_samples.latency,
    "budget": figures_samples.budget,
    "length": figures_samples.length,
    "depth": figures_states.depth,
    "position": figures_states.position,
    "confusion": figures_states.confusion,
    "learning_loss": figures_runs.learning_loss,
    "learning_budget": figures_runs.learning_budget,
    "meter": figures_runs.meter,
}
"""What there is to draw, in the order in which it is read."""


def draw(
    connection: duckdb.DuckDBPyConnection,
    comparison: Comparison,
    out_dir: Path,
    *,
    theme: Theme = "light",
    formats: Sequence[str] = ("png",),
    dpi: int = DPI,
    only: Callable[[str], bool] | None = None,
) -> Drawn:
    """Write every figure that has data to ``out_dir`` as ``comparison_{topic}.png`` and return the files.

    ``only`` chooses by that name, without suffix. The returned list has ``reasons``: the topics that drew
    nothing, and why. Raises HestError (usage) for a theme or a format that there is not.
    """
    canvas = Canvas(connection, comparison, theme)
    topics = [
        (f"comparison_{topic}", partial(paint, canvas))
        for topic, paint in TOPICS.items()
        if topic != "confusion" or comparison.task == "classification"
    ]
    topics = [(name, paint) for name, paint in topics if only is None or only(name)]
    return write(topics, out_dir, formats=formats, dpi=dpi)
