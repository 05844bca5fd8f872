"""The A/A control: what this comparison calls a difference where there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from hestctl.compare import decisions, pairs
from hestctl.compare.decisions import REPEATABILITY
from hestctl.compare.loading import Config, Entry, Loaded, config_of
from hestctl.compare.matching import Matched
from hestctl.compare.results import Repeat, Repeatability
from hestctl.records import EnergyKind, Run

_WORK = ("backbone", "data", "generation")
_TRAINING = ("method", "budget", "train")
"""Sections of the settings that make a run what it is; the others say how it was watched and stored."""


def repeats(
    made: Sequence[Entry], superseded: Sequence[tuple[Loaded, Loaded]], kind: EnergyKind, margin: float
) -> tuple[Repeat, ...]:
    """Every A/A pair: a run and the later one of the same settings and seed; a ``base`` and its other seeds.

    ``base`` is not trained, so that its seeds are the same model. Without joules there is no pair.
    """
    if kind == "none":
        return ()
    labels = {entry.config: entry.label for entry in made}
    groups: dict[str, list[Loaded]] = {newer.run.run_id: [newer] for _, newer in superseded}
    for older, newer in superseded:
        groups[newer.run.run_id].insert(-1, older)
    found = [
        _repeat(labels, older, newer, f"seed {older.run.seed} twice", kind, margin)
        for group in groups.values()
        for older, newer in combinations(group, 2)
        if _alike(older.run, newer.run, (*_WORK, *_TRAINING))
    ]
    for entry in made:
        if entry.config.method == "base":
            found += [
                _repeat(
                    labels, one, other, f"seeds {one.run.seed} and {other.run.seed}, untrained", kind, margin
                )
                for one, other in combinations(entry.members, 2)
                if _alike(one.run, other.run, _WORK)
            ]
    return tuple(one for one in found if one.ratio.value is not None)


def repeatability(found: Sequence[Repeat], kind: EnergyKind) -> Repeatability:
    """The largest difference of the A/A pairs, never less than the fixed 2 %; joules must be measured."""
    fixed = f"{100 * REPEATABILITY:g} %"
    if kind != "measured":
        word = "estimated" if kind == "estimated" else "not measured"
        return Repeatability(REPEATABILITY, f"none: the joules are {word} and earn no verdict in energy")
    if not found:
        return Repeatability(
            REPEATABILITY,
            f"not measured; {fixed} is taken from repeated runs of one model on one board (two finished runs "
            "of one configuration and seed would measure it here)",
        )
    # Which of the two came first says nothing, so the larger one is divided by the smaller.
    differences = [max(one.ratio.value or 1.0, 1 / (one.ratio.value or 1.0)) - 1 for one in found]
    largest = max(differences)
    count = f"{len(found)} A/A pair{'s' if len(found) > 1 else ''}"
    where = found[differences.index(largest)].label
    told = f"{100 * largest:.2g} % is the largest difference of {count} ({where})"
    if largest <= REPEATABILITY:
        return Repeatability(REPEATABILITY, f"{fixed}: {told}, and no less than {fixed} is granted")
    return Repeatability(largest, f"{told}, and takes the place of {fixed}")


def _repeat(
    labels: Mapping[Config, str], older: Loaded, newer: Loaded, what: str, kind: EnergyKind, margin: float
) -> Repeat:
    config = config_of(older.run)
    assert config is not None
    first, second = (Entry.of(config, labels[config], [one]) for one in (newer, older))
    ratio = Matched(first, second).paired("energy_j").ratio("energy_j").measure()
    score = pairs.quality(first, second, margin)
    return Repeat(
        label=labels[config],
        kind=what,
        run_ids=(older.run.run_id, newer.run.run_id),
        samples=ratio.n,
        ratio=ratio,
        energy=decisions.energy_verdict(ratio) if kind == "measured" else None,
        quality_metric=score.metric,
        quality_difference=score.difference,
        quality=score.verdict,
    )


def _alike(first: Run, second: Run, sections: Sequence[str]) -> bool:
    """The same work by the same versions under the same E_max.

    A new driver or library is no repetition, nor is a budget of another reference: where gates decide, an
    E_max that differs in the fifth digit makes another training.
    """
    return (first.versions, first.emax_j) == (second.versions, second.emax_j) and all(
        first.settings.get(section) == second.settings.get(section) for section in sections
    )
