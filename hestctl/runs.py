"""Start -> work -> record, the same for every command.

A run is ``started`` in its folder and in the index before any work, works with no handle on the
store, and ends as ``finished``, ``failed`` or ``interrupted``, whatever ended it.
"""

from __future__ import annotations

import platform
import re
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime
from types import FrameType
from typing import Any

from hestctl import __version__
from hestctl.errors import Exit, HestError, Interrupted
from hestctl.records import LayerUse, Run, RunStatus, Sample, StepMetric, Window
from hestctl.store.files import ensure_space
from hestctl.store.folder import RunFolder, now
from hestctl.store.store import Store

_STOPS = {
    signal.SIGINT: ("Ctrl-C", Exit.INTERRUPTED),
    signal.SIGTERM: ("SIGTERM", Exit.TERMINATED),
    signal.SIGUSR2: ("SIGUSR2", Exit.TERMINATED),
}

_RECORD_BYTES = 16 << 20
"""What a run is sure to need for its records and its rows in the index."""

_PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "triton",
    "zeus",
    "nvidia-ml-py",
    "optuna",
    "duckdb",
    "numpy",
    "rouge-score",
)


class Recorder:
    """What a command holds while it works: its record to fill, and where its measurements go.

    ``run`` is written at every ``commit`` and at the end. ``stop_requested`` says which signal asked
    for an orderly stop, None as long as none did. The recording methods raise HestError when the disk is
    full or read-only, and leave what was recorded before as it was.
    """

    def __init__(self, folder: RunFolder, run: Run) -> None:
        self.folder = folder
        self.run = run
        self.stop_requested: str | None = None
        self._stop_code = Exit.INTERRUPTED

    def step(self, metric: StepMetric) -> None:
        self.folder.append("steps", _values(metric))

    def sample(self, sample: Sample) -> None:
        self.folder.append("samples", _values(sample))

    def window(self, window: Window) -> None:
        self.folder.append("windows", _values(window))

    def layer_use(self, use: LayerUse) -> None:
        self.folder.append("utilisation", _values(use))

    def trial(self, trial: Mapping[str, Any]) -> None:
        """One trial of a search that has ended; its fields are the columns of ``trials``."""
        self.folder.append("trials", {"created_at": now(), **trial})

    def plan(self, plan: Mapping[str, Any]) -> None:
        """The run's hardening plan; its ``scope`` and ``emax_j`` (J) are columns of ``plans``."""
        self.folder.write_document("plan", {"created_at": now(), **plan})

    def calibration(self, calibration: Mapping[str, Any]) -> None:
        """The run's energy table; ``key`` is what ``latest_calibration`` finds it by."""
        self.folder.write_document(
            "calibration", {"calibration_id": self.run.run_id, "created_at": now(), **calibration}
        )

    def commit(self) -> None:
        """Make everything so far durable, as after a checkpoint."""
        self.folder.commit()
        self.folder.write_run(self.run)

    def truncate_steps(self, after_step: int) -> int:
        """Drop what a resumed run does again: steps after its checkpoint, and all of its evaluation.

        Returns how many steps that were.
        """
        for table in ("samples", "windows", "utilisation"):
            self.folder.forget(table)
        return self.folder.truncate_steps(after_step)

    def check(self) -> None:
        """Raise Interrupted when a signal has asked for a stop. Long loops call it between two steps."""
        if self.stop_requested is not None:
            raise Interrupted(
                f"stopped by {self.stop_requested}",
                f"what was finished is safe in {self.folder.path}",
                self._stop_code,
            )

    def request_stop(self, signum: int) -> None:
        """Note the first signal; raise KeyboardInterrupt when Ctrl-C comes after it."""
        if self.stop_requested is None:
            self.stop_requested, self._stop_code = _STOPS[signal.Signals(signum)]
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt


@contextmanager
def recording(store: Store, run: Run) -> Iterator[Recorder]:
    """Record one run: ``run`` gives its id, command and creation time, the block does the work.

    Sets right what earlier processes left in the store, then makes the run's folder and its row. Raises
    HestError before any work when the store is locked, newer or damaged (store), the id is hostile or
    taken (usage), or the disk is full. An exception in the block ends the run as ``failed`` with its text,
    Interrupted and KeyboardInterrupt as ``interrupted``; it is raised on, KeyboardInterrupt as
    Interrupted (130). When only the index cannot be written at the end, the folder is complete and the
    HestError says so.
    """
    ensure_space(store.root, _RECORD_BYTES)
    store.recover_orphans()
    run.status = "started"
    folder = RunFolder.create(store.root.absolute(), run)
    try:
        store.started(run)
    except BaseException:
        folder.discard()
        raise
    with _at_work(store, folder, run) as recorder:
        yield recorder


