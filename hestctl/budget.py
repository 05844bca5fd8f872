"""The budget: E_max of a batch at any lengths, what a batch costs, and the multiplier between them.

Pure functions and small values; joules come in from the energy table and its model. P are prompt tokens and
N new tokens of each sequence of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from hestctl.energy.model import EnergyModel, Terms
from hestctl.energy.protocol import Unavailable
from hestctl.errors import Exit, HestError
from hestctl.settings import Scope

T = TypeVar("T")

Envelope = Literal["matched", "absolute"]
"""``matched``: a ratio of what TABS spends at the same lengths. ``absolute``: one number at all lengths."""


@dataclass(frozen=True, slots=True)
class Emax:
    """E_max of one batch (J): what the batch as a whole is allowed, and what each of its requests adds."""

    batch: Terms
    request: Terms

    def of(self, requests: int) -> Terms:
        """Of a batch in which ``requests`` rows are not empty."""
        return self.batch.plus(self.request.times(requests))


@dataclass(frozen=True, slots=True)
class Bill:
    """What a batch of up to ``batch_size`` requests costs before its directions, and its E_max (J).

    Fewer requests pay as a batch of that size with empty rows. ``base`` is the rest of the network, its
    blocks and the adapters' pass; nothing in scope adapter. ``emax`` is None where no budget binds.
    """

    batch_size: int
    num_beams: int
    base: Terms
    emax: Emax | None

    def spare(self, requests: int, margin: float) -> Terms:
        """What is left of ``1 - margin`` of E_max for the directions; only where a budget binds."""
        assert self.emax is not None
        return self.emax.of(requests).times(1 - margin).plus(self.base.times(-1.0))

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Bill:
        emax = document["emax"]
        if emax is not None:
            emax = Emax(Terms(**emax["batch"]), Terms(**emax["request"]))
        return cls(document["batch_size"], document["num_beams"], Terms(**document["base"]), emax)


def by_new_tokens(terms: Terms, prompt_tokens: int, new_tokens: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Joules at every N from 1 to ``new_tokens``, (new_tokens,); of the prompt alone where that is 0."""
    steps = np.arange(max(1, new_tokens), dtype=np.float64)
    context = steps * prompt_tokens + steps * (steps + 1) / 2
    return terms.prefill_j(prompt_tokens) + terms.step_j * steps + terms.context_j * context


def most_j(terms: Terms, prompt_tokens: tuple[int, int], new_tokens: int) -> float:
    """The largest joules at any P between the two ``prompt_tokens``, any N of 1 to ``new_tokens``."""
    least, most = prompt_tokens
    steps = np.arange(max(1, new_tokens), dtype=np.float64)
    start = terms.call_j + terms.step_j * steps + terms.context_j * steps * (steps + 1) / 2
    slope = terms.token_j + terms.context_j * steps
    # A parabola in P at every N: its ends, and its top where it opens downwards.
    lengths = [np.full_like(steps, least), np.full_like(steps, most)]
    if terms.token2_j < 0:
        top = np.floor(-slope / (2 * terms.token2_j))
        lengths += [np.clip(top + i, least, most) for i in (0, 1)]
    return float(max((start + slope * p + terms.token2_j * p**2).max() for p in lengths))


def allowance_j(spare: Terms, requests: int, num_beams: int, prompt_tokens: int, new_tokens: int) -> float:
    """Joules that each billed token position of a batch may spend on its directions, at least 0.

    Positions are ``num_beams * (P + N)`` of each request. The least over all N up to ``new_tokens``, so that
    the batch is within its E_max wherever it stops; ``new_tokens`` 0 is a prompt alone.
    """
    n = np.arange(1, new_tokens + 1) if new_tokens else np.zeros(1)
    positions = requests * num_beams * (prompt_tokens + n)
    return max(0.0, float((by_new_tokens(spare, prompt_tokens, new_tokens) / positions).min()))


def bill_for(
    bills: Sequence[Bill], scope: Scope, envelope: Envelope | None, requests: int, num_beams: int
) -> Bill:
    """The bill of a batch: that of the smallest batch calibrated which holds it.

    Scope adapter has one bill, of one request and beam, and needs no calibration. Raises HestError (usage)
    where no batch so large was calibrated with these beams.
    """
    if scope == "adapter":
        (one,) = bills
        emax = one.emax
        if emax is not None and envelope == "matched":
            emax = Emax(emax.batch, emax.request.times(num_beams))
        return Bill(requests, num_beams, one.base, emax)
    fit = [bill for bill in bills if bill.num_beams == num_beams and bill.batch_size >= requests]
    if not fit:
        known = ", ".join(f"{bill.batch_size} x {bill.num_beams}" for bill in bills)
        raise HestError(
            f"no joules are known of a batch of {requests} with {num_beams} beams in scope network "
            f"(batch x beams known: {known})",
            f"hestctl calibrate --batch-size {requests} --num-beams {num_beams}, then `hestctl harden "
            f"--set generation.batch_size={requests}`",
            Exit.USAGE,
        )
    return min(fit, key=lambda bill: bill.batch_size)


