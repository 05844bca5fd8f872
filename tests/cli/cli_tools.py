"""Runs the command line inside the test process, or in a child process that does something to itself."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TINY = ("--backbone", "tiny", "--weights", "random", "--set", "energy.calibration_s=0.004")
"""The random tiny Llama; shorter windows of calibration, for nothing here depends on their joules."""

ESTIMATED = {"HESTCTL_BACKBONE__DEVICE": "cpu", "HESTCTL_ENERGY__METER": "estimate"}
"""What every command here finds in its environment: no GPU and no counter, whatever the machine has."""

TRIAL = (
    *(*TINY, "--trial", "--set", "data.test_samples=2", "--new-tokens", "4"),
    *("--set", "method.scope=adapter"),
)
"""A small training. Its budget is over the adapters: estimated joules of tiny blocks are noise, of which no
share can be promised."""


@dataclass(frozen=True)
class Outcome:
    """What one command said, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on stdout."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value

    @property
    def message(self) -> str:
        """The one message on stderr. Fails for a traceback, or more than a message and its hint."""
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line]
        errors = [index for index, line in enumerate(lines) if line.startswith("error: ")]
        assert len(errors) == 1, self.err
        told = lines[errors[0] :]
        assert len(told) <= 2, self.err
        assert all(line.startswith("  hint: ") for line in told[1:]), self.err
        return " ".join(told)


@dataclass(frozen=True)
class Study:
    """A folder with ``runs.duckdb`` and ``runs/``, and what the commands that made them printed."""

    folder: Path
    tabs: Outcome
    hest: Outcome

    def run_folder(self, outcome: Outcome) -> Path:
        return self.folder / "runs" / outcome.document["run_id"]


def run_cli(folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> Outcome:
    """``hestctl *arguments`` with ``folder`` as the working directory."""
    from hestctl.cli.app import main

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("HESTCTL_")]:
            patch.delenv(name)
        for name, value in {**ESTIMATED, **(environment or {})}.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["hestctl", *arguments])
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.chdir(folder)
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            main()
    code = ended.value.code
    return Outcome(code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue())


def run_child(
    folder: Path,
    *arguments: str,
    first: Callable[..., None] | None = None,
    given: tuple[object, ...] = (),
    limit_s: float = 60,
) -> Outcome:
    """The same in a process of its own, which calls ``first(*given)`` before the command."""
    context = multiprocessing.get_context("forkserver")
    # Imported once, by the server: every child is a fork of it, without threads or open files of ours.
    context.set_forkserver_preload(["hestctl.cli.app", "hestctl.workflows.search"])
    process = context.Process(target=_child, args=(folder, arguments, first, given))
    process.start()
    process.join(timeout=limit_s)
    alive = process.exitcode is None
    process.kill()
    assert not alive, f"still running after {limit_s:g} s: {arguments}"
    said = [(folder / name).read_text() for name in ("child.out", "child.err")]
    for name in ("child.out", "child.err"):
        (folder / name).unlink()
    return Outcome(process.exitcode or 0, said[0], said[1])


def _child(
    folder: Path, arguments: tuple[str, ...], first: Callable[..., None] | None, given: tuple[object, ...]
) -> None:
    import torch

    from hestctl.cli.app import main

    torch.set_num_threads(1)
    for name in [name for name in os.environ if name.startswith("HESTCTL_")]:
        del os.environ[name]
    os.environ |= ESTIMATED
    os.chdir(folder)
    for name, descriptor in (("child.out", 1), ("child.err", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
    # The streams at hand may be the test runner's captures.
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = ["hestctl", *arguments]
    if first is not None:
        first(*given)
    main()


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` by its relative path, to tell whether anything was written.

    The empty lock file that taking the store's lock leaves is not counted.
    """
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def lines_of(folder: Path, table: str) -> list[dict[str, Any]]:
    """The rows of one table in a run's folder."""
    return [json.loads(line) for line in (folder / f"{table}.jsonl").read_text().splitlines()]
