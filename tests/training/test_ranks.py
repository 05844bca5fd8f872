"""Joules over ranks: every device once; and what ranks tell each other."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from dataclasses import replace

import pytest
import torch

from hestctl.energy.cpu import CpuTimeCounter
from hestctl.energy.fake import FakeClock, FakeCounter
from hestctl.energy.meter import Meter
from hestctl.energy.protocol import Unavailable
from hestctl.training.account import Account, JoulesUnknown, demand_live_counter
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


def exchange(rank, port, result):
    """What a rank of two holds after they have met: its gradients, what it was told, and what it heard."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in told.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    with joined("cpu", 30.0) as ranks:
        both, second, none = (torch.nn.Parameter(torch.zeros(size)) for size in (2, 3, 1))
        both.grad = torch.full((2,), 1.0 + rank)
        if rank == 1:
            second.grad = torch.tensor([1.0, 2.0, 3.0])
        ranks.add_gradients([both, second, none])
        grads = [None if p.grad is None else p.grad.tolist() for p in (both, second, none)]
        if rank == 1:
            ranks.request_stop(15)
        heard = ranks.share(f"rank {rank}")
        result.send((grads, ranks.told("the first" if ranks.first else None), heard, ranks.stop_signal))
        ranks.finish(None)


def test_ranks_hold_the_same_after_they_have_met():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hestctl.training.ranks"])
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    for rank, (_, result) in enumerate(pipes):
        context.Process(target=exchange, args=(rank, port, result), daemon=True).start()
    for answer, _ in pipes:
        assert answer.poll(60)
        grads, word, heard, signum = answer.recv()
        assert grads == [[3.0, 3.0], [1.0, 2.0, 3.0], None]
        assert (word, heard, signum) == ("the first", ["rank 0", "rank 1"], 15)
