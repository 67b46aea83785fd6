"""Chooses how a model on a GPU is served: from the memory that is free, the file, and its clients.

Why each is chosen so was measured: `docs/settings.md`.
"""

from dataclasses import dataclass
from types import MappingProxyType

from stack import plan
from stack.config import Service, Settings
from stack.errors import Code, StackError
from stack.gguf_header import Header

LEAST_CONTEXT = 4096
"""Tokens below which a client's part is of no use: an agent's instructions alone take more."""
PRIVATE_GAIN = 2
"""How much more private caches must hold than a shared one, in which one client may grow long
while the others are short."""
FASTER: Settings = MappingProxyType({"GLM_UBATCH": "2048", "GLM_GPU_SAMPLING": "1"})


@dataclass(frozen=True)
class Choice:
    """A service as it is to be served, what it will take of the GPU, and for how many clients."""

    service: Service
    """Its `chosen` are those by the names of `.env`; pinned settings are not among them."""
    clients: int
    total_mib: int | None = None
    """None without a GPU."""
    free_mib: int | None = None
    said: str = ""
    """Which profile it is from, or why from none."""

    def __str__(self) -> str:
        """Say what each client gets, what that takes, and whether it was tuned."""
        cache = "for each, private caches" if self.service.private else "shared by all"
        told = (
            f"{self.service.context:,} tokens {cache}; {self.service.slots} slots for "
            f"{self.clients} clients"
        )
        if self.total_mib is not None:
            told += f"; {self.total_mib:,} of {self.free_mib:,} MiB free on the GPU"
        return f"{told}; {self.said}" if self.said else told


def choose(
    service: Service,
    header: Header,
    *,
    free_mib: int,
    clients: int,
    pinned: Settings,
) -> Choice:
    """Choose slots, context, private or shared cache, micro-batch and where sampling happens.

    `pinned` are the user's own settings, which stay.
    A slot a client; each with a cache of its own unless a shared one would hold half as much: in
    a shared cache every stream's attention runs over all streams' tokens. The context is the
    largest that leaves 1 GiB free.

    Raises:
        StackError: VRAM where not one client fits, or fewer than asked for, with the most that do;
            USAGE as `plan.check_context`.

    """

    def candidate(clients: int, shared: str) -> Service:
        chosen = {**FASTER, "GLM_SLOTS": str(clients), "GLM_SHARED_CACHE": shared}
        chosen = {name: value for name, value in chosen.items() if name not in pinned}
        varied = service.choosing(chosen)
        if "GLM_CONTEXT" in pinned:
            return varied
        most = plan.largest_context(varied, header, free_mib, varied.slots)
        return varied.choosing({"GLM_CONTEXT": str(most)})

    def best(clients: int) -> Service:
        shared, private = candidate(clients, "1"), candidate(clients, "0")
        gains = clients == 1 or private.cells >= PRIVATE_GAIN * shared.cells
        return private if gains else shared

    found = best(clients)
    if found.cells < clients * LEAST_CONTEXT:
        fewer = range(clients - 1, 0, -1)
        most = next((n for n in fewer if best(n).cells >= n * LEAST_CONTEXT), 0)
        raise StackError(
            f"{found.name} has no room for {clients} clients on GPU "
            f"{', '.join(found.gpus)}: {free_mib:,} MiB are free.",
            f"It can hold {most}, at {LEAST_CONTEXT:,} tokens each."
            if most
            else "Free memory there, or take a smaller quant.",
            Code.VRAM,
        )
    plan.check_context(found, header)
    ledger = plan.ledger(found, header)
    plan.fits(ledger, free_mib)
    return Choice(found, clients, ledger.total_mib, free_mib)
