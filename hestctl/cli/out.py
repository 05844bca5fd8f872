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


def text(line: str = "") -> None:
    """A line of the result."""
    _say(_console(sys.stdout), Text(line))


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

    The first column names its row and stays on one line. Title and caption stand outside the table:
    within, they would be broken at its width, however narrow.
    """
    console = _console(sys.stdout)
    _say(console, Text(title, style="bold"))
    columns = list(zip(headers, *rows, strict=True))
    widths = [max(len(line) for cell in column for line in cell.split("\n")) for column in columns]
    if sum(widths) + 3 * len(widths) + 1 > console.width:
        # In too narrow a terminal an interval stands below its value: it would be broken at its comma.
        rows = [[cell.replace(" [", "\n[") for cell in row] for row in rows]
    out = Table()
    for index, header in enumerate(headers):
        out.add_column(
            Text(header),
            justify="left" if index < left else "right",
            no_wrap=index == 0 and left > 0,
            overflow="fold",
            vertical="middle",
            min_width=min(_longest_word(header, *(row[index] for row in rows)), 24),
        )
    for row in rows:
        out.add_row(*(Text(cell) for cell in row))
    console.print(out)
    if caption:
        _say(console, Text(caption))


def _longest_word(*cells: str) -> int:
    """Columns that a column of these cells needs before a word has to break."""
    return max((len(word) for cell in cells for word in cell.split()), default=1)


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
