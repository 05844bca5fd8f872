"""The typer application, and the one place where errors become exit codes."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Annotated

import typer

from hestctl import __version__
from hestctl.errors import Exit, HestError, Interrupted

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


_STOPS = {
    signal.SIGINT: ("Ctrl-C", Exit.INTERRUPTED),
    signal.SIGTERM: ("SIGTERM", Exit.TERMINATED),
    signal.SIGUSR2: ("SIGUSR2", Exit.TERMINATED),
}
_AGAIN_S = 0.3


def main() -> None:
    """Run the command line; every expected error is one message and its documented exit code."""
    if not os.environ.get("HESTCTL_DEBUG"):
        # What libraries will change in their next version is for developers, not for users.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
    caught: list[int] = []
    try:
        with _signals(caught), _warnings_told():
            app()
    except BaseException as error:
        if os.environ.get("HESTCTL_DEBUG"):
            raise
        sys.exit(_ended(error, caught))


@contextmanager
def _signals(caught: list[int]) -> Iterator[None]:
    """Make a signal an exception, and note it; a run at work has handlers of its own that save first."""

    def stop(signum: int, _frame: FrameType | None) -> None:
        if signum in _STOPS:
            caught.append(signum)
        # Raised again until it ends the program: libraries being imported swallow exceptions.
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (*_STOPS, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _warnings_told() -> Iterator[None]:
    """Tell what hestctl itself logs, such as whom it waits for, as a line on stderr."""

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            from hestctl.cli import out

            out.note(record.getMessage())

    logger, handler = logging.getLogger("hestctl"), Told(logging.WARNING)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def _ended(error: BaseException, caught: Sequence[int]) -> int | str | None:
    """Tell the user what ended the program, in one message; returns the exit code."""
    from hestctl.cli import out

    if isinstance(error, Interrupted) or (isinstance(error, HestError) and not caught):
        out.problem(error.message, error.hint)
        return int(error.exit_code)
    done = isinstance(error, SystemExit) and error.code != Exit.INTERRUPTED
    if caught and not done:
        # Whatever the error: some libraries turn the exception of a signal into one of their own.
        name, code = _STOPS[signal.Signals(caught[0])]
        out.problem(f"stopped by {name}", None)
        return int(code)
    if isinstance(error, SystemExit):
        return error.code
    if isinstance(error, OSError) and error.strerror:
        place = f" ({error.filename})" if error.filename else ""
        out.problem(f"{error.strerror}{place}", "check that path, its permissions and the space there")
    else:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        out.problem(text, f"to see where: hestctl --debug {shlex.join(sys.argv[1:])}")
    return int(Exit.FAILED)