@contextmanager
def resume(store: Store, run_id: str, run: Run, *, force: bool = False) -> Iterator[Recorder]:
    """Record the rest of a run that was interrupted or failed, in its own folder.

    ``run`` replaces the record, but keeps the id, the creation time and the parent of the first start.
    ``force``: also take over a run that another host seems to be at work on, such as a lost container.
    Raises HestError (usage) when there is no such run, it has finished, or its process is alive;
    otherwise as ``recording``.
    """
    ensure_space(store.root, _RECORD_BYTES)
    store.recover_orphans()
    folder = store.folder(run_id)
    with store.locked():
        first = _resumable(folder, force)
        run.run_id, run.created_at, run.parent_run_id = run_id, first.created_at, first.parent_run_id
        run.status, run.finished_at, run.error = "started", None, None
        folder.reopen(run)
        store.started(run)
    with _at_work(store, folder, run) as recorder:
        yield recorder


def new_run_id(command: str, method: str | None = None) -> str:
    """An id such as ``train-hest-20261122-111530-a1b2c3d4`` (UTC), unique among parallel processes."""
    words = re.sub(r"[^a-z0-9]+", "-", f"{command}-{method or ''}".lower()).strip("-")[:39]
    return f"{words or 'run'}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


def versions() -> dict[str, str]:
    """Versions of hestctl, Python and the libraries that bear on results, importing none of them."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"hestctl": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _values(record: StepMetric | Sample | Window | LayerUse) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _resumable(folder: RunFolder, force: bool) -> Run:
    if not folder.path.exists():
        raise HestError(f"there is no run {folder.run_id} in {folder.path.parent}", exit_code=Exit.USAGE)
    run = folder.read_run()
    if run.status == "finished":
        raise HestError(f"the run {folder.run_id} has finished", "start a new one", Exit.USAGE)
    if run.status == "started":
        owner, alive = folder.owner(), folder.owner_liveness() == "alive"
        if alive or not force:
            raise HestError(
                f"the run {folder.run_id} is at work in process {owner.get('pid')} on {owner.get('host')}",
                "wait for it, or stop it first" if alive else "if that machine is lost, add --force",
                Exit.USAGE,
            )
    return run


@contextmanager
def _at_work(store: Store, folder: RunFolder, run: Run) -> Iterator[Recorder]:
    recorder = Recorder(folder, run)
    with heeding(recorder.request_stop):
        try:
            try:
                yield recorder
            except BaseException as error:
                _end_after(error, store, recorder)
                raise
            _end(store, recorder, "finished", None)
        except KeyboardInterrupt as error:
            raise Interrupted(
                "stopped at once by Ctrl-C",
                f"what was recorded is safe in {folder.path}",
                Exit.INTERRUPTED,
            ) from error
        finally:
            folder.close()


def _end(store: Store, recorder: Recorder, status: RunStatus, error: str | None) -> None:
    run = recorder.run
    run.status, run.error, run.finished_at = status, error, now()
    recorder.folder.finish(run)
    store.index(recorder.folder)


def _end_after(error: BaseException, store: Store, recorder: Recorder) -> None:
    """End the run for ``error``, which stays what the user hears of; what fails here is added to it."""
    stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
    text = error.message if isinstance(error, HestError) else f"{type(error).__name__}: {error}".rstrip(": ")
    try:
        _end(store, recorder, "interrupted" if stopped else "failed", " ".join(text.split())[:500])
    except HestError as problem:
        if isinstance(error, HestError):
            error.hint = "; ".join(part for part in (error.hint, problem.message, problem.hint) if part)
        else:
            error.add_note(problem.message)


@contextmanager
def heeding(request_stop: Callable[[int], None]) -> Iterator[None]:
    """Turn signals into requests to stop. Forked data workers inherit this, so they do not mind them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(signum: int, _frame: FrameType | None) -> None:
        request_stop(signum)

    before = {number: signal.signal(number, note) for number in _STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
