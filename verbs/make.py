"""Make what serving needs: engine, random weights, key; plan the GPU memory."""

import shlex
from typing import TYPE_CHECKING, Any

from invoke.context import Context

from verbs.terminal import acting, dump, read_project, select, task

if TYPE_CHECKING:
    from stack.fit import Planned

LEDGER = {
    "weights_mib": "weights",
    "cache_mib": "cache",
    "compute_mib": "compute buffer",
    "runtime_mib": "CUDA's own",
    "total_mib": "needed",
}


@task
def build(
    _: Context,
    quant: list[str],
    native: bool = False,
    docker: bool = False,
    arch: str = "",
    with_model: str = "",
) -> None:
    """Build the engine, as an image, with its model if asked, or natively."""
    from stack import gpu, runtime

    arch = gpu.architectures() if arch == "host" else arch
    docker = docker or bool(with_model)
    with acting("build", native=native, docker=docker, GLM_CUDA_ARCH=arch) as act:
        for service in select(act.project, quant) if quant or not with_model else ():
            runtime.build(act.runtime, act.project, service, progress=act.progress)
            print(f"{service.backend} engine b{act.project.engine.build} is built.")
        if with_model:
            service = act.project.service(with_model)
            command = runtime.include_model(act.project, service, progress=act.progress)
            print(f"{command[-1]} holds {service.model_file.name} and serves without a volume:")
            print(f"  {shlex.join(command)}")


@task
def plan(
    _: Context,
    quant: list[str],
    clients: str = "",
    context: str = "",
    slots: str = "",
    stand_in: bool = False,
    json: bool = False,
) -> None:
    """Show what `up` would choose for quants, and take of the GPU, against what is free now."""
    from rich.console import Console

    from stack import fit

    settings = {"GLM_CLIENTS": clients, "GLM_CONTEXT": context, "GLM_SLOTS": slots}
    project = read_project(stand_in=stand_in, **settings)
    services = [each for each in select(project, quant or list(project.services)) if each.gpus]
    planned = fit.plans(services, project)
    if json:
        print(dump([_plain(each) for each in planned]))
    elif not planned:
        print("None of these needs a GPU.")
    else:
        Console().print(_ledger(planned))
        for each in planned:
            if each.choice:
                print(f"{each.ledger.service.quant}: {each.choice}")
    fit.check_together(planned)


def _plain(each: "Planned") -> dict[str, Any]:
    return {
        "quant": each.ledger.service.quant,
        "model": each.file,
        **{name: getattr(each.ledger, name) for name in LEDGER},
        "sources": dict(each.ledger.sources),
        "free_mib": each.free_mib,
        "largest_context": each.largest_context,
    }


def _ledger(planned: "tuple[Planned, ...]") -> Any:
    from rich.table import Table

    columns = ("MiB", *(each.ledger.service.quant for each in planned))
    table = Table(*columns, box=None, pad_edge=False)
    for name, label in LEDGER.items():
        figures = (f"{getattr(each.ledger, name):,}" for each in planned)
        source = planned[0].ledger.sources.get(name, "") if planned else ""
        table.add_row(f"{label}{source and f' ({source})'}", *figures)
    free = ("no GPU" if p.free_mib is None else f"{p.free_mib:,}" for p in planned)
    table.add_row("free now", *free)
    most = (f"{p.largest_context:,}" if p.largest_context else "" for p in planned)
    table.add_row("largest context", *most)
    table.add_row("model", *(each.file for each in planned))
    return table


@task
def model(_: Context, quant: list[str], stand_in: bool = False) -> None:
    """Make a model of random weights where its file is missing, and check the file."""
    from stack import runtime

    with acting("model", native=True, stand_in=stand_in) as act:
        for service in select(act.project, quant):
            runtime.ensure_model(act.project, service, stand_in=stand_in, progress=act.progress)
            print(f"{service.model_file} is there and whole.")


@task
def key(_: Context, quant: list[str], rotate: bool = False, retire: bool = False) -> None:
    """Make the API key where there is none, and say where it is; or change it."""
    from stack import host, keys, rotation
    from stack.errors import Code, StackError

    if rotate and retire:
        raise StackError("--rotate and --retire exclude each other.", "Give one.", Code.USAGE)
    project = read_project()
    for service in select(project, quant):
        if not service.key_file.exists():
            host.own_folder(project.state)
        keys.make(service)
        keys.read(service)
        print(service.key_file)
        if not rotate and not retire:
            continue
        with host.lock(project.state, verb="key"):
            dropped, restarted = (
                (0, rotation.rotate(project, service))
                if rotate
                else rotation.retire(project, service)
            )
        for server in restarted:
            print(f"{server.service.name} ({server.runtime}) was restarted and generates.")
        if rotate:
            print("A new key is first in the file; the old one opens too, until")
            print("  uv run invoke key --retire")
        else:
            print(f"Old keys that no longer open: {dropped}.")
