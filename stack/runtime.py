"""Brings servers up and down, whichever way they run: the operations above the two runtimes."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from stack import client, engine, fit, gguf_header, gpu, integrity, keys, models, plan
from stack.choice import Choice
from stack.compose import Docker, NoEngineError
from stack.config import Project, Service
from stack.engine_log import Allocation, allocation
from stack.errors import Code, StackError
from stack.fit import Release
from stack.gguf_header import Header
from stack.host import Result, machine_lock, port_conflict, write_atomic
from stack.native import Native
from stack.server import Server

_log = logging.getLogger(__name__)
_LOAD_LINES = 2000
_PROOF_TOKENS = 32

Progress = Callable[[str, int, int], None]
"""Receives what is being done, and how much of how much is done."""

Phase = Callable[[str], contextlib.AbstractContextManager[object]]
"""Is entered for the time of a named phase."""


class Answers(Protocol):
    """What holds a server's answers against its model's record, and two servers' together."""

    def ask(self, server: Server) -> Any:
        """Ask a server a fixed set of questions."""

    def worse(self, found: Any, before: Any) -> list[str]:
        """Return what is answered worse than before, in words."""

    def prove(self, server: Server) -> None:
        """Raise StackError VERIFY where a server answers worse than its record."""


def silent(what: str, done: int, total: int) -> None:
    """Show nothing."""


class Runtime(Protocol):
    """What the Docker and the native runtime have in common."""

    name: str
    project: Project

    def check(self) -> None:
        """Make sure that it can run anything at all."""

    def built(self, service: Service) -> bool:
        """Return whether the pinned engine is built for the service."""

    def build(self, service: Service, *, source: Path) -> None:
        """Build it from a folder with the engine's source."""

    def program(self, service: Service, name: str) -> str:
        """Return the path of one of the engine's programs, as `execute` takes it."""

    def execute(self, service: Service, *argv: str) -> Result:
        """Run a program of the service's engine to its end, with no settings, model or GPU."""

    def tool(self, service: Service, name: str, *arguments: str, timeout_s: float) -> Result:
        """Run a program of the engine to its end as the server would run: settings, model, GPU.

        A path among the arguments is the container's. Raises StackError when it fails.
        """

    def start(self, service: Service, *, key: str) -> Server:
        """Start the service, replacing what is left of an earlier one."""

    def restart(self, service: Service, *, key: str) -> Server:
        """Restart the service's server, with the settings that it was started with."""

    def find(self, service: Service, *, key: str) -> Server | None:
        """Return the service's server, running or ended; None where there is nothing of it."""

    def follow(self, service: Service) -> None:
        """Show the service's log as it grows, until interrupted."""

    def stop(self, service: Service) -> bool:
        """Stop the service and remove what is left; return whether there was anything."""


@dataclass(frozen=True)
class Up:
    """A server that has generated."""

    server: Server
    was_up: bool
    ready_s: float
    """From its start to the end of its load; 0 where it was up before."""
    first: client.Completion
    allocation: Allocation | None = None
    """What the engine told of this start; None where it was up before."""
    choice: Choice | None = None
    """What was chosen for this start, if anything."""


def native(project: Project, progress: Progress = silent) -> Native:
    """Return the native runtime."""
    return Native(project, progress=lambda done, total: progress("engine", done, total))


def choose(project: Project, *, want: str | None = None, progress: Progress = silent) -> Runtime:
    """Return the runtime named `docker` or `native`; None takes Docker where an engine is.

    An engine that is there and does not answer is an error, not a reason to run natively.

    Raises:
        StackError: HOST, when Docker is wanted or present, and cannot be used.

    """
    if want == "native":
        return _alone(project, progress)
    docker = Docker(project)
    try:
        docker.check()
    except NoEngineError as error:
        if want == "docker":
            raise
        _log.info("%s Running natively.", error.cause)
        return _alone(project, progress)
    return docker


def _alone(project: Project, progress: Progress) -> Native:
    if project.gateway:
        _log.warning("GLM_GATEWAY=1 is for Docker: a native server stands there without a gateway.")
    return native(project, progress)


