"""Beam search by transformers' rules: length penalty 1, early stopping off.

Of every request, ``1 + stop ids`` (at least two) candidates a beam are drawn, so that enough remain that
do not stop; those among the first B that do are scored by their mean log-probability and compete for the
B finished places. A request can improve while its best running beam, at its present length, beats
its worst finished one.

Shape legend: Q requests, B beams, W rows (Q * B), V vocabulary, T new tokens, J candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hestctl.generation.native.choice import Rules, Seen
from hestctl.generation.native.prompts import Prompts

_NEVER = -1.0e9


class BeamSearch:
    """A ``Choice`` over ``beams`` running sequences a request. All scores are nats, in fp32."""

    def __init__(
        self, rules: Rules, requests: int, beams: int, vocabulary: int, device: torch.device
    ) -> None:
        rows, steps = requests * beams, rules.new_tokens
        self._rules, self._beams, self._vocabulary = rules, beams, vocabulary
        self._seen = Seen(rules, rows, vocabulary, device)
        self._drawn = max(2, 1 + len(rules.stop_ids)) * beams
        self._leading_J = torch.arange(self._drawn, device=device) < beams
        self._offset_Q1 = torch.arange(requests, device=device)[:, None] * beams
        self._running_QBT = torch.zeros(requests, beams, steps, dtype=torch.int64, device=device)
        self._running_score_QB = torch.zeros(requests, beams, device=device)
        self._finished_QBT = torch.zeros_like(self._running_QBT)
        self._finished_score_QB = torch.zeros_like(self._running_score_QB)
        self._is_finished_QB = torch.zeros(requests, beams, dtype=torch.bool, device=device)
        self._improvable_Q1 = torch.ones(requests, 1, dtype=torch.bool, device=device)
        self._taken_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.tokens_W = torch.zeros(rows, dtype=torch.int64, device=device)
        self.alive = torch.ones((), dtype=torch.bool, device=device)

    def begin(self, prompts: Prompts | None) -> None:
        self._seen.begin(prompts)
        self._running_score_QB.fill_(_NEVER)[:, 0] = 0.0  # at first all beams are alike: one is enough
        self._finished_score_QB.fill_(_NEVER)
        self._is_finished_QB.fill_(False)
        self._improvable_Q1.fill_(True)
        self._taken_1.zero_()
        self.alive.fill_(True)

    def choose(self, logits: Tensor) -> Tensor | None:
        requests = len(self._running_QBT)
        scores = self._seen.bound(logits.float().log_softmax(-1)).view(requests, -1, self._vocabulary)
        score_QJ, place_QJ = (scores + self._running_score_QB[..., None]).flatten(1).topk(self._drawn)
        parent_QJ, token_QJ = place_QJ // self._vocabulary, place_QJ % self._vocabulary
        candidate_QJT = _pick(self._running_QBT, parent_QJ)
        candidate_QJT.index_copy_(2, self._taken_1, token_QJ[..., None])
        stops_QJ = self._seen.stops(token_QJ) | (self._taken_1 + 1 >= self._rules.new_tokens)
        self._finish(candidate_QJT, score_QJ, stops_QJ)
        going_QJ = score_QJ + stops_QJ * _NEVER
        next_QB = going_QJ.topk(self._beams).indices
        self._running_QBT.copy_(_pick(candidate_QJT, next_QB))
        self._running_score_QB.copy_(going_QJ.gather(1, next_QB))
        parent_QB, token_QB = parent_QJ.gather(1, next_QB), token_QJ.gather(1, next_QB)
        self.tokens_W.copy_(token_QB.flatten())
        self._seen.add(self.tokens_W, (parent_QB + self._offset_Q1).flatten())
        self._taken_1 += 1
        best_Q1 = self._running_score_QB[:, :1] / self._taken_1
        worst_Q1 = self._finished_score_QB.amin(1, keepdim=True)
        worst_QB = torch.where(self._is_finished_QB, worst_Q1, _NEVER)
        self._improvable_Q1 &= (best_Q1 > worst_QB).any(1, keepdim=True)
        self.alive.copy_(self._improvable_Q1.any() & ~stops_QJ.all())
        return parent_QB

    def _finish(self, candidate_QJT: Tensor, score_QJ: Tensor, stops_QJ: Tensor) -> None:
        """Keep the B best among what had finished and what the leading candidates finish now."""
        finishes_QJ = stops_QJ & self._leading_J
        mean_QJ = score_QJ / (self._taken_1 + 1) + ~self._improvable_Q1 * _NEVER + ~finishes_QJ * _NEVER
        score = torch.cat((self._finished_score_QB, mean_QJ), 1)
        kept_QB = score.topk(self._beams).indices
        tokens = torch.cat((self._finished_QBT, candidate_QJT), 1)
        self._finished_QBT.copy_(_pick(tokens, kept_QB))
        self._finished_score_QB.copy_(score.gather(1, kept_QB))
        self._is_finished_QB.copy_(torch.cat((self._is_finished_QB, finishes_QJ), 1).gather(1, kept_QB))

    def result(self) -> list[list[int]]:
        rows: list[list[int]] = self._finished_QBT[:, 0].tolist()
        return rows


def _pick(sequences: Tensor, index: Tensor) -> Tensor:
    return sequences.gather(1, index[..., None].expand(-1, -1, sequences.shape[2]))
