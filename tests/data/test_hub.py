"""The hub: what is tried again, what is not, and what a user without a network is told."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hestctl.data import hub
from hestctl.data.articles import load_splits
from hestctl.errors import HestError
from hestctl.settings import DataSettings


class FakeSplit:
    """Stands for ``datasets.Dataset``."""

    def __init__(self, rows: list[dict[str, object]]) -> None:
        self.rows = rows
        self.column_names = list(rows[0])
        self.read = 0

    def __iter__(self) -> Iterator[dict[str, object]]:
        for row in self.rows:
            self.read += 1
            yield row


class HubError(OSError):
    def __init__(self, status: int) -> None:
        super().__init__(f"{status} from the hub\nRequest ID: abc")
        self.response = types.SimpleNamespace(status_code=status)


Load = Callable[..., dict[str, FakeSplit]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Load], list[float]]:
    """Put ``load`` in the place of ``datasets.load_dataset``; returns the waits between tries, in seconds."""
    waits: list[float] = []
    monkeypatch.setattr(hub.time, "sleep", waits.append)

    def put(load: Load) -> list[float]:
        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
        return waits

    return put


def news(split: str) -> FakeSplit:
    return FakeSplit(
        [{"article": f"{split} {n}", "highlights": "a\nb", "id": f"{split}{n}"} for n in range(9)]
    )


def test_cnn_dailymail_takes_the_first_rows_of_each_split(serve: Callable[[Load], list[float]]) -> None:
    asked: list[tuple[object, ...]] = []
    parts = {split: news(split) for split in ("train", "validation", "test")}

    def load(*names: object, **_: object) -> dict[str, FakeSplit]:
        asked.append(names)
        return parts

    serve(load)
    splits = load_splits(DataSettings(source="cnn_dailymail", train_samples=4, test_samples=99), seed=0)
    assert asked == [("abisee/cnn_dailymail", "3.0.0")]
    assert (splits.name, splits.task) == ("cnn_dailymail", "summarise")
    assert [e.sample_id for e in splits.train] == ["train0", "train1", "train2", "train3"]
    assert (len(splits.validation), len(splits.test)) == (9, 9)
    assert parts["train"].read == 4  # rows behind the count are never decoded


def test_reviews_are_mixed_before_they_are_counted(serve: Callable[[Load], list[float]]) -> None:
    sorted_rows: list[dict[str, object]] = [
        {"text": f"review {n}", "label": int(n >= 500)} for n in range(1000)
    ]
    serve(lambda *_, **__: {"train": FakeSplit(sorted_rows), "test": FakeSplit(sorted_rows)})
    settings = DataSettings(source="lra-text", train_samples=200, validation_samples=50, test_samples=200)
    splits = load_splits(settings, seed=0)
    assert (splits.name, splits.task, splits.labels) == ("lra-text", "classify", ("negative", "positive"))
    positive = sum(example.label == "positive" for example in splits.train)
    assert 70 < positive < 130
    assert splits.chance is not None
    assert 0.5 <= splits.chance < 0.65
    assert not {e.sample_id for e in splits.train} & {e.sample_id for e in splits.validation}
    assert load_splits(settings, seed=1).data_hash == splits.data_hash


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_error_is_tried_again(serve: Callable[[Load], list[float]], status: int) -> None:
    tries: list[int] = []

    def load(*_: object, **__: object) -> dict[str, FakeSplit]:
        tries.append(1)
        if len(tries) < 3:
            raise FileNotFoundError("not in the cache either") from HubError(status)
        return {split: news(split) for split in ("train", "validation", "test")}

    waits = serve(load)
    assert load_splits(DataSettings(source="cnn_dailymail"), seed=0).train
    assert waits == [2.0, 8.0]


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (HubError(503), 3),
        (HubError(404), 1),
        (HubError(401), 1),
        (TimeoutError("read timed out"), 3),
        (ConnectionResetError("reset by peer"), 3),
        (ConnectionError("Couldn't reach 'x' on the Hub (OfflineModeIsEnabled)"), 1),
        (ValueError("no such config"), 1),
        (RuntimeError(), 1),
    ],
    ids=lambda value: repr(value),
)
def test_what_does_not_pass_ends_with_what_to_type(
    serve: Callable[[Load], list[float]], error: Exception, tries: int
) -> None:
    made: list[int] = []

    def load(*_: object, **__: object) -> dict[str, FakeSplit]:
        made.append(1)
        raise error

    serve(load)
    with pytest.raises(HestError) as caught:
        load_splits(DataSettings(source="lra-text"), seed=0)
    assert len(made) == tries
    assert "'stanfordnlp/imdb'" in caught.value.message
    assert "\n" not in caught.value.message
    assert "--data embedded" in (caught.value.hint or "")


def test_an_interrupt_is_not_swallowed(serve: Callable[[Load], list[float]]) -> None:
    def load(*_: object, **__: object) -> dict[str, FakeSplit]:
        raise KeyboardInterrupt

    serve(load)
    with pytest.raises(KeyboardInterrupt):
        load_splits(DataSettings(source="cnn_dailymail"), seed=0)


def test_causes_that_go_in_a_circle_end() -> None:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert not hub.is_passing(one)


def test_the_cache_can_be_moved(
    serve: Callable[[Load], list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[object] = []

    def load(*_: object, cache_dir: object) -> dict[str, FakeSplit]:
        folders.append(cache_dir)
        return {split: news(split) for split in ("train", "validation", "test")}

    serve(load)
    for cache in ("/big/disk", ""):
        monkeypatch.setenv("HESTCTL_CACHE", cache)
        load_splits(DataSettings(source="cnn_dailymail"), seed=0)
    assert folders == ["/big/disk/datasets", None]


def test_offline_with_the_real_library(tmp_path: Path, run_python: Callable[..., str]) -> None:
    script = (
        "from hestctl.data.articles import load_splits\n"
        "from hestctl.errors import HestError\n"
        "from hestctl.settings import DataSettings\n"
        "try: load_splits(DataSettings(source='cnn_dailymail'), seed=0)\n"
        "except HestError as error: print(error.message)\n"
    )
    said = run_python(script, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert "cannot load 'abisee/cnn_dailymail' from the Hugging Face hub: Couldn't reach" in said
