"""How long work reports what it is doing; the command line decides how that looks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Receives notes and counts. Figures carry their unit in the key."""

    def note(self, text: str) -> None:
        """One line worth telling: what was taken, dropped, predicted, repaired."""

    def advance(self, stage: str, done: int, total: int, figures: Mapping[str, float | None]) -> None:
        """``done`` of ``total`` in this stage, with the figures of the moment."""
