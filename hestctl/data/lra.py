"""Long Range Arena tasks: ListOps, generated here, and the classes of the review texts."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hestctl.data.examples import SPLITS, Example, Splits, make_splits
from hestctl.data.tables import Table, few
from hestctl.errors import Exit, HestError
from hestctl.settings import DataSettings

REVIEW_LABELS = ("negative", "positive")
DIGIT_LABELS = tuple("0123456789")

_DEFAULT_COUNTS = {"train": 10_000, "validation": 1_000, "test": 2_000}
_LONGEST = 2_000
"""Symbols in the longest expression of Long Range Arena itself."""
_OPERATORS = ("MIN", "MAX", "MED", "SM")
_PUBLISHED = {"Source": "text", "Target": "label"}
"""The columns of Long Range Arena's own files of expressions."""

Tree = int | tuple[str, list["Tree"]]
"""A digit, or an operator over its arguments."""


def listops_splits(settings: DataSettings, seed: int) -> Splits:
    """Freshly generated ListOps, 10,000 / 1,000 / 2,000 expressions where no counts are set.

    ``seed`` draws train and validation; the test split is the same for every seed, so that runs with
    several seeds stay paired. No expression is in two splits. Lengths run up to what ``max_tokens``
    holds at two and a half tokens a symbol, as a cut expression has no answer, and down to a quarter of
    that; within 4,096 tokens that is 383 to 1,532 symbols (Long Range Arena: 500 to 2,000).
    """
    room = settings.max_tokens - settings.max_answer_tokens - 256
    longest = min(max(room * 2 // 5, 16), _LONGEST)
    counts = {
        "train": settings.train_samples,
        "validation": settings.validation_samples,
        "test": settings.test_samples,
    }
    seen: set[str] = set()
    parts: dict[str, list[Example]] = {}
    for split in reversed(SPLITS):  # the test split first, so that nothing drawn from the seed is in its way
        stem = f"listops-{split}" if split == "test" else f"listops-{split}-s{seed}"
        rng = random.Random(stem)
        count = counts[split] or _DEFAULT_COUNTS[split]
        part: list[Example] = []
        while len(part) < count:
            text, value = listops(rng, min_length=longest // 4, max_length=longest)
            if text not in seen:
                seen.add(text)
                part.append(Example(f"{stem}-{len(part):05d}", text, str(value), str(value)))
        parts[split] = part
    return make_splits("lra-listops", "classify", parts, DIGIT_LABELS)


def listops(
    rng: random.Random, *, min_length: int, max_length: int, max_depth: int = 10, max_arguments: int = 10
) -> tuple[str, int]:
    """One random expression, such as ``[MAX 2 9 [MIN 4 7 ] 0 ]``, and its value (0 to 9).

    Its length in symbols (an operator with its bracket, a digit and a closing bracket count one each) is
    within ``min_length..max_length``, drawn evenly; operators nest at most ``max_depth`` deep over 2 to
    ``max_arguments`` arguments. Raises ValueError where no such expression is found.
    """
    if max_length < max(4, min_length + 2) or max_depth < 1 or max_arguments < 2:
        raise ValueError("a ListOps expression has 4 symbols or more, and lengths need a spread of 2 or more")
    for _ in range(100):
        target = rng.randint(max(4, min_length), max_length)
        tree, length = _grow(rng, target, max_length, max_depth, max_arguments)
        if length >= min_length:
            return render(tree), evaluate(tree)
    raise ValueError(f"no expression of {min_length} symbols fits depth {max_depth}, width {max_arguments}")


def render(tree: Tree) -> str:
    """The expression as text, symbols divided by single spaces."""
    if isinstance(tree, int):
        return str(tree)
    operator, arguments = tree
    return f"[{operator} {' '.join(map(render, arguments))} ]"


def evaluate(tree: Tree) -> int:
    """Its value: SM is the sum modulo 10, MED the median rounded down."""
    if isinstance(tree, int):
        return tree
    operator, arguments = tree
    values = sorted(map(evaluate, arguments))
    if operator == "MIN":
        return values[0]
    if operator == "MAX":
        return values[-1]
    if operator == "SM":
        return sum(values) % 10
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) // 2


def _grow(
    rng: random.Random, target: int, max_length: int, max_depth: int, max_arguments: int
) -> tuple[Tree, int]:
    """A tree and its length: digits chosen at random become operators until ``target`` is reached."""
    root: list[Tree] = [0]
    slots = [(root, 0, 0)]
    length = 1
    while length < target and slots and max_length - length >= 3:
        chosen = rng.randrange(len(slots))
        slots[chosen], slots[-1] = slots[-1], slots[chosen]
        parent, index, depth = slots.pop()
        width = rng.randint(2, min(max_arguments, max_length - length - 1))
        arguments: list[Tree] = [rng.randrange(10) for _ in range(width)]
        parent[index] = (rng.choice(_OPERATORS), arguments)
        length += width + 1
        if depth + 1 < max_depth:
            slots += [(arguments, position, depth + 1) for position in range(width)]
    return root[0], length


def published(table: Table) -> Table:
    """A table of expressions as Long Range Arena's files have them: ``Source`` and ``Target`` become text
    and label, and the round brackets of its binary trees go, as its own reader drops them."""
    if not set(_PUBLISHED) <= set(table.names):
        return table

    def plain(record: Mapping[str, object]) -> dict[str, object]:
        row = {_PUBLISHED.get(name, name): value for name, value in record.items()}
        if isinstance(row["text"], str):
            row["text"] = " ".join(re.sub(r"[()]", " ", row["text"]).split())
        return row

    names = tuple(_PUBLISHED.get(name, name) for name in table.names)
    return Table(table.where, table.unit, names, ((number, plain(row)) for number, row in table.records))


def name_labels(
    parts: Mapping[str, Sequence[Example]], allowed: tuple[str, ...] | None = None
) -> tuple[dict[str, list[Example]], tuple[str, ...]]:
    """The examples under the names of their labels, and all labels in order.

    Labels 0 and 1 of reviews (``allowed`` is ``REVIEW_LABELS``) are called negative and positive. Raises
    HestError (usage) for a label outside ``allowed``, naming samples that have it.
    """
    used = {example.answer for part in parts.values() for example in part}
    reviews = allowed == REVIEW_LABELS and used <= {"0", "1"}
    names = dict(zip("01", REVIEW_LABELS, strict=True)) if reviews else {}

    def named(example: Example) -> Example:
        name = names.get(example.answer, example.answer)
        return replace(example, answer=name, label=name)

    renamed = {split: [named(example) for example in part] for split, part in parts.items()}
    if allowed is None:
        return renamed, tuple(sorted({names.get(label, label) for label in used}))
    strange = [
        f"'{e.label}' ({e.sample_id})" for part in renamed.values() for e in part if e.label not in allowed
    ]
    if strange:
        raise HestError(
            f"labels other than {' and '.join(allowed)}: {few(strange)}",
            f"write labels as {', '.join(allowed)}" + (" or 0, 1" if allowed == REVIEW_LABELS else ""),
            Exit.USAGE,
        )
    return renamed, allowed
