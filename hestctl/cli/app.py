"""The typer application, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from typing import Annotated

import typer

from hestctl import __version__
from hestctl.errors import Exit, HestError

app = typer.Typer(
    name="hestctl",
    help="Fine-tune language models under an energy budget, and prove the saving with a meter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "Exit codes: 0 ok; 1 failed; 2 usage or settings; 3 no usable device or meter; "
        "4 store locked, newer or damaged; 5 done, but the budget cannot be met; 130 Ctrl-C; 143 SIGTERM."
    ),
)


def _version(wanted: bool) -> None:
    if wanted:
        from hestctl.cli import out

        out.text(f"hestctl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if debug:
        os.environ["HESTCTL_DEBUG"] = "1"


for _name in ("calibrate", "train", "harden", "profile", "compare", "runs", "env"):
    import_module(f"hestctl.cli.{_name}_command").register(app)


def main() -> None:
    """Run the command line; every expected error is one message and its documented exit code."""
    from hestctl.cli import out

    if not os.environ.get("HESTCTL_DEBUG"):
        # What libraries will change in their next version is for developers, not for users.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        app(standalone_mode=True)
    except HestError as error:
        if os.environ.get("HESTCTL_DEBUG"):
            raise
        out.problem(error.message, error.hint)
        sys.exit(int(error.exit_code))
    except KeyboardInterrupt:
        out.problem("stopped by Ctrl-C", None)
        sys.exit(int(Exit.INTERRUPTED))
    except BrokenPipeError:
        # The reader has gone: nothing more can be said on stdout, and Python must not try at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(int(Exit.FAILED))
    except Exception as error:
        if os.environ.get("HESTCTL_DEBUG"):
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        out.problem(text, "--debug before the command shows where it happened; the run's folder is kept")
        sys.exit(int(Exit.FAILED))
