"""The gap at equal quality as tables: one row a pair."""

from __future__ import annotations

from collections.abc import Sequence

from hestctl.compare.results import METRICS, Best, Comparison, Pair
from hestctl.compare.text import (
    RIVALS,
    Cell,
    Column,
    TextTable,
    cell,
    column,
    grouped,
    percent_with_interval,
    table,
    whole,
    with_interval,
)
from hestctl.compare.verdicts import points


def gap_tables(comparison: Comparison, *, every: bool = False) -> list[TextTable]:
    """The best proposed configuration against every other; ``every``: then all the other pairs, and the
    sentence that says why for each of the best's."""
    best = comparison.best_proposed
    if best is None:
        return [_pair_table(comparison, comparison.pairs, None)] if comparison.pairs else []
    first = sorted(
        (pair for pair in comparison.pairs if pair.proposed == best.label),
        key=lambda pair: RIVALS.index(pair.other_role),
    )
    others = [pair for pair in comparison.pairs if pair.proposed != best.label]
    tables = [_pair_table(comparison, first, best, reasons=every)] if first else []
    if others and every:
        tables.append(_pair_table(comparison, others, None))
    return tables


def _pair_table(
    comparison: Comparison, pairs: Sequence[Pair], best: Best | None, *, reasons: bool = False
) -> TextTable:
    """Pairs of one proposed configuration, ``best``, which the title then names, or of several."""
    title = "Gap at equal quality"
    if best is not None:
        title += f": {best.label} against the others"
    elif comparison.best_proposed is not None:
        title += ": further pairs"
    gaps = [cell(pair.gap_percent, percent_with_interval, "no gap") for pair in pairs]
    if comparison.energy_kind == "measured":
        beside = [
            column("% by length", _parts(gaps, [pair.length_part_percent for pair in pairs])),
            column("% by token", _parts(gaps, [pair.token_part_percent for pair in pairs])),
        ]
    else:
        ratios = (cell(pair.time_ratio, with_interval) for pair in pairs)
        beside = [column("time ratio [95 %]", ratios)]
    score = METRICS[comparison.quality_metric].title
    differences = (cell(pair.quality_difference, points) for pair in pairs)
    columns: list[Column] = [
        column(
            "against" if best else "pair",
            (pair.other if best else f"{pair.proposed} : {pair.other}" for pair in pairs),
        ),
        column("gap % [95 %]", gaps),
        *beside,
        column(f"{score} points [95 %]", differences),
        column("quality", (pair.quality for pair in pairs)),
        column("verdict", (pair.verdict for pair in pairs)),
    ]
    return table(title, columns, _remarks(pairs, reasons) if best else ())


def _parts(gaps: Sequence[Cell], parts: Sequence[float | None]) -> list[Cell]:
    """The part of every gap, with the gap's own reason where there is none."""
    return [
        Cell("", gap.reason or "the outputs have no tokens") if part is None else Cell(f"{part:+.1f}")
        for gap, part in zip(gaps, parts, strict=True)
    ]


def _remarks(pairs: Sequence[Pair], reasons: bool) -> list[str]:
    repaid = [
        f"{pair.other} {whole(pair.break_even_samples)}"
        for pair in pairs
        if pair.break_even_samples.value is not None
    ]
    told = [f"training joules are repaid after so many samples: {', '.join(repaid)}"] if repaid else []
    if reasons:
        told += [f"{pair.proposed} : {pair.other}: {pair.why}; {pair.at_equal_length}" for pair in pairs]
    labels = list(dict.fromkeys(label for pair in pairs for label in (pair.proposed, pair.other)))
    notes = [_named(note, labels) for note in dict.fromkeys(note for pair in pairs for note in pair.notes)]
    for names, note in grouped([one for one in notes if one[0]], labels):
        told.append(f"{', '.join(names)}{': each' if len(names) > 1 else ''} {note}")
    return [*told, *(note for label, note in notes if not label)]


def _named(note: str, labels: Sequence[str]) -> tuple[str, str]:
    """A note that begins with a label as that label and the rest; the label is empty for other notes."""
    label = max((one for one in labels if note.startswith(f"{one} ")), key=len, default="")
    return label, note.removeprefix(label).strip()
