"""What the original sketch expected of HEST against TABS, line by line: confirmed, refuted, or not
measured and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import duckdb
import numpy as np

from hestctl.compare.loading import Entry, config_of
from hestctl.compare.reading import read_runs
from hestctl.compare.results import Expectation, Outcome, Pair, ProfileRun, Row
from hestctl.compare.statistics import FloatArray, Measure
from hestctl.records import Run
from hestctl.settings import flatten

ORIGINAL_MODEL = "Llama-2-7b"
ORIGINAL_SCORE = 44.3
LONG_TOKENS = 3_900
"""Prompt and new tokens from which a sample counts as "at 4k"."""

_PLANNED = ("budget.", "backbone.")
"""Settings from which a plan is made."""

_QUALITY: Mapping[str, Outcome] = {"not inferior": "confirmed", "inferior": "refuted"}


def lines(
    connection: duckdb.DuckDBPyConnection,
    facts: Mapping[str, str],
    hest: Entry | None,
    tabs: Entry | None,
    rows: Sequence[Row],
    pair: Pair | None,
) -> tuple[Expectation, ...]:
    """Every expectation with its outcome; ``hest`` is the best proposed entry, ``pair`` the two."""
    return (
        _score(facts, hest, rows),
        _equal_quality(pair),
        _less_energy(facts, pair),
        _less_latency(facts, pair),
        _fewer_parameters(hest, tabs),
        *_at_4k(connection, hest, tabs),
    )


def _score(facts: Mapping[str, str], hest: Entry | None, rows: Sequence[Row]) -> Expectation:
    text = f"ROUGE-L about {ORIGINAL_SCORE} (the original's code computes ROUGE-Lsum)"
    backbone = facts["backbone"]
    mine = [row for row in rows if hest is not None and row.run_id in hest.run_ids]
    if ORIGINAL_MODEL.lower() not in backbone.lower() or "cnn_dailymail" not in facts["dataset"]:
        reason = (
            f"it speaks of {ORIGINAL_MODEL} on cnn_dailymail; these runs are {backbone} on {facts['dataset']}"
        )
        for row in mine[:1]:
            accuracy, chance = (row.measure(f"{name}_percent").value for name in ("accuracy", "chance"))
            if accuracy is not None and chance is not None:
                reason += f"; accuracy takes its place: {accuracy:.1f} %, chance level {chance:.1f} %"
        return Expectation(text, "not measured", reason)
    scores = [row.measure("rouge_lsum") for row in mine]
    known = [score for score in scores if score.value is not None]
    if not known:
        unscored = scores[0].reason if scores else None
        return Expectation(text, "not measured", unscored or "there is no hest run")
    low = min(score.low if score.low is not None else score.value or 0.0 for score in known)
    high = max(score.high if score.high is not None else score.value or 0.0 for score in known)
    reason = f"ROUGE-Lsum lies in [{low:.1f}, {high:.1f}]"
    if low >= ORIGINAL_SCORE - 1 and high <= ORIGINAL_SCORE + 1:
        return Expectation(text, "confirmed", reason)
    if high < ORIGINAL_SCORE - 1 or low > ORIGINAL_SCORE + 1:
        return Expectation(text, "refuted", reason)
    return Expectation(text, "not measured", f"{reason}: the interval holds both answers")


def _equal_quality(pair: Pair | None) -> Expectation:
    classified = pair is not None and pair.quality_metric == "accuracy_percent"
    text = "the same accuracy as TABS" if classified else "the same quality as TABS"
    if pair is None:
        return Expectation(text, "not measured", _NO_PAIR)
    difference = pair.quality_difference
    if difference.value is None:
        return Expectation(text, "not measured", difference.reason or "no scores")
    reason = f"{pair.proposed}: {difference.value:+.2f} points, {pair.quality}, {pair.samples} samples"
    if classified:
        reason += f"; {pair.quality_reason}"
    return Expectation(text, _QUALITY.get(pair.quality, "not measured"), reason)


def _less_energy(facts: Mapping[str, str], pair: Pair | None) -> Expectation:
    text = "at least 40 % less mean energy than TABS"
    if pair is None:
        return Expectation(text, "not measured", _NO_PAIR)
    if facts["energy kind"] != "measured":
        return Expectation(text, "not measured", f"the energy kind of these runs is {facts['energy kind']}")
    outcome, reason = _threshold(pair.ratio, 0.60)
    return Expectation(
        text, outcome, f"{pair.proposed} on {facts['backbone']}: {reason}; quality {pair.quality}"
    )


def _less_latency(facts: Mapping[str, str], pair: Pair | None) -> Expectation:
    text = "35 % less p99 latency than TABS"
    if pair is None:
        return Expectation(text, "not measured", _NO_PAIR)
    outcome, reason = _threshold(pair.latency_p99_ratio, 0.65)
    return Expectation(text, outcome, f"{pair.proposed} on {facts['backbone']}: {reason}")


def _fewer_parameters(hest: Entry | None, tabs: Entry | None) -> Expectation:
    text = "90 % fewer controller parameters than TABS"
    if hest is None or tabs is None:
        return Expectation(text, "not measured", _NO_PAIR)
    mine, theirs = (entry.members[-1].run.controller_parameters for entry in (hest, tabs))
    if not mine or not theirs:
        return Expectation(text, "not measured", "a run recorded no parameter count")
    percent = 100 * (1 - mine / theirs)
    outcome: Outcome = "confirmed" if percent >= 90 else "refuted"
    return Expectation(text, outcome, f"{percent:.2f} % fewer: {mine:,} against {theirs:,}")


def _at_4k(
    connection: duckdb.DuckDBPyConnection, hest: Entry | None, tabs: Entry | None
) -> Iterator[Expectation]:
    never, above = "at 4k tokens never above E_max", "at 4k tokens TABS stands 1.8 x above E_max"
    if hest is None:
        yield Expectation(never, "not measured", "there is no hest run")
        yield Expectation(above, "not measured", _NO_PAIR)
        return
    lengths, scope, limit = budget_samples(connection, hest)
    long = lengths >= LONG_TOKENS
    longest = int(lengths.max()) if len(lengths) else 0
    short = (
        f"the longest sample with scope joules and E_max has {longest:,} tokens"
        if longest
        else "no sample has scope joules (predicted) and E_max"
    )
    advice = f"{short}; `hestctl profile --seq-len 4096` measures there"
    if not long.any():
        yield Expectation(never, "not measured", advice)
        yield Expectation(above, "not measured", advice if tabs else _NO_PAIR)
        return
    over = int(np.count_nonzero(scope[long] > limit[long]))
    worst = float((scope[long] / limit[long]).max())
    reason = (
        f"{over} of {int(long.sum())} above, worst {worst:.2f} x E_max; joules predicted from logged states"
    )
    yield Expectation(never, "refuted" if over else "confirmed", f"{hest.label}: {reason}")
    yield _overshoot(connection, above, hest, tabs, float(limit[long].mean()))


def _overshoot(
    connection: duckdb.DuckDBPyConnection, text: str, hest: Entry, tabs: Entry | None, limit_j: float
) -> Expectation:
    if tabs is None:
        return Expectation(text, "not measured", _NO_PAIR)
    if tabs.config.scope != hest.config.scope:
        return Expectation(text, "not measured", "the two runs count different scopes")
    lengths, scope, _ = budget_samples(connection, tabs, with_limit=False)
    long = lengths >= LONG_TOKENS
    if not long.any():
        return Expectation(
            text, "not measured", "TABS has no sample at 4k tokens with scope joules (predicted)"
        )
    ratio = float(scope[long].mean()) / limit_j
    reason = (
        f"{ratio:.2f} x the E_max of {hest.label}, predicted; mostly arithmetic of lengths "
        "(TABS spends in proportion to tokens), no finding about methods"
    )
    return Expectation(text, "confirmed" if round(ratio, 1) >= 1.8 else "refuted", reason)


def budget_samples(
    connection: duckdb.DuckDBPyConnection, entry: Entry, with_limit: bool = True
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Lengths (prompt and new tokens), scope joules and E_max (J) of an entry's samples.

    The samples of its train runs and of the profile runs that belong to them.
    """
    runs = [(member.run.run_id, member.store) for member in entry.members]
    runs += [(profile.run_id, profile.store) for profile in profiles(connection, [entry])]
    columns = connection.execute(
        "SELECT (prompt_tokens + new_tokens)::DOUBLE AS tokens, scope_energy_j AS scope, "
        "coalesce(emax_j, 0)::DOUBLE AS emax "
        "FROM samples JOIN (SELECT unnest(?) AS run_id, unnest(?) AS store) USING (run_id, store) "
        f"WHERE scope_energy_j IS NOT NULL {'AND emax_j > 0' if with_limit else ''}",
        [[run_id for run_id, _ in runs], [store for _, store in runs]],
    ).fetchnumpy()
    tokens, scope, emax = (np.asarray(columns[name], np.float64) for name in ("tokens", "scope", "emax"))
    return tokens, scope, emax


