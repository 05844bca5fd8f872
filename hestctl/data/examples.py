"""One sample, and the three splits of a data set."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Task = Literal["summarise", "classify"]

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Example:
    """One sample. ``answer`` is the reference summary, one highlight a line, or the label's name."""

    sample_id: str
    text: str
    answer: str
    label: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """A data set as a run sees it.

    ``labels`` and ``chance`` (accuracy of a guesser, 0 to 1) are set for ``classify`` alone.
    ``data_hash`` is the SHA-256 over every example of every split, order included.
    """

    name: str
    task: Task
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    labels: tuple[str, ...] = ()
    chance: float | None = None
    data_hash: str


def make_splits(
    name: str, task: Task, parts: Mapping[str, Sequence[Example]], labels: tuple[str, ...] = ()
) -> Splits:
    """Splits out of ``parts`` (train, validation, test), with their hash and chance level."""
    return Splits(
        name=name,
        task=task,
        train=tuple(parts["train"]),
        validation=tuple(parts["validation"]),
        test=tuple(parts["test"]),
        labels=labels,
        chance=chance_level(parts["test"], labels) if task == "classify" else None,
        data_hash=hash_examples(parts),
    )


def hash_examples(parts: Mapping[str, Iterable[Example]]) -> str:
    """SHA-256 (hex) over all examples of all splits, order included."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for example in parts[split]:
            row = [split, example.sample_id, example.text, example.answer, example.label]
            digest.update(json.dumps(row).encode("ascii") + b"\n")
    return digest.hexdigest()


def chance_level(test: Sequence[Example], labels: Sequence[str]) -> float:
    """What a guesser scores: the majority label's share of ``test`` or 1 / labels, whichever is larger."""
    (_, majority), *_ = Counter(example.label for example in test).most_common(1)
    return max(majority / len(test), 1 / len(labels))
