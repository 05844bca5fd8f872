"""The int8 kernels of a backbone's MatMuls, chosen on the device at hand by the joules of its meter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from hestctl.calibration.figures import TOKENS, Target
from hestctl.energy.meter import Meter
from hestctl.energy.replicate import replicate
from hestctl.kernels.choose import Choices, Measure, Shape, choose
from hestctl.progress import Progress

_LONG = 4096
"""Rows of a long prompt's prefill, beside the short one of ``TOKENS``."""

_PRECISION = 0.05
"""Bound on the joules of one reading of a candidate; each is read several times."""


def shapes(target: Target, rows: Iterable[int]) -> list[Shape]:
    """The MatMuls of each kind of layer, at decode ``rows`` (batch x beams) and in short and long prefills.

    One of several that share a choice.
    """
    found: dict[str, Shape] = {}
    for layer in target.backbone.layers:
        for part in layer_weights(layer):
            for count in (*rows, TOKENS, _LONG):
                shape = Shape(count, sum(len(weight) for weight in part), part[0].shape[1])
                found.setdefault(shape.key, shape)
    return list(found.values())


def layer_weights(layer: Any) -> list[list[Tensor]]:
    """A decoder layer's weights (M x K), those with the same input together."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        [p.weight for p in part]
        for part in (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        )
    ]


def choose_kernels(
    target: Target,
    rows: Iterable[int],
    measure: Measure,
    known: Choices | None,
    keep: Callable[[Choices], None],
    progress: Progress,
) -> Choices:
    """The kernels of all ``shapes``; ``keep`` is called after each with all that is ``known`` by then."""
    backbone, wanted = target.backbone, shapes(target, rows)
    for done, shape in enumerate(wanted, 1):
        if known is None or shape.key not in known.by_shape:
            new = choose([shape], backbone.dtype, backbone.device, measure)
            known = Choices(new.device_name, {**({} if known is None else known.by_shape), **new.by_shape})
            keep(known)
        progress.advance("choosing int8 kernels", done, len(wanted), {})
    assert known is not None
    return known


def metered(meter: Meter, least_s: float, check: Callable[[], None]) -> Measure:
    """A ``Measure`` by the running meter; a reading takes ``least_s`` seconds, or as its bound needs."""

    def measure(run: Callable[[], object]) -> tuple[float | None, float]:
        found = replicate(
            run, meter, name="kernel", phase="calibration", precision=_PRECISION, least_s=least_s, check=check
        )
        joules = found.energy_j if found.window.valid else None
        return joules, found.window.duration_s / found.count

    return measure