def calibrated(found: T | Unavailable, batch_size: int, num_beams: int) -> T:
    """``found``. Raises HestError (usage), with what to calibrate, where it is unavailable."""
    if isinstance(found, Unavailable):
        raise HestError(
            f"scope network needs the joules of whole generations: {found.reason}",
            f"hestctl calibrate --batch-size {batch_size} --num-beams {num_beams}",
            Exit.USAGE,
        )
    return found


def whole_model(model: EnergyModel | None, batch_size: int, num_beams: int) -> EnergyModel:
    """``model``. Raises HestError (usage) where the energy table has prices of directions alone."""
    return calibrated(model or Unavailable("this energy table has none"), batch_size, num_beams)


def calibrated_sizes(model: EnergyModel, num_beams: int, batch_size: int) -> list[int]:
    """The calibrated batch sizes that batches of 1 to ``batch_size`` requests are billed as, rising.

    Raises HestError (usage) where none is large enough.
    """
    sizes: list[int] = []
    while not sizes or sizes[-1] < batch_size:
        wanted = sizes[-1] + 1 if sizes else 1
        sizes.append(calibrated(model.padded(wanted, num_beams), batch_size, num_beams))
    return sizes


@dataclass(frozen=True, slots=True)
class Budget:
    """E_max of a generated sample (J), in the joules that ``scope`` counts.

    ``emax_j`` is what users are told: the one number of an absolute envelope, of a matched one its value at
    the reference's mean lengths, ``prompt_tokens`` and ``new_tokens``. ``origin`` says where it comes from
    and is printed with it. A sample is expected to generate ``new_tokens``; training lengths are translated
    to generation with it. ``position_j`` is a matched E_max in scope adapter, in J per billed token position;
    ``network`` are the bills of scope network, their base with every block at full. ``reference`` is the id
    of the run that E_max is a ratio of.
    """

    emax_j: float
    origin: str
    ratio: float | None
    new_tokens: float
    max_new_tokens: int
    num_beams: int
    scope: Scope = "adapter"
    envelope: Envelope = "absolute"
    prompt_tokens: float = 0.0
    batch_size: int = 1
    position_j: float | None = None
    network: tuple[Bill, ...] = ()
    reference: str | None = None

    @property
    def bills(self) -> tuple[Bill, ...]:
        """As ``bill_for`` takes them."""
        if self.scope == "network":
            return self.network
        request = Terms(call_j=self.emax_j)
        if self.position_j is not None:
            request = Terms(call_j=self.position_j, token_j=self.position_j, step_j=self.position_j)
        return (Bill(1, 1, Terms.zero(), Emax(Terms.zero(), request)),)

    @property
    def bill(self) -> Bill:
        """That of a whole batch of its generation."""
        return bill_for(self.bills, self.scope, self.envelope, self.batch_size, self.num_beams)

    def sample_emax(self) -> Terms:
        """E_max of one sample of a whole batch at any lengths: its share of the batch's."""
        emax = self.bill.emax
        assert emax is not None
        return emax.of(self.batch_size).times(1 / self.batch_size)

    def most_work(self, prompt_tokens: int) -> int:
        """Token positions of a sample that never stops by itself."""
        return self.num_beams * (prompt_tokens + self.max_new_tokens)

    def work(self, prompt_tokens: float) -> float:
        """Token positions one generated sample runs through the layers, beams included."""
        return self.num_beams * (prompt_tokens + self.new_tokens)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Budget:
        bills = tuple(Bill.from_dict(bill) for bill in document.get("network", ()))
        return cls(**{**document, "network": bills})


@dataclass(frozen=True, slots=True)
class Reference:
    """What a reference run (TABS) spent: means per sample of applied states and of tokens."""

    run_id: str
    int8_per_sample: float
    full_per_sample: float
    prompt_tokens: float
    new_tokens: float

    def position_j(self, costs_j: Sequence[float], num_beams: int) -> float:
        """Joules of its directions per billed token position, by today's prices of (off, int8, full)."""
        spent_j = self.int8_per_sample * costs_j[1] + self.full_per_sample * costs_j[2]
        return spent_j / (num_beams * (self.prompt_tokens + self.new_tokens))


def predicted_tabs_j(layers: int, rank: int, full_j: float) -> float:
    """Joules of TABS' directions per token position before any run of it is known: half of all are open.

    Half is what an untrained linear controller opens (its logits are symmetric about zero).
    """
    return 0.5 * layers * rank * full_j


