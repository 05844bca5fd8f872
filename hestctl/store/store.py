"""The store of runs: a folder each, and the database that indexes them.

No handle stays open between two calls. Every method that needs the database takes the lock for the
time of one short transaction, and raises HestError (store) when it is locked, newer or damaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hestctl.errors import Exit, HestError
from hestctl.records import Run, RunStatus
from hestctl.store import database
from hestctl.store.finding import demand_name
from hestctl.store.folder import LINE_TABLES, RunFolder, is_run_id
from hestctl.store.index import put_folder, put_run, row_counts, take_runs
from hestctl.store.lock import StoreLock
from hestctl.store.migrations import migrate, schema_version, version_of

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


@dataclass(frozen=True, slots=True)
class Recovered:
    """A run that an earlier process left behind, as it now stands; ``lost_lines`` were torn."""

    run_id: str
    status: RunStatus
    lost_lines: int


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What a rebuild found: runs indexed, lines lost, folders skipped and why, where the old file is."""

    runs: int
    lost_lines: int
    skipped: dict[str, str]
    backup: Path | None


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One way in which a run's folder, its manifest and the index do not agree."""

    run_id: str
    problem: str


NO_FOLDER = "it is in the index, but its folder is missing"
"""The problem of a run that a copied index has and its place has not."""


