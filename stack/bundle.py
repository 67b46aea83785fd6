"""The support bundle: what a stranger must see of this deployment, and nothing that is private."""

import contextlib
import datetime as dt
import io
import json
import os
import platform
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from stack import gpu, runtime
from stack.compose import Docker
from stack.config import Project, Service
from stack.errors import StackError
from stack.host import run, write_atomic
from stack.server import Server
from stack.status import Looks

_LOG_LINES = 2000
_EVIDENCE_BYTES = 1 << 20
_TOKENS = ("GLM_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "LLAMA_API_KEY")
_REMOVED = "[removed]"
# A line of the engine's own; what clients sent may follow one, but never looks like one.
_ENGINE_LINE = re.compile(r"(\d+\.)+\d+ [IWE] ")
# The engine quotes requests where it refuses them: its words up to the first quotation stay.
_REFUSAL = re.compile(
    r"""((?:got exception: (?:.*?"message":")?|send_error: .*?error: )[^:'"{\\\n]*"""
    r"""|anthropic string not as expected: ).*"""
)
_PATTERNS = (
    (re.compile(r"(://)[^/\s@\"']+@"), rf"\1{_REMOVED}@"),
    (re.compile(r"(?i)\b(bearer|basic) [\w.~+/=-]+"), rf"\1 {_REMOVED}"),
    (re.compile(r"\bhf_\w{8,}"), _REMOVED),
    (
        re.compile(r"(?i)(\b[\w-]*(?:api[_-]?key|_token|password|secret)\b[\"']?\s*[:=]\s*[\"']?)"
                   r"[^\s\"',}]+"),
        rf"\1{_REMOVED}",
    ),
    (
        re.compile(r'("(?:arguments|content|input|messages|prompt|reasoning_content|text)"\s*:\s*)'
                   r'(?:"(?:\\.|[^"\\])*"|\[[^\]{]*\])'),
        rf'\1"{_REMOVED}"',
    ),
    (re.compile(r"/(?:home|Users)/[^/\s\"':,]+"), "~"),
)  # fmt: skip


@dataclass(frozen=True)
class Bundle:
    """A written bundle, and the names of its files."""

    path: Path
    names: tuple[str, ...]


def write(project: Project) -> Bundle:
    """Write the bundle to the project's state folder, for its owner alone to read."""
    scrub = Scrubber(project)
    files = {name: scrub(text) for name, text in _collect(project)}
    now = dt.datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"report-{now}/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    path = project.state / f"report-{now}.tar.gz"
    write_atomic(path, buffer.getvalue(), mode=0o600)
    return Bundle(path, tuple(files))


class Scrubber:
    """Takes keys, tokens, home folders and prompts out of a text."""

    def __init__(self, project: Project) -> None:
        """Learn what is secret here: each key of the key files, each token of the environment."""
        words = {os.environ.get(name, "") for name in _TOKENS}
        hub = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
        for path in {hub / "token", *(each.key_file for each in project.services.values())}:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                lines = path.read_text().splitlines()
                words.update(line.strip() for line in lines if not line.startswith("#"))
        written = {
            form for word in words for form in (word, quote(word, safe=""), json.dumps(word)[1:-1])
        }
        homes = {str(Path.home()), str(Path.home().resolve())} - {"/"}
        self._replace = dict.fromkeys(written - {""}, _REMOVED) | dict.fromkeys(homes, "~")

    def __call__(self, text: str) -> str:
        """Return the text without them."""
        for literal in sorted(self._replace, key=len, reverse=True):
            text = text.replace(literal, self._replace[literal])
        for pattern, instead in _PATTERNS:
            text = pattern.sub(instead, text)
        return _REFUSAL.sub(rf"\1{_REMOVED}", text)


def log(text: str) -> str:
    """Return the engine's own lines of a log: all that does not look like one may be a prompt."""
    lines = text.splitlines()
    kept = [line for line in lines if _ENGINE_LINE.match(line)]
    left_out = len(lines) - len(kept)
    return "\n".join([*kept, f"({left_out} lines that may be a client's are left out)", ""])


def _collect(project: Project) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each part; one that cannot be had says why."""
    parts: dict[str, Callable[[], str]] = {
        "versions.json": lambda: _json(_versions(project)),
        "configuration.json": lambda: _json(asdict(project)),
        "compose.yaml": (project.root / "compose.yaml").read_text,
        "status.json": lambda: _json([asdict(each) for each in Looks(project).all()]),
        "gpu.json": lambda: _json([asdict(each) for each in gpu.gpus()]),
    }
    for service in project.services.values():
        for where, server in _servers(project, service):
            name = f"{where}-{service.name}"
            parts[f"{name}.log"] = lambda server=server: log(server.logs(_LOG_LINES))  # type: ignore[misc]
            if where == Docker.name:
                inspect = f"{name}.inspect.json"
                parts[inspect] = lambda service=service: _inspect(project, service)  # type: ignore[misc]
    for path in _evidence(project):
        parts[f"evidence/{path.relative_to(project.state)}"] = path.read_text
    for name, part in parts.items():
        try:
            yield name, part()
        except (OSError, UnicodeDecodeError, StackError) as error:
            yield name, f"It cannot be had: {error}\n"


def _servers(project: Project, service: Service) -> list[tuple[str, Server]]:
    try:
        return [
            (where.name, server)
            for where, server in runtime.servers_of(service, runtime.present(project))
        ]
    except StackError:  # a hanging engine is told by `status.json`
        return []


def _evidence(project: Project) -> Iterator[Path]:
    """Yield the records of checks, load tests and operations; no key, log or earlier bundle."""
    secret = {each.key_file.resolve() for each in project.services.values()}
    for path in sorted(project.state.rglob("*")):
        wanted = path.suffix in {".json", ".md", ".txt", ".xml"} and not path.is_symlink()
        if not wanted or not path.is_file() or path.resolve() in secret:
            continue
        if path.stat().st_size <= _EVIDENCE_BYTES:
            yield path


def _versions(project: Project) -> dict[str, Any]:
    project_version = "no git here"
    with contextlib.suppress(StackError):
        described = run(["git", "describe", "--always", "--dirty"], cwd=project.root)
        project_version = described.stdout.strip() or described.stderr.strip()
    os_release = {}
    with contextlib.suppress(OSError):
        os_release = platform.freedesktop_os_release()
    docker: dict[str, Any] | str
    try:
        docker = Docker(project).client.version()
    except StackError as error:
        docker = error.cause
    return {
        "project": project_version,
        "engine": asdict(project.engine),
        "python": platform.python_version(),
        "system": os_release.get("PRETTY_NAME", ""),
        "kernel": platform.release(),
        "docker": docker,
    }


def _inspect(project: Project, service: Service) -> str:
    docker = Docker(project)
    container = docker.container(service)
    labels = docker.image_labels(service)
    return _json({"container": container.attrs if container else None, "image_labels": labels})


def _json(value: Any) -> str:
    return json.dumps(_plain(value), indent=1, default=str, sort_keys=True) + "\n"


def _plain(value: Any) -> Any:
    """Return a value whose mappings have text for keys."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
