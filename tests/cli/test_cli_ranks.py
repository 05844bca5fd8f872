"""``train`` in several processes: one run, the one that a single process makes; and how they end together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import ESTIMATED, TINY, Outcome, lines_of, run_child, run_cli
from safetensors.torch import load_file

from hestctl.errors import Exit

STEPS = (
    *("train", *TINY, "--json"),
    *("--max-tokens", "220", "--new-tokens", "2", "--batch-size", "2", "--accumulation", "3"),
    *("--set", "data.train_samples=8", "--set", "data.validation_samples=1", "--set", "data.test_samples=1"),
    *("--set", "train.early_stop_samples=0", "--epochs", "3", "--gate-lr", "0.002"),
    *("--set", "train.eval_steps=3", "--set", "train.save_steps=2", "--set", "train.log_steps=1"),
)
"""6 steps, of 3 micro-batches and of 1 in turns: of two ranks one has less to do, then nothing."""
TRAIN = (*STEPS, "--method", "hest", "--scope", "adapter", "--emax-ratio", "0.6")
NETWORK = (*STEPS, "--method", "hest", "--scope", "network", "--emax-ratio", "3")
"""With learned blocks, of which a tiny model cannot save much: within a budget that it keeps."""
BESIDE = ("train_energy_j", "elapsed_s", "tokens_per_s")
"""What of a step hangs on the machine and not on the training."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def as_rank(rank: int, world: int, port: int, then: Callable[[int], None] | None) -> None:
    """What a launcher tells each process that it starts; ``then`` does something to that process."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in told.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    if then is not None:
        then(rank)


def in_ranks(
    folder: Path, *arguments: str, then: Callable[[int], None] | None = None, world: int = 2
) -> list[Outcome]:
    """The outcome of every rank, started without a launcher: each has a folder of its own."""
    port = free_port()

    def start(rank: int) -> Outcome:
        place = folder / f"rank{rank}"
        place.mkdir(exist_ok=True, parents=True)
        return run_child(place, *arguments, first=as_rank, given=(rank, world, port, then))

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(start, range(world)))


def run_of(place: Path) -> Path:
    (folder,) = (place / "rank0" / "runs").iterdir()
    return folder


def record_of(place: Path) -> dict[str, Any]:
    record = json.loads((run_of(place) / "run.json").read_text())
    assert isinstance(record, dict)
    return record


def at_step(number: int, act: Callable[[Any], None]) -> None:
    """Have this process do something in the middle of its ``number``-th step."""
    from hestctl.training.loop import Trainer

    compute = Trainer._try_accumulate

    def step(trainer: Any, rows: Any) -> Any:
        if trainer.step + 1 == number:
            act(trainer)
        return compute(trainer, rows)

    Trainer._try_accumulate = step  # type: ignore[method-assign]


def near(value: object, tolerance: float) -> object:
    return pytest.approx(value, rel=tolerance) if isinstance(value, float) else value


def assert_same_training(mine: Path, theirs: Path, figure: float, tensor: float) -> None:
    """Relative to each figure and to the size of each tensor; large parts of a gradient cancel."""
    rows, expected = lines_of(mine, "steps"), lines_of(theirs, "steps")
    assert len(rows) == len(expected) == 6 + 3
    for row, other in zip(rows, expected, strict=True):
        for name in row.keys() - set(BESIDE):
            tolerance = tensor if name == "grad_norm" else figure
            assert row[name] == near(other[name], tolerance), (row["step"], name)
    tensors, wanted = (load_file(run / "adapter.safetensors") for run in (mine, theirs))
    assert tensors.keys() == wanted.keys()
    for name, values in wanted.items():
        assert torch.linalg.norm(tensors[name] - values) <= tensor * torch.linalg.norm(values), name


@pytest.mark.parametrize(
    ("arguments", "figure", "tensor"),
    [
        # Nothing differs but the order in which floats are summed.
        ((*STEPS, "--method", "lora"), 1e-6, 1e-5),
        # A gate that lies on its threshold to the last bit may then fall otherwise for a token, which has
        # moved a gradient's norm by 2.2e-4; what it costs is measured anew by every run of this test.
        (NETWORK, 1e-4, 1e-3),
    ],
    ids=["lora", "hest"],
)
def test_two_processes_of_accelerate_make_the_run_that_one_makes(
    tmp_path: Path, arguments: tuple[str, ...], figure: float, tensor: float
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have: products sum in the same order
    try:
        first = run_cli(tmp_path, *arguments, "--max-steps", "1")  # measures the energy table for both
        single = run_cli(tmp_path, *arguments)
    finally:
        torch.set_num_threads(threads)
    assert (first.code, single.code) == (0, 0), first.err + single.err
    launch = ("--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m", "hestctl")
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("HESTCTL_")},
            **ESTIMATED,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    double = json.loads(done.stdout)  # one document: the other rank says nothing
    assert done.stderr.count("run train-") == 1
    runs = run_cli(tmp_path, "runs", "list", "--json").document["runs"]
    assert len([run for run in runs if run["command"] == "train"]) == 3
    mine, theirs = (tmp_path / "runs" / document["run_id"] for document in (double, single.document))
    assert_same_training(mine, theirs, figure, tensor)
    for key in ("emax_j", "hardened_over_emax", "training_stopped"):
        assert double[key] == near(single.document[key], 1e-2), key
    windows = [row for row in lines_of(mine, "windows") if row["phase"] == "training"]
    assert [row["name"] for row in windows] == ["training", "training, rank 1"]
    assert double["train_energy_j"] >= sum(row["energy_j"] for row in windows) > windows[0]["energy_j"]
    summary = json.loads((mine / "run.json").read_text())["summary"]
    assert summary["training_devices"] == [row["device_uuid"] for row in windows]
    assert run_cli(tmp_path, "runs", "verify").code == 0


def fail_on_rank_1(rank: int) -> None:
    def fail(_trainer: Any) -> None:
        raise ZeroDivisionError("of all things")

    if rank == 1:
        at_step(4, fail)


def test_an_error_on_one_rank_ends_all_and_what_was_trained_is_saved(tmp_path: Path) -> None:
    first, second = in_ranks(tmp_path, *TRAIN, then=fail_on_rank_1)
    assert (first.code, second.code) == (Exit.FAILED, Exit.FAILED)
    assert "rank 1 failed: ZeroDivisionError: of all things" in first.message
    assert (second.out, second.err) == ("", "")
    assert record_of(tmp_path)["status"] == "failed"
    assert list((tmp_path / "rank1").iterdir()) == []
    assert max(path.name for path in (run_of(tmp_path) / "checkpoints").iterdir()) == "step-00000003"
    # Three ranks go on where two stopped; one of them has nothing to do in every step.
    goes_on = in_ranks(tmp_path, *TRAIN, "--resume", world=3)
    assert [outcome.code for outcome in goes_on] == [0, 0, 0], goes_on[0].err
    assert goes_on[0].document["train_steps"] == 6


def stop_rank_0(rank: int) -> None:
    if rank == 0:
        at_step(4, lambda _: os.kill(os.getpid(), signal.SIGTERM))


def stop_rank_1(rank: int) -> None:
    if rank == 1:
        at_step(4, lambda _: os.kill(os.getpid(), signal.SIGTERM))


def interrupt_all(_rank: int) -> None:
    at_step(4, lambda _: os.kill(os.getpid(), signal.SIGINT))


@pytest.mark.parametrize(
    ("then", "code", "word"),
    [
        (stop_rank_0, Exit.TERMINATED, "SIGTERM"),
        (stop_rank_1, Exit.TERMINATED, "SIGTERM"),
        (interrupt_all, Exit.INTERRUPTED, "Ctrl-C"),
    ],
)
def test_a_signal_to_any_rank_saves_and_ends_all(
    tmp_path: Path, then: Callable[[int], None], code: Exit, word: str
) -> None:
    first, second = in_ranks(tmp_path, *TRAIN, "-q", then=then)
    assert (first.code, second.code) == (code, code)
    assert f"stopped by {word}" in first.message
    assert (second.out, second.err) == ("", "")
    assert record_of(tmp_path)["status"] == "interrupted"
    assert max(path.name for path in (run_of(tmp_path) / "checkpoints").iterdir()) == "step-00000004"


def kill_rank_1(rank: int) -> None:
    if rank == 1:
        at_step(4, lambda _: os.kill(os.getpid(), signal.SIGKILL))


def hang_rank_1(rank: int) -> None:
    def hang(_trainer: Any) -> None:
        others = Path("..").resolve()
        while record_of(others)["status"] == "started":
            time.sleep(0.1)

    if rank == 1:
        at_step(4, hang)


@pytest.mark.parametrize("then", [kill_rank_1, hang_rank_1])
def test_a_rank_that_dies_or_hangs_holds_nobody_up(tmp_path: Path, then: Callable[[int], None]) -> None:
    first, second = in_ranks(tmp_path, *TRAIN, "-q", "--set", "train.rank_timeout_s=8", then=then)
    assert first.code == Exit.FAILED
    if then is hang_rank_1:
        assert second.code == Exit.FAILED
        assert "Timeout (0:00:08)!" in second.err
        assert " in hang\n" in second.err  # where it hung
    assert "error: rank 0 has no contact with the others" in first.err
    assert record_of(tmp_path)["status"] == "failed"
    assert max(path.name for path in (run_of(tmp_path) / "checkpoints").iterdir()) == "step-00000003"


def run_out_on_rank_1(rank: int) -> None:
    failed: list[int] = []

    def run_out(trainer: Any) -> None:
        assert trainer._micro_size == (1 if failed else 2)
        if rank == 1 and not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("simulated")
        failed.append(1)

    at_step(2, run_out)


def test_memory_that_runs_out_on_one_rank_halves_the_micro_batch_of_all(tmp_path: Path) -> None:
    outcomes = in_ranks(tmp_path, *TRAIN, "-q", then=run_out_on_rank_1)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].err


def test_ranks_that_would_do_other_work_are_refused(tmp_path: Path) -> None:
    def arguments(rank: int) -> tuple[str, ...]:
        return (*TRAIN, "-q", *(("--set", "train.clip_norm=2.0") if rank else ()))

    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        starts = []
        for rank in range(2):
            (tmp_path / f"rank{rank}").mkdir()
            given = (rank, 2, port, None)
            starts.append(
                pool.submit(run_child, tmp_path / f"rank{rank}", *arguments(rank), first=as_rank, given=given)
            )
        first, second = (start.result() for start in starts)
    assert (first.code, second.code) == (Exit.USAGE, Exit.USAGE)
    assert "rank 1 has another set of settings than rank 0" in first.message
    assert second.err == ""
    assert not (tmp_path / "rank0" / "runs").exists()


def test_an_early_end_is_an_end_for_all(tmp_path: Path) -> None:
    outcomes = in_ranks(tmp_path, *TRAIN, "--max-train-joules", "1e-6")
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].err
    assert outcomes[0].document["training_stopped"] == "max_train_joules"


def test_an_untrained_method_and_a_search_are_for_one_process(tmp_path: Path) -> None:
    base = in_ranks(tmp_path, "train", "--method", "base", *TINY, "--trial", "--new-tokens", "2", "-q")
    assert [outcome.code for outcome in base] == [0, 0], base[0].err
    searched = in_ranks(tmp_path, *TRAIN, "--trials", "2")
    assert [outcome.code for outcome in searched] == [Exit.USAGE, Exit.USAGE]
    assert "leave out --trials" in searched[0].message


def test_accelerate_with_cpu_starts_one_process_and_that_is_said(tmp_path: Path) -> None:
    told = {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}
    outcome = run_cli(tmp_path, "train", "--method", "base", *TINY, "--trial", environment=told)
    assert outcome.code == 0
    assert "accelerate launch --cpu started one process" in outcome.err
    assert "--multi_gpu --num_processes N" in outcome.err
