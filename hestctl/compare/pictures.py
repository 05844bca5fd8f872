"""A comparison's figures as bytes for a page: vector where that is small, else pixels."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Final

import duckdb
from PIL import Image

from hestctl.compare.captions import CAPTIONS
from hestctl.compare.document import Picture
from hestctl.compare.figures import draw
from hestctl.compare.look import Words
from hestctl.compare.results import Comparison
from hestctl.compare.style import Theme

VECTOR_BYTES: Final = 130_000
"""The largest figure that stays vector: one of ten thousand points would be megabytes."""
_DPI: Final = 160
_COLOURS: Final = 128


def pictures(
    connection: duckdb.DuckDBPyConnection, comparison: Comparison, theme: Theme
) -> tuple[list[Picture], dict[str, str]]:
    """The figures, and for each that has nothing to draw the reason."""
    found: dict[str, Picture] = {}
    with tempfile.TemporaryDirectory(prefix="hestctl-") as name:
        folder = Path(name)
        drawn = draw(connection, comparison, folder, theme=theme, formats=("svg",))
        large = {path.stem for path in drawn if path.stat().st_size > VECTOR_BYTES}
        for path in drawn:
            if path.stem not in large:
                found[path.stem] = _picture(path, "image/svg+xml", drawn.words[path.stem])
        if large:
            again = draw(
                connection, comparison, folder, theme=theme, dpi=_DPI, only=lambda topic: topic in large
            )
            found |= {path.stem: _picture(path, "image/png", again.words[path.stem]) for path in again}
        order = [path.stem for path in drawn]
    return [found[topic] for topic in order], drawn.reasons


def _picture(path: Path, mime: str, words: Words) -> Picture:
    question, reading = CAPTIONS[path.stem.removeprefix("comparison_")]
    caption = " ".join(filter(None, (reading, words.more)))
    data = path.read_bytes()
    data = _fewer_colours(data) if mime == "image/png" else data
    return Picture(path.name, question, caption, mime, data, words.alt)


def _fewer_colours(data: bytes) -> bytes:
    """A PNG with a palette: a third of the bytes, and nothing to be seen of it in a chart."""
    out = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        image.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()
