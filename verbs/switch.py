"""Change which quant serves."""

import contextlib
from dataclasses import asdict
from typing import TYPE_CHECKING

from invoke.context import Context

from verbs.serve import tell_up
from verbs.terminal import bars, dump, read_project, task, wanted

if TYPE_CHECKING:
    from stack.config import Project
    from stack.switch import Switched


@task
def switch(
    _: Context,
    to: str,
    from_: str = "",
    native: bool = False,
    docker: bool = False,
    stand_in: bool = False,
    same_port: bool = False,
    drain: int = 30,
    json: bool = False,
) -> None:
    """Serve a quant in the place of the one that runs; bring that one back where it fails."""
    from bench.judge import Judge
    from stack import host
    from stack.switch import switch

    want = wanted(native=native, docker=docker)
    project = read_project(stand_in=stand_in)
    with host.lock(project.state, verb="switch"), bars() as progress:
        done = switch(
            project,
            to,
            leave=from_ or None,
            want=want,
            same_port=same_port,
            stand_in=stand_in,
            drain_s=drain,
            answers=Judge(project),
            progress=progress,
        )
    with contextlib.suppress(KeyboardInterrupt):  # too late to undo it
        _tell(project, done, json=json)


def _tell(project: "Project", done: "Switched", *, json: bool) -> None:
    from stack.status import Looks

    record = done.record and asdict(done.record)
    if json:
        print(dump([{"now": asdict(Looks(project).state(done.up.server)), "switch": record}]))
        return
    if record:
        print(f"{record['new']} took over from {record['old']}.")
        print(f"  gap      {record['gap_s']:.1f} s in which nothing was ready")
        if record["cut"] != 0:
            print(f"  cut off  {record['cut'] or 'an unknown number of'} requests")
    tell_up(project, done.up)
