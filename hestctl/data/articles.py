"""Load a data set by its name or from files, as three checked and hashed splits."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from hestctl.data.examples import SPLITS, Example, Splits, Task, make_splits
from hestctl.data.files import KINDS, columns_present, count_rows, kind_of, open_table
from hestctl.data.hub import hub_tables
from hestctl.data.lra import DIGIT_LABELS, REVIEW_LABELS, listops_splits, name_labels, published
from hestctl.data.tables import Columns, Table, few, nearest, read_examples
from hestctl.errors import Exit, HestError
from hestctl.settings import DataSettings

__all__ = ["Example", "Splits", "Task", "load_splits"]

NAMED_SOURCES = ("embedded", "cnn_dailymail", "lra-text", "lra-listops")

_ARTICLE = Columns("article", "highlights", "id")
_LABELLED = Columns("text", "label", None, labelled=True)
_WHOLE = "all"
"""The key of a file that holds all three splits."""


def load_splits(settings: DataSettings, *, seed: int) -> Splits:
    """The data set that ``settings.source`` names, or that its files hold.

    - ``embedded``: articles that ship with the package.
    - ``cnn_dailymail``, ``lra-text``: from the hub, or from ``train_file`` and ``test_file``.
    - ``lra-listops``: from ``train_file`` and ``test_file``, such as Long Range Arena's own basic_train.tsv;
      else generated from ``seed``, which nothing else depends on (``hestctl.data.lra``).
    - a folder with ``train``, ``validation`` and ``test`` as .jsonl, .csv, .tsv or .parquet, plain or .gz.
    - one such file: a hash of a row's id puts it into test (1 in 10), validation (1 in 10) or train.

    Where train and test are given without validation, the same hash takes 1 in 10 out of train for it.
    Files with the columns ``text`` and ``label`` in place of an article and its summary are classified.
    ``train_samples`` and its like take the first N of a split, and all of it where it has fewer; articles
    behind them are neither read nor checked. Rows of labelled data are put into the order of a hash of
    their ids first: IMDb's own are sorted by label.

    Raises HestError, naming the file, line and column, for anything in the data that cannot be used.
    """
    given = _given(settings)
    try:
        return _from_given(given, settings) if given else _from_source(settings, seed)
    except (OSError, RuntimeError) as error:  # RuntimeError: pathlib's word for a loop of links
        raise HestError(f"the data cannot be read: {error}", "check the path", Exit.USAGE) from None


class Available(NamedTuple):
    """How many samples a split could have.

    About so many, where a file of more ``rows`` is dealt to several splits.
    """

    samples: int
    rows: int


def available(settings: DataSettings) -> dict[str, Available]:
    """What the files of one's own data hold for each split; empty for other sources. Rows are only counted.

    Raises HestError (usage) for files that are not there or cannot be read.
    """
    found: dict[str, Available] = {}
    files = _own_files(settings)
    for key, path in files.items():
        rows = count_rows(path)
        if key == _WHOLE:
            shares = {"train": 0.8, "validation": 0.1, "test": 0.1}
        elif key == "train" and "validation" not in files:
            shares = {"train": 0.9, "validation": 0.1}
        else:
            shares = {key: 1.0}
        found |= {split: Available(round(rows * share), rows) for split, share in shares.items()}
    return found


def is_hub_source(settings: DataSettings) -> bool:
    """Whether the data come from a hub, so that a look at them may be a download."""
    return settings.source in ("cnn_dailymail", "lra-text") and not _given(settings)


def _given(settings: DataSettings) -> dict[str, Path]:
    files = {
        "train": settings.train_file,
        "validation": settings.validation_file,
        "test": settings.test_file,
    }
    return {split: path for split, path in files.items() if path is not None}


def _own_files(settings: DataSettings) -> dict[str, Path]:
    given = _given(settings)
    if given or settings.source in NAMED_SOURCES:
        return given
    path = Path(settings.source).expanduser()
    return _in_folder(path) if path.is_dir() else {_WHOLE: path}


def _from_source(settings: DataSettings, seed: int) -> Splits:
    match settings.source:
        case "embedded":
            return _embedded(settings)
        case "cnn_dailymail":
            tables = hub_tables("abisee/cnn_dailymail", "3.0.0", SPLITS)
            return _assemble("cnn_dailymail", _ARTICLE, tables, settings)
        case "lra-text":
            tables = hub_tables("stanfordnlp/imdb", "plain_text", ("train", "test"))
            return _assemble("lra-text", _LABELLED, tables, settings, REVIEW_LABELS)
        case "lra-listops":
            return listops_splits(settings, seed)
        case path:
            return _from_path(Path(path).expanduser(), settings)


def _embedded(settings: DataSettings) -> Splits:
    corpus = resources.files("hestctl.data") / "corpus"
    with contextlib.ExitStack() as stack:
        paths = {s: stack.enter_context(resources.as_file(corpus / f"{s}.jsonl")) for s in SPLITS}
        tables = {split: open_table(path) for split, path in paths.items()}
        return _assemble("embedded", _ARTICLE, tables, settings)


def _from_given(given: Mapping[str, Path], settings: DataSettings) -> Splits:
    keys = ", ".join(f"data.{split}_file" for split in given)
    if settings.source not in NAMED_SOURCES:
        raise HestError(
            f"both {keys} and data.source = '{settings.source}' name the data",
            "give the one or the other",
            Exit.USAGE,
        )
    missing = [f"data.{split}_file" for split in ("train", "test") if split not in given]
    if missing:
        raise HestError(
            f"{keys} given without {' and '.join(missing)}",
            f"give {' and '.join(missing)} too, or one file with all rows as data.source",
            Exit.USAGE,
        )
    labels = {"lra-text": REVIEW_LABELS, "lra-listops": DIGIT_LABELS}.get(settings.source)
    return _from_files("files" if labels is None else settings.source, given, settings, labels)


def _from_path(path: Path, settings: DataSettings) -> Splits:
    if path.is_dir():
        return _from_files(path.resolve().name, _in_folder(path), settings)
    if path.is_file() or kind_of(path) or len(path.parts) > 1:
        return _from_files(path.name, {_WHOLE: path}, settings)
    raise HestError(
        f"unknown data source '{settings.source}'{nearest(settings.source, NAMED_SOURCES)}",
        f"sources: {', '.join(NAMED_SOURCES)}; or the path of a file or a folder",
        Exit.USAGE,
    )


def _in_folder(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for split in SPLITS:
        names = [f"{split}.{kind}{packed}" for kind in KINDS for packed in ("", ".gz")]
        fitting = [folder / name for name in names if (folder / name).is_file()]
        if len(fitting) > 1:
            several = " and ".join(path.name for path in fitting)
            raise HestError(f"{folder} holds {several}", "leave only one of them", Exit.USAGE)
        if fitting:
            found[split] = fitting[0]
    for needed in ("train", "test"):
        if needed not in found:
            there = sorted(path.name for path in folder.iterdir())
            raise HestError(
                f"{folder}: no {needed}.jsonl, .csv, .tsv or .parquet (it holds {few(there) or 'nothing'})",
                "a folder holds train, test and, if you like, validation; or give one file with all rows",
                Exit.USAGE,
            )
    return found


def _from_files(
    name: str, paths: Mapping[str, Path], settings: DataSettings, labels: tuple[str, ...] | None = None
) -> Splits:
    """``labels``, where given, are the only ones allowed, and make it a matter of ``text`` and ``label``."""
    if len({path.resolve() for path in paths.values()}) < len(paths):
        raise HestError("one file is given for two splits", "give each split rows of its own", Exit.USAGE)
    tables = {key: open_table(path) for key, path in paths.items()}
    if labels == DIGIT_LABELS:
        tables = {key: published(table) for key, table in tables.items()}
    first = next(iter(tables.values()))
    columns = Columns(settings.article_column, settings.summary_column, settings.id_column)
    labelled = not columns_present(first, columns) and columns_present(first, _LABELLED)
    if labels or labelled or (columns.text, columns.answer) == ("text", "label"):
        columns = Columns("text", "label", settings.id_column, labelled=True)
    if settings.id_column == DataSettings().id_column and settings.id_column not in first.names:
        columns = Columns(columns.text, columns.answer, None, columns.labelled)
    return _assemble(name, columns, tables, settings, labels)


def _assemble(
    name: str,
    columns: Columns,
    tables: Mapping[str, Table],
    settings: DataSettings,
    labels: tuple[str, ...] | None = None,
) -> Splits:
    counts = {
        "train": settings.train_samples,
        "validation": settings.validation_samples,
        "test": settings.test_samples,
    }
    streams = {
        key: read_examples(table, columns, prefix="row" if key == _WHOLE else key)
        for key, table in tables.items()
    }
    parts = _deal(streams, dict.fromkeys(SPLITS) if columns.labelled else counts)
    for split, part in parts.items():
        if not part:
            source = tables.get(split) or tables.get(_WHOLE) or tables["train"]
            raise HestError(
                f"{source.where}: no rows for the {split} split",
                "give more rows, or a file for each of train, validation and test",
                Exit.USAGE,
            )
    _check_apart(parts)
    if not columns.labelled:
        return make_splits(name, "summarise", parts)
    named, known = name_labels(parts, labels)  # of all rows: a class may be missing among the first few
    ordered = {s: sorted(part, key=lambda e: _digest(e.sample_id))[: counts[s]] for s, part in named.items()}
    return make_splits(name, "classify", ordered, known)


def _deal(
    streams: Mapping[str, Iterator[Example]], limits: Mapping[str, int | None]
) -> dict[str, list[Example]]:
    """Each stream's examples in their splits; a stream is left once its splits are full."""
    parts: dict[str, list[Example]] = {split: [] for split in SPLITS}

    def is_full(split: str) -> bool:
        limit = limits[split]
        return limit is not None and len(parts[split]) >= limit

    for key, stream in streams.items():
        if key == _WHOLE:
            fed: tuple[str, ...] = SPLITS
        elif key == "train" and "validation" not in streams:
            fed = ("train", "validation")
        else:
            fed = (key,)
        for example in stream:
            split = _split_of(example.sample_id, fed)
            if not is_full(split):
                parts[split].append(example)
            if all(map(is_full, fed)):
                break
    return parts


def _split_of(sample_id: str, fed: tuple[str, ...]) -> str:
    if len(fed) == 1:
        return fed[0]
    drawn = {0: "test", 1: "validation"}.get(int(_digest(sample_id), 16) % 10, "train")
    return drawn if drawn in fed else "train"


def _digest(sample_id: str) -> str:
    return hashlib.sha256(sample_id.encode("utf-8")).hexdigest()


def _check_apart(parts: Mapping[str, list[Example]]) -> None:
    home: dict[str, str] = {}
    shared: list[str] = []
    for split, part in parts.items():
        for example in part:
            first = home.setdefault(example.sample_id, split)
            if first != split:
                shared.append(f"'{example.sample_id}' ({first} and {split})")
    if shared:
        raise HestError(f"ids in two splits: {few(shared)}", "give each split rows of its own", Exit.USAGE)
