"""A document as plain data: sections of paragraphs, tables and figures, which templates render."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias


@dataclass(frozen=True, slots=True)
class Paragraph:
    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True, slots=True)
class Bullets:
    kind: ClassVar[str] = "bullets"
    items: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """A table; its first ``left`` columns are words, the others numbers. ``notes`` stand below."""

    kind: ClassVar[str] = "grid"
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    left: int = 1
    title: str = ""


@dataclass(frozen=True, slots=True)
class Code:
    """Lines to be typed."""

    kind: ClassVar[str] = "code"
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure; ``name`` is its file's, with the suffix of its type; ``alt`` says in words what it shows."""

    kind: ClassVar[str] = "picture"
    name: str
    title: str
    caption: str
    mime: str
    data: bytes
    alt: str = ""


@dataclass(frozen=True, slots=True)
class Fold:
    """Blocks that are closed until a reader opens them."""

    kind: ClassVar[str] = "fold"
    summary: str
    blocks: tuple[Block, ...]


Block: TypeAlias = Paragraph | Bullets | Grid | Code | Picture | Fold


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    blocks: tuple[Block, ...]

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True, slots=True)
class Document:
    """``verdict`` is the one sentence that stands first, ``because`` what it rests on."""

    title: str
    verdict: str
    because: tuple[str, ...]
    sections: tuple[Section, ...]
    made_by: str

    def pictures(self) -> list[Picture]:
        """Every figure, in order."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, Picture)]

    def mapped(self, change: Callable[[str], str]) -> Document:
        """The same with ``change`` made to every text."""
        sections = tuple(
            Section(change(section.title), _mapped(section.blocks, change)) for section in self.sections
        )
        because = tuple(change(text) for text in self.because)
        return Document(change(self.title), change(self.verdict), because, sections, change(self.made_by))


def _mapped(blocks: Iterable[Block], change: Callable[[str], str]) -> tuple[Block, ...]:
    def each(texts: Iterable[str]) -> tuple[str, ...]:
        return tuple(change(text) for text in texts)

    found: list[Block] = []
    for block in blocks:
        match block:
            case Paragraph():
                found.append(Paragraph(change(block.text)))
            case Bullets():
                found.append(Bullets(each(block.items)))
            case Code():
                found.append(Code(each(block.lines)))
            case Picture():
                title, caption, alt = each((block.title, block.caption, block.alt))
                found.append(replace(block, title=title, caption=caption, alt=alt))
            case Fold():
                found.append(Fold(change(block.summary), _mapped(block.blocks, change)))
            case Grid():
                rows = tuple(each(row) for row in block.rows)
                found.append(
                    Grid(each(block.headers), rows, each(block.notes), block.left, change(block.title))
                )
    return tuple(found)
