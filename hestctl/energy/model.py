"""The energy model: joules of a generation before it runs, from what ``calibrate`` measured on the device.

A generation is one prefill call and one decode step for every new token but the first, which the prefill
brings. With P prompt and N new tokens in each of a batch's sequences:

    prefill = call + P * token + P^2 * attention        decode = steps * (step + context * attention_step)

The coefficients are fitted to whole generations metered at several lengths, per batch size and beam width;
so they hold all that a generation does: MatMuls, attention, head, and the idle watts of launch gaps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from hestctl.energy.protocol import Unavailable
from hestctl.records import BlockStates

GateKind = Literal["ordinal", "linear", "static"]
Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Cost:
    """Joules, and the error of that figure (J, one standard error with the meter's bound)."""

    joules: float
    error_j: float


@dataclass(frozen=True, slots=True)
class GenerationPoint:
    """Joules of one whole generation of the bare backbone, the entire batch together."""

    batch_size: int
    num_beams: int
    prompt_tokens: int
    new_tokens: int
    cost: Cost


@dataclass(frozen=True, slots=True)
class AdapterPass:
    """What one kind of gate's adapters add for a whole batch, ledger included.

    ``prefill`` in joules per token position of the prompts, ``decode`` in joules per step.
    """

    gate: GateKind
    batch_size: int
    num_beams: int
    prefill: Cost
    decode: Cost


@dataclass(frozen=True, slots=True)
class LayerMatmuls:
    """Joules per row and token of one layer's MatMuls, in full precision and in int8.

    ``layers`` are those of this shape: the figure is the mean of all of them, one after the other.
    """

    layers: tuple[int, ...]
    phase: Phase
    rows: int
    full: Cost
    int8: Cost


@dataclass(frozen=True, slots=True)
class Terms:
    """Joules of one batch as a function of its lengths, P prompt and N new tokens in each sequence.

    prefill = call + P * token + P^2 * token2; decode = steps * step + context * context_j, with
    steps = max(0, N - 1) and context = steps * P + steps * (steps + 1) / 2.
    """

    call_j: float = 0.0
    token_j: float = 0.0
    token2_j: float = 0.0
    step_j: float = 0.0
    context_j: float = 0.0

    def prefill_j(self, prompt_tokens: float) -> float:
        """Joules of the prefill of ``prompt_tokens`` in each sequence, the first new token included."""
        return self.call_j + self.token_j * prompt_tokens + self.token2_j * prompt_tokens**2

    def decode_j(self, prompt_tokens: float, new_tokens: float) -> float:
        """Joules of the decode steps that follow, ``new_tokens - 1`` of them."""
        steps = max(0.0, new_tokens - 1)
        return self.step_j * steps + self.context_j * (steps * prompt_tokens + steps * (steps + 1) / 2)

    def total_j(self, prompt_tokens: float, new_tokens: float) -> float:
        return self.prefill_j(prompt_tokens) + self.decode_j(prompt_tokens, new_tokens)

    def plus(self, other: Terms) -> Terms:
        return Terms(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    def times(self, factor: float) -> Terms:
        return Terms(*(factor * getattr(self, name) for name in self.__slots__))

    @classmethod
    def zero(cls) -> Terms:
        return cls()


class PhaseJoules(NamedTuple):
    """Predicted joules of one batch's two phases."""

    prefill_j: float
    decode_j: float

    @property
    def total_j(self) -> float:
        return self.prefill_j + self.decode_j


@dataclass(frozen=True, slots=True)
class PassCosts:
    """The fitted coefficients (J) of one batch size and beam width.

    ``worst`` is the largest relative deviation of a calibrated generation from the fit.
    """

    call_j: float
    token_j: float
    token2_j: float
    step_j: float
    context_j: float
    worst: float

    def prefill_j(self, prompt_tokens: int) -> float:
        """Joules of the prefill of ``prompt_tokens`` in each sequence, the first new token included."""
        return self.call_j + self.token_j * prompt_tokens + self.token2_j * prompt_tokens**2

    def decode_j(self, prompt_tokens: int, new_tokens: int) -> float:
        """Joules of the decode steps that follow, ``new_tokens - 1`` of them."""
        steps, context = _decode_terms(prompt_tokens, new_tokens)
        return self.step_j * steps + self.context_j * context


def _decode_terms(prompt_tokens: int, new_tokens: int) -> tuple[int, int]:
    """Decode steps, and the context tokens that all of them together look back on."""
    steps = max(0, new_tokens - 1)
    return steps, steps * prompt_tokens + steps * (steps + 1) // 2


@dataclass(frozen=True, slots=True)
class EnergyModel:
    """Predicts joules of any plan at any lengths, for the batch sizes and the engine it was measured with."""

    engine: str
    points: tuple[GenerationPoint, ...]
    adapters: tuple[AdapterPass, ...]
    matmuls: tuple[LayerMatmuls, ...]

    def passes(self, batch_size: int, num_beams: int) -> PassCosts | Unavailable:
        """The coefficients for this batch size and beam width, or why there are none.

        Least squares of relative deviations over the points, no coefficient below zero
        (Lawson and Hanson's NNLS).
        """
        points = [p for p in self.points if (p.batch_size, p.num_beams) == (batch_size, num_beams)]
        if not points:
            known = sorted({f"{p.batch_size} x {p.num_beams}" for p in self.points})
            return Unavailable(
                f"batch {batch_size} with {num_beams} beams was not calibrated ({', '.join(known)} was)"
            )
        return _fit(points)

    def phases_disagree(self, batch_size: int, num_beams: int) -> float | None:
        """The largest relative difference between two ways to tell the prefill's joules, over the lengths.

        One is a window of the prefill alone, the other a regression over generations of several tokens that
        never saw that window. None where the points do not allow it.
        """
        points = [p for p in self.points if (p.batch_size, p.num_beams) == (batch_size, num_beams)]
        longer = [p for p in points if p.new_tokens > 1]
        if len({p.new_tokens for p in longer}) < 2:
            return None
        costs = _fit(longer)
        alone = [p for p in points if p.new_tokens == 1]
        found = [abs(costs.prefill_j(p.prompt_tokens) / p.cost.joules - 1) for p in alone]
        return max(found, default=None)

    def predict(
        self,
        prompt_tokens: Sequence[int],
        new_tokens: Sequence[int],
        *,
        num_beams: int = 1,
        gate: GateKind | None = None,
        layer_states: Sequence[Literal["off", "int8", "full"]] | None = None,
    ) -> PhaseJoules | Unavailable:
        """Joules of one batch: its sequences run to the longest prompt (padding) and the longest answer.

        ``gate``: whose adapters ride along, None for the bare backbone. ``layer_states``: the state of each
        layer's MatMuls, all full where it is None; a layer that is off keeps its attention's joules.
        Unavailable, with the reason, for what was not calibrated.
        """
        batch_size, rows = len(prompt_tokens), len(prompt_tokens) * num_beams
        longest, steps = max(prompt_tokens), max(0, max(new_tokens) - 1)
        costs = self.passes(batch_size, num_beams)
        if isinstance(costs, Unavailable):
            return costs
        prefill_j, decode_j = costs.prefill_j(longest), costs.decode_j(longest, steps + 1)
        if gate is not None:
            wanted = (gate, batch_size, num_beams)
            found = [a for a in self.adapters if (a.gate, a.batch_size, a.num_beams) == wanted]
            if not found:
                return Unavailable(f"the {gate} gate was not calibrated at batch {batch_size} x {num_beams}")
            (adapter,) = found
            prefill_j += adapter.prefill.joules * longest
            decode_j += adapter.decode.joules * steps
        if layer_states is not None:
            prefill_j -= self._saved_j("prefill", rows, layer_states) * rows * longest
            decode_j -= self._saved_j("decode", rows, layer_states) * rows * steps
        return PhaseJoules(prefill_j, decode_j)

    def generation(
        self, batch_size: int, num_beams: int, gate: GateKind | None, blocks: BlockStates | None
    ) -> Terms | Unavailable:
        """The bill of one batch without the directions' own prices; ``blocks`` None: all full."""
        if blocks is not None and not blocks.all_full:
            return Unavailable("blocks were not calibrated")
        costs = self.passes(batch_size, num_beams)
        if isinstance(costs, Unavailable):
            return costs
        bill = Terms(costs.call_j, costs.token_j, costs.token2_j, costs.step_j, costs.context_j)
        if gate is None:
            return bill
        for a in self.adapters:
            if (a.gate, a.batch_size, a.num_beams) == (gate, batch_size, num_beams):
                return bill.plus(Terms(token_j=a.prefill.joules, step_j=a.decode.joules))
        return Unavailable(f"the {gate} gate was not calibrated at batch {batch_size} x {num_beams}")

    def component(self, batch_size: int, num_beams: int, block: int, state: int) -> Terms | Unavailable:
        """Joules of one layer's block in a state, of the whole batch."""
        return Unavailable("blocks were not calibrated")

    def fit_error(self, batch_size: int, num_beams: int) -> float | Unavailable:
        """The largest relative deviation of a calibrated generation from the fit."""
        costs = self.passes(batch_size, num_beams)
        return costs if isinstance(costs, Unavailable) else costs.worst

    def padded(self, batch_size: int, num_beams: int) -> int | Unavailable:
        """The smallest calibrated batch size of at least ``batch_size`` at these beams."""
        sizes = [p.batch_size for p in self.points if p.num_beams == num_beams]
        fit = [size for size in sizes if size >= batch_size]
        return min(fit) if fit else Unavailable(f"no batch of {batch_size} or more was calibrated")

    def matmuls_j(self, phase: Phase, rows: int, state: Literal["int8", "full"]) -> float | None:
        """Joules per row and token of all layers' MatMuls in one state; None where it was not measured."""
        held = self._matmuls(phase, rows)
        if not held:
            return None
        return math.fsum(len(m.layers) * getattr(m, state).joules for m in held)

    def _matmuls(self, phase: Phase, rows: int) -> list[LayerMatmuls]:
        # A prefill has so many rows and tokens at once that its joules per token no longer depend on them.
        return [m for m in self.matmuls if m.phase == phase and (phase == "prefill" or m.rows == rows)]

    def _saved_j(
        self, phase: Phase, rows: int, layer_states: Sequence[Literal["off", "int8", "full"]]
    ) -> float:
        """Joules per row and token that the layers' states save against all of them at full precision."""
        saved = 0.0
        for matmuls in self._matmuls(phase, rows):
            prices = {"off": 0.0, "int8": matmuls.int8.joules, "full": matmuls.full.joules}
            saved += math.fsum(prices["full"] - prices[layer_states[layer]] for layer in matmuls.layers)
        return saved

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> EnergyModel:
        return cls(
            engine=document["engine"],
            points=tuple(GenerationPoint(**_costs(p, "cost")) for p in document["points"]),
            adapters=tuple(AdapterPass(**_costs(a, "prefill", "decode")) for a in document["adapters"]),
            matmuls=tuple(
                LayerMatmuls(**{**_costs(m, "full", "int8"), "layers": tuple(m["layers"])})
                for m in document["matmuls"]
            ),
        )


def _fit(points: Sequence[GenerationPoint]) -> PassCosts:
    """Least squares of relative deviations, no coefficient below zero."""
    import numpy as np
    from scipy.optimize import nnls

    terms = np.array(
        [
            (1, p.prompt_tokens, p.prompt_tokens**2, *_decode_terms(p.prompt_tokens, p.new_tokens))
            for p in points
        ],
        dtype=float,
    )
    joules = np.array([p.cost.joules for p in points])
    relative = terms / joules[:, None]
    # Columns of like size: P^2 against 1 would cost nnls most of its digits.
    size = np.linalg.norm(relative, axis=0)
    size[size == 0] = 1.0
    found, _ = nnls(relative / size, np.ones(len(points)))
    coefficients = found / size
    call_j, token_j, token2_j, step_j, context_j = coefficients.tolist()
    return PassCosts(
        call_j,
        token_j,
        token2_j,
        step_j,
        context_j,
        worst=float(np.abs(relative @ coefficients - 1).max()),
    )


def _costs(document: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {**document, **{name: Cost(**document[name]) for name in names}}
