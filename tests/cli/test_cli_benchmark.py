"""``profile --method``: variants in turns, a run each, with their engine and precision recorded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cli_tools import TINY, Study, files_of, lines_of, run_cli

from hestctl.errors import Exit

SWEEP = (
    *("profile", *TINY, "--seq-len", "32", "--new-tokens", "4", "--repeats", "2"),
    *("--set", "method.scope=adapter"),
)
VARIANTS = "base,tabs,hest+int8,base+transformers"


@pytest.fixture(scope="module")
def benchmarked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    folder = tmp_path_factory.mktemp("benchmark")
    outcome = run_cli(folder, *SWEEP, "--method", VARIANTS, "--num-beams", "1,2", "-q", "--json")
    assert outcome.code == 0, outcome.err
    return folder, outcome.document


def test_every_variant_is_measured_at_every_point(benchmarked: tuple[Path, dict[str, object]]) -> None:
    _, document = benchmarked
    rows = document["rows"]
    assert isinstance(rows, list)
    points = {(row["variant"], row["prompt_tokens"], row["num_beams"]) for row in rows}
    assert points == {(v, p, b) for v in VARIANTS.split(",") for p in (16, 32) for b in (1, 2)}
    for row in rows:
        assert row["samples"] == 2
        assert min(row["prefill_s"], row["latency_s"]) > 0
        assert row["prefill_j"] + row["decode_j"] == pytest.approx(row["energy_j"])
        assert (row["energy_ratio_to_first"] == 1) == (row["variant"] == "base")
    assert document["energy_kind"] == "estimated"


def test_each_run_names_its_engine_and_precision(benchmarked: tuple[Path, dict[str, object]]) -> None:
    folder, document = benchmarked
    run_ids = document["run_ids"]
    assert isinstance(run_ids, list)
    shown = [run_cli(folder, "runs", "show", run_id, "--json").document for run_id in run_ids]
    found = [(run["method"], run["engine"], run["settings"]["backbone"]["precision"]) for run in shown]
    assert found == [
        ("base", "hestctl", "full"),
        ("tabs", "hestctl", "full"),
        ("hest", "hestctl", "int8"),
        ("base", "transformers", "full"),
    ]
    for run_id, (_, engine, _) in zip(run_ids, found, strict=True):
        samples = lines_of(folder / "runs" / run_id, "samples")
        assert {sample["engine"] for sample in samples} == {engine}
        assert {sample["phase_method"] for sample in samples} == {"subtracted"}
        assert len(samples) == 2 * 2 * 2
        phases = [window["phase"] for window in lines_of(folder / "runs" / run_id, "windows")]
        assert phases.count("prefill") == phases.count("generation") == 8


def test_repetitions_go_forwards_and_backwards(benchmarked: tuple[Path, dict[str, object]]) -> None:
    folder, document = benchmarked
    run_ids = document["run_ids"]
    assert isinstance(run_ids, list)
    begun = []
    for place, run_id in enumerate(run_ids):
        windows = lines_of(folder / "runs" / run_id, "windows")
        begun += [(window["start_s"], place) for window in windows if window["phase"] == "generation"]
    order = [place for _, place in sorted(begun)]
    assert order[:8] == [0, 1, 2, 3, 3, 2, 1, 0]


def test_a_trained_run_is_taken_where_there_is_one(copied: Study) -> None:
    outcome = run_cli(copied.folder, *SWEEP, "--method", "base,hest", "--repeats", "1")
    assert outcome.code == 0, outcome.err
    assert f"hest: adapters and plan of run {copied.hest.document['run_id']}" in outcome.out
    assert re.search(r"J a sample", outcome.out)
    assert "estimated" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--method", "base,other"), "--method 'other': no such method"),
        (("--method", "lora"), "merged: it costs what base costs"),
        (("--method", "base,base"), "names a variant twice"),
        (("--method", "base+int4"), "there is no +int4"),
        (("--method", "base", "--num-beams", "1,x"), "--num-beams takes whole numbers"),
        (("--num-beams", "1,2"), "one number without --method"),
        (("--method", "base", "--run", "train-x"), "exclude each other"),
        (("--method", "base+int8+transformers"), "only hestctl's engine saves joules by blocks in int8"),
    ],
)
def test_what_cannot_be_benchmarked(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    outcome = run_cli(tmp_path, *SWEEP, *arguments, "-q")
    assert outcome.code == Exit.USAGE, outcome.err
    assert says in outcome.message
    assert not [name for name in files_of(tmp_path) if "samples" in name]
