"""A report as one self-contained HTML page, and as Markdown with the same content beside it."""

from __future__ import annotations

import base64
import re
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from urllib.parse import quote

import duckdb
from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from hestctl import __version__
from hestctl.compare import chapters, evidence
from hestctl.compare.document import Document, Picture
from hestctl.compare.headline import headline
from hestctl.compare.names import shortener
from hestctl.compare.provenance import gather
from hestctl.compare.results import Comparison
from hestctl.compare.style import Theme
from hestctl.errors import Exit, HestError
from hestctl.store.files import write_whole

_INLINE: Final = re.compile(r"([\\`*_\[\]|~$])")
_LEADING: Final = re.compile(r"^(\d*)([-+#>=]|(?<=\d)[.)](?=\s|$))")
_CODE: Final = re.compile(r"`([\w./][^`|]*)`")
_MADE_BY: Final = "Made by hestctl"


def check_place(path: Path) -> None:
    """Raise HestError (usage) where the page cannot be written, before any work is done for it."""
    hint = "give a file's name: --report report.html"
    if path.is_dir():
        raise HestError(f"--report {path} is a folder", hint, Exit.USAGE)
    if path.suffix.lower() != ".html":
        raise HestError(f"--report {path} does not end in .html", hint, Exit.USAGE)
    check_folder(path, "--report")
    beside = path.with_suffix(".md")
    if beside.exists() and not (beside.is_file() and _made_here(beside)):
        raise HestError(
            f"--report {path} would replace {beside}, which is no report of hestctl",
            "give another name, or move that file away",
            Exit.USAGE,
        )


def check_folder(path: Path, flag: str) -> None:
    """Make the folder of ``path``, and raise HestError (usage) where nothing can be written to it."""
    if path.is_dir():
        raise HestError(f"{flag} {path} is a folder", "give a file's name", Exit.USAGE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise HestError(
            f"{flag} {path} cannot be written: {reason}", "name a folder that you may write to", Exit.USAGE
        ) from None


def _made_here(path: Path) -> bool:
    """Whether the Markdown file at ``path`` ends as a report does."""
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    return bool(lines) and lines[-1].startswith(_MADE_BY)


def make(
    connection: duckdb.DuckDBPyConnection,
    comparison: Comparison,
    asked: Sequence[str],
    *,
    draw: bool = True,
    theme: Theme = "light",
) -> Document:
    """The report of ``comparison``; ``asked`` are the options of `compare` that made it.

    Its texts name no absolute path.
    """
    found: list[Picture] = []
    reasons: dict[str, str] = {}
    if draw:
        from hestctl.compare.pictures import pictures

        found, reasons = pictures(connection, comparison, theme)
    origin = gather(connection, comparison)
    shorten = shortener([*comparison.facts.values(), *origin.texts()])
    facts, first = comparison.facts, headline(comparison)
    document = Document(
        title=f"Energy at equal quality: {facts['backbone']} on {facts['dataset']}",
        verdict=first.sentence,
        because=tuple(first.reasons()),
        sections=(
            chapters.compared(comparison, origin.settings()),
            chapters.gaps(comparison),
            chapters.rows(comparison),
            chapters.expectations(comparison),
            chapters.repeats(comparison, origin.meter_check),
            chapters.figures(found, reasons, draw),
            evidence.not_measured(comparison, reasons),
            evidence.method(comparison, origin),
            evidence.provenance_section(comparison, origin),
            evidence.repeat(comparison, origin, asked),
            evidence.glossary(comparison),
        ),
        made_by=f"{_MADE_BY} {__version__} on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
    )
    return document.mapped(shorten)


def write(document: Document, path: Path) -> list[Path]:
    """Write ``path``, the Markdown beside it and a folder of its figures; each file whole or not at all.

    The page comes last, so that what stands there is never newer than the files beside it.
    """
    folder = path.with_name(f"{path.stem}_files")
    pictures = document.pictures()
    if pictures:
        folder.mkdir(exist_ok=True)
    for picture in pictures:
        write_whole(folder / picture.name, picture.data)
    beside = path.with_suffix(".md")
    write_whole(beside, as_markdown(document, folder.name))
    write_whole(path, as_html(document))
    return [path, beside]


def as_html(document: Document) -> str:
    """One page: styles and figures are in it, nothing is fetched, no script is needed or allowed."""
    environment = _environment(finalize=_coded)
    environment.filters |= {"data_uri": _data_uri, "plain": lambda text: Markup(escape(text))}
    return environment.get_template("report.html.jinja").render(document=document)


def as_markdown(document: Document, folder: str) -> str:
    """The same as Markdown, of GitHub's kind; figures are files in ``folder``."""
    environment = _environment(finalize=_escaped)
    environment.filters |= {
        "fenced": _fenced,
        "html": lambda text: Markup(escape(text)),
        "link": lambda text: Markup(quote(text)),
    }
    text = environment.get_template("report.md.jinja").render(document=document, folder=folder)
    return re.sub(r"\n{3,}", "\n\n", text)


def _coded(value: object) -> object:
    """Words between backticks as code, in HTML."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(value))))


def _environment(finalize: Callable[[object], object] | None = None) -> Environment:
    return Environment(
        loader=PackageLoader("hestctl.compare"),
        autoescape=True,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _data_uri(picture: Picture) -> str:
    return f"data:{picture.mime};base64,{base64.b64encode(picture.data).decode('ascii')}"


def _escaped(value: object) -> object:
    """A text that Markdown shows as it is, on one line; what is marked up already stays."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    plain = " ".join(value.split()).replace("&", "&amp;").replace("<", "&lt;")
    parts = _CODE.split(plain)
    parts[::2] = [_INLINE.sub(r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [f"`{part}`" for part in parts[1::2]]
    return Markup(_LEADING.sub(r"\1\\\2", "".join(parts)))


def _fenced(lines: Sequence[str]) -> Markup:
    """A block of code with a fence longer than any run of backticks in it."""
    text = "\n".join(lines)
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return Markup(f"{fence}sh\n{text}\n{fence}")
