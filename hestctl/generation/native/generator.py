"""hestctl's own engine behind the same interface as ``generation.engine.Generator``.

Shape legend: Q requests, V vocabulary, L layers, S = 3 states.
"""

from __future__ import annotations

import gc
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from hestctl.data.prompts import Encoded
from hestctl.errors import Exit, HestError
from hestctl.generation.engine import Generated, Notes, blocks_note
from hestctl.generation.fused import why_not_fused
from hestctl.generation.native.cache import allocate, bucket
from hestctl.generation.native.choice import Rules
from hestctl.generation.native.gates import Directions, Gates
from hestctl.generation.native.graph import Replay
from hestctl.generation.native.known import repetition_penalty, unsupported
from hestctl.generation.native.network import Network
from hestctl.generation.native.prompts import Prompts, lay_out
from hestctl.generation.native.session import Session, Shape
from hestctl.generation.native.weights import kernel_note
from hestctl.hardening.artefact import Codes
from hestctl.hardening.plan import Plan
from hestctl.kernels.choose import Choices
from hestctl.model.backbone import Backbone
from hestctl.model.spectral import SpectralAdapters
from hestctl.records import BlockStates

ENGINE = "hestctl"

_SESSIONS = 32
"""Batch shapes whose graphs are kept; they share one cache. The one used longest ago goes first."""


