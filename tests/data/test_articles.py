"""Data sets by name, by folder, by file: the splits they give, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from hestctl.data.articles import Splits, load_splits
from hestctl.data.examples import SPLITS
from hestctl.errors import Exit, HestError
from hestctl.settings import DataSettings

Article = Callable[..., dict[str, object]]
WriteRows = Callable[..., Path]
Row = dict[str, object]


def load(source: Path | str = "embedded", **changes: object) -> Splits:
    return load_splits(DataSettings.model_validate({"source": str(source), **changes}), seed=0)


def refused(source: Path | str = "embedded", **changes: object) -> HestError:
    with pytest.raises(HestError) as caught:
        load(source, **changes)
    assert caught.value.exit_code == Exit.USAGE
    assert caught.value.hint
    return caught.value


def ids(splits: Splits) -> dict[str, list[str]]:
    return {split: [e.sample_id for e in getattr(splits, split)] for split in SPLITS}


@pytest.fixture
def rows(article: Article) -> list[Row]:
    return [article(number) for number in range(200)]


def test_one_file_is_split_by_its_ids(rows: list[Row], write_rows: WriteRows) -> None:
    splits = load(write_rows(rows))
    sizes = {split: len(names) for split, names in ids(splits).items()}
    assert sum(sizes.values()) == 200
    assert 140 <= sizes["train"] <= 180
    assert 8 <= sizes["validation"] <= 35
    assert 8 <= sizes["test"] <= 35
    assert splits.name == "rows.jsonl"
    # A row stays in its split whatever stands around it.
    backwards = load(write_rows(rows[::-1], "back.jsonl.gz"))
    assert {s: set(n) for s, n in ids(backwards).items()} == {s: set(n) for s, n in ids(splits).items()}
    assert backwards.data_hash != splits.data_hash


def test_counts_take_the_first_of_each_split(rows: list[Row], write_rows: WriteRows) -> None:
    path = write_rows(rows)
    whole, few = load(path), load(path, train_samples=7, validation_samples=3, test_samples=1000)
    assert few.train == whole.train[:7]
    assert few.validation == whole.validation[:3]
    assert few.test == whole.test


def test_a_folder_holds_the_splits_in_any_kind(rows: list[Row], write_rows: WriteRows) -> None:
    write_rows(rows[:50], "news/train.jsonl.gz")
    write_rows(rows[50:60], "news/validation.jsonl")
    test = write_rows([], "news/test.csv")
    test.write_text("id,article,highlights\nt1,An article.,A summary.\n")
    splits = load(test.parent)
    assert ids(splits) == {
        "train": [f"a{n}" for n in range(50)],
        "validation": [f"a{n}" for n in range(50, 60)],
        "test": ["t1"],
    }
    assert (splits.name, splits.task) == ("news", "summarise")
    given = load(
        train_file=test.parent / "train.jsonl.gz",
        validation_file=test.parent / "validation.jsonl",
        test_file=test,
    )
    assert given.data_hash == splits.data_hash
    assert given.name == "files"


def test_validation_comes_out_of_train_where_there_is_none(rows: list[Row], write_rows: WriteRows) -> None:
    train, test = write_rows(rows[:150], "t/train.jsonl"), write_rows(rows[150:], "t/test.jsonl")
    splits = load(train_file=train, test_file=test)
    assert len(splits.test) == 50
    assert len(splits.train) + len(splits.validation) == 150
    assert 5 <= len(splits.validation) <= 30
    assert load(train.parent).data_hash == splits.data_hash


def test_columns_can_be_named(rows: list[Row], write_rows: WriteRows) -> None:
    renamed = [{"key": r["id"], "body": r["article"], "short": r["highlights"]} for r in rows]
    names = {"article_column": "body", "summary_column": "short", "id_column": "key"}
    named = load(write_rows(renamed, "renamed.jsonl"), **names)
    assert named.data_hash == load(write_rows(rows)).data_hash
    assert (
        "no column 'ky'; did you mean 'key'?"
        in refused(write_rows(renamed, "renamed.jsonl"), **{**names, "id_column": "ky"}).message
    )


def test_rows_without_ids_are_numbered(rows: list[Row], write_rows: WriteRows) -> None:
    nameless = [{key: value for key, value in row.items() if key != "id"} for row in rows]
    splits = load(write_rows(nameless))
    assert {name.split("-")[0] for name in ids(splits)["train"]} == {"row"}
    folder = write_rows(nameless[:9], "f/train.jsonl").parent
    write_rows(nameless[9:12], "f/validation.jsonl")
    write_rows(nameless[12:15], "f/test.jsonl")
    assert ids(load(folder))["test"] == ["test-1", "test-2", "test-3"]


@pytest.mark.parametrize("labels", [(0, 1), ("0", "1"), ("negative", "positive")])
def test_text_and_label_are_classified(write_rows: WriteRows, labels: tuple[object, object]) -> None:
    """Labels of one's own stay as they are, for 0 and 1 may be of anything; those of reviews have names."""
    reviews = [{"text": f"Review {n}", "label": labels[n >= 150]} for n in range(200)]
    splits = load(write_rows(reviews), train_samples=40)
    assert (splits.task, splits.labels) == ("classify", tuple(map(str, labels)))
    assert Counter(e.label for e in splits.train)[str(labels[1])] >= 3  # though the file is sorted by label
    assert all(e.answer == e.label for e in splits.train)
    counts = Counter(e.label for e in splits.test)
    assert splits.chance == max(counts.values()) / len(splits.test)
    path = write_rows(reviews, "reviews.jsonl")
    reviewed = load("lra-text", train_file=path, test_file=write_rows(reviews[:30], "test.jsonl"))
    assert (reviewed.name, reviewed.labels) == ("lra-text", ("negative", "positive"))


