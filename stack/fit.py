"""Whether a model fits on this machine's GPU, and whether it went there."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from stack import choice, gguf_header, gpu, models, plan, tuned
from stack.choice import Choice
from stack.config import Project, Service
from stack.engine_log import Allocation
from stack.errors import Code, StackError
from stack.gguf_header import Header
from stack.host import name
from stack.server import Server
from stack.tuned import Profile
from stack.wait import WaitTimeoutError, wait_until

_RELEASE_S = 30
_NOISE_MIB = 256

_SHARE = 0.9  # of a model's file is on the GPU: its embedding may stay behind


@dataclass(frozen=True)
class Release:
    """What a server will give back of a GPU when it stops."""

    uuid: str
    mib: int
    free_mib: int
    """The least that must be free then."""


def release(server: Server) -> Release | None:
    """Return what a running server holds: told by the driver, else planned.

    None where it has no GPU, or the GPU does not tell what is free.
    """
    service = server.service
    device = next(iter(gpu.of(service)), None)
    if device is None or device.free_mib is None:
        return None
    pids = [process.pid for process in server.processes]
    mib, noise_mib = gpu.used_by(pids, device.uuid), _NOISE_MIB
    if mib is None:
        mib = plan.ledger(service, gguf_header.read(service.model_file)).total_mib
        noise_mib += mib // 20  # a plan, not a measurement
    return Release(device.uuid, mib, device.free_mib + mib - noise_mib)


def wait_released(expected: Release, *, timeout_s: float = _RELEASE_S) -> None:
    """Wait until a stopped server's memory is free again.

    Raises:
        StackError: VRAM, with who holds what of the GPU.

    """

    def device() -> gpu.Gpu | None:
        return next((each for each in gpu.gpus() if each.uuid == expected.uuid), None)

    def free() -> bool | None:
        here = device()
        return True if here and (here.free_mib or 0) >= expected.free_mib else None

    try:
        wait_until(free, timeout_s=timeout_s, interval_s=0.1, what="not released")
    except WaitTimeoutError:
        here = device()
        told = f"{here.free_mib or 0:,} MiB are free.{held(here)}" if here else "the GPU is gone."
        raise StackError(
            f"{expected.mib:,} MiB were not released within {timeout_s:g} s: {told}",
            "End what holds them, or reset the GPU.",
            Code.VRAM,
        ) from None


def check(service: Service, header: Header, freed: Release | None = None) -> None:
    """Hold the plan against what is free on the service's GPU now, and what will be `freed`.

    Raises:
        StackError: USAGE for a context that the model has not; VRAM, with who holds the rest.

    """
    plan.check_context(service, header)
    (device,) = gpu.require(service)
    if device.free_mib is None:  # nothing to hold it against; the engine's own error is next
        return
    with _naming_holders(device):
        plan.fits(plan.ledger(service, header), device.free_mib + _from(freed, device))


def choose(
    project: Project,
    service: Service,
    header: Header,
    *,
    freed: Release | None = None,
    leave_mib: int = 0,
    profiled: bool = True,
) -> Choice | None:
    """Choose for the project's clients what .env leaves open, from what is free on the GPU now.

    That counts what will be `freed`, and not `leave_mib`. With `profiled`, as a profile says that
    holds here and fits. None where there is none, and the service has no GPU, or the GPU does not
    tell what is free.

    Raises:
        StackError: VRAM or USAGE as `choice.choose`, with who holds the rest.

    """
    device = next(iter(gpu.of(service)), None)
    free_mib = device.free_mib if device else None
    if device and free_mib is not None:
        free_mib += _from(freed, device) - leave_mib
    told = tuned.chosen(project, service) if profiled else tuned.Selection()
    said = told.said
    if told.profile:
        made = as_tuned(project, service, header, told.profile, free_mib)
        if isinstance(made, Choice):
            return made
        said = made
    if device is None or free_mib is None:
        return Choice(service, project.clients, said=said) if said and not service.gpus else None
    with _naming_holders(device):
        made = choice.choose(
            service, header, free_mib=free_mib, clients=project.clients, pinned=project.settings
        )
        return replace(made, said=said)


def as_tuned(
    project: Project, service: Service, header: Header, profile: Profile, free_mib: int | None
) -> Choice | str:
    """Return a service with a profile's settings, or say that they do not fit in what is free."""
    pinned, told = project.settings, f"as tuned on {profile.at[:10]} ({profile.path})"
    open_ = {name: value for name, value in profile.settings.items() if name not in pinned}
    varied = service.choosing(open_)
    if free_mib is None or not service.gpus:
        return Choice(varied, project.clients, said=told)
    try:
        plan.check_context(varied, header)
        ledger = plan.ledger(varied, header)
        plan.fits(ledger, free_mib)
    except StackError as error:
        return f"planned again, since {profile.path} does not fit now: {error.cause}"
    return Choice(varied, project.clients, ledger.total_mib, free_mib, told)


def _from(freed: Release | None, device: gpu.Gpu) -> int:
    """Return what a release gives back to a GPU."""
    return freed.mib if freed and freed.uuid == device.uuid else 0


