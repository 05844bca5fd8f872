"""Scope network end to end: the joules of whole generations are the budget, blocks are what is chosen.

Calibration is real, its joules are not (``known_joules``).
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_tools import TINY, Outcome, Study, lines_of, run_cli

from hestctl.calibration import measure
from hestctl.energy.model import EnergyModel, Terms
from hestctl.errors import Exit
from hestctl.model.backbone import tiny_backbone
from hestctl.records import FULL, INT8, OFF, BlockStates

SMALL = (
    *(*TINY, "-q", "--json", "--new-tokens", "4", "--max-tokens", "220", "--set", "energy.lengths=16,128"),
    *("--set", "data.train_samples=4", "--set", "data.validation_samples=2", "--set", "data.test_samples=2"),
    *("--epochs", "4", "--set", "train.batch_size=1", "--set", "train.accumulation=1"),
    *("--set", "budget.tighten=0.2", "--set", "budget.settle=0.25"),
)
"""16 steps; blocks settle after the fourth."""
HEST = ("train", "--method", "hest", *SMALL)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory, known_joules: None) -> Study:
    """To be read only."""
    folder = tmp_path_factory.mktemp("network")
    tabs = run_cli(folder, "train", "--method", "tabs", *SMALL)
    hest = run_cli(folder, *HEST, "--emax-ratio", "0.6")
    assert (tabs.code, hest.code) == (0, 0), tabs.err + hest.err
    return Study(folder, tabs, hest)


@pytest.fixture
def place(network: Study, tmp_path: Path) -> Path:
    """The same in a folder of the test's own."""
    shutil.copytree(network.folder, tmp_path / "study")
    return tmp_path / "study"


def folder_of(place: Path, outcome: Outcome) -> Path:
    assert outcome.code == 0, outcome.err
    return place / "runs" / str(outcome.document["run_id"])


def plan_of(place: Path, outcome: Outcome) -> dict[str, Any]:
    document = json.loads((folder_of(place, outcome) / "plan.json").read_text())
    assert isinstance(document, dict)
    return document


def blocks_of(plan: dict[str, Any]) -> BlockStates:
    return BlockStates(tuple(plan["blocks"]["attention"]), tuple(plan["blocks"]["mlp"]))


def within(folder: Path) -> list[dict[str, Any]]:
    samples = lines_of(folder, "samples")
    assert len(samples) == 2
    assert all(0 < sample["scope_energy_j"] <= sample["emax_j"] for sample in samples)
    return samples


def test_every_sample_is_within_what_its_blocks_were_chosen_for(network: Study) -> None:
    plan = plan_of(network.folder, network.hest)
    states = blocks_of(plan)
    assert (plan["scope"], states.layers, states.all_full) == ("network", 2, False)
    samples = within(network.run_folder(network.hest))
    calibration = json.loads((network.run_folder(network.tabs) / "calibration.json").read_text())
    whole = EnergyModel.from_dict(calibration["table"]["model"])
    for sample in samples:
        base, tabs = whole.generation(1, 1, "ordinal", states), whole.generation(1, 1, "linear", None)
        assert isinstance(base, Terms)
        assert isinstance(tabs, Terms)
        lengths = sample["prompt_tokens"], sample["new_tokens"]
        directions_j = 1e-8 * sample["directions_int8"] + 2e-8 * sample["directions_full"]
        assert sample["scope_energy_j"] == pytest.approx(base.total_j(*lengths) + directions_j)
        # E_max is 0.6 of what TABS spends at these very lengths; half of its directions or less are open.
        most = 0.6 * (tabs.total_j(*lengths) + 32 * 2e-8 * sum(lengths))
        assert 0.6 * tabs.total_j(*lengths) < sample["emax_j"] < most
    assert network.hest.document["hardened_over_emax"] <= 1
    assert network.hest.document["over_budget_share"] == 0
    run = json.loads((network.run_folder(network.hest) / "run.json").read_text())
    mine, theirs = (
        sum(row["scope_energy_j"] for row in lines_of(network.run_folder(one), "samples"))
        for one in (network.hest, network.tabs)
    )
    assert run["summary"]["scope_energy_over_reference"] == pytest.approx(mine / theirs)


def test_training_tells_how_its_blocks_settled(network: Study) -> None:
    run = json.loads((network.run_folder(network.hest) / "run.json").read_text())
    told = run["summary"]["settlement"]
    assert told["step"] == 5
    assert told["settled_over_emax"] <= 1 < told["decided_over_emax"]
    assert told["loss"] <= told["loss_before"]
    steps = [row for row in lines_of(network.run_folder(network.hest), "steps") if row["split"] == "train"]
    assert len(steps) == 16
    assert all(row["energy_ratio"] <= 1 for row in steps if row["step"] > 5)
    states = blocks_of(plan_of(network.folder, network.hest))
    # Nothing that the directions do is dear enough for repair to change what training settled.
    assert run["hardened_ratio"] == pytest.approx(steps[-1]["energy_ratio"], abs=0.05)
    assert OFF in states.attention + states.mlp or states.uses_int8


