"""Training over several processes (ranks) that Accelerate launched: what they tell each other, and when.

Every rank holds the whole backbone, computes its own micro-batches of each step, and makes the same step.
Ranks meet in one kind of exchange only: every rank tells, every rank hears all. A rank that fails makes
one last exchange of its own, so that those that wait for it hear of the failure, wherever they wait. The one
other meeting, that of the gradients, follows an exchange in which all were well.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import nn

from hestctl.energy.meter import Edge, Meter
from hestctl.errors import Exit, HestError, Interrupted
from hestctl.model.backbone import resolve_device
from hestctl.records import EnergyKind, Window

T = TypeVar("T")


class RankFailed(HestError):
    """Another rank failed or is gone. What this rank holds is whole: the state after its last step."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a rank tells of its meter: ``total_j`` joules since it was started, or the ``reason`` why not."""

    device_uuid: str
    kind: EnergyKind
    counts_process: bool
    total_j: float | None
    reason: str | None

    @classmethod
    def of(cls, meter: Meter) -> Reading:
        total_j = meter.total_j()
        return cls(meter.device_uuid, meter.kind, meter.counts_process, total_j, meter.reason)


@dataclass(frozen=True, slots=True)
class _Failure:
    message: str
    hint: str | None
    exit_code: Exit
    interrupted: bool

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        if isinstance(error, HestError):
            stopped = isinstance(error, Interrupted)
            return cls(error.message, error.hint, error.exit_code, stopped)
        return cls(f"{type(error).__name__}: {error}", None, Exit.FAILED, False)


@dataclass(frozen=True, slots=True)
class _Message:
    payload: Any
    reading: Reading | None
    signum: int | None
    failure: _Failure | None = None


@dataclass(slots=True)
class Ranks:
    """The processes of one training, seen from one of them; by default the only one.

    ``stop_signal`` is the signal that asked any rank for an orderly stop, once it is known here; ``readings``
    is what every rank told of its meter last.
    """

    rank: int = 0
    world: int = 1
    patience_s: float = 0.0
    stop_signal: int | None = None
    readings: list[Reading | None] = field(default_factory=list)
    _own_signal: int | None = None
    _meter: Meter | None = None
    _together: bool = False
    _failed: bool = False

    @property
    def first(self) -> bool:
        """Whether this is the rank that owns store, checkpoints, validation and generation."""
        return self.rank == 0

    def mine(self, micro: int) -> bool:
        """Whether this rank computes the micro-batch of that number in the effective batch."""
        return micro % self.world == self.rank

    def request_stop(self, signum: int) -> None:
        """Note a signal, for all ranks to hear in the next exchange; Ctrl-C twice ends this one at once."""
        if self._own_signal is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self._own_signal = signum

    def share(self, payload: T) -> list[T]:
        """Every rank's payload, in the order of ranks; waits for all of them, without spinning.

        Raises RankFailed, or Interrupted where a signal ended the rank that failed.
        """
        if self.world == 1:
            return [payload]
        return [message.payload for message in self._exchange(payload, None)]

    def told(self, value: T | None) -> T:
        """What the first rank tells: its ``value``, on every rank. Raises as ``share`` does."""
        self.share(None)
        box = [value]
        if self.world > 1:
            with self._contact():
                broadcast_object_list(box)
        assert box[0] is not None
        return box[0]

    def meet(self, meter: Meter, identity: Mapping[str, str]) -> None:
        """Begin to tell the others of this rank's joules, and see that all do the same work.

        ``identity`` says by name what that work is of. Raises HestError (usage) where it differs.
        """
        self._meter = meter
        identities = self.share(identity)
        for rank, other in enumerate(identities):
            unlike = [name for name, value in identities[0].items() if other[name] != value]
            if unlike:
                raise HestError(
                    f"rank {rank} has another {' and another '.join(unlike)} than rank 0",
                    "start every rank with the same command line, environment and files",
                    Exit.USAGE,
                )

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum every gradient over all ranks; one that no rank has stays None."""
        if self.world == 1:
            return
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([has, *(part.float().flatten().cpu() for part in parts)])
        with self._contact():
            total = reduce(flat, "sum")
        assert isinstance(total, torch.Tensor)
        sizes = [len(parameters), *(p.numel() for p in parameters)]
        anywhere, *summed = torch.split(total, sizes)
        for parameter, there, gradient in zip(parameters, anywhere.tolist(), summed, strict=True):
            if there:
                parameter.grad = gradient.view_as(parameter).to(parameter, copy=True)

    def finish(self, window: Window | None) -> list[Window | None]:
        """Training is over: every rank's window, and from here on each is on its own."""
        windows = self.share(window)
        self._part()
        return windows

    def devices(self) -> list[tuple[int, Reading]]:
        """The ranks whose joules count, with what each told last.

        A counter of a device counts what all ranks on it do, and is counted once; one of a process does not.
        """
        seen: set[tuple[str, int | None]] = set()
        out = []
        for rank, reading in enumerate(self.readings):
            if reading is None:
                continue
            device = (reading.device_uuid, rank if reading.counts_process else None)
            if device not in seen:
                seen.add(device)
                out.append((rank, reading))
        return out

    @property
    def uuids(self) -> list[str]:
        """The device of every rank."""
        return [reading.device_uuid for reading in self.readings if reading is not None]

    def leave(self, error: Exception) -> bool:
        """Tell the others what ended this rank, and wait until the first one has ended its run.

        Returns whether they were there to hear it.
        """
        if not self._together:
            return False
        if not self._failed:
            with suppress(RankFailed, Interrupted):
                self._exchange(None, _Failure.of(error))
        if self._together:
            # A rank that is gone has the launcher end the others, which may be saving still.
            with suppress(RankFailed, Interrupted):
                self._exchange(None, _Failure.of(error))
        heard = self._together
        self._part()
        return heard

    def _exchange(self, payload: Any, failure: _Failure | None) -> list[_Message]:
        reading = None if self._meter is None else Reading.of(self._meter)
        with self._contact():
            messages: list[_Message] = gather_object([_Message(payload, reading, self._own_signal, failure)])
        self.readings = [message.reading for message in messages]
        signals = (message.signum for message in messages if message.signum is not None)
        self.stop_signal = next(signals, None)
        self._failed = any(message.failure is not None for message in messages)
        for rank, message in enumerate(messages):
            if message.failure is not None and failure is None:
                raise _as_error(rank, message.failure)
        return messages

    @contextmanager
    def _contact(self) -> Iterator[None]:
        """Has the stacks of this rank printed if it does not get through in time, or to its next meeting."""
        faulthandler.dump_traceback_later(self.patience_s)
        try:
            yield
        except RuntimeError as error:
            self._together = False
            faulthandler.cancel_dump_traceback_later()
            raise RankFailed(
                f"rank {self.rank} has no contact with the others: {str(error).splitlines()[0]}",
                "the same command with --resume goes on; waiting too short? --set train.rank_timeout_s=...",
            ) from error
        faulthandler.dump_traceback_later(self.patience_s)

    def _part(self) -> None:
        if self._together:
            self._together = False
            faulthandler.cancel_dump_traceback_later()
            PartialState().destroy_process_group()


