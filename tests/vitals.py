"""What a process holds: memory, threads, files."""

from dataclasses import dataclass
from pathlib import Path

from stack.host import Process


@dataclass(frozen=True)
class Vitals:
    """Sizes in MiB; `peak_mib` is the most since the process began."""

    resident_mib: float
    peak_mib: float
    threads: int
    files: int

    @classmethod
    def of(cls, process: Process) -> "Vitals":
        """Return a living process's. Raises OSError where it is gone, or another user's."""
        folder = Path(f"/proc/{process.pid}")
        lines = (folder / "status").read_text().splitlines()
        fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        return cls(
            resident_mib=int(fields["VmRSS"][0]) / 1024,
            peak_mib=int(fields["VmHWM"][0]) / 1024,
            threads=int(fields["Threads"][0]),
            files=len(list((folder / "fd").iterdir())),
        )