def resolve_budget(
    *,
    scope: Scope = "adapter",
    envelope: Literal["auto", "matched", "absolute"] = "auto",
    emax_j: float | None,
    emax_ratio: float | None,
    reference: Reference | None,
    costs_j: Sequence[float],
    predicted_j: float,
    prompt_tokens: float,
    max_new_tokens: int,
    num_beams: int,
    batch_size: int = 1,
    model: EnergyModel | None = None,
) -> Budget:
    """E_max outright, or a ratio of the reference run, or a ratio of the prediction (marked so).

    The reference's logged states are priced with today's energy table, so that both sides of the
    ratio use the same joules; what its layers spend in scope network is the model's figure, every block at
    full. ``predicted_j`` are joules of TABS' directions per token position where no run of it is known, and
    ``prompt_tokens`` the mean of the prompts then. Raises HestError (usage) when neither a number nor a ratio
    is given, for a matched envelope of a number, and for what was not calibrated.
    """
    if emax_j is None and emax_ratio is None:
        raise HestError("hest needs a budget", "give --emax-ratio 0.6 (of TABS) or --emax JOULES", Exit.USAGE)
    if emax_j is not None and envelope == "matched":
        raise HestError(
            "a matched envelope is a ratio of what TABS spends, not a number of joules",
            "give --emax-ratio 0.6, or --set budget.envelope=absolute",
            Exit.USAGE,
        )
    kind: Envelope = "matched" if scope == "network" and emax_j is None else "absolute"
    if envelope != "auto":
        kind = envelope
    new_tokens: float = max_new_tokens
    position_j = predicted_j
    if reference is not None:
        prompt_tokens, new_tokens = reference.prompt_tokens, reference.new_tokens
        position_j = reference.position_j(costs_j, num_beams)
    ratio = 1.0 if emax_ratio is None else emax_ratio
    lengths = round(prompt_tokens), max(1, round(new_tokens))
    bills: list[Bill] = []
    if scope == "network":
        known = whole_model(model, batch_size, num_beams)
        bills = [
            _network_bill(known, size, num_beams, ratio, position_j)
            for size in calibrated_sizes(known, num_beams, batch_size)
        ]
        largest = bills[-1]
        assert largest.emax is not None
        told_j = largest.emax.of(batch_size).total_j(*lengths) / batch_size
    else:
        told_j = ratio * position_j * num_beams * (prompt_tokens + new_tokens)
    if emax_j is not None:
        told_j, origin = emax_j, "given by --emax"
    elif reference is not None:
        origin = f"{ratio:g} x tabs run {reference.run_id}"
    else:
        origin = f"{ratio:g} x TABS, predicted: no comparable tabs run in the store"
    if kind == "absolute":
        one = Emax(Terms.zero(), Terms(call_j=told_j))
        bills = [Bill(bill.batch_size, bill.num_beams, bill.base, one) for bill in bills]
    return Budget(
        emax_j=told_j,
        origin=origin,
        ratio=None if emax_j is not None else emax_ratio,
        new_tokens=new_tokens,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        scope=scope,
        envelope=kind,
        prompt_tokens=prompt_tokens,
        batch_size=batch_size,
        position_j=ratio * position_j if (scope, kind) == ("adapter", "matched") else None,
        network=tuple(bills),
        reference=None if reference is None or emax_j is not None else reference.run_id,
    )


def _network_bill(
    model: EnergyModel, batch_size: int, num_beams: int, ratio: float, position_j: float
) -> Bill:
    """HEST with every block at full, and a ratio of TABS, its directions billed in every row and beam."""
    tabs = calibrated(model.generation(batch_size, num_beams, "linear", None), batch_size, num_beams)
    hest = calibrated(model.generation(batch_size, num_beams, "ordinal", None), batch_size, num_beams)
    rows_j = batch_size * num_beams * position_j
    tabs = tabs.plus(Terms(token_j=rows_j, step_j=rows_j))
    return Bill(batch_size, num_beams, hest, Emax(tabs.times(ratio), Terms.zero()))


@dataclass(slots=True)
class Multiplier:
    """The Lagrange multiplier of ``task + weight * (E / E_max - 1)``, moved once an optimiser step.

    ``plain``: one dual-ascent step, lambda += alpha * (E / E_max - 1). ``clamp``: the same, projected
    to lambda >= 0 as an inequality asks. ``pi``: clamp, and the excess itself added to the weight, as
    in the augmented Lagrangian of Hestenes and Powell; the excess counts both ways, so that joules
    the budget allows are used by training and not handed out afterwards by repair. ``none``: lambda
    stays, a fixed soft penalty.
    """

    value: float
    alpha: float
    kind: Literal["plain", "clamp", "pi", "none"]
    excess: float = 0.0
    """The last observed E / E_max - 1."""

    @property
    def weight(self) -> float:
        """What the energy term of the loss is multiplied with."""
        return self.value + self.excess if self.kind == "pi" else self.value

    def step(self, ratio: float) -> None:
        """Move by one observed E / E_max."""
        self.excess = ratio - 1.0
        if self.kind == "none":
            return
        self.value += self.alpha * self.excess
        if self.kind != "plain":
            self.value = max(self.value, 0.0)
