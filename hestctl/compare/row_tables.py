"""Configurations or runs as tables: one row each; what goes with them in a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

from hestctl.compare.configurations import Configuration, above_budget, configurations
from hestctl.compare.results import METRICS, PRIMARY, Comparison, Row
from hestctl.compare.statistics import Measure
from hestctl.compare.text import (
    NOT_MEASURED,
    Cell,
    Column,
    TextTable,
    bare,
    cell,
    column,
    grouped,
    narrow,
    table,
    whole,
    with_interval,
)

Lines: TypeAlias = Sequence[Row | Configuration]


def summary_table(comparison: Comparison, *, runs: bool = False) -> TextTable:
    """The measures that decide, one row a configuration, its seeds joined, or one a run."""
    lines = _lines(comparison, runs)
    metric = METRICS[comparison.quality_metric]
    tokens = [_bare("new tokens", lines, "new_tokens_per_sample")]
    if comparison.task == "classification":
        tokens = [_bare("chance %", lines, "chance_percent")]
    columns = [
        *_names(lines),
        _interval(f"{metric.title} {metric.unit} [95 %]", lines, comparison.quality_metric),
        _interval(f"J/sample {comparison.energy_word} [95 %]", lines, PRIMARY),
        _bare("p50 s", lines, "latency_p50_s"),
        *tokens,
        _bare("over E_max %, predicted", lines, "over_budget_percent"),
    ]
    return table("Runs" if runs else "Configurations", columns, (*_remarks(lines), *above_budget(lines)))


def as_rows(comparison: Comparison, *, runs: bool = False) -> list[TextTable]:
    """Every measure that a terminal has room for, the A/A control, the expectations, what is set apart."""
    lines = _lines(comparison, runs)
    tables = [
        _quality_table(comparison, lines),
        _energy_table(comparison, lines),
        _latency_table(lines),
        _budget_table(comparison, lines),
    ]
    if comparison.pairs or comparison.repeats:
        tables.append(_repeat_table(comparison))
    if comparison.expectations:
        lines_of = comparison.expectations
        outcomes = (Cell(line.outcome, line.reason) for line in lines_of)
        columns = [column("expected of HEST", (line.text for line in lines_of)), column("outcome", outcomes)]
        tables.append(table("The original's expectations", columns))
    if comparison.set_apart:
        apart = comparison.set_apart
        columns = [
            column("run id", (one.run_id for one in apart)),
            column("run", (one.label for one in apart)),
            column("kept out as", (Cell(one.kind, one.reason) for one in apart)),
        ]
        tables.append(table("Set apart", columns))
    return tables


def apart_line(comparison: Comparison) -> str | None:
    """How many runs do not count here, by the kind of reason; ``None`` where all count."""
    kinds = Counter(one.kind for one in comparison.set_apart)
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return f"runs set apart: {told}" if told else None


def _lines(comparison: Comparison, runs: bool) -> Lines:
    return comparison.rows if runs else configurations(comparison.rows)


def _names(lines: Lines) -> list[Column]:
    """What the rows are, and how much each of them rests on."""
    joined = isinstance(lines[0], Configuration)
    counts = (str(line.seeds if isinstance(line, Configuration) else line.samples) for line in lines)
    return [
        column("configuration" if joined else "run", (line.label for line in lines)),
        column("seeds" if joined else "samples", counts),
    ]


def _interval(header: str, lines: Lines, name: str) -> Column:
    return column(header, (cell(line.measure(name), with_interval) for line in lines))


def _bare(header: str, lines: Lines, name: str, show: Callable[[Measure], str] = bare) -> Column:
    return column(header, (narrow(line.measure(name), show) for line in lines))


def _remarks(lines: Lines) -> list[str]:
    told = []
    if any(isinstance(line, Configuration) and line.seeds > 1 for line in lines):
        told.append("several seeds: means with intervals over the seeds; one seed: intervals over samples")
    notes = ((line.label, note) for line in lines for note in line.notes)
    labels = [line.label for line in lines]
    return [*told, *(f"{', '.join(names)}: {note}" for names, note in grouped(notes, labels))]


def _quality_table(comparison: Comparison, lines: Lines) -> TextTable:
    metric = METRICS[comparison.quality_metric]
    if comparison.task == "classification":
        others: tuple[tuple[str, str], ...] = (("chance %", "chance_percent"),)
    else:
        others = (("R-L", "rouge_l"), ("R-1", "rouge1"), ("R-2", "rouge2"), ("answer NLL", "answer_nll_nats"))
    columns = [
        *_names(lines),
        _interval(f"{metric.title} {metric.unit} [95 %]", lines, comparison.quality_metric),
        *(_bare(header, lines, name) for header, name in others),
    ]
    return table("Quality", columns, _remarks(lines))


def _energy_table(comparison: Comparison, lines: Lines) -> TextTable:
    word = comparison.energy_word
    columns = [
        *_names(lines)[:1],
        _interval(f"J/sample {word} [95 %]", lines, PRIMARY),
        _bare(f"net of idle J/sample {word}", lines, "energy_net_j_per_sample"),
        _bare("new tokens", lines, "new_tokens_per_sample"),
        _bare(f"J/token {word}", lines, "energy_j_per_new_token"),
    ]
    return table("Energy", columns)


def _latency_table(lines: Lines) -> TextTable:
    tail = _interval("p99 s [95 %]", lines, "latency_p99_s")
    is_open = any("open" in one.text for one in tail.cells)
    columns = [
        *_names(lines)[:1],
        _bare("p50 s", lines, "latency_p50_s"),
        tail,
        _bare("tokens/s", lines, "tokens_per_s"),
    ]
    return table("Latency", columns, ("open: the data end before the interval does",) if is_open else ())


def _budget_table(comparison: Comparison, lines: Lines) -> TextTable:
    columns = [
        *_names(lines)[:1],
        column("scope", (line.scope or "none" for line in lines)),
        _bare("J/sample in scope, predicted", lines, "scope_energy_j_per_sample"),
        _bare("mean % of E_max", lines, "emax_use_percent"),
        _bare("worst % of E_max", lines, "emax_use_worst_percent"),
        _bare("% over E_max", lines, "over_budget_percent"),
        _bare(f"training J {comparison.energy_word}", lines, "train_energy_j"),
        _bare("controller parameters", lines, "controller_parameters", whole),
    ]
    return table("Budget and cost", columns)


def _repeat_table(comparison: Comparison) -> TextTable:
    """What the comparison calls a difference where there is none."""
    ratio = f"ratio of joules {comparison.energy_word} [95 %]"
    headers = ("one model twice", ratio, "called", "quality points", "called")
    rows: list[tuple[Cell | str, ...]] = [
        (
            f"{repeat.label}, {repeat.kind}",
            cell(repeat.ratio, with_interval),
            repeat.energy_word,
            cell(repeat.quality_difference, lambda one: f"{one.value or 0:+.2f}"),
            repeat.quality,
        )
        for repeat in comparison.repeats
    ]
    if not rows:
        reason = "no two finished runs are of one configuration and seed"
        if comparison.energy_kind == "none":
            reason = "there was no energy meter"
        unknown = Cell(NOT_MEASURED, f"{NOT_MEASURED}: {reason}")
        rows = [("none in these stores", unknown, "-", unknown, "-")]
    columns = [column(header, cells) for header, cells in zip(headers, zip(*rows, strict=True), strict=True)]
    remark = f"repeatability granted to every verdict: {comparison.repeatability.reason}"
    return table("A/A control", columns, (remark,))
