"""The commands of a report make the settings again that the runs were made with."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from simulated_report import settings_of
from simulated_runs import a_run

from hestctl.compare.commands import FLAGS, command, train_commands
from hestctl.records import Run
from hestctl.settings import flatten, of_profile, profile_names


def run_of(method: str = "hest", number: int = 1, seed: int = 42, **changes: Any) -> Run:
    return a_run(method, number, seed=seed, settings=settings_of(method, seed, **changes))


CHANGES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("tabs", {}),
    ("tabs", {"data__train_samples": None}),  # the nearest profile has a number, which no flag takes back
    ("hest", {"budget__emax_ratio": 0.45, "method__scope": "adapter", "budget__dual": "none"}),
    ("hest", {"budget__emax_j": 12.5, "budget__emax_ratio": None}),
    (
        "hest",
        {"method__layers": "greedy", "method__controller": "unfactorised", "method__precision": "fp16-only"},
    ),
    ("lora", {"backbone__precision": "int8", "backbone__skip_last": 3, "train__learning_rate": 1e-5}),
    ("base", {"generation__batch_size": 4, "generation__num_beams": 4, "energy__lengths": (64, 128)}),
    (
        "bhsp",
        {"data__source": "my articles.jsonl", "data__id_column": "1", "train__gradient_checkpointing": True},
    ),
)


@pytest.mark.parametrize(("method", "changes"), CHANGES)
def test_a_command_makes_the_settings_of_its_run(
    method: str,
    changes: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from hestctl.cli.app import main

    monkeypatch.chdir(tmp_path)
    rows = [{"1": f"{number}", "article": "One. Two.", "highlights": "One."} for number in range(60)]
    (tmp_path / "my articles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_of(method, seed=7, **changes)
    (line,) = train_commands([run], "again.duckdb")
    for name in [name for name in os.environ if name.startswith("HESTCTL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("sys.argv", [*shlex.split(line), "--dry-run", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    told = {key: one["value"] for key, one in json.loads(capsys.readouterr().out)["settings"].items()}
    # What a profile sweeps bears on no training.
    wanted = {key: value for key, value in flatten(run.settings) if not key.startswith("profile.")}
    free = {"db", *(() if method == "hest" else ("budget.emax_ratio",))}
    if wanted["budget.emax_j"] is not None:
        free.add("budget.emax_ratio")
    assert {key: told[key] for key in wanted if key not in free} == {
        key: value for key, value in wanted.items() if key not in free
    }


@pytest.mark.parametrize("profile", profile_names())
def test_the_nearest_profile_is_named(profile: str) -> None:
    settings = of_profile(profile).model_dump(mode="json")
    line = command(a_run("hest", 1, settings=settings), "train", "x.duckdb")
    assert line is not None
    assert f"--profile {profile} " in line
    assert "--set" not in line


def test_calibration_is_told_in_its_own_flags() -> None:
    line = command(run_of("hest", backbone__precision="int8", train__epochs=1), "calibrate", "x.duckdb")
    assert line is not None
    assert "--set backbone.precision=int8" in line
    assert "train." not in line
    assert "--method" not in line


def test_trainings_that_repeat_by_seed_are_a_loop_in_the_order_they_were_begun() -> None:
    runs = [
        run_of(method, number, seed)
        for number, (seed, method) in enumerate(
            (seed, method) for seed in (1, 2, 3) for method in ("tabs", "hest")
        )
    ]
    lines = train_commands(runs, "x.duckdb")
    assert lines[0] == "for seed in 1 2 3; do"
    assert "--method tabs" in lines[1]
    assert "--method hest --emax-ratio 0.6" in lines[2]
    assert lines[3:] == ["done"]
    assert all(line.endswith(' --seed "$seed"') for line in lines[1:3])


def test_a_budget_keeps_the_reference_before_it() -> None:
    """All tabs runs first would make the last of them every budget's reference."""
    runs = [run_of("tabs", 1, 1), run_of("hest", 2, 1), run_of("tabs", 3, 2), run_of("lora", 4, 2)]
    methods = [line.split("--method ")[1].split()[0] for line in train_commands(runs, "x.duckdb")]
    assert methods == ["tabs", "hest", "tabs", "lora"]
    by_method = [run_of("tabs", 1, 1), run_of("tabs", 2, 2), run_of("hest", 3, 1), run_of("hest", 4, 2)]
    lines = train_commands(by_method, "x.duckdb")
    assert [line.split()[0] for line in lines] == ["for", "hestctl", "done", "for", "hestctl", "done"]


def test_settings_that_this_version_cannot_read_are_a_comment() -> None:
    run = replace(run_of(), settings={"backbone": {"name": "x"}}, run_id="old\nrm -rf x")
    (line,) = train_commands([run], "x.duckdb")
    assert line == "# old rm -rf x: its settings are not those of this version"


def test_a_path_is_its_last_part_and_texts_are_quoted() -> None:
    line = command(run_of(data__source="/home/jo/$(x) y", data__id_column="a; b"), "train", "x.duckdb")
    assert line is not None
    words = shlex.split(line)
    assert words[words.index("--data") + 1] == "$(x) y"
    assert "data.id_column=a; b" in words
    assert "/home" not in line


def test_every_flag_is_one_of_train() -> None:
    import typer

    from hestctl.cli.app import app

    train = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    known = {flag for parameter in train.params for flag in parameter.opts}
    assert set(FLAGS.values()) <= known


def test_a_profile_is_read_without_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HESTCTL_TRAIN__EPOCHS", "77")
    assert of_profile("quickstart").train.epochs == 2
