"""What stands behind the findings: what is missing, how it was measured, where from, how to repeat it."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from hestctl.compare import decisions, statistics
from hestctl.compare.chapters import header
from hestctl.compare.commands import command, shared_options, train_commands
from hestctl.compare.configurations import configurations
from hestctl.compare.document import Block, Code, Fold, Grid, Paragraph, Section
from hestctl.compare.expectations import ORIGINAL_MODEL
from hestctl.compare.glossary import GAP_COLUMNS, MEASURES, TERMS, gap_columns
from hestctl.compare.provenance import Provenance
from hestctl.compare.results import METRICS, PRIMARY, Comparison, Row
from hestctl.compare.statistics import Measure
from hestctl.compare.text import number

_PAIR_MEASURES: Mapping[str, str] = {
    "gap_percent": "gap",
    "ratio": "joules ratio",
    "per_token_ratio": "ratio of joules per new token",
    "quality_difference": "quality difference",
    "latency_p99_ratio": "p99 ratio",
    "scope_ratio": "ratio of joules in scope",
    "break_even_samples": "samples until training is repaid",
}
_NO_ORIGINAL = (
    f"no run here is of {ORIGINAL_MODEL}; on a GPU: `hestctl profile --method base,tabs,hest,base+int8 "
    "--backbone llama-2-7b --weights random --dtype bfloat16 --seq-len 1024 --new-tokens 128`"
)
_LISTED = 6
"""So many names of rows or pairs stand beside a reason; the others are counted."""

_WAYS: Mapping[str, str] = {
    "interpolated": "cut from the counter by interpolation between its time-stamped steps",
    "replicated": "one window over many repetitions, divided by their number",
    "apportioned": "taken for each generated batch, and split over its samples by the energy model",
    "estimated": "CPU time times nominal watts",
}

_UNITS: Mapping[str, str] = {"_s": " s", "_w": " W", "_j": " J"}


def not_measured(comparison: Comparison, figure_reasons: Mapping[str, str]) -> Section:
    """Every absent number under its reason, and the runs that do not count."""
    found: dict[str, tuple[dict[str, None], dict[str, None]]] = defaultdict(lambda: ({}, {}))
    for reason, what, where in _absences(comparison, figure_reasons):
        found[reason][0][what] = None
        found[reason][1][where] = None
    lines = tuple((reason, "; ".join(what), _listed(where)) for reason, (what, where) in found.items())
    blocks: list[Block] = [
        Grid(("reason", "what is not measured", "of"), lines, left=3)
        if lines
        else Paragraph("Nothing is missing.")
    ]
    if comparison.set_apart:
        apart = tuple((one.run_id, one.label, one.kind, one.reason) for one in comparison.set_apart)
        grid = Grid(("run", "configuration", "kept out as", "why"), apart, left=4)
        blocks.append(Fold(f"{len(apart)} runs that do not count here", (grid,)))
    return Section("What was not measured, and why", tuple(blocks))


def method(comparison: Comparison, provenance: Provenance) -> Section:
    """Meter, certificate, error and statistics, as the runs and the program itself say."""
    blocks: list[Block] = [
        Paragraph(" ".join(_of_energy(comparison))),
        Paragraph(" ".join(_of_statistics(comparison))),
    ]
    if provenance.certificate:
        assert provenance.calibration is not None
        blocks.append(_certificate(provenance.certificate, provenance.calibration.run_id))
    return Section("How it was measured", tuple(blocks))


def provenance_section(comparison: Comparison, provenance: Provenance) -> Section:
    """Runs and stores, versions, and settings: those that differ and those that all share."""
    labels = {row.run_id: row.config_label for row in comparison.rows}
    lines = tuple(_run_line(row, provenance) for row in comparison.rows)
    versions = provenance.versions()
    told = tuple(
        (name, version, _whose(ids, labels))
        for name, found in versions.items()
        for version, ids in found.items()
    )
    driver = provenance.certificate.get("driver")
    source = provenance.calibration.run_id if provenance.calibration else ""
    driver_line = ("driver", str(driver), f"by the certificate of {source}") if driver else None
    settings = provenance.settings()
    differing = tuple(
        (key, _plain(value), _whose(ids, labels))
        for key, values in settings.items()
        if len(values) > 1
        for value, ids in values.items()
    )
    shared = tuple((key, _plain(next(iter(values)))) for key, values in settings.items() if len(values) == 1)
    headers = ("run", "store", "configuration", "seed", "begun", "steps", "E_max from", "calibration")
    blocks: list[Block] = [
        Fold(f"The {len(lines)} runs", (Grid(headers, lines, left=8),)),
        Grid(
            ("program", "version", "runs"),
            (
                *told,
                *(
                    (driver_line,)
                    if driver_line
                    else (("driver", "not recorded", "no certificate names one"),)
                ),
            ),
            left=3,
            title="Versions",
        ),
    ]
    if differing:
        blocks.append(Grid(("setting", "value", "runs"), differing, left=3, title="Settings that differ"))
    if shared:
        blocks.append(Fold("Settings that all runs share", (Grid(("setting", "value"), shared, left=2),)))
    if not settings:
        blocks.append(Paragraph("The runs recorded no settings."))
    return Section("Provenance", tuple(blocks))


def repeat(comparison: Comparison, provenance: Provenance, asked: Sequence[str]) -> Section:
    """The commands, oldest first; ``asked`` is the `compare` that made this report."""
    db = "again.duckdb"
    first = []
    if provenance.calibration is not None:
        calibrated = command(provenance.calibration, "calibrate", db)
        first += [calibrated] if calibrated else []
    trainings = train_commands(list(provenance.runs.values()), db)
    shared = shared_options(trainings)
    if shared is not None:
        function, trainings = shared
        first.append(function)
    last = shlex.join(["hestctl", "compare", "--db", db, *asked])
    told = (
        "These commands come from the settings that the runs recorded, as differences from the nearest "
        "shipped profile, in the order in which the runs were started. They need hestctl installed (its "
        "README says how), the data in the folder named after --data, and no HESTCTL_ variable set. Paths "
        "are shortened to their last part; device and versions will be yours."
    )
    one = (
        "To repeat one row: calibrate, define the function, run the tabs line (a budget is a ratio of what "
        "the latest tabs run spends), then the line of that row, then compare."
    )
    blocks = (Paragraph(told), Code((*first, *trainings, last)), Paragraph(one))
    return Section("How to repeat it", blocks)


def glossary(comparison: Comparison) -> Section:
    """Every column of this report, and the words it uses."""
    shown = [name for name in METRICS if any(row.measure(name).value is not None for row in comparison.rows)]
    lines = (
        *TERMS.items(),
        *((name, GAP_COLUMNS[name]) for name in gap_columns(comparison.energy_kind == "measured")),
        *((header(METRICS[name], comparison), MEASURES[name]) for name in shown),
    )
    return Section("Glossary", (Grid(("term", "meaning"), tuple(lines), left=2),))


def _absences(comparison: Comparison, figure_reasons: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Reason, what, and of which row or pair."""
    for one in configurations(comparison.rows):
        for name, measure in one.measures.items():
            yield from _absence(measure, METRICS[name].title, one.label)
    for pair in comparison.pairs:
        for name, title in _PAIR_MEASURES.items():
            yield from _absence(getattr(pair, name), title, f"{pair.proposed} : {pair.other}")
    for gap, title in (
        (comparison.gap, "gap to the best baseline"),
        (comparison.gap_vs_controls, "gap to the best control"),
    ):
        if gap.reason is not None:
            yield gap.reason, title, "the comparison"
    if ORIGINAL_MODEL.lower() not in comparison.facts["backbone"].lower():
        yield _NO_ORIGINAL, f"joules and latency of {ORIGINAL_MODEL}", "the original's claim"
    for line in comparison.expectations:
        if line.outcome == "not measured":
            yield line.reason, line.text, "the original's expectations"
    for topic, reason in figure_reasons.items():
        yield reason, topic.removeprefix("comparison_").replace("_", " "), "figures"


