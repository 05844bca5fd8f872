"""Long Range Arena on the whole road, with a tiny model: accuracy and its chance level in place of ROUGE.

Reviews are of one letter each, so that the tiny model can learn them; ListOps it cannot learn.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from cli_tools import TINY, Outcome, Study, lines_of, run_cli

from hestctl.data.lra import listops
from hestctl.errors import Exit
from hestctl.model.backbone import tiny_backbone

COMMON = (
    *("-q", "--json", "--weights", "pretrained", "--set", "energy.calibration_s=0.004"),
    *("--set", "energy.lengths=16,128", "--set", "train.accumulation=1", "--set", "train.warmup_steps=2"),
    *("--set", "budget.tighten=0.2", "--set", "budget.settle=0.25"),
)
TEXT = (
    *("--profile", "lra-text", "--max-tokens", "220", "--epochs", "4", "--set", "train.batch_size=8"),
    *("--lr", "0.02", "--set", "train.scale_learning_rate=0.2"),
    *("--set", "data.train_file=train.jsonl", "--set", "data.validation_file=validation.jsonl"),
    *("--set", "data.test_file=test.jsonl"),
)
LISTOPS = (
    *("--profile", "lra-listops", "--max-tokens", "420", "--epochs", "1", "--set", "train.batch_size=4"),
    *("--set", "data.train_samples=16", "--set", "data.validation_samples=4"),
    *("--set", "data.test_samples=30"),
)
PUBLISHED = ("--set", "data.train_file=basic_train.tsv", "--set", "data.test_file=basic_test.tsv")


def write_reviews(folder: Path) -> None:
    for split, count in (("train", 96), ("validation", 10), ("test", 120)):
        rng = random.Random(split)
        rows = [{"text": "az"[n % 2] * rng.randint(20, 40) + f" {n}", "label": n % 2} for n in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def walk(folder: Path, *settings: str) -> Study:
    """tabs, then hest on 0.6 of its joules."""
    model = tiny_backbone(seed=1)
    model.model.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    common = ("--backbone", str(folder / "model"), *COMMON, *settings)
    tabs = run_cli(folder, "train", "--method", "tabs", *common)
    hest = run_cli(folder, "train", "--method", "hest", "--emax-ratio", "0.6", *common)
    assert (tabs.code, hest.code) == (0, 0), tabs.err + hest.err
    return Study(folder, tabs, hest)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory, known_joules: None) -> Study:
    folder = tmp_path_factory.mktemp("reviews")
    write_reviews(folder)
    return walk(folder, *TEXT)


@pytest.fixture(scope="module")
def expressions(tmp_path_factory: pytest.TempPathFactory, known_joules: None) -> Study:
    return walk(tmp_path_factory.mktemp("expressions"), *LISTOPS)


def compared(study: Study, *arguments: str) -> dict[str, Any]:
    outcome = run_cli(study.folder, "compare", "--no-figures", "--json", *arguments)
    assert outcome.code == 0, outcome.err
    return outcome.document


def samples_of(study: Study, outcome: Outcome) -> list[dict[str, Any]]:
    return lines_of(study.run_folder(outcome), "samples")


@pytest.mark.parametrize("task", ["reviews", "expressions"])
def test_labels_are_scored_and_their_joules_are_of_scoring(task: str, request: pytest.FixtureRequest) -> None:
    study: Study = request.getfixturevalue(task)
    for outcome in (study.tabs, study.hest):
        document, samples = outcome.document, samples_of(study, outcome)
        right = sum(sample["label"] == sample["predicted_label"] for sample in samples)
        assert document["accuracy_percent"] == pytest.approx(100 * right / len(samples))
        labels = [sample["label"] for sample in samples]
        assert document["chance_percent"] == pytest.approx(
            100 * max(map(labels.count, labels)) / len(samples)
        )
        assert document["rouge_lsum"] is None
        assert all(sample["energy_j"] > 0 for sample in samples)
        assert all((sample["new_tokens"], sample["finish"]) == (0, "label") for sample in samples)
        assert all(sample["decode_j"] in (None, 0) for sample in samples)
    hest = samples_of(study, study.hest)
    assert all(0 < sample["scope_energy_j"] <= sample["emax_j"] for sample in hest)


@pytest.mark.parametrize("task", ["reviews", "expressions"])
def test_hardening_holds_scoring_to_the_budget(task: str, request: pytest.FixtureRequest) -> None:
    study: Study = request.getfixturevalue(task)
    outcome = run_cli(study.folder, "harden", "-q", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.document["hardened_over_emax"] <= 1
    explained = run_cli(study.folder, "harden", "--explain", "-q")
    assert "+ 1" in explained.out


def test_reviews_are_read_as_bytes(reviews: Study) -> None:
    for sample in samples_of(reviews, reviews.hest):
        assert sample["prompt_tokens"] >= 100
    settings = json.loads((reviews.run_folder(reviews.hest) / "run.json").read_text())["settings"]
    assert (settings["data"]["source"], settings["data"]["units"]) == ("lra-text", "auto")


def test_equal_accuracy_is_claimed_above_chance_alone(reviews: Study, expressions: Study) -> None:
    learnt = compared(reviews, "--margin", "10")
    (pair,) = learnt["pairs"]
    assert reviews.hest.document["accuracy_percent"] > 90
    assert pair["quality"] == "not inferior"
    guessed = compared(expressions, "--margin", "100")
    (pair,) = guessed["pairs"]
    assert pair["quality"] == "inconclusive"
    assert "cannot be told from chance" in pair["quality_reason"]
    for document in (learnt, guessed):
        assert document["task"] == "classification"
        assert document["quality_metric"] == "accuracy_percent"
        assert None not in document["metrics"]["accuracy_percent"].values()
        assert None not in document["metrics"]["chance_percent"].values()
        assert set(document["metrics"]["energy_j_per_new_token"].values()) == {None}
        told = {line["expectation"]: line for line in document["expectations"]}
        assert "chance" in told["the same accuracy as TABS"]["reason"]


def test_tables_and_figures_speak_of_accuracy(reviews: Study) -> None:
    outcome = run_cli(reviews.folder, "compare", "--all", "--formats", "svg")
    assert outcome.code == 0, outcome.err
    assert "ROUGE-Lsum" not in outcome.out.split("expected of HEST")[0]
    assert "chance" in outcome.out
    assert "labels scored (no tokens written)" in outcome.out
    names = {path.name for path in (reviews.folder / "figures").iterdir()}
    assert "comparison_confusion.svg" in names
    drawn = (reviews.folder / "figures" / "comparison_front.svg").read_text()
    assert "accuracy" in drawn
    assert "chance level" in drawn
    listed = run_cli(reviews.folder, "runs", "list")
    assert "% accuracy" in listed.out


def test_expressions_of_the_published_files_are_trained_on(tmp_path: Path, known_joules: None) -> None:
    rng = random.Random(5)
    for split, count in (("train", 40), ("test", 12)):
        lines = ["Source\tTarget"]
        for _ in range(count):
            text, value = listops(rng, min_length=20, max_length=40)
            lines.append(f"( {text} )\t{value}")
        (tmp_path / f"basic_{split}.tsv").write_text("\n".join(lines) + "\n")
    study = walk(tmp_path, *LISTOPS, *PUBLISHED)
    samples = samples_of(study, study.hest)
    assert len(samples) == 12
    assert all(sample["truncated_tokens"] == 0 for sample in samples)
    assert {sample["predicted_label"] for sample in samples} <= set("0123456789")


def test_labels_that_begin_alike_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    """And all of them are known, though the first few rows have not each one."""
    labels = ["wrong", "late", "lost"]
    rows = [{"text": f"Parcel {n}", "label": labels[max(0, n - 57)]} for n in range(60)]
    (tmp_path / "tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = run_cli(
        tmp_path, "train", "--method", "tabs", "--data", "tickets.jsonl", *TINY, "--trial", "-q", "--json"
    )
    assert outcome.code == Exit.USAGE
    assert "the labels 'late' and 'lost' begin with the same token" in outcome.message
    assert not (tmp_path / "runs").exists()
