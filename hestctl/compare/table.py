"""The comparison itself: which runs stand side by side, which pair decides, and what follows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import duckdb

from hestctl.compare import expectations, measures, pairs
from hestctl.compare.decisions import QualityVerdict
from hestctl.compare.forced import read_forced
from hestctl.compare.loading import (
    BASELINES,
    Entry,
    Loaded,
    config_of,
    entries,
    facts,
    plain_label,
)
from hestctl.compare.pair_tables import gap_tables
from hestctl.compare.reading import load, read_runs
from hestctl.compare.repeats import repeatability, repeats
from hestctl.compare.report import as_json, write_csv
from hestctl.compare.results import Best, Comparison, Gap, Pair, Role, SetApart
from hestctl.compare.row_tables import as_rows
from hestctl.compare.statistics import Measure, absent
from hestctl.compare.text import TextTable, compared_lines
from hestctl.errors import Exit, HestError
from hestctl.records import EnergyKind, Run

__all__ = [
    "Comparison",
    "TextTable",
    "as_json",
    "as_rows",
    "compare",
    "compared_lines",
    "gap_tables",
    "write_csv",
]


def compare(
    connection: duckdb.DuckDBPyConnection,
    *,
    margin: float = 1.0,
    methods: Sequence[str] | None = None,
    dataset: str | None = None,
) -> Comparison:
    """Compare the finished train runs that may be compared; the others are set apart with reasons.

    ``connection`` has the views ``runs``, ``samples`` and so on of the store. ``margin`` is what a
    score may lose and still count as equal, in points of 100. ``methods`` and ``dataset`` narrow
    the runs. Raises HestError where no finished run is left.
    """
    if not 0 < margin < math.inf:
        raise HestError(
            f"the margin is {margin:g} points; equal quality needs a finite one above 0",
            "try --margin 1.0",
            Exit.USAGE,
        )
    loaded, apart = _candidates(connection, methods, dataset)
    group, others = _main_group(loaded)
    made, superseded = entries(group)
    rows = tuple(measures.row(entry, member) for entry in made for member in entry.members)
    kind: EnergyKind = group[0].run.energy_kind or "none"
    found_repeats = repeats(made, superseded, kind, margin)
    granted = repeatability(found_repeats, kind)
    profile_runs = expectations.profiles(connection, made)
    configs = {row.label: row.config_label for row in rows}
    compared = pairs.compare_pairs(
        [entry for entry in made if entry.config.role == "proposed"],
        [entry for entry in made if entry.config.role != "proposed"],
        kind,
        margin,
        granted,
        read_forced(connection, profile_runs, configs),
    )
    baseline = _cheapest(_not_worst([entry for entry in made if entry.config.role == "baseline"], margin))
    proposed = _best_proposed(
        [entry for entry in made if entry.config.role == "proposed"], baseline, compared
    )
    controls = [entry for entry in made if entry.config.role == "control"]
    if proposed is not None:
        controls = [entry for entry in controls if pairs.answers(proposed, entry)]
    control = _cheapest(_not_worst(controls, margin))
    gap = _gap(proposed, baseline, compared, "baseline", "lora, bhsp or tabs")
    control_gap = _gap(proposed, control, compared, "control", "any method with an int8 backbone")
    tabs = _entry_of(made, "tabs", proposed)
    deciding = _pair_of(compared, proposed, baseline)
    shared = facts(group[0])
    beside = _beside_baseline(made, baseline, compared, margin)
    return Comparison(
        task="classification" if all(one.samples.labelled for one in group) else "summarisation",
        facts=shared,
        energy_kind=kind,
        margin_points=margin,
        rows=rows,
        pairs=tuple(compared),
        best_proposed=_best(proposed),
        best_baseline=_best(baseline),
        best_control=_best(control),
        gap=gap,
        gap_vs_controls=control_gap,
        repeatability=granted,
        estimated_time_ratio=_time_ratio(deciding, kind),
        conclusion=_conclusion(deciding, _pair_of(compared, proposed, control), gap, control_gap, made),
        equal_quality={label: verdict for label, (verdict, _) in beside.items()},
        quality_differences={label: difference for label, (_, difference) in beside.items()},
        repeats=found_repeats,
        set_apart=(*others, *(_superseded(older.run, newer.run) for older, newer in superseded), *apart),
        expectations=expectations.lines(
            connection, shared, proposed, tabs, rows, _pair_of(compared, proposed, tabs)
        ),
        profile_runs=tuple(profile_runs),
    )


def _candidates(
    connection: duckdb.DuckDBPyConnection, methods: Sequence[str] | None, dataset: str | None
) -> tuple[list[Loaded], list[SetApart]]:
    every = read_runs(connection, ("train",))
    if not every:
        raise HestError("the store holds no train run", "train one: hestctl train --method hest")
    wanted = [
        (run, store)
        for run, store in every
        if (not methods or run.method in methods) and (dataset is None or run.dataset == dataset)
    ]
    if not wanted:
        held = sorted({f"{run.method} on {run.dataset}" for run, _ in every})
        raise HestError(
            "no train run is of the methods and data set asked for",
            f"the store holds: {', '.join(held)}; `hestctl compare` without filters shows them",
            Exit.USAGE,
        )
    complete = [
        (run, store) for run, store in wanted if config_of(run) is not None and run.status == "finished"
    ]
    generated = load(connection, complete)
    apart: list[SetApart] = []
    for run, _ in wanted:
        if config_of(run) is None:
            apart.append(_apart(run, "not comparable", f"unknown method '{run.method}'"))
        elif run.status != "finished":
            reason = f"{run.status}: {run.error}" if run.error else run.status
            apart.append(_apart(run, "unfinished", reason))
        elif run.run_id not in generated:
            apart.append(_apart(run, "without samples", "it generated no test samples"))
    if not generated:
        states = "; ".join(f"{one.run_id} {one.reason}" for one in apart[-3:])
        raise HestError(
            f"no train run is finished with test samples ({states})",
            f"train one to its end: hestctl train --method {wanted[-1][0].method or 'hest'}",
        )
    return list(generated.values()), apart


def _apart(
    run: Run, kind: Literal["not comparable", "unfinished", "without samples"], reason: str
) -> SetApart:
    return SetApart(run.run_id, plain_label(run), kind, reason)


def _superseded(older: Run, newer: Run) -> SetApart:
    reason = f"{newer.run_id} is later, of the same configuration and seed"
    return SetApart(older.run_id, plain_label(older), "superseded", reason)


def _main_group(loaded: Sequence[Loaded]) -> tuple[list[Loaded], list[SetApart]]:
    groups: dict[tuple[str, ...], list[Loaded]] = defaultdict(list)
    for one in loaded:
        groups[tuple(facts(one).values())].append(one)

    def rank(members: list[Loaded]) -> tuple[bool, bool, int, str]:
        methods = {one.run.method for one in members}
        configs = {config_of(one.run) for one in members}
        decides = "hest" in methods and not methods.isdisjoint(BASELINES)
        measured = members[0].run.energy_kind == "measured"
        return decides, measured, len(configs), max(one.run.created_at for one in members)

    main = max(groups.values(), key=rank)
    mine = facts(main[0])
    others = [one for members in groups.values() if members is not main for one in members]
    return main, [
        SetApart(
            one.run.run_id,
            plain_label(one.run),
            "not comparable",
            "; ".join(
                f"{name} is {value}, not {mine[name]}"
                for name, value in facts(one).items()
                if value != mine[name]
            ),
        )
        for one in others
    ]


def _not_worst(side: Sequence[Entry], margin: float) -> list[Entry]:
    """A baseline shown to be worse than the best-scoring one is no yardstick; one merely undecided
    stays, so that a lack of samples cannot remove a cheap rival."""
    if not side:
        return []
    scored = [(score, entry) for entry in side if (score := measures.mean_score(entry)) is not None]
    if not scored:
        return list(side)
    best = max(scored, key=lambda pair: pair[0])[1]
    return [
        entry for entry in side if entry is best or pairs.quality(entry, best, margin).verdict != "inferior"
    ]


def _beside_baseline(
    made: Sequence[Entry], baseline: Entry | None, compared: Sequence[Pair], margin: float
) -> dict[str, tuple[QualityVerdict, Measure]]:
    """Whether each configuration is not inferior to ``baseline``, and by how many points it differs."""
    if baseline is None:
        return {}
    found: dict[str, tuple[QualityVerdict, Measure]] = {}
    for entry in made:
        pair = _pair_of(compared, entry, baseline)
        if entry is baseline:
            found[entry.label] = "not inferior", Measure(0.0, reason="the baseline itself")
        elif pair:
            found[entry.label] = pair.quality, pair.quality_difference
        else:
            score = pairs.quality(entry, baseline, margin)
            found[entry.label] = score.verdict, score.difference
    return found


def _cheapest(side: Sequence[Entry]) -> Entry | None:
    """The fewest joules per sample, over the samples that all of them hold; without joules, the first."""
    priced = [
        (joules, place) for place, joules in enumerate(measures.mean_joules(side)) if joules is not None
    ]
    if not priced:
        return side[0] if side else None
    return side[min(priced)[1]]


def _best_proposed(side: Sequence[Entry], baseline: Entry | None, compared: Sequence[Pair]) -> Entry | None:
    """The fewest joules among those shown not inferior to the best baseline, and shown inferior to none.

    Where nothing is shown, the one whose quality is most surely near the baseline's: the cheapest would be
    whichever lost the most.
    """
    worse = {one.proposed for one in compared if one.other_role == "baseline" and one.quality == "inferior"}
    pairs_of = {entry.label: _pair_of(compared, entry, baseline) for entry in side}
    equal = [
        entry
        for entry in side
        if entry.label not in worse
        and (pair := pairs_of[entry.label]) is not None
        and pair.quality == "not inferior"
    ]
    if equal:
        return _cheapest(equal)
    lows = {
        label: pair.quality_difference.low
        for label, pair in pairs_of.items()
        if pair is not None and pair.quality_difference.low is not None
    }
    known = [entry for entry in side if entry.label in lows]
    return max(known, key=lambda entry: lows[entry.label]) if known else _cheapest(side)


def _entry_of(made: Sequence[Entry], method: str, beside: Entry | None) -> Entry | None:
    """The baseline entry of ``method``, of the scope of ``beside`` where there are several."""
    found = [entry for entry in made if entry.config.method == method and entry.config.role == "baseline"]
    same = [entry for entry in found if beside is not None and entry.config.scope == beside.config.scope]
    return next(iter(same or found), None)


def _pair_of(compared: Sequence[Pair], proposed: Entry | None, other: Entry | None) -> Pair | None:
    if proposed is None or other is None:
        return None
    return next((one for one in compared if (one.proposed, one.other) == (proposed.label, other.label)), None)


def _best(entry: Entry | None) -> Best | None:
    if entry is None:
        return None
    (joules,) = measures.mean_joules([entry])
    if joules is None:
        return None
    return Best(entry.label, entry.run_ids[-1], entry.run_ids, joules)


def _gap(
    proposed: Entry | None, other: Entry | None, compared: Sequence[Pair], role: Role, examples: str
) -> Gap:
    """The gap to ``other``, the best of its ``role``; none where any of that role is of better quality.

    The cheapest of a side may be within the margin of its best, and the proposed within the margin of the
    cheapest: two steps of which neither shows how far it is from the best.
    """
    if proposed is None:
        reason = "there is no hest run in this comparison"
    elif other is None:
        reason = f"there is no {role} ({examples}) in this comparison"
    else:
        pair = _pair_of(compared, proposed, other)
        better = [
            one
            for one in compared
            if (one.proposed, one.other_role, one.quality) == (proposed.label, role, "inferior")
        ]
        if pair is not None and pair.gap_percent.value is not None and not better:
            return Gap(pair.gap_percent, None)
        reason = "the two were not paired" if pair is None else _no_gap(pair)
        if better and (pair is None or pair.gap_percent.value is not None):
            reason = f"quality is inferior to that of {better[0].other}: {better[0].quality_reason}"
    return Gap(absent(reason), reason)


def _no_gap(pair: Pair) -> str:
    reason = pair.gap_percent.reason or "no joules"
    return f"{reason}: {pair.quality_reason}" if reason.startswith("quality") else reason


def _time_ratio(deciding: Pair | None, kind: EnergyKind) -> Measure:
    if kind == "measured":
        return absent("the joules are measured: see the gap")
    return deciding.time_ratio if deciding is not None else absent("it needs a hest run and a baseline")


def _conclusion(
    deciding: Pair | None, controlled: Pair | None, gap: Gap, control_gap: Gap, made: Sequence[Entry]
) -> str:
    """HEST saves energy only if it saves against the baselines and against the controls."""
    lacking = _lacking(deciding, gap)
    if deciding is None or lacking:
        return f"Not shown that HEST saves energy: {lacking}."
    lacking = _lacking(controlled, control_gap)
    if controlled is None or lacking:
        return (
            f"HEST uses less energy than {deciding.other} ({deciding.why}). Not shown that choosing saves "
            f"energy beyond quantising: {lacking}.{_one_training(made, deciding)}"
        )
    return (
        f"HEST saves energy: against {deciding.other} {deciding.why}; "
        f"against {controlled.other} {controlled.why}.{_one_training(made, deciding, controlled)}"
    )


def _lacking(pair: Pair | None, gap: Gap) -> str:
    """Why a pair shows no saving at equal quality; empty where it does."""
    if pair is None:
        return gap.reason or "the two were not paired"
    if pair.verdict != "less energy at equal quality":
        return f"{pair.verdict} against {pair.other} ({pair.why})"
    return gap.reason or ""


def _one_training(made: Sequence[Entry], *claims: Pair) -> str:
    """What a claim about methods lacks where it rests on single trainings."""
    seeds = {entry.label: len(entry.seeds) for entry in made}
    single = [
        label
        for label in dict.fromkeys(name for pair in claims for name in (pair.proposed, pair.other))
        if seeds[label] == 1
    ]
    if not single:
        return ""
    return f" One training each of {', '.join(single)}: other seeds may differ by more than these samples do."