def profiles(connection: duckdb.DuckDBPyConnection, entries: Sequence[Entry]) -> list[ProfileRun]:
    """Finished profile runs that belong to ``entries``, each with the label of its row."""
    trained = {member.run.run_id: member.run for entry in entries for member in entry.members}
    hardened = {
        run.run_id: run.parent_run_id
        for run, _ in read_runs(connection, ("harden",))
        if _same_plan(run, trained.get(run.parent_run_id or ""))
    }
    found = []
    for run, store in read_runs(connection, ("profile",)):
        owner = next((entry for entry in entries if belongs(run, entry, hardened)), None)
        if run.status == "finished" and owner is not None:
            sources = (run.parent_run_id, hardened.get(run.parent_run_id or ""))
            parents = [one for one in owner.members if one.run.run_id in sources]
            parent = parents[0] if parents else owner.members[0]
            found.append(ProfileRun(run.run_id, store, owner.row_label(parent)))
    return found


def _same_plan(hardened: Run, trained: Run | None) -> bool:
    """Whether a harden run made the plan of its train run, and not one of a budget of its own."""
    if trained is None:
        return False
    plan, own = (
        {
            key: value
            for key, value in flatten(run.settings)
            if key.startswith(_PLANNED) and key != "budget.reference"
        }
        for run in (hardened, trained)
    )
    return plan == own


