"""What a dry run looks at, and that no profile cuts one's own data in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_tools import TINY, TRIAL, Study, files_of, run_cli

DRY = ("train", "--dry-run", *TINY)


@pytest.fixture
def news(tmp_path: Path) -> Path:
    """A folder with 50 articles to train on and 20 to test on, of which a validation split is taken."""
    (tmp_path / "news").mkdir()
    for split, count in (("train", 50), ("test", 20)):
        rows = [
            {"id": f"{split}-{number}", "article": "One sentence. Another.", "highlights": "One."}
            for number in range(count)
        ]
        (tmp_path / "news" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


CUT = (
    "using 32 of about 45 training, 16 of 20 test samples (profile quickstart); "
    "for all: --set data.train_samples=50 --set data.test_samples=20\n"
)


def test_a_dry_run_counts_the_samples(news: Path) -> None:
    before = files_of(news)
    outcome = run_cli(news, *DRY, "--data", "news")
    assert outcome.code == 0, outcome.err
    assert "data: news, 32 train, 4 validation, 16 test" in outcome.out
    assert outcome.err == CUT
    document = run_cli(news, *DRY, "--data", "news", "--json").document
    assert (document["dataset"], document["samples"]) == ("news", {"train": 32, "validation": 4, "test": 16})
    assert files_of(news) == before


def test_data_that_are_not_there_end_a_dry_run_as_they_end_a_training(news: Path) -> None:
    for data, says in (("nowhere.jsonl", "no file at nowhere.jsonl"), ("cnn_daily", "unknown data source")):
        dry, real = (run_cli(news, *command, *TINY, "--data", data) for command in (DRY[:2], DRY[:1]))
        assert (dry.code, dry.out) == (real.code, real.out) == (2, "")
        assert says in dry.message
        assert dry.message == real.message


def test_a_hub_is_not_asked_in_a_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hestctl.data.articles.hub_tables", lambda *_: pytest.fail("asked"))
    document = run_cli(tmp_path, *DRY, "--data", "cnn_dailymail", "--json").document
    assert (document["dataset"], document["samples"]) == ("cnn_dailymail", None)
    assert "not looked at" in run_cli(tmp_path, *DRY, "--data", "cnn_dailymail").out


@pytest.mark.parametrize(
    "arguments",
    [
        ("--set", "data.train_samples=32", "--set", "data.test_samples=16"),
        ("--set", "data.train_samples=50", "--set", "data.test_samples=20"),
        ("--data", "embedded"),
        ("--trial",),
    ],
    ids=" ".join,
)
def test_what_was_asked_for_is_not_told(news: Path, arguments: tuple[str, ...]) -> None:
    assert run_cli(news, *DRY, "--data", "news", *arguments).err == ""


def test_a_limit_that_leaves_nothing_out_is_not_told(news: Path) -> None:
    rows = (news / "news" / "test.jsonl").read_text().splitlines()[:16]
    (news / "news" / "test.jsonl").write_text("\n".join(rows))
    told = run_cli(news, *DRY, "--data", "news").err
    assert "training" in told
    assert "test" not in told


def test_limits_of_the_environment_are_not_told(news: Path) -> None:
    limits = {"HESTCTL_DATA__TRAIN_SAMPLES": "32", "HESTCTL_DATA__TEST_SAMPLES": "16"}
    assert run_cli(news, *DRY, "--data", "news", environment=limits).err == ""


def test_one_file_for_all_splits_is_counted_too(news: Path) -> None:
    told = run_cli(news, *DRY, "--data", "news/train.jsonl", "--set", "data.test_samples=3").err
    assert told.startswith("using 32 of about 40 training samples (profile quickstart)")
    assert "--set data.train_samples=50" in told


def test_a_training_tells_what_it_leaves_out(news: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hestctl.errors import HestError

    def stop(*_: object, **__: object) -> None:
        raise HestError("stopped here")

    monkeypatch.setattr("hestctl.workflows.train.train", stop)
    assert CUT in run_cli(news, "train", *TINY, "--data", "news").err
    assert "using" not in run_cli(news, "train", *TINY, "--data", "news", "-q").err
    assert "using" not in run_cli(news, "train", *TRIAL, "--data", "news").err


def test_a_dry_run_names_the_reference_that_fits_by_its_settings(study: Study, tmp_path: Path) -> None:
    tabs = study.tabs.document["run_id"]
    dry = ("train", "--dry-run", *TRIAL, "--json")
    found = run_cli(study.folder, *dry).document
    assert found["reference_run_id"] == tabs
    assert found["emax_origin"].startswith(f"0.6 x tabs run {tabs}, by its settings")
    for other in (("--new-tokens", "5"), ("--num-beams", "2"), ("--set", "data.max_tokens=600")):
        document = run_cli(study.folder, *dry, *other).document
        assert document["reference_run_id"] is None
        assert document["emax_origin"].endswith(
            "no finished tabs run of these settings in runs.duckdb, 1 of others"
        )
    assert run_cli(study.folder, *dry, "--emax", "2").document["emax_origin"] == "2 J a sample, given"
    named = run_cli(study.folder, *dry, "--reference", "tabs").document
    assert (named["reference_run_id"], named["emax_origin"]) == (tabs, f"0.6 x tabs run {tabs}, as named")
    assert run_cli(study.folder, *dry, "--method", "lora").document["emax_origin"] is None
    assert "E_max: 0.6 x TABS, predicted: no finished tabs run" in run_cli(tmp_path, *dry[:-1]).out
    assert list(tmp_path.iterdir()) == []
