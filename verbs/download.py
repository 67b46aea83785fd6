"""Fetch model files, and tell what is here."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from invoke.context import Context
from invoke.exceptions import Exit

from verbs.terminal import INTERRUPTED, bars, dump, read_project, select, task

if TYPE_CHECKING:
    from stack.config import Project, Service
    from stack.hub import Fetched
    from stack.integrity import Listed

WIDTH = 25


@task
def download(
    _: Context, quant: list[str], update: bool = False, in_container: bool = False
) -> None:
    """Fetch models from the hub, as locked: resumed, verified, put in place whole."""
    from stack import integrity
    from stack.errors import Code, StackError

    project = read_project()
    if not quant:
        known = ", ".join(name for name, each in project.services.items() if each.model.repository)
        raise StackError("No quant is named.", f"Give --quant: {known}.", Code.USAGE)
    services = select(project, quant)
    if in_container:
        _download_in_container(project, services, update=update)
        return
    if not update and all(map(integrity.is_verified, services)):
        for service in services:
            print(f"{service.model_file} is complete and verified.")
        return
    from stack import hub

    with bars() as progress, _kept():
        done = hub.download(services, update=update, progress=progress)
    for each in done:
        _tell_fetched(each)


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Exit("Interrupted; the same command goes on from here.", INTERRUPTED) from None


def _download_in_container(project: "Project", services: "list[Service]", *, update: bool) -> None:
    from huggingface_hub import get_token

    from stack import integrity
    from stack.compose import Docker
    from stack.errors import Code, StackError

    arguments = [*(service.quant for service in services), *(["--update"] if update else [])]
    services[0].models_folder.mkdir(parents=True, exist_ok=True)  # or Docker has nothing to mount
    with _kept():
        status = Docker(project).download(*arguments, token=get_token())
    if status:
        raise Exit(code=status)  # it has said why
    for service in services:
        if not integrity.is_verified(service):
            raise StackError(
                f"The container calls it a success, but {service.model_file} is not verified.",
                "Read its words above; or try without --in-container.",
                Code.DOWNLOAD,
            )


def _tell_fetched(each: "Fetched") -> None:
    from rich.console import Console
    from rich.table import Table

    files, gb = each.service.model_file, f"{each.fetched_bytes / 1e9:.2f} GB"
    print(f"{files} is complete and verified; {gb} were fetched.")
    if each.before in ((), each.files):
        print(f"It is locked to revision {each.files[0].revision}.")
        return
    before = {entry.file: asdict(entry) for entry in each.before}
    for entry in each.files:
        table = Table("", "was", "is", box=None, pad_edge=False)
        old = before.get(entry.file, {})
        for name, new in asdict(entry).items():
            if name not in ("file", "repository"):
                table.add_row(f"  {name}", str(old.get(name, ""))[:WIDTH], str(new)[:WIDTH])
        print(f"The lock of {entry.file} moved:")
        Console().print(table)


@task
def models(_: Context, verify: bool = False, prune: bool = False, json: bool = False) -> None:
    """Show the model files: what is here, locked, verified."""
    from rich.console import Console

    from stack import integrity
    from stack.errors import Code, StackError

    project = read_project()
    if prune:
        _prune(project)
    with bars() as progress:
        listed = integrity.listing(project.services.values(), verify=progress if verify else None)
    if json:
        print(dump([asdict(each) for each in listed]))
    else:
        Console().print(_models_table(listed))
    wrong = [each for each in listed if verify and each.state == "mismatch"]
    if wrong:
        raise StackError(
            f"{', '.join(each.file for each in wrong)}: not what models.lock says.",
            f"uv run invoke download --quant {wrong[0].quant}, which replaces it.",
            Code.INTEGRITY,
        )


def _models_table(listed: "tuple[Listed, ...]") -> Any:
    from rich.table import Table

    table = Table("quant", "file", "bytes", "locked to", "state", box=None, pad_edge=False)
    for each in listed:
        size = "" if each.size is None else f"{each.size:,}"
        table.add_row(each.quant, each.file, size, each.revision[:12], each.state)
    return table


def _prune(project: "Project") -> None:
    from stack import host, integrity

    folder, verb = project.service(project.default).models_folder, "models --prune"
    with host.lock(project.state, verb=verb), integrity.exclusive(folder, verb=verb):
        paths = integrity.leftovers(folder)
        for path in paths:
            print(f"{path} ({path.stat().st_size / 1e9:.2f} GB)")
        for path in paths:
            path.unlink()
