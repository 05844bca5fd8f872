"""One run to one row: every measure with its interval, or the reason why there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import compress

import numpy as np

from hestctl.compare import statistics
from hestctl.compare.loading import Entry, Loaded, Samples
from hestctl.compare.results import PRIMARY, Row
from hestctl.compare.statistics import FloatArray, Measure, absent

_SCORES = ("rouge_lsum", "rouge_l", "rouge1", "rouge2")


def row(entry: Entry, member: Loaded) -> Row:
    """The row of one run of ``entry``; its label names the seed where the entry has several."""
    run, samples = member.run, member.samples
    measures = {
        **_energies(member),
        **_latencies(samples),
        **_quality(member),
        **_budget(member),
        "controller_parameters": _stored(run.controller_parameters, f"{run.method} has no controller"),
        "adapter_parameters": _stored(run.adapter_parameters, "the run recorded no count"),
        "train_energy_j": _stored(
            run.train_energy_j if member.run.energy_kind != "none" else None,
            "base is not trained" if run.method == "base" else "the meter gave no joules for training",
        ),
        "train_time_s": _stored(
            run.train_time_s, "base is not trained" if run.method == "base" else "not recorded"
        ),
    }
    return Row(
        run_id=run.run_id,
        store=member.store,
        method=entry.config.method,
        label=entry.row_label(member),
        config_label=entry.label,
        role=entry.config.role,
        scope=entry.config.scope or None,
        seed=run.seed,
        dtype=run.dtype,
        created_at=run.created_at,
        steps=run.steps,
        samples=len(samples.ids),
        energy_method=member.energy_method,
        measures=measures,
        notes=_notes(member),
    )


def _energies(member: Loaded) -> dict[str, Measure]:
    samples = member.samples
    joules = samples["energy_j"]
    if member.run.energy_kind in (None, "none"):
        why = "the run had no energy meter"
        reason = f"{why}: {member.energy_reason}" if member.energy_reason else why
    else:
        reason = member.energy_reason or f"no sample has valid {member.run.energy_kind} joules"
    measures = {
        PRIMARY: _mean(joules, samples, reason),
        "energy_net_j_per_sample": _mean(samples["energy_net_j"], samples, reason),
        "energy_error_j_per_sample": _mean(
            samples["energy_error_j"], samples, "the meter gave no error bound"
        ),
        "prefill_j_per_sample": _mean(samples["prefill_j"], samples, "prefill was not told apart"),
        "decode_j_per_sample": _mean(samples["decode_j"], samples, "decode was not told apart"),
        "new_tokens_per_sample": _mean(samples["new_tokens"], samples, "not recorded"),
    }
    held = np.isfinite(joules) & np.isfinite(samples["new_tokens"])
    tokens = samples["new_tokens"][held]
    if not held.any():
        per_token = absent(reason)
    elif tokens.sum() == 0:
        per_token = absent("no new tokens: labels are scored, not generated")
    else:
        per_token = statistics.ratio_of_means(joules[held], tokens, samples.batches[held])
    return {**measures, "energy_j_per_new_token": per_token}


def _latencies(samples: Samples) -> dict[str, Measure]:
    latency, batches = samples["latency_s"], samples.batches
    if not np.isfinite(latency).all():
        held = np.isfinite(latency)
        latency, batches = latency[held], batches[held]
    speed = absent("no new tokens: labels are scored, not generated")
    tokens = samples["new_tokens"]
    if np.nansum(tokens) > 0 and len(latency) == len(tokens):
        # Every sample of a batch carries the wall time of the whole batch.
        codes = np.unique(batches, return_inverse=True)[1]
        share = latency / np.bincount(codes)[codes]
        speed = statistics.ratio_of_means(tokens, share, batches)
    return {
        "latency_p50_s": statistics.percentile(latency, 50, batches),
        "latency_p99_s": statistics.percentile(latency, 99, batches, statistics.TAIL_MINIMUM),
        "tokens_per_s": speed,
    }


def _quality(member: Loaded) -> dict[str, Measure]:
    samples = member.samples
    reason = no_quality_reason(member)
    if samples.labelled:
        correct = samples["correct"]
        chance = statistics.chance_level([str(label) for label in samples.labels])
        accuracy = statistics.wilson(float(correct.sum()), len(correct)).scaled(100)
        return {
            "accuracy_percent": accuracy if reason is None else absent(reason),
            "chance_percent": Measure(
                100 * chance, n=len(correct), reason="share of the most frequent label"
            ),
        }
    scores = {
        name: absent(reason) if reason else _scores(samples[name], "the texts were not scored")
        for name in _SCORES
    }
    return {**scores, "answer_nll_nats": absent(reason) if reason else _likelihood(samples)}


def mean_joules(side: Sequence[Entry]) -> list[float | None]:
    """Mean joules per sample (gross, J) of entries, each over its seeds; ``None`` without joules.

    Where entries hold different samples, the means are over those that all of them hold: a run whose cheap
    samples alone are valid is no cheaper for it. Where they share none, each is over its own.
    """
    columns = [one.samples["energy_j"] for one in side]
    priced = [
        set(compress(one.samples.ids, np.isfinite(joules))) for one, joules in zip(side, columns, strict=True)
    ]
    shared = set.intersection(*found) if (found := [names for names in priced if names]) else set()
    return [
        _finite_mean(joules[[name in shared for name in one.samples.ids]] if shared else joules)
        for one, joules in zip(side, columns, strict=True)
    ]


def mean_score(entry: Entry) -> float | None:
    """Mean score over the seeds of an entry in points of 100: accuracy, or ROUGE-Lsum."""
    column, factor = ("correct", 100.0) if entry.samples.labelled else ("rouge_lsum", 1.0)
    if any(no_quality_reason(member) for member in entry.members):
        return None
    means = [_finite_mean(member.samples[column]) for member in entry.members]
    known = [factor * value for value in means if value is not None]
    return sum(known) / len(known) if known else None


def _finite_mean(values: FloatArray) -> float | None:
    held = values[np.isfinite(values)]
    return float(held.mean()) if len(held) else None


def no_quality_reason(member: Loaded) -> str | None:
    """Why a run's scores say nothing, ``None`` where they do."""
    return "the weights are random: scores say nothing" if member.run.weights == "random" else None


