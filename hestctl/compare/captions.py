"""What each figure answers and how to read it, by its topic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_BUDGET: Final = (
    "Points are samples, joules in scope as the energy table predicts them; the level or rising line is "
    "E_max: a point above it is a sample over its budget. The dashed line is what TABS takes."
)
_LEARNING: Final = "Thin lines are seeds, bold ones their mean. "

CAPTIONS: Final[Mapping[str, tuple[str, str]]] = {
    "energy": (
        "Who spends the fewest joules per sample at equal quality?",
        "Means over the test samples with 95 % intervals, the least at the top. Filled where the quality is "
        "not inferior to the best baseline, hollow where that is not shown.",
    ),
    "front": (
        "What does a saving cost in quality?",
        "Up and to the left is better; small marks are seeds. Where two vertical bars overlap, this figure "
        "does not tell the two apart; the gap table compares sample by sample and is the sharper of the two.",
    ),
    "parts": (
        "Where do the joules go?",
        "Mean joules per sample by phase and by cause. What was not measured is left out, never drawn as 0.",
    ),
    "energy_distribution": (
        "Is the mean carried by a few samples?",
        "Points are samples, boxes quartiles. Compare whole boxes: a saving that is real moves all of them.",
    ),
    "latency": (
        "How long does a sample take, and how long the slowest?",
        "Points are samples, boxes quartiles, the long bar the 99th percentile where there are enough "
        "samples.",
    ),
    "budget_adapter": ("Is the budget over the directions alone kept at every length?", _BUDGET),
    "budget_network": ("Is the budget over the whole generation kept at every length?", _BUDGET),
    "length": (
        "How do joules grow with length?",
        "Points are repetitions of profile runs, lines join their means.",
    ),
    "depth": (
        "Which layers were kept, quantised or left out?",
        "Shares of a layer's directions in each state over all tokens, and the states of its own two blocks.",
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
        _LEARNING + "Task loss in nats a token, without the budget's part.",
    ),
    "learning_energy": (
        "How was the budget reached?",
        _LEARNING + "Joules as the gates decide, predicted, over E_max: 1 is the budget.",
    ),
    "learning_multiplier": (
        "How hard did the budget press?",
        _LEARNING
        + "The multiplier weighs energy against task loss; where it still moves, training was short.",
    ),
    "meter": (
        "How far can the joules themselves be trusted?",
        "The meter's error bound beside its joules, windows that do not count, and window lengths against "
        "the counter's own step, run by run. A saving smaller than what A/A pairs differ by is none.",
    ),
}
"""The question, and how to read the answer."""
