"""Input that cannot be used: one message, the documented exit code, nothing written and nothing lost."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import duckdb
import pytest
from cli_tools import TINY, TRIAL, Study, files_of, run_cli

from hestctl.errors import Exit
from hestctl.store.store import Store

TRAIN = ("train", "--method", "tabs", *TRIAL, "-q")


def refused(folder: Path, *arguments: str, code: Exit, says: tuple[str, ...]) -> None:
    before = files_of(folder)
    outcome = run_cli(folder, *arguments)
    assert outcome.code == code, outcome.err
    for part in says:
        assert part in outcome.message
    assert outcome.out == ""
    assert files_of(folder) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--method", "hst"), ("'hst'", "did you mean 'hest'?", "(from --method)")),
        (("--profile", "quikstart"), ("'quikstart'", "did you mean 'quickstart'?")),
        (("--profile", "mine.toml"), ("no profile file at mine.toml",)),
        (("--set", "train.epoch=1"), ("'train.epoch' in --set", "did you mean 'train.epochs'?")),
        (("--set", "train.epochs"), ("--set takes KEY=VALUE", "train.epochs")),
        (("--lr", "-1"), ("train.learning_rate", "(from --lr)")),
        (("--dtype", "float8"), ("backbone.dtype", "'float8'", "(from --dtype)")),
        (("--batch-size", "0"), ("train.batch_size", "(from --batch-size)")),
        (("--emax", "1", "--emax-ratio", "0.5"), ("budget.emax_ratio", "budget.emax_j")),
        (("--emax-ratio", "0.6"), ("tabs has no budget", "leave them out")),
        (("--backbone", "tini"), ("'tini'", "did you mean 'tiny'?")),
        (("--weights", "pretrained"), ("'tiny' names an architecture, not trained weights",)),
        (("--max-tokens", "110"), ("data.max_tokens = 110",)),
        (("--data", "nowhere.jsonl"), ("no file at nowhere.jsonl",)),
        (("--data", "cnn_daily"), ("unknown data source", "did you mean 'cnn_dailymail'?")),
        (("--run", "train-1"), ("--resume",)),
        (("--resume",), ("nothing to resume", "leave out --resume")),
        (("--resume", "--run", "train-1"), ("there is no store runs.duckdb",)),
        (("--reference", "train-1", "--method", "hest"), ("there is no store runs.duckdb",)),
        (("--db", "runs"), ("cannot name a store", "runs.duckdb")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_settings_that_cannot_be(tmp_path: Path, arguments: tuple[str, ...], says: tuple[str, ...]) -> None:
    refused(tmp_path, *TRAIN, *arguments, code=Exit.USAGE, says=says)


def test_an_unknown_variable(tmp_path: Path) -> None:
    outcome = run_cli(tmp_path, *TRAIN, environment={"HESTCTL_TRAIN__EPOCH": "1"})
    assert outcome.code == Exit.USAGE
    assert "did you mean 'HESTCTL_TRAIN__EPOCHS'?" in outcome.message


ROW = json.dumps({"id": "a", "article": "One sentence. And one more.", "highlights": "One."})


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("torn.jsonl", f'{ROW}\n{{"id": "b", "article": \n', ("torn.jsonl, line 2", "not valid JSON")),
        ("list.jsonl", f"{ROW}\n[1, 2]\n", ("list.jsonl, line 2", "a JSON object is expected")),
        (
            "columns.jsonl",
            ROW.replace('"article"', '"artikel"'),
            ("columns.jsonl", "no column 'article'", "did you mean 'artikel'?", "data.article_column"),
        ),
        ("empty.jsonl", "", ("empty.jsonl", "holds no rows")),
        ("one.jsonl", ROW, ("one.jsonl", "no rows for the", "split")),
        ("blank.jsonl", ROW.replace("One.", " "), ("blank.jsonl, line 1", "'highlights' is empty")),
        ("twice.jsonl", f"{ROW}\n{ROW}\n", ("twice.jsonl", "duplicate ids: 'a' (lines 1 and 2)")),
        ("cells.csv", "id,article,highlights\na,b\n", ("cells.csv, line 2", "2 cells")),
        ("text.txt", "words", ("text.txt is not a kind of file",)),
    ],
)
def test_data_that_cannot_be_used(tmp_path: Path, name: str, text: str, says: tuple[str, ...]) -> None:
    (tmp_path / name).write_text(text)
    refused(tmp_path, *TRAIN, "--data", name, code=Exit.USAGE, says=says)


def test_bad_data_are_told_before_the_backbone_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hestctl.workflows.train.load_backbone", lambda *_, **__: pytest.fail("loaded"))
    refused(tmp_path, *TRAIN, "--data", "nowhere.jsonl", code=Exit.USAGE, says=("nowhere.jsonl",))
    refused(tmp_path, *TRAIN, "--meter", "nvml", code=Exit.NO_DEVICE, says=("nvml",))


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    arguments = (*TRAIN, "--backbone", "no-such-org/no-such-model", "--weights", "pretrained")
    says = ("cannot reach the model hub for no-such-org/no-such-model", "HF_HUB_OFFLINE is set")
    refused(tmp_path, *arguments, code=Exit.FAILED, says=says)


@pytest.mark.parametrize("command", ["train", "calibrate", "profile"])
def test_a_meter_demanded_that_is_not_there(tmp_path: Path, command: str) -> None:
    arguments = (command, *TINY, "--device", "cpu", "--meter", "nvml", "-q")
    refused(tmp_path, *arguments, code=Exit.NO_DEVICE, says=("the meter 'nvml' cannot serve", "--meter none"))


def test_a_device_demanded_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused(tmp_path, *TRAIN, "--device", "cuda", code=Exit.NO_DEVICE, says=("no CUDA device",))


@pytest.fixture
def holder(copied: Study) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of the study's store."""
    script = (
        "import sys; from pathlib import Path; from hestctl.store.store import Store\n"
        f"with Store(Path({str(copied.folder / 'runs.duckdb')!r})).locked():\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


COMMANDS = {
    "train": TRAIN,
    "resume": (*TRAIN, "--resume"),
    "harden": ("harden", "-q"),
    "profile": ("profile", "-q"),
    "calibrate": ("calibrate", *TINY, "-q"),
    "compare": ("compare", "--no-figures"),
    "runs list": ("runs", "list"),
    "runs show": ("runs", "show", "train-1"),
    "runs verify": ("runs", "verify"),
}


def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for a store no longer than a test should."""
    monkeypatch.setattr(Store.__init__, "__defaults__", (0.05,))
    monkeypatch.setattr("hestctl.store.queries.connect.__defaults__", (0.05,))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_locked_store(
    copied: Study, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    briefly(monkeypatch)
    says = ("runs.duckdb is locked by process", str(holder.pid), "wait for it to end")
    refused(copied.folder, *COMMANDS[name], code=Exit.STORE, says=says)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_newer_store(copied: Study, name: str) -> None:
    with duckdb.connect(str(copied.folder / "runs.duckdb")) as con:
        con.execute("INSERT INTO migrations VALUES (99, 'later', '2030-01-01', '9.9.9')")
    says = ("has schema 99, written by hestctl 9.9.9", "hestctl>=9.9.9")
    refused(copied.folder, *COMMANDS[name], code=Exit.STORE, says=says)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_store_that_is_no_database(copied: Study, name: str) -> None:
    (copied.folder / "runs.duckdb").write_text("these are not the runs that you are looking for")
    says = ("runs.duckdb cannot be used", "hestctl runs rebuild --db")
    refused(copied.folder, *COMMANDS[name], code=Exit.STORE, says=says)


def test_a_database_of_somebody_else(tmp_path: Path) -> None:
    with duckdb.connect(str(tmp_path / "runs.duckdb")) as con:
        con.execute("CREATE TABLE recipes (name VARCHAR)")
    refused(tmp_path, *TRAIN, code=Exit.STORE, says=("not one that hestctl wrote", "--db"))


def test_a_disk_that_is_full_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hestctl.store.files.shutil.disk_usage", lambda _: SimpleNamespace(total=1, used=1, free=1000)
    )
    refused(tmp_path, *TRAIN, code=Exit.FAILED, says=("no space for", "bytes are needed, 1,000 are free"))


def test_a_disk_that_is_full_at_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hestctl.training import checkpoint

    save, saved = checkpoint.save_file, []

    def save_once(tensors: object, path: Path, **more: object) -> None:
        saved.append(path)
        if len(saved) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, **more)

    arguments = (*TRAIN, "--set", "train.save_steps=1")
    with monkeypatch.context() as patch:
        patch.setattr("hestctl.training.checkpoint.save_file", save_once)
        outcome = run_cli(tmp_path, *arguments)
    assert outcome.code == Exit.FAILED
    assert "No space left on device" in outcome.message
    assert "bytes" in outcome.message
    (run,) = run_cli(tmp_path, "runs", "list", "--json").document["runs"]
    assert run["status"] == "failed"
    checkpoints = tmp_path / "runs" / run["run_id"] / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000001"]
    assert run_cli(tmp_path, "runs", "verify").code == 0
    done = run_cli(tmp_path, *arguments, "--resume", "--json")
    assert (done.code, done.document["run_id"]) == (0, run["run_id"])


def test_a_run_without_its_files(copied: Study) -> None:
    folder = copied.run_folder(copied.hest)
    (folder / "hardened.safetensors").write_bytes(b"torn")
    outcome = run_cli(copied.folder, "profile", "--run", folder.name, "-q")
    assert outcome.code == Exit.FAILED
    assert "hardened.safetensors is not a whole safetensors file" in outcome.message
    (folder / "plan.json").write_text("{}")
    outcome = run_cli(copied.folder, "profile", "--run", folder.name, "-q")
    assert "this plan has version None" in outcome.message
    assert "hestctl harden" in outcome.message


def test_a_reference_that_may_not_be_compared(copied: Study) -> None:
    tabs = copied.tabs.document["run_id"]
    arguments = ("train", "--method", "hest", *TRIAL, "-q", "--reference", tabs, "--num-beams", "2")
    outcome = run_cli(copied.folder, *arguments)
    assert outcome.code == Exit.USAGE
    assert f"run {tabs} cannot be the reference: num_beams 1 is not 2" in outcome.message


@pytest.mark.parametrize("command", ["harden", "profile"])
def test_a_run_that_is_not_there(copied: Study, command: str) -> None:
    nearly = copied.hest.document["run_id"][:-1] + "x"
    refused(
        copied.folder,
        *(command, "--run", nearly, "-q"),
        code=Exit.USAGE,
        says=(f"there is no run '{nearly}'", copied.hest.document["run_id"]),
    )


def test_a_run_with_nothing_to_harden(tmp_path: Path) -> None:
    run_id = run_cli(tmp_path, "train", "--method", "base", *TRIAL, "-q", "--json").document["run_id"]
    refused(
        tmp_path,
        *("harden", "--run", run_id),
        code=Exit.USAGE,
        says=(f"run {run_id} has nothing to harden", "hest, tabs or bhsp"),
    )


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--theme", "blue"), Exit.USAGE, ("unknown theme 'blue'", "light")),
        (("--formats", "gif"), Exit.USAGE, ("unknown figure format 'gif'", "png")),
        (("--method", "hst", "--no-figures"), Exit.USAGE, ("hest on embedded",)),
        (("--margin", "-1", "--no-figures"), Exit.USAGE, ("margin",)),
        (("--db", "nowhere*.duckdb"), Exit.USAGE, ("nowhere*.duckdb", "runs.duckdb")),
        (("--csv", "/proc/nowhere/rows.csv", "--no-figures"), Exit.USAGE, ("/proc/nowhere",)),
    ],
)
def test_comparisons_that_cannot_be(
    copied: Study, arguments: tuple[str, ...], code: Exit, says: tuple[str, ...]
) -> None:
    refused(copied.folder, "compare", *arguments, code=code, says=says)


def test_a_prompt_longer_than_the_context(copied: Study) -> None:
    outcome = run_cli(copied.folder, "profile", "--seq-len", "4096", "--new-tokens", "4", "-q")
    assert outcome.code == Exit.USAGE
    assert "4100 tokens are more than tiny's context of 2048" in outcome.message
    assert "--seq-len" in outcome.message


def test_a_folder_of_runs_without_a_store_is_rebuilt_by_the_command_the_message_names(copied: Study) -> None:
    """What the message of a damaged store says to type brings everything back."""
    ids = {path.name for path in (copied.folder / "runs").iterdir()}
    shutil.copy(copied.folder / "runs.duckdb", copied.folder / "kept")
    (copied.folder / "runs.duckdb").write_bytes(b"damaged")
    message = run_cli(copied.folder, "runs", "list").message
    command = message.partition("hestctl ")[2].split()
    rebuilt = run_cli(copied.folder, *command, "--json").document
    assert rebuilt["runs"] == len(ids)
    assert Path(copied.folder / rebuilt["backup"]).read_bytes() == b"damaged"
    listed = run_cli(copied.folder, "runs", "list", "--json").document["runs"]
    assert {run["run_id"] for run in listed} == ids