class Store:
    """The runs of ``db`` (such as ``runs.duckdb``) and of the folder beside it (``runs/``).

    Making one opens nothing and creates nothing. ``lock_timeout_s``: how long to wait for another
    process, in seconds. Raises HestError (usage) for a path that cannot name a store, a folder's among them.
    """

    def __init__(self, db: Path, lock_timeout_s: float = 30.0) -> None:
        demand_name(db)
        # DuckDB takes what follows a '?' for options of a URL, and cannot escape a backslash in a pattern.
        if not db.suffix or set("?\\") & set(str(db.absolute())):
            raise HestError(
                f"{db} cannot name a store: it needs a suffix, as in runs.duckdb, and no '?' or backslash",
                exit_code=Exit.USAGE,
            )
        self.db = db
        self.root = db.with_suffix("")
        self._timeout_s = lock_timeout_s
        self._lock = StoreLock(db, lock_timeout_s)

    def folder(self, run_id: str) -> RunFolder:
        """The folder of a run, whether or not it exists. Raises HestError (usage) for a hostile id."""
        return RunFolder(self.root.absolute(), run_id)

    def started(self, run: Run) -> None:
        """Put the row of a run that begins, or begins again, into the index."""
        with self._transaction() as con:
            put_run(con, run)

    def index(self, folder: RunFolder) -> int:
        """Replace all rows of a run by what its folder says; returns the lines that could not be read."""
        try:
            with self._transaction() as con:
                return put_folder(con, folder)
        except HestError as error:
            hint = error.hint or ""
            if "runs rebuild" not in hint:
                hint += f"; the next command on the store indexes it, or {database.rebuild_hint(self.db)}"
            message = f"{error.message}; the run's own files are safe in {folder.path}"
            raise HestError(message, hint.lstrip("; "), error.exit_code) from error

    def recover_orphans(self) -> list[Recovered]:
        """Set right what dead processes left: unfinished runs become ``interrupted`` with what they had.

        Ended runs that could not be indexed are indexed now. Runs of processes that are alive, or on
        another host, stay as they are; so do folders that cannot be read (``verify`` names those).
        """
        if not self._orphans():
            return []
        with self.locked():
            return [self._recover(run_id) for run_id in self._orphans()]

    def rebuild(self) -> Rebuilt:
        """Make the index anew from the folders; the old file, whatever its state, is kept beside it.

        Raises HestError (store) when there is no folder to rebuild from.
        """
        skipped: dict[str, str] = {}
        lost = 0

        def fill(con: DuckDBPyConnection) -> None:
            nonlocal lost
            con.execute("BEGIN")
            for run_id in ids:
                try:
                    folder = self.folder(run_id)
                    lost += put_folder(con, folder) + folder.lines_lost_before()
                except HestError as error:
                    skipped[run_id] = error.message
            con.execute("COMMIT")

        if not self._folder_ids():
            message = f"there are no runs in {self.root} to rebuild {self.db} from"
            raise HestError(message, exit_code=Exit.STORE)
        with self.locked():
            ids = self._folder_ids()
            backup = database.keep_copy(self.db, "before-rebuild") if self.db.exists() else None
            database.create(self.db, fill)
        return Rebuilt(len(ids) - len(skipped), lost, skipped, backup)

    def verify(self) -> list[Mismatch]:
        """Compare folders, manifests and index; empty when they agree. Runs still at work are left out."""
        with self.reading() as con:
            indexed = dict(con.execute("SELECT run_id, status FROM runs").fetchall())
            counts = row_counts(con)
        ids = self._folder_ids()
        gone = indexed.keys() - set(ids)
        found = [Mismatch(run_id, NO_FOLDER) for run_id in gone]
        for run_id in ids:
            found += [Mismatch(run_id, problem) for problem in self._problems(run_id, indexed, counts)]
        return sorted(found, key=lambda mismatch: (mismatch.run_id, mismatch.problem))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store's lock; the methods of this store may be called within."""
        with self._lock.held():
            yield

    @contextmanager
    def reading(self) -> Iterator[DuckDBPyConnection]:
        """A read-only connection under the lock: keep the block short, it shuts writers out.

        A store that does not exist yet reads as an empty one; an older one as a copy of this schema.
        """
        if not self.db.exists():
            with database.in_memory() as con:
                migrate(con, 0)
                yield con
            return
        with self._lock.held(read_only=True):
            with database.opened(self.db, self._timeout_s, read_only=True) as con:
                if version_of(con, self.db) == schema_version():
                    yield con
                    return
            with database.in_memory() as con:
                database.load_copy(con, self.db, "copy", self._timeout_s)
                con.execute("USE copy")
                yield con

    @contextmanager
    def _transaction(self) -> Iterator[DuckDBPyConnection]:
        """One transaction, committed at the end of the block and undone by any exception in it."""
        with self._lock.held():
            if not self.db.exists():
                database.create(self.db, lambda _: None)
            with database.current(self.db, self._timeout_s) as con:
                con.execute("BEGIN")
                yield con
                con.execute("COMMIT")

    def _orphans(self) -> list[str]:
        with self.reading() as con:
            known = dict(con.execute("SELECT run_id, status FROM runs").fetchall())
        ids = self._folder_ids()
        unsettled = [run_id for run_id in ids if known.get(run_id, "started") == "started"]
        gone = [run_id for run_id, status in known.items() if status == "started" and run_id not in ids]
        return [run_id for run_id in unsettled if self._left_behind(run_id)] + gone

    def _folder_ids(self) -> list[str]:
        """The runs that have a folder, in order; what else lies there is left alone."""
        if not self.root.is_dir():
            return []
        marks = ("run.json", "process.json", "manifest.json")
        return sorted(
            path.name
            for path in self.root.iterdir()
            if is_run_id(path.name) and any((path / mark).exists() for mark in marks)
        )

    def _left_behind(self, run_id: str) -> bool:
        """Whether a run that the index does not know as ended has nobody left to end it."""
        try:
            folder = self.folder(run_id)
            if folder.read_run().status == "started":
                return folder.owner_liveness() == "dead"
            return folder.owner_liveness() != "alive"
        except HestError:
            return False

    def _recover(self, run_id: str) -> Recovered:
        folder = self.folder(run_id)
        if not folder.has_record():
            return self._recover_without_folder(run_id)
        run = folder.read_run()
        if run.status == "started":
            run.status, run.finished_at = "interrupted", folder.last_written()
            run.error = f"process {folder.owner().get('pid')} ended without a word"
            folder.repair()
            folder.finish(run)
        elif not folder.has_manifest():
            folder.finish(run)
        self.index(folder)
        return Recovered(run_id, run.status, folder.lines_lost_before())

    def _recover_without_folder(self, run_id: str) -> Recovered:
        with self._transaction() as con:
            (run,) = take_runs(con, "SELECT * FROM runs WHERE run_id = ?", [run_id])
            run.status, run.error = "interrupted", "its folder is missing"
            put_run(con, run)
        return Recovered(run_id, run.status, 0)

    def _problems(
        self, run_id: str, indexed: dict[str, str], counts: dict[tuple[str, str], int]
    ) -> list[str]:
        try:
            folder = self.folder(run_id)
            run = folder.read_run()
            if run.status == "started" or (
                folder.owner_liveness() == "alive" and indexed.get(run_id) == "started"
            ):
                return []
            problems = folder.problems()
            noted = (folder.manifest() or {"files": {}})["files"]
        except HestError as error:
            return [error.message]
        if run_id not in indexed:
            return [*problems, "it is not in the index"]
        if indexed[run_id] != run.status:
            problems.append(f"it is {run.status}, the index says {indexed[run_id]}")
        for table in LINE_TABLES:
            lines, rows = noted.get(f"{table}.jsonl", {}).get("lines", 0), counts.get((table, run_id), 0)
            if lines != rows:
                problems.append(f"its manifest counts {lines} {table}, the index has {rows}")
        return problems
