"""The one error type users see, and the exit codes that scripts may rely on."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Process exit codes, documented in the README."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NO_DEVICE = 3
    STORE = 4
    OVER_BUDGET = 5
    INTERRUPTED = 130
    TERMINATED = 143


class HestError(Exception):
    """What went wrong and where (``message``), and what to type next (``hint``).

    Printed as one message on stderr; the process ends with ``exit_code``.
    """

    def __init__(self, message: str, hint: str | None = None, exit_code: Exit = Exit.FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code


class Interrupted(HestError):
    """An orderly stop asked for by a signal; what was finished is safe on disk."""
