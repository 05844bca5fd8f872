"""A store in a temporary folder, and scripts that run in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_records import Script

import hestctl
from hestctl.store.store import Store

ROOT = Path(hestctl.__file__).parents[1]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs.duckdb", lock_timeout_s=10.0)


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    """Start Python code in a process of its own; ``DB`` there is the path of the store."""
    started = []
    prelude = f"""
        import os, sys, time
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from store_records import *
        from hestctl.errors import HestError
        from hestctl.runs import recording, resume
        from hestctl.store.folder import RunFolder
        from hestctl.store.store import Store
        DB = Path({str(tmp_path / "runs.duckdb")!r})
    """

    def start(code: str, *arguments: object) -> subprocess.Popen[str]:
        text = textwrap.dedent(prelude) + textwrap.dedent(code)
        process = subprocess.Popen(
            [sys.executable, "-c", text, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
