"""The energy model: joules of a generation before it runs, from what ``calibrate`` measured on the device.

A generation is one prefill call and one decode step for every new token but the first, which the prefill
brings. Its joules are those of each layer's blocks in their states, and of the rest; each of these is, with P
prompt and N new tokens in each of a batch's sequences:

    prefill = call + P * token + P^2 * token2        decode = steps * step + context * context_j

The coefficients are fitted to whole generations metered at several lengths and with all layers' blocks in one
state or another, per batch size and beam width; so they hold all that a generation does: MatMuls, attention,
head, and the idle watts of launch gaps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from hestctl.energy.protocol import Unavailable
from hestctl.records import BLOCKS, FULL, INT8, OFF, STATES, BlockStates

GateKind = Literal["ordinal", "linear", "static"]
Phase = Literal["prefill", "decode"]
State = Literal["off", "int8", "full"]

MODEL = "blocks-1"
"""What is measured and fitted, for the key of a table: one of another model is stale."""

VARIANTS: tuple[tuple[State, State], ...] = (
    ("full", "full"),
    ("off", "full"),
    ("full", "off"),
    ("off", "off"),
    ("int8", "int8"),
    ("off", "int8"),
    ("int8", "off"),
)
"""States of all layers' attention and MLP blocks that tell every block's joules in every state."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Joules, and the error of that figure (J, one standard error with the meter's bound)."""

    joules: float
    error_j: float


@dataclass(frozen=True, slots=True)
class Terms:
    """Joules of a batch's generation, or of a part of it, at any lengths: the five coefficients (J).

    Lengths may be means: a prefill's square and a step's context are then those of the mean.
    """

    call_j: float = 0.0
    token_j: float = 0.0
    token2_j: float = 0.0
    step_j: float = 0.0
    context_j: float = 0.0

    @classmethod
    def zero(cls) -> Terms:
        return cls()

    def prefill_j(self, prompt_tokens: float) -> float:
        """Joules of the prefill of ``prompt_tokens`` in each sequence, the first new token included."""
        return self.call_j + self.token_j * prompt_tokens + self.token2_j * prompt_tokens**2

    def decode_j(self, prompt_tokens: float, new_tokens: float) -> float:
        """Joules of the decode steps that follow, ``new_tokens - 1`` of them."""
        steps, context = _decode_terms(prompt_tokens, new_tokens)
        return self.step_j * steps + self.context_j * context

    def total_j(self, prompt_tokens: float, new_tokens: float) -> float:
        """Joules of both phases."""
        return self.prefill_j(prompt_tokens) + self.decode_j(prompt_tokens, new_tokens)

    def plus(self, other: Terms) -> Terms:
        return Terms(
            self.call_j + other.call_j,
            self.token_j + other.token_j,
            self.token2_j + other.token2_j,
            self.step_j + other.step_j,
            self.context_j + other.context_j,
        )

    def times(self, factor: float) -> Terms:
        return Terms(
            factor * self.call_j,
            factor * self.token_j,
            factor * self.token2_j,
            factor * self.step_j,
            factor * self.context_j,
        )


def _decode_terms(prompt_tokens: float, new_tokens: float) -> tuple[float, float]:
    """Decode steps, and the context tokens that all of them together look back on."""
    steps = max(0.0, new_tokens - 1)
    return steps, steps * prompt_tokens + steps * (steps + 1) / 2


@dataclass(frozen=True, slots=True)
class GenerationPoint:
    """Joules of one whole generation of the bare backbone, the entire batch together.

    ``attention`` and ``mlp`` are the states of all layers' blocks.
    """

    batch_size: int
    num_beams: int
    prompt_tokens: int
    new_tokens: int
    cost: Cost
    attention: State = "full"
    mlp: State = "full"


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


class PhaseJoules(NamedTuple):
    """Predicted joules of one batch's two phases."""

    prefill_j: float
    decode_j: float

    @property
    def total_j(self) -> float:
        return self.prefill_j + self.decode_j


def uniform(layers: int, attention: State, mlp: State) -> BlockStates:
    """All layers' attention blocks in one state, all their MLP blocks in another."""
    return BlockStates((STATES.index(attention),) * layers, (STATES.index(mlp),) * layers)


