"""The few lines that say what a comparison comes to, and what would settle what is open."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from simulated_runs import a_run, add, classified, empty_store, generated

from hestctl.compare.headline import Headline, headline
from hestctl.compare.results import Comparison, Pair
from hestctl.compare.table import compare
from hestctl.records import Run

Like = tuple[Run, dict[str, Any]]
INT8 = {"backbone": {"precision": "int8"}}
TABS, HEST = (a_run("tabs", 1), {"joules": 60}), (a_run("hest", 2), {"joules": 40})
CONTROL = (a_run("lora", 3, settings=INT8), {"joules": 50})
ESTIMATED = {"energy_kind": "estimated", "meter": "CPU time x 8 W"}


def compared(*runs: Like, count: int = 120, **options: Any) -> Comparison:
    connection = empty_store()
    for run, like in runs:
        add(connection, run, samples=generated(run, count, **like))
    return compare(connection, **options)


def told(found: Headline) -> str:
    return "\n".join(lead + text for lead, text in found.lines())


def changed(found: Comparison, other: str, proposed: str = "hest 0.6", **fields: Any) -> Comparison:
    """The comparison with one pair changed."""

    def one(pair: Pair) -> Pair:
        return replace(pair, **fields) if (pair.proposed, pair.other) == (proposed, other) else pair

    return replace(found, pairs=tuple(one(pair) for pair in found.pairs))


@pytest.mark.parametrize(
    ("runs", "sentence"),
    [
        ((TABS, HEST, CONTROL), "HEST saves energy."),
        (
            (TABS, HEST, (CONTROL[0], {"joules": 35})),
            "HEST uses less energy than tabs; not shown that choosing saves beyond quantising.",
        ),
        ((TABS, HEST), "HEST uses less energy than tabs; not shown that choosing saves beyond quantising."),
        ((TABS, (HEST[0], {"joules": 40, "score": 25}), CONTROL), "Not shown that HEST saves energy."),
        ((TABS, (HEST[0], {"joules": 70}), CONTROL), "Not shown that HEST saves energy."),
        ((TABS, CONTROL), "Not shown that HEST saves energy."),
        ((HEST, CONTROL), "Not shown that HEST saves energy."),
    ],
)
def test_one_sentence_says_what_the_conclusion_says(runs: tuple[Like, ...], sentence: str) -> None:
    found = compared(*runs)
    assert headline(found).sentence == sentence
    assert told(headline(found)).lower().count("saves") == 1
    assert found.conclusion.startswith(sentence.split(";")[0].removesuffix("."))


def test_a_better_baseline_than_the_best_takes_the_saving_away() -> None:
    """As the conclusion does: what is within the margin of the cheapest may be worse than the best."""
    found = compared(TABS, HEST, CONTROL)
    reason = "quality is inferior to that of bhsp: ROUGE-Lsum -1.50 [-1.70, -1.30] points"
    one = headline(replace(found, gap=replace(found.gap, reason=reason)))
    assert one.sentence == "Not shown that HEST saves energy."
    assert (one.standings[0].quality or "").endswith(f"; but {reason}")


def test_both_sides_are_told_by_name_with_joules_and_quality() -> None:
    text = told(headline(compared(TABS, HEST, CONTROL))).splitlines()
    assert text[1] == "less energy at equal quality: hest 0.6 against tabs, the best baseline"
    assert text[2].startswith("  energy   33.4 % fewer joules [32.5, 34.4]; 120 samples can show 3.")
    assert text[3].startswith(
        "  quality  ROUGE-Lsum +0.36 [-0.36, +1.08], not inferior; margin 1; 120 samples can"
    )
    assert text[4] == "less energy at equal quality: hest 0.6 against lora int8 control, the best control"
    assert text[7] == "  next     more seeds (--seed): one training says nothing about another"


def test_why_this_configuration_is_told_where_there_is_a_choice() -> None:
    near = (a_run("hest", 4, emax_ratio=0.9), {"joules": 45})
    worse = (a_run("hest", 5, emax_ratio=0.3), {"joules": 20, "score": 20})
    assert headline(compared(TABS, HEST)).chosen is None
    assert headline(compared(TABS, HEST, near, worse)).chosen == (
        "hest 0.6 takes the fewest joules of the 2 of 3 proposed configurations that are shown not inferior "
        "to tabs"
    )
    # Equal to the best baseline, and yet worse than another: no more a candidate than for the comparison.
    two = compared(TABS, (a_run("lora", 6), {"joules": 65}), HEST, near)
    assert "of the 2 of 2 proposed" in (headline(two).chosen or "")
    beaten = headline(changed(two, "lora", "hest 0.9", quality="inferior"))
    assert "of the 1 of 2 proposed" in (beaten.chosen or "")
    few = headline(compared(TABS, HEST, near, count=12))
    assert few.chosen is not None
    assert few.chosen.startswith("none of 2 proposed configurations is shown not inferior to tabs; hest ")


def test_estimated_joules_say_so_and_ask_for_a_counter() -> None:
    runs = [(replace(run, **ESTIMATED), like) for run, like in (TABS, HEST, CONTROL)]
    found = headline(compared(*runs))
    for one in found.standings:
        assert one.energy.startswith("not measured: the joules are estimated (CPU time x 8 W); time ratio 0.")
    assert found.next[0] == "a device with an energy counter: hestctl env says which meter there is"
    assert not any("--emax-ratio" in text for text in found.next), "nothing is known of the joules"


def test_no_meter_and_missing_sides_are_told_with_what_to_type() -> None:
    changes = {"energy_kind": "none", "meter": "none", "train_energy_j": None}
    found = headline(compared((a_run("tabs", 1, **changes), {}), (a_run("hest", 2, **changes), {}), count=12))
    assert found.standings[0].title == "inconclusive: HEST against the baselines"
    assert found.standings[0].energy == "not measured: there was no energy meter"
    assert "--method lora --backbone-precision int8" in found.next[0]
    assert "hestctl train --method hest" in headline(compared(TABS)).next[0]
    assert "hestctl train --method tabs" in headline(compared(HEST)).next[0]


def test_the_number_of_samples_follows_from_the_least_difference() -> None:
    found = compared(TABS, HEST, CONTROL, count=40)
    wide = [one.pair for one in headline(found).standings if one.pair and one.pair.quality == "inconclusive"]
    assert wide
    most = max(40 * (pair.least_detectable_points or 0) ** 2 for pair in wide)
    (advice,) = [text for text in headline(found).next if "data.test_samples" in text]
    count = int(advice.rpartition("=")[2])
    assert most <= count < 1.1 * most + 1
    assert advice == f"about {count:,} test samples in every run: --set data.test_samples={count}"
    # Twice the margin, a quarter of the samples.
    assert "data.test_samples" not in " ".join(headline(compared(TABS, HEST, CONTROL, count=400)).next)


def test_no_number_of_samples_is_promised_where_seeds_differ_too_much() -> None:
    scores = (27.0, 30.0, 33.0)
    seeds = [(a_run("hest", 4 + seed, seed=seed), {"joules": 40, "score": scores[seed]}) for seed in range(3)]
    found = compared(TABS, *seeds)
    assert found.pairs[0].sample_share is not None
    assert found.pairs[0].sample_share < 0.5
    text = " ".join(headline(found).next)
    assert "seeds differ too much for samples alone" in text
    assert "data.test_samples" not in text


@pytest.mark.parametrize(
    ("share", "least", "expected"),
    [
        (1.0, 3.0, "data.test_samples=900"),
        (0.9, 3.0, "data.test_samples=8100"),
        (0.8, 3.0, "seeds differ too much"),
        (0.4, 1.2, "seeds differ too much"),
    ],
)
def test_samples_alone_narrow_only_what_samples_make(share: float, least: float, expected: str) -> None:
    """Of a least difference of 3 points at 100 samples: 9 x 100 where all of it is theirs."""
    fields = {
        "quality": "inconclusive",
        "least_detectable_points": least,
        "samples": 100,
        "sample_share": share,
    }
    found = changed(compared(TABS, HEST, count=24), "tabs", **fields)
    assert expected in " ".join(headline(found).next)


def test_what_would_change_each_verdict() -> None:
    worse = headline(compared(TABS, (HEST[0], {"joules": 40, "score": 25}), CONTROL)).next
    assert "less loss of quality: a larger --emax-ratio, or more steps of training" in worse
    more = headline(compared(TABS, (HEST[0], {"joules": 70}), CONTROL)).next
    assert "fewer joules: a smaller --emax-ratio; more samples will not change this" in more
    found = compared(TABS, HEST, CONTROL)
    open_ = changed(found, "tabs", verdict="inconclusive")
    assert any("more test samples in every run" in text for text in headline(open_).next)
    metered = headline(changed(found, "tabs", verdict="inconclusive", meter_error_percent=40.0))
    assert "the meter's error bounds may shift it by 40.0 %" in metered.standings[0].energy
    assert any("--set generation.batch_size=N" in text for text in metered.next)
    assert not any("more test samples" in text for text in metered.next)


def test_a_claim_lost_among_many_pairs_says_so() -> None:
    found = compared(TABS, HEST, CONTROL)
    claim = replace(found.pairs[0].claim, both=0.02, adjusted=0.04, family=2)
    lost = headline(changed(found, "tabs", verdict="inconclusive", claim=claim))
    assert lost.standings[0].energy.endswith("among 2 pairs Holm's p is 0.04")


def test_classes_are_told_beside_their_chance_level() -> None:
    connection = empty_store()
    for run in (a_run("tabs", 1, dataset="lra-text"), a_run("hest", 2, dataset="lra-text")):
        add(connection, run, samples=classified(run, 400, 0.85))
    quality = headline(compare(connection, margin=10)).standings[0].quality or ""
    assert quality.startswith("accuracy ")
    assert "chance level" in quality
    assert quality.endswith(", not inferior; margin 10")


def test_random_weights_have_no_quality_to_be_equal() -> None:
    runs = [(replace(run, weights="random"), like) for run, like in (TABS, HEST)]
    found = headline(compared(*runs))
    assert found.standings[0].quality == "not measured: the weights are random: scores say nothing"
    assert "pretrained weights: random ones have no quality" in found.next


def test_a_choice_by_estimated_joules_is_not_said_to_bear_on_verdicts() -> None:
    two = (HEST, (a_run("hest", 4, emax_ratio=0.9), {"joules": 45}))
    for changes, count in (({}, 2), (ESTIMATED, 0)):
        found = compared(*((replace(run, **changes), like) for run, like in (TABS, *two)), count=24)
        told_of = [
            pair for pair in found.pairs if any("chosen by these joules" in note for note in pair.notes)
        ]
        assert len(told_of) == count
