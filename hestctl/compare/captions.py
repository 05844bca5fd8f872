"""What each figure answers and how to read it, by the name of its file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_STATES: Final = (
    "Each bar is 100 % of the directions' decisions, divided by state; "
    "a state of more numbers costs more joules."
)
_STEPS: Final = "Thin lines are seeds, bold ones their mean."

CAPTIONS: Final[Mapping[str, tuple[str, str]]] = {
    "comparison_energy": (
        "Who spends the fewest joules per sample at equal quality?",
        "The fewest joules are at the top, each with its 95 % interval. Filled marks are not inferior in "
        "quality to the best baseline; a hollow one that lies low has not been shown to be a saving.",
    ),
    "comparison_front": (
        "What does a saving cost in quality?",
        "Up and to the left is better. Where two vertical bars overlap, this figure does not tell the two "
        "apart; the gap table compares sample by sample and is the sharper of the two.",
    ),
    "comparison_parts": (
        "Where do the joules go?",
        "Left by phase, as the energy model apportions a sample's joules, right by cause. A part that was "
        "not measured is left out and named, never drawn as zero.",
    ),
    "comparison_energy_distribution": (
        "Is the mean carried by a few samples?",
        "Points are samples, boxes quartiles. Compare whole boxes: a saving that is real moves all of them.",
    ),
    "comparison_latency": (
        "How long does a sample take, and how long the slowest?",
        "Points are samples, boxes quartiles, the long bar the 99th percentile where there are enough of "
        "them.",
    ),
    "comparison_budget_adapter": (
        "Is the budget over the adapters kept at every length?",
        "Points are samples, with the directions' joules as the energy table predicts them; the line is "
        "E_max. A point above its line is a sample over its budget.",
    ),
    "comparison_budget_network": (
        "Is the budget over whole generations kept at every length?",
        "Points are samples, with the joules of their generation as the energy table predicts them; the "
        "line is E_max. A point above its line is a sample over its budget.",
    ),
    "comparison_length": (
        "How do joules grow with length?",
        "Points are repetitions of profile runs, lines join their means.",
    ),
    "comparison_depth": (
        "Which layers are used, and in which state?",
        f"The input layer is at the top. {_STATES} Columns A and M, where they are drawn, are the layer's "
        "own attention and MLP.",
    ),
    "comparison_position": ("Does the use change along the prompt and the answer?", _STATES),
    "comparison_confusion": (
        "Which labels are mistaken for which?",
        "A row is a true label, in percent of its samples; what is right lies where names agree.",
    ),
    "comparison_learning_loss": (
        "Was everything trained to its end?",
        f"{_STEPS} A loss that still falls at the right edge says that its run was stopped early.",
    ),
    "comparison_learning_energy": (
        "Did training meet the budget?",
        f"{_STEPS} Joules are predicted, over E_max; the level line is the budget itself.",
    ),
    "comparison_learning_multiplier": (
        "How hard did the budget press?",
        f"{_STEPS} A multiplier near zero says that the budget did not bind.",
    ),
    "comparison_meter": (
        "What are the meter's figures worth?",
        "By run: the bound on a sample's joules, windows that do not count, and how long windows are against "
        "the counter's step. A saving smaller than the bound is none.",
    ),
}
"""The question, and how to read the answer."""
