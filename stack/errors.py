"""The one error that reaches a user, and its exit codes."""

from enum import IntEnum


class Code(IntEnum):
    """Exit codes, one for each kind of trouble a script may want to tell apart."""

    CHECK = 1
    USAGE = 2
    BUSY = 3
    HOST = 10
    DISK = 11
    VRAM = 12
    PORT = 13
    DOWNLOAD = 20
    INTEGRITY = 21
    BUILD = 30
    LOAD = 40
    STALLED = 41
    ON_CPU = 42
    VERIFY = 50
    MISSED = 51
    RESTORED = 60
    DARK = 61


class StackError(Exception):
    """A failure that a user can act on.

    Args:
        cause: one line, what was attempted and what happened.
        remedy: one line, what to do next.
        code: the exit code of the process.

    """

    def __init__(self, cause: str, remedy: str, code: Code) -> None:
        """Join the two lines; both stay readable as attributes."""
        super().__init__(f"{cause}\n{remedy}")
        self.cause = cause
        self.remedy = remedy
        self.code = code
