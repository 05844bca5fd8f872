"""Which int8 product runs each shape on this device: every candidate measured, the most frugal kept.

Joules come first wherever they are told apart beyond their error, then time: fast is not always frugal.
What could not run is in the document with its reason. No Triton autotuner runs in generation: its choice
would be by time alone, and could fall into a graph's capture.

Shape legend: N rows (tokens), K inputs, M outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from statistics import fmean, variance
from typing import Any

import torch
from torch import Tensor

from hestctl.kernels.int8 import DEFAULT_KERNEL, Int8Linear
from hestctl.kernels.products import (
    DECODE_KERNELS,
    DECODE_ROWS,
    Phase,
    candidates,
    phase_of,
    product,
    why_not,
)
from hestctl.kernels.reference import quantise_rows

Measure = Callable[[Callable[[], object]], tuple[float | None, float]]
"""``measure(run)``: joules (None without a meter) and seconds of one ``run()``, synchronised and averaged
over as many runs as it takes."""

_REPEATS = 3
_TOLD_APART = 2.0
"""Standard errors of a difference beyond which two energies differ."""

_CPU_CACHE_BYTES = 64 * 2**20
_MOST_COPIES = 512


@dataclass(frozen=True, slots=True)
class Shape:
    """One product, measured at ``rows`` rows; its choice serves all rows of the same bucket."""

    rows: int
    outputs: int
    inputs: int

    @property
    def phase(self) -> Phase:
        return phase_of(self.rows)

    @property
    def key(self) -> str:
        return f"{self.phase} n{row_bucket(self.rows)} m{self.outputs} k{self.inputs}"


def row_bucket(rows: int) -> int:
    """Rows rounded up to a power of two, at least one decode tile: shapes of one bucket share a choice."""
    return DECODE_ROWS if rows <= DECODE_ROWS else 1 << (rows - 1).bit_length()


@dataclass(frozen=True, slots=True)
class Figure:
    """What one product costs: J and s of one call; ``error`` is the standard error of the joules."""

    joules: float | None
    error: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel kept for a shape. ``measured`` holds every candidate's figures, ``unavailable`` the reasons
    of those that could not run. Nothing is measured where only one can: it has no figures then."""

    kernel: str
    joules: float | None
    error: float | None
    seconds: float | None
    why: str
    measured: Mapping[str, Figure]
    unavailable: Mapping[str, str]

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Choice:
        measured = {name: Figure(**figure) for name, figure in document["measured"].items()}
        return cls(**{**document, "measured": measured, "unavailable": dict(document["unavailable"])})


