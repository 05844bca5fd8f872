"""The choice of the next tokens: greedy, and what greedy and beam search have in common.

All state lies in tensors that are written in place, and nothing is read back: a step runs in a graph.

Shape legend: Q requests, B beams, W rows (Q * B), V vocabulary, T new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hestctl.generation.native.prompts import Prompts


@dataclass(frozen=True)
class Rules:
    """What bounds every choice. ``forced``: stop tokens cannot be chosen."""

    new_tokens: int
    stop_ids: Sequence[int]
    pad_id: int
    forced: bool
    penalty: float
    """Of tokens that occurred, in prompt or answer, as transformers' ``repetition_penalty``; 1 is none."""


class Choice(Protocol):
    """``tokens_W`` is what each row is fed next; ``alive`` () says whether any request goes on."""

    tokens_W: Tensor
    alive: Tensor

    def begin(self, prompts: Prompts | None) -> None:
        """Forget the last batch. ``prompts`` is None while a graph is being captured."""

    def choose(self, logits: Tensor) -> Tensor | None:
        """Take the next tokens by logits (Q, V) of the prompts or (W, V) of the rows.

        Returns, for beams, which beam of its request each row goes on from, (Q, B).
        """

    def result(self) -> list[list[int]]:
        """New tokens of each request, all T of them: what follows a stop token means nothing."""


class Seen:
    """Logits under the rules: stop tokens barred where the length is forced, repetitions penalised."""

    def __init__(self, rules: Rules, rows: int, vocabulary: int, device: torch.device) -> None:
        self._rules = rules
        self.stop_ids = torch.tensor(list(rules.stop_ids), device=device)
        penalised = rules.penalty != 1.0
        self._seen_WV = torch.zeros(rows, vocabulary, dtype=torch.bool, device=device) if penalised else None

    def begin(self, prompts: Prompts | None) -> None:
        if self._seen_WV is None or prompts is None:
            return
        beams = len(self._seen_WV) // len(prompts.lengths)
        ids_M = prompts.ids_N if prompts.real_R is None else prompts.ids_N[prompts.real_R]
        self._seen_WV.zero_()
        for beam in range(beams):
            self._seen_WV[prompts.row_R * beams + beam, ids_M] = True

    def bound(self, scores: Tensor) -> Tensor:
        """Scores (fp32, changed in place) as the rules have them."""
        if self._seen_WV is not None:
            seen = self._seen_WV[:: len(self._seen_WV) // len(scores)]
            worse = torch.where(scores < 0, scores * self._rules.penalty, scores / self._rules.penalty)
            scores = torch.where(seen, worse, scores)
        if self._rules.forced:
            scores.index_fill_(1, self.stop_ids, -torch.inf)
        return scores

    def add(self, tokens_W: Tensor, parents_W: Tensor | None = None) -> None:
        """Remember the tokens taken, each row going on from row ``parents_W``."""
        if self._seen_WV is None:
            return
        if parents_W is not None:
            self._seen_WV.copy_(self._seen_WV[parents_W])
        self._seen_WV.scatter_(1, tokens_W[:, None], True)

    def stops(self, tokens: Tensor) -> Tensor:
        """Whether each token ends an answer."""
        return (tokens[..., None] == self.stop_ids).any(-1)


class Greedy:
    """The likeliest token, request by request; a request that has stopped is fed padding."""

    def __init__(self, rules: Rules, requests: int, vocabulary: int, device: torch.device) -> None:
        self._rules = rules
        self._seen = Seen(rules, requests, vocabulary, device)
        self._out_QT = torch.zeros(requests, rules.new_tokens, dtype=torch.int64, device=device)
        self._going_Q = torch.ones(requests, dtype=torch.bool, device=device)
        self._taken_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.tokens_W = torch.zeros(requests, dtype=torch.int64, device=device)
        self.alive = torch.ones((), dtype=torch.bool, device=device)

    def begin(self, prompts: Prompts | None) -> None:
        self._seen.begin(prompts)
        self._going_Q.fill_(True)
        self._taken_1.zero_()
        self.alive.fill_(True)

    def choose(self, logits: Tensor) -> Tensor | None:
        best_Q = self._seen.bound(logits.float()).argmax(-1)
        best_Q = torch.where(self._going_Q, best_Q, self._rules.pad_id)
        self.tokens_W.copy_(best_Q)
        self._out_QT.index_copy_(1, self._taken_1, best_Q[:, None])
        self._taken_1 += 1
        self._seen.add(best_Q)
        self._going_Q &= ~self._seen.stops(best_Q)
        self.alive.copy_(self._going_Q.any())
        return None

    def result(self) -> list[list[int]]:
        rows: list[list[int]] = self._out_QT.tolist()
        return rows
