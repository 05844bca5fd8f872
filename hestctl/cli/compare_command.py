"""``hestctl compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hestctl.cli import options as o


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(compare)


def compare(
    db: Annotated[
        list[str] | None,
        typer.Option("--db", help=r"A store, or a glob of them; repeatable. \[default: runs.duckdb]"),
    ] = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help=r"Where figures go. \[default: figures]")
    ] = None,
    margin: Annotated[
        float, typer.Option(help="Points of ROUGE-Lsum that still count as equal quality.")
    ] = 1.0,
    method: Annotated[list[str] | None, typer.Option(help="Only these methods; repeatable.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Only runs on this data set.")] = None,
    formats: Annotated[str, typer.Option("--formats", help="png, pdf, svg; comma-separated.")] = "png",
    theme: Annotated[str, typer.Option(help="light or dark.")] = "light",
    csv: Annotated[Path | None, typer.Option(help="Also write the rows as CSV to this file.")] = None,
    figures: Annotated[bool, typer.Option("--figures/--no-figures", help="Draw the figures.")] = True,
    json: o.JsonOption = False,
) -> None:
    """The gap-at-equal-ROUGE table, its verdicts and figures, from one or more stores.

    Only runs on the same device, backbone, data and generation settings are compared; others are set
    apart with the reason. A gap in joules is given for measured energy alone.
    """
    from hestctl.cli import out
    from hestctl.compare.table import as_json, as_rows, summary_lines, write_csv
    from hestctl.compare.table import compare as work
    from hestctl.store.queries import connect

    stores = db or [str(o.resolve("quickstart", None).settings.db)]
    with connect(stores) as connection:
        found = work(connection, margin=margin, methods=method, dataset=dataset)
        drawn: list[Path] = []
        reasons: dict[str, str] = {}
        if figures:
            from hestctl.compare.figures import draw

            if not json:
                out.note("drawing figures")
            made = draw(
                connection,
                found,
                out_dir or Path("figures"),
                theme=theme,  # type: ignore[arg-type]
                formats=tuple(part.strip() for part in formats.split(",")),
            )
            drawn, reasons = list(made), made.reasons
    if csv is not None:
        write_csv(found, csv)
    if json:
        out.document({**as_json(found), "figures": [str(path) for path in drawn]})
        return
    for line in summary_lines(found):
        out.text(line)
    for table in as_rows(found):
        out.text()
        out.table(table.title, table.headers, table.rows)
        for line in table.notes:
            out.text(line)
    out.text()
    if drawn:
        out.text(f"{len(drawn)} figures in {(out_dir or Path('figures')).absolute()}:")
        for path in drawn:
            out.text(f"  {path.name}")
    for topic, reason in reasons.items():
        out.note(f"not drawn: {topic} ({reason})")
