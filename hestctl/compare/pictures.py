"""A comparison's figures as bytes for a page: vector where that is small, else pixels."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

import duckdb

from hestctl.compare.captions import CAPTIONS
from hestctl.compare.document import Picture
from hestctl.compare.figures import draw
from hestctl.compare.results import Comparison
from hestctl.compare.style import Theme

VECTOR_BYTES: Final = 120_000
"""The largest figure that stays vector: one of ten thousand points would be megabytes."""
_DPI: Final = 160


def pictures(
    connection: duckdb.DuckDBPyConnection, comparison: Comparison, theme: Theme
) -> tuple[list[Picture], dict[str, str]]:
    """The figures over all runs, and for each that has nothing to draw the reason.

    Figures of single runs stay out: two hundred runs would make a page that no one opens.
    """
    found: dict[str, Picture] = {}
    with tempfile.TemporaryDirectory(prefix="hestctl-") as name:
        folder = Path(name)
        drawn = draw(connection, comparison, folder, theme=theme, formats=("svg",), only=_of_all)
        large = {path.stem for path in drawn if path.stat().st_size > VECTOR_BYTES}
        for path in drawn:
            if path.stem not in large:
                found[path.stem] = _picture(path, "image/svg+xml")
        if large:
            again = draw(
                connection, comparison, folder, theme=theme, dpi=_DPI, only=lambda topic: topic in large
            )
            found |= {path.stem: _picture(path, "image/png") for path in again}
        order = [path.stem for path in drawn]
    return [found[topic] for topic in order], drawn.reasons


def _of_all(topic: str) -> bool:
    return topic.startswith("comparison_")


def _picture(path: Path, mime: str) -> Picture:
    question, reading = CAPTIONS[path.stem]
    return Picture(path.name, question, reading, mime, path.read_bytes())
