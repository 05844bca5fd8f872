"""Prompts laid out for one forward pass, and attention over them.

Padding stands on the right: a causal mask then hides it from every real token, so ragged prompts need no
mask of their own. On a CPU nothing is padded at all: the tokens of all requests follow each other, and
only attention takes them apart.

Shape legend: Q requests, N tokens (of all requests, padding included), R real tokens, T padded width,
H query heads, K key and value heads, C slots of the cache, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """``width`` is T, or None where the tokens are packed without padding.

    ``real_R`` are the places of real tokens among all N, None where all are real. ``row_R`` and
    ``column_R`` are their places on the ledger's (Q, longest) grid.
    """

    lengths: tuple[int, ...]
    width: int | None
    ids_N: Tensor
    position_N: Tensor
    last_Q: Tensor
    real_R: Tensor | None
    row_R: Tensor
    column_R: Tensor

    @property
    def longest(self) -> int:
        return max(self.lengths)


def lay_out(
    sequences: Sequence[Sequence[int]],
    device: torch.device,
    *,
    width: int | None,
    grid: Literal["left", "right"],
) -> Prompts:
    """Token ids as ``Prompts``; ``width`` pads every row to that many, None packs them.

    ``grid`` says on which side the ledger's grid is padded: prompts stand at its right end, as in
    transformers' batches, whole sequences at its left.
    """
    lengths = tuple(len(ids) for ids in sequences)
    longest = max(lengths)
    if width is None and min(lengths) == longest:
        width = longest
    steps = [torch.arange(length) for length in lengths]
    row_R = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    real_R = None
    if width is None:
        ids_N = torch.cat([torch.tensor(ids) for ids in sequences])
        position_N = torch.cat(steps)
        last_Q = torch.tensor(lengths).cumsum(0) - 1
    else:
        ids_QT = torch.zeros(len(lengths), width, dtype=torch.int64)
        for ids_T, ids in zip(ids_QT, sequences, strict=True):
            ids_T[: len(ids)] = torch.tensor(ids)
        ids_N = ids_QT.flatten()
        position_N = torch.arange(width).repeat(len(lengths))
        starts_Q = torch.arange(len(lengths)) * width
        last_Q = starts_Q + torch.tensor(lengths) - 1
        if min(lengths) < width:
            real_R = starts_Q[row_R] + torch.cat(steps)
    shift = [longest - length if grid == "left" else 0 for length in lengths]
    column_R = torch.cat([places + start for places, start in zip(steps, shift, strict=True)])
    return Prompts(
        lengths,
        width,
        ids_N.to(device),
        position_N.to(device),
        last_Q.to(device),
        None if real_R is None else real_R.to(device),
        row_R.to(device),
        column_R.to(device),
    )


def attend(prompts: Prompts, q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, store: Tensor | None) -> Tensor:
    """Causal attention within each prompt, (N, H * E); keys and values go to ``store`` (2, Q, K, C, E)."""
    shared = q_NHE.shape[1] != k_NKE.shape[1]
    if prompts.width is not None:
        q, k, v = (x.view(-1, prompts.width, *x.shape[1:]).transpose(1, 2) for x in (q_NHE, k_NKE, v_NKE))
        if store is not None:
            store[0, :, :, : prompts.width] = k
            store[1, :, :, : prompts.width] = v
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
        return mixed.transpose(1, 2).reshape(len(q_NHE), -1)
    done = []
    for row, (start, end) in enumerate(pairwise(accumulate(prompts.lengths, initial=0))):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (q_NHE, k_NKE, v_NKE))
        if store is not None:
            store[0, row, :, : k.shape[2]] = k[0]
            store[1, row, :, : k.shape[2]] = v[0]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
        done.append(mixed[0].transpose(0, 1).flatten(1))
    return torch.cat(done)
