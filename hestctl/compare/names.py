"""Names of files in place of the paths of the machine at hand: a report is shown to others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Final

# Two folders deep or more; not the slash within `J/sample`, a hub id or an address.
_UNIX: Final = re.compile(r"(?<![\w./~-])~?(?:/[^\s/:;,'\"()<>|]+)+/([^\s/:;,'\"()<>|]+)/?")
_WINDOWS: Final = re.compile(r"\b[A-Za-z]:\\(?:[^\s\\:;,'\"<>|]+\\)*([^\s\\:;,'\"<>|]+)\\?")
_ABSOLUTE: Final = re.compile(r"(?:\w{2,}:)?(?:~?/|[A-Za-z]:\\)")


def is_path(value: str) -> bool:
    """Whether a setting is an absolute path, perhaps after a word: ``replay:/tmp/trace``."""
    return _ABSOLUTE.match(value) is not None and "://" not in value


def file_name(value: str) -> str:
    """The last part of a setting that is an absolute path; any other as it is."""
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] or value if is_path(value) else value


def shortener(settings: Iterable[str]) -> Callable[[str], str]:
    """A function that puts names in place of paths in any text.

    ``settings`` are texts that may be paths, whatever characters these have; others are known by their form.
    """
    known = sorted({value for value in settings if is_path(value)}, key=len, reverse=True)

    def shorten(text: str) -> str:
        for path in known:
            text = text.replace(path, file_name(path))
        return _WINDOWS.sub(r"\1", _UNIX.sub(r"\1", text))

    return shorten
