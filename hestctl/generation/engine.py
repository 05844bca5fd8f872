"""Generation with hardened adapters through transformers' own ``generate``: the reference engine.

Shape legend: Q requests, W rows (Q * beams), T tokens, L layers, S = 3 states, P positions as
``generation.positions`` has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig

from hestctl.data.prompts import Encoded, prompt_batch, train_batch
from hestctl.generation.hardpass import HardPass
from hestctl.hardening.plan import Plan
from hestctl.model.backbone import Backbone
from hestctl.model.blocks import Int8Codes, in_states
from hestctl.model.spectral import SpectralAdapters, applied
from hestctl.records import BLOCKS, STATES, BlockStates

Notes = dict[str, str | dict[str, str]]
"""What an engine chose, by subject, and why."""


@dataclass(frozen=True, slots=True)
class Generated:
    """One batch's result: new token ids per request (stop token included), and the log of states.

    ``log_PQLS`` counts the directions' states by position (``generation.positions``), ``blocks`` are those
    that the layers' blocks ran in.
    """

    new_ids: list[list[int]]
    stopped: list[bool]
    log_PQLS: Tensor | None
    blocks: BlockStates

    @property
    def counts_QLS(self) -> Tensor | None:  # noqa: N802, a tensor with its shape
        """The directions' states over all positions."""
        return None if self.log_PQLS is None else self.log_PQLS.sum(0)


def blocks_note(blocks: BlockStates) -> str:
    """Such as "attention 28 full, 2 off; mlp 20 full, 10 int8"."""
    told = []
    for block, counts in zip(BLOCKS, blocks.counts(), strict=True):
        by_state = [f"{count} {state}" for count, state in zip(counts, STATES, strict=True) if count]
        told.append(f"{block} {', '.join(reversed(by_state))}")
    return "; ".join(told)