def test_labels_may_be_any_words_but_not_for_reviews(write_rows: WriteRows) -> None:
    topics = [{"text": f"Text {n}", "label": ("war", "art", "sport")[n % 3]} for n in range(90)]
    train = write_rows(topics, "t/train.jsonl")
    test = write_rows(topics, "t/test.jsonl")
    splits = load(train.parent)
    assert splits.labels == ("art", "sport", "war")
    assert splits.chance == pytest.approx(1 / 3)
    error = refused("lra-text", train_file=train, test_file=test)
    assert "labels other than negative and positive: 'war' (train-1), 'art' (train-2)" in error.message
    assert error.hint == "write labels as negative, positive or 0, 1"
    scored = [{"text": "t", "label": 0.5}]
    assert "type float" in refused(write_rows(scored, "scored.jsonl")).message


def test_the_hash_sees_every_field_of_every_example(
    rows: list[Row], write_rows: WriteRows, article: Article
) -> None:
    hashes = {load(write_rows(rows)).data_hash}
    for changes in ({"id": "other"}, {"article": "Other."}, {"highlights": "Other."}):
        hashes.add(load(write_rows([*rows[:-1], article(199, **changes)])).data_hash)
    hashes.add(load(write_rows(rows[:-1])).data_hash)
    hashes.add(load(write_rows(rows[::-1])).data_hash)
    assert len(hashes) == 6
    assert load(write_rows(rows)).data_hash in hashes


def test_an_id_in_two_splits_is_refused(rows: list[Row], write_rows: WriteRows) -> None:
    train, test = write_rows(rows[:50], "x/train.jsonl"), write_rows(rows[45:], "x/test.jsonl")
    error = refused(train.parent)
    assert "ids in two splits" in error.message
    assert "(train and test)" in error.message or "(validation and test)" in error.message
    assert "one file is given for two splits" in refused(train_file=test, test_file=test).message


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("embeded", "unknown data source 'embeded'; did you mean 'embedded'?"),
        ("LRA-Text", "did you mean 'lra-text'?"),
        ("nowhere.jsonl", "no file at nowhere.jsonl"),
        ("no/where", "no file at no/where"),
        ("a\0b", "unknown data source"),
        ("~nobody-of-that-name/x", "home directory"),
        ("x" * 5000 + ".csv", "too long"),
    ],
)
def test_an_unknown_source_is_named(source: str, said: str) -> None:
    assert said in refused(source).message


def test_folders_that_are_no_data_set_are_refused(
    tmp_path: Path, rows: list[Row], write_rows: WriteRows
) -> None:
    assert "no train.jsonl, .csv, .tsv or .parquet (it holds nothing)" in refused(tmp_path).message
    write_rows(rows[:5], "train.jsonl")
    assert "no test.jsonl, .csv, .tsv or .parquet (it holds train.jsonl)" in refused(tmp_path).message
    write_rows(rows[:5], "train.jsonl.gz")
    assert "holds train.jsonl and train.jsonl.gz" in refused(tmp_path).message


def test_files_must_make_a_whole(tmp_path: Path, rows: list[Row], write_rows: WriteRows) -> None:
    path = write_rows(rows)
    assert "data.train_file given without data.test_file" in refused(train_file=path).message
    assert "without data.train_file and data.test_file" in refused(validation_file=path).message
    assert "both data.test_file and data.source" in refused("own.csv", test_file=path).message
    assert "no rows for the" in refused(write_rows(rows[:2], "two.jsonl")).message
    empty = write_rows([], "empty.csv")
    empty.write_text("id,article,highlights\n")
    assert f"{empty}: no rows for the test split" in refused(train_file=path, test_file=empty).message
    (tmp_path / "closed.jsonl").symlink_to(tmp_path / "closed.jsonl")
    assert refused(tmp_path / "closed.jsonl")


def test_loading_needs_no_heavy_import(
    rows: list[Row], write_rows: WriteRows, run_python: Callable[..., str]
) -> None:
    script = (
        "import sys\n"
        "from hestctl.data import prompts\n"
        "from hestctl.data.articles import load_splits\n"
        "from hestctl.settings import DataSettings\n"
        f"load_splits(DataSettings(source={str(write_rows(rows))!r}), seed=0)\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    assert run_python(script).strip() == "[]"


SHARED = [parent / "shared" / "data" for parent in Path(__file__).parents[2:4]]


@pytest.mark.skipif(not any(map(Path.is_dir, SHARED)), reason="the research-only articles are not here")
@pytest.mark.parametrize("name", ["cnndm", "cnndm_lower", "imdb"])
def test_real_data_loads_where_it_is_at_hand(name: str) -> None:
    folder = next(filter(Path.is_dir, SHARED)) / name
    splits = load(folder, train_samples=200)
    assert len(splits.train) == 200
    assert len(splits.test) >= 300
    assert splits.labels == (("0", "1") if name == "imdb" else ())
