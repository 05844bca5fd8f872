"""What each figure answers and how to read it, by its topic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

CAPTIONS: Final[Mapping[str, tuple[str, str]]] = {
    "comparison_energy": (
        "Who spends the fewest joules at equal quality?",
        "Each mark is a mean, each line its 95 % interval; further left is better. Filled marks are shown "
        "not to be inferior to the best baseline; hollow ones may be cheap because they are worse.",
    ),
    "comparison_front": (
        "What does a saving cost in quality?",
        "Up and to the left is better; the dashed line joins what nothing else beats in both. Where two "
        "vertical bars overlap, this figure does not tell the two apart; the gap table compares sample by "
        "sample and is the sharper of the two.",
    ),
    "comparison_parts": (
        "Where do the joules go?",
        "The same joules twice: by phase, as the energy model apportions them, and by cause. Idle is what "
        "the device draws at rest in that time; the share of the adapters' directions is predicted.",
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
    "comparison_budget_adapter": (
        "Is the budget of the adapters' directions kept at every length?",
        "Points are samples, joules of the directions as the energy table predicts them; the line is E_max. "
        "A point above it is a sample over its budget. The dashed line is what TABS takes.",
    ),
    "comparison_budget_network": (
        "Is the budget of whole generations kept at every length?",
        "Points are samples, joules of the whole generation as the energy table predicts them; the line is "
        "E_max, which grows with length. The dashed line is what TABS takes.",
    ),
    "comparison_length": (
        "How do joules grow with length?",
        "Points are repetitions of profile runs, lines join their means.",
    ),
    "comparison_depth": (
        "Which layers work, and how hard?",
        "Each bar is a layer: the share of its directions, over all tokens, that ran in full, in int8, or "
        "not at all. Columns A and M are the states of the layer's own attention and MLP.",
    ),
    "comparison_position": (
        "Do prompts and answers, early and late tokens, get the same?",
        "Each bar is a tenth of the prompt, or a step of new tokens, over all layers.",
    ),
    "comparison_confusion": (
        "Which labels are taken for which?",
        "Each row is a true label and adds up to 100 %; the diagonal is right.",
    ),
    "comparison_learning_loss": (
        "Did every configuration learn?",
        "Bold lines are means over seeds, diamonds the validation loss. Curves that still fall were stopped "
        "early.",
    ),
    "comparison_learning_energy": (
        "Did training meet the budget?",
        "Joules over E_max as the gates decide, predicted; at the level line the budget is met.",
    ),
    "comparison_learning_multiplier": (
        "Did the budget bind?",
        "The multiplier rises while the gates ask for more than E_max; where it stays at zero, the budget "
        "cost nothing.",
    ),
    "comparison_meter": (
        "What are the meter's figures worth?",
        "Each mark is a run. A saving smaller than the error bound, or than what A/A pairs differ by, is "
        "none; windows of few counter steps have wide bounds.",
    ),
}
"""The question, and how to read the answer."""
