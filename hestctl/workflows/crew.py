"""The other processes of a search on this machine: started, watched, and ended with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hestctl.progress import Progress
from hestctl.store.folder import RunFolder

_GRACE_S = 60.0
"""How long a worker that was told to stop may take to save its training."""


@dataclass(slots=True)
class Crew:
    """The workers that were started, each with the file that has its words."""

    progress: Progress
    at_work: dict[Path, subprocess.Popen[bytes]] = field(default_factory=dict)

    def look(self) -> None:
        """Tell of workers that failed; the others go on, and try their trials again."""
        for log, process in list(self.at_work.items()):
            if process.poll() is not None:
                del self.at_work[log]
                if process.returncode != 0:
                    words = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
                    last = f": {words[-1].strip()}" if words else ""
                    self.progress.note(f"a worker ended with code {process.returncode}{last} (see {log})")


@contextmanager
def crew(
    others: int, folder: RunFolder, db: Path, device: torch.device, progress: Progress
) -> Iterator[Crew]:
    """``others`` more processes at work on the search in ``folder`` until the block ends.

    They share the threads of a CPU with this process. At the end they are told to stop, and killed if they
    do not within a minute: a trial that one of them loses is tried again.
    """
    threads = torch.get_num_threads()
    workers = Crew(progress)
    environment = dict(os.environ)
    if device.type == "cpu" and others:
        share = max(1, threads // (1 + others))
        torch.set_num_threads(share)
        environment |= {"OMP_NUM_THREADS": str(share)}
    command = [sys.executable, "-m", "hestctl", "train", "--join", folder.run_id, "--db", str(db.absolute())]
    try:
        for number in range(2, 2 + others):
            log = folder.path / f"worker-{number}.log"
            with log.open("ab") as words:
                workers.at_work[log] = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=words,
                    stderr=words,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is this process's, which passes it on
                )
        yield workers
    finally:
        torch.set_num_threads(threads)
        _end(list(workers.at_work.values()))


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE_S
    try:
        for process in processes:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
