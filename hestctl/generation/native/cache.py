"""The static key and value cache, sized to the request.

A request's prompt is held once, however many beams it has; the slots after it hold what the beams
generated, step by step and beam by beam. Which beam may see which of those slots is the mask's business
(``session``), so nothing is ever copied or reordered here.

Shape legend: L layers that attend, Q requests, K heads, C slots, E head size.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hestctl.errors import HestError
from hestctl.generation.native.weights import Heads


def bucket(tokens: int) -> int:
    """``tokens`` rounded up so that few lengths remain and at most an eighth (from 512 on) is padding."""
    step = 64
    while tokens > 16 * step:
        step *= 2
    return -(-tokens // step) * step


class CacheShape(NamedTuple):
    """(L, key or value, Q, K, C, E)."""

    layers: int
    pair: int
    requests: int
    heads: int
    slots: int
    size: int


def cache_shape(layers: int, requests: int, slots: int, heads: Heads) -> CacheShape:
    """The cache of ``requests`` requests with ``slots`` slots each, in ``layers`` layers that attend."""
    return CacheShape(layers, 2, requests, heads.kv, slots, heads.size)


def allocate(shape: CacheShape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a cache of that shape, flat: every smaller cache fits in it as well.

    Raises HestError, naming what would fit, when there is not enough.
    """
    row_bytes = math.prod(shape) // shape.requests * dtype.itemsize
    free = free_bytes(device)
    if free is not None and shape.requests * row_bytes > free:
        raise _too_large(shape.requests, row_bytes, shape.slots, free)
    try:
        # Zeros, not whatever was there: a masked NaN would still be a NaN.
        return torch.zeros(math.prod(shape), dtype=dtype, device=device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        raise _too_large(shape.requests, row_bytes, shape.slots, free) from error


def free_bytes(device: torch.device) -> int | None:
    """Memory that a new tensor on ``device`` can have; None where nothing tells."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def _too_large(requests: int, row_bytes: int, slots: int, free: int | None) -> HestError:
    fits = 0 if free is None else free // row_bytes
    left = "" if free is None else f"; {free:,} bytes are free, enough for {fits} of them"
    fewer = f"--set generation.batch_size={max(1, min(fits, requests - 1))}, or " if requests > 1 else ""
    return HestError(
        f"the cache of {requests} requests does not fit: "
        f"{slots} slots take {row_bytes:,} bytes a request{left}",
        f"{fewer}a lower data.max_tokens, generation.new_tokens or --num-beams",
    )