@dataclass(frozen=True, slots=True)
class Choices:
    """The choices for one device, by shape; a JSON document that loads back."""

    device_name: str
    by_shape: Mapping[str, Choice]

    def kernels(self, outputs: int, inputs: int) -> dict[int, str]:
        """The kernels of such weights, by the most rows that each serves; the last serves all beyond.

        Rows between two measured counts go with the nearer by ratio, but decode with decode. Raises KeyError
        for weights that were never measured.
        """
        found = self._measured(outputs, inputs)
        ends = [
            rows if rows == DECODE_ROWS else math.isqrt(rows * more)
            for (rows, _), (more, _) in pairwise(found)
        ]
        return {end: choice.kernel for end, (_, choice) in zip([*ends, found[-1][0]], found, strict=True)}

    def told(self, outputs: int, inputs: int) -> str:
        """The kernels of such weights with their reasons, by the rows they were measured at. Errors alike."""
        found = self._measured(outputs, inputs)
        return "; ".join(f"{rows} rows: {choice.kernel} ({choice.why})" for rows, choice in found)

    def _measured(self, outputs: int, inputs: int) -> list[tuple[int, Choice]]:
        """Choices for such weights with the rows of their bucket, few rows first."""
        weights = f" m{outputs} k{inputs}"
        found = {
            int(key.removesuffix(weights).rpartition(" n")[2]): choice
            for key, choice in self.by_shape.items()
            if key.endswith(weights)
        }
        if not found:
            raise KeyError(f"no int8 kernel was ever measured for {outputs} outputs and {inputs} inputs")
        return sorted(found.items(), key=lambda pair: pair[0])

    def as_dict(self) -> dict[str, Any]:
        return {
            "device_name": self.device_name,
            "by_shape": {key: asdict(choice) for key, choice in self.by_shape.items()},
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Choices:
        by_shape = {key: Choice.from_dict(choice) for key, choice in document["by_shape"].items()}
        return cls(document["device_name"], by_shape)


def choose(shapes: Iterable[Shape], dtype: torch.dtype, device: torch.device, measure: Measure) -> Choices:
    """Measure every candidate of every shape on ``device``. ``dtype`` is the type of the results.

    A candidate is measured only after its result has equalled the reference. Candidates take turns, so
    that a drift of the device falls on all of them alike. Where one alone can run, nothing is measured.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Choices(name, {shape.key: _choose_one(shape, dtype, device, measure) for shape in shapes})


def on_offer(device: torch.device) -> str:
    """The libraries whose kernels are candidates on this device, with their versions."""
    offered = [DEFAULT_KERNEL]
    for package, name in (("torchao", "torchao.int_scaled_matmul"), ("triton", DECODE_KERNELS[0])):
        if _why_not(name, device, 8, 8) is None:
            offered.append(f"{package} {version(package)}")
    return ", ".join(offered)


def _why_not(name: str, device: torch.device, outputs: int, inputs: int) -> str | None:
    reason = why_not(name, device, outputs, inputs)
    if reason is None and name.startswith("triton.") and device.type != "cuda":
        return "Triton's interpreter is for tests"
    return reason


def _choose_one(shape: Shape, dtype: torch.dtype, device: torch.device, measure: Measure) -> Choice:
    reasons = {name: _why_not(name, device, shape.outputs, shape.inputs) for name in candidates(shape.phase)}
    able = [name for name, reason in reasons.items() if reason is None]
    unavailable = {name: reason for name, reason in reasons.items() if reason is not None}
    if len(able) == 1 and device.type != "cuda":
        # Tests hold it to the reference; checking large shapes on a CPU takes minutes.
        return _only(able[0], unavailable)
    inputs = _Inputs(shape, dtype, device)
    for name in able:
        reason = inputs.wrong(name)
        if reason is not None:
            unavailable[name] = reason
    # The reference serves where nothing else does: slow, but the same numbers, and said in the document.
    names = [name for name in able if name not in unavailable] or ["reference"]
    if len(names) == 1:
        return _only(names[0], unavailable)
    runs = {name: inputs.run(name) for name in names}
    readings: dict[str, list[tuple[float | None, float]]] = {name: [] for name in runs}
    for turn in range(_REPEATS):
        for name in sorted(runs, reverse=turn % 2 == 1):
            run, calls = runs[name]
            joules, seconds = measure(run)
            readings[name].append((None if joules is None else joules / calls, seconds / calls))
    measured = _figures(readings)
    kernel, why = _most_frugal(measured)
    return Choice(kernel, **asdict(measured[kernel]), why=why, measured=measured, unavailable=unavailable)


def _only(name: str, unavailable: Mapping[str, str]) -> Choice:
    return Choice(name, None, None, None, "the only one that runs here", {}, unavailable)


def _figures(readings: Mapping[str, list[tuple[float | None, float]]]) -> dict[str, Figure]:
    """Means; their error is from the relative spread of all candidates together: each has few readings."""
    seconds = {name: fmean(s for _, s in rows) for name, rows in readings.items()}
    joules = {name: [j for j, _ in rows if j is not None] for name, rows in readings.items()}
    if any(len(found) < _REPEATS for found in joules.values()):
        return {name: Figure(None, None, seconds[name]) for name in readings}
    means = {name: fmean(found) for name, found in joules.items()}
    relative = math.sqrt(fmean(variance(found) / means[name] ** 2 for name, found in joules.items()))
    return {
        name: Figure(mean, mean * relative / math.sqrt(_REPEATS), seconds[name])
        for name, mean in means.items()
    }


def _most_frugal(measured: Mapping[str, Figure]) -> tuple[str, str]:
    """The name kept, and why in a sentence."""
    fastest = min(measured, key=lambda name: measured[name].seconds)
    energy = {name: f.joules for name, f in measured.items() if f.joules is not None and f.error is not None}
    if len(energy) < len(measured):
        return fastest, "the fastest: there were no joules to choose by"
    least = min(energy, key=lambda name: energy[name])
    error = {name: measured[name].error or 0.0 for name in energy}
    even = [
        name
        for name in energy
        if energy[name] - energy[least] <= _TOLD_APART * math.hypot(error[name], error[least])
    ]
    kept = min(even, key=lambda name: measured[name].seconds)
    if len(even) == 1:
        return kept, "the fewest joules, beyond their error"
    return kept, f"the fastest of {len(even)} whose joules are not told apart"


class _Inputs:
    """Random operands of a shape, in copies enough that no cache holds the weights from call to call."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        wanted = 2 * (cache or _CPU_CACHE_BYTES)
        self._copies = min(_MOST_COPIES, -(-wanted // (shape.outputs * shape.inputs)))

        def random(rows: int) -> Tensor:
            return torch.randn(rows, shape.inputs, generator=generator, device=device).to(dtype)

        self._dtype = dtype
        self._device = device
        x_NK, scale_N1 = quantise_rows(random(shape.rows))
        self._x = x_NK, scale_N1[:, 0].contiguous()
        self._weights = [Int8Linear([random(shape.outputs)], kernel="reference").weight]
        self._expected = self._once("reference")

    def wrong(self, name: str) -> str | None:
        """Why this candidate is not to be trusted here; None where it equals the reference."""
        try:
            y = self._once(name)
        except Exception as error:
            # Whatever a library or Triton's compiler raises for this device is the reason.
            return f"{type(error).__name__}: {error}"
        return None if torch.equal(y, self._expected) else "its result differs from the reference"

    def run(self, name: str) -> tuple[Callable[[], object], int]:
        """A callable that multiplies by every copy in turn, and how many products that is.

        On CUDA it replays a graph: launches from Python would outweigh the products of decode.
        """
        multiply, (q_NK, scale_N) = product(name), self._x
        first = self._weights[0]
        while len(self._weights) < self._copies:
            self._weights.append(replace(first, q_MK=first.q_MK.clone()))

        def all_copies() -> None:
            for weight in self._weights:
                multiply(q_NK, scale_N, weight, self._dtype)

        if self._device.type != "cuda":
            return all_copies, len(self._weights)
        all_copies()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_copies()
        return graph.replay, len(self._weights)

    def _once(self, name: str) -> Tensor:
        return product(name)(*self._x, self._weights[0], self._dtype)
