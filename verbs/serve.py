"""Serve, stop, look, ask."""

import contextlib
import logging
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from invoke.context import Context

from verbs.terminal import acting, read_project, select, task

if TYPE_CHECKING:
    from stack.config import Project
    from stack.runtime import Up


LINES = 200


@task
def up(
    _: Context,
    quant: list[str],
    clients: str = "",
    native: bool = False,
    docker: bool = False,
    stand_in: bool = False,
) -> None:
    """Serve quants: make what is missing, start, wait, and see them generate."""
    from stack import fit, runtime

    with acting("up", native=native, docker=docker, stand_in=stand_in, GLM_CLIENTS=clients) as act:
        services = select(act.project, quant)
        for number, service in enumerate(services, start=1):
            done = runtime.up(
                act.runtime,
                act.project,
                service,
                stand_in=stand_in,
                choose=True,
                leave_mib=fit.least_mib(services[number:]),
                progress=act.progress,
            )
            try:
                tell_up(act.project, done)
            except KeyboardInterrupt:  # too late to undo it; a second one ends the next quant
                print(f"{service.name} is up.")


def tell_up(project: "Project", up: "Up") -> None:
    """Say of a server what it is, how it is reached, and what can be done next."""
    from stack import runtime, status

    state, service = status.Looks(project).state(up.server), up.server.service
    open_ = {name: value for name, value in service.chosen.items() if name not in project.settings}
    configured = project.service(service.quant).choosing(open_)
    if other := runtime.differs(replace(up.server, service=configured)):
        logging.getLogger("stack").warning("It was started with %s; down and up again.", other)
    if up.server.runtime == "docker" and up.server.gateway != project.gateway:
        logging.getLogger("stack").warning(
            "It has %s gateway; down and up again.", "a" if up.server.gateway else "no"
        )
    how = "was up already" if up.was_up else f"is up, loaded in {up.ready_s:.1f} s"
    print(f"{service.name} ({state.runtime}) {how} and generates.")
    print(f"  URL      {state.url}/v1")
    print(f"  key      in {service.key_file}")
    print(f"  model    {service.alias}: {state.model}")
    print(f"  context  {up.choice or f'{state.context:,} tokens, {state.slots} slots'}")
    print(
        f"  speed    {up.first.decode_tokens_s:.0f} tokens/s, one client, {up.first.tokens} tokens"
    )
    option = f" --quant {service.quant}"
    print("Next:")
    for command in (f"ask 'hello'{option}", "status", f"down{option}"):
        print(f"  uv run invoke {command}")


@task
def down(_: Context, quant: list[str]) -> None:
    """Stop quants, all of them if none is named."""
    from stack import host, runtime, watch

    project = read_project()
    with host.lock(project.state, verb="down"):
        runtimes = runtime.present(project)
        for service in select(project, quant or list(project.services)):
            watch.forget(project, service)
            for name in runtime.down(service, runtimes):
                print(f"{service.name} ({name}) is stopped.")
    print("Nothing runs." if not quant else "Done.")


@task
def logs(_: Context, quant: list[str], follow: bool = False) -> None:
    """Show the last lines of the servers' logs."""
    from stack import runtime

    project = read_project()
    runtimes = runtime.present(project)
    for service in select(project, quant or list(project.services)):
        servers = runtime.servers_of(service, runtimes)
        failed = runtime.failed_log(runtimes[0], service)
        if not servers and failed.exists():
            told = f"{service.name} does not run. Of its last start, which failed ({failed}):"
            print(told, file=sys.stderr, flush=True)
            print(*failed.read_text(errors="replace").splitlines()[-LINES:], sep="\n")
        elif not servers and quant:
            print(f"{service.name} does not run, so it has no log.", file=sys.stderr)
        for where, server in servers:
            if follow:
                with contextlib.suppress(KeyboardInterrupt):  # the way to end it
                    where.follow(service)
            else:
                print(server.logs(LINES))


@task
def ask(_: Context, message: str, quant: list[str], tokens: int = 256) -> None:
    """Ask a running server a question and stream its answer."""
    from stack import client, runtime

    server = runtime.running(read_project(), quant[0] if quant else None)
    for part in client.stream(server, message, tokens=tokens):
        if isinstance(part, str):
            print(part, end="", flush=True)
        else:
            print(flush=True)
            print(f"{part.tokens} tokens at {part.decode_tokens_s:.1f} tokens/s", file=sys.stderr)