@contextlib.contextmanager
def _naming_holders(device: gpu.Gpu) -> Iterator[None]:
    """Add who holds the GPU to what does not fit on it."""
    try:
        yield
    except StackError as error:
        cause = f"{error.cause}{held(device)}"
        raise StackError(cause, error.remedy, error.code) from None


def least_mib(services: list[Service]) -> int:
    """Return what services that come later will take of GPUs as `compose.yaml` has them."""
    return sum(each.ledger.total_mib for each in plans([s for s in services if s.gpus]))


def held(device: gpu.Gpu) -> str:
    """Say who holds a GPU, as a sentence after another."""
    holders = "; ".join(_holder(pid, device.uuid) for pid in device.pids)
    return f" Held by {holders or 'no process that this user may see'}."


def _holder(pid: int, uuid: str) -> str:
    used_mib = gpu.used_by([pid], uuid)
    return f"{name(pid)} (pid {pid})" + (f" {used_mib:,} MiB" if used_mib else "")


@dataclass(frozen=True)
class Planned:
    """What a service would take, and what there is of it now."""

    ledger: plan.Ledger
    file: str
    """The model's file, or the recipe of its stand-in where there is no file yet."""
    free_mib: int | None
    """None where this machine lacks the GPU."""
    largest_context: int | None
    """The most that fits in what is free and leaves 1 GiB."""
    choice: Choice | None = None
    """What was chosen, if that was asked for and can be done here."""


def plans(services: list[Service], choose_for: Project | None = None) -> tuple[Planned, ...]:
    """Plan services before anything loads, from their files or from their stand-ins' recipes.

    With `choose_for`, as `invoke up` would start them in this order.

    Raises:
        StackError: USAGE for a context that the model has not; INTEGRITY for a broken file; VRAM
            where nothing can be chosen that fits.

    """
    planned: list[Planned] = []
    for number, service in enumerate(services, start=1):
        leave_mib = sum(each.ledger.total_mib for each in planned)
        if choose_for:
            leave_mib += least_mib(services[number:])
        planned.append(_plan(service, choose_for, leave_mib))
    return tuple(planned)


def check_together(planned: tuple[Planned, ...]) -> None:
    """Hold the sum of plans against the GPU's free memory. Raises StackError VRAM."""
    free = [each.free_mib for each in planned if each.free_mib is not None]
    needed = sum(each.ledger.total_mib for each in planned)
    if free and needed > min(free):
        if len(planned) == 1:
            plan.fits(planned[0].ledger, free[0])
        raise StackError(
            f"Together they need {needed:,} MiB, {min(free):,} MiB are free.",
            "Serve one of them, or set smaller contexts.",
            Code.VRAM,
        )


def _plan(service: Service, choose_for: Project | None, leave_mib: int) -> Planned:
    file = service.model_file
    if file.exists():
        header = gguf_header.read(file)
    else:
        header = gguf_header.parse(models.plan(service.model.random).header)
    chosen = choose(choose_for, service, header, leave_mib=leave_mib) if choose_for else None
    service = chosen.service if chosen else service
    plan.check_context(service, header)
    needed = plan.ledger(service, header)
    free_mib = next((each.free_mib for each in gpu.of(service)), None)
    slots = service.slots
    return Planned(
        ledger=needed,
        file=file.name if file.exists() else f"{service.model.random} (no file yet)",
        free_mib=free_mib,
        largest_context=free_mib and plan.largest_context(service, header, free_mib, slots),
        choice=chosen,
    )


def off_gpu(server: Server, device: gpu.Gpu) -> str:
    """Say why a server's model cannot be on its GPU, by the driver alone; empty where it can."""
    pids = {process.pid for process in server.processes}
    if pids and device.pids and not pids & {*device.pids}:
        return f"GPU {device.index} has no process of it"
    size_mib = _size_mib(server.service)
    if device.used_mib is not None and device.used_mib < _SHARE * size_mib:
        return f"GPU {device.index} holds {device.used_mib:,} MiB, its file has {size_mib:,.0f} MiB"
    return ""


def _size_mib(service: Service) -> float:
    """Return the size of a model's files, of which one may have been taken away since its load."""
    files = gguf_header.parts(service.model_file)
    return sum(file.stat().st_size for file in files if file.exists()) / 2**20


def check_offload(server: Server, told: Allocation) -> None:
    """Make sure that a loaded server's model is on the GPU.

    Raises:
        StackError: ON_CPU, with what is where.

    """
    size_mib = _size_mib(server.service)
    on_gpu = {pid for device in gpu.gpus() for pid in device.pids}
    seen = not on_gpu or any(process.pid in on_gpu for process in server.processes)
    if (
        told.layers
        and told.layers == told.layers_total
        and told.model_mib >= _SHARE * size_mib
        and seen
    ):
        return
    raise StackError(
        f"{server.service.name} is loaded but not on the GPU: {told.layers} of {told.layers_total} "
        f"layers, {told.model_mib:.0f} of {size_mib:.0f} MiB, process seen by the driver: {seen}.",
        "See whether the container or process sees the GPU: `nvidia-smi`, GLM_GPU in .env.",
        Code.ON_CPU,
    )
