"""ListOps against an evaluator that shares no code with the generator, and the names of labels."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hestctl.data.articles import Splits, load_splits
from hestctl.data.lra import DIGIT_LABELS, listops
from hestctl.errors import HestError
from hestctl.settings import DataSettings


def listops_settings(train: int = 60, test: int = 60, max_tokens: int = 1024) -> DataSettings:
    return DataSettings(
        source="lra-listops",
        train_samples=train,
        validation_samples=20,
        test_samples=test,
        max_tokens=max_tokens,
        max_answer_tokens=8,
    )


def generated(seed: int = 0, **changes: int) -> Splits:
    return load_splits(listops_settings(**changes), seed=seed)


def value_of(text: str) -> int:
    """The value by a stack over the symbols, medians by the standard library."""
    stack: list[list[str | int]] = [[]]
    for symbol in text.split(" "):
        if symbol.startswith("["):
            stack.append([symbol[1:]])
        elif symbol == "]":
            operator, *arguments = stack.pop()
            digits = [int(argument) for argument in arguments]
            functions = {"MIN": min, "MAX": max, "MED": statistics.median, "SM": lambda d: sum(d) % 10}
            stack[-1].append(int(functions[str(operator)](digits)))
        else:
            stack[-1].append(int(symbol))
    ((value,),) = stack
    return int(value)


def depth_of(text: str) -> int:
    depths = [0]
    for symbol in text.split(" "):
        depths.append(depths[-1] + (symbol.startswith("[")) - (symbol == "]"))
    assert depths[-1] == 0
    return max(depths)


@given(
    st.integers(0, 2**32),
    st.integers(1, 60),
    st.integers(2, 200),
    st.integers(4, 12),
    st.integers(6, 12),
)
def test_expressions_have_their_value_and_keep_their_limits(
    seed: int, shortest: int, spread: int, depth: int, arguments: int
) -> None:
    longest = max(shortest + spread, 4)
    text, value = listops(
        random.Random(seed), min_length=shortest, max_length=longest, max_depth=depth, max_arguments=arguments
    )
    assert value == value_of(text)
    assert 0 <= value <= 9
    assert shortest <= len(text.split(" ")) <= longest
    assert depth_of(text) <= depth


def test_known_values() -> None:
    assert value_of("[MAX 2 9 [MIN 4 7 ] 0 ]") == 9
    assert value_of("[MED 1 4 ]") == 2
    assert value_of("[SM 9 8 [MED 3 1 2 ] ]") == 9


@pytest.mark.parametrize(
    "limits",
    [
        {"min_length": 9, "max_length": 10},
        {"min_length": 1, "max_length": 3},
        {"min_length": 4, "max_length": 9, "max_depth": 0},
        {"min_length": 4, "max_length": 9, "max_arguments": 1},
        {"min_length": 50, "max_length": 60, "max_depth": 1},
    ],
)
def test_limits_that_nothing_fits_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expression"):
        listops(random.Random(0), **limits)


def test_a_seed_gives_the_same_data_and_another_seed_the_same_test_split() -> None:
    one, again, other = generated(1), generated(1), generated(2)
    assert one == again
    assert one.test == other.test
    assert one.data_hash != other.data_hash
    assert not {e.sample_id for e in one.train} & {e.sample_id for e in other.train}


def test_fewer_samples_are_the_first_of_more() -> None:
    few, many = generated(train=20, test=20), generated(train=60, test=60)
    assert few.test == many.test[:20]
    assert few.train == many.train[:20]


def test_splits_are_apart_labelled_and_above_chance() -> None:
    splits = generated(train=300, test=300)
    everything = [*splits.train, *splits.validation, *splits.test]
    assert len({e.text for e in everything}) == len({e.sample_id for e in everything}) == len(everything)
    assert all(e.answer == e.label == str(value_of(e.text)) for e in everything)
    assert (splits.name, splits.task) == ("lra-listops", "classify")
    assert splits.labels == tuple("0123456789") == tuple(sorted({str(e.label) for e in splits.train}))
    counts = [sum(e.label == label for e in splits.test) for label in splits.labels]
    assert splits.chance == max(counts) / 300 >= 0.1


@pytest.mark.parametrize("max_tokens", [64, 300, 1024, 4096, 32768])
def test_lengths_follow_the_room_in_tokens(max_tokens: int) -> None:
    splits = generated(train=20, test=20, max_tokens=max_tokens)
    longest = max(len(e.text.split(" ")) for e in splits.train)
    assert longest <= 2_000
    assert longest * 2 < max(max_tokens, 64)


def test_published_files_lose_their_round_brackets(tmp_path: Path) -> None:
    """As Long Range Arena's own reader has it; the value is the expression's all the same."""
    written = [
        ("( ( ( ( [MAX 2 ) 9 ) ( ( ( [MIN 4 ) 7 ) ] ) ) ] )", 9),
        ("( ( ( [SM 9 ) 8 ) ] )", 7),
        ("( ( ( [MED 0 ) 1 ) ] )", 0),
    ]
    for split in ("train", "test"):
        lines = [f"{text} {mark}\t{value}" for mark in "()" for text, value in written for _ in range(8)]
        (tmp_path / f"basic_{split}.tsv").write_text("\n".join(["Source\tTarget", *lines]) + "\n")
    files = {f"{split}_file": tmp_path / f"basic_{split}.tsv" for split in ("train", "test")}
    splits = load_splits(DataSettings(source="lra-listops", test_samples=9, **files), seed=0)
    assert (splits.name, splits.task, splits.labels) == ("lra-listops", "classify", DIGIT_LABELS)
    assert {e.text for e in splits.train} == {"[MAX 2 9 [MIN 4 7 ] ]", "[SM 9 8 ]", "[MED 0 1 ]"}
    assert all(value_of(e.text) == int(str(e.label)) for e in splits.train)
    assert len(splits.test) == 9


def test_digits_alone_are_labels_of_expressions(tmp_path: Path) -> None:
    """0 and 1 are digits here, and no sentiments."""
    rows = [{"text": f"[MIN {n % 2} {n % 2} ]", "label": n % 2} for n in range(20)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {f"{split}_file": tmp_path / f"{split}.jsonl" for split in ("train", "test")}
    splits = load_splits(DataSettings(source="lra-listops", **files), seed=0)
    assert splits.labels == DIGIT_LABELS
    assert {e.label for e in splits.test} == {"0", "1"}
    (tmp_path / "test.jsonl").write_text('{"text": "[MAX 9 9 ]", "label": "10"}\n')
    with pytest.raises(HestError, match="labels other than 0 and 1") as caught:
        load_splits(DataSettings(source="lra-listops", **files), seed=0)
    assert caught.value.hint is not None
    assert "or 0, 1" not in caught.value.hint


def test_counts_that_are_not_set_have_a_default() -> None:
    splits = load_splits(DataSettings(source="lra-listops", max_tokens=300), seed=0)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (10_000, 1_000, 2_000)
