"""Opens the DuckDB file: patiently, one schema version only, with errors that say what to do.

Writers hold the store's lock, readers where there is one. No handle outlives its block: even a reader's shuts
every writer out.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hestctl.durable import sync
from hestctl.errors import Exit, HestError
from hestctl.store import lock
from hestctl.store.files import NO_SPACE, free_name, write_error
from hestctl.store.finding import has_run_folders, is_database
from hestctl.store.migrations import migrate, schema_version, version_of

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

# Two threads suffice for one run's rows, and sixteen processes may each open a store at once.
# Extensions that are not built in would be fetched over the network.
_CONFIG: dict[str, Any] = {
    "threads": 2,
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
}


def in_memory() -> DuckDBPyConnection:
    """A connection to nothing but memory."""
    import duckdb

    con = duckdb.connect(config=_CONFIG)
    con.execute("SET enable_progress_bar = false")
    return con


@contextmanager
def opened(db: Path, timeout_s: float, read_only: bool = False) -> Iterator[DuckDBPyConnection]:
    """A connection to the file, or to a new one where there is none, closed at the end of the block.

    Raises HestError (store) when another program holds it for ``timeout_s`` seconds, and when it is not
    a database or damaged, which any error of DuckDB in the block counts as.
    """
    import duckdb

    with _explained(db):
        con = _patiently(lambda: duckdb.connect(str(db), read_only=read_only, config=_CONFIG), db, timeout_s)
        with con:
            yield con


def create(db: Path, fill: Callable[[DuckDBPyConnection], _T]) -> _T:
    """Make a new database, let ``fill`` fill it, and only then put it at ``db``.

    A process killed half-way leaves no half-made file there.
    """
    aside = db.with_name(f".{db.name}.{os.getpid()}")
    try:
        remove(aside)
        with opened(aside, 0.0) as con:
            migrate(con, 0)
            result = fill(con)
        # The log of an earlier file would be replayed into the new one.
        log_of(db).unlink(missing_ok=True)
        aside.replace(db)
        sync(db.parent)
    except OSError as error:
        raise write_error(db, 0, error) from error
    finally:
        remove(aside)
    return result


@contextmanager
def current(db: Path, timeout_s: float) -> Iterator[DuckDBPyConnection]:
    """As ``opened``, of this schema: an older file is kept as a backup beside it, then migrated."""
    with ExitStack() as stack:
        con = stack.enter_context(opened(db, timeout_s))
        version = version_of(con, db)
        if version < schema_version():
            stack.close()
            if version > 0:
                keep_copy(db, f"schema-{version}")
            con = stack.enter_context(opened(db, timeout_s))
            migrate(con, version)
        yield con


def keep_copy(db: Path, why: str) -> Path:
    """Copy the file, and its log if it has one, to ``<db>.<why>``; no connection may be open here.

    Reading a file that this process has open would drop DuckDB's lock on it.
    """
    backup = free_name(db.with_name(f"{db.name}.{why}"))
    try:
        shutil.copy2(db, backup)
        if log_of(db).exists():
            shutil.copy2(log_of(db), log_of(backup))
    except OSError as error:
        remove(backup)
        raise write_error(backup, db.stat().st_size, error) from error
    return backup


def attach_snapshot(con: DuckDBPyConnection, db: Path, name: str, timeout_s: float) -> None:
    """Attach what the store holds now as the read-only database ``name``, brought to this schema.

    A temporary copy of the file is attached: that takes the time to copy its bytes, and none of the memory
    that its rows would fill. It loses its name at once, so that nothing stays behind however the process
    ends. ``load_copy`` stands in where bytes would not do: for a log that is not in the file yet, and
    where the temporary folder has no room.
    """
    with _explained(db):
        _patiently(lambda: con.execute("ATTACH ? AS source (READ_ONLY)", [str(db)]), db, timeout_s)
        try:
            con.execute("USE source")
            version = version_of(con, db)
            # DuckDB's lock keeps out whoever knows nothing of ours. Closing the copied file drops it, which
            # is after the last byte.
            copy = None if _has_log(db) else _temporary_copy(db)
        finally:
            con.execute("USE memory")
            con.execute("DETACH source")
        if copy is None:
            load_copy(con, db, name, timeout_s)
            return
        try:
            if version < schema_version():
                con.execute("ATTACH ? AS older", [str(copy)])
                con.execute("USE older")
                migrate(con, version)
                con.execute("USE memory")
                con.execute("DETACH older")
            con.execute(f"ATTACH ? AS {name} (READ_ONLY)", [str(copy)])
        finally:
            remove(copy)


def load_copy(con: DuckDBPyConnection, db: Path, name: str, timeout_s: float) -> None:
    """Copy the whole store into the attached in-memory database ``name``, brought to this schema.

    The file itself is only read, so older stores and read-only folders serve as well.
    """
    con.execute(f"ATTACH ':memory:' AS {name}")
    with _explained(db):
        _patiently(lambda: con.execute("ATTACH ? AS source (READ_ONLY)", [str(db)]), db, timeout_s)
        try:
            con.execute("USE source")
            version = version_of(con, db)
            con.execute(f"USE {name}")
            con.execute(f"COPY FROM DATABASE source TO {name}")
        finally:
            con.execute("USE memory")
            con.execute("DETACH source")
        con.execute(f"USE {name}")
        migrate(con, version)
        con.execute("USE memory")


def remove(db: Path) -> None:
    """Remove the file and its log."""
    db.unlink(missing_ok=True)
    log_of(db).unlink(missing_ok=True)


def log_of(db: Path) -> Path:
    """DuckDB's write-ahead log of ``db``."""
    return db.with_name(f"{db.name}.wal")


