"""Which files are stores: the ones named, the ones nearby, and what only looks like one."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Sequence
from pathlib import Path

from hestctl.errors import Exit, HestError

_MAGIC = b"DUCK"
_MAGIC_AT = 8
"""Where every DuckDB file has it, after a checksum."""

_BESIDE = (".lock", ".lock-holder", ".wal")
"""Endings of what hestctl and DuckDB keep beside a store."""

_NAMED = 5
"""Stores that a message names at most."""


def find_stores(paths_or_globs: Sequence[str]) -> list[Path]:
    """The files named, in the order given, each once however often and by whatever path it is named.

    A glob stands for the ``*.duckdb`` files among its matches. Raises HestError (usage) for a name
    that no file has, for a folder, and for a file that is kept beside a store.
    """
    found: dict[tuple[int, int], Path] = {}
    for text in paths_or_globs:
        path = Path(text)
        demand_name(path)
        if path.is_file():
            matches = [path]
        else:
            # Path.glob would refuse absolute patterns.
            names = sorted(glob.glob(text, recursive=True))  # noqa: PTH207
            matches = [Path(name) for name in names if name.endswith(".duckdb") and Path(name).is_file()]
        if not matches:
            raise _missing(path)
        for match in matches:
            status = match.stat()
            found.setdefault((status.st_dev, status.st_ino), match.resolve())
    return list(found.values())


def demand_store(db: Path) -> None:
    """Raise HestError (usage) where there is no file at ``db``; it names the stores nearby."""
    demand_name(db)
    if not db.is_file():
        raise _missing(db)


def demand_name(db: Path) -> None:
    """Raise HestError (usage) for a folder, and for a file that is kept beside a store."""
    if db.is_dir():
        stores = [str(file) for file in sorted(db.glob("*.duckdb"))]
        # A store and the folder of its runs differ by the suffix alone.
        own = db.with_name(f"{db.name}.duckdb") if db.name else db
        if own.is_file():
            stores.insert(0, str(own))
        if not stores:
            raise HestError(
                f"{db} is a folder, and no store is in it", "name a file, as in --db runs.duckdb", Exit.USAGE
            )
        told = f"it holds {_few(stores)}" if stores[0] != str(own) else f"its store is {own}"
        raise HestError(f"{db} is a folder; {told}", f"name it with: --db {stores[0]}", Exit.USAGE)
    of = store_beside(db)
    if of is not None:
        raise HestError(f"{db} is kept beside a store, and is none", f"name it with: --db {of}", Exit.USAGE)


def store_beside(path: Path) -> Path | None:
    """The store that ``path`` is the lock or the log of, by its name; None for anything else."""
    for ending in _BESIDE:
        name = path.name.removesuffix(ending)
        if name != path.name and Path(name).suffix:
            return path.with_name(name)
    return None


def is_database(path: Path) -> bool:
    """Whether ``path`` is a DuckDB file, by its first bytes."""
    try:
        with path.open("rb") as file:
            return file.read(_MAGIC_AT + len(_MAGIC)).endswith(_MAGIC)
    except OSError:
        return False


def _missing(path: Path) -> HestError:
    if path.suffix and has_run_folders(path):
        return HestError(
            f"there is no store {path}, but the folders of its runs are in {path.with_suffix('')}",
            f"make it anew from them: hestctl runs rebuild --db {path}",
            Exit.USAGE,
        )
    folders = dict.fromkeys(folder.resolve() for folder in (path.parent, Path.cwd()) if folder.is_dir())
    nearby = [str(file) for folder in folders for file in sorted(folder.glob("*.duckdb"))]
    if not nearby:
        return HestError(
            f"there is no store {path}, and none nearby",
            f"record a run first: hestctl train --db {path}",
            Exit.USAGE,
        )
    best = difflib.get_close_matches(str(path.absolute()), nearby, n=1, cutoff=0.0)[0]
    return HestError(
        f"there is no store {path}; nearby: {_few(nearby)}",
        f"name it with: --db {best}",
        Exit.USAGE,
    )


def has_run_folders(db: Path) -> bool:
    """Whether the folder beside ``db`` holds the folder of any run, from which an index can be made."""
    return any(db.with_suffix("").glob("*/run.json"))


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
