"""``--meter replay:FILE``: a trace's joules are called estimated, and their absence has its reason."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import pytest
from cli_tools import TINY, Outcome, Study, files_of, lines_of, run_cli

from hestctl.errors import Exit

TRACES = Path(__file__).parents[1] / "energy" / "traces"
HEADER = {
    "hestctl_trace": 1,
    "origin": "recorded",
    "note": "450 W",
    "counter": "NVML total energy",
    "device_name": "NVIDIA H100",
    "device_uuid": "GPU-1",
    "driver": "580.1",
    "step_s": 0.1,
    "max_w": 875.0,
}


def trace_of(folder: Path, seconds: float) -> str:
    """A trace of 450 W, as ``--meter`` takes it; longer than any command here, or over at once."""
    rows = [HEADER, *([index / 10, 45.0 * index] for index in range(round(10 * seconds)))]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "replay:t.jsonl"


def profile(folder: Path, *arguments: str) -> Outcome:
    """One sample of the bare backbone, within a bound that takes a fraction of a second to reach."""
    sweep = ("--seq-len", "16", "--new-tokens", "2", "--repeats", "1", "--set", "profile.precision=0.9")
    return run_cli(folder, "profile", *TINY, *sweep, *arguments)


def run_row(folder: Path) -> tuple[object, ...] | None:
    with duckdb.connect(str(folder / "runs.duckdb"), read_only=True) as con:
        return con.execute("SELECT meter, energy_kind, device_name, device_uuid FROM runs").fetchone()


def test_joules_of_a_replay_are_estimated_and_name_their_trace(tmp_path: Path) -> None:
    outcome = profile(tmp_path, "--meter", trace_of(tmp_path, 1800))
    assert outcome.code == 0, outcome.err
    assert "estimated" in outcome.out
    assert "measured" not in outcome.out.replace("not measured", "")
    name = "replay of t.jsonl (recorded, NVML total energy)"
    assert f"meter: {name} on NVIDIA H100 (replayed); joules are estimated" in outcome.err
    row = run_row(tmp_path)
    assert row is not None
    assert row[:3] == (name, "estimated", "NVIDIA H100 (replayed)")
    assert str(row[3]).startswith("replay-")
    (folder,) = (tmp_path / "runs").iterdir()
    (sample,) = lines_of(folder, "samples")
    assert sample["energy_kind"] == "estimated"
    assert sample["energy_j"] > 0
    assert sample["energy_error_j"] > 0, "unlike nominal watts, steps have a bound"


def test_after_the_trace_joules_are_not_measured(tmp_path: Path) -> None:
    outcome = profile(tmp_path, "--meter", trace_of(tmp_path, 0.1))
    assert outcome.code == 0, outcome.err
    assert "not measured" in outcome.out
    assert "left out of the means of joules: 1 of 1 samples: the trace ends after 0.1 s" in outcome.out
    (folder,) = (tmp_path / "runs").iterdir()
    (sample,) = lines_of(folder, "samples")
    assert (sample["energy_j"], sample["energy_kind"], sample["energy_valid"]) == (None, "none", False)
    assert sample["energy_reason"] == "the trace ends after 0.1 s"


@pytest.mark.parametrize(
    ("meter", "code", "says"),
    [
        ("replay:nowhere.jsonl", Exit.USAGE, "the trace nowhere.jsonl cannot be read: No such file"),
        ("replay:torn.jsonl", Exit.USAGE, "torn.jsonl, line 2: not valid JSON: '[0.5'"),
        ("replay:", Exit.USAGE, "did you mean 'replay:FILE'? (from --meter)"),
        (f"replay:{TRACES}/simulated-h100-mig.jsonl", Exit.NO_DEVICE, "cannot serve: MIG is enabled"),
    ],
)
def test_a_trace_that_cannot_be_played(tmp_path: Path, meter: str, code: Exit, says: str) -> None:
    (tmp_path / "torn.jsonl").write_text(json.dumps(HEADER) + "\n[0.5")
    before = files_of(tmp_path)
    outcome = profile(tmp_path, "--meter", meter, "-q")
    assert (outcome.code, outcome.out) == (code, "")
    assert says in outcome.message
    assert "hint: " in outcome.message
    assert files_of(tmp_path) == before


def test_a_plan_for_a_real_device_is_not_run_under_a_replay(copied: Study) -> None:
    outcome = run_cli(copied.folder, "profile", "-q", "--meter", trace_of(copied.folder, 1))
    assert outcome.code == Exit.USAGE
    assert "not NVIDIA H100 (replayed)" in outcome.message
