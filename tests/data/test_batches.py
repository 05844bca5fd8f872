"""Batches: where the padding stands, and what the loss counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hestctl.data.prompts import IGNORED, Encoded, prompt_batch, train_batch


def rows_of(*sizes: tuple[int, int]) -> list[Encoded]:
    return [
        Encoded(f"r{i}", tuple(range(10, 10 + p)), tuple(range(50, 50 + a)), 0, "", None)
        for i, (p, a) in enumerate(sizes)
    ]


def test_a_train_batch_is_padded_on_the_right_and_scores_answers_alone() -> None:
    batch = train_batch(rows_of((3, 2), (1, 1)), pad_id=7)
    assert batch.input_ids.tolist() == [[10, 11, 12, 50, 51], [10, 50, 7, 7, 7]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED] * 3 + [50, 51], [IGNORED, 50] + [IGNORED] * 3]
    assert batch.prompt_tokens.tolist() == [3, 1]
    assert batch.answer_tokens.tolist() == [2, 1]


def test_a_prompt_batch_is_padded_on_the_left() -> None:
    batch = prompt_batch(rows_of((1, 2), (3, 1)), pad_id=7)
    assert batch.input_ids.tolist() == [[7, 7, 10], [10, 11, 12]]
    assert batch.attention_mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert batch.prompt_tokens.tolist() == [1, 3]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6))
def test_batches_hold_every_token_once(sizes: list[tuple[int, int]]) -> None:
    rows = rows_of(*sizes)
    train, prompts = train_batch(rows, 0), prompt_batch(rows, 0)
    for tensor in (
        train.input_ids,
        train.attention_mask,
        train.labels,
        train.prompt_tokens,
        prompts.input_ids,
    ):
        assert tensor.dtype == torch.int64
    for index, row in enumerate(rows):
        assert (
            tuple(train.input_ids[index][train.attention_mask[index] == 1].tolist())
            == row.prompt_ids + row.answer_ids
        )
        assert tuple(train.labels[index][train.labels[index] != IGNORED].tolist()) == row.answer_ids
        assert tuple(prompts.input_ids[index][prompts.attention_mask[index] == 1].tolist()) == row.prompt_ids


@pytest.mark.parametrize("collate", [train_batch, prompt_batch])
def test_a_batch_needs_rows(collate: object) -> None:
    assert callable(collate)
    with pytest.raises(ValueError, match="empty"):
        collate([], 0)
