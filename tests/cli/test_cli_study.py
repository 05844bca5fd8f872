"""The whole way on the tiny model: train, harden, profile, compare; and what each of them says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from cli_tools import TINY, TRIAL, Outcome, Study, lines_of, run_cli

TRAIN_KEYS = {
    "run_id",
    "status",
    "method",
    "scope",
    "rouge_lsum",
    "rouge_l",
    "energy_j_per_sample",
    "energy_kind",
    "new_tokens_per_sample",
    "latency_p99_s",
    "controller_parameters",
    "adapter_parameters",
}


@pytest.fixture(scope="session")
def hardened(study: Study) -> Outcome:
    return run_cli(study.folder, "harden", "-q", "--json")


@pytest.fixture(scope="session")
def profiled(study: Study) -> Outcome:
    arguments = ("profile", "--seq-len", "64", "--new-tokens", "2", "--repeats", "2", "-q", "--json")
    return run_cli(study.folder, *arguments)


@pytest.fixture(scope="session")
def compared(study: Study) -> Outcome:
    return run_cli(study.folder, "compare", "--db", "runs.duckdb", "--no-figures", "--json")


def test_train_tells_its_outcome(study: Study) -> None:
    for outcome, method in ((study.tabs, "tabs"), (study.hest, "hest")):
        document = outcome.document
        assert document.keys() >= TRAIN_KEYS
        assert (document["status"], document["method"], document["scope"]) == ("finished", method, "adapter")
        assert document["energy_kind"] == "estimated"
        assert document["energy_j_per_sample"] > 0
        assert 1 <= document["new_tokens_per_sample"] <= 4
        assert document["controller_parameters"] > 0
        assert outcome.err == ""


def test_random_weights_have_no_quality(study: Study) -> None:
    document = study.hest.document
    assert document["weights"] == "random"
    assert document["rouge_lsum"] is None
    assert document["nll_per_token_nats"] is None


def test_the_budget_names_the_tabs_run_it_refers_to(study: Study) -> None:
    document = study.hest.document
    assert document["emax_origin"] == f"0.6 x tabs run {study.tabs.document['run_id']}"
    assert document["emax_j"] > 0
    assert document["scope_energy_kind"] == "predicted"


def test_no_sample_is_over_the_budget(study: Study) -> None:
    assert study.hest.document["over_budget_share"] == 0
    rows = lines_of(study.run_folder(study.hest), "samples")
    assert len(rows) == 2
    assert all(row["scope_energy_j"] <= row["emax_j"] for row in rows)


@pytest.mark.parametrize("name", ["tabs", "hest"])
def test_scope_joules_follow_from_the_logged_states(study: Study, name: str) -> None:
    folder = study.run_folder(getattr(study, name))
    costs = json.loads((folder / "plan.json").read_text())["costs_j"]
    for row in lines_of(folder, "samples"):
        spent = row["directions_int8"] * costs[1] + row["directions_full"] * costs[2]
        assert row["scope_energy_j"] == pytest.approx(spent, rel=1e-9)
        assert spent > 0
        states = row["directions_off"] + row["directions_int8"] + row["directions_full"]
        # Every direction of every layer, once for each position; the last new token is never an input.
        assert states == 2 * 16 * (row["prompt_tokens"] + row["new_tokens"] - 1)


def test_a_run_leaves_what_it_recorded(study: Study) -> None:
    names = {path.name for path in study.run_folder(study.hest).iterdir()}
    assert names >= {"run.json", "plan.json", "manifest.json", "steps.jsonl", "samples.jsonl"}
    verified = run_cli(study.folder, "runs", "verify")
    assert (verified.code, verified.out) == (0, "runs.duckdb agrees with its run folders\n")


def test_harden_takes_the_latest_budgeted_run(study: Study, hardened: Outcome) -> None:
    document = hardened.document
    assert hardened.code == 0
    assert document["parent_run_id"] == study.hest.document["run_id"]
    assert document["emax_origin"] == study.hest.document["emax_origin"]
    assert document["hardened_over_emax"] <= 1
    assert document["energy_kind"] == "estimated"
    certificate = document["plan"]["certificate"]
    assert [row["length_tokens"] for row in certificate] == [128, 256, 512, 1024, 2048, 4096]
    assert all(row["bound_j"] <= document["emax_j"] for row in certificate)


def test_harden_under_another_budget(copied: Study) -> None:
    emax_j = study_emax(copied) / 3
    outcome = run_cli(copied.folder, "harden", "--emax", f"{emax_j}", "-q", "--json")
    assert outcome.document["emax_j"] == pytest.approx(emax_j)
    assert outcome.document["emax_origin"] == "given by --emax"
    again = run_cli(copied.folder, "harden", "--emax-ratio", "0.3", "-q", "--json")
    assert again.document["emax_j"] == pytest.approx(study_emax(copied) / 2)


def study_emax(study: Study) -> float:
    return float(study.hest.document["emax_j"])


def test_a_budget_of_next_to_nothing_is_met_by_closing_everything(copied: Study) -> None:
    outcome = run_cli(copied.folder, "harden", "--emax", "1e-12", "-q", "--json")
    assert outcome.code == 0
    assert outcome.document["plan"]["energies"]["worst_j"] == 0


def test_profile_sweeps_the_latest_hardened_run(study: Study, hardened: Outcome, profiled: Outcome) -> None:
    document = profiled.document
    assert profiled.code == 0
    assert document["profiled_run_id"] == hardened.document["run_id"]
    assert document["method"] == "hest"
    assert document["energy_kind"] == "estimated"
    points = document["points"]
    assert [point["prompt_tokens"] for point in points] == [16, 32, 64]
    for point in points:
        assert point["samples"] == 2
        assert point["energy_j_per_sample"] > 0
        assert point["scope_energy_j_per_sample"] <= point["emax_j"]


def test_compare_gives_no_gap_for_estimated_joules(study: Study, compared: Outcome) -> None:
    document = compared.document
    assert compared.code == 0
    assert document["primary_metric"] == "energy_j_per_sample"
    assert document["energy_kind"] == "estimated"
    assert document["gap"] is None
    assert "estimated" in document["gap_reason"]
    assert document["gap_vs_controls"] is None
    ids = {study.tabs.document["run_id"], study.hest.document["run_id"]}
    assert set(document["metrics"]["energy_j_per_sample"]) == ids
    assert document["best_proposed"]["run_id"] == study.hest.document["run_id"]
    assert document["best_baseline"]["run_id"] == study.tabs.document["run_id"]


def test_compare_writes_csv_and_figures(copied: Study) -> None:
    arguments = ("compare", "--csv", "rows.csv", "--out", "drawn", "--formats", "svg", "--json")
    outcome = run_cli(copied.folder, *arguments)
    assert outcome.code == 0, outcome.err
    rows = (copied.folder / "rows.csv").read_text().splitlines()
    assert len(rows) == 3
    drawn = [Path(path) for path in outcome.document["figures"]]
    assert drawn
    assert all((copied.folder / path).is_file() and path.suffix == ".svg" for path in drawn)
    energy = next(path for path in drawn if path.stem == "comparison_energy")
    assert "estimated" in (copied.folder / energy).read_text()


@pytest.mark.parametrize("method", ["bhsp", "lora", "base"])
def test_the_other_methods_run_too(tmp_path: Path, method: str) -> None:
    outcome = run_cli(tmp_path, "train", "--method", method, *TRIAL, "-q", "--json")
    assert outcome.code == 0, outcome.err
    document = outcome.document
    assert document["method"] == method
    assert document["emax_j"] is None
    assert (document["adapter_parameters"] > 0) == (method != "base")


def test_numbers_are_numbers(study: Study, hardened: Outcome, profiled: Outcome, compared: Outcome) -> None:
    """JSON has no NaN and no infinity."""

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)
        elif isinstance(value, float):
            assert math.isfinite(value)

    for outcome in (study.tabs, study.hest, hardened, profiled, compared):
        walk(outcome.document)


def test_hest_without_a_tabs_run_says_predicted(tmp_path: Path) -> None:
    outcome = run_cli(tmp_path, "train", "--method", "hest", *TRIAL)
    assert outcome.code == 0, outcome.err
    (line,) = [line for line in outcome.out.splitlines() if "E_max is" in line]
    assert "0.6 x TABS, predicted: no comparable tabs run in the store" in line
    assert "predicted: no comparable tabs run" in outcome.err


def test_profile_without_a_run_says_that_it_takes_the_bare_backbone(tmp_path: Path) -> None:
    sweep = ("--seq-len", "32", "--new-tokens", "2", "--repeats", "1")
    outcome = run_cli(tmp_path, "profile", *TINY, *sweep, "--json")
    assert outcome.code == 0, outcome.err
    assert "no hardened run in the store: profiling the bare backbone (base)" in outcome.err
    assert outcome.document["method"] == "base"
    assert outcome.document["profiled_run_id"] is None


def test_compare_without_a_store_says_what_to_type(tmp_path: Path) -> None:
    outcome = run_cli(tmp_path, "compare")
    assert outcome.code == 2
    assert "there is no store runs.duckdb" in outcome.message
    assert "hestctl train --db runs.duckdb" in outcome.message


def test_harden_without_a_run_says_what_to_type(tmp_path: Path) -> None:
    outcome = run_cli(tmp_path, "harden")
    assert outcome.code == 2
    assert "hestctl train --method hest --emax-ratio 0.6" in outcome.message
    assert list(tmp_path.iterdir()) == []
