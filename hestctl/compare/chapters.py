"""The findings of a comparison as sections of a report: what was compared, gaps, rows, expectations, A/A."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hestctl.compare.configurations import Configuration, above_budget, configurations
from hestctl.compare.document import Bullets, Fold, Grid, Paragraph, Picture, Section
from hestctl.compare.glossary import KINDS, METHODS, gap_columns
from hestctl.compare.results import METRICS, PRIMARY, Comparison, Metric, Pair
from hestctl.compare.statistics import Measure
from hestctl.compare.text import (
    RIVALS,
    Footnotes,
    number,
    percent_with_interval,
    whole,
    with_interval,
)
from hestctl.compare.verdicts import points

_WHOLE = ("controller_parameters", "adapter_parameters")
_SETTINGS = {
    "data.max_tokens": "prompt and answer tokens at most",
    "data.train_samples": "training samples to draw from",
}
_GROUPS: Mapping[str, tuple[str, ...]] = {
    "Time": ("latency_p50_s", "latency_p99_s", "tokens_per_s"),
    "Joules in parts": (
        "energy_net_j_per_sample",
        "energy_error_j_per_sample",
        "prefill_j_per_sample",
        "decode_j_per_sample",
        "energy_j_per_new_token",
    ),
    "Budget": (
        "scope_energy_j_per_sample",
        "emax_j_per_sample",
        "emax_use_percent",
        "emax_use_worst_percent",
        "over_budget_percent",
        "meter_of_predicted_percent",
        "meter_of_emax_percent",
    ),
    "Training": ("controller_parameters", "adapter_parameters", "train_energy_j", "train_time_s"),
}
"""Measures by table; what is in none of these is in the first, of quality and joules."""
_BINDS = 95.0
"""Percent of E_max below which a budget does not bind."""


def compared(comparison: Comparison, settings: Mapping[str, Mapping[str, Any]]) -> Section:
    """What the methods are, and the device, model, data, generation and meter that all runs share.

    ``settings`` are the values of every dotted key, as JSON.
    """
    every = configurations(comparison.rows)
    samples = sorted({row.samples for row in comparison.rows})
    seeds = sorted({row.seed for row in comparison.rows if row.seed is not None})
    told = dict(comparison.facts)
    if comparison.task == "classification":
        # Labels are scored: how tokens would have been written says nothing of these runs.
        told = {name: value for name, value in told.items() if name not in ("beams", "new tokens at most")}
        told["answers"] = "labels scored, no tokens written"
    facts = [
        *((name, value[:12] if name == "data hash" else value) for name, value in told.items()),
        *_shared_settings(comparison, settings),
        (
            "samples a run (n)",
            " to ".join(f"{count:,}" for count in dict.fromkeys((samples[0], samples[-1]))),
        ),
        ("configurations", str(len(every))),
        ("runs", str(len(comparison.rows))),
        ("seeds", ", ".join(map(str, seeds)) or "not recorded"),
        (
            "margin of equal quality",
            f"{comparison.margin_points:g} on the scale of {_score(comparison)}, 0 to 100",
        ),
    ]
    rows = tuple((name, value) for name, value in facts)
    methods, roles = ({getattr(one, name) for one in every} for name in ("method", "role"))
    meanings = tuple(
        f"{name}: {text}"
        for shown, texts in ((methods, METHODS), (roles, KINDS))
        for name, text in texts.items()
        if name in shown
    )
    return Section("What was compared", (Bullets(meanings), Grid(("what", "all runs alike"), rows, left=2)))


def _shared_settings(
    comparison: Comparison, settings: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, str]]:
    """What every training had in common that bears on its quality."""
    for key, title in _SETTINGS.items():
        if len(values := settings.get(key, {})) == 1:
            yield title, next(iter(values))
    steps = {row.steps for row in comparison.rows if row.method != "base"}
    batches = [settings.get(f"train.{name}", {}) for name in ("batch_size", "accumulation")]
    if len(steps) == 1 and None not in steps and all(len(one) == 1 for one in batches):
        (count,), size = steps, math.prod(int(next(iter(one))) for one in batches)
        yield "training", f"{count:,} steps of {size:,} samples"


def gaps(comparison: Comparison) -> Section:
    """Every proposed configuration against every other: the gap in one view, then all that belongs to it."""
    if not comparison.pairs:
        return Section("Gap at equal quality", (Paragraph("There is no pair to compare."),))
    best = comparison.best_proposed.label if comparison.best_proposed else ""
    order = sorted(dict.fromkeys(pair.proposed for pair in comparison.pairs), key=lambda name: name != best)
    pairs = sorted(
        comparison.pairs, key=lambda pair: (order.index(pair.proposed), RIVALS.index(pair.other_role))
    )
    reasons: tuple[Fold, ...] = ()
    if comparison.energy_kind == "measured":
        told = tuple(f"{pair.proposed} against {pair.other}: {pair.why}" for pair in pairs)
        reasons = (Fold("Why each verdict", (Bullets(told),)),)
    notes = Bullets(tuple(dict.fromkeys(note for pair in pairs for note in pair.notes)))
    return Section(
        "Gap at equal quality",
        (
            *_matrix(comparison, pairs),
            _gap_grid(comparison, [one for one in pairs if one.proposed == best], f"{best} against each", 1),
            Fold(f"All {len(pairs)} pairs", (_gap_grid(comparison, pairs),)),
            *reasons,
            *((Fold("What else bears on these pairs", (notes,)),) if notes.items else ()),
        ),
    )


def rows(comparison: Comparison) -> Section:
    """One line a configuration with every measure, and the single runs on demand."""
    every = configurations(comparison.rows)
    grouped = [name for names in _GROUPS.values() for name in names]
    first = [name for name in METRICS if name not in grouped]
    tables = [
        _measures_grid(
            comparison,
            every,
            ("configuration", "role", "seeds", "samples"),
            lambda one: (one.label, one.role, str(one.seeds), str(one.samples)),
            first,
        ),
        *(
            _measures_grid(comparison, every, ("configuration",), lambda one: (one.label,), names, title)
            for title, names in _GROUPS.items()
        ),
    ]
    single = _measures_grid(
        comparison,
        comparison.rows,
        ("run", "configuration", "seed", "samples"),
        lambda row: (row.run_id, row.config_label, str(row.seed), str(row.samples)),
        list(METRICS),
    )
    remarks = (*_loose(every), *(f"{one.label}: {note}" for one in every for note in one.notes))
    told = (
        "With several seeds: the mean over the runs, with a t interval over the seeds, which speaks of other "
        "trainings on these samples. With one seed: the interval over its samples, which says nothing about "
        "another training. 'Worst' is the worst sample of any seed."
    )
    return Section(
        "Configurations",
        (
            Paragraph(told),
            *(table for table in tables if len(table.headers) > 1),
            *((Bullets(remarks),) if remarks else ()),
            Fold(f"The {len(comparison.rows)} single runs", (single,)),
        ),
    )


def _loose(every: Sequence[Configuration]) -> Iterator[str]:
    """Budgets that do not bind, and those that are kept by prediction alone."""
    used = [(one.label, one.measure("emax_use_percent").value) for one in every if one.role == "proposed"]
    loose = [f"{label} ({use:.0f} %)" for label, use in used if use is not None and use < _BINDS]
    if loose:
        yield f"these budgets do not bind, the mean sample uses less of its E_max: {', '.join(loose)}"
    yield from above_budget(every)


def expectations(comparison: Comparison) -> Section:
    """What the original sketch expected of HEST, line by line."""
    lines = tuple((line.text, line.outcome, line.reason) for line in comparison.expectations)
    blocks = (Grid(("expected of HEST", "outcome", "why"), lines, left=3),) if lines else ()
    return Section("The original's expectations", blocks or (Paragraph("None applies."),))


def repeats(comparison: Comparison, meter_check: Mapping[str, Any]) -> Section:
    """What differs where nothing does: how large a difference must be to count."""
    ratio, error = meter_check.get("aa_ratio"), meter_check.get("aa_error")
    if ratio is None:
        why = (meter_check.get("missing") or {}).get(
            "aa_ratio", "no calibration of this device is in the store"
        )
        same_work = f"The same work twice under the meter: not measured ({why})."
    else:
        bound = "no bound" if error is None else f"the meter's bound is {100 * error:.2g} %"
        same_work = f"The same work twice under the meter differed by {100 * (ratio - 1):+.2g} % ({bound})."
    granted = f"Granted to two runs of one model: {comparison.repeatability.reason}."
    notes = Footnotes()
    lines = tuple(
        (
            f"{repeat.label}, {repeat.kind}",
            notes.cell(repeat.ratio, with_interval),
            repeat.energy_word,
            notes.cell(repeat.quality_difference, points),
            repeat.quality,
        )
        for repeat in comparison.repeats
    )
    headers = (
        "one model twice",
        f"ratio of joules, {comparison.energy_word} [95 %]",
        "called",
        f"{_score(comparison)} difference, points [95 %]",
        "called",
    )
    table = (Grid(headers, lines, notes.lines()),) if lines else ()
    return Section("A/A control", (*table, Bullets((same_work, granted))))


def figures(pictures: Sequence[Picture], reasons: Mapping[str, str], drawn: bool) -> Section:
    """The figures, and those that had nothing to draw."""
    if not drawn:
        return Section("Figures", (Paragraph("None were asked for (--no-figures)."),))
    lacking = tuple(f"{topic}: not drawn ({reason})" for topic, reason in reasons.items())
    return Section("Figures", (*pictures, *((Bullets(lacking),) if lacking else ())))


def _score(comparison: Comparison) -> str:
    return METRICS[comparison.quality_metric].title


def _matrix(comparison: Comparison, pairs: Sequence[Pair]) -> tuple[Grid, ...]:
    """Proposed down, baselines and controls across: gaps, or time ratios where no joules are measured."""
    others = [pair for pair in pairs if pair.other_role in ("baseline", "control")]
    across = list(dict.fromkeys((pair.other, pair.other_role) for pair in others))
    if len(across) < 2:
        return ()
    notes = Footnotes()
    measured = comparison.energy_kind == "measured"
    if measured:
        title = "Percent fewer joules per sample, measured [95 %]"
        cells = {
            (pair.proposed, pair.other): notes.cell(pair.gap_percent, percent_with_interval, "no gap")
            for pair in others
        }
    else:
        title = "Time per sample of the row over that of the column [95 %]; no gap: no joules are measured"
        cells = {(pair.proposed, pair.other): notes.cell(pair.time_ratio, with_interval) for pair in others}
    lines = [
        (proposed, *(cells.get((proposed, other), "not compared") for other, _ in across))
        for proposed in dict.fromkeys(pair.proposed for pair in others)
    ]
    return (
        Grid(
            ("configuration", *(other if role in other else f"{other} ({role})" for other, role in across)),
            tuple(lines),
            notes.lines(),
            title=title,
        ),
    )


def _gap_grid(comparison: Comparison, pairs: Sequence[Pair], title: str = "", start: int = 0) -> Grid:
    """The columns from ``start`` on, for pairs that the title says the first of."""
    lines = {one.label: one for one in configurations(comparison.rows)}
    notes = Footnotes()
    word = comparison.energy_word
    units = {
        "gap %": f"gap %, {word} [95 %]",
        "joules ratio": f"joules ratio, {word} [95 %]",
        "time ratio": "time ratio [95 %]",
        "quality difference": f"{_score(comparison)} difference, points [95 %]",
        "least detectable saving": "least detectable saving, %",
        "least detectable": "least detectable difference, points",
        "p99 ratio": "p99 ratio [95 %]",
        "over E_max": "over E_max, % of samples",
        "worst of E_max": "worst of E_max, %",
        "repaid after": "repaid after, samples",
    }
    measured = comparison.energy_kind == "measured"
    shown = gap_columns(measured)[start:]
    told = () if measured else (f"joules are {word}: no gap and no verdict, every pair is inconclusive",)
    return Grid(
        tuple(units.get(name, name) for name in shown),
        tuple(_gap_cells(pair, lines, notes, shown) for pair in pairs),
        (*notes.lines(), *told),
        left=2 - start,
        title=title,
    )


def _gap_cells(
    pair: Pair, lines: Mapping[str, Configuration], notes: Footnotes, shown: Sequence[str]
) -> tuple[str, ...]:
    """The cells of one pair in the columns ``shown``; only what is shown is noted."""
    proposed, other = lines[pair.proposed], lines[pair.other]

    def parameters(side: Configuration) -> str:
        return notes.cell(side.measure("controller_parameters"), whole, "none")

    cells: Mapping[str, Callable[[], str]] = {
        "configuration": lambda: pair.proposed,
        "against": lambda: pair.other,
        "role": lambda: pair.other_role,
        "samples": lambda: f"{pair.samples:,}",
        "gap %": lambda: notes.cell(pair.gap_percent, percent_with_interval, "no gap"),
        "by length": lambda: _optional(pair.length_part_percent, "+.1f"),
        "by token": lambda: _optional(pair.token_part_percent, "+.1f"),
        "joules ratio": lambda: notes.cell(pair.ratio, with_interval),
        "time ratio": lambda: notes.cell(pair.time_ratio, with_interval),
        "at equal length": lambda: pair.at_equal_length.removeprefix("at equal length: "),
        "quality difference": lambda: notes.cell(pair.quality_difference, points),
        "quality": lambda: pair.quality,
        "least detectable saving": lambda: _optional(pair.least_detectable_saving_percent),
        "least detectable": lambda: _optional(pair.least_detectable_points),
        "adjusted p": lambda: (
            notes.missing("it stands for no claim", "none")
            if pair.claim.adjusted is None
            else number(pair.claim.adjusted)
        ),
        "p99 ratio": lambda: notes.cell(pair.latency_p99_ratio, with_interval),
        "controller parameters": lambda: f"{parameters(proposed)} : {parameters(other)}",
        "over E_max": lambda: notes.cell(proposed.measure("over_budget_percent"), with_interval),
        "worst of E_max": lambda: notes.cell(proposed.measure("emax_use_worst_percent"), _bare),
        "repaid after": lambda: notes.cell(pair.break_even_samples, whole, "none"),
        "verdict": lambda: pair.verdict,
    }
    return tuple(cells[name]() for name in shown)


def _measures_grid(
    comparison: Comparison,
    lines: Sequence[Any],
    naming: tuple[str, ...],
    named: Callable[[Any], tuple[str, ...]],
    names: Sequence[str],
    title: str = "",
) -> Grid:
    """Those of the measures that any line has; what a line lacks has a letter and its reason below."""
    shown = [name for name in names if any(line.measure(name).value is not None for line in lines)]
    notes = Footnotes()
    first = (comparison.quality_metric, PRIMARY)
    shown = [*(name for name in first if name in shown), *(name for name in shown if name not in first)]
    cells = tuple(
        (*named(line), *(notes.narrow(line.measure(name), _shown(name)) for name in shown)) for line in lines
    )
    headers = (*naming, *(header(METRICS[name], comparison) for name in shown))
    return Grid(headers, cells, notes.lines(), left=min(2, len(naming)), title=title)


def header(metric: Metric, comparison: Comparison) -> str:
    """Title, unit, and for joules the word of their kind."""
    word = {"meter": comparison.energy_word, "table": "predicted", None: None}[metric.source]
    unit = None if metric.unit == "parameters" else metric.unit
    return ", ".join(filter(None, (metric.title, unit, word)))


def _shown(name: str) -> Callable[[Measure], str]:
    return whole if name in _WHOLE else with_interval


def _optional(value: float | None, style: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{style}}" if style else number(value)


def _bare(measure: Measure) -> str:
    return number(measure.value or 0.0)