def test_explain_has_a_row_for_every_layer_with_the_states_of_both_blocks(place: Path) -> None:
    outcome = run_cli(place, "harden", "--explain", "-q")
    assert outcome.code == 0, outcome.err
    (folder,) = (place / "runs").glob("harden-*")
    states = blocks_of(json.loads((folder / "plan.json").read_text()))
    table = outcome.out.split("layers: attention / MLP")[1].split("scores are")[0]
    rows = re.findall(r"│ (\d+) +│ +(\w+) / (\w+) │", table)
    names = ("off", "int8", "full")
    assert rows == [
        (str(layer), names[a], names[m])
        for layer, (a, m) in enumerate(zip(states.attention, states.mlp, strict=True))
    ]


def test_a_ratio_out_of_reach_ends_before_any_step_and_names_the_least(place: Path) -> None:
    before = set((place / "runs").iterdir())
    outcome = run_cli(place, *HEST, "--emax-ratio", "0.01")
    assert outcome.code == Exit.OVER_BUDGET
    assert "the network with all blocks off" in outcome.message
    least = re.search(r"--emax-ratio (\S+) is the least reachable here", outcome.message)
    assert least is not None
    (made,) = set((place / "runs").iterdir()) - before
    assert not (made / "steps.jsonl").exists() or lines_of(made, "steps") == []
    assert not (made / "checkpoints").exists()
    # What is named can be had, and nothing much below it.
    reached = run_cli(place, *HEST, "--emax-ratio", least[1], "--max-steps", "1")
    within(folder_of(place, reached))
    missed = run_cli(place, *HEST, "--emax-ratio", str(0.98 * float(least[1])), "--max-steps", "1")
    assert missed.code == Exit.OVER_BUDGET


def test_greedy_blocks_are_fixed_before_the_first_step(place: Path) -> None:
    outcome = run_cli(place, *HEST, "--emax-ratio", "0.6", "--set", "method.layers=greedy")
    folder = folder_of(place, outcome)
    within(folder)
    assert not blocks_of(plan_of(place, outcome)).all_full
    steps = [row for row in lines_of(folder, "steps") if row["split"] == "train"]
    assert max(row["energy_ratio"] for row in steps) <= 1
    assert "settlement" not in json.loads((folder / "run.json").read_text())["summary"]


@pytest.mark.parametrize(
    ("control", "blocks"),
    [
        (("--backbone-precision", "int8"), BlockStates.uniform(2, INT8)),
        (("--set", "backbone.skip_last=1"), BlockStates((FULL, OFF), (FULL, OFF))),
    ],
)
def test_controls_keep_their_states_and_are_held_to_the_budget(
    place: Path, control: tuple[str, ...], blocks: BlockStates
) -> None:
    outcome = run_cli(place, *HEST, "--emax-ratio", "0.8", *control)
    assert blocks_of(plan_of(place, outcome)) == blocks
    within(folder_of(place, outcome))
    too_much = run_cli(place, *HEST, "--emax-ratio", "0.3", *control)
    assert too_much.code == Exit.OVER_BUDGET
    assert "its blocks as the settings fix them" in too_much.message


def test_spending_all_keeps_blocks_that_useful_leaves_in_int8(place: Path) -> None:
    """Of random weights nothing is known: int8 counts as harm, so both spend what there is."""
    shares = []
    for spend in ("useful", "all"):
        outcome = run_cli(place, *HEST, "--emax-ratio", "0.9", "--set", f"budget.spend={spend}")
        within(folder_of(place, outcome))
        shares.append(outcome.document["hardened_over_emax"])
    assert shares[0] == pytest.approx(shares[1], abs=0.02)


def test_a_plan_for_another_table_or_backbone_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = ("profile", "-q", "--seq-len", "32", "--new-tokens", "2", "--repeats", "1")
    loose = ("--set", "profile.precision=0.9")
    assert run_cli(place, *profile, *loose).code == 0
    run_id = next((place / "runs").glob("train-hest-*")).name
    model = tiny_backbone(seed=1)
    model.model.save_pretrained(tmp_path / "other")
    model.tokenizer.save_pretrained(tmp_path / "other")
    trained = ("--backbone", str(tmp_path / "other"), "--weights", "pretrained")
    other = run_cli(place, *profile, "--run", run_id, *trained)
    assert other.code == Exit.USAGE
    assert "trained on another backbone" in other.message
    monkeypatch.setattr(measure, "on_offer", lambda device: "another kernel")
    renewed = run_cli(place, "calibrate", *TINY, "-q", "--lengths", "16,64")
    assert renewed.code == 0, renewed.err
    outcome = run_cli(place, *profile, *loose)
    assert outcome.code == Exit.USAGE
    assert "was made for another energy table" in outcome.message
    assert f"hestctl harden --run {run_id}" in outcome.message
    assert run_cli(place, "harden", "--run", run_id, "-q").code == 0
    assert run_cli(place, *profile, *loose).code == 0
