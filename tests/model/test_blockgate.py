"""The gate of whole blocks: where it starts, and that what is settled stays so.

Shape legend: L layers, 2 blocks (attention, MLP), S = 3 states.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hestctl.model.blockgate import BlockGate
from hestctl.records import FULL, INT8, OFF, BlockStates


def uniform(generator: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def states_of(state_L2: Tensor) -> BlockStates:
    attention, mlp = state_L2.T.tolist()
    return BlockStates(tuple(attention), tuple(mlp))


def drawn(seed: int, layers: int = 7) -> tuple[BlockGate, Tensor, torch.Generator]:
    """A gate as training may leave it, and the layer scores that it sees."""
    generator = torch.Generator().manual_seed(seed)
    gate, score_L = BlockGate(layers), uniform(generator, layers)
    full_L2 = uniform(generator, layers, 2, low=-3, high=3)
    gate.start(score_L, full_L2, full_L2 + uniform(generator, layers, 2, low=0.01, high=4))
    return gate, score_L, generator


def test_it_starts_with_the_margins_it_is_told() -> None:
    score_L = torch.tensor([0.2, 0.5, 0.6])
    full_L2 = torch.tensor([[0.5, -0.5], [-2.0, 1.5], [0.1, -0.1]])
    on_L2 = torch.tensor([[1.0, 0.5], [-1.0, 2.0], [0.2, -0.05]])
    gate = BlockGate(3)
    gate.start(score_L, full_L2, on_L2)
    logits = gate.logits(score_L) / gate.log_beta.exp()
    assert torch.allclose(logits[..., OFF], torch.zeros(3, 2))
    assert torch.allclose(logits[..., INT8], on_L2, atol=1e-5)
    assert torch.allclose(logits[..., FULL] - logits[..., INT8], full_L2, atol=1e-5)
    assert logits.argmax(-1).tolist() == [[FULL, INT8], [OFF, FULL], [FULL, OFF]]


def test_scores_that_are_all_alike_start_it_too() -> None:
    gate, score_L = BlockGate(3), torch.zeros(3)
    gate.start(score_L, torch.full((3, 2), 0.5), torch.full((3, 2), 1.0))
    assert torch.isfinite(gate.logits(score_L)).all()
    assert gate.logits(score_L).argmax(-1).tolist() == [[FULL, FULL]] * 3


def test_until_it_is_settled_a_higher_score_asks_for_more() -> None:
    gate, score_L, _ = drawn(0)
    states = [gate.logits(score_L + shift).argmax(-1) for shift in (-5.0, -0.2, 0.0, 0.2, 5.0)]
    assert all((later >= earlier).all() for earlier, later in pairwise(states))
    assert (states[0] == OFF).all()
    assert (states[-1] == FULL).all()


@pytest.mark.parametrize("seed", range(20))
def test_any_states_can_be_settled_and_hold_however_the_scores_move(seed: int) -> None:
    gate, score_L, generator = drawn(seed)
    if seed % 2:
        score_L = uniform(generator, 7)  # training has moved them since the start
    wanted_L2 = torch.randint(3, (7, 2), generator=generator)
    gate.settle(score_L, states_of(wanted_L2))
    assert all(torch.isfinite(parameter).all() for parameter in gate.parameters())
    for scores in (score_L, uniform(generator, 7), score_L - 10, score_L + 10):
        logits = gate.logits(scores)
        assert torch.isfinite(logits).all()
        assert torch.equal(logits.argmax(-1), wanted_L2)
        decided, other = logits.topk(2).values.unbind(-1)
        assert (decided - other > 0.01).all(), "decided, not a matter of rounding"


@pytest.mark.parametrize("seed", range(5))
def test_margins_that_agree_are_kept(seed: int) -> None:
    gate, score_L, generator = drawn(seed)
    before = gate.logits(score_L).detach()
    # What is settled differs in a few blocks from what the gate says.
    change_L2 = uniform(generator, 7, 2) < 0.3
    wanted_L2 = torch.where(change_L2, torch.randint(3, (7, 2), generator=generator), before.argmax(-1))
    agree_L2 = wanted_L2 == before.argmax(-1)
    margin_L2S = before / gate.log_beta.detach().exp()
    clear_L2 = (margin_L2S.topk(2).values @ torch.tensor([1.0, -1.0])).abs() > 0.06
    kept_L2 = agree_L2 & clear_L2
    assert kept_L2.sum() >= 5
    assert not agree_L2.all()
    gate.settle(score_L, states_of(wanted_L2))
    after = gate.logits(score_L)
    kept_S, before_S = after[kept_L2] / gate.log_beta.exp(), margin_L2S[kept_L2]
    assert torch.allclose(kept_S, before_S, atol=1e-3)
    assert after.softmax(-1).amax(-1).min() > 0.999, "what is expected is what was decided"


def test_what_is_settled_survives_its_tensors() -> None:
    gate, score_L, _ = drawn(3)
    states = BlockStates((FULL, OFF, INT8, FULL, OFF, FULL, OFF), (OFF, FULL, FULL, INT8, OFF, FULL, FULL))
    gate.settle(score_L, states)
    other = BlockGate(7)
    other.load_state_dict(gate.state_dict())
    assert states_of(other.logits(score_L + 0.3).argmax(-1)) == states