@dataclass(frozen=True, slots=True)
class EnergyModel:
    """Predicts joules of any plan at any lengths, for the batch sizes and the engine it was measured with.

    Where only full blocks were measured it knows whole generations in full precision, and no block.
    """

    engine: str
    layers: int
    points: tuple[GenerationPoint, ...]
    adapters: tuple[AdapterPass, ...]

    def generation(
        self, batch_size: int, num_beams: int, gate: GateKind | None, blocks: BlockStates | None
    ) -> Terms | Unavailable:
        """The bill of one batch without its directions' own prices.

        ``gate``: whose adapters ride along, None for the bare backbone. ``blocks``: None for all full.
        Unavailable, with the reason, for what was not calibrated. Raises ValueError for states of another
        number of layers.
        """
        if blocks is not None and blocks.layers != self.layers:
            raise ValueError(f"states of {blocks.layers} layers for a model of {self.layers}")
        fit = self._fitted(batch_size, num_beams)
        if isinstance(fit, Unavailable):
            return fit
        terms, states = fit.rest, BlockStates.uniform(self.layers) if blocks is None else blocks
        if not fit.blocks and not states.all_full:
            return self._no_blocks(batch_size, num_beams)
        for costs, counts in zip(fit.blocks, states.counts(), strict=False):
            for each, count in zip(costs, counts, strict=True):
                terms = terms.plus(each.times(count))
        if gate is None:
            return terms
        wanted = (gate, batch_size, num_beams)
        found = [a for a in self.adapters if (a.gate, a.batch_size, a.num_beams) == wanted]
        if not found:
            return Unavailable(f"the {gate} gate was not calibrated at batch {batch_size} x {num_beams}")
        (adapter,) = found
        return terms.plus(Terms(token_j=adapter.prefill.joules, step_j=adapter.decode.joules))

    def component(self, batch_size: int, num_beams: int, block: int, state: int) -> Terms | Unavailable:
        """What one layer's block costs a batch in one state; ``block`` is an index into ``BLOCKS``.

        An int8 block that costs more than a full one is told as it was found.
        """
        fit = self._fitted(batch_size, num_beams)
        if isinstance(fit, Unavailable):
            return fit
        if not fit.blocks:
            return self._no_blocks(batch_size, num_beams)
        return fit.blocks[block][state]

    def fit_error(self, batch_size: int, num_beams: int) -> float | Unavailable:
        """The largest relative deviation of a calibrated generation from the fit."""
        fit = self._fitted(batch_size, num_beams)
        return fit if isinstance(fit, Unavailable) else fit.worst

    def padded(self, batch_size: int, num_beams: int) -> int | Unavailable:
        """The smallest calibrated batch size at these beams that ``batch_size`` requests fit into."""
        sizes = [p.batch_size for p in self.points if p.num_beams == num_beams and p.batch_size >= batch_size]
        if not sizes:
            return Unavailable(
                f"no batch of {batch_size} or more with {num_beams} beams was calibrated ({self._known()})"
            )
        return min(sizes)

    def predict(
        self,
        prompt_tokens: Sequence[int],
        new_tokens: Sequence[int],
        *,
        num_beams: int = 1,
        gate: GateKind | None = None,
        blocks: BlockStates | None = None,
    ) -> PhaseJoules | Unavailable:
        """Joules of one batch: its sequences run to the longest prompt (padding) and the longest answer.

        ``gate``, ``blocks`` and what is Unavailable as for ``generation``.
        """
        terms = self.generation(len(prompt_tokens), num_beams, gate, blocks)
        if isinstance(terms, Unavailable):
            return terms
        longest, new = max(prompt_tokens), max(new_tokens)
        return PhaseJoules(terms.prefill_j(longest), terms.decode_j(longest, new))

    def phases_disagree(self, batch_size: int, num_beams: int) -> float | None:
        """The largest relative difference between two ways to tell the prefill's joules, over the lengths.

        One is a window of the prefill alone, the other a regression over generations of several tokens that
        never saw that window. None where the points do not allow it.
        """
        points = [p for p in self._points(batch_size, num_beams) if (p.attention, p.mlp) == ("full", "full")]
        longer = tuple(p for p in points if p.new_tokens > 1)
        if len({p.new_tokens for p in longer}) < 2:
            return None
        costs = _fit_whole(longer).rest
        alone = [p for p in points if p.new_tokens == 1]
        found = [abs(costs.prefill_j(p.prompt_tokens) / p.cost.joules - 1) for p in alone]
        return max(found, default=None)

    def _points(self, batch_size: int, num_beams: int) -> tuple[GenerationPoint, ...]:
        return tuple(p for p in self.points if (p.batch_size, p.num_beams) == (batch_size, num_beams))

    def _fitted(self, batch_size: int, num_beams: int) -> _Fit | Unavailable:
        points = self._points(batch_size, num_beams)
        if not points:
            return Unavailable(
                f"batch {batch_size} with {num_beams} beams was not calibrated ({self._known()})"
            )
        return _fit(points, self.layers)

    def _no_blocks(self, batch_size: int, num_beams: int) -> Unavailable:
        return Unavailable(
            f"batch {batch_size} x {num_beams} was calibrated with full blocks alone ({self.engine} engine)"
        )

    def _known(self) -> str:
        known = sorted({(p.batch_size, p.num_beams) for p in self.points})
        return ", ".join(f"{batch} x {beams}" for batch, beams in known) + " was"

    def with_batches_of(self, older: EnergyModel) -> EnergyModel:
        """This model, and from an older one of the same network the batches and beams that this one lacks."""
        mine = {(p.batch_size, p.num_beams) for p in self.points}
        return replace(
            self,
            points=self.points + tuple(p for p in older.points if (p.batch_size, p.num_beams) not in mine),
            adapters=self.adapters
            + tuple(a for a in older.adapters if (a.batch_size, a.num_beams) not in mine),
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> EnergyModel:
        return cls(
            engine=document["engine"],
            layers=document["layers"],
            points=tuple(GenerationPoint(**_costs(p, "cost")) for p in document["points"]),
            adapters=tuple(AdapterPass(**_costs(a, "prefill", "decode")) for a in document["adapters"]),
        )


@dataclass(frozen=True, slots=True)
class _Fit:
    """What a batch costs beside its blocks, and one layer's blocks by block and state; none of these where
    only full ones were measured: all is in the rest then. ``worst`` is the largest relative deviation."""

    rest: Terms
    blocks: tuple[tuple[Terms, ...], ...]
    worst: float


@lru_cache(maxsize=64)
def _fit(points: tuple[GenerationPoint, ...], layers: int) -> _Fit:
    """All variants jointly where all were measured, else whole generations of full blocks."""
    if not {(p.attention, p.mlp) for p in points}.issuperset(VARIANTS):
        return _fit_whole(tuple(p for p in points if (p.attention, p.mlp) == ("full", "full")))
    # The columns: the rest, attention's look back (the same in int8 and full), then every block and state.
    parts = [(block, state) for block in range(len(BLOCKS)) for state in (INT8, FULL)]
    rows = []
    for point in points:
        steps, context = _decode_terms(point.prompt_tokens, point.new_tokens)
        linear = (1, point.prompt_tokens, steps)
        states = STATES.index(point.attention), STATES.index(point.mlp)
        on = 0 if states[0] == OFF else layers
        row = [*linear, on * point.prompt_tokens**2, on * context]
        for block, state in parts:
            row += [layers * value if states[block] == state else 0 for value in linear]
        rows.append(row)
    found, worst = _least(rows, points)
    call_j, token_j, step_j, token2_j, context_j = found[:5]
    look_back = (Terms(token2_j=token2_j, context_j=context_j), Terms.zero())
    blocks = [[Terms.zero() for _ in STATES] for _ in BLOCKS]
    for index, (block, state) in enumerate(parts):
        call, token, step = found[5 + 3 * index : 8 + 3 * index]
        blocks[block][state] = look_back[block].plus(Terms(call, token, step_j=step))
    return _Fit(Terms(call_j, token_j, step_j=step_j), tuple(map(tuple, blocks)), worst)


def _fit_whole(points: Sequence[GenerationPoint]) -> _Fit:
    """The five terms of whole generations in one state."""
    rows = [
        [1, p.prompt_tokens, p.prompt_tokens**2, *_decode_terms(p.prompt_tokens, p.new_tokens)]
        for p in points
    ]
    found, worst = _least(rows, points)
    return _Fit(Terms(*found), (), worst)


def _least(rows: Sequence[Sequence[float]], points: Sequence[GenerationPoint]) -> tuple[list[float], float]:
    """Coefficients of least squares of relative deviations, none below zero (Lawson and Hanson's NNLS).

    And the largest deviation that is left.
    """
    import numpy as np
    from scipy.optimize import nnls

    joules = np.array([p.cost.joules for p in points])
    relative = np.array(rows, dtype=float) / joules[:, None]
    # Columns of like size: P^2 against 1 would cost nnls most of its digits.
    size = np.linalg.norm(relative, axis=0)
    size[size == 0] = 1.0
    found, _ = nnls(relative / size, np.ones(len(points)))
    coefficients = found / size
    return coefficients.tolist(), float(np.abs(relative @ coefficients - 1).max())


def _costs(document: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {**document, **{name: Cost(**document[name]) for name in names}}
