"""A run's own folder: the truth of the run, readable without any database.

``run.json`` is the Run record, the ``*.jsonl`` files hold one record a line, ``process.json`` names
the process at work, and ``manifest.json`` (checksums) comes last: where it is, the run has ended.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from hestctl import __version__
from hestctl.durable import sync
from hestctl.errors import Exit, HestError
from hestctl.records import Run, RunStatus
from hestctl.store.files import append_whole, to_json, write_error, write_whole
from hestctl.store.process import Liveness, identity, liveness

LineTable = Literal["steps", "samples", "windows", "utilisation", "trials"]
LINE_TABLES: tuple[LineTable, ...] = get_args(LineTable)

Document = Literal["plan", "calibration"]
DOCUMENTS: tuple[Document, ...] = get_args(Document)

_RUN_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Lines:
    """The readable lines of a file, and how many others there were."""

    rows: list[dict[str, Any]]
    lost: int


def is_run_id(text: str) -> bool:
    """Whether ``text`` may name a run and its folder."""
    return _RUN_ID.fullmatch(text) is not None


def now() -> str:
    """The time as the store writes it: ISO 8601, UTC, microseconds, so that text order is time order."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


class RunFolder:
    """The files of one run, in ``root/run_id``.

    Making one touches nothing. Raises HestError (usage) for an id that is not ``[a-z0-9][a-z0-9_-]{0,63}``
    or that leads out of ``root``. Writing methods raise HestError when the disk is full or read-only and
    leave what was there before; reading ones raise HestError (store) for what is missing or damaged.
    """

    def __init__(self, root: Path, run_id: str) -> None:
        if not is_run_id(run_id):
            raise HestError(
                f"{run_id!r} is not a run id: lower-case letters, digits, '-' and '_', at most 64, "
                "starting with a letter or digit",
                exit_code=Exit.USAGE,
            )
        self.run_id = run_id
        self.path = root / run_id
        if self.path.resolve() != root.resolve() / run_id:
            raise HestError(f"{self.path} leads out of {root}", exit_code=Exit.USAGE)
        self.lost_lines = 0
        self._descriptors: dict[LineTable, int] = {}
        self._lock = threading.Lock()

    @classmethod
    def create(cls, root: Path, run: Run) -> RunFolder:
        """Make the folder of a new run, whole or not at all. Raises HestError (usage) if it exists."""
        folder = cls(root, run.run_id)
        taken = HestError(f"the run {run.run_id} already exists in {root}", exit_code=Exit.USAGE)
        if folder.path.exists():
            raise taken
        aside = root / f".{run.run_id}.{secrets.token_hex(4)}"
        try:
            aside.mkdir(parents=True)
            write_whole(aside / "process.json", to_json(identity()))
            write_whole(aside / "run.json", to_json(run_fields(run)))
            aside.rename(folder.path)
            sync(root)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise taken from error
            raise write_error(folder.path, 0, error) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return folder

    def reopen(self, run: Run) -> None:
        """Take over an ended folder to append to it: this process owns it, ``run`` is its record."""
        self.lost_lines = self.lines_lost_before()
        write_whole(self._file("process.json"), to_json(identity()))
        self.repair()
        self._file("manifest.json").unlink(missing_ok=True)
        self.write_run(run)

    def discard(self) -> None:
        """Remove the folder of a run that never began."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def append(self, table: LineTable, row: Mapping[str, Any]) -> None:
        """Add one line. It survives the death of the process at once, and of the machine after ``commit``."""
        line = (to_json(row) + "\n").encode()
        try:
            with self._lock:
                append_whole(self._descriptor(table), line)
        except OSError as error:
            raise write_error(self.lines_path(table), len(line), error) from error

    def commit(self) -> None:
        """Make all lines so far durable."""
        for table, descriptor in list(self._descriptors.items()):
            try:
                os.fsync(descriptor)
            except OSError as error:
                raise write_error(self.lines_path(table), 0, error) from error

    def close(self) -> None:
        """Close the files; ``append`` opens them again."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def write_run(self, run: Run) -> None:
        write_whole(self._file("run.json"), to_json(run_fields(run)))

    def write_document(self, name: Document, document: Mapping[str, Any]) -> None:
        write_whole(self._file(f"{name}.json"), to_json(document))

    def finish(self, run: Run) -> None:
        """Write the record of a run that ended, then the manifest with the checksums of every file."""
        self.commit()
        self.close()
        self.write_run(run)
        names = ["run.json", *(f"{name}.json" for name in DOCUMENTS)]
        names += [f"{table}.jsonl" for table in LINE_TABLES]
        manifest = {
            "run_id": self.run_id,
            "status": run.status,
            "written_at": now(),
            "hestctl": __version__,
            "lost_lines": self.lost_lines,
            "files": {name: _summary(self._file(name)) for name in names if self._file(name).exists()},
        }
        write_whole(self._file("manifest.json"), to_json(manifest))

    def repair(self) -> int:
        """Cut torn last lines, which only the owner or the heir of a dead one may do; returns how many."""
        lost = sum(cut_torn_line(self.lines_path(table)) for table in LINE_TABLES)
        self.lost_lines += lost
        return lost

    def truncate_steps(self, after_step: int) -> int:
        """Drop the steps beyond ``after_step``, as a resumed run does them again; returns how many."""
        self.close()
        rows = self.read_lines("steps").rows
        kept = [row for row in rows if isinstance(row.get("step"), int) and row["step"] <= after_step]
        if len(kept) < len(rows):
            write_whole(self.lines_path("steps"), "".join(to_json(row) + "\n" for row in kept))
        return len(rows) - len(kept)

    def forget(self, table: LineTable) -> None:
        """Drop all lines of a table, as a resumed run makes them again."""
        self.close()
        self.lines_path(table).unlink(missing_ok=True)

    def read_run(self) -> Run:
        """The record, whatever a newer hestctl added to it left out."""
        values = self._read_json("run.json")
        if values is None:
            raise self._damage("run.json", "it is missing")
        try:
            run = Run(**{field.name: values[field.name] for field in fields(Run) if field.name in values})
        except TypeError as error:
            raise self._damage("run.json", str(error)) from error
        if run.run_id != self.run_id or run.status not in get_args(RunStatus):
            raise self._damage("run.json", f"it says run {run.run_id!r}, status {run.status!r}")
        return run

    def read_document(self, name: Document) -> dict[str, Any] | None:
        """``plan.json`` or ``calibration.json``, or None where the run has none."""
        return self._read_json(f"{name}.json")

    def read_lines(self, table: LineTable) -> Lines:
        """Every line that is whole; a torn last line, or a damaged one, is counted instead."""
        rows, lost = [], 0
        path = self.lines_path(table)
        for line in path.read_bytes().split(b"\n") if path.exists() else []:
            row = _parse(line)
            if row is not None:
                rows.append(row)
            elif line.strip():
                lost += 1
        return Lines(rows, lost)

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None where the run has not ended."""
        manifest = self._read_json("manifest.json")
        if manifest is not None and not {"status", "lost_lines", "files"} <= manifest.keys():
            raise self._damage("manifest.json", "it is incomplete")
        return manifest

    def has_record(self) -> bool:
        return self._file("run.json").exists()

    def has_manifest(self) -> bool:
        return self._file("manifest.json").exists()

    def last_written(self) -> str:
        """When something was last written to the folder, as ``now`` would have said it then."""
        latest = max(path.stat().st_mtime for path in self.path.iterdir())
        return datetime.fromtimestamp(latest, UTC).isoformat(timespec="microseconds")

    def lines_lost_before(self) -> int:
        """Lines that were torn and cut, as the manifest notes them; 0 without a readable manifest."""
        try:
            manifest = self.manifest()
        except HestError:
            return 0
        return 0 if manifest is None else int(manifest["lost_lines"])

    def problems(self) -> list[str]:
        """What in the folder is not as the manifest says, one line each."""
        manifest = self.manifest()
        if manifest is None:
            return ["it has no manifest"]
        problems = []
        for name, noted in manifest["files"].items():
            path = self._file(name)
            if not path.exists():
                problems.append(f"{name} is missing")
            elif _summary(path) != noted:
                problems.append(f"{name} differs from its checksum")
        return problems

    def owner(self) -> dict[str, Any]:
        """The process at work on the run, or the last one that was (see ``process.identity``)."""
        try:
            return self._read_json("process.json") or {}
        except HestError:
            return {}

    def owner_liveness(self) -> Liveness:
        """Whether that process still runs. One that does always has a readable ``process.json``."""
        return liveness(self.owner())

    def lines_path(self, table: LineTable) -> Path:
        """The file of ``table``'s lines, which exists once there is one."""
        return self.path / f"{table}.jsonl"

    def _file(self, name: str) -> Path:
        return self.path / name

    def _descriptor(self, table: LineTable) -> int:
        if table not in self._descriptors:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._descriptors[table] = os.open(self.lines_path(table), flags, 0o666)
        return self._descriptors[table]

    def _read_json(self, name: str) -> dict[str, Any] | None:
        try:
            data = self._file(name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._damage(name, error.strerror or str(error)) from error
        values = _parse(data)
        if values is None:
            raise self._damage(name, "it is not a JSON object")
        return values

    def _damage(self, name: str, why: str) -> HestError:
        return HestError(f"{self._file(name)} cannot be read: {why}", exit_code=Exit.STORE)


def run_fields(run: Run) -> dict[str, Any]:
    """The fields of a Run; unlike ``asdict`` it copies nothing, so any mapping will do."""
    return {field.name: getattr(run, field.name) for field in fields(run)}


def _parse(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _summary(path: Path) -> dict[str, Any]:
    """Checksum and size in bytes, and lines where the file is made of lines."""
    digest, size, lines = hashlib.sha256(), 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
            lines += block.count(b"\n")
    summary: dict[str, Any] = {"sha256": digest.hexdigest(), "bytes": size}
    return {**summary, "lines": lines} if path.suffix == ".jsonl" else summary


def cut_torn_line(path: Path) -> int:
    """End a file of JSON lines at its last whole one; returns 1 when one was lost.

    For whoever alone may write to it at that time.
    """
    if not path.exists() or path.stat().st_size == 0:
        return 0
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() == b"\n":
            return 0
        file.seek(0)
        data = file.read()
        end = data.rfind(b"\n") + 1
        whole = _parse(data[end:]) is not None
        if whole:
            file.write(b"\n")
        else:
            file.truncate(end)
        file.flush()
        os.fsync(file.fileno())
        return 0 if whole else 1
