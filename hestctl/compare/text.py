"""A comparison as plain text tables and lines; the command line renders them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from hestctl.compare.decisions import ENERGY_WORDS
from hestctl.compare.results import METRICS, PRIMARY, Best, Comparison, Pair
from hestctl.compare.statistics import Measure

NOT_MEASURED: Final = "not measured"


@dataclass(frozen=True, slots=True)
class TextTable:
    """Headers and cells as strings, and the footnotes that the letters in cells refer to."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class _Footnotes:
    """Letters for reasons: one reason, one letter a table."""

    reasons: list[str] = field(default_factory=list)

    def cell(self, measure: Measure, show: Callable[[Measure], str], word: str = NOT_MEASURED) -> str:
        return self.missing(measure.reason, word) if measure.value is None else show(measure)

    def narrow(self, measure: Measure, show: Callable[[Measure], str]) -> str:
        """A cell for a column of bare numbers: broken over lines where there is none."""
        return self.missing(measure.reason).replace(" ", "\n") if measure.value is None else show(measure)

    def missing(self, reason: str | None, word: str = NOT_MEASURED) -> str:
        return self.refer(word, f"{word}: {reason or 'no reason was recorded'}")

    def refer(self, word: str, reason: str) -> str:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return f"{word} ({_letter(self.reasons.index(reason))})"

    def lines(self) -> tuple[str, ...]:
        return tuple(f"({_letter(place)}) {reason}" for place, reason in enumerate(self.reasons))


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


def summary_lines(comparison: Comparison) -> list[str]:
    """What is compared, on what, and what follows: a few lines above the tables."""
    facts = comparison.facts
    lines = [
        f"{facts['backbone']} ({facts['weights']} weights, {facts['dtype']}) on {facts['dataset']}, "
        f"{facts['split']} split",
        f"{facts['device']}; {_work(comparison)}, engine {facts['engine']}",
        f"joules per sample are {comparison.energy_word} ({facts['meter']}); "
        "joules of the budget are predicted from the energy table",
        _gap_line("gap to the best baseline", comparison.best_baseline, comparison.gap.percent),
        _gap_line("gap to the best control", comparison.best_control, comparison.gap_vs_controls.percent),
    ]
    if comparison.estimated_time_ratio.value is not None:
        lines.append(
            f"estimated time ratio: {with_interval(comparison.estimated_time_ratio)} (no saving of joules)"
        )
    deciding = _deciding(comparison)
    if deciding is not None:
        lines.append(f"{deciding.proposed} against {deciding.other} {deciding.at_equal_length}")
    return [*lines, comparison.conclusion]


def _work(comparison: Comparison) -> str:
    """What a sample was: its batch and its tokens."""
    facts = comparison.facts
    if comparison.task == "classification":
        return f"labels scored (no tokens written), batch {facts['batch size']}"
    most = f"at most {facts['new tokens at most']} new tokens"
    return f"beams {facts['beams']}, batch {facts['batch size']}, {most}"


def as_rows(comparison: Comparison) -> list[TextTable]:
    """The tables of the terminal, each at most 100 columns wide when long cells may wrap."""
    tables = [_quality_table(comparison), _energy_table(comparison), _budget_table(comparison)]
    if comparison.pairs:
        tables.append(_pair_table(comparison))
        tables.append(_repeat_table(comparison))
    if comparison.expectations:
        tables.append(_expectation_table(comparison))
    if comparison.set_apart:
        tables.append(_apart_table(comparison))
    return tables


def _deciding(comparison: Comparison) -> Pair | None:
    best, other = comparison.best_proposed, comparison.best_baseline
    if best is None or other is None:
        return None
    names = (best.label, other.label)
    return next((pair for pair in comparison.pairs if (pair.proposed, pair.other) == names), None)


def _quality_table(comparison: Comparison) -> TextTable:
    notes = _Footnotes()
    metric = METRICS[comparison.quality_metric]
    if comparison.task == "classification":
        others: tuple[tuple[str, str], ...] = (("chance %", "chance_percent"),)
    else:
        others = (("R-L", "rouge_l"), ("R-1", "rouge1"), ("R-2", "rouge2"), ("answer NLL", "answer_nll_nats"))
    headers = ("run", "samples", f"{metric.title} {metric.unit} [95 %]", *(title for title, _ in others))
    rows = tuple(
        (
            row.label,
            str(row.samples),
            notes.cell(row.measure(comparison.quality_metric), with_interval),
            *(notes.cell(row.measure(name), _bare) for _, name in others),
        )
        for row in comparison.rows
    )
    remarks = tuple(f"{row.label}: {note}" for row in comparison.rows for note in row.notes)
    return TextTable("Quality", headers, rows, (*notes.lines(), *remarks))


def _energy_table(comparison: Comparison) -> TextTable:
    notes = _Footnotes()
    headers = (
        "run",
        f"J/sample\n{comparison.energy_word} [95 %]",
        "new\ntokens",
        f"J/token\n{comparison.energy_word}",
        "p50 s",
        "p99 s [95 %]",
        "tokens/s",
    )
    rows = tuple(
        (
            row.label,
            notes.cell(row.measure(PRIMARY), with_interval),
            notes.narrow(row.measure("new_tokens_per_sample"), _bare),
            notes.narrow(row.measure("energy_j_per_new_token"), _bare),
            notes.narrow(row.measure("latency_p50_s"), _bare),
            notes.cell(row.measure("latency_p99_s"), with_interval),
            notes.narrow(row.measure("tokens_per_s"), _bare),
        )
        for row in comparison.rows
    )
    remark = ("open: the data end before the interval does",) if any("open" in row[5] for row in rows) else ()
    return TextTable("Energy and latency", headers, rows, (*notes.lines(), *remark))


