"""The lock beside the store: one process at a time opens the database, whatever it wants there."""

from __future__ import annotations

import errno
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

        Raises HestError (store) that names the holder after ``timeout_s`` seconds. ``read_only``: in a
        folder where nobody can make a lock file nobody can write a store either, so it goes without.
        """
        from filelock import Timeout

        try:
            lock = self._file_lock()
            lock.acquire(timeout=self._timeout_s, poll_interval=0.02)
        except Timeout as error:
            raise self._taken() from error
        except OSError as error:
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

    def _taken(self) -> HestError:
        try:
            pid, host = self._holder.read_text().split()
            holder = f"process {pid} on {host}"
        except (OSError, ValueError):
            holder = "another process"
        return HestError(
            f"the store {self._db} is locked by {holder} (waited {self._timeout_s:g} s)",
            "wait for it to end, or try again",
            Exit.STORE,
        )
