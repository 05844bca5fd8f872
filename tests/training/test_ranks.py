"""Joules over ranks: every device once; and what ranks tell each other."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from dataclasses import replace

import pytest
import torch

from hestctl.budget import Budget, Multiplier
from hestctl.data.prompts import Encoded
from hestctl.energy.cpu import CpuTimeCounter
from hestctl.energy.fake import FakeClock, FakeCounter
from hestctl.energy.meter import Meter
from hestctl.energy.model import Terms
from hestctl.energy.protocol import Unavailable
from hestctl.model.backbone import tiny_backbone
from hestctl.model.methods import build_tuner
from hestctl.model.sensitivity import Sensitivities
from hestctl.records import BlockStates
from hestctl.settings import MethodSettings, TrainSettings
from hestctl.training.account import Account, JoulesUnknown, demand_live_counter
from hestctl.training.loop import Trainer
from hestctl.training.network import BlockPrices, BlockTraining
from hestctl.training.ranks import JointMeter, Ranks, Reading, joined

OWN = "GPU-FAKE"


def meter_of(clock, **more):
    """One watt: joules are the seconds of the clock."""
    return Meter(FakeCounter(1.0, clock, **more), clock=clock, pace=clock)


def told(uuid, total_j, *, kind="measured", counts_process=False, reason=None):
    return Reading(uuid, kind, counts_process, total_j, reason)


def joint(clock, *others, **more):
    meter = meter_of(clock, step_s=None, **more)
    with meter:
        own = Reading.of(meter)
        return JointMeter(meter, Ranks(world=1 + len(others), readings=[own, *others]))


def test_every_device_is_counted_once():
    clock = FakeClock()
    own = meter_of(clock).device_uuid
    meter = joint(clock, told(own, 100.0), told("GPU-b", 20.0), told("GPU-b", 21.0), told("GPU-c", 3.0))
    clock.advance(5.0)
    assert meter.total_j() == 5.0 + 20.0 + 3.0
    assert meter.reason is None


def test_the_estimates_of_processes_on_one_cpu_add_up():
    clock = FakeClock()
    cpu = {"kind": "estimated", "counts_process": True}
    meter = joint(clock, told("CPU-a", 20.0, **cpu), told("CPU-a", 3.0, **cpu), kind="estimated")
    assert meter.total_j() == 23.0
    with Meter(CpuTimeCounter(8.0)) as estimate:
        assert Reading.of(estimate).counts_process
    assert not Reading.of(meter_of(clock)).counts_process


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (told("GPU-b", None, reason="the driver is gone"), "rank 1: the driver is gone"),
        (told("CPU-a", 3.0, kind="estimated"), "joules of rank 1 are estimated, of rank 0 measured"),
    ],
)
def test_joules_of_which_one_rank_does_not_know_its_part_are_not_known(other, reason):
    meter = joint(FakeClock(), other)
    assert (meter.total_j(), meter.reason) == (None, reason)
    with pytest.raises(JoulesUnknown, match=reason):
        demand_live_counter(meter)


def test_without_a_meter_the_reason_is_its_own():
    with Meter(Unavailable("switched off")) as meter:
        both = JointMeter(meter, Ranks(world=2, readings=[Reading.of(meter), told("GPU-b", 1.0)]))
        assert (both.total_j(), both.reason) == (None, "switched off")


def test_the_account_counts_what_other_devices_spend_and_their_windows(tmp_path, monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr("hestctl.training.account.time.monotonic", clock)
    own = meter_of(clock, step_s=None)
    with own:
        ranks = Ranks(world=2, readings=[Reading.of(own), told("GPU-b", 50.0)])
        account = Account(JointMeter(own, ranks), tmp_path / "spent.json", 100.0)
        clock.advance(2.0)
        ranks.readings[1] = told("GPU-b", 57.0)
        account.book("step")
        assert account.joules == 9.0  # what the other spent before is none of training
        with own.window("training, rank 1", "training") as window:
            clock.advance(8.0)  # of its counter's last step the live sum does not know yet
        account.close([window.result])
        assert account.joules == 18.0
        assert json.loads((tmp_path / "spent.json").read_text())["counted_j"] == 18.0


def test_an_invalid_window_of_another_device_leaves_no_figure_to_report(tmp_path):
    clock = FakeClock()
    with meter_of(clock, step_s=None) as own:
        account = Account(own, tmp_path / "spent.json", None)
        with own.window("training, rank 1", "training") as window:
            clock.advance(1.0)
        account.close([replace(window.result, valid=False, reason="throttled")])
    assert (account.joules, account.unread) == (None, "the window is not valid: throttled")


def test_alone_nothing_is_exchanged():
    ranks = Ranks()
    parameter = torch.nn.Parameter(torch.zeros(2))
    ranks.add_gradients([parameter])
    assert ranks.share("mine") == ["mine"]
    assert ranks.told("mine") == "mine"
    assert ranks.finish(None) == [None]
    assert parameter.grad is None
    assert [micro for micro in range(5) if ranks.mine(micro)] == [0, 1, 2, 3, 4]
    with joined("cpu", 1.0) as found:
        assert (found.rank, found.world, found.first) == (0, 1, True)


@pytest.mark.parametrize("world", [2, 3])
def test_every_micro_batch_is_one_ranks(world):
    of = [[rank for rank in range(world) if Ranks(rank, world).mine(micro)] for micro in range(7)]
    assert all(len(ranks) == 1 for ranks in of)


def in_rank(rank, port, result, work):
    """Have ``work`` done in this process, as the rank of two that a launcher says it is."""
    torch.set_num_threads(1)
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in told.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    with joined("cpu", 30.0) as ranks:
        result.send(work(ranks))
        ranks.finish(None)


def in_two_ranks(work):
    """What ``work(ranks)`` returns in each of two processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hestctl.training.loop"])
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    for rank, (_, result) in enumerate(pipes):
        context.Process(target=in_rank, args=(rank, port, result, work), daemon=True).start()
    assert all(answer.poll(60) for answer, _ in pipes)
    return [answer.recv() for answer, _ in pipes]