def _budget_table(comparison: Comparison) -> TextTable:
    notes = _Footnotes()
    headers = (
        "run",
        "scope",
        "J/sample\nin scope,\npredicted",
        "mean %\nof E_max",
        "worst %\nof E_max",
        "over\nE_max %",
        f"training\nJ\n{comparison.energy_word}",
        "controller\nparameters",
    )
    rows = tuple(
        (
            row.label,
            row.scope or "none",
            notes.narrow(row.measure("scope_energy_j_per_sample"), _bare),
            notes.narrow(row.measure("emax_use_percent"), _bare),
            notes.narrow(row.measure("emax_use_worst_percent"), _bare),
            notes.narrow(row.measure("over_budget_percent"), _bare),
            notes.narrow(row.measure("train_energy_j"), _bare),
            notes.narrow(row.measure("controller_parameters"), lambda measure: f"{measure.value or 0:,.0f}"),
        )
        for row in comparison.rows
    )
    return TextTable("Budget and cost", headers, rows, notes.lines())


def _pair_table(comparison: Comparison) -> TextTable:
    notes = _Footnotes()
    measured = comparison.energy_kind == "measured"
    headers: tuple[str, ...] = (
        "pair",
        "gap %\n[95 %]",
        "by\nlength",
        "by\ntoken",
        "quality\npoints",
        "repaid after\nsamples",
        "verdict",
    )
    if not measured:
        headers = ("pair", "gap %", "estimated time\nratio [95 %]", "quality\npoints", "verdict")
    rows: list[tuple[str, ...]] = []
    for pair in comparison.pairs:
        name = f"{pair.proposed} :\n{pair.other}"
        difference = pair.quality_difference.value
        points = (
            notes.missing(pair.quality_difference.reason)
            if difference is None
            else f"{difference:+.2f}\n{pair.quality}"
        )
        gap = notes.cell(pair.gap_percent, percent_with_interval, "no gap").replace(" [", "\n[")
        if not measured:
            rows.append((name, gap, notes.cell(pair.time_ratio, with_interval), points, pair.verdict))
            continue
        parts = [
            "" if part is None else f"{part:+.1f}"
            for part in (pair.length_part_percent, pair.token_part_percent)
        ]
        repaid = notes.cell(pair.break_even_samples, lambda one: f"{one.value or 0:,.0f}", "none")
        rows.append((name, gap, *parts, points, repaid, pair.verdict))
    best = comparison.best_proposed
    # One sentence for every pair would be a wall: the table has every verdict, --json every reason.
    reasons = tuple(
        f"{pair.proposed} : {pair.other}: {pair.why}"
        for pair in comparison.pairs
        if best is None or pair.proposed == best.label
    )
    remarks = tuple(dict.fromkeys(note for pair in comparison.pairs for note in pair.notes))
    return TextTable("Pairs", headers, tuple(rows), (*notes.lines(), *reasons, *remarks))


def _repeat_table(comparison: Comparison) -> TextTable:
    """What the comparison calls a difference where there is none."""
    notes = _Footnotes()
    rows = tuple(
        (
            f"{repeat.label},\n{repeat.kind}",
            with_interval(repeat.ratio),
            ENERGY_WORDS[repeat.energy],
            notes.cell(repeat.quality_difference, lambda one: f"{one.value or 0:+.2f}"),
            repeat.quality,
        )
        for repeat in comparison.repeats
    )
    headers = ("one model twice", "ratio of joules\n[95 %]", "called", "quality\npoints", "called")
    remark = f"repeatability granted to every verdict: {comparison.repeatability.reason}"
    return TextTable("A/A control", headers, rows, (*notes.lines(), remark))


def _expectation_table(comparison: Comparison) -> TextTable:
    notes = _Footnotes()
    rows = tuple((line.text, notes.refer(line.outcome, line.reason)) for line in comparison.expectations)
    return TextTable("The original's expectations", ("expected of HEST", "outcome"), rows, notes.lines())


def _apart_table(comparison: Comparison) -> TextTable:
    notes = _Footnotes()
    rows = tuple((one.run_id, one.label, notes.refer(one.kind, one.reason)) for one in comparison.set_apart)
    return TextTable("Set apart", ("run id", "run", "kept out as"), rows, notes.lines())


def _gap_line(name: str, other: Best | None, gap: Measure) -> str:
    if gap.value is None:
        return f"{name}: none ({gap.reason})"
    return f"{name} ({other.label if other else ''}): {percent_with_interval(gap)} % fewer joules per sample"


def _bare(measure: Measure) -> str:
    return number(measure.value or 0.0)


def _decimals(value: float) -> int:
    return max(0, 2 - math.floor(math.log10(abs(value)))) if value else 2


def _letter(place: int) -> str:
    return chr(ord("a") + place) if place < 26 else str(place + 1)
