"""The lock beside the store: one process at a time opens the database, whatever it wants there."""

from __future__ import annotations

import errno
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hestctl.errors import Exit, HestError
from hestctl.store.files import write_error

if TYPE_CHECKING:
    from filelock import FileLock

TELL_AFTER_S = 1.0
"""How long a store is waited for without a word."""

_log = logging.getLogger(__name__)
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}


class StoreLock:
    """``<db>.lock``; ``<db>.lock-holder`` names who holds it. May be taken again by its own thread."""

    def __init__(self, db: Path, timeout_s: float) -> None:
        self.path = Path(f"{db}.lock")
        self._db = db
        self._holder = Path(f"{db}.lock-holder")
        self._timeout_s = timeout_s
        self._lock: FileLock | None = None

    @contextmanager
    def held(self, read_only: bool = False) -> Iterator[None]:
        """Wait for the lock and hold it.

        Raises HestError (store) that names the holder after ``timeout_s`` seconds; who is waited for longer
        than a moment is logged. ``read_only``: where there is no lock file it goes without, and leaves none.
        A writer that comes meanwhile is kept out by DuckDB's own lock on the file, for which it waits.
        """
        if read_only and not self.path.exists():
            yield
            return
        from filelock import Timeout

        try:
            lock = self._file_lock()
            self._acquire(lock)
        except Timeout as error:
            raise self._taken() from error
        except OSError as error:
            # In a folder where nobody can open the lock file nobody can write a store either.
            if not (read_only and error.errno in _READ_ONLY):
                raise write_error(self.path, 0, error) from error
            yield
            return
        try:
            if lock.lock_counter == 1:
                self._sign()
            yield
        finally:
            if lock.lock_counter == 1:
                self._holder.unlink(missing_ok=True)
            lock.release()

    def _acquire(self, lock: FileLock) -> None:
        from filelock import Timeout

        first_s = min(TELL_AFTER_S, self._timeout_s)
        try:
            lock.acquire(timeout=first_s, poll_interval=0.02)
        except Timeout:
            if first_s == self._timeout_s:
                raise
            _log.warning("waiting for %s: it holds the store %s", self._who(), self._db)
            lock.acquire(timeout=self._timeout_s - first_s, poll_interval=0.02)

    def _file_lock(self) -> FileLock:
        # Imported late: filelock costs 60 ms, which `hestctl --help` need not pay.
        from filelock import FileLock

        if self._lock is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path)
        return self._lock

    def _sign(self) -> None:
        """Name the holder, in a file of its own: filelock may empty the lock file when another waits."""
        try:
            self._holder.write_text(f"{os.getpid()} {platform.node()}\n")
        except OSError:
            # On a full disk the lock still locks; only its holder stays unnamed.
            return

    def _who(self) -> str:
        try:
            pid, host = self._holder.read_text().split()
        except (OSError, ValueError):
            return "another process"
        return f"process {pid} on {host}"

    def _taken(self) -> HestError:
        return HestError(
            f"the store {self._db} is locked by {self._who()} (waited {self._timeout_s:g} s)",
            "wait for it to end, or try again",
            Exit.STORE,
        )
