"""``hestctl env``: what this machine has, and what hestctl would use."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from hestctl.cli import options as o


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(env)


def env(
    settings: Annotated[bool, typer.Option("--settings", help="Every key, its value and origin.")] = False,
    profile: o.ProfileOption = "quickstart",
    db: o.DbOption = None,
    set_: o.SetOption = None,
    json: o.JsonOption = False,
) -> None:
    """The doctor: versions, device, meter and its permissions, paths, schema."""
    from hestctl.cli import out
    from hestctl.cli.settings_view import show_settings
    from hestctl.workflows.doctor import examine

    resolved = o.resolve(profile, set_, db=db)
    if settings:
        show_settings(resolved, resolved.settings, json=json)
        return
    found = examine(resolved.settings, dict(os.environ))
    if json:
        out.document(found)
        return
    for section, facts in found.items():
        rows = [(key, "-" if value is None else str(value)) for key, value in facts.items()]
        out.table(section, ("what", "found"), rows, left=2)