class Generator:
    """A backbone with hardened adapters, ready to generate.

    ``adapters`` is None for methods without directions (base, merged LoRA); ``plan`` binds the
    ledger where a budget holds. ``blocks`` are the states that the layers' blocks run in, None for all in
    full: it computes what they compute, and saves nothing.
    """

    engine = "transformers"

    def __init__(
        self,
        backbone: Backbone,
        adapters: SpectralAdapters | None,
        plan: Plan | None,
        blocks: BlockStates | None = None,
    ) -> None:
        self.backbone = backbone
        self.blocks = BlockStates.uniform(backbone.num_layers) if blocks is None else blocks
        self._codes = Int8Codes()
        self.adapters = adapters
        self.plan = plan
        self._warm = False
        adapter = "none" if adapters is None else "unfused: transformers' engine has no fused step"
        self.notes: Notes = {
            "blocks": blocks_note(self.blocks),
            "adapter": adapter,
            "kernels": "default: not calibrated" if self.blocks.uses_int8 else "full precision: torch's own",
        }

    def warm_up(
        self,
        rows: Sequence[Encoded],
        *,
        batch_size: int,
        new_tokens: int,
        num_beams: int,
        forced_length: bool = False,
    ) -> int:
        """Run the first batch unless one ran before: lazy initialisation. Returns how many batches ran."""
        if self._warm:
            return 0
        first = rows[:batch_size]
        self.generate(first, new_tokens=new_tokens, num_beams=num_beams, forced_length=forced_length)
        return 1

    def warm_up_labels(self, rows: Sequence[Encoded], *, batch_size: int) -> int:
        """``warm_up`` for ``label_scores``."""
        if self._warm:
            return 0
        self.label_scores(rows[:batch_size])
        return 1

    @torch.inference_mode()
    def generate(
        self, rows: Sequence[Encoded], *, new_tokens: int, num_beams: int, forced_length: bool = False
    ) -> Generated:
        """Greedy or beam search from left-padded prompts, at most ``new_tokens`` new ones each.

        ``forced_length`` makes it exactly that many: stop tokens cannot be chosen before.
        """
        device, self._warm = self.backbone.device, True
        batch = prompt_batch(rows, self.backbone.pad_id)
        ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        if self.plan is not None:
            new_tokens = self.plan.max_new_tokens_for(
                [len(row.prompt_ids) for row in rows], num_beams, new_tokens, [row.sample_id for row in rows]
            )
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens if forced_length else 0,
            num_beams=num_beams,
            do_sample=False,
            pad_token_id=self.backbone.pad_id,
            eos_token_id=list(self.backbone.stop_ids),
        )
        gates = self._gates(mask, new_tokens, num_beams)
        model: Any = self.backbone.model
        with self._running(gates, cached=True):
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        new_ids, stopped = [], []
        for row in out[:, ids.shape[1] :].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in self.backbone.stop_ids), None)
            new_ids.append(row[: end or len(row)])
            stopped.append(end is not None)
        return Generated(new_ids, stopped, gates.log().cpu() if gates else None, self.blocks)

    @torch.inference_mode()
    def label_scores(self, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor | None]:
        """Logits of the first answer token, (Q, V) on the CPU, and the log of states, (P, Q, L, S)."""
        device, self._warm = self.backbone.device, True
        batch = prompt_batch(rows, self.backbone.pad_id)
        ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        gates = self._gates(mask, 0, None)
        with self._running(gates, cached=False):
            out = self.backbone.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp_min(0),
                logits_to_keep=1,
                use_cache=False,
            )
        return out.logits[:, -1].float().cpu(), gates.log().cpu() if gates else None

    @torch.inference_mode()
    def answer_nll(self, rows: Sequence[Encoded]) -> list[float]:
        """Summed negative log-likelihood (nats) of each row's reference answer under the hard gates."""
        device = self.backbone.device
        batch = train_batch(rows, self.backbone.pad_id)
        ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        labels = batch.labels.to(device)[:, 1:]
        gates = self._gates(mask, 0, None)
        with self._running(gates, cached=False):
            out = self.backbone.model.model(input_ids=ids, attention_mask=mask, use_cache=False)
        wanted = labels != -100
        logits = self.backbone.model.lm_head(out.last_hidden_state[:, :-1][wanted])
        losses = F.cross_entropy(logits.float(), labels[wanted], reduction="none")
        return [float(part.sum()) for part in torch.split(losses, wanted.sum(1).tolist())]

    def adapter_work(self, batch_size: int, num_beams: int, tokens: int) -> Callable[[], object]:
        """All layers' adapters alone, over prompts of ``tokens`` or, where that is 1, over one step."""
        rows, device = batch_size * num_beams, self.backbone.device
        hidden_WTD = torch.ones(
            rows, tokens, self.backbone.hidden_size, device=device, dtype=self.backbone.dtype
        )
        mask_QT = torch.ones(batch_size, tokens, dtype=torch.int64, device=device)
        gates = self._gates(mask_QT, tokens, num_beams)

        if gates is None:
            return lambda: None
        return lambda: [gates(layer, hidden_WTD) for layer in range(self.backbone.num_layers)]

    def text(self, ids: Sequence[int]) -> str:
        """Tokens as text, special tokens left out."""
        return str(self.backbone.tokenizer.decode(list(ids), skip_special_tokens=True))

    @contextmanager
    def _running(self, gates: HardPass | None, *, cached: bool) -> Iterator[None]:
        """While open, the blocks run in their states and the adapters are applied."""
        layers = self.backbone.layers
        with (
            in_states(layers, self.blocks, self._codes, cached=cached),
            applied(layers, gates) if gates else nullcontext(),
        ):
            yield

    def _gates(self, mask_QT: Tensor, new_tokens: int, beams: int | None) -> HardPass | None:
        """The adapters of a batch of these prompts; ``beams`` None where they are scored, not continued."""
        if self.adapters is None:
            return None
        ledger, fixed = None, {}
        if self.plan is not None:
            ledger = self.plan.ledger(mask_QT.sum(1).tolist(), new_tokens, beams, mask_QT.device)
            fixed = self.plan.fixed_states(mask_QT.device)
        return HardPass(self.adapters, mask_QT.repeat_interleave(beams or 1, 0), len(mask_QT), ledger, fixed)