def exchange(ranks):
    both, second, none = (torch.nn.Parameter(torch.zeros(size)) for size in (2, 3, 1))
    both.grad = torch.full((2,), 1.0 + ranks.rank)
    if ranks.rank == 1:
        second.grad = torch.tensor([1.0, 2.0, 3.0])
        ranks.request_stop(15)
    ranks.add_gradients([both, second, none])
    grads = [None if p.grad is None else p.grad.tolist() for p in (both, second, none)]
    heard = ranks.share(f"rank {ranks.rank}")
    return grads, ranks.told("the first" if ranks.first else None), heard, ranks.stop_signal


def test_ranks_hold_the_same_after_they_have_met():
    for grads, word, heard, signum in in_two_ranks(exchange):
        assert grads == [[3.0, 3.0], [1.0, 2.0, 3.0], None]
        assert (word, heard, signum) == ("the first", ["rank 0", "rank 1"], 15)


def half(decided, known):
    """Each kind of block off in one layer, so that ranks have to agree on swaps."""
    layers = decided.layers
    return BlockStates((0,) + (1,) * (layers - 1), (1,) * (layers - 1) + (0,))


def train_blocks(ranks):
    """Losses, tensors and blocks of a training of 6 steps that settles its blocks at step 3.

    Steps have two micro-batches and one in turns: the second of two ranks is idle when they settle.
    """
    backbone = tiny_backbone()
    layers = backbone.num_layers
    tuner = build_tuner(
        MethodSettings(name="hest"),
        backbone.model,
        layers=layers,
        hidden=backbone.hidden_size,
        states=(0, 1, 2),
        seed=0,
        learns_blocks=True,
    )
    generator = torch.Generator().manual_seed(0)

    def drawn(count):
        return tuple(torch.randint(10, 200, (count,), generator=generator).tolist())

    rows = [Encoded(f"s{i}", drawn(20 + i), drawn(6 + i % 3), 0, "a reference", None) for i in range(5)]
    off = tuple((0.05 * (1 + layer), 0.03 * (1 + layer)) for layer in range(layers))
    small = tuple((0.001, 0.001) for _ in range(layers))
    known = Sensitivities("exact", "-", "-", 5, off, small, small, small)
    kind = (Terms(), Terms(token_j=0.6), Terms(token_j=1.0))
    prices = BlockPrices(Terms(token_j=1.0), (kind, kind), None)
    blocks = BlockTraining(
        layers,
        prices,
        tuner.spectral.gate,
        known,
        fixed=None,
        tighten_steps=2,
        settle_step=3,
        swaps=4,
        choose=half,
    )
    settings = TrainSettings(
        epochs=3, batch_size=2, accumulation=2, warmup_steps=1, learning_rate=5e-3, block_learning_rate=0.3
    )
    trainer = Trainer(
        backbone,
        tuner,
        rows,
        settings,
        costs_j=(0.0, 0.5e-6, 1e-6),
        budget=Budget(100.0, "test", None, 8, 8, 1),
        multiplier=Multiplier(0.1, 0.05, "pi"),
        blocks=blocks,
        ranks=ranks,
    )
    trainer.start()
    losses = [(m.task_loss, m.energy_j, m.energy_ratio, m.share_full) for m in trainer.steps()]
    tensors = {name: tensor.tolist() for name, tensor in trainer.state()[0].items()}
    return losses, tensors, trainer.blocks.state()


def test_blocks_are_learned_and_settled_as_one_process_does():
    losses, tensors, blocks = train_blocks(Ranks())
    assert len(losses) == 6
    assert blocks["fixed"] is not None
    for mine, held, settled in in_two_ranks(train_blocks):
        for row, other in zip(mine, losses, strict=True):
            assert row == pytest.approx(other, rel=1e-5)
        for name, tensor in tensors.items():
            wanted = torch.tensor(tensor)
            assert torch.linalg.norm(torch.tensor(held[name]) - wanted) <= 1e-5 * torch.linalg.norm(wanted), (
                name
            )
        assert settled["fixed"] == blocks["fixed"]
        assert settled["settlement"] == pytest.approx(blocks["settlement"], rel=1e-4)
