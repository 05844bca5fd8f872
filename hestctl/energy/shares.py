"""Joules that no window can hold: shares of a batch, and the two phases of a sample."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hestctl.energy.model import PhaseJoules
from hestctl.energy.protocol import Unavailable

_LEAST_ANGLE = 1e-4


def apportion(total_j: float, error_j: float, weights: Sequence[float]) -> list[tuple[float, float]]:
    """Splits a batch's joules among its samples in proportion to ``weights``: ``(joules, error_j)`` each.

    The rule is a convention: the meter saw the batch only. Errors are split by the same shares, for an error
    of the total moves every share alike; the shares and their errors add up to ``total_j`` and ``error_j``.
    Raises ValueError for weights that are negative, not finite, or all zero.
    """
    whole = math.fsum(weights)
    if not math.isfinite(whole) or whole <= 0 or min(weights) < 0:
        raise ValueError("weights must be finite, not negative, and not all zero")
    return [(total_j * (weight / whole), error_j * (weight / whole)) for weight in weights]


@dataclass(frozen=True, slots=True)
class Share:
    """One sample's part of its batch (J); phases and error are None where they are not known."""

    energy_j: float
    error_j: float | None
    prefill_j: float | None = None
    decode_j: float | None = None


def share_batch(
    total_j: float,
    error_j: float | None,
    prompt_tokens: Sequence[int],
    new_tokens: Sequence[int],
    phases: PhaseJoules | None,
) -> list[Share]:
    """Splits a batch's joules among its samples, and each sample's among its phases.

    The rule: ``phases``, the energy model's prediction for the batch, says in what proportion prefill and
    decode share ``total_j``; then prompt tokens divide the prefill's joules, and new tokens the decode's.
    A batch without new tokens, whose labels were scored, has no decode. Without a prediction every token,
    prompt or new, weighs the same, and the phases are not told apart.
    """
    bound_j = error_j or 0.0

    def share(joules: float, bound: float, *split_j: float) -> Share:
        return Share(joules, None if error_j is None else bound, *split_j)

    if phases is None:
        weights = [p + n for p, n in zip(prompt_tokens, new_tokens, strict=True)]
        return [share(joules, bound) for joules, bound in apportion(total_j, bound_j, weights)]
    prefill, decode = apportion(total_j, bound_j, phases)
    prefills = apportion(*prefill, prompt_tokens)
    decodes = apportion(*decode, new_tokens) if any(new_tokens) else [(0.0, 0.0)] * len(prompt_tokens)
    return [
        share(p_j + d_j, p_e + d_e, p_j, d_j)
        for (p_j, p_e), (d_j, d_e) in zip(prefills, decodes, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class PhaseSplit:
    """Joules per prompt token and per new token, each with its standard error (J), over ``samples``."""

    prompt_j_per_token: float
    prompt_error_j: float
    new_j_per_token: float
    new_error_j: float
    samples: int


def split_phases(rows: Iterable[tuple[int, int, float]]) -> PhaseSplit | Unavailable:
    """Regresses joules on tokens over samples: ``(prompt_tokens, new_tokens, joules)`` each.

    Ordinary least squares of ``joules = a * prompt + b * new`` without a constant, so that the phases add
    up to the sample; standard errors from the residuals with n - 2 degrees of freedom (normal equations).
    ``Unavailable`` with the reason where the two cannot be told apart: fewer than three samples, lengths in
    one proportion throughout, or a fit that gives a phase negative joules.
    """
    samples = list(rows)
    if len(samples) < 3:
        return Unavailable(f"{len(samples)} samples; telling the phases apart takes at least 3")
    pp = math.fsum(p * p for p, _, _ in samples)
    nn = math.fsum(n * n for _, n, _ in samples)
    pn = math.fsum(p * n for p, n, _ in samples)
    determinant = pp * nn - pn * pn
    if determinant <= _LEAST_ANGLE * pp * nn:
        return Unavailable("prompt and new tokens stand in one proportion in all samples; vary the lengths")
    pe = math.fsum(p * e for p, _, e in samples)
    ne = math.fsum(n * e for _, n, e in samples)
    prompt = (nn * pe - pn * ne) / determinant
    new = (pp * ne - pn * pe) / determinant
    if prompt < 0 or new < 0:
        phase = "prompt" if prompt < 0 else "new"
        return Unavailable(f"the fit gives negative joules per {phase} token; more samples or lengths needed")
    squares = math.fsum((e - prompt * p - new * n) ** 2 for p, n, e in samples)
    variance = squares / (len(samples) - 2)
    return PhaseSplit(
        prompt_j_per_token=prompt,
        prompt_error_j=math.sqrt(variance * nn / determinant),
        new_j_per_token=new,
        new_error_j=math.sqrt(variance * pp / determinant),
        samples=len(samples),
    )