class JointMeter:
    """The meters of all ranks as one, for the account of what training spends.

    The own meter is read now; the other ranks' joules are those that they told last.
    """

    def __init__(self, meter: Meter, ranks: Ranks) -> None:
        self._meter = meter
        self._ranks = ranks

    @property
    def kind(self) -> EnergyKind:
        return self._meter.kind

    @property
    def reason(self) -> str | None:
        """Why joules since the start are not known; None while they are."""
        if self._meter.reason is not None:
            return self._meter.reason
        for rank, reading in self._others():
            if reading.kind != self.kind:
                return f"joules of rank {rank} are {reading.kind}, of rank 0 {self.kind}"
            if reading.total_j is None:
                return f"rank {rank}: {reading.reason or 'the counter gave no reading'}"
        return None

    def total_j(self) -> float | None:
        """Joules of all devices since their meters were started, each device once."""
        own_j = self._meter.total_j()
        others_j = [reading.total_j if reading.kind == self.kind else None for _, reading in self._others()]
        if own_j is None or None in others_j:
            return None
        return own_j + sum(joules for joules in others_j if joules is not None)

    def edge(self) -> Edge:
        return self._meter.edge()

    def cut(self, start: Edge, end: Edge, *, name: str, phase: str) -> Window:
        return self._meter.cut(start, end, name=name, phase=phase)

    def _others(self) -> Iterator[tuple[int, Reading]]:
        return ((rank, reading) for rank, reading in self._ranks.devices() if rank != self._ranks.rank)


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def launched_alone() -> bool:
    """Whether ``accelerate launch --cpu`` was asked for several processes; it starts one all the same."""
    cpu = os.environ.get("ACCELERATE_USE_CPU") == "True" and "LOCAL_RANK" not in os.environ
    return cpu and "MASTER_PORT" in os.environ


@contextmanager
def joined(device: str, patience_s: float) -> Iterator[Ranks]:
    """This process among those launched with it, or alone; ``device`` as ``resolve_device`` takes it.

    ``patience_s``: how long an exchange may take until the others are given up (s); the stacks of all
    that do not come are then printed. An error of the block ends all ranks with its exit code: the first one
    raises it, the others end with SystemExit, for it has been told. Raises HestError where the ranks do not
    find each other.
    """
    if not launched():
        yield Ranks()
        return
    ranks = _join(device, patience_s)
    try:
        yield ranks
    except Exception as error:
        heard = ranks.leave(error)
        if ranks.first or not heard or os.environ.get("HESTCTL_DEBUG"):
            raise
        raise SystemExit(int(_Failure.of(error).exit_code)) from error
    ranks._part()


def _join(device: str, patience_s: float) -> Ranks:
    on_cpu = resolve_device(device).type == "cpu"
    try:
        # gloo for GPUs too: a wait in NCCL spins on host and device, which is joules, and NCCL refuses two
        # ranks on one device. What travels is small: the backbone is frozen.
        state = PartialState(cpu=on_cpu, backend="gloo", timeout=timedelta(seconds=patience_s))
    except (RuntimeError, ValueError) as error:
        raise HestError(
            f"the processes launched did not find each other: {str(error).splitlines()[0]}",
            "on one machine: accelerate launch --multi_gpu --num_processes N -m hestctl train ...",
        ) from error
    return Ranks(state.process_index, state.num_processes, patience_s, _together=True)


def _as_error(rank: int, failure: _Failure) -> HestError:
    if failure.interrupted:
        return Interrupted(failure.message, failure.hint, failure.exit_code)
    return RankFailed(f"rank {rank} failed: {failure.message}", failure.hint, failure.exit_code)
