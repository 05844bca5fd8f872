"""The training loop: one optimiser step at a time, yielding what happened. Prints nothing, knows no SQL.

Loss: mean negative log-likelihood of the answer tokens, plus ``lambda * (E / E_max - 1)`` where a
budget binds the method.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hestctl.budget import Budget, Multiplier
from hestctl.data.prompts import Encoded, TrainBatch, train_batch
from hestctl.errors import HestError
from hestctl.model.backbone import Backbone
from hestctl.model.blocks import Int8Codes, in_states
from hestctl.model.gates import GateNoise, OrdinalGate
from hestctl.model.likelihood import answer_loss, last_hidden
from hestctl.model.methods import Tuner
from hestctl.model.spectral import applied, normalise
from hestctl.records import OFF, BlockStates, StepMetric
from hestctl.settings import TrainSettings
from hestctl.training.gatepass import GatePass
from hestctl.training.network import BlockDraw, BlockTraining, Settlement
from hestctl.training.ranks import Ranks


@dataclass(slots=True)
class _Totals:
    """Figures of an effective batch or of a rank's part of it; ``shares`` has one entry a micro-batch."""

    task: float = 0.0
    expected_j: float = 0.0
    decided_j: float = 0.0
    shares: list[tuple[float, float, float]] = field(default_factory=list)
    measured: list[tuple[int, tuple[int, int], float]] = field(default_factory=list)
    """What blocks were found to be worth: micro-batch, block, nats a token."""

    def add(self, other: _Totals) -> None:
        self.task += other.task
        self.expected_j += other.expected_j
        self.decided_j += other.decided_j
        self.shares += other.shares
        self.measured += other.measured


