"""Connect a client, report a fault, clear up."""

import os

from invoke.context import Context

from verbs.terminal import read_project, task


@task
def opencode(_: Context, quant: list[str], host: str = "", write: str = "") -> None:
    """Print OpenCode's configuration for the running server, or merge it into a file."""
    import json
    from pathlib import Path
    from urllib.parse import urlsplit

    from stack import keys, runtime
    from stack import opencode as config

    project = read_project()
    if host:
        service = project.service(quant[0] if quant else project.default)
        here = [s for _, s in runtime.servers_of(service, runtime.present(project)) if s.url]
        port = urlsplit(here[0].url).port if here else service.port
        key = os.environ.get(config.KEY_VARIABLE) or keys.read(service)
        shown = here[0].certificate if here else project.certificate
        server = config.at(host, port or service.target_port, service, key=key, certificate=shown)
        reference = config.key_by_variable()
    else:
        server = runtime.running(project, quant[0] if quant else None)
        reference = config.key_by_file(server.service.key_file)
    ours = config.provider(server, key=reference)
    if not write:
        print(json.dumps(ours, indent=2))
        return
    path = Path(write).expanduser()
    done = config.merge(path, ours)
    print(f"{path} {'has' if done.changed else 'had'} {server.service.name} at {server.url}/v1.")
    if done.backup:
        print(f"As it was: {done.backup}")
    if host:
        print(f"Export {config.KEY_VARIABLE} where OpenCode runs.")
    (model,) = ours["provider"][server.service.name]["models"]
    print(f"Use it: opencode --model {server.service.name}/{model}")


@task
def report(_: Context) -> None:
    """Write a bundle for whoever is to help: keys, tokens, home folders, prompts taken out."""
    from stack import bundle

    written = bundle.write(read_project())
    print(f"{written.path} holds:")
    for name in written.names:
        print(f"  {name}")
    print("Look through it before you send it.")


@task
def clean(_: Context, yes: bool = False) -> None:
    """List what this deployment left on the machine, models aside; with --yes remove it."""
    from stack import clean as cleaning
    from stack import host

    project = read_project()
    found = cleaning.items(project)
    for each in found:
        print(f"{each.kind:<10}{each.name}{f', {each.size_mb:,.0f} MB' if each.size_mb else ''}")
    if not found:
        print("There is nothing.")
    elif not yes:
        print("Remove all of it: uv run invoke clean --yes")
    else:
        with host.lock(project.state, verb="clean"):
            for each in found:
                each.remove()
        print("It is removed.")
