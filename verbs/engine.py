"""Move the engine, and go back."""

from typing import TYPE_CHECKING

from invoke.context import Context

from verbs.terminal import bars, read_project, task

if TYPE_CHECKING:
    from stack.update import Moved


@task
def update(_: Context, to: str) -> None:
    """Build another engine beside the current one, prove it, and make it current."""
    from bench.judge import Judge
    from stack import host
    from stack import update as engines

    project = read_project()
    with host.lock(project.state, verb="update"), bars() as progress:
        moved = engines.update(project, to, answers=Judge(project), progress=progress)
    _tell(moved)


@task
def rollback(_: Context) -> None:
    """Make the engine before the current one current again, and prove it."""
    from bench.judge import Judge
    from stack import host
    from stack import update as engines

    project = read_project()
    with host.lock(project.state, verb="rollback"), bars() as progress:
        moved = engines.rollback(project, answers=Judge(project), progress=progress)
    _tell(moved)


def _tell(moved: "Moved") -> None:
    print(f"The engine is {moved.current.commit[:12]} (b{moved.current.build}).")
    for name, proof in moved.current.proofs.items():
        before = proof.baseline_tokens_s
        than = f", {before:.0f} before" if before else ""
        print(f"  {name}: loaded in {proof.ready_s:.1f} s, {proof.tokens_s:.0f} tokens/s{than}")
    if moved.served:
        print(f"  {', '.join(moved.served)}: served again after {moved.gap_s:.1f} s")
    if moved.previous:
        print(f"Before: {moved.previous.commit[:12]}. Back: uv run invoke rollback")