class Trainer:
    """Trains one tuner on one backbone.

    ``costs_j`` are joules per direction and token of (off, int8, full). ``budget`` is None for
    methods that no budget binds; their energy is reported all the same. ``blocks`` are the states of the
    layers' blocks, learned or fixed; None runs the backbone as it is and counts the directions alone.
    ``ranks`` share the micro-batches.
    """

    def __init__(
        self,
        backbone: Backbone,
        tuner: Tuner,
        rows: Sequence[Encoded],
        settings: TrainSettings,
        *,
        costs_j: tuple[float, float, float],
        budget: Budget | None,
        multiplier: Multiplier | None,
        blocks: BlockTraining | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.backbone = backbone
        self.tuner = tuner
        self.budget = budget
        self.multiplier = multiplier
        self.blocks = blocks
        self.step = 0
        self._codes = Int8Codes()
        self._rows = rows
        self._settings = settings
        self._costs_j = costs_j
        self._ranks = ranks or Ranks()
        self._effective = settings.batch_size * settings.accumulation
        self._micro_size = settings.batch_size
        self._per_epoch = math.ceil(len(rows) / self._effective)
        whole = settings.epochs * self._per_epoch
        self.total_steps = min(settings.max_steps or whole, whole)
        self._optimizer = self._build_optimizer()
        self._scaler = torch.amp.GradScaler(backbone.device.type, enabled=backbone.dtype == torch.float16)
        if settings.gradient_checkpointing:
            backbone.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]

    def start(self) -> None:
        """Before step 0: fit an ordinal gate to the scores of one real batch, and to its budget.

        Thresholds are staggered over the scores seen, layer by layer; with a budget they all move by one
        number until the batch's decided energy is E_max, so that training starts where it may stay.
        """
        spectral = self.tuner.spectral
        if spectral is None or not isinstance(spectral.gate, OrdinalGate):
            return
        gate = spectral.gate
        batch = self._batch(self._rows[: self._effective])
        seen: list[Tensor] = []

        def look(layer: int, hidden: Tensor) -> Tensor:
            seen.append(gate.controller(normalise(hidden), layer)[batch.attention_mask.bool()])
            return hidden

        with torch.no_grad():
            fixed = None if self.blocks is None else self.blocks.fixed
            with self._blocks_run(fixed), applied(self.backbone.layers, look), self._precision():
                last_hidden(self.backbone, batch)
            score_LN = torch.stack(seen).float()
            gate.spread_over(score_LN.mean(1), score_LN.std(1))
            if self.blocks is not None and self.blocks.learning:
                self.blocks.start(batch.prompt_tokens.tolist(), self._new_tokens)
            if self.budget is not None and self.budget.scope == "adapter":
                share = self._budget_share(batch)
                gate.threshold.add_(_shift_to(gate, score_LN, share, self._costs_j))

    def _budget_share(self, batch: TrainBatch) -> float:
        """E_max over the joules of a generation of these prompts with every direction at full."""
        assert self.budget is not None
        work = sum(self.budget.work(n) for n in batch.prompt_tokens.tolist()) / len(batch.prompt_tokens)
        layers, _, rank = self.tuner.spectral.shape  # type: ignore[union-attr]
        return self.budget.emax_j / (work * layers * rank * self._costs_j[2])

    @property
    def epoch(self) -> float:
        """Passes over the training split done so far."""
        return self.step / self._per_epoch

    def steps(self) -> Iterator[StepMetric]:
        """Run the remaining optimiser steps, yielding each one's figures.

        Raises HestError when the loss or a gradient is not finite, before anything is updated.
        """
        # transformers checkpoints activations in training mode alone.
        self.backbone.model.train(self._settings.gradient_checkpointing)
        try:
            yield from self._remaining_steps()
        finally:
            self.backbone.model.train(False)

    def _remaining_steps(self) -> Iterator[StepMetric]:
        while self.step < self.total_steps:
            rows = self._effective_batch(self.step)
            self.settle()
            started = time.perf_counter()
            totals = self._accumulate(rows)
            self._scaler.unscale_(self._optimizer)
            norm = torch.nn.utils.clip_grad_norm_(
                list(self.tuner.named_parameters().values()), self._settings.clip_norm
            )
            if not math.isfinite(totals.task) or (not torch.isfinite(norm) and not self._scaler.is_enabled()):
                raise HestError(
                    f"training diverged at step {self.step}: loss {totals.task}, gradient norm {float(norm)}",
                    "lower --lr or --gate-lr; the last checkpoint holds the state before",
                )
            rate = self._set_rates()
            self._scaler.step(self._optimizer)
            self._scaler.update()
            self._optimizer.zero_grad(set_to_none=True)
            metric = self._metric(rows, totals, float(norm), rate, time.perf_counter() - started)
            if self.multiplier is not None and self.step >= self.warmup_steps:
                ratio = metric.energy_ratio or 0.0
                if self.blocks is not None:
                    ratio /= self.blocks.looseness(self.step + 1 - self.warmup_steps, ratio)
                self.multiplier.step(ratio)
            self.step += 1
            yield metric

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-able state from which ``restore`` goes on as if nothing had happened."""
        tensors = {f"model.{name}": tensor for name, tensor in self.tuner.state().items()}
        for name, parameter in self.tuner.named_parameters().items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{name}.{key}"] = value.detach().to("cpu", copy=True)
        return tensors, {
            "multiplier": [self.multiplier.value, self.multiplier.excess] if self.multiplier else None,
            "scaler": self._scaler.state_dict(),
            "blocks": self.blocks.state() if self.blocks else None,
        }

    def restore(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from a checkpoint. Raises KeyError where a tensor is missing."""
        self.step = step
        parameters = self.tuner.named_parameters()
        mine = {k.removeprefix("model."): tensor for k, tensor in tensors.items() if k.startswith("model.")}
        self.tuner.load(mine)
        for name, parameter in parameters.items():
            prefix = f"adam.{name}."
            for key, value in tensors.items():
                if key.startswith(prefix):
                    device = "cpu" if key.endswith(".step") else parameter.device
                    self._optimizer.state[parameter][key.removeprefix(prefix)] = value.to(device)
        if self.multiplier is not None:
            self.multiplier.value, self.multiplier.excess = state["multiplier"]
        self._scaler.load_state_dict(state["scaler"])
        if self.blocks is not None:
            self.blocks.restore(state["blocks"])

    @property
    def warmup_steps(self) -> int:
        """Steps in which rates rise and the multiplier stands still."""
        # A warm-up longer than a tenth of a short run would leave no steps at full rate.
        return min(self._settings.warmup_steps, max(1, self.total_steps // 10))

    def _build_optimizer(self) -> torch.optim.AdamW:
        s = self._settings
        groups: dict[str, dict[str, Any]] = {
            "weights": {"lr": s.learning_rate, "weight_decay": s.weight_decay},
            "scale": {"lr": s.scale_learning_rate, "weight_decay": 0.0},
            "projection": {"lr": s.gate_learning_rate * 16 / self.backbone.hidden_size, "weight_decay": 0.0},
            "controller": {"lr": s.gate_learning_rate, "weight_decay": 0.0},
            "thresholds": {"lr": s.threshold_learning_rate, "weight_decay": 0.0},
            "blocks": {"lr": s.block_learning_rate, "weight_decay": 0.0},
        }
        for name, parameter in self.tuner.named_parameters().items():
            groups[_group(name)].setdefault("params", []).append(parameter)
        used = [group for group in groups.values() if "params" in group]
        for group in used:
            group["peak"] = group["lr"]
        return torch.optim.AdamW(used, betas=(s.beta1, s.beta2), eps=s.epsilon)

    def _set_rates(self) -> float:
        """Linear warm-up, then a cosine to zero; returns the rate of the first group."""
        warmup = self.warmup_steps
        if self.step < warmup:
            factor = (self.step + 1) / warmup
        else:
            done = (self.step - warmup) / max(1, self.total_steps - warmup)
            factor = 0.5 * (1 + math.cos(math.pi * done))
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        return float(self._optimizer.param_groups[0]["lr"])

    def _effective_batch(self, step: int) -> list[Encoded]:
        epoch, index = divmod(step, self._per_epoch)
        order = np.random.default_rng([self._settings.seed, epoch]).permutation(len(self._rows))
        return [self._rows[i] for i in order[index * self._effective : (index + 1) * self._effective]]

    def _accumulate(self, rows: list[Encoded]) -> _Totals:
        """Forward and backward over the effective batch, its gradients and figures summed over ranks.

        When memory runs out on any rank, all halve the micro-batch.
        """
        while True:
            part: _Totals | None = None
            ran_out = None
            try:
                part = self._try_accumulate(rows)
            except torch.OutOfMemoryError as error:
                ran_out = str(error)
            parts = self._ranks.share((part, ran_out))
            short = next((reason for _, reason in parts if reason is not None), None)
            if short is None:
                break
            self._optimizer.zero_grad(set_to_none=True)
            if self._micro_size == 1:
                raise HestError(
                    f"out of memory with one sample at a time ({short})",
                    "lower --max-tokens, or turn on --gradient-checkpointing",
                )
            self._micro_size = math.ceil(self._micro_size / 2)
            torch.cuda.empty_cache()
        self._ranks.add_gradients(list(self.tuner.named_parameters().values()))
        totals = _Totals()
        for part, _ in parts:
            assert part is not None
            totals.add(part)
        # Remembered in one order, and not before the batch is done, however many ranks there are.
        for _, probe, worth in sorted(totals.measured):
            assert self.blocks is not None
            self.blocks.observe(probe, worth)
        return totals

    def _try_accumulate(self, rows: list[Encoded]) -> _Totals:
        totals = _Totals()
        answer_tokens = sum(len(row.answer_ids) for row in rows)
        for micro, start in enumerate(range(0, len(rows), self._micro_size)):
            if not self._ranks.mine(micro):
                continue
            part = rows[start : start + self._micro_size]
            batch = self._batch(part)
            noise = GateNoise(self._settings.seed, self.step, micro)
            gates = self._gates(batch, noise)
            drawn = None if self.blocks is None else self.blocks.draw(noise)
            # Open during the backward pass too: some versions of transformers recompute a checkpointed
            # layer together with its hooks.
            states = None if drawn is None else drawn.states
            with self._blocks_run(states), self._adapters_run(gates):
                with self._precision():
                    task = answer_loss(self.backbone, batch) / answer_tokens
                loss = task
                totals.task += float(task.detach())
                if gates is not None:
                    loss = task + self._energy_term(gates, drawn, batch, rows, totals)
                    totals.shares.append(gates.shares())
                self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            if drawn is not None and drawn.probe is not None:
                worth = self._measure(drawn, batch, noise, float(task.detach()) * answer_tokens)
                totals.measured.append((micro, drawn.probe, worth))
        return totals

    def _energy_term(
        self,
        gates: GatePass,
        drawn: BlockDraw | None,
        batch: TrainBatch,
        rows: list[Encoded],
        totals: _Totals,
    ) -> Tensor | float:
        """This micro-batch's part of ``weight * E / E_max``; adds its joules to the totals."""
        to_generation_B = self._to_generation(batch)
        expected = (gates.expected_j() * to_generation_B).sum() / len(rows)
        decided_j = float((gates.decided_j() * to_generation_B).sum()) / len(rows)
        term: Tensor | float = 0.0
        if self.blocks is not None and drawn is not None:
            blocks, blocks_j = self.blocks.energy_j(drawn, batch.prompt_tokens.tolist(), self._new_tokens)
            expected = expected + blocks / len(rows)
            decided_j += blocks_j / len(rows)
            term = self.blocks.worth(drawn) * len(batch.prompt_tokens) / len(rows)
        totals.expected_j += float(expected.detach())
        totals.decided_j += decided_j
        if self.budget is None or self.multiplier is None:
            return term
        return term + self.multiplier.weight * expected / self._emax_j(rows)

    def _emax_j(self, rows: Sequence[Encoded]) -> float:
        """E_max of these samples' generations, their mean (J)."""
        assert self.budget is not None
        if self.blocks is None or self.blocks.prices.emax is None:
            return self.budget.emax_j
        emax = self.blocks.prices.emax
        return sum(emax.total_j(len(row.prompt_ids), self._new_tokens) for row in rows) / len(rows)

    def _blocks_run(self, states: BlockStates | None) -> AbstractContextManager[None]:
        if states is None or states.all_full:
            return nullcontext()
        return in_states(self.backbone.layers, states, self._codes)

    def _adapters_run(self, gates: GatePass | None) -> AbstractContextManager[None]:
        return nullcontext() if gates is None else applied(self.backbone.layers, gates)

    @torch.no_grad()
    def _measure(self, drawn: BlockDraw, batch: TrainBatch, noise: GateNoise, nll: float) -> float:
        """Run the micro-batch with the probed block turned over: what is it worth (nats a token)?"""
        assert drawn.probe is not None
        gates = self._adapters_run(self._gates(batch, noise))
        with self._blocks_run(drawn.turned()), gates, self._precision():
            turned = float(answer_loss(self.backbone, batch))
        layer, block = drawn.probe
        sign = -1 if drawn.states.state(layer, block) == OFF else 1
        return sign * (turned - nll) / int(batch.answer_tokens.sum())

    @torch.no_grad()
    def settle(self) -> bool:
        """Fix the blocks' states if it is time: those that fit the budget, improved by swaps of one price.

        Blocks are not worth together what each is worth alone, so a swap is judged by the loss of all of
        them in their states, and kept where that falls. Returns whether it was time.
        """
        blocks = self.blocks
        if blocks is None or not blocks.due(self.step):
            return False
        rng = np.random.default_rng([self._settings.seed, self.step])
        rows = self._rows[: blocks.samples]
        decided, states = blocks.decided(), blocks.proposed()
        first = loss = self._decided_loss(rows, states)
        kept = 0
        for _ in range(blocks.swaps):
            tried = blocks.swap(states, rng)
            if tried is None:
                break
            found = self._decided_loss(rows, tried)
            if found < loss:
                states, loss, kept = tried, found, kept + 1
        prompts, emax_j = [len(row.prompt_ids) for row in rows], self._emax_j(rows) * len(rows)
        found_j, settled_j = (
            blocks.states_j(each, prompts, self._new_tokens) / emax_j for each in (decided, states)
        )
        told = Settlement(self.step, found_j, settled_j, kept, first, loss)
        blocks.settle(*self._ranks.told((states, told)))
        return True

    def _decided_loss(self, rows: Sequence[Encoded], states: BlockStates) -> float:
        """Nats per answer token of these samples, the blocks in these states and the gates as they decide."""
        total = 0.0
        for row in rows:
            batch = self._batch([row])
            gates = None
            if self.tuner.spectral is not None:
                gates = GatePass(self.tuner.spectral, batch.attention_mask, self._costs_j, None)
            with self._blocks_run(states), self._adapters_run(gates), self._precision():
                total += float(answer_loss(self.backbone, batch))
        return total / sum(len(row.answer_ids) for row in rows)

    def _gates(self, batch: TrainBatch, noise: GateNoise) -> GatePass | None:
        if self.tuner.spectral is None:
            return None
        return GatePass(self.tuner.spectral, batch.attention_mask, self._costs_j, noise)

    @property
    def _new_tokens(self) -> float:
        """What a generated sample is expected to have; without a budget, the mean of the answers."""
        if self.budget is not None:
            return self.budget.new_tokens
        return sum(len(row.answer_ids) for row in self._rows) / len(self._rows)

    def _to_generation(self, batch: TrainBatch) -> Tensor:
        """Per sequence: token positions of its generation over those of its training, (B,)."""
        tokens_B = (batch.prompt_tokens + batch.answer_tokens).float()
        if self.budget is None:
            return torch.ones_like(tokens_B)
        return self.budget.num_beams * (batch.prompt_tokens + self.budget.new_tokens) / tokens_B

    def _precision(self) -> Any:
        device = self.backbone.device
        if device.type != "cuda" or self.backbone.dtype == torch.float32:
            return nullcontext()
        return torch.autocast("cuda", self.backbone.dtype)

    def _batch(self, rows: Sequence[Encoded]) -> TrainBatch:
        return train_batch(rows, self.backbone.pad_id).to(self.backbone.device)

    def _metric(
        self, rows: list[Encoded], totals: _Totals, norm: float, rate: float, seconds: float
    ) -> StepMetric:
        emax_j = None if self.budget is None else self._emax_j(rows)
        ratio = None if emax_j is None else totals.decided_j / emax_j
        penalty = 0.0
        if emax_j is not None and self.multiplier is not None:
            penalty = self.multiplier.weight * (totals.expected_j / emax_j - 1)
        off = int8 = full = None
        if totals.shares:
            off, int8, full = (
                sum(column) / len(totals.shares) for column in zip(*totals.shares, strict=True)
            )
        tokens = sum(len(row.prompt_ids) + len(row.answer_ids) for row in rows)
        return StepMetric(
            step=self.step + 1,
            split="train",
            epoch=(self.step + 1) / self._per_epoch,
            loss=totals.task + penalty,
            task_loss=totals.task,
            learning_rate=rate,
            grad_norm=norm,
            energy_j=totals.decided_j if totals.shares else None,
            energy_ratio=ratio,
            multiplier=self.multiplier.weight if self.multiplier else None,
            share_off=off,
            share_int8=int8,
            share_full=full,
            tokens_per_s=tokens / seconds,
        )


def _group(name: str) -> str:
    """The parameter group of a tensor: each has its own learning rate."""
    if name in ("gate.threshold", "gate.gap", "gate.log_beta"):
        return "thresholds"
    if name.startswith("gate.blocks."):
        return "blocks"
    if name in ("gate.controller.token", "gate.weight"):
        return "projection"
    if name.startswith("gate."):
        return "controller"
    return "scale" if name == "scale" else "weights"


def _shift_to(
    gate: OrdinalGate, score_LN: Tensor, share: float, costs_j: tuple[float, float, float]
) -> float:
    """The shift of all thresholds at which decisions cost ``share`` of everything at full."""
    normal_LN = (score_LN - gate.centre_L[:, None]) / gate.spread_L[:, None]
    price_S = torch.tensor(costs_j, device=score_LN.device) / costs_j[2]
    low, high = -20.0, 20.0
    for _ in range(30):
        middle = (low + high) / 2
        logits = gate.logits_of(normal_LN, gate.threshold[:, None] + middle, gate.gap[:, None])
        if float(price_S[logits.argmax(-1)].mean()) > share:
            low = middle
        else:
            high = middle
    return high