def belongs(run: Run, entry: Entry, trained_by: Mapping[str, str | None]) -> bool:
    """Whether the profile ``run`` measured the configuration of ``entry``.

    It descends from one of its train runs, perhaps through a harden run (``trained_by`` maps harden
    runs to the runs they hardened), or has no parent and is alike on the same device.
    """
    parent = run.parent_run_id
    if parent is not None:
        return parent in entry.run_ids or trained_by.get(parent) in entry.run_ids
    first = entry.members[0].run
    return config_of(run) == entry.config and all(
        getattr(run, name) == getattr(first, name)
        for name in ("device_uuid", "device_name", "backbone", "weights", "dtype")
    )


_NO_PAIR = "it needs a hest run and a tabs run that may be compared"


def _threshold(ratio: Measure, limit: float) -> tuple[Outcome, str]:
    if ratio.value is None:
        return "not measured", ratio.reason or "no number"
    text = f"{100 * (ratio.value - 1):+.1f} %"
    if ratio.low is None or ratio.high is None:
        return "not measured", f"{text}, without an interval"
    text += f" [{100 * (ratio.low - 1):+.1f}, {100 * (ratio.high - 1):+.1f}]"
    if ratio.high <= limit:
        return "confirmed", text
    if ratio.low > limit:
        return "refuted", text
    return "not measured", f"{text}: the interval holds both answers"