def _has_log(db: Path) -> bool:
    """Whether DuckDB keeps a log of any kind beside the file, as a killed process leaves it."""
    return any(path.name.startswith(log_of(db).name) for path in db.parent.iterdir())


def _temporary_copy(db: Path) -> Path | None:
    """A copy that nobody else may read, or None where there is no room or no folder for one."""
    try:
        handle, name = tempfile.mkstemp(prefix="hestctl-", suffix=db.suffix)
    except OSError:
        return None
    copy = Path(name)
    try:
        with open(handle, "wb") as target, db.open("rb") as source:  # noqa: PTH123
            shutil.copyfileobj(source, target, 1 << 20)
    except OSError:
        copy.unlink()
        return None
    return copy


def rebuild_hint(db: Path) -> str:
    return f"rebuild it from the runs' own folders: hestctl runs rebuild --db {db}"


def _recovery_hint(db: Path) -> str:
    """What brings a file back that DuckDB cannot use, if anything does."""
    if has_run_folders(db):
        return rebuild_hint(db)
    if db.exists() and not os.access(db, os.R_OK):
        return "check the file's permissions"
    if is_database(db):
        return "no run folders are beside it to rebuild it from: name another with --db"
    return "this is no store of hestctl: name another with --db"


def _patiently(action: Callable[[], _T], db: Path, timeout_s: float) -> _T:
    """Try again while a program that knows nothing of our lock, such as DuckDB's shell, has the file."""
    import duckdb

    start, told = time.monotonic(), False
    while True:
        try:
            return action()
        except duckdb.IOException as error:
            if "Could not set lock" not in str(error):
                raise
            waited_s, pid = time.monotonic() - start, re.search(r"PID \d+", str(error))
            who = pid[0] if pid else "another process"
            if waited_s >= timeout_s:
                raise HestError(
                    f"the store {db} is open in {who} (waited {timeout_s:g} s)",
                    "close it there, or try again",
                    Exit.STORE,
                ) from error
            if waited_s >= lock.TELL_AFTER_S and not told:
                told = True
                _log.warning("waiting for %s: it has the store %s open", who, db)
        time.sleep(0.1)


@contextmanager
def _explained(db: Path) -> Iterator[None]:
    import duckdb

    try:
        yield
    except duckdb.Error as error:
        first_line = str(error).strip().split("\n")[0]
        hint = _recovery_hint(db)
        if any(os.strerror(number) in first_line for number in NO_SPACE):
            hint = f"free some space, then {rebuild_hint(db) if has_run_folders(db) else 'try again'}"
        elif "newer version of DuckDB" in str(error):
            hint = f"pip install --upgrade duckdb, or {hint}"
        raise HestError(f"the store {db} cannot be used: {first_line}", hint, Exit.STORE) from error
