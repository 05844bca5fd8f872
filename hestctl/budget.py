"""The budget: E_max per sample, the energy expected of a sample, and the multiplier between them.

Pure functions and small values; joules come in from the energy table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hestctl.errors import Exit, HestError


@dataclass(frozen=True, slots=True)
class Budget:
    """E_max in joules per generated sample (adapter scope: the joules of the directions alone).

    ``origin`` says where the number comes from and is printed with it. ``new_tokens`` is what a
    sample is expected to generate; training lengths are translated to generation with it.
    """

    emax_j: float
    origin: str
    ratio: float | None
    new_tokens: float
    max_new_tokens: int
    num_beams: int

    def most_work(self, prompt_tokens: int) -> int:
        """Token positions of a sample that never stops by itself."""
        return self.num_beams * (prompt_tokens + self.max_new_tokens)

    def work(self, prompt_tokens: float) -> float:
        """Token positions one generated sample runs through the layers, beams included."""
        return self.num_beams * (prompt_tokens + self.new_tokens)


@dataclass(frozen=True, slots=True)
class Reference:
    """What a reference run (TABS) spent: states applied per sample, and new tokens per sample."""

    run_id: str
    int8_per_sample: float
    full_per_sample: float
    new_tokens: float


def resolve_budget(
    *,
    emax_j: float | None,
    emax_ratio: float | None,
    reference: Reference | None,
    costs_j: Sequence[float],
    predicted_j: float,
    max_new_tokens: int,
    num_beams: int,
) -> Budget:
    """E_max outright, or a ratio of the reference run, or a ratio of the prediction (marked so).

    The reference's logged states are priced with today's energy table, so that both sides of the
    ratio use the same joules. ``predicted_j`` is the model's figure for TABS, in joules per sample.
    Raises HestError (usage) when neither a number nor a ratio is given.
    """
    if emax_j is not None:
        return Budget(emax_j, "given by --emax", None, max_new_tokens, max_new_tokens, num_beams)
    if emax_ratio is None:
        raise HestError("hest needs a budget", "give --emax-ratio 0.6 (of TABS) or --emax JOULES", Exit.USAGE)
    if reference is not None:
        spent = reference.int8_per_sample * costs_j[1] + reference.full_per_sample * costs_j[2]
        origin = f"{emax_ratio:g} x tabs run {reference.run_id}"
        return Budget(emax_ratio * spent, origin, emax_ratio, reference.new_tokens, max_new_tokens, num_beams)
    origin = f"{emax_ratio:g} x TABS, predicted: no comparable tabs run in the store"
    return Budget(emax_ratio * predicted_j, origin, emax_ratio, max_new_tokens, max_new_tokens, num_beams)


def predicted_tabs_j(work_tokens: float, layers: int, rank: int, full_j: float) -> float:
    """Joules per sample of TABS before any run of it is known: half of all directions open.

    Half is what an untrained linear controller opens (its logits are symmetric about zero).
    """
    return 0.5 * work_tokens * layers * rank * full_j


@dataclass(slots=True)
class Multiplier:
    """The Lagrange multiplier of ``task + weight * (E / E_max - 1)``, moved once an optimiser step.

    ``plain``: one dual-ascent step, lambda += alpha * (E / E_max - 1). ``clamp``: the same, projected
    to lambda >= 0 as an inequality asks. ``pi``: clamp, and the excess itself added to the weight, as
    in the augmented Lagrangian of Hestenes and Powell; the excess counts both ways, so that joules
    the budget allows are used by training and not handed out afterwards by repair. ``none``: lambda
    stays, a fixed soft penalty.
    """

    value: float
    alpha: float
    kind: Literal["plain", "clamp", "pi", "none"]
    excess: float = 0.0
    """The last observed E / E_max - 1."""

    @property
    def weight(self) -> float:
        """What the energy term of the loss is multiplied with."""
        return self.value + self.excess if self.kind == "pi" else self.value

    def step(self, ratio: float) -> None:
        """Move by one observed E / E_max."""
        self.excess = ratio - 1.0
        if self.kind == "none":
            return
        self.value += self.alpha * self.excess
        if self.kind != "plain":
            self.value = max(self.value, 0.0)
