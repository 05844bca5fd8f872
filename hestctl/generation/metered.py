"""Runs batches under the meter: back to back with shared edges, or each again and again to a precision."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from hestctl.data.prompts import Encoded
from hestctl.energy.meter import Edge, Meter
from hestctl.energy.replicate import replicate
from hestctl.errors import HestError
from hestctl.generation.engine import Generated
from hestctl.progress import Progress
from hestctl.records import Window

Outcome = tuple[Generated, list[str] | None]
"""What a batch generated, and its labels where it was classified."""

Run = Callable[[Sequence[Encoded]], Outcome]


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch that was generated ``replicates`` times, all of them in ``window``.

    Joules, their bound and the latency are those of one time (J, s).
    """

    rows: Sequence[Encoded]
    result: Generated
    predicted: list[str] | None
    window: Window
    energy_j: float | None
    error_j: float | None
    latency_s: float
    replicates: int = 1


def telescoped(
    run: Run,
    rows: Sequence[Encoded],
    size: int,
    meter: Meter,
    progress: Progress,
    check: Callable[[], None],
) -> list[Batch]:
    """Every batch once, one after the other: neighbours share their edge, so that the joules add up."""
    start_j = meter.total_j()
    edges, outcomes = [meter.edge()], []
    clock_s = [time.perf_counter()]
    for done in range(0, len(rows), size):
        check()
        part = rows[done : done + size]
        outcomes.append((part, _once(run, part)))
        edges.append(meter.edge())
        clock_s.append(time.perf_counter())
        progress.advance(
            "generating",
            min(done + size, len(rows)),
            len(rows),
            {
                f"J {meter.kind}": _since(meter, start_j),
                "s_per_sample": (clock_s[-1] - clock_s[0]) / (done + len(part)),
            },
        )
    meter.settle()
    return [
        _batch(meter, part, outcome, edges[index : index + 2], clock_s[index + 1] - clock_s[index])
        for index, (part, outcome) in enumerate(outcomes)
    ]


def _batch(
    meter: Meter, part: Sequence[Encoded], outcome: Outcome, edges: Sequence[Edge], latency_s: float
) -> Batch:
    window = meter.cut(edges[0], edges[1], name=part[0].sample_id, phase="generation")
    return Batch(part, *outcome, window, window.energy_j, window.error_j, latency_s)


def replicated(
    run: Run,
    rows: Sequence[Encoded],
    size: int,
    meter: Meter,
    progress: Progress,
    check: Callable[[], None],
    *,
    precision: float,
) -> list[Batch]:
    """Every batch again and again, until the meter's bound on its joules is within ``precision``."""
    batches = []
    for done in range(0, len(rows), size):
        part = rows[done : done + size]
        last: list[Outcome] = []

        def work(part: Sequence[Encoded] = part, last: list[Outcome] = last) -> None:
            last[:] = [_once(run, part)]

        found = replicate(
            work, meter, name=part[0].sample_id, phase="generation", precision=precision, check=check
        )
        latency_s = found.window.duration_s / found.count
        if found.precision is not None and found.precision > precision:
            progress.note(
                f"{part[0].sample_id}: known to {100 * found.precision:.1f} %, not {100 * precision:g} %, "
                f"after {found.count} repetitions"
            )
        window = found.window
        if found.count > 1:
            window = replace(window, name=f"{window.name} x {found.count}")
        batches.append(Batch(part, *last[0], window, found.energy_j, found.error_j, latency_s, found.count))
        progress.advance(
            "generating",
            min(done + size, len(rows)),
            len(rows),
            {f"J {meter.kind}": found.energy_j, "s_per_batch": latency_s, "repetitions": found.count},
        )
    return batches


@contextmanager
def within_memory(rows: Sequence[Encoded], size: int) -> Iterator[None]:
    """Raises HestError, naming what may fit, where a batch of ``size`` of these rows does not."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        count, longest = min(size, len(rows)), max(len(row.prompt_ids) for row in rows)
        raise HestError(
            f"out of memory generating {count} prompts of up to {longest} tokens at once",
            f"--set generation.batch_size={max(1, count // 2)}, or fewer --num-beams",
        ) from error


def _once(run: Run, part: Sequence[Encoded]) -> Outcome:
    with within_memory(part, len(part)):
        return run(part)


def _since(meter: Meter, start_j: float | None) -> float | None:
    total_j = meter.total_j()
    return None if total_j is None or start_j is None else total_j - start_j
