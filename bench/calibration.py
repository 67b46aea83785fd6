"""How far the generator itself errs, measured against a server whose timing is known."""

from dataclasses import dataclass

LIMIT = 0.1
"""The part of the time between tokens that the client may err by."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The generator's own error at so many streams and such a rate of events."""

    streams: int
    itl_ms: float
    events: int
    kernel: bool
    """Whether the stamps were the kernel's."""
    receive_p50_ms: float
    """Stamp of an event less the time at which the server sent it."""
    receive_p99_ms: float
    ttft_p99_ms: float
    """TTFT as recorded less TTFT as the server had it, in absolute value."""
    cpu_us: float
    """The generator's CPU time an event."""
    shared: float
    """The part of the reads that held several events, which share one stamp."""
    lag_p99_ms: float
    """How late the event loop came back."""
    reason: str | None = None
    """Why the generator cannot be trusted here; None where it can."""


def calibrate(streams: int, *, itl_ms: float, tokens: int = 128) -> Calibration:
    """Run the generator against the built-in server: `streams` at once, `tokens` each.

    Raises:
        StackError: HOST where the built-in server does not start.

    """
    raise NotImplementedError
