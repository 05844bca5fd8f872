"""Settings: which source wins, where every value came from, and what a wrong one is told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hestctl.errors import Exit, HestError
from hestctl.settings import (
    MethodSettings,
    Settings,
    from_document,
    keys,
    load,
    of_run,
    profile_names,
    with_values,
)

SEVEN_B = ("llama2-7b-cnndm", "qwen2.5-7b-cnndm")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("HESTCTL_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def profile(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


def refused(profile_name: str = "quickstart", flags: dict[str, Any] | None = None, **names: str) -> str:
    """The message of the usage error that loading raises."""
    with pytest.raises(HestError) as caught:
        load(profile_name, flags, names)
    assert caught.value.exit_code == Exit.USAGE
    assert caught.value.hint
    return caught.value.message


def test_flag_over_environment_over_profile_over_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = profile(tmp_path, "[train]\nepochs = 5\nseed = 6\nlog_steps = 7\n")
    monkeypatch.setenv("HESTCTL_TRAIN__EPOCHS", "8")
    monkeypatch.setenv("HESTCTL_TRAIN__SEED", "9")
    resolved = load(mine, {"train.epochs": 10, "train.patience": None})
    train, origins = resolved.settings.train, resolved.origins
    assert (train.epochs, origins["train.epochs"]) == (10, "flag")
    assert (train.seed, origins["train.seed"]) == (9, "environment")
    assert (train.log_steps, origins["train.log_steps"]) == (7, f"profile {mine}")
    assert (train.patience, origins["train.patience"]) == (3, "default")


def test_every_key_has_an_origin() -> None:
    resolved = load("quickstart")
    assert set(resolved.origins) == set(keys())
    assert resolved.origins["backbone.name"] == "profile quickstart"


def test_the_store_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HESTCTL_DB", "elsewhere/mine.duckdb")
    resolved = load()
    assert resolved.settings.db == Path("elsewhere/mine.duckdb")
    assert resolved.origins["db"] == "environment"


def test_lists_may_be_written_as_in_toml_or_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HESTCTL_SEARCH__TAU", "[0.1, 0.2]")
    monkeypatch.setenv("HESTCTL_SEARCH__BATCH_SIZE", "2,4")
    settings = load("quickstart", {"profile.batch_sizes": "1,4"}).settings
    assert settings.search.tau == (0.1, 0.2)
    assert settings.search.batch_size == (2, 4)
    assert settings.profile.batch_sizes == (1, 4)


def test_the_shipped_profiles() -> None:
    assert profile_names() == [
        "llama2-7b-cnndm",
        "lra-listops",
        "lra-text",
        "quickstart",
        "qwen2.5-7b-cnndm",
        "smollm2-135m-cnndm",
    ]


@pytest.mark.parametrize("name", profile_names())
def test_every_shipped_profile_loads(name: str) -> None:
    resolved = load(name)
    assert resolved.profile == name
    assert from_document(resolved.settings.model_dump(mode="json")) == resolved.settings


@pytest.mark.parametrize("name", SEVEN_B)
def test_the_7b_profiles_have_the_original_hyper_parameters(name: str) -> None:
    s = load(name).settings
    assert s.data.source == "cnn_dailymail"
    assert s.data.max_tokens == 4096
    t = s.train
    assert (t.epochs, t.learning_rate, t.warmup_steps) == (3, 3e-5, 500)
    assert (t.beta1, t.beta2, t.epsilon, t.weight_decay) == (0.9, 0.95, 1e-8, 0.01)
    assert (t.batch_size, t.accumulation, t.clip_norm, t.seed) == (4, 8, 1.0, 42)
    assert (t.save_steps, t.log_steps, t.patience) == (1000, 50, 3)
    assert t.gate_learning_rate >= 1e-3
    assert (s.generation.batch_size, s.generation.num_beams, s.generation.new_tokens) == (4, 4, 128)
    assert (s.method.rank, s.method.controller_width, s.method.tau, s.method.lora_rank) == (16, 32, 0.67, 8)
    assert (s.budget.alpha, s.budget.lambda0) == (0.05, 0.1)


@pytest.mark.parametrize("name", SEVEN_B)
def test_the_7b_profiles_have_the_original_search_spaces(name: str) -> None:
    search = load(name).settings.search
    assert search.learning_rate == (1e-5, 5e-4)
    assert search.controller_width == (16, 32, 64)
    assert search.emax_ratio == (0.4, 0.8)
    assert search.tau == (0.4, 1.0)
    assert search.alpha == (0.01, 0.2)
    assert search.batch_size == (2, 4)
    assert search.accumulation == (4, 8, 16)
    assert search.timeout_min == 360


def test_the_7b_profiles_name_their_models() -> None:
    assert load(SEVEN_B[0]).settings.backbone.name == "meta-llama/Llama-2-7b-chat-hf"
    assert load(SEVEN_B[1]).settings.backbone.name == "Qwen/Qwen2.5-7B-Instruct"


def test_unknown_profile_names_the_nearest() -> None:
    assert "unknown profile 'quikstart'; did you mean 'quickstart'?" in refused("quikstart")


def test_missing_profile_file_names_the_nearest(tmp_path: Path) -> None:
    profile(tmp_path, "")
    message = refused(str(tmp_path / "mime.toml"))
    assert f"{tmp_path}/mime.toml" in message
    assert "did you mean 'mine.toml'?" in message


def test_unknown_key_in_a_profile_names_file_key_and_nearest(tmp_path: Path) -> None:
    path = profile(tmp_path, "[trian]\nepochs = 2\n")
    assert refused(path) == f"unknown key 'trian.epochs' in {path}; did you mean 'train.epochs'?"


def test_unknown_key_by_flag_names_flag_key_and_nearest() -> None:
    message = refused(flags={"train.epoch": 1}, **{"train.epoch": "--set"})
    assert message == "unknown key 'train.epoch' in --set; did you mean 'train.epochs'?"


def test_unknown_variable_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HESTCTL_TRAIN__EPOCH", "1")
    message = refused()
    assert "HESTCTL_TRAIN__EPOCH;" in message
    assert "did you mean 'HESTCTL_TRAIN__EPOCHS'?" in message


def test_reserved_variables_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HESTCTL_CACHE", "/somewhere")
    monkeypatch.setenv("HESTCTL_DEBUG", "1")
    assert load().settings.train.epochs >= 1


def test_unknown_value_names_flag_key_and_nearest() -> None:
    message = refused(flags={"method.name": "hst"}, **{"method.name": "--method"})
    assert message.startswith("method.name: ")
    for part in ("'tabs'", "not 'hst'", "did you mean 'hest'?", "(from --method)"):
        assert part in message


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("HESTCTL_TRAIN__EPOCHS", "0", "train.epochs: Input should be greater than or equal to 1, not '0'"),
        ("HESTCTL_TRAIN__EPOCHS", "many", "train.epochs: Input should be a valid integer"),
        ("HESTCTL_SEARCH__TAU", "low", "search.tau: "),
        ("HESTCTL_SEARCH__TAU", "0.8,0.4", "search.tau: a range is two numbers above 0, the lower one first"),
        ("HESTCTL_SEARCH__ACCUMULATION", "0", "search.accumulation: takes whole numbers of at least 1"),
        ("HESTCTL_PROFILE__BATCH_SIZES", "1,0", "profile.batch_sizes: takes whole numbers of at least 1"),
    ],
)
def test_a_value_out_of_range_names_its_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    message = refused()
    assert message.startswith(says)
    assert message.endswith(f"(from {variable})")


@pytest.mark.parametrize(
    ("meter", "near"),
    [("nvlm", "'nvml'"), ("replay:", "'replay:FILE'"), ("replay", "'replay:FILE'"), ("", None)],
)
def test_an_unknown_meter_names_the_choices(meter: str, near: str | None) -> None:
    message = refused(flags={"energy.meter": meter}, **{"energy.meter": "--meter"})
    choices = "'auto', 'nvml', 'rapl', 'estimate', 'none' or 'replay:FILE'"
    told = f"; did you mean {near}?" if near else ""
    assert message == f"energy.meter: Input should be {choices}, not {meter!r}{told} (from --meter)"


@pytest.mark.parametrize("meter", ["auto", "nvml", "rapl", "estimate", "none", "replay:C:\\a b.jsonl"])
def test_every_meter_is_accepted_and_recorded(meter: str) -> None:
    settings = load("quickstart", {"energy.meter": meter}).settings
    assert settings.energy.meter == meter
    assert from_document(settings.model_dump(mode="json")) == settings


def test_a_value_out_of_range_names_its_file(tmp_path: Path) -> None:
    path = profile(tmp_path, "[method]\nrank = 0\n")
    assert refused(path) == f"method.rank: Input should be greater than or equal to 1, not 0 (from {path})"


def test_several_wrong_values_are_told_at_once(tmp_path: Path) -> None:
    message = refused(profile(tmp_path, "[train]\nepochs = 0\nseed = -1\n"))
    assert "train.epochs" in message
    assert "train.seed" in message


def test_values_that_exclude_each_other_name_both() -> None:
    message = refused(flags={"data.max_tokens": 50})
    assert "data.max_answer_tokens = 96" in message
    assert "data.max_tokens = 50" in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"[train]\nepochs = = 2\n", "line 2"),
        (b"[train\n", "line 1"),
        (b"[train]\nname = '\xff'\n", "not valid TOML"),
    ],
)
def test_malformed_toml_names_file_and_line(tmp_path: Path, text: bytes, says: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(text)
    message = refused(str(path))
    assert str(path) in message
    assert says in message


def test_with_values_changes_a_copy() -> None:
    before = load().settings
    after = with_values(before, {"train.epochs": 7, "search.trials": 2})
    assert (after.train.epochs, after.search.trials) == (7, 2)
    assert before.train.epochs != 7
    assert after.data == before.data


def test_with_values_checks_them() -> None:
    with pytest.raises(HestError, match=r"method\.tau: Input should be greater than 0") as caught:
        with_values(load().settings, {"method.tau": -1.0})
    assert caught.value.exit_code == Exit.USAGE


def test_from_document_takes_nothing_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    document = load().settings.model_dump(mode="json")
    monkeypatch.setenv("HESTCTL_TRAIN__EPOCHS", "77")
    assert from_document(document).train.epochs == document["train"]["epochs"]


def test_from_document_names_what_no_longer_fits() -> None:
    document = load().settings.model_dump(mode="json")
    with pytest.raises(HestError, match=r"train\.momentum: Extra inputs"):
        from_document({**document, "train": {**document["train"], "momentum": 0.9}})
    del document["energy"]
    with pytest.raises(HestError, match="no section 'energy'"):
        from_document(document)


def test_of_run_keeps_the_run_but_for_flags_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = load(
        "llama2-7b-cnndm", {"method.rank": 4, "budget.emax_ratio": 0.5, "energy.meter": "nvml"}
    ).settings
    monkeypatch.setenv("HESTCTL_GENERATION__NUM_BEAMS", "2")
    call = load("quickstart", {"budget.emax_ratio": 0.7, "db": Path("other.duckdb")})
    settings = of_run(call, recorded.model_dump(mode="json"))
    assert settings.method == recorded.method
    assert settings.backbone == recorded.backbone  # the profile of the call does not count
    assert settings.budget.emax_ratio == 0.7
    assert settings.generation.num_beams == 2
    # The meter, the sweep and the store are matters of the call.
    assert settings.energy.meter == "auto"
    assert settings.profile == call.settings.profile
    assert settings.db == Path("other.duckdb")


def test_a_ratio_given_now_replaces_joules_recorded_then() -> None:
    recorded = load("quickstart", {"budget.emax_j": 0.5}).settings
    settings = of_run(load("quickstart", {"budget.emax_ratio": 0.7}), recorded.model_dump(mode="json"))
    assert (settings.budget.emax_ratio, settings.budget.emax_j) == (0.7, None)
    kept = of_run(load("quickstart"), recorded.model_dump(mode="json"))
    assert kept.budget.emax_j == 0.5


def test_the_budget_of_the_stronger_source_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HESTCTL_BUDGET__EMAX_J", "3")
    assert load().settings.budget.emax_j == 3.0
    resolved = load("quickstart", {"budget.emax_ratio": 0.5})
    assert (resolved.settings.budget.emax_ratio, resolved.settings.budget.emax_j) == (0.5, None)
    assert resolved.origins["budget.emax_j"] == "flag"


def test_one_source_cannot_give_two_budgets() -> None:
    message = refused(flags={"budget.emax_ratio": 0.5, "budget.emax_j": 1.0})
    assert "budget.emax_ratio" in message
    assert "budget.emax_j" in message


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        MethodSettings().rank = 3  # type: ignore[misc]
    assert Settings.model_config["frozen"]
