"""Reading files: every kind gives the same examples, and every fault is named with its place."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from hestctl.data.examples import Example
from hestctl.data.files import count_rows, open_table
from hestctl.data.tables import Columns, read_examples
from hestctl.errors import Exit, HestError

COLUMNS = Columns("article", "highlights", "id")
Article = Callable[..., dict[str, object]]


def read(path: Path, columns: Columns = COLUMNS) -> list[Example]:
    return list(read_examples(open_table(path), columns, prefix="row"))


def refused(path: Path, columns: Columns = COLUMNS) -> HestError:
    with pytest.raises(HestError) as caught:
        read(path, columns)
    assert caught.value.exit_code == Exit.USAGE
    assert caught.value.hint
    assert str(path) in caught.value.message
    return caught.value


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    """The rows in the kind of file that the name says."""
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    if plain.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), plain)
    elif plain.suffix in (".csv", ".tsv"):
        with plain.open("w", newline="", encoding="utf-8") as stream:
            delimiter = "," if plain.suffix == ".csv" else "\t"
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    else:
        plain.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if plain != path:
        path.write_bytes(gzip.compress(plain.read_bytes()))
    return path


KINDS = [f"x.{kind}{packed}" for packed in ("", ".gz") for kind in ("jsonl", "csv", "tsv", "parquet")]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_examples(tmp_path: Path, article: Article, name: str) -> None:
    rows = [article(n) for n in range(3)]
    rows[1]["article"] = 'Café, "quoted"\nover two lines\u2028and a separator 🐎'
    rows[2]["article"] = "long " * 60_000  # above the csv module's own limit
    examples = read(write(tmp_path / name, rows))
    assert [e.sample_id for e in examples] == ["a0", "a1", "a2"]
    assert [e.text for e in examples] == [str(row["article"]).strip() for row in rows]
    assert examples[0].answer == "Bridge 0 opens.\nTolls follow."
    assert examples[0].label is None


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_column_is_named_with_the_nearest(tmp_path: Path, article: Article, name: str) -> None:
    rows = [{("Highlight" if key == "highlights" else key): value for key, value in article(1).items()}]
    error = refused(write(tmp_path / name, rows))
    assert "no column 'highlights'; did you mean 'Highlight'?" in error.message
    assert "columns: id, article, Highlight" in error.message


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
@pytest.mark.parametrize(
    ("cell", "said"),
    [(7, "type int"), (None, "nothing"), (["a"], "type list"), (True, "type bool"), (" \n", "empty")],
)
def test_a_cell_that_is_not_text_is_named(
    tmp_path: Path, article: Article, name: str, cell: object, said: str
) -> None:
    rows = [article(n, highlights=cell) for n in range(2)]
    error = refused(write(tmp_path / name, rows))
    assert "highlights" in error.message
    assert said in error.message
    assert "line 1" in error.message or "row 1" in error.message


def test_ids_may_be_whole_numbers_or_row_numbers(tmp_path: Path, article: Article) -> None:
    path = write(tmp_path / "x.jsonl", [article(n, id=n) for n in range(2)])
    assert [e.sample_id for e in read(path)] == ["0", "1"]
    assert [e.sample_id for e in read(path, Columns("article", "highlights", None))] == ["row-1", "row-2"]


def test_duplicate_ids_are_all_named(tmp_path: Path, article: Article) -> None:
    path = write(tmp_path / "x.jsonl", [article(n % 7) for n in range(14)])
    message = refused(path).message
    assert "'a0' (lines 1 and 8)" in message
    assert "'a4' (lines 5 and 12) and 2 more" in message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"id": "a", ', "line 2: not valid JSON"),
        (b'{"id": "a", "article": "x"', "line 2: not valid JSON"),
        (b"[1, 2]", "line 2: a JSON object is expected, not list"),
        (b'"text"', "line 2: a JSON object is expected, not str"),
        (b"[" * 100_000, "line 2: not valid JSON"),
        (b'{"id": ' + b"9" * 5_000 + b"}", "line 2: not valid JSON"),
        (
            b'{"id": "b", "article": "caf\xe9", "highlights": "x"}',
            "line 2: byte 0xe9 at offset 27 is not UTF-8",
        ),
        (
            b'{"id": "b", "article": "\\ud800", "highlights": "x"}',
            "line 2: column 'article' holds half a surrogate",
        ),
        (b'{"id": "b", "article": "x"}', "line 2: no column 'highlights'"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, article: Article, line: bytes, said: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps(article(1)).encode() + b"\n" + line + b"\n")
    assert said in refused(path).message


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"id,article,highlights\na,b\n", "line 2: 2 cells, but the header has 3"),
        (b"id,article,highlights\na,b,c,d\n", "line 2: 4 cells, but the header has 3"),
        (b'id,article,highlights\na,"b,c\n', "line 2: not valid CSV"),
        (b'id,article,highlights\na,"b\nb",c\nd,"e"e,f\n', "line 4: not valid CSV"),
        (b"id,article,highlights\na,\xff,c\n", "line 2: byte 0xff at offset 2 is not UTF-8"),
        (b"id,article,article,highlights\na,b,c,d\n", "two columns are called 'article'"),
        (b'"id,article\n', "line 1: not valid CSV"),
        (b"", "holds no rows"),
    ],
)
def test_a_bad_csv_line_is_named(tmp_path: Path, body: bytes, said: str) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(body)
    assert said in refused(path).message


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path: Path, article: Article) -> None:
    lines = tmp_path / "x.jsonl"
    lines.write_text("\ufeff" + json.dumps(article(1)) + "\n\n" + json.dumps(article(2)) + "\n\n")
    table = tmp_path / "x.csv"
    table.write_text("\ufeffid,article,highlights\n\na1,b,c\n\na2,b,c\n")
    assert [e.sample_id for e in read(lines)] == [e.sample_id for e in read(table)] == ["a1", "a2"]


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.csv.gz", "x.parquet.gz", "x.parquet", "x.jsonl", "x.csv"])
def test_a_damaged_file_is_refused(tmp_path: Path, article: Article, name: str) -> None:
    path = write(tmp_path / name, [article(n) for n in range(50)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path)
    path.write_bytes(b"\x80" + whole[1:-1] + b"\x80")
    refused(path)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    for name in ("x.pkl", "x.pt", "x.jsonl", "x.csv", "x.parquet"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps(Trap()))
        refused(path)
    assert not (tmp_path / "sprung").exists()


def test_a_missing_file_is_named_with_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "articles.jsonl").touch()
    error = refused(tmp_path / "artcles.jsonl")
    assert "did you mean 'articles.jsonl'?" in error.message
    refused(tmp_path / "nowhere" / "x.jsonl")


@pytest.mark.parametrize("name", KINDS)
@given(
    rows=st.lists(
        st.tuples(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip)), max_size=5
    )
)
def test_text_comes_through_unchanged(
    tmp_path_factory: pytest.TempPathFactory, name: str, rows: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("any") / name
    shaped = [{"id": n, "text": text, "label": label} for n, (text, label) in enumerate(rows)]
    write(path, [{"id": 99, "text": "first", "label": "x"}, *shaped])
    examples = read(path, Columns("text", "label", "id", labelled=True))[1:]
    assert [(e.text, e.answer) for e in examples] == [(text.strip(), label.strip()) for text, label in rows]


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_rows_are_counted_without_a_check(tmp_path: Path, kind: str, packed: str) -> None:
    path = tmp_path / f"rows.{kind}{packed}"
    if kind == "parquet":
        plain = tmp_path / "plain"
        parquet.write_table(pyarrow.table({"article": ["a", "b", "c"]}), plain)
        content = plain.read_bytes()
    elif kind == "jsonl":
        content = b'{"article": "a"}\n\nnot a row\n{}'
    else:
        content = b'article\na\n"b\nand more"\nc\n'
    path.write_bytes(gzip.compress(content) if packed else content)
    assert count_rows(path) == 3


def test_rows_of_nothing_are_not_counted(tmp_path: Path) -> None:
    with pytest.raises(HestError, match="no file at"):
        count_rows(tmp_path / "rows.jsonl")