def _absence(measure: Measure, title: str, where: str) -> Iterator[tuple[str, str, str]]:
    if measure.value is None:
        yield measure.reason or "no reason was recorded", title, where
    elif measure.low is None and measure.reason and "interval" in measure.reason:
        yield measure.reason, f"interval of {title}", where


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = len(every) - _LISTED
    # Labels and titles have commas of their own.
    return "; ".join(every[:_LISTED]) + (f"; and {more} more" if more > 0 else "")


def _of_energy(comparison: Comparison) -> Iterator[str]:
    facts = comparison.facts
    if comparison.energy_kind == "none":
        reasons = list(dict.fromkeys(row.measure(PRIMARY).reason for row in comparison.rows))
        yield f"Joules were not measured: {'; '.join(reason for reason in reasons if reason)}."
        return
    source = (
        f"the energy counter {facts['meter']}" if comparison.energy_kind == "measured" else facts["meter"]
    )
    yield (
        f"Joules per sample are {comparison.energy_word}, from {source} on {facts['device']}; they are "
        "gross: the idle draw of the device is included."
    )
    ways = sorted({row.energy_method for row in comparison.rows if row.energy_method})
    if ways:
        told = [f"{way}: {_WAYS[way]}" if way in _WAYS else way for way in ways]
        yield f"How the joules of most samples were obtained: {'; '.join(told)}."
    shares = [share for row in comparison.rows if (share := _error_share(row)) is not None]
    if shares:
        yield (
            f"The meter's bound on one sample is {number(min(shares))} to {number(max(shares))} % of its "
            "joules, by run, in the mean."
        )
    else:
        yield "The meter gave no error bound."
    lacking = any("no valid joules" in note for row in comparison.rows for note in row.notes)
    if not lacking and all(row.measure(PRIMARY).value is not None for row in comparison.rows):
        yield "Every sample has valid joules."


