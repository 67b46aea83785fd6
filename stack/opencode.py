"""OpenCode's configuration of one server as a provider, and its merge into a user's file.

The shape is that of https://opencode.ai/config.json; `nox -s client` lets OpenCode itself read it.
"""

import contextlib
import datetime as dt
import ipaddress
import json
import os
import re
import stat
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stack import client
from stack.config import Service
from stack.errors import Code, StackError
from stack.host import answers, write_atomic
from stack.server import Server

SCHEMA = "https://opencode.ai/config.json"
PACKAGE = "@ai-sdk/openai-compatible"
KEY_VARIABLE = "GLM_API_KEY"
# OpenCode asks for no more in one answer, and compacts a conversation that leaves less room.
_OUTPUT_TOKENS = 32_000
_OUTPUT_SHARE = 4
_KEYS = frozenset(
    (
        *("$schema", "agent", "autoshare", "autoupdate", "command", "disabled_providers"),
        *("enabled_providers", "enterprise", "experimental", "formatter", "instructions"),
        *("keybinds", "layout", "logLevel", "lsp", "mcp", "mode", "model", "permission", "plugin"),
        *("provider", "server", "share", "skills", "small_model", "snapshot", "theme", "tools"),
        *("tui", "username", "watcher"),
    )
)
_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\])*"|(//[^\n]*|/\*.*?\*/)', re.DOTALL)


def at(
    host: str, port: int, service: Service, *, key: str, certificate: Path | None = None
) -> Server:
    """Return the server as clients reach it at `host`, once a connection to it has opened.

    It speaks TLS where a gateway before it shows a certificate.

    Raises:
        StackError: USAGE for what is no host name or address; PORT where nothing answers there.

    """
    with contextlib.suppress(ValueError):
        host = f"[{ipaddress.IPv6Address(host)}]"
    if not re.fullmatch(r"[\w.-]+|\[[\da-f:.]+\]", host):
        raise StackError(
            f"{host!r} is neither a host name nor an address.", "Give it as --host hordak.", _USAGE
        )
    if not answers(host.strip("[]"), port):
        raise StackError(
            f"Nothing answers at {host}:{port}.",
            "Publish the server there (GLM_BIND in .env, then `invoke down` and `invoke up`).",
            Code.PORT,
        )
    url = f"{'https' if certificate else 'http'}://{host}:{port}"
    return Server(runtime="attached", service=service, url=url, key=key, certificate=certificate)


def key_by_file(path: Path) -> str:
    """Return OpenCode's reference to a key file, which it takes whole.

    Raises:
        StackError: USAGE, where the file holds more than the key.

    """
    if len(path.read_text().split()) != 1 or "}" in str(path):
        raise StackError(
            f"OpenCode takes a file as the key, and {path} does not hold just that.",
            f"Export the key as {KEY_VARIABLE} where OpenCode runs, and give --host.",
            _USAGE,
        )
    return f"{{file:{path.resolve()}}}"


def key_by_variable() -> str:
    """Return OpenCode's reference to the environment variable of the key."""
    return f"{{env:{KEY_VARIABLE}}}"


def provider(server: Server, *, key: str) -> dict[str, Any]:
    """Return a configuration with the server as its one provider; `key` is a reference to the key.

    Raises:
        StackError: VERIFY when the server does not answer, or not to its key.

    """
    told = client.props(server)["default_generation_settings"]
    (model,) = client.models(server)["data"]
    context, most = told["n_ctx"], told["params"]["n_predict"]
    output = min(_OUTPUT_TOKENS, context // _OUTPUT_SHARE, most if most > 0 else context)
    return {
        "$schema": SCHEMA,
        "provider": {
            server.service.name: {
                "npm": PACKAGE,
                "name": f"GLM-4.7-Flash {server.service.quant}",
                "options": {"baseURL": f"{server.url}/v1", "apiKey": key},
                "models": {
                    model["id"]: {
                        "name": model["id"],
                        "reasoning": True,
                        "tool_call": True,
                        "limit": {"context": context, "output": output},
                    }
                },
            }
        },
    }


@dataclass(frozen=True)
class Merged:
    """What became of a user's file; no backup where there was nothing, or nothing changed."""

    changed: bool
    backup: Path | None = None


def merge(path: Path, ours: dict[str, Any]) -> Merged:
    """Put our providers into a configuration file, beside all else that it says.

    A former file is kept as a backup. Of a provider and a model that are there already, what we
    do not know of stays.

    Raises:
        StackError: USAGE, with the reason, for a file that this would damage; it stays as it was.

    """
    former = _text(path)
    document = _parse(path, former) if former else {}
    _check_shape(path, document, ours)
    merged = _overlay(document, ours)
    if merged == document:
        return Merged(changed=False)
    text = json.dumps(merged, indent=2, ensure_ascii=False) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _refused(path, "holds half a character") from error
    if not former:
        write_atomic(path, text, mode=0o600)
        return Merged(changed=True)
    status = path.stat()
    keep = partial(write_atomic, mode=stat.S_IMODE(status.st_mode), owner=_owner(status))
    now = dt.datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    backup = path.with_name(f"{path.name}.{now}.bak")
    keep(backup, former)
    keep(path, text)
    return Merged(changed=True, backup=backup)


def _owner(status: os.stat_result) -> int | None:
    return status.st_uid if status.st_uid != os.getuid() else None


def _text(path: Path) -> str:
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            raise _refused(path, f"is a link to {path.readlink()}; name that file")
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise _refused(path, "is no plain file, or has several names")
        return path.read_bytes().decode()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise _refused(path, "is not UTF-8") from error
    except OSError as error:
        raise _refused(path, f"cannot be read: {error.strerror}") from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        document = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        json.dumps(document, allow_nan=False)
    except (ValueError, RecursionError) as error:
        if any(match[1] for match in _STRING_OR_COMMENT.finditer(text)):
            raise _refused(path, "has comments, which would be lost") from error
        where = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise _refused(path, f"is not plain JSON ({where})") from error
    if not isinstance(document, dict):
        raise _refused(path, "holds no object")
    if document and not document.keys() & _KEYS:
        raise _refused(path, f"is no configuration of OpenCode's: it has {', '.join(document)}")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _check_shape(path: Path, document: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse what is no object where we have one, and a provider that is another package's."""
    if "opencode" not in str(document.get("$schema", SCHEMA)):
        raise _refused(path, f"has another schema, {document['$schema']}")

    def check(theirs: Any, our: Any, where: str) -> None:
        if isinstance(our, dict) and not isinstance(theirs, dict):
            raise _refused(path, f"has no object in {where}")
        for key in our if isinstance(our, dict) else ():
            if key in theirs:
                check(theirs[key], our[key], f"{where}.{key}".lstrip("."))

    check(document, ours, "")
    for name in ours["provider"]:
        package = document.get("provider", {}).get(name, {}).get("npm", PACKAGE)
        if package != PACKAGE:
            raise _refused(path, f"has a provider {name} of another package, {package}")


def _overlay(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Return theirs with ours over it, object by object; what is there keeps its place."""
    merged = dict(theirs)
    for key, value in ours.items():
        below = merged.get(key, {})
        merged[key] = _overlay(below, value) if isinstance(value, dict) else value
    return merged


_USAGE = Code.USAGE


def _refused(path: Path, why: str) -> StackError:
    return StackError(
        f"{path} {why}; it is left as it was.",
        "Add what `invoke opencode` prints by hand, or name another file.",
        _USAGE,
    )