def _likelihood(samples: Samples) -> Measure:
    nll, tokens = samples["nll"], samples["answer_tokens"]
    held = np.isfinite(nll) & np.isfinite(tokens) & (tokens > 0)
    if not held.any():
        return absent("the answers were not scored")
    return statistics.ratio_of_means(nll[held], tokens[held])


def _budget(member: Loaded) -> dict[str, Measure]:
    samples, run = member.samples, member.run
    scope, limit = samples["scope_energy_j"], samples["emax_j"]
    no_scope = (
        "the budget counts nothing of this method"
        if run.method in ("lora", "base")
        else "no energy table: run `hestctl calibrate` before training"
    )
    no_limit = no_scope if not np.isfinite(scope).any() else "no E_max was set for this method"
    held = np.isfinite(scope) & np.isfinite(limit) & (limit > 0)
    measures = {
        "scope_energy_j_per_sample": _mean(scope, samples, no_scope),
        "emax_j_per_sample": _mean(limit, samples, no_limit),
        "meter_of_predicted_percent": _metered_share(member, scope, no_scope),
        "meter_of_emax_percent": _metered_share(member, limit, no_limit),
    }
    if not held.any():
        share = run.over_budget_share
        over = absent(no_limit) if share is None else Measure(100 * share, reason="as the run recorded it")
        return {
            **measures,
            "emax_use_percent": absent(no_limit),
            "emax_use_worst_percent": absent(no_limit),
            "over_budget_percent": over,
        }
    use = 100 * scope[held] / limit[held]
    over_count = float(np.count_nonzero(scope[held] > limit[held]))
    return {
        **measures,
        "emax_use_percent": statistics.mean(use),
        "emax_use_worst_percent": Measure(float(use.max()), n=int(held.sum())),
        "over_budget_percent": statistics.wilson(over_count, int(held.sum())).scaled(100),
    }


def _metered_share(member: Loaded, whole: FloatArray, reason: str) -> Measure:
    """The meter's joules in percent of what the budget counts as ``whole``, where that is the generation."""
    if member.run.scope == "adapter" and np.isfinite(whole).any():
        return absent("scope adapter counts the directions alone, the meter the whole generation")
    joules = member.samples["energy_j"]
    held = np.isfinite(joules) & np.isfinite(whole) & (whole > 0)
    if not held.any():
        return absent(reason if np.isfinite(joules).any() else "there are no joules of a meter")
    return statistics.ratio_of_means(joules[held], whole[held], member.samples.batches[held]).scaled(100)


def _notes(member: Loaded) -> tuple[str, ...]:
    notes = []
    joules = member.samples["energy_j"]
    missing = int(np.count_nonzero(~np.isfinite(joules)))
    if member.run.energy_kind not in (None, "none") and 0 < missing < len(joules):
        why = member.energy_reason or "not valid"
        notes.append(
            f"{missing} of {len(joules)} samples have no valid joules ({why}) and stay out of its means"
        )
    notes += [f"{count} windows of the meter are not valid: {why}" for why, count in member.invalid_windows]
    if member.split != "test":
        notes.append(f"its samples are of the {member.split} split, not of the test split")
    return tuple(notes)


def _mean(values: FloatArray, samples: Samples, reason: str) -> Measure:
    held = np.isfinite(values)
    return statistics.mean(values[held], samples.batches[held]) if held.any() else absent(reason)


def _scores(values: FloatArray, reason: str) -> Measure:
    held = np.isfinite(values)
    return statistics.mean(values[held]) if held.any() else absent(reason)


def _stored(value: float | None, reason: str) -> Measure:
    if value is None or not math.isfinite(value):
        return absent(reason)
    return Measure(float(value))
