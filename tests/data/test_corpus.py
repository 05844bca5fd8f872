"""The embedded articles: enough of them, news-shaped, and none like another."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest

from hestctl.data.articles import Example, Splits, load_splits
from hestctl.settings import DataSettings


@pytest.fixture(scope="module")
def corpus() -> Splits:
    return load_splits(DataSettings(), seed=0)


@pytest.fixture(scope="module")
def everything(corpus: Splits) -> tuple[Example, ...]:
    return corpus.train + corpus.validation + corpus.test


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def five_grams(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[start : start + 5]) for start in range(len(found) - 4)}


def test_there_are_enough_articles(corpus: Splits, everything: tuple[Example, ...]) -> None:
    assert len(everything) >= 96
    assert len(corpus.train) >= 64
    assert len(corpus.validation) >= 12
    assert len(corpus.test) >= 16
    assert (corpus.name, corpus.task, corpus.labels, corpus.chance) == ("embedded", "summarise", (), None)


def test_ids_are_unique_and_plain(everything: tuple[Example, ...]) -> None:
    ids = [example.sample_id for example in everything]
    assert len(set(ids)) == len(ids)
    assert [name for name in ids if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name)] == []


def test_articles_have_the_length_of_short_news(everything: tuple[Example, ...]) -> None:
    lengths = {example.sample_id: len(example.text.split()) for example in everything}
    assert {name: length for name, length in lengths.items() if not 150 <= length <= 350} == {}


def test_highlights_are_two_or_three_short_lines(everything: tuple[Example, ...]) -> None:
    for example in everything:
        lines = example.answer.split("\n")
        assert 2 <= len(lines) <= 3, example.sample_id
        assert all(3 <= len(line.split()) <= 40 for line in lines), example.sample_id
        assert len(example.answer.split()) < len(example.text.split()) / 2, example.sample_id


def test_no_article_is_like_another(everything: tuple[Example, ...]) -> None:
    grams = [(example.sample_id, five_grams(example.text)) for example in everything]
    alike = []
    for (one, left), (two, right) in itertools.combinations(grams, 2):
        shared = len(left & right)
        if shared / (len(left) + len(right) - shared) >= 0.03:
            alike.append((one, two, shared))
    assert alike == []


def test_no_sentence_stands_in_two_articles(everything: tuple[Example, ...]) -> None:
    sentences = Counter(
        sentence
        for e in everything
        for sentence in set(re.split(r"(?<=[.!?])\s+", e.text))
        if len(words(sentence)) > 5
    )
    assert [sentence for sentence, count in sentences.items() if count > 1] == []


def test_counts_take_the_first(corpus: Splits) -> None:
    few = load_splits(DataSettings(train_samples=5, validation_samples=2, test_samples=10_000), seed=3)
    assert few.train == corpus.train[:5]
    assert few.validation == corpus.validation[:2]
    assert few.test == corpus.test
