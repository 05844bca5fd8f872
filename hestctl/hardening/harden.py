"""Hardening: soft gates to a plan whose energy fits E_max, checked on reference prompts.

Shape legend: B batch, T tokens, D hidden size, L layers, R directions, S = 3 states.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hestctl.budget import Bill, Budget
from hestctl.data.prompts import Encoded, train_batch
from hestctl.energy.model import Terms
from hestctl.energy.table import EnergyTable
from hestctl.hardening.fold import fold
from hestctl.hardening.network import Blocks, settle
from hestctl.hardening.plan import PLAN_VERSION, Energies, Plan
from hestctl.hardening.repair import Lengths
from hestctl.model.backbone import Backbone
from hestctl.model.blocks import Int8Codes, in_states
from hestctl.model.gates import OrdinalGate
from hestctl.model.spectral import SpectralAdapters, applied, normalise
from hestctl.records import FULL, BlockStates
from hestctl.settings import GenerationSettings, Scope

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
    prompt_tokens: int
    tokens: int
    work: float
    """Token positions its generation is expected to run, over those of the sequence."""


def harden(
    backbone: Backbone,
    adapters: SpectralAdapters,
    rows: Sequence[Encoded],
    *,
    run_id: str,
    method: str,
    scope: Scope = "adapter",
    table: EnergyTable,
    budget: Budget | None,
    margin: float,
    generation: GenerationSettings,
    blocks: Blocks | None = None,
    bound: tuple[int, int] = (1, 4096),
) -> Plan:
    """Decide the plan of a trained adapter on reference prompts (the validation split).

    In scope network the states of the blocks come first (``repair.mend``), and the prompts run in them. Then
    the thresholds of an ordinal gate change in place by the shift that the plan records. In scope adapter
    repair moves all of them together, down where the budget is left unused, up where it is exceeded, until
    the mean hardened energy reaches 0.975 of E_max or nothing is left to open; in scope network up alone,
    where directions ask for more than the blocks leave: to open more would spend next to nothing. The ledger
    then bounds every single sample. Without a budget (tabs, bhsp) the plan records decisions and energy and
    binds nothing.

    ``blocks`` None: all full. ``bound``: the prompt tokens between which the plan must fit. Raises HestError:
    exit 5 where no plan fits, naming the least budget that one does, usage for what was not calibrated.
    """
    layers = adapters.shape[0]
    if blocks is None:
        blocks = Blocks(BlockStates.uniform(layers))
    codes = Int8Codes()
    lengths = Lengths.of([len(row.prompt_ids) for row in rows], budget, generation.new_tokens, bound)

    def look(states: BlockStates) -> list[_Look]:
        return [_look(backbone, adapters, row, budget, table, states, codes) for row in rows]

    looks = look(blocks.decided)
    plan = Plan(
        version=PLAN_VERSION,
        run_id=run_id,
        method=method,
        scope=scope,
        envelope=None if budget is None else budget.envelope,
        backbone=backbone.name,
        fingerprint=backbone.fingerprint,
        device_name=table.device_name,
        calibration_id=table.calibration_id,
        table_key=table.key,
        energy_kind=table.kind,
        costs_j=table.costs_j,
        uses_int8=adapters.uses_int8,
        emax_j=None if budget is None else budget.emax_j,
        emax_origin=None if budget is None else budget.origin,
        margin=margin,
        batch_size=generation.batch_size,
        num_beams=generation.num_beams,
        max_new_tokens=generation.new_tokens,
        bound=lengths.bound,
        bills=(Bill(1, 1, Terms.zero(), None),) if budget is None else budget.bills,
        blocks=blocks.decided,
        pace=tuple([1 / layers] * layers),
        order=tuple(tuple(r) for r in adapters.importance().argsort(dim=1, descending=True).tolist()),
        shift=0.0,
        energies=None,
        sensitivities=None if blocks.sensitivities is None else blocks.sensitivities.kind,
    )
    expected = decided = Terms.zero()
    if scope == "network":
        open_j = _mean(_price(x.state_LTR, plan) / x.tokens for x in looks)
        if budget is not None:
            # Where all directions at once cost next to nothing, room for them spares every token its ledger.
            all_j = layers * adapters.shape[2] * table.costs_j[FULL]
            sample_j = all_j * generation.num_beams * (lengths.prompt_tokens + lengths.new_tokens)
            open_j = all_j if sample_j <= margin * budget.emax_j else open_j
        found = settle(table.model, plan, budget, blocks, adapters.gate.kind, open_j, lengths)
        plan, expected, decided = found.plan, found.expected, found.decided
    expected_j = _mean(
        _base_j(expected, x, plan, lengths) + x.work * float(x.expected_L.sum()) for x in looks
    )
    decided_j = _mean(_base_j(decided, x, plan, lengths) + x.work * _price(x.state_LTR, plan) for x in looks)
    if plan.blocks != blocks.decided:
        looks = look(plan.blocks)
    if budget is not None and isinstance(adapters.gate, OrdinalGate):
        plan = _repair(adapters.gate, looks, plan, lengths)
        if plan.shift:
            looks = look(plan.blocks)
        plan, looks = _fold(adapters.gate, looks, plan, lengths)
    hardened = _hardened_j(looks, plan, lengths)
    energies = Energies(expected_j, decided_j, _mean(hardened), max(hardened), len(looks))
    if budget is not None:
        emax = [_emax_j(x, plan, lengths) for x in looks]
        ratios = [j / most for j, most in zip(hardened, emax, strict=True)]
        energies = replace(energies, emax_j=_mean(emax), worst_ratio=max(ratios))
    return replace(plan, energies=energies)


@torch.inference_mode()
def _look(
    backbone: Backbone,
    adapters: SpectralAdapters,
    row: Encoded,
    budget: Budget | None,
    table: EnergyTable,
    blocks: BlockStates,
    codes: Int8Codes,
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

    with in_states(backbone.layers, blocks, codes), applied(backbone.layers, look):
        backbone.model.model(
            input_ids=batch.input_ids.to(backbone.device),
            attention_mask=batch.attention_mask.to(backbone.device),
            use_cache=False,
        )
    order = range(layers)
    return _Look(
        torch.stack([scores[i] for i in order]) if scores else None,
        torch.stack([expected[i] for i in order]),
        torch.stack([states[i] for i in order]),
        len(row.prompt_ids),
        tokens,
        1.0 if budget is None else budget.work(len(row.prompt_ids)) / tokens,
    )


def _repair(gate: OrdinalGate, looks: list[_Look], plan: Plan, lengths: Lengths) -> Plan:
    """Shift all thresholds by one number, found on the recorded scores, and pace the layers.

    What the gates ask for falls as the shift rises, so a shift for any demand is found by bisection.
    What the ledger lets through does not follow it so simply (a token that is cut may leave a part of
    its purse unused), hence several demands are tried and the one nearest to the aim is taken. Where
    the gates already sit inside the band, what training found stays as it is.
    """
    scored = [(look, look.score_LT) for look in looks if look.score_LT is not None]

    def shifted(shift: float) -> list[_Look]:
        return [replace(look, state_LTR=_decide(gate, score, shift)) for look, score in scored]

    def asked_j(asked: Iterable[_Look]) -> float:
        return _mean(look.work * _price(look.state_LTR, plan) for look in asked)

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
            low, high = (middle, high) if asked_j(shifted(middle)) > demand_j else (low, middle)
        return high

    kept_j, best = paced(0.0)
    base = plan.bill(plan.batch_size, plan.num_beams).base
    left_j = max(0.0, _mean(_emax_j(x, plan, lengths) - _base_j(base, x, plan, lengths) for x in looks))
    if plan.scope == "network":
        left_j *= 1 - plan.margin
        enough = kept_j >= 0.95 * min(left_j, asked_j(look for look, _ in scored))
    else:
        enough = 0.95 * left_j <= kept_j <= left_j
    if not enough:
        # In scope network nobody is made to ask for more than they do.
        most_j = asked_j(look for look, _ in scored) if plan.scope == "network" else math.inf
        tries = [paced(shift_for(min(demand * left_j, most_j))) for demand in _DEMANDS]
        _, best = min(tries, key=lambda found: abs(found[0] - _AIM * left_j))
    with torch.no_grad():
        gate.threshold.add_(best.shift)
    return best


def _fold(gate: OrdinalGate, looks: list[_Look], plan: Plan, lengths: Lengths) -> tuple[Plan, list[_Look]]:
    """Fix the directions that no token moves, unless what that opens is more than E_max allows."""
    before = gate.threshold.detach().clone()
    fixed = fold(gate, torch.cat([look.state_LTR for look in looks], 1))
    scored = [(look, look.score_LT) for look in looks if look.score_LT is not None]
    folded = [replace(look, state_LTR=_decide(gate, score, 0.0)) for look, score in scored]
    tried = replace(plan, fixed=fixed)
    if _mean(_hardened_j(folded, tried, lengths)) > _mean(_emax_j(look, plan, lengths) for look in looks):
        with torch.no_grad():
            gate.threshold.copy_(before)
        return plan, looks
    return tried, folded


@torch.inference_mode()
def _decide(gate: OrdinalGate, score_LT: Tensor, shift: float) -> Tensor:
    """States (L, T, R) that the gate would take with all thresholds shifted."""
    score_LT = score_LT.to(gate.threshold.device)
    return gate.decided(score_LT, (gate.threshold + shift)[:, None], gate.gap[:, None]).cpu()


def _hardened_j(looks: Sequence[_Look], plan: Plan, lengths: Lengths) -> list[float]:
    """Joules of each sample's whole generation in the plan's scope, under the ledger."""
    base = plan.bill(plan.batch_size, plan.num_beams).base
    return [_base_j(base, look, plan, lengths) + _under_ledger(look, plan) for look in looks]


def _under_ledger(look: _Look, plan: Plan) -> float:
    """Joules of its directions in a generation like this sequence, once the ledger has cut what it must."""
    states = look.state_LTR
    if plan.emax_j is not None:
        whole = [look.prompt_tokens] * plan.batch_size
        allowance = plan.allowances_j(whole, plan.max_new_tokens, plan.num_beams)[0]
        ledger = plan.ledger_of([allowance], states.device)
        real = torch.ones(1, states.shape[1], dtype=torch.bool)
        states = torch.stack([ledger.allow(i, layer[None], real)[0] for i, layer in enumerate(states)])
    return look.work * _price(states, plan)


def _base_j(base: Terms, look: _Look, plan: Plan, lengths: Lengths) -> float:
    """A sample's share of a batch's base (J), at the prompt of this sequence and the new tokens expected."""
    batch_size = plan.bill(plan.batch_size, plan.num_beams).batch_size
    return base.total_j(look.prompt_tokens, lengths.new_tokens) / batch_size


def _emax_j(look: _Look, plan: Plan, lengths: Lengths) -> float:
    bill = plan.bill(plan.batch_size, plan.num_beams)
    assert bill.emax is not None
    emax = bill.emax.of(bill.batch_size)
    return emax.total_j(look.prompt_tokens, lengths.new_tokens) / bill.batch_size


def _price(state_LTR: Tensor, plan: Plan) -> float:
    return float(_layer_price(state_LTR, plan).sum())


def _layer_price(state_LTR: Tensor, plan: Plan) -> Tensor:
    return torch.tensor(plan.costs_j, dtype=torch.float64)[state_LTR].sum((1, 2))


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
