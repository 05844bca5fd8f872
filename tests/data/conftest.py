"""Files with samples in them."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

WriteRows = Callable[..., Path]


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Write rows as JSON lines (gzipped where the name says so) and return the path."""

    def write(rows: Sequence[object], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


@pytest.fixture
def article() -> Callable[..., dict[str, object]]:
    """A row with CNN/DailyMail's columns; keywords change it."""

    def row(number: int, **changes: object) -> dict[str, object]:
        plain: dict[str, object] = {
            "id": f"a{number}",
            "article": f"Article {number} tells of a bridge.",
            "highlights": f"Bridge {number} opens.\nTolls follow.",
        }
        return {**plain, **changes}

    return row


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Run a script in a fresh interpreter, keywords added to its environment; returns its output."""

    def run(script: str, **environment: str) -> str:
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        env = {**os.environ, "PYTHONPATH": paths, **environment}
        command = [sys.executable, "-c", script]
        return subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=120, check=True
        ).stdout

    return run