def _error_share(row: Row) -> float | None:
    error, joules = row.measure("energy_error_j_per_sample").value, row.measure(PRIMARY).value
    return None if error is None or not joules else 100 * error / joules


def _of_statistics(comparison: Comparison) -> Iterator[str]:
    level = f"{100 * statistics.LEVEL:g} %"
    yield (
        f"Methods are compared sample by sample. Intervals hold {level}. Means and their ratios have them by "
        "jackknife and Student's t: of joules and seconds over generated batches, of scores over samples, of "
        f"ratios on their logarithms; fewer than {statistics.FEWEST} values have none. Percentiles have them "
        "from order statistics, ratios of percentiles from a bootstrap of the batches, shares by Wilson."
    )
    if any(len(pair.proposed_run_ids) > 1 or len(pair.other_run_ids) > 1 for pair in comparison.pairs):
        yield (
            "With several seeds, an interval includes the variation between trainings as well as between "
            "samples."
        )
    yield (
        f"Equal quality is non-inferiority at {comparison.margin_points:g} points: a one-sided test at "
        f"{100 * decisions.ALPHA:g} % that the difference is not below {-comparison.margin_points:g}. Less "
        f"energy is a ratio of joules below 1 by more than the {100 * comparison.repeatability.value:.2g} % "
        "in which two runs of one model may differ. A verdict needs both, and p-values are adjusted after "
        "Holm over all pairs of a proposed configuration with a baseline or a control; those with ablations "
        "are a family of their own."
    )
    yield "A gap is split by the logarithms of two ratios: of new tokens, and of joules per new token."


def _certificate(certificate: Mapping[str, object], run_id: str) -> Grid:
    missing = certificate.get("missing")
    reasons = missing if isinstance(missing, Mapping) else {}
    skipped = ("missing", "warnings", "created_at", "device_uuid")
    lines = [
        (key, _figure(key, value))
        for key, value in certificate.items()
        if key not in skipped and value is not None
    ]
    warnings = certificate.get("warnings")
    lines += [("warning", str(one)) for one in (warnings if isinstance(warnings, Sequence) else ())]
    lacking: dict[str, list[str]] = defaultdict(list)
    for key, value in certificate.items():
        if key not in skipped and value is None:
            lacking[str(reasons.get(key, "no reason was recorded"))].append(key)
    notes = tuple(f"not measured: {', '.join(keys)} ({reason})" for reason, keys in lacking.items())
    title = f"The meter's certificate, by {run_id}"
    return Grid(("figure", "value"), tuple(lines), notes, left=2, title=title)


def _figure(key: str, value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return number(value) + next((unit for end, unit in _UNITS.items() if key.endswith(end)), "")


def _run_line(row: Row, provenance: Provenance) -> tuple[str, ...]:
    run = provenance.runs[row.run_id]
    return (
        row.run_id,
        row.store,
        row.config_label,
        str(row.seed),
        row.created_at,
        "not recorded" if row.steps is None else f"{row.steps:,}",
        run.emax_origin or "none",
        run.calibration_id or "none",
    )


def _whose(run_ids: Sequence[str], labels: Mapping[str, str]) -> str:
    """The configurations of these runs, or that it is all of them, or most."""
    if len(run_ids) == len(labels):
        return "all"
    if 2 * len(run_ids) > len(labels):
        return f"the other {len(run_ids)}"
    return "; ".join(dict.fromkeys(labels[run_id] for run_id in run_ids))


def _plain(value: str) -> str:
    """A JSON value as a reader writes it."""
    return value[1:-1] if value.startswith('"') else value
