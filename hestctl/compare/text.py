"""A comparison as plain text tables and lines; the command line renders them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from hestctl.compare.configurations import Configuration, configurations
from hestctl.compare.results import METRICS, PRIMARY, Best, Comparison, Pair, Row
from hestctl.compare.statistics import Measure

NOT_MEASURED: Final = "not measured"
RIVALS: Final = ("baseline", "control", "ablation", "proposed", "base")
"""Roles in the order in which the best configuration is set against them."""
_SENTENCES: Final = 6
"""Up to so many pairs each has its sentence below the table."""
_LABEL_WIDTH: Final = 16
"""Columns of a label in a terminal; longer ones go on in the next line."""


@dataclass(frozen=True, slots=True)
class TextTable:
    """Headers and cells as strings, and the footnotes that the letters in cells refer to."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


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


def verdict_lines(comparison: Comparison) -> list[str]:
    """What follows from the comparison: the verdict first, then both gaps."""
    lines = [
        comparison.conclusion,
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
    return lines


def compared_lines(comparison: Comparison) -> list[str]:
    """What all the runs share: model, data, device, generation, meter."""
    facts = comparison.facts
    return [
        f"{facts['backbone']} ({facts['weights']} weights, {facts['dtype']}) on {facts['dataset']}, "
        f"{facts['split']} split",
        f"{facts['device']}; {_work(comparison)}, engine {facts['engine']}",
        f"joules per sample are {comparison.energy_word} ({facts['meter']}); "
        "joules of the budget are predicted from the energy table",
    ]


def _work(comparison: Comparison) -> str:
    """What a sample was: its batch and its tokens."""
    facts = comparison.facts
    if comparison.task == "classification":
        return f"labels scored (no tokens written), batch {facts['batch size']}"
    most = f"at most {facts['new tokens at most']} new tokens"
    return f"beams {facts['beams']}, batch {facts['batch size']}, {most}"


def gap_tables(comparison: Comparison, *, every: bool = False) -> list[TextTable]:
    """The gap at equal quality: the best proposed configuration against every other, then the other
    proposed ones against the best baseline and the best control (``every``: against all)."""
    best = comparison.best_proposed
    if best is None:
        return [_pair_table(comparison, comparison.pairs, None)] if comparison.pairs else []
    first = sorted(
        (pair for pair in comparison.pairs if pair.proposed == best.label),
        key=lambda pair: RIVALS.index(pair.other_role),
    )
    others = [pair for pair in comparison.pairs if pair.proposed != best.label]
    rivals = [one.label for one in (comparison.best_baseline, comparison.best_control) if one is not None]
    shown = [pair for pair in others if every or pair.other in rivals]
    tables = (
        [_pair_table(comparison, first, best, reasons=every or len(first) <= _SENTENCES)] if first else []
    )
    if shown:
        tables.append(_pair_table(comparison, shown, None, left_out=len(others) - len(shown)))
    return tables


def as_rows(comparison: Comparison, *, runs: bool = False) -> list[TextTable]:
    """The other tables of the terminal; each fits 80 columns where intervals stand below their values.

    One row a configuration, its seeds joined, or one a run.
    """
    lines: Sequence[Row | Configuration] = comparison.rows if runs else configurations(comparison.rows)
    tables = [
        _quality_table(comparison, lines),
        _energy_table(comparison, lines),
        _latency_table(lines),
        _budget_table(comparison, lines),
    ]
    if comparison.pairs or comparison.repeats:
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


def _label(text: str) -> str:
    return "\n".join(textwrap.wrap(text, _LABEL_WIDTH))


def _naming(lines: Sequence[Row | Configuration]) -> str:
    return "configuration" if isinstance(lines[0], Configuration) else "run"


def _quality_table(comparison: Comparison, lines: Sequence[Row | Configuration]) -> TextTable:
    notes = Footnotes()
    metric = METRICS[comparison.quality_metric]
    if comparison.task == "classification":
        others: tuple[tuple[str, str], ...] = (("chance %", "chance_percent"),)
    else:
        others = (
            ("R-L", "rouge_l"),
            ("R-1", "rouge1"),
            ("R-2", "rouge2"),
            ("answer\nNLL", "answer_nll_nats"),
        )
    headers = (
        _naming(lines),
        "seeds" if isinstance(lines[0], Configuration) else "samples",
        f"{metric.title}\n{metric.unit}\n[95 %]",
        *(title for title, _ in others),
    )
    rows = tuple(
        (
            _label(line.label),
            str(line.seeds if isinstance(line, Configuration) else line.samples),
            notes.cell(line.measure(comparison.quality_metric), with_interval),
            *(notes.narrow(line.measure(name), _bare) for _, name in others),
        )
        for line in lines
    )
    remarks = []
    if any(isinstance(line, Configuration) and line.seeds > 1 for line in lines):
        remarks.append("several seeds: means with intervals over the seeds; one seed: intervals over samples")
    remarks += [f"{line.label}: {note}" for line in lines for note in line.notes]
    return TextTable("Quality", headers, rows, (*notes.lines(), *remarks))


def _energy_table(comparison: Comparison, lines: Sequence[Row | Configuration]) -> TextTable:
    notes = Footnotes()
    word = comparison.energy_word
    headers = (
        _naming(lines),
        f"J/sample\n{word}\n[95 %]",
        f"net of idle\nJ/sample\n{word}",
        "new\ntokens",
        f"J/token\n{word}",
    )
    rows = tuple(
        (
            _label(line.label),
            notes.cell(line.measure(PRIMARY), with_interval),
            notes.narrow(line.measure("energy_net_j_per_sample"), _bare),
            notes.narrow(line.measure("new_tokens_per_sample"), _bare),
            notes.narrow(line.measure("energy_j_per_new_token"), _bare),
        )
        for line in lines
    )
    return TextTable("Energy", headers, rows, notes.lines())


def _latency_table(lines: Sequence[Row | Configuration]) -> TextTable:
    notes = Footnotes()
    headers = (_naming(lines), "p50 s", "p99 s\n[95 %]", "tokens/s")
    rows = tuple(
        (
            _label(line.label),
            notes.narrow(line.measure("latency_p50_s"), _bare),
            notes.cell(line.measure("latency_p99_s"), with_interval),
            notes.narrow(line.measure("tokens_per_s"), _bare),
        )
        for line in lines
    )
    remark = ("open: the data end before the interval does",) if any("open" in row[2] for row in rows) else ()
    return TextTable("Latency", headers, rows, (*notes.lines(), *remark))


def _budget_table(comparison: Comparison, lines: Sequence[Row | Configuration]) -> TextTable:
    notes = Footnotes()
    scopes = list(dict.fromkeys(line.scope for line in lines if line.scope))
    headers = (
        _naming(lines),
        *(("scope",) if len(scopes) > 1 else ()),
        "J/sample\nin scope,\npredicted",
        "mean\n% of\nE_max",
        "worst\n% of\nE_max",
        "over\nE_max\n%",
        f"training\nJ\n{comparison.energy_word}",
        "controller\nparameters",
    )
    rows = tuple(
        (
            _label(line.label),
            *((line.scope or "none",) if len(scopes) > 1 else ()),
            notes.narrow(line.measure("scope_energy_j_per_sample"), _bare),
            notes.narrow(line.measure("emax_use_percent"), _bare),
            notes.narrow(line.measure("emax_use_worst_percent"), _bare),
            notes.narrow(line.measure("over_budget_percent"), _bare),
            notes.narrow(line.measure("train_energy_j"), _bare),
            notes.narrow(line.measure("controller_parameters"), whole),
        )
        for line in lines
    )
    title = f"Budget (scope {scopes[0]}) and cost" if len(scopes) == 1 else "Budget and cost"
    return TextTable(title, headers, rows, notes.lines())


def _pair_table(
    comparison: Comparison,
    pairs: Sequence[Pair],
    best: Best | None,
    *,
    left_out: int = 0,
    reasons: bool = True,
) -> TextTable:
    """Pairs of one proposed configuration, ``best``, which the title then names, or of several."""
    notes = Footnotes()
    measured = comparison.energy_kind == "measured"
    headers: tuple[str, ...] = (
        "against" if best else "pair",
        *(
            ("gap %\n[95 %]", "by length\nby token")
            if measured
            else ("gap %", "estimated time\nratio [95 %]")
        ),
        "quality\npoints",
        "verdict",
    )
    rows: list[tuple[str, ...]] = []
    for pair in pairs:
        name = _label(pair.other) if best else f"{_label(pair.proposed)} :\n{_label(pair.other)}"
        difference = pair.quality_difference.value
        points = (
            notes.missing(pair.quality_difference.reason)
            if difference is None
            else f"{difference:+.2f}\n{pair.quality}"
        )
        gap = notes.cell(pair.gap_percent, percent_with_interval, "no gap").replace(" [", "\n[")
        beside = notes.cell(pair.time_ratio, with_interval)
        if measured:
            parts = (pair.length_part_percent, pair.token_part_percent)
            beside = "\n".join(f"{part:+.1f}" for part in parts if part is not None)
        rows.append((name, gap, beside, points, pair.verdict))
    title = "Gap at equal quality"
    if best is not None:
        title += f": {best.label} against the others"
    elif comparison.best_proposed is not None:
        title += ": further pairs"
    remarks = _pair_remarks(pairs, reasons) if best else ()
    if left_out:
        counted = "1 more pair" if left_out == 1 else f"{left_out} more pairs"
        remarks += (f"{counted} of the other configurations: --runs shows all",)
    return TextTable(title, headers, tuple(rows), (*notes.lines(), *remarks))


def _pair_remarks(pairs: Sequence[Pair], reasons: bool) -> tuple[str, ...]:
    repaid = [
        f"{pair.other} {whole(pair.break_even_samples)}"
        for pair in pairs
        if pair.break_even_samples.value is not None
    ]
    told = [f"{pair.proposed} : {pair.other}: {pair.why}" for pair in pairs]
    told += dict.fromkeys(note for pair in pairs for note in pair.notes)
    if not reasons:
        # Sentences for every pair would be a wall between the table and the next.
        told = ["--runs, --json and --report say why for every pair"]
    return (
        *((f"training joules are repaid after so many samples: {', '.join(repaid)}",) if repaid else ()),
        *told,
    )


def _repeat_table(comparison: Comparison) -> TextTable:
    """What the comparison calls a difference where there is none."""
    notes = Footnotes()
    rows: tuple[tuple[str, ...], ...] = tuple(
        (
            f"{repeat.label},\n{repeat.kind}",
            with_interval(repeat.ratio),
            repeat.energy_word,
            notes.cell(repeat.quality_difference, lambda one: f"{one.value or 0:+.2f}"),
            repeat.quality,
        )
        for repeat in comparison.repeats
    )
    if not rows:
        unknown = notes.missing(
            "no two finished runs are of one configuration and seed"
            if comparison.energy_kind != "none"
            else "there was no energy meter"
        )
        rows = (("none in these stores", unknown, "-", unknown, "-"),)
    ratio = f"ratio of joules\n{comparison.energy_word} [95 %]"
    headers = ("one model twice", ratio, "called", "quality\npoints", "called")
    remark = f"repeatability granted to every verdict: {comparison.repeatability.reason}"
    return TextTable("A/A control", headers, rows, (*notes.lines(), remark))


def _expectation_table(comparison: Comparison) -> TextTable:
    notes = Footnotes()
    rows = tuple((line.text, notes.refer(line.outcome, line.reason)) for line in comparison.expectations)
    return TextTable("The original's expectations", ("expected of HEST", "outcome"), rows, notes.lines())


def _apart_table(comparison: Comparison) -> TextTable:
    notes = Footnotes()
    rows = tuple((one.run_id, one.label, notes.refer(one.kind, one.reason)) for one in comparison.set_apart)
    return TextTable("Set apart", ("run id", "run", "kept out as"), rows, notes.lines())


def _gap_line(name: str, other: Best | None, gap: Measure) -> str:
    if gap.value is None:
        return f"{name}: none ({gap.reason})"
    return f"{name} ({other.label if other else ''}): {percent_with_interval(gap)} % fewer joules per sample"


def whole(measure: Measure) -> str:
    """A count, with thousands grouped."""
    return f"{measure.value or 0.0:,.0f}"


def _bare(measure: Measure) -> str:
    return number(measure.value or 0.0)


def _decimals(value: float) -> int:
    return max(0, 2 - math.floor(math.log10(abs(value)))) if value else 2


def _letter(place: int) -> str:
    return chr(ord("a") + place) if place < 26 else str(place + 1)
