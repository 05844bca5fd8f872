"""The certificate of a plan: the bound it holds at each length, from the very incomes of its ledger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hestctl.budget import Bill, allowance_j, by_new_tokens
from hestctl.hardening.ledger import incomes
from hestctl.hardening.plan import Plan
from hestctl.hardening.repair import grid

LENGTHS = (128, 256, 512, 1024, 2048, 4096)


def certificate(plan: Plan, lengths: Sequence[int] = LENGTHS) -> list[dict[str, Any]]:
    """The bound (J a sample) at each length and batch: what may be spent, E_max, and one over the other.

    In scope adapter ``length_tokens`` are the token positions of a sample, all in all; in scope network
    prompt tokens, and ``new_tokens`` follow them. ``open_share`` is the part of all directions that the
    income affords at that length. Empty where no budget binds.
    """
    if plan.emax_j is None:
        return []
    if plan.scope == "adapter":
        bill = plan.bill(1, None)
        return [_row(plan, bill, length, 0) for length in lengths]
    return [_row(plan, bill, length, plan.max_new_tokens) for bill in plan.bills for length in lengths]


def worst(plan: Plan) -> dict[str, Any] | None:
    """The row of the batch, prompt and number of new tokens where the plan's base takes most of E_max.

    None where no budget binds, or the scope has no base.
    """
    if plan.emax_j is None or plan.scope == "adapter":
        return None
    found: list[tuple[float, Bill, int, int]] = []
    for bill in plan.bills:
        assert bill.emax is not None
        emax = bill.emax.of(bill.batch_size)
        for prompt in grid(plan.bound):
            new_tokens = plan.max_new_tokens
            share_N = by_new_tokens(bill.base, prompt, new_tokens) / by_new_tokens(emax, prompt, new_tokens)
            found.append((float(share_N.max()), bill, prompt, int(share_N.argmax()) + 1))
    _, bill, prompt, new_tokens = max(found, key=lambda one: one[0])
    return _row(plan, bill, prompt, new_tokens)


def _row(plan: Plan, bill: Bill, length: int, new_tokens: int) -> dict[str, Any]:
    requests, beams, rank = bill.batch_size, bill.num_beams, len(plan.order[0])
    assert bill.emax is not None
    pace_L = torch.tensor(plan.pace, dtype=torch.float64)
    allowance = allowance_j(bill.spare(requests, plan.margin), requests, beams, length, new_tokens)
    income_L1 = incomes(torch.tensor([allowance], dtype=torch.float64), pace_L, rank, plan.tariff)
    positions = beams * (length + new_tokens)
    units = int(((income_L1 * positions) >> 20).sum())
    everything = positions * len(plan.pace) * rank * plan.tariff.full
    directions_j = min(units, everything) * plan.tariff.unit_j
    base_j, emax_j = (
        terms.total_j(length, new_tokens) / requests for terms in (bill.base, bill.emax.of(requests))
    )
    bound_j = base_j + directions_j
    return {
        "batch_size": requests if plan.scope == "network" else None,
        "num_beams": beams if plan.scope == "network" else None,
        "length_tokens": length,
        "new_tokens": new_tokens,
        "bound_j": bound_j,
        "emax_j": emax_j,
        "bound_over_emax": bound_j / emax_j,
        "open_share": min(1.0, units / everything),
    }
