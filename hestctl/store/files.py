"""Writes to disk so that a crash or a full disk leaves what was there before."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hestctl.durable import sync
from hestctl.errors import HestError

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What the system says when a volume, a quota or the largest permitted file is full."""


def to_json(value: object) -> str:
    """One line of JSON; NaN and infinities stay bare words, which Python and DuckDB both read.

    What JSON has no form for becomes numbers where it offers them (``tolist``), else text: the end of a
    long run is no time to refuse a record for the type of a setting.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_plain)
    # A lone surrogate, as in a file name that is not UTF-8, has no encoding and would be refused.
    return text.encode("utf-8", "replace").decode("utf-8")


def _plain(value: Any) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def ensure_space(path: Path, needed_bytes: int) -> None:
    """Raise HestError when the volume of ``path`` has fewer than ``needed_bytes`` bytes free."""
    free = _free_bytes(path)
    if free < needed_bytes:
        raise HestError(
            f"no space for {path}: {needed_bytes:,} bytes are needed, {free:,} are free",
            "free some space on that volume, or write to another one",
        )


def write_whole(path: Path, content: str | bytes) -> None:
    """Put ``content`` at ``path`` at once and durably; raises HestError and keeps the old file if it cannot.

    Of a text, a lone surrogate becomes a question mark: it has no encoding.
    """
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync(path.parent)
    except OSError as error:
        raise write_error(path, len(data), error) from error
    finally:
        aside.unlink(missing_ok=True)


def append_whole(fd: int, line: bytes) -> None:
    """Append ``line`` to an O_APPEND descriptor, or raise OSError and leave the file as it was."""
    size = os.fstat(fd).st_size
    try:
        written = os.write(fd, line)
        while written < len(line):
            written += os.write(fd, line[written:])
    except OSError:
        os.ftruncate(fd, size)
        raise


def free_name(path: Path) -> Path:
    """``path``, or the first of ``path.2``, ``path.3`` … that is free: backups never replace others."""
    number, name = 1, path
    while name.exists():
        number += 1
        name = path.with_name(f"{path.name}.{number}")
    return name


def write_error(path: Path, needed_bytes: int, error: OSError) -> HestError:
    """The error for users when writing ``needed_bytes`` bytes to ``path`` failed."""
    if error.errno in NO_SPACE:
        needed = f"{needed_bytes:,} bytes are needed, " if needed_bytes else ""
        return HestError(
            f"no space left for {path}: {needed}{_free_bytes(path):,} are free",
            "free some space on that volume; what was written before is intact",
        )
    return HestError(f"cannot write {path}: {error.strerror or error}", "check the folder's permissions")


def _free_bytes(path: Path) -> int:
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free