def present(project: Project) -> list[Runtime]:
    """Return the runtimes that can hold a server here: both, or native alone.

    Raises:
        StackError: HOST, as `Docker.client`, unless there are native servers to look at.

    """
    docker, alone = Docker(project), Native(project)
    try:
        docker.check()
    except NoEngineError:
        return [alone]
    except StackError as error:
        # Whom Docker refuses, or leaves waiting, must reach native servers all the same.
        if not any(alone.find(service, key="") for service in project.services.values()):
            raise
        _log.warning("%s Native servers alone are looked at.", error.cause)
        return [alone]
    return [docker, alone]


def build(
    runtime: Runtime, project: Project, service: Service, *, progress: Progress = silent
) -> None:
    """Build the engine for a service. Raises StackError, mostly BUILD."""
    runtime.check()
    source = engine.source(project, progress=lambda done, total: progress("source", done, total))
    runtime.build(service, source=source)


def ensure_engine(
    runtime: Runtime, project: Project, service: Service, *, progress: Progress = silent
) -> None:
    """Build the service's engine unless it is built. Raises as `build`."""
    if not runtime.built(service):
        build(runtime, project, service, progress=progress)


def include_model(project: Project, service: Service, *, progress: Progress = silent) -> list[str]:
    """Make an image that holds the service's model too; return the command that serves it.

    Raises StackError: as `ensure_model` and `build`; DISK where Docker has no room.
    """
    docker = Docker(project)
    ensure_model(project, service, stand_in=False, progress=progress)
    ensure_engine(docker, project, service, progress=progress)
    docker.include_model(service)
    return docker.alone(service)


def ensure_model(
    project: Project, service: Service, *, stand_in: bool, progress: Progress = silent
) -> Header:
    """Make sure that the service's model is there, is the locked one, and can be served.

    With `stand_in`, or where its name says that it is random, a missing one is made of random
    weights. Returns its header.

    Raises:
        StackError: LOAD when it is missing, DISK when it cannot be made, INTEGRITY when broken, not
            what lock and `compose.yaml` say, or newer than the engine.

    """
    model, path = service.model, service.model_file
    if not path.exists() and (stand_in or "random" in path.name):
        kind = "random weights" if not model.repository else "stand-in, random weights"
        models.write_random(
            path,
            recipe=model.random,
            name=f"GLM-4.7-Flash {service.quant} ({kind})",
            progress=lambda done, total: progress(path.name, done, total),
        )
    if not path.exists() and not model.repository:
        raise StackError(
            f"{service.name} needs {path.name} in {path.parent}.",
            f"git checkout -- models/{path.name}; or set another file in .env.",
            Code.LOAD,
        )
    integrity.require_verified(service, progress)
    header = gguf_header.read(path)
    gguf_header.require(path, header, model.header)
    if project.engine.build < model.min_build:
        raise StackError(
            f"{service.name} needs build >= {model.min_build} of the engine, because earlier ones "
            f"lack {model.min_build_for}; {project.engine.build} is pinned.",
            "Move x-engine in compose.yaml to a newer commit.",
            Code.INTEGRITY,
        )
    return header


def up(
    runtime: Runtime,
    project: Project,
    service: Service,
    *,
    stand_in: bool = False,
    choose: bool = False,
    leave_mib: int = 0,
    answers: Answers | None = None,
    progress: Progress = silent,
) -> Up:
    """Serve a quant: build, make or check, start, wait, and prove it.

    A server that is up already is only asked to generate. One that fails, or is interrupted on
    the way, is stopped again. With `choose`, what .env leaves open is chosen for its clients and
    what is free on the GPU, but for `leave_mib`. With `answers`, its answers must be right, too.

    Raises:
        StackError: by what failed.

    """
    runtime.check()
    key = keys.require(service, first_start="GLM_KEY_FILE" not in project.settings)
    if project.certificate:
        keys.require_certificate(project.certificate, service)
    found = runtime.find(service, key=key)
    if found and found.ended() is None:
        client.wait_ready(found)
        return Up(server=found, was_up=True, ready_s=0, first=_generate(found))

    header = prepare(
        runtime,
        project,
        service,
        choose=choose,
        leave_mib=leave_mib,
        stand_in=stand_in,
        progress=progress,
    )
    with reserved(service):
        chosen = settle(project, service, header, choose=choose, leave_mib=leave_mib)
        done = launch(runtime, chosen.service if chosen else service, key=key, answers=answers)
        return replace(done, choice=chosen)


