"""Hardening: soft gates to a plan whose energy fits E_max, checked on reference prompts.

Shape legend: B batch, T tokens, D hidden size, L layers, R directions, S = 3 states.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hestctl.budget import Budget
from hestctl.data.prompts import Encoded, train_batch
from hestctl.energy.table import EnergyTable
from hestctl.hardening.plan import PLAN_VERSION, Energies, Plan
from hestctl.model.backbone import Backbone
from hestctl.model.gates import OrdinalGate
from hestctl.model.spectral import SpectralAdapters, applied, normalise

_AIM = 0.975
"""Share of E_max that repair aims at, the middle of the band 0.95 to 1.00."""
_DEMANDS = (0.975, 1.0, 1.03, 1.1, 1.3, 2.0)
"""What the gates are made to ask for, as shares of E_max, when repair looks for its shift."""


@dataclass(frozen=True, slots=True)
class _Look:
    """What one reference sequence showed: probabilities and decisions of every layer."""

    score_LT: Tensor | None
    expected_L: Tensor
    state_LTR: Tensor
    work: float
    """Token positions its generation is expected to run, over those of the sequence."""
    cap: int
    """The most token positions its generation can run: what the ledger spreads E_max over."""


def harden(
    backbone: Backbone,
    adapters: SpectralAdapters,
    rows: Sequence[Encoded],
    *,
    run_id: str,
    method: str,
    table: EnergyTable,
    budget: Budget | None,
    margin: float,
) -> Plan:
    """Decide the plan of a trained adapter on reference prompts (the validation split).

    Changes the thresholds of an ordinal gate in place by the shift that the plan records: repair
    moves all of them together, down where the budget is left unused, up where it is exceeded, until
    the mean hardened energy reaches 0.975 of E_max or nothing is left to open. The ledger then
    bounds every single sample. Without a budget (tabs, bhsp) the plan records decisions and energy
    and binds nothing.
    """
    layers = adapters.shape[0]
    looks = [_look(backbone, adapters, row, budget, table) for row in rows]
    plan = Plan(
        version=PLAN_VERSION,
        run_id=run_id,
        method=method,
        scope="adapter",
        backbone=backbone.name,
        fingerprint=backbone.fingerprint,
        device_name=table.device_name,
        calibration_id=table.calibration_id,
        energy_kind=table.kind,
        costs_j=table.costs_j,
        uses_int8=adapters.uses_int8,
        emax_j=None if budget is None else budget.emax_j,
        emax_origin=None if budget is None else budget.origin,
        margin=margin,
        pace=tuple([1 / layers] * layers),
        order=tuple(tuple(r) for r in adapters.importance().argsort(dim=1, descending=True).tolist()),
        shift=0.0,
        energies=None,
    )
    expected_j = _mean(look.work * float(look.expected_L.sum()) for look in looks)
    decided_j = _mean(look.work * _price(look.state_LTR, plan) for look in looks)
    if budget is not None and isinstance(adapters.gate, OrdinalGate):
        plan = _repair(adapters.gate, looks, plan, budget.emax_j)
        looks = [_look(backbone, adapters, row, budget, table) for row in rows]
    hardened = [_under_ledger(look, plan) for look in looks]
    return replace(plan, energies=Energies(expected_j, decided_j, _mean(hardened), max(hardened), len(looks)))


@torch.inference_mode()
def _look(
    backbone: Backbone, adapters: SpectralAdapters, row: Encoded, budget: Budget | None, table: EnergyTable
) -> _Look:
    layers = adapters.shape[0]
    batch = train_batch([row], backbone.pad_id)
    tokens = batch.input_ids.shape[1]
    scores: dict[int, Tensor] = {}
    states: dict[int, Tensor] = {}
    expected: dict[int, Tensor] = {}
    price_S = torch.tensor(table.costs_j, dtype=torch.float64)

    def look(layer: int, hidden_BTD: Tensor) -> Tensor:
        x_BTD = normalise(hidden_BTD)
        gate = adapters.gate
        draw = gate.draw(x_BTD, layer, None)
        if isinstance(gate, OrdinalGate):
            scores[layer] = gate.scores(x_BTD, layer)[0].cpu()
        states[layer] = gate.decide(x_BTD, layer)[0].cpu()
        expected[layer] = (draw.probability_BTRS.double().sum((0, 1, 2)).cpu() * price_S).sum()
        return hidden_BTD + adapters.delta(x_BTD, layer, draw.state_BTRS)

    with applied(backbone.layers, look):
        backbone.model.model(
            input_ids=batch.input_ids.to(backbone.device),
            attention_mask=batch.attention_mask.to(backbone.device),
            use_cache=False,
        )
    order = range(layers)
    work = 1.0 if budget is None else budget.work(len(row.prompt_ids)) / tokens
    cap = tokens if budget is None else budget.most_work(len(row.prompt_ids))
    return _Look(
        torch.stack([scores[i] for i in order]) if scores else None,
        torch.stack([expected[i] for i in order]),
        torch.stack([states[i] for i in order]),
        work,
        cap,
    )


def _repair(gate: OrdinalGate, looks: list[_Look], plan: Plan, emax_j: float) -> Plan:
    """Shift all thresholds by one number, found on the recorded scores, and pace the layers.

    What the gates ask for falls as the shift rises, so a shift for any demand is found by bisection.
    What the ledger lets through does not follow it so simply (a token that is cut may leave a part of
    its purse unused), hence several demands are tried and the one nearest to the aim is taken. Where
    the gates already sit inside the band, what training found stays as it is.
    """
    scored = [(look, look.score_LT) for look in looks if look.score_LT is not None]

    def shifted(shift: float) -> list[_Look]:
        return [replace(look, state_LTR=_decide(gate, score, shift)) for look, score in scored]

    def paced(shift: float) -> tuple[float, Plan]:
        asked = shifted(shift)
        asked_L = torch.stack([_layer_price(look.state_LTR, plan) for look in asked]).sum(0)
        # A layer that asks for nothing keeps a sliver, so that no share is zero.
        pace_L = asked_L.clamp_min(asked_L.sum().clamp_min(1e-30) * 1e-4)
        tried = replace(plan, pace=tuple((pace_L / pace_L.sum()).tolist()), shift=shift)
        return _mean(_under_ledger(look, tried) for look in asked), tried

    def shift_for(demand_j: float) -> float:
        low, high = -20.0, 20.0
        for _ in range(24):
            middle = (low + high) / 2
            asked_j = _mean(look.work * _price(look.state_LTR, plan) for look in shifted(middle))
            low, high = (middle, high) if asked_j > demand_j else (low, middle)
        return high

    kept_j, best = paced(0.0)
    if not 0.95 * emax_j <= kept_j <= emax_j:
        tries = [paced(shift_for(demand * emax_j)) for demand in _DEMANDS]
        _, best = min(tries, key=lambda found: abs(found[0] - _AIM * emax_j))
    with torch.no_grad():
        gate.threshold.add_(best.shift)
    return best


@torch.inference_mode()
def _decide(gate: OrdinalGate, score_LT: Tensor, shift: float) -> Tensor:
    """States (L, T, R) that the gate would take with all thresholds shifted."""
    logits = gate.logits_of(
        score_LT.to(gate.threshold.device), (gate.threshold + shift)[:, None], gate.gap[:, None]
    )
    return logits.argmax(-1).cpu()


def _under_ledger(look: _Look, plan: Plan) -> float:
    """Joules of a generation like this sequence once the plan's ledger has cut what it must."""
    states = look.state_LTR
    ledger = plan.ledger(torch.tensor([look.cap]))
    if ledger is not None:
        real = torch.ones(1, states.shape[1], dtype=torch.bool)
        states = torch.stack([ledger.allow(i, layer[None], real)[0] for i, layer in enumerate(states)])
    return look.work * _price(states, plan)


def _price(state_LTR: Tensor, plan: Plan) -> float:
    return float(_layer_price(state_LTR, plan).sum())


def _layer_price(state_LTR: Tensor, plan: Plan) -> Tensor:
    return torch.tensor(plan.costs_j, dtype=torch.float64)[state_LTR].sum((1, 2))


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
