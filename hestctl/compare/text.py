"""Numbers, cells and tables as text, the same in a terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from hestctl.compare.results import Comparison
from hestctl.compare.statistics import Measure

NOT_MEASURED: Final = "not measured"
RIVALS: Final = ("baseline", "control", "ablation", "proposed", "base")
"""Roles in the order in which the best configuration is set against them."""
_NO_REASON: Final = "no reason was recorded"


@dataclass(frozen=True, slots=True)
class TextTable:
    """Headers and cells as strings, and the footnotes that the letters in cells refer to."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Cell:
    """A text, with a footnote where it has a ``reason``; an empty one is the footnote's letter alone."""

    text: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Column:
    header: str
    cells: tuple[Cell, ...]


@dataclass(slots=True)
class Footnotes:
    """Letters for reasons: one reason, one letter a table."""

    reasons: list[str] = field(default_factory=list)

    def cell(self, measure: Measure, show: Callable[[Measure], str], word: str = NOT_MEASURED) -> str:
        return self.missing(measure.reason, word) if measure.value is None else show(measure)

    def narrow(self, measure: Measure, show: Callable[[Measure], str]) -> str:
        """A cell for a column of bare numbers: the letter alone where there is none."""
        if measure.value is not None:
            return show(measure)
        return self.missing(measure.reason).removeprefix(NOT_MEASURED).strip()

    def missing(self, reason: str | None, word: str = NOT_MEASURED) -> str:
        return self.refer(word, f"{word}: {reason or _NO_REASON}")

    def refer(self, word: str, reason: str) -> str:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return f"{word} ({_letter(self.reasons.index(reason))})".strip()

    def lines(self) -> tuple[str, ...]:
        return tuple(f"({_letter(place)}) {reason}" for place, reason in enumerate(self.reasons))


def column(header: str, cells: Iterable[Cell | str]) -> Column:
    return Column(header, tuple(Cell(one) if isinstance(one, str) else one for one in cells))


def cell(measure: Measure, show: Callable[[Measure], str], word: str = NOT_MEASURED) -> Cell:
    """What ``show`` makes of the measure, or ``word`` with the reason why there is none."""
    if measure.value is None:
        return Cell(word, f"{word}: {measure.reason or _NO_REASON}")
    return Cell(show(measure))


def narrow(measure: Measure, show: Callable[[Measure], str]) -> Cell:
    """A cell for a column of bare numbers: the letter alone where there is none."""
    found = cell(measure, show)
    return Cell("", found.reason) if found.reason else found


def table(title: str, columns: Sequence[Column], remarks: Sequence[str] = ()) -> TextTable:
    """The columns side by side; one that says the same, in words, in every row becomes a note."""
    same: dict[str, list[str]] = {}
    kept = []
    for place, one in enumerate(columns):
        first = one.cells[0]
        # Numbers that happen to agree stay: each was measured.
        is_word = first.reason is not None or not any(letter.isdigit() for letter in first.text)
        if place and len(one.cells) > 1 and len(set(one.cells)) == 1 and is_word:
            same.setdefault(first.reason or first.text, []).append(one.header.removesuffix(" [95 %]"))
        else:
            kept.append(one)
    notes = Footnotes()
    rows = tuple(
        tuple(one.text if one.reason is None else notes.refer(one.text, one.reason) for one in row)
        for row in zip(*(one.cells for one in kept), strict=True)
    )
    told = "; ".join(f"{' and '.join(headers)} ({why})" for why, headers in same.items())
    constant = (f"the same in every row: {told}",) if told else ()
    return TextTable(title, tuple(one.header for one in kept), rows, (*notes.lines(), *constant, *remarks))


def grouped(notes: Iterable[tuple[str, str]], every: Sequence[str]) -> list[tuple[list[str], str]]:
    """Notes, each once, with the labels it is of; ``["each"]`` where it is of all in ``every``."""
    held: dict[str, list[str]] = {}
    for label, note in notes:
        labels = held.setdefault(note, [])
        if label not in labels:
            labels.append(label)
    return [(["each"] if len(labels) == len(every) > 1 else labels, note) for note, labels in held.items()]


def number(value: float) -> str:
    """Three significant digits, thousands whole and grouped: 1.2e-05, 0.0123, 1.23, 123, 12,345."""
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.{_decimals(value)}f}" if size >= 1e-3 else f"{value:.2e}"


def with_interval(measure: Measure) -> str:
    """``12.3 [11.9, 12.8]``; an end that the data leave open reads ``open``."""
    if measure.value is None:
        return NOT_MEASURED
    if measure.low is None or measure.high is None:
        return number(measure.value)
    places = 0 if abs(measure.value) >= 99.95 else _decimals(measure.value)
    style = f",.{places}f" if abs(measure.value) >= 1e-3 or measure.value == 0 else ".2e"

    def edge(value: float) -> str:
        return f"{value:{style}}" if math.isfinite(value) else "open"

    return f"{edge(measure.value)} [{edge(measure.low)}, {edge(measure.high)}]"


def percent_with_interval(measure: Measure) -> str:
    """Percent with one decimal, the same in every place that states a gap."""
    if measure.low is None or measure.high is None:
        return f"{measure.value or 0.0:.1f}"
    return f"{measure.value or 0.0:.1f} [{measure.low:.1f}, {measure.high:.1f}]"


def whole(measure: Measure) -> str:
    """A count, with thousands grouped."""
    return f"{measure.value or 0.0:,.0f}"


def bare(measure: Measure) -> str:
    """The number without its interval."""
    return number(measure.value or 0.0)


def compared_lines(comparison: Comparison) -> list[str]:
    """What all the runs share: model, data, device, generation, meter."""
    facts = comparison.facts
    return [
        f"{facts['backbone']} ({facts['weights']} weights, {facts['dtype']}) on {facts['dataset']}, "
        f"{facts['split']} split",
        f"{facts['device']}; {_work(comparison)}, engine {facts['engine']}",
        f"joules per sample: {comparison.energy_word} ({facts['meter']}); "
        "of the budget: predicted from the energy table",
    ]


def _work(comparison: Comparison) -> str:
    """What a sample was: its batch and its tokens."""
    facts = comparison.facts
    if comparison.task == "classification":
        return f"labels scored (no tokens written), batch {facts['batch size']}"
    most = f"at most {facts['new tokens at most']} new tokens"
    return f"beams {facts['beams']}, batch {facts['batch size']}, {most}"


def _decimals(value: float) -> int:
    return max(0, 2 - math.floor(math.log10(abs(value)))) if value else 2


def _letter(place: int) -> str:
    return chr(ord("a") + place) if place < 26 else str(place + 1)
