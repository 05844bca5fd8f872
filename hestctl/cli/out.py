"""The one module that writes to stdout and stderr: results there, everything else here."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from hestctl.cli.layout import Layout, blocks, fit, fold

_PIPE_WIDTH = 120
"""Columns of a table that goes to a file or a pipe, where there is no terminal to ask."""

_BAR_FROM = 110
"""Columns of a terminal in which there is room for a bar beside the figures."""

_PLAIN_EVERY_S = 10.0


def _console(stream: TextIO) -> Console:
    """A console on the stream as it is now; a pipe has no width to ask for."""
    return Console(file=stream, highlight=False, width=None if stream.isatty() else _PIPE_WIDTH)


def document(value: Mapping[str, Any]) -> None:
    """One JSON document on stdout. Raises ValueError for a number JSON does not have."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False, default=str) + "\n")


def text(line: str = "", lead: str = "") -> None:
    """A line of the result; where a terminal breaks it, the rest stands below what follows ``lead``."""
    console = _console(sys.stdout)
    room = console.width - len(lead)
    if console.is_terminal and room > 0:
        line = fold(line, room).replace("\n", "\n" + " " * len(lead))
    console.print(Text(lead + line), soft_wrap=True)


def note(line: str) -> None:
    """A line about the work, on stderr."""
    _say(_console(sys.stderr), Text(line, style="dim"))


def problem(message: str, hint: str | None) -> None:
    """The one message an error makes: what and where, then what to type next."""
    console = _console(sys.stderr)
    _say(console, Text.assemble(("error: ", "bold red"), message))
    if hint:
        # Never broken into lines: it holds commands and paths to copy.
        console.print(Text(f"  hint: {hint}"), soft_wrap=True)


def _say(console: Console, line: Text) -> None:
    """Break at words on a terminal, which would break inside them; a pipe gets one line whole."""
    console.print(line, soft_wrap=not console.is_terminal)


def table(
    title: str,
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int = 1,
    caption: str = "",
) -> None:
    """A table on stdout; the first ``left`` columns are words, the others numbers.

    It is never cut: cells are folded, rules go, and where columns do not fit side by side each row is a
    block. Title and caption stand outside the table: within, they would be broken at its width.
    """
    console = _console(sys.stdout)
    _say(console, Text(title, style="bold"))
    found = fit(headers, rows, console.width)
    if found is None:
        for line in blocks(headers, rows, console.width):
            console.print(Text(line), soft_wrap=True)
    else:
        console.print(_drawn(found, left), soft_wrap=True)
    if caption:
        _say(console, Text(caption))


def _drawn(layout: Layout, left: int) -> Table:
    drawn = Table() if layout.ruled else Table(box=None, pad_edge=False, padding=(0, 1))
    for index, (header, width) in enumerate(zip(layout.headers, layout.widths, strict=True)):
        drawn.add_column(
            Text(header),
            justify="left" if index < left else "right",
            vertical="middle",
            no_wrap=True,
            width=width,
        )
    for row in layout.rows:
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn


class Reporter:
    """Progress of one command: a live bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, bars: Progress | None) -> None:
        self._bars = bars
        self._task: TaskID | None = None
        self._stage = ""
        self._told_s = 0.0

    def note(self, line: str) -> None:
        if self._bars is not None:
            _say(self._bars.console, Text(line, style="dim"))
        else:
            note(line)

    def advance(self, stage: str, done: int, total: int, figures: Mapping[str, float | None]) -> None:
        told = " ".join(f"{name} {_short(value)}" for name, value in figures.items() if value is not None)
        if self._bars is not None:
            if self._task is None or stage != self._stage:
                if self._task is not None:
                    self._bars.remove_task(self._task)
                self._task = self._bars.add_task(stage, total=total, figures="")
            self._bars.update(self._task, completed=done, total=total, figures=told)
        elif stage != self._stage or done == total or time.monotonic() - self._told_s > _PLAIN_EVERY_S:
            self._told_s = time.monotonic()
            note(f"{stage} {done}/{total} {told}")
        self._stage = stage


def _short(value: float) -> str:
    """Four digits, and no powers of ten for what is read as a whole number."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


@contextmanager
def reporting(quiet: bool = False) -> Iterator[Reporter]:
    """A reporter on stderr for the time of one command."""
    console = _console(sys.stderr)
    if quiet or not console.is_terminal:
        yield _Quiet(None) if quiet else Reporter(None)
        return
    # The figures take what the others leave, and are cut where that is too little.
    figures = TextColumn("{task.fields[figures]}", table_column=Column(ratio=1, no_wrap=True))
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        figures,
    ]
    if console.width >= _BAR_FROM:
        columns.insert(1, BarColumn(bar_width=16))
    with Progress(*columns, console=console, transient=True, expand=True) as bars:
        yield Reporter(bars)


class _Quiet(Reporter):
    def note(self, line: str) -> None:
        """Says nothing."""

    def advance(self, stage: str, done: int, total: int, figures: Mapping[str, float | None]) -> None:
        """Says nothing."""
