"""What ``compare`` is asked to write and how, checked before anything is read or drawn."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from hestctl.errors import Exit, HestError


def formats_of(text: str | None) -> tuple[str, ...]:
    """``png,svg`` as names. Raises HestError (usage) for a format that figures do not have."""
    if text is None:
        return ("png",)
    # Drawing takes a second to import, which the default need not pay to be checked.
    from hestctl.compare.look import FORMATS

    formats = tuple(part.strip() for part in text.split(","))
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise HestError(f"unknown figure format '{unknown[0]}'", f"formats: {', '.join(FORMATS)}", Exit.USAGE)
    return formats


def check(
    stores: Sequence[str],
    *,
    csv: Path | None,
    report: Path | None,
    folder: Path | None,
    search: str | None,
    theme: str,
) -> None:
    """Raise HestError (usage) for a store that is not there, and for a target or theme that cannot be.

    No target may be a database: neither one of ``stores``, nor another. Folders of targets are made.
    """
    from hestctl.compare.pages import check_folder, check_place
    from hestctl.compare.style import INKS
    from hestctl.store.finding import find_stores

    read = find_stores(stores)
    if theme not in INKS:
        raise HestError(f"unknown theme '{theme}'", f"themes: {', '.join(INKS)}", Exit.USAGE)
    for flag, path in (("--report", report), ("--csv", csv)):
        if path is not None and search is not None:
            raise HestError(f"{flag} is of a comparison, not of a search", "leave one out", Exit.USAGE)
    if folder is not None:
        _demand_folder("--out", folder, "name a folder: --out figures")
    for flag, example, path in (("--report", "report.html", report), ("--csv", "rows.csv", csv)):
        if path is not None:
            _spare_stores(flag, path, read, f"{flag} {example}")
    if report is not None:
        check_place(report)
        _demand_folder("--report", report.with_name(f"{report.stem}_files"), "move that file away")
        if csv is not None and csv.resolve() in (report.resolve(), report.with_suffix(".md").resolve()):
            raise HestError(f"--csv {csv} is where --report writes", "--csv rows.csv", Exit.USAGE)
    if csv is not None:
        check_folder(csv, "--csv")


def refuse_words(words: Sequence[str]) -> None:
    """Raise HestError (usage) for words that belong to no option: most likely they name stores."""
    if words:
        meant = " ".join(f"--db {shlex.quote(word)}" for word in words)
        raise HestError(
            f"compare takes no word without an option: {' '.join(words)}",
            f"did you mean hestctl compare {meant}?",
            Exit.USAGE,
        )


def _demand_folder(flag: str, folder: Path, hint: str) -> None:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        what = "is a file" if there == folder.absolute() else f"is below {there}, which is a file"
        raise HestError(f"{flag}: {folder} {what}", hint, Exit.USAGE)


def _spare_stores(flag: str, path: Path, read: Sequence[Path], instead: str) -> None:
    """Refuse to replace a database, or what is kept beside one."""
    from hestctl.store.finding import is_database, store_beside

    if any(path.exists() and path.samefile(store) for store in read):
        raise HestError(f"{flag} {path} is a store that is being read", instead, Exit.USAGE)
    if path.is_file() and is_database(path):
        raise HestError(f"{flag} {path} is a database, which would be replaced", instead, Exit.USAGE)
    of = store_beside(path)
    if of is not None:
        raise HestError(f"{flag} {path} is a name that {of} keeps for itself", instead, Exit.USAGE)