def settle(
    project: Project,
    service: Service,
    header: Header,
    *,
    choose: bool,
    leave_mib: int = 0,
    freed: Release | None = None,
) -> Choice | None:
    """Choose a service's settings, or hold the given ones against what is free on its GPU.

    Raises:
        StackError: as `fit.choose` and `fit.check`.

    """
    if choose and (
        chosen := fit.choose(project, service, header, freed=freed, leave_mib=leave_mib)
    ):
        return chosen
    if service.gpus:
        fit.check(service, header, freed)
    return None


@contextlib.contextmanager
def reserved(*services: Service) -> Iterator[None]:
    """Keep every other load of this machine off the services' GPUs.

    Held from the look at what is free until the load has taken it: another deployment, whose own
    lock is another file, would count the same memory as free.

    Raises:
        StackError: BUSY, naming who loads.

    """
    devices = {each.uuid: each.index for service in services for each in gpu.of(service)}
    with contextlib.ExitStack() as stack:
        for uuid, index in sorted(devices.items()):
            what = f"load onto GPU {index}"
            stack.enter_context(machine_lock(f"gpu-{uuid}", what=what))
        yield


def prepare(
    runtime: Runtime,
    project: Project,
    service: Service,
    *,
    choose: bool = False,
    leave_mib: int = 0,
    stand_in: bool = False,
    progress: Progress = silent,
    replacing: Server | None = None,
) -> Header:
    """Make sure that a service can start: GPU, port, model, memory, engine. Returns its header.

    What the server that it is `replacing` holds of port and memory counts as free.

    Raises:
        StackError: by what is missing.

    """
    gpu.require(
        service,
        chosen="GLM_GPU" in project.settings,
        toolkit=service.build_args.get("CUDA_VERSION", ""),
    )
    held = replacing.port if replacing else None
    if (
        service.port
        and service.port != held
        and (holder := port_conflict(service.bind, service.port))
    ):
        cause = f"Port {service.port} on {holder.address} is taken by {holder.holder}"
        remedy = f"Stop it, or set GLM_{service.quant.upper()}_PORT in .env to another."
        with contextlib.suppress(StackError):
            own = next((each for _, each in alive(project) if each.port == service.port), None)
            if own:
                cause += f", of {own.service.name} ({own.runtime})"
                remedy = (
                    f"Put it in its place: `invoke switch --to {service.quant} --{runtime.name}`."
                )
        raise StackError(f"{cause}.", remedy, Code.PORT)
    header = ensure_model(project, service, stand_in=stand_in, progress=progress)
    # Before a build of half an hour, too.
    freed = fit.release(replacing) if replacing else None
    settle(project, service, header, choose=choose, leave_mib=leave_mib, freed=freed)
    ensure_engine(runtime, project, service, progress=progress)
    return header


def launch(
    runtime: Runtime,
    service: Service,
    *,
    key: str,
    answers: Answers | None = None,
    phase: Phase = contextlib.nullcontext,
) -> Up:
    """Start a service that can start, wait for it, and prove it, by its answers where given.

    One that fails is stopped again, and the end of its log is kept in `.state`.

    Raises:
        StackError: LOAD or STALLED by `client.wait_ready`; VERIFY or ON_CPU by `prove`; VERIFY by
            its answers.

    """
    start, log = time.monotonic(), failed_log(runtime, service)
    log.unlink(missing_ok=True)
    try:
        with phase("start"):
            server = runtime.start(service, key=key)
            client.wait_ready(server)
        ready_s = time.monotonic() - start
        with phase("prove"):
            told = allocation(server.logs(_LOAD_LINES))
            first = prove(server, told)
            if answers:
                answers.prove(server)
    except BaseException:
        try:
            if failed := runtime.find(service, key=key):
                write_atomic(log, failed.logs(_LOAD_LINES), mode=0o600)
        finally:
            runtime.stop(service)
        raise
    return Up(server=server, was_up=False, ready_s=ready_s, first=first, allocation=told)


