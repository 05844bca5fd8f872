"""What only a GPU has: compiled layers, the decode step in one CUDA graph, and a stop flag read late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LOOK_EVERY = 4
"""Steps between two looks at the stop flag: at most twice as many run after the last row has stopped."""

_COMPILATIONS = 256
"""Of one part of a layer in one process: 64 batch shapes and length buckets, 4 kinds of layer."""


def compiled(stage: Callable[..., Any], backend: Any = "inductor") -> Callable[..., Any]:
    """``stage`` compiled once for all layers of a kind, and again for every new shape of its inputs."""
    # Autotuned GEMVs were as fast as the library's and drew a quarter more power: not asked for.
    run = torch.compile(stage, fullgraph=True, dynamic=False, backend=backend)

    def call(*args: Any) -> Any:
        limits = {"recompile_limit": _COMPILATIONS, "accumulated_recompile_limit": 4 * _COMPILATIONS}
        with torch._dynamo.config.patch(limits):
            return run(*args)

    return call


class Replay:
    """``step`` captured in one CUDA graph; calling it replays the graph.

    ``rewind`` puts the step's buffers back to a state from which it may run: before the graph there are
    two runs that count for nothing (compilation, workspaces).
    """

    def __init__(self, step: Callable[[], None], rewind: Callable[[], None]) -> None:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                rewind()
                step()
            rewind()
        torch.cuda.current_stream().wait_stream(side)
        self._step = step  # and with it the tensors whose addresses the graph holds
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            step()

    def __call__(self) -> None:
        self._graph.replay()


class LateStop:
    """Whether every row had stopped when last looked at: no step waits for the device.

    Every ``LOOK_EVERY`` steps the flag is copied to the host, and the copy asked for the time before is
    read; waiting for that one only keeps the host from running further ahead.
    """

    def __init__(self, alive: Tensor) -> None:
        self._alive, self._steps = alive, 0
        self._copy = torch.ones((), dtype=torch.bool, pin_memory=alive.is_cuda)
        self._done = torch.cuda.Event() if alive.is_cuda else None  # type: ignore[no-untyped-call]

    def stopped(self) -> bool:
        """Ask once before every step."""
        steps, self._steps = self._steps, self._steps + 1
        if steps % LOOK_EVERY:
            return False
        if self._done is not None and steps:
            self._done.synchronize()
        if not self._copy:
            return True
        self._copy.copy_(self._alive, non_blocking=True)
        if self._done is not None:
            self._done.record()
        return False


class PromptStop:
    """Whether every row has stopped, asked of the tensor itself: for a CPU, where that costs nothing."""

    def __init__(self, alive: Tensor) -> None:
        self._alive = alive

    def stopped(self) -> bool:
        return not self._alive
