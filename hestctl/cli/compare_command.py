"""``hestctl compare``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hestctl.cli import options as o

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

    from hestctl.compare.results import Comparison
    from hestctl.compare.text import TextTable


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(context_settings={"allow_extra_args": True})(compare)


def compare(
    context: typer.Context,
    db: Annotated[
        list[str] | None,
        typer.Option("--db", help=r"A store, or a glob of them; repeatable. \[default: runs.duckdb]"),
    ] = None,
    out_dir: Annotated[
        Path | None,
        typer.Option(
            "--out", help=r"Where figures go. \[default: figures; with --report into the page alone]"
        ),
    ] = None,
    margin: Annotated[
        float, typer.Option(help="Points of ROUGE-Lsum, or of accuracy, that still count as equal.")
    ] = 1.0,
    method: Annotated[list[str] | None, typer.Option(help="Only these methods; repeatable.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Only runs on this data set.")] = None,
    formats: Annotated[
        str | None, typer.Option("--formats", help=r"png, pdf, svg; comma-separated. \[default: png]")
    ] = None,
    theme: Annotated[str, typer.Option(help="light or dark.")] = "light",
    csv: Annotated[Path | None, typer.Option(help="Also write the rows as CSV to this file.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write all of it to this page (.html, self-contained), and as Markdown beside it."),
    ] = None,
    search: Annotated[
        str | None,
        typer.Option("--search", metavar="RUN", help="Draw and list the trials of one search instead."),
    ] = None,
    figures: Annotated[bool, typer.Option("--figures/--no-figures", help="Draw the figures.")] = True,
    every: Annotated[
        bool,
        typer.Option(
            "--all", help="Every table: all pairs and measures, A/A control, expectations, runs set apart."
        ),
    ] = False,
    runs: Annotated[
        bool, typer.Option("--runs", help="A row for every run, not for every configuration.")
    ] = False,
    json: o.JsonOption = False,
) -> None:
    """The gap at equal ROUGE (or accuracy), its verdict and what would settle it, from one or more stores.

    Only runs on the same device, backbone, data and generation settings are compared; others are set
    apart with the reason. A gap in joules is given for measured energy alone. --report writes the whole
    comparison, with figures, methods and provenance, to one page that can be sent to others.
    """
    from hestctl.cli import compare_targets, out
    from hestctl.compare.table import as_json, write_csv
    from hestctl.compare.table import compare as work
    from hestctl.store.queries import connect

    compare_targets.refuse_words(context.args)
    stores = db or [str(o.resolve("quickstart", None).settings.db)]
    look: dict[str, Any] = {"theme": theme, "formats": compare_targets.formats_of(formats)}
    folder = out_dir or (Path("figures") if figures and report is None else None)
    compare_targets.check(stores, csv=csv, report=report, folder=folder, search=search, theme=theme)
    if formats is not None and report is not None and out_dir is None:
        out.note("the page has figures of its own: --formats is for those of a folder, --out figures")
    with connect(stores) as connection:
        if search is not None:
            _show_search(connection, search, (out_dir or Path("figures")) if figures else None, look, json)
            return
        found = work(connection, margin=margin, methods=method, dataset=dataset)
        if not json:
            # Before the figures, which take seconds.
            _show(found, every, runs)
        drawn: list[Path] = []
        reasons: dict[str, str] = {}
        if figures and not json:
            out.note("drawing figures")
        if figures and folder is not None:
            from hestctl.compare.figures import draw

            made = draw(connection, found, folder, **look)
            drawn, reasons = list(made), made.reasons
        written: list[Path] = []
        if report is not None:
            from hestctl.compare.pages import make, write

            asked = _asked(margin, method, dataset, report)
            written = write(make(connection, found, asked, draw=figures, theme=look["theme"]), report)
    if csv is not None:
        write_csv(found, csv)
    if json:
        paths = {"figures": drawn, "report": written}
        out.document({**as_json(found), **{name: [str(path) for path in of] for name, of in paths.items()}})
        return
    if folder is not None:
        _show_figures(drawn, reasons, folder)
    for path in written:
        out.text(f"report: {path}")


def _show(found: Comparison, every: bool, runs: bool) -> None:
    """The headline, the gap, and the configurations; ``every``: all the rest too."""
    from hestctl.cli import out
    from hestctl.compare.headline import headline
    from hestctl.compare.pair_tables import gap_tables
    from hestctl.compare.row_tables import apart_line, as_rows, summary_table
    from hestctl.compare.text import compared_lines

    for lead, line in headline(found).lines():
        out.text(line, lead)
    out.text()
    _show_tables(gap_tables(found, every=every))
    _show_tables(as_rows(found, runs=runs) if every else [summary_table(found, runs=runs)])
    for line in compared_lines(found):
        out.text(line)
    if not every:
        rest = "every pair and measure: --all, or as a page: --report FILE.html"
        out.text("; ".join(filter(None, (apart_line(found), rest))))


def _asked(margin: float, methods: Sequence[str] | None, dataset: str | None, report: Path) -> list[str]:
    """The options that bear on what is compared, as they would be typed again."""
    words = ["--margin", f"{margin:g}"]
    for method in methods or ():
        words += ["--method", method]
    if dataset is not None:
        words += ["--dataset", dataset]
    return [*words, "--report", report.name]


def _show_tables(tables: Sequence[TextTable]) -> None:
    from hestctl.cli import out

    for table in tables:
        out.table(table.title, table.headers, table.rows)
        for line in table.notes:
            out.text(line)
        out.text()


def _show_figures(drawn: Sequence[Path], reasons: Mapping[str, str], folder: Path) -> None:
    from hestctl.cli import out

    if drawn:
        out.text(f"{len(drawn)} figures in {folder.absolute()}")
    for topic, reason in reasons.items():
        out.note(f"not drawn: {topic} ({reason})")


def _show_search(
    connection: DuckDBPyConnection, run_id: str, folder: Path | None, look: dict[str, Any], json: bool
) -> None:
    """The trials of one search, as a table or a document, and its figures."""
    from hestctl.cli import out
    from hestctl.cli.run_ids import search_id
    from hestctl.compare.search import find_search, search_document, trial_table, trials

    run_id = search_id(connection, run_id)
    run, found = find_search(connection, run_id), trials(connection, run_id)
    drawn: list[Path] = []
    reasons: dict[str, str] = {}
    if folder is not None:
        from hestctl.compare.search_figures import draw_search

        made = draw_search(connection, run_id, folder, **look)
        drawn, reasons = list(made), made.reasons
    if json:
        out.document({**search_document(run, found), "figures": [str(path) for path in drawn]})
        return
    table = trial_table(run, found)
    out.table(table.title, table.headers, table.rows, left=3)
    for line in table.notes:
        out.text(line)
    if folder is not None:
        _show_figures(drawn, reasons, folder)
