"""Before any work: what is imported, what help says, what a usage error does, what a closed pipe does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli_tools import ESTIMATED, Study, run_cli

import hestctl
from hestctl.errors import Exit

HEAVY = {"torch", "transformers", "accelerate", "plotnine", "duckdb", "pandas", "datasets", "optuna"}

IMPORTED = """
import atexit, sys
atexit.register(lambda: print("modules:", *sorted({name.partition(".")[0] for name in sys.modules})))
sys.argv = ["hestctl", *sys.argv[1:]]
from hestctl.cli.app import main
main()
"""


def imported_by(*arguments: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.partition("modules:")[2].split())


@pytest.mark.parametrize("arguments", ["--help", "compare --help", "train --help", "--version"])
def test_help_imports_nothing_heavy(arguments: str) -> None:
    modules = imported_by(*arguments.split())
    assert "typer" in modules
    assert modules & HEAVY == set()


def test_the_check_sees_what_a_command_imports(study: Study) -> None:
    """So that an empty answer above means something."""
    assert imported_by("runs", "list", "--db", str(study.folder / "runs.duckdb")) & HEAVY == {"duckdb"}


def test_version() -> None:
    outcome = run_cli(Path.cwd(), "--version")
    assert (outcome.code, outcome.out) == (0, f"hestctl {hestctl.__version__}\n")


def test_help_documents_every_exit_code() -> None:
    text = run_cli(Path.cwd(), "--help").out
    told = {int(code) for code in re.findall(r"(?<=[;:] )(\d+) ", " ".join(text.split()))}
    assert told == {int(code) for code in Exit}


@pytest.mark.parametrize("command", ["calibrate", "train", "harden", "profile", "compare", "env", "runs"])
def test_every_command_has_help(command: str) -> None:
    outcome = run_cli(Path.cwd(), command, "--help")
    assert outcome.code == 0
    assert outcome.err == ""
    assert f"hestctl {command}" in outcome.out


def test_help_shows_the_defaults_that_the_profile_does_not() -> None:
    text = " ".join(re.sub("[│]", " ", run_cli(Path.cwd(), "train", "--help").out).split())
    for default in ("0.6", "hest", "quickstart", "runs.duckdb"):
        assert f"[default: {default}]" in text


def test_no_arguments_show_help() -> None:
    outcome = run_cli(Path.cwd())
    assert "Usage" in outcome.out + outcome.err
    assert outcome.code == Exit.USAGE


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("trian",), "Did you mean 'train'?"),
        (("train", "--epoch", "2"), "--epochs"),
        (("train", "--epochs", "two"), "--epochs"),
        (("runs", "show"), "RUN"),
        (("runs", "list", "--limit", "0"), "--limit"),
    ],
)
def test_usage_errors_exit_2_and_write_nothing(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    outcome = run_cli(tmp_path, *arguments)
    assert outcome.code == Exit.USAGE
    assert says in outcome.err
    assert outcome.out == ""
    assert list(tmp_path.iterdir()) == []


def test_dry_run_shows_every_setting_with_its_origin_and_writes_nothing(tmp_path: Path) -> None:
    arguments = ("train", "--dry-run", "--trial", "--lr", "0.5", "--backbone", "tiny", "--weights", "random")
    document = run_cli(tmp_path, *arguments, "--json").document
    settings = document["settings"]
    assert settings["train.learning_rate"] == {"value": 0.5, "origin": "flag"}
    assert settings["train.max_steps"] == {"value": 2, "origin": "--trial"}
    assert settings["backbone.dtype"]["origin"] == "profile quickstart"
    assert settings["method.rank"] == {"value": 16, "origin": "default"}
    assert document["backbone_parameters"] > 0
    assert document["backbone_bytes"] == 4 * document["backbone_parameters"]
    assert document["store"] == str(tmp_path / "runs.duckdb")
    text = run_cli(tmp_path, *arguments).out
    assert "MiB of weights in memory" in text
    assert str(tmp_path / "runs") in text
    assert list(tmp_path.iterdir()) == []


def test_env_looks_and_writes_nothing(tmp_path: Path) -> None:
    seed = {"HESTCTL_TRAIN__SEED": "3"}
    document = run_cli(tmp_path, "env", "--json", environment=seed).document
    assert document["versions"]["hestctl"] == hestctl.__version__
    assert document["meter"]["estimate"].startswith("estimated: ")
    assert document["store"]["runs"] == "no store yet"
    assert document["environment"] == ESTIMATED | seed
    assert run_cli(tmp_path, "env").code == 0
    assert run_cli(tmp_path, "env", "--settings").code == 0
    assert list(tmp_path.iterdir()) == []


def test_runs_of_nothing(tmp_path: Path) -> None:
    for arguments in (("list",), ("list", "--json"), ("show", "nothing"), ("verify",), ("rebuild",)):
        outcome = run_cli(tmp_path, "runs", *arguments)
        assert (outcome.code, outcome.out) == (Exit.USAGE, "")
        assert "record a run first: hestctl train --db runs.duckdb" in outcome.message
    assert list(tmp_path.iterdir()) == []


def test_runs_list_and_show(study: Study) -> None:
    ids = {study.tabs.document["run_id"], study.hest.document["run_id"]}
    listed = run_cli(study.folder, "runs", "list", "--command", "train", "--json").document["runs"]
    assert {run["run_id"] for run in listed} == ids
    only = run_cli(study.folder, "runs", "list", "--method", "tabs", "--limit", "1").out
    assert study.tabs.document["run_id"].rpartition("-")[2] in only
    assert study.hest.document["run_id"].rpartition("-")[2] not in only
    run_id = study.hest.document["run_id"]
    shown = run_cli(study.folder, "runs", "show", run_id, "--json").document
    assert shown["settings"]["method"]["name"] == "hest"
    assert "emax_origin" in run_cli(study.folder, "runs", "show", run_id).out


def test_rebuild_brings_the_index_back(copied: Study) -> None:
    (copied.folder / "runs.duckdb").unlink()
    done = run_cli(copied.folder, "runs", "rebuild", "--json").document
    assert done["runs"] >= 2
    assert done["backup"] is None
    assert run_cli(copied.folder, "runs", "verify").code == 0


def test_verify_names_what_differs(copied: Study) -> None:
    path = copied.run_folder(copied.hest) / "samples.jsonl"
    path.write_text(path.read_text() + "{}\n")
    outcome = run_cli(copied.folder, "runs", "verify")
    assert outcome.code == Exit.STORE
    assert "samples.jsonl differs from its checksum" in outcome.message


def test_a_reader_that_leaves_is_no_error_to_talk_about(study: Study) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "hestctl", "runs", "list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=study.folder,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == Exit.FAILED


def test_a_result_that_cannot_be_written_is_one_message(study: Study) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hestctl", "runs", "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            cwd=study.folder,
            text=True,
            timeout=60,
        )
    assert done.returncode == Exit.FAILED
    assert done.stderr.startswith("error: No space left on device")
    assert "Traceback" not in done.stderr


def test_an_unexpected_error_says_how_to_see_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def burst(*_: object) -> None:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr("hestctl.workflows.doctor.examine", burst)
    outcome = run_cli(tmp_path, "env", "--db", "my runs.duckdb")
    assert outcome.code == Exit.FAILED
    assert "ZeroDivisionError: of all things" in outcome.message
    assert "hestctl --debug env --db 'my runs.duckdb'" in outcome.message
