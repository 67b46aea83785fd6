"""A model hub over real sockets, which `huggingface_hub` talks to, with faults to switch on.

As on the real one, a branch names a commit, a commit the SHA-256 of each file, and the bytes come
from another host, to which no token belongs. python -m tests.hub FILE... serves files.
"""

import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from tests import workspace

HUB, CDN = "127.0.0.1", "127.0.0.2"
REPOSITORY = "unsloth/GLM-4.7-Flash-GGUF"
BLOCK_BYTES = 8 << 20
ALWAYS = 1 << 30

_ROUTES = {
    "api": r"/api/models/(?P<repo>[^/]+/[^/]+)"
    r"(?:/(?P<list>revision|tree|paths-info)/(?P<revision>[^/]+))?",
    "resolve": r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)",
    "bytes": r"/objects/(?P<sha256>[0-9a-f]{64})",
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What to do wrong, `times` times, at a step: `api`, `resolve` (the metadata) or `bytes`."""

    step: str = "bytes"
    times: int = 1
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str | None = None
    """The file that is sent in place of the right one."""
    ignore_range: bool = False
    cut: float | None = None
    """The share of the body after which the connection is closed."""
    stall: float | None = None
    """The share of the body after which nothing comes and the connection stays open."""
    rate: float | None = None
    """The most bytes a second."""


@dataclass
class Request:
    """A request as it came, names in lower case, and the bytes of body sent for it so far."""

    host: str
    method: str
    path: str
    headers: Mapping[str, str]
    step: str
    sent_bytes: int = 0


class Hub:
    """One repository on two hosts; what it holds and does wrong may be changed at any time.

    Paths of files to publish, and of bodies to send in their place, are relative to its folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.main = ""
        self.commits: dict[str, dict[str, str]] = {}
        self.objects: dict[str, Path] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self._lock = threading.Lock()
        self._servers = [_Server(self, host) for host in (HUB, CDN)]
        self.url, self.cdn_url = (server.url for server in self._servers)

    def publish(self, files: Mapping[str, str | Path]) -> str:
        """Commit files to the branch by name, beside those that it has; return the commit."""
        tree = self.commits.get(self.main, {}) | {n: self.store(p) for n, p in files.items()}
        text = json.dumps([self.main, tree])
        self.main = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.commits[self.main] = tree
        return self.main

    def store(self, path: str | Path) -> str:
        """Take a file as an object; return its SHA-256."""
        path = self.folder / path
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.objects[sha256] = path
        return sha256

    def deployment(self, folder: Path) -> Path:
        """Fill a folder so that `invoke` runs there, with this hub as the source of `tiny`."""
        workspace.make(
            folder,
            GLM_MODELS=str(folder / "models"),
            GLM_TINY_PORT=str(workspace.free_port()),
        )
        (folder / "models").mkdir()
        ours = f"repository: {REPOSITORY}\n    size_gb: 0.04\n    random: tiny"
        workspace.change(folder, "compose.yaml", "random: tiny", ours)
        return folder

    def environment(self, folder: Path) -> dict[str, str]:
        """Return the variables that lead `huggingface_hub` here."""
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(folder / "hf"), "NO_PROXY": "*"}
        return {**os.environ, **ours}

    def fault(self, step: str) -> Fault:
        """Use up the first fault of a step, once."""
        with self._lock:
            for index, fault in enumerate(self.faults):
                if fault.step == step and fault.times:
                    used = replace(fault, times=fault.times - 1)
                    self.faults = [*self.faults[:index], used, *self.faults[index + 1 :]]
                    return fault
        return Fault()

    def sent_bytes(self) -> int:
        """Return how many bytes of files were sent since the requests were last cleared."""
        return sum(each.sent_bytes for each in self.requests if each.step == "bytes")

    def reset(self) -> None:
        """Forget requests, faults and every commit."""
        self.requests, self.faults, self.commits, self.main = [], [], {}, ""

    def __enter__(self) -> Self:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    def __init__(self, hub: Hub, host: str) -> None:
        super().__init__((host, 0), _Handler)
        self.hub, self.host = hub, host
        self.url = f"http://{host}:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may go as it likes
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    request_: Request

    def log_message(self, *_: object) -> None:
        """Stay silent: the requests are on record."""

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        asked = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        matches = {step: re.fullmatch(route, path) for step, route in _ROUTES.items()}
        step, match = next(((s, m) for s, m in matches.items() if m), ("", None))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.request_ = Request(self.server.host, self.command, self.path, headers, step)
        self.server.hub.requests.append(self.request_)
        fault = self.server.hub.fault(step)
        if fault.status:
            self._text(fault.status, "", fault.headers)
        elif fault.body and step != "bytes":
            self._file(self.server.hub.folder / fault.body, fault)
        elif match:
            getattr(self, f"_{step}")(fault, asked, **match.groupdict())
        else:
            self._text(404, "")

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _tree(self, repo: str, revision: str | None) -> tuple[str, dict[str, str]] | None:
        hub = self.server.hub
        commit = hub.main if revision in (None, "main") else str(revision)
        if repo == REPOSITORY and commit in hub.commits:
            return commit, hub.commits[commit]
        missing = "RevisionNotFound" if repo == REPOSITORY else "RepoNotFound"
        self._text(404, "", {"X-Error-Code": missing})
        return None

    def _api(self, _: Fault, asked: bytes, **route: str | None) -> None:
        if not (found := self._tree(str(route["repo"]), route["revision"])):
            return
        commit, tree = found
        entries = {name: (sha, self._size(sha)) for name, sha in tree.items()}
        if route["list"] in ("tree", "paths-info"):
            wanted = parse_qs(asked.decode()).get("paths", list(tree))
            answer: Any = [
                {
                    "type": "file",
                    "path": name,
                    "size": size,
                    "oid": sha[:40],
                    "lfs": _lfs(sha, size),
                }
                for name, (sha, size) in entries.items()
                if name in wanted
            ]
        else:
            siblings = [
                {"rfilename": name, "size": size, "lfs": {"sha256": sha, **_lfs(sha, size)}}
                for name, (sha, size) in entries.items()
            ]
            name = str(route["repo"])
            answer = {"_id": commit, "id": name, "modelId": name, "sha": commit}
            answer |= {"private": False, "tags": [], "downloads": 0, "siblings": siblings}
        self._text(200, json.dumps(answer), {"Content-Type": "application/json"})

    def _resolve(self, fault: Fault, _: bytes, *, repo: str, revision: str, file: str) -> None:
        if not (found := self._tree(repo, revision)):
            return
        commit, tree = found
        if file not in tree:
            self._text(404, "", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        sha256 = tree[file]
        told = {
            "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{sha256}"',
            "X-Linked-Size": str(self._size(sha256)),
            "Location": f"{self.server.hub.cdn_url}/objects/{sha256}?signature=s",
        }
        self._text(302, "", {**told, **fault.headers})

    def _bytes(self, fault: Fault, _: bytes, *, sha256: str) -> None:
        hub = self.server.hub
        path = hub.folder / fault.body if fault.body else hub.objects[sha256]
        self._file(path, fault, {"ETag": f'"{sha256}"'})

    def _size(self, sha256: str) -> int:
        return self.server.hub.objects[sha256].stat().st_size

    def _text(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        self._head(status, len(text.encode()), headers)
        if self.command != "HEAD":
            self.wfile.write(text.encode())

    def _head(self, status: int, length: int, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _file(self, path: Path, fault: Fault, headers: Mapping[str, str] | None = None) -> None:
        size = path.stat().st_size
        first, last = 0, size - 1
        told = {"Accept-Ranges": "bytes", **(headers or {})}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and not fault.ignore_range:
            first, last = int(asked[1]), min(int(asked[2] or last), last)
            if first > last:
                self._head(416, 0, {"Content-Range": f"bytes */{size}"})
                return
            told["Content-Range"] = f"bytes {first}-{last}/{size}"
        self._head(206 if "Content-Range" in told else 200, last + 1 - first, told)
        if self.command != "HEAD":
            self._send(path, first, last + 1, fault)

    def _send(self, path: Path, start: int, end: int, fault: Fault) -> None:
        shares = [share for share in (fault.cut, fault.stall) if share is not None]
        stop = start + int((end - start) * min(shares, default=1))
        block = int(fault.rate / 20) if fault.rate else BLOCK_BYTES
        with path.open("rb") as file:
            while start < stop:
                count = min(block, stop - start)
                sent = os.sendfile(self.connection.fileno(), file.fileno(), start, count)
                start += sent
                self.request_.sent_bytes += sent
                if fault.rate:
                    time.sleep(sent / fault.rate)
        if fault.stall is not None:
            self.connection.recv(1)  # until the client gives up
        self.close_connection = bool(shares)


def _lfs(sha256: str, size: int) -> dict[str, Any]:
    return {"oid": sha256, "size": size, "pointerSize": 134}


def _main(files: Iterable[str]) -> None:
    with Hub(Path.cwd()) as hub:
        hub.publish({Path(file).name: file for file in files})
        print(f"HF_ENDPOINT={hub.url}", flush=True)  # noqa: T201
        threading.Event().wait()


if __name__ == "__main__":
    _main(sys.argv[1:])
