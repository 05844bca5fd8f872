"""What each figure answers and how to read it, by its topic. What holds of some data only, a figure adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

CAPTIONS: Final[Mapping[str, tuple[str, str]]] = {
    "energy": (
        "Who spends the fewest joules per sample at equal quality?",
        "The first row that is filled. Left: mean joules. Right: the difference in quality to the best "
        "baseline, with its 95 % interval; it must end to the right of the dotted margin. Grey rows are not "
        "shown to be equal, so that their joules are no answer.",
    ),
    "front": (
        "What does a saving cost in quality?",
        "Up and to the left is better. Where two vertical bars overlap, this figure does not tell the two "
        "apart; the gap table compares sample by sample and is the sharper of the two.",
    ),
    "parts": (
        "Where do the joules go?",
        "Mean joules per sample. What is not known is left out, never drawn as 0.",
    ),
    "energy_distribution": (
        "Is the mean carried by a few batches?",
        "Not where the diamond, the mean, lies inside the box, the middle half of the batches. The meter "
        "sees whole batches, so no sample of one is shown alone. A saving that is real moves the whole box.",
    ),
    "latency": (
        "How long does a batch take, and how long the slowest?",
        "Wall time of generated batches: every sample of a batch waits for all of it.",
    ),
    "budget": (
        "Is the budget kept?",
        "1 is E_max, and what lies to its left, or below it, is within the budget. The budget is decided on "
        "predicted joules; the meter has the last word on them. Configurations without E_max are not shown.",
    ),
    "length": (
        "How do joules grow with length?",
        "Points are repetitions of profile runs, lines join their means.",
    ),
    "depth": (
        "Which layers were kept, quantised or left out?",
        "Bars: the share of a layer's directions in each state over all tokens. Columns, where a budget "
        "covers the network: the states of the layer's own attention and MLP.",
    ),
    "position": (
        "When are directions used?",
        "Shares of the states along the prompt (in tenths) and along the answer (by tokens).",
    ),
    "confusion": (
        "Which labels are taken for which?",
        "Percent of the samples of each true label; the diagonal is right.",
    ),
    "learning_loss": (
        "Had the loss settled?",
        "Where a line still falls at its end, training was short. Without the budget's part.",
    ),
    "learning_budget": (
        "How was the budget reached, and how hard did it press?",
        "Top: joules as the gates decide, over E_max; 1 is the budget. Bottom: the multiplier weighs energy "
        "against task loss; where it still moves, training was short.",
    ),
    "meter": (
        "How far can the joules themselves be trusted?",
        "A saving smaller than what two runs of one model differ by is none. Where the joules lie far from "
        "the energy model's prediction, one of the two is wrong.",
    ),
}
"""The question, and how to read the answer."""