class NativeGenerator:
    """A backbone with hardened adapters, ready to generate; base and merged LoRA have no adapters.

    ``blocks`` are the states that the layers' blocks run in, None for all in full: int8 ones by the kernels
    of ``choices`` (the default one where it is None), from ``codes`` where given. ``static`` lays everything
    out as a GPU needs it; by default where there is one. ``notes`` tells which blocks run how, whether
    decode's adapters are fused, and which kernels run, each with its reason.

    int8 codes and adapters are taken as they are when the generator is made: merge LoRA and harden before.
    A backbone whose parameters are put elsewhere is read again.

    Raises HestError (usage) where ``unsupported`` has a reason; KeyError and ValueError as ``read_weights``.
    """

    engine = ENGINE

    def __init__(
        self,
        backbone: Backbone,
        adapters: SpectralAdapters | None,
        plan: Plan | None,
        *,
        blocks: BlockStates | None = None,
        choices: Choices | None = None,
        codes: Codes | None = None,
        static: bool | None = None,
    ) -> None:
        on_gpu = backbone.device.type == "cuda"
        _refuse(unsupported(backbone))
        if on_gpu and adapters is not None and adapters.uses_int8 and adapters.shape[2] % 8:
            _refuse(f"int8 products on a GPU need ranks of multiples of 8, not {adapters.shape[2]}")
        self.backbone, self.adapters, self.plan = backbone, adapters, plan
        self._choices = choices
        self._static = on_gpu if static is None else static
        self._directions, self._fused = None, False
        self.notes: Notes = {"adapter": "none"}
        if adapters is not None:
            self._directions = Directions(adapters, backbone.dtype)
            reason = why_not_fused(adapters, backbone.device)
            if reason is None and not self._static:
                reason = "batches are not laid out for a GPU"
            self._fused = reason is None
            self.notes["adapter"] = "fused" if reason is None else f"unfused: {reason}"
        wanted = BlockStates.uniform(backbone.num_layers) if blocks is None else blocks
        self._network = Network(backbone, wanted, choices, codes)
        self.notes["blocks"] = blocks_note(self.blocks)
        self.notes["kernels"] = kernel_note(self._network.weights, choices)
        self._warm = False
        self._sessions: OrderedDict[Shape, Session] = OrderedDict()
        self._most_sessions = _SESSIONS
        self._memory = torch.empty(0, dtype=backbone.dtype)

    @property
    def blocks(self) -> BlockStates:
        """The states that the layers' blocks run in, by what the network holds of them."""
        return self._network.weights.blocks

    @torch.inference_mode()
    def warm_up(
        self,
        rows: Sequence[Encoded],
        *,
        batch_size: int,
        new_tokens: int,
        num_beams: int,
        forced_length: bool = False,
    ) -> int:
        """Pay beforehand for what a first time costs, and say how many batches were run for it.

        On a GPU one batch of every shape that ``rows`` will have and no batch had before, the largest first
        (compilation, capture, memory); on a CPU the very first batch alone. Errors as ``generate``.
        """
        parts = _parts(rows, batch_size)
        if not self._static:
            if self._warm:
                return 0
            self.generate(parts[0], new_tokens=new_tokens, num_beams=num_beams, forced_length=forced_length)
            return 1
        self._look_again()
        shapes = {self._shape(part, new_tokens, num_beams, forced_length): part for part in reversed(parts)}
        # What is warmed up must stay warm: a capture under the meter would be some sample's joules.
        self._most_sessions = max(_SESSIONS, len(shapes))
        network, made = self._network, 0
        for shape in sorted(shapes, key=lambda shape: math.prod(shape.cache(network)), reverse=True):
            if shape not in self._sessions:
                self._session(shape).begin([row.prompt_ids for row in shapes[shape]])
                made += 1
        return made

    def warm_up_labels(self, rows: Sequence[Encoded], *, batch_size: int) -> int:
        """``warm_up`` for ``label_scores``: on a GPU a batch of every count and length bucket."""
        parts = _parts(rows, batch_size)
        if not self._static:
            if self._warm:
                return 0
            self.label_scores(parts[0])
            return 1
        buckets = {(len(part), bucket(max(len(row.prompt_ids) for row in part))): part for part in parts}
        for part in buckets.values():
            self.label_scores(part)
        return len(buckets)

    @torch.inference_mode()
    def generate(
        self, rows: Sequence[Encoded], *, new_tokens: int, num_beams: int, forced_length: bool = False
    ) -> Generated:
        """Greedy or beam search, at most ``new_tokens`` new ones each.

        ``forced_length`` makes it exactly that many: stop tokens cannot be chosen before. Raises HestError
        when the cache does not fit or the model cannot look back so far.
        """
        shape = self._shape(rows, new_tokens, num_beams, forced_length)
        session = self._session(shape)
        self._warm = True
        session.begin([row.prompt_ids for row in rows])
        stop = session.stop()
        for _ in range(shape.rules.new_tokens - 1):
            if stop.stopped():
                break
            session.decode()
        new_ids, stopped = [], []
        for row in session.choice.result():
            end = next((i + 1 for i, token in enumerate(row) if token in shape.rules.stop_ids), None)
            new_ids.append(row[: end or len(row)])
            stopped.append(end is not None)
        return Generated(new_ids, stopped, _log(session.gates), self.blocks)

    @torch.inference_mode()
    def label_scores(self, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor | None]:
        """Logits of the first answer token, (Q, V) on the CPU, and the log of states, (P, Q, L, S)."""
        sequences = [row.prompt_ids for row in rows]
        self._warm = True
        x_ND, prompts, gates = self._over(sequences, left=True)
        return self._network.logits(x_ND[prompts.last_Q]).float().cpu(), _log(gates)

    @torch.inference_mode()
    def answer_nll(self, rows: Sequence[Encoded]) -> list[float]:
        """Summed negative log-likelihood (nats) of each row's reference answer under the hard gates."""
        sequences = [row.prompt_ids + row.answer_ids for row in rows]
        x_ND, prompts, _ = self._over(sequences, left=False)
        asked: list[int] = []
        lengths = [len(row.answer_ids) for row in rows]
        for row, last in zip(rows, prompts.last_Q.tolist(), strict=True):
            asked += range(last - len(row.answer_ids), last)
        device = self.backbone.device
        logits = self._network.logits(x_ND[torch.tensor(asked, device=device)]).float()
        wanted = torch.tensor([token for row in rows for token in row.answer_ids], device=device)
        losses = F.cross_entropy(logits, wanted, reduction="none").cpu()
        ends = accumulate(lengths, initial=0)
        return [float(losses[start:end].sum()) for start, end in pairwise(ends)]

    def adapter_work(self, batch_size: int, num_beams: int, tokens: int) -> Callable[[], object]:
        """All layers' adapters alone, over prompts of ``tokens`` or, where that is 1, over one step."""
        device, layers = self.backbone.device, self.backbone.num_layers
        gates = self._gates(batch_size, num_beams, steps=tokens == 1)
        if gates is None:
            return lambda: None
        prompts = lay_out([[0] * tokens] * batch_size, device, width=None, grid="left")
        gates.begin(prompts, tokens)
        rows = batch_size * (tokens if tokens > 1 else num_beams)
        hidden_ND = torch.ones(rows, self.backbone.hidden_size, device=device, dtype=self.backbone.dtype)
        if tokens > 1:
            return lambda: [gates.prompt(layer, hidden_ND) for layer in range(layers)]
        alive = torch.ones((), dtype=torch.bool, device=device)

        def step() -> None:
            gates.start(alive)
            for layer in range(layers):
                gates.token(layer, hidden_ND)
            gates.tally()

        return Replay(step, lambda: None) if device.type == "cuda" else step

    def text(self, ids: Sequence[int]) -> str:
        """Tokens as text, special tokens left out."""
        return str(self.backbone.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _over(
        self, sequences: Sequence[Sequence[int]], *, left: bool
    ) -> tuple[Tensor, Prompts, Gates | None]:
        longest = max(len(ids) for ids in sequences)
        _refuse(unsupported(self.backbone, longest))
        self._look_again()
        prompts = lay_out(
            sequences,
            self.backbone.device,
            width=bucket(longest) if self._static else None,
            grid="left" if left else "right",
        )
        gates = self._gates(len(sequences), 1, steps=False)
        if gates is not None:
            gates.begin(prompts, 0)
        return self._network.over(prompts, gates, None), prompts, gates

    def _shape(self, rows: Sequence[Encoded], new_tokens: int, beams: int, forced: bool) -> Shape:
        longest = max(len(row.prompt_ids) for row in rows)
        if self.plan is not None:
            new_tokens = self.plan.max_new_tokens_for(
                [len(row.prompt_ids) for row in rows], beams, new_tokens, [row.sample_id for row in rows]
            )
        _refuse(unsupported(self.backbone, longest + new_tokens))
        stop_ids, pad_id = self.backbone.stop_ids, self.backbone.pad_id
        rules = Rules(new_tokens, stop_ids, pad_id, forced, repetition_penalty(self.backbone))
        return Shape(len(rows), beams, bucket(longest), rules)

    def _session(self, shape: Shape) -> Session:
        self._look_again()
        session = self._sessions.pop(shape, None)
        if session is None:
            while len(self._sessions) >= self._most_sessions:
                self._sessions.popitem(last=False)
            gates = self._gates(shape.requests, shape.beams, steps=True)
            memory = self._room(shape)
            session = Session(self._network, shape, gates, memory, static=self._static)
        self._sessions[shape] = session
        return session

    def _room(self, shape: Shape) -> Tensor:
        """Memory for the cache, the same for every session as long as it is large enough."""
        wanted = shape.cache(self._network)
        if len(self._memory) < math.prod(wanted):
            self._sessions.clear()
            self._memory = self._memory.new_empty(0)
            if self._static:
                gc.collect()  # sessions hold themselves in cycles, and the old cache with them
            self._memory = allocate(wanted, self.backbone.dtype, self.backbone.device)
        return self._memory

    def _gates(self, requests: int, beams: int, *, steps: bool) -> Gates | None:
        """The adapters of a batch, of whose prompts alone unless ``steps``."""
        if self._directions is None:
            return None
        device, fused = self.backbone.device, steps and self._fused
        return Gates(self._directions, self.plan, requests, beams, device, fused=fused)

    def _look_again(self) -> None:
        if self._network.moved:
            _refuse(unsupported(self.backbone))
            self._sessions.clear()
            # Without the codes it was made with: weights that moved may be others.
            self._network = Network(self.backbone, self.blocks, self._choices)


def _parts(rows: Sequence[Encoded], size: int) -> list[Sequence[Encoded]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _log(gates: Gates | None) -> Tensor | None:
    return None if gates is None else gates.log().cpu()


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise HestError(
            f"hestctl's engine cannot run this: {reason}", "--engine transformers can", Exit.USAGE
        )