def failed_log(runtime: Runtime, service: Service) -> Path:
    """Return where the end of the log of a start that failed is kept."""
    return runtime.project.state / f"{service.name}.failed.log"


def prove(server: Server, told: Allocation) -> client.Completion:
    """Prove a server just loaded: as configured, on its device, generating. `told` is of its log.

    Raises:
        StackError: VERIFY, ON_CPU.

    """
    service = server.service
    if other := differs(server):
        raise StackError(
            f"{service.name} is up but not as configured: {other}.",
            f"See `invoke logs --quant {service.quant}`.",
            Code.VERIFY,
        )
    if service.gpus:
        fit.check_offload(server, told)
    return _generate(server)


def _generate(server: Server) -> client.Completion:
    """Ask for a few tokens. Raises StackError VERIFY where they do not come."""
    first = client.complete(server, "Hello", tokens=_PROOF_TOKENS)
    # One character over and over is what comes of weights or kernels that yield NaN.
    if first.tokens == _PROOF_TOKENS and len(set(first.text.strip())) > 1:
        return first
    raise StackError(
        f"{server.service.name} is up but generates {first.tokens} of {_PROOF_TOKENS} tokens, "
        f"{first.text[:20]!r}.",
        f"See `invoke logs --quant {server.service.quant}`.",
        Code.VERIFY,
    )


@contextlib.contextmanager
def serving(runtime: Runtime, project: Project, service: Service) -> Iterator[Up]:
    """Serve a quant while the context lasts. Raises as `up`."""
    done = up(runtime, project, service)
    try:
        yield done
    finally:
        runtime.stop(service)


def servers_of(service: Service, runtimes: list[Runtime]) -> list[tuple[Runtime, Server]]:
    """Return a service's servers in these runtimes, running or ended.

    An unusable key is no reason not to see or stop them; a call that needs it will say so.
    """
    key = ""
    with contextlib.suppress(StackError):
        key = keys.read(service)
    pairs = [(runtime, runtime.find(service, key=key)) for runtime in runtimes]
    return [(runtime, server) for runtime, server in pairs if server]


def differs(server: Server) -> str:
    """Say in what a ready server differs from its configuration; nothing where it does not.

    Raises StackError: VERIFY, where it does not answer.
    """
    says, service = client.props(server), server.service
    file, context = service.model_file.name, plan.slot_context(service)
    pairs = {
        "model": (Path(says["model_path"]).name, file),
        "context": (says["default_generation_settings"]["n_ctx"], context),
        "slots": (says["total_slots"], service.slots),
    }
    return ", ".join(
        f"{what} {served}, not {wanted}"
        for what, (served, wanted) in pairs.items()
        if served != wanted
    )


def alive(project: Project) -> list[tuple[Runtime, Server]]:
    """Return the servers that run, loaded or not, in each runtime."""
    runtimes = present(project)
    return [
        (runtime, server)
        for service in project.services.values()
        for runtime, server in servers_of(service, runtimes)
        if server.ended() is None
    ]


def running(project: Project, quant: str | None) -> Server:
    """Return the running server of a quant, or the only one there is.

    Raises:
        StackError: USAGE, when there is none, or several and no quant is named.

    """
    wanted = project.service(quant).quant if quant else None
    found = [server for _, server in alive(project) if wanted in (None, server.service.quant)]
    if not found:
        cause = f"{quant} is not running." if quant else "Nothing runs."
        option = f" --quant {quant}" if quant else ""
        raise StackError(cause, f"Start it with `invoke up{option}`.", Code.USAGE)
    if len({server.service.quant for server in found}) > 1:
        names = ", ".join(server.service.quant for server in found)
        raise StackError(f"{names} are running.", "Name one with --quant.", Code.USAGE)
    return found[0]


def down(service: Service, runtimes: list[Runtime]) -> list[str]:
    """Stop a service where it runs or has ended; return the names of the runtimes that had it."""
    having = [runtime for runtime, _ in servers_of(service, runtimes)]
    for runtime in having:
        runtime.stop(service)
    return [runtime.name for runtime in having]
