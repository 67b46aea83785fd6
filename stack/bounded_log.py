"""Keeps a log that a process writes within bounds, as Docker does a container's.

`host.spawn` runs this file beside the process, with the standard library alone. The process writes
to the file itself: whatever becomes of this one, it neither waits nor fails.
"""

import contextlib
import os
import select
import shutil
import sys
from pathlib import Path

EVERY_S = 0.25


def older(log: Path, number: int = 1) -> Path:
    """Return where the part of a log is that was written so many parts ago."""
    return log.with_name(f"{log.name}.{number}")


def bound(log: Path, *, most_bytes: int, files: int) -> None:
    """Begin a log anew once it is over its bound, and keep its last parts, `files` with itself.

    Its writer has it open and appends: so it is copied and emptied, and a line that comes between
    the two is lost. Where there is no room for the copy, all of it is.
    """
    if log.stat().st_size < most_bytes:
        return
    with contextlib.suppress(OSError):
        for number in range(files - 1, 1, -1):
            with contextlib.suppress(FileNotFoundError):
                older(log, number - 1).replace(older(log, number))
        if files > 1:
            shutil.copy(log, older(log))  # with its mode
    os.truncate(log, 0)


def main(log: str, most_bytes: str, files: str, pid: str) -> None:
    """Look at the log until its writer has ended."""
    os.umask(0o077)
    writer = os.pidfd_open(int(pid))
    while not select.select([writer], [], [], EVERY_S)[0]:
        with contextlib.suppress(OSError):
            bound(Path(log), most_bytes=int(most_bytes), files=int(files))


if __name__ == "__main__":
    main(*sys.argv[1:])
