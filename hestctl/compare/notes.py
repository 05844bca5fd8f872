"""What a reader of a pair should know beside its numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from hestctl.compare.loading import Entry
from hestctl.records import Run


def notes(proposed: Entry, other: Entry) -> Iterator[str]:
    """Unequal training, seeds, budgets that count different things, other kernels: one sentence each."""
    steps = [sorted({member.run.steps or 0 for member in entry.members}) for entry in (proposed, other)]
    if other.config.role != "base" and steps[0] != steps[1]:
        first, second = (", ".join(map(str, counts)) for counts in steps)
        yield f"{proposed.label} was trained for {first} steps, {other.label} for {second}"
    for entry in (proposed, other):
        if len(entry.seeds) == 1:
            yield f"{entry.label} has one seed: that says nothing about another training"
    if budgets_differ(proposed, other):
        yield f"{proposed.label} and {other.label} count different scopes: joules of the meter alone"
    first_run, second_run = proposed.members[-1].run, other.members[-1].run
    shapes = sorted(_differing(_kernels(first_run), _kernels(second_run)))
    if shapes:
        listed = ", ".join(shapes[:3]) + (" and others" if len(shapes) > 3 else "")
        yield f"{proposed.label} and {other.label} run int8 products of {listed} by other kernels"
    adapters = {_adapter(run) for run in (first_run, second_run)} - {"", "none"}
    if len(adapters) > 1:
        yield f"the adapters of one of {proposed.label} and {other.label} are fused, of the other not"


def budgets_differ(proposed: Entry, other: Entry) -> bool:
    """Whether both have a budget and the two count different things."""
    return bool(other.config.scope) and proposed.config.scope != other.config.scope


def _engine(run: Run) -> Mapping[str, object]:
    engine = run.summary.get("engine")
    return engine if isinstance(engine, Mapping) else {}


def _adapter(run: Run) -> str:
    """``fused``, ``unfused`` or ``none``; empty where it was not recorded."""
    return str(_engine(run).get("adapter", "")).partition(":")[0]


def _kernels(run: Run) -> dict[str, str]:
    """Which kernels multiply which shape, reasons left out; where none were chosen, every shape's default."""
    recorded = _engine(run).get("kernels")
    if isinstance(recorded, Mapping):
        return {shape: "; ".join(re.findall(r"\d+ rows: \S+", str(told))) for shape, told in recorded.items()}
    return {"every shape": "default"} if str(recorded).startswith("default") else {}


def _differing(first: Mapping[str, str], second: Mapping[str, str]) -> set[str]:
    if "every shape" in (first.keys() ^ second.keys()):
        return {"every shape"} if first and second else set()
    return {shape for shape in first.keys() & second.keys() if first[shape] != second[shape]}
