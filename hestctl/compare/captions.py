"""What each figure answers and how to read it, by its topic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

CAPTIONS: Final[Mapping[str, tuple[str, str]]] = {
    "comparison_energy": (
        "Who spends the fewest joules per sample?",
        "Each bar is a mean over the test samples, each line its 95 % interval. Shorter is better; "
        "whether the quality is equal, the gap table says.",
    ),
    "comparison_energy_distribution": (
        "Is the mean carried by a few samples?",
        "Points are samples, boxes quartiles. Compare whole boxes: a saving that is real moves all of them.",
    ),
    "comparison_latency": (
        "How long does a sample take, and how long the slowest?",
        "Points are samples, boxes quartiles, the long bar the 99th percentile where there are enough "
        "samples.",
    ),
    "comparison_quality_energy": (
        "What does a saving cost in quality?",
        "Up and to the left is better. Where two vertical bars overlap, this figure does not tell the two "
        "apart; the gap table compares sample by sample and is the sharper of the two.",
    ),
    "comparison_budget": (
        "Is the budget kept at every length?",
        "Points are samples, joules in scope as the energy table predicts them; lines are E_max. A point "
        "above the line of its colour is a sample over its budget.",
    ),
    "comparison_length": (
        "How do joules grow with length?",
        "Points are repetitions of profile runs, lines join their means.",
    ),
}
"""The question, and how to read the answer."""
