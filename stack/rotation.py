"""Changes the API key while servers run: a new one first, then the old ones out.

The server reads its key file at its start alone, so each step restarts what runs. Between the two
the old keys and the new one open, so that clients can be changed one by one.
"""

from stack import client, keys, runtime
from stack.config import Project, Service
from stack.server import Server


def rotate(project: Project, service: Service) -> list[Server]:
    """Make a new key, before the old ones; return the servers that were restarted.

    Raises:
        StackError: USAGE for an unusable key file; else by what keeps a server from coming back.

    """
    keys.rotate(service)
    return _restart(project, service)


def retire(project: Project, service: Service) -> tuple[int, list[Server]]:
    """Drop all keys but the newest; return how many, and the servers that were restarted.

    Raises as `rotate`.
    """
    dropped = keys.retire(service)
    return dropped, _restart(project, service) if dropped else []


def _restart(project: Project, changed: Service) -> list[Server]:
    """Restart every server that reads the changed file, and see it generate with its first key."""
    restarted = []
    runtimes = runtime.present(project)
    for service in project.services.values():
        if service.key_file != changed.key_file:
            continue
        for where, server in runtime.servers_of(service, runtimes):
            if server.ended() is None:
                with runtime.reserved(service):
                    again = where.restart(service, key=keys.read(service))
                    client.wait_ready(again)
                client.complete(again, "Hello")
                restarted.append(again)
    return restarted
