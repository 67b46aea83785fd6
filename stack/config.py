"""Reads `compose.yaml` and `.env`, without Docker, into frozen values.

It enumerates no quants and no settings: services and `x-models` give the former, the `${NAME}`s of
`compose.yaml` and `compose.gateway.yaml` the latter. A test compares this reading with
`docker compose config`.
"""

import ipaddress
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from stack.errors import Code, StackError

Settings = Mapping[str, str]
UNPATCHED = "none"

VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<name>\w+)(?:(?P<op>:?-)(?P<default>[^}]*))?\})")
GATEWAY = "compose.gateway.yaml"
# Set by a build or an update itself; no settings of a user's.
ENGINE = ("GLM_ENGINE_COMMIT", "GLM_ENGINE_BUILD")
INTERNAL = ("GLM_CREATED", "GLM_ENGINE_TAG", *ENGINE)
ENGINE_RECORD = Path(".state") / "engine.json"
_CONTAINER_UID = 10001
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """One entry of `x-models`. `path` is as the container sees it; absent facts are None."""

    path: Path
    random: str
    min_build: int
    min_build_for: str
    """What earlier builds of the engine lack."""
    load_s: float
    header: Mapping[str, int | str] = field(default_factory=dict)
    """What the GGUF header must say, by its keys."""
    repository: str | None = None
    size_gb: float | None = None
    vram_mib: int | None = None


@dataclass(frozen=True)
class Service:
    """One quant's service, with every setting resolved."""

    quant: str
    name: str
    image: str
    build_args: Mapping[str, str]
    environment: Mapping[str, str]
    bind: str
    port: int | None
    """The published port; None lets the platform choose one."""
    target_port: int
    mounts: Mapping[Path, Path]
    """Path in the container to path on the host: volumes and secrets."""
    gpus: tuple[str, ...]
    stop_grace_s: float
    log_bytes: int
    """How long its log may get until it is begun anew."""
    log_files: int
    """How many of its last parts are kept, with the present one."""
    uid: int
    model: Model
    settable: Settings = field(default_factory=dict, compare=False)
    """Which of `environment` a variable of `.env` gives as it is, by that variable's name."""
    chosen: Settings = field(default_factory=dict, compare=False)
    """What such variables are instead of what the project's settings say."""

    @property
    def alias(self) -> str:
        """The model name that clients send and the server reports."""
        return self.environment["LLAMA_ARG_ALIAS"]

    @property
    def cells(self) -> int:
        """Tokens that all slots together can hold."""
        return int(self.environment["LLAMA_ARG_CTX_SIZE"])

    @property
    def private(self) -> bool:
        """Whether each slot has a cache of its own, an equal part of `cells`."""
        return self.environment["LLAMA_ARG_KV_UNIFIED"] == "0"

    @property
    def context(self) -> int:
        """Tokens that one slot can hold; with a shared cache, as long as the others hold none."""
        return self.cells // self.slots if self.private else self.cells

    @property
    def slots(self) -> int:
        """Requests decoded at the same time."""
        return int(self.environment["LLAMA_ARG_N_PARALLEL"])

    @property
    def backend(self) -> str:
        """Which build of the engine it needs: `cpu` or `cuda`."""
        return self.build_args["BACKEND"]

    @property
    def model_file(self) -> Path:
        """The model's path on the host."""
        return self.host_path(self.model.path)

    @property
    def models_folder(self) -> Path:
        """The folder of model files, on the host."""
        return next(
            outside
            for inside, outside in self.mounts.items()
            if self.model.path.is_relative_to(inside)
        )

    @property
    def key_file(self) -> Path:
        """The API key's path on the host."""
        return self.host_path(Path(self.environment["LLAMA_ARG_API_KEY_FILE"]))

    def as_started(self, environment: Mapping[str, str]) -> "Service":
        """Return the service with what a server of it was started with, in a server's own names.

        Of its model's path, which a process of the host knows by another folder, that is the file.
        """
        chosen = {
            variable: environment[name]
            for variable, name in self.settable.items()
            if name in environment
        }
        file = Path(environment.get("LLAMA_ARG_MODEL", self.model.path)).name
        path = self.model.path.with_name(file)
        found = self.choosing(chosen)
        model = {"LLAMA_ARG_MODEL": str(path)}
        return replace(
            found,
            model=replace(self.model, path=path),
            environment={**found.environment, **model},
        )

    def choosing(self, settings: Settings) -> "Service":
        """Return the service with variables of `.env` that give a setting changed."""
        changed = {self.settable[variable]: value for variable, value in settings.items()}
        environment = {**self.environment, **changed}
        return replace(self, environment=environment, chosen={**self.chosen, **settings})

    def host_path(self, path: Path) -> Path:
        """Translate a path in the container to the host's; one outside every mount stays."""
        for inside, outside in self.mounts.items():
            if path.is_relative_to(inside):
                return outside / path.relative_to(inside)
        return path


@dataclass(frozen=True)
class Engine:
    """The pinned engine: a commit of llama.cpp and its build number."""

    repository: str
    commit: str
    build: int
    patches: str = UNPATCHED
    """The beginning of the SHA-256 of our patches to it, in their order; or none of them."""


@dataclass(frozen=True)
class Project:
    """Everything that `compose.yaml` and `.env` say."""

    root: Path
    name: str
    settings: Settings
    engine: Engine
    default: str
    clients: int
    """For how many settings are chosen."""
    services: Mapping[str, Service]
    """By quant."""
    state_folder: str = ".state"

    def service(self, quant: str) -> Service:
        """Return a quant's service.

        Raises:
            StackError: USAGE, with the known quants, for any other name.

        """
        if quant not in self.services:
            raise StackError(
                f"There is no quant {quant!r} in compose.yaml.",
                f"Known quants: {', '.join(self.services)}.",
                Code.USAGE,
            )
        return self.services[quant]

    @property
    def gateway(self) -> bool:
        """Whether a gateway stands before Docker's servers."""
        return self.settings.get("GLM_GATEWAY", "0") == "1"

    @property
    def certificate(self) -> Path | None:
        """The file with the gateway's certificate and its key, where it is to speak TLS."""
        named = self.settings.get("GLM_TLS_FILE")
        return self.root / named if named and self.gateway else None

    @property
    def state(self) -> Path:
        """The folder of keys, locks, logs and records."""
        return self.root / self.state_folder

    @property
    def cache(self) -> Path:
        """The folder of what can be made again."""
        return (self.root / ".cache").resolve()  # a build folder must not be known by two names


def load(
    root: Path, *, given: Settings | None = None, overrides: Settings | None = None
) -> Project:
    """Read `root`'s compose.yaml with its .env.

    `given`, of a command line, win over .env. `overrides`, our own, win over both and may be empty,
    which a user's settings may not (an empty port is an ephemeral one).

    Raises:
        StackError: USAGE, with the line, for a setting or a file that cannot be taken.

    """
    text, raw = _compose_file(root)
    overlay = root / GATEWAY  # which the container that downloads models lacks
    variables = VARIABLE.finditer(text + (overlay.read_text() if overlay.exists() else ""))
    known = {"GLM_GATEWAY", *(match["name"] for match in variables)} - {None, *INTERNAL}
    exported = {key: value for key, value in os.environ.items() if key in known and value}
    in_file = read_env(root / ".env", known=known)
    for where, values in (("The environment", exported), ("The command line", given or {})):
        for key, value in values.items():
            try:
                check_setting(key, value, known=known)
            except ValueError as error:
                raise _unusable(where, error) from error
    for key in exported.keys() & in_file.keys():
        if exported[key] != in_file[key]:
            _log.warning("%s is exported, but .env wins: %s=%s.", key, key, in_file[key])
    settings = {"GLM_UID": str(os.getuid() or _CONTAINER_UID)}
    settings |= _moved_engine(root, interpolate(raw.get("x-engine", {}), {}).get("commit"))
    for layer in (exported, in_file, given, overrides):
        settings.update(layer or {})
    return _resolved(root, raw, settings)


def _resolved(root: Path, raw: Any, settings: Settings) -> Project:
    found = project(root, interpolate(raw, settings), settings=settings)
    services = {
        quant: replace(service, settable=_settable(raw["services"][service.name]["environment"]))
        for quant, service in found.services.items()
    }
    return replace(found, services=services)


def _settable(environment: Mapping[str, Any]) -> dict[str, str]:
    matches = ((VARIABLE.fullmatch(str(value)), name) for name, value in environment.items())
    return {match["name"]: name for match, name in matches if match and match["name"]}


def pinned(root: Path) -> Engine:
    """Return the engine that compose.yaml pins, whatever is current."""
    _, raw = _compose_file(root)
    return _engine(interpolate(raw["x-engine"], {}))


def _engine(raw: Mapping[str, str]) -> Engine:
    return Engine(raw["repository"], raw["commit"], int(raw["build"]), raw["patches"])


def _moved_engine(root: Path, pin: str | None) -> dict[str, str]:
    """Return the settings of the engine that an update made current, unless the pin moved since.

    Raises:
        StackError: USAGE, for a record that cannot be read.

    """
    path = root / ENGINE_RECORD
    try:
        record = json.loads(path.read_text())
        current = record["current"]
        moved = dict(zip(ENGINE, (str(current["commit"]), str(int(current["build"]))), strict=True))
        if record["pin"] == pin:
            return moved
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StackError(
            f"{path} is no record of an engine.",
            "Move it away: the engine that compose.yaml pins is current then.",
            Code.USAGE,
        ) from error
    _log.warning("compose.yaml pins another engine since the last update; the pin counts.")
    return {}


def changed(before: Project, **settings: str) -> Project:
    """Return a project with some settings replaced, whatever a user set."""
    merged = {**before.settings, **settings}
    _, raw = _compose_file(before.root)
    return _resolved(before.root, raw, merged)


def _compose_file(root: Path) -> tuple[str, Any]:
    try:
        text = (root / "compose.yaml").read_text()
        return text, yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        where = str(error).replace("\n", " ")
        raise StackError(
            f"compose.yaml cannot be read: {where}.", "Mend it, or check it out anew.", Code.USAGE
        ) from error


def stand_ins(project: Project) -> dict[str, str]:
    """Return the settings that put a stand-in in the place of each model with a repository."""
    return {
        f"GLM_{quant.upper()}_FILE": f"{service.model.path.stem}.stand-in.gguf"
        for quant, service in project.services.items()
        if service.model.repository
    }


def read_env(path: Path, *, known: set[str]) -> dict[str, str]:
    """Read a .env file strictly; a missing one has no settings.

    Raises:
        StackError: USAGE, naming file and line.

    """
    settings: dict[str, str] = {}
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            pair = _env_line(line, first=number == 1)
            if pair is None:
                continue
            if pair[0] in settings:
                raise ValueError(f"{pair[0]} is set twice")
            check_setting(*pair, known=known)
        except ValueError as error:
            raise _unusable(f"{path.name}, line {number}", error) from error
        settings[pair[0]] = pair[1]
    return settings


def _unusable(where: str, error: ValueError) -> StackError:
    remedy = "Mend it; .env.example shows every setting."
    return StackError(f"{where}: {error}.", remedy, Code.USAGE)


def _env_line(raw: bytes, *, first: bool) -> tuple[str, str] | None:
    """Parse one line; None for a blank or a comment. Raises ValueError (UnicodeDecodeError)."""
    text = raw.decode("utf-8-sig" if first else "utf-8").strip()
    if not text or text.startswith("#"):
        return None
    match = re.fullmatch(r"""(\w+)=(?:'([^']*)'|"([^"$\\]*)"|([^\s'"$\\]*))""", text)
    if not match:
        raise ValueError("expected NAME=value, with no blanks, quotes or $ inside")
    value = match[2] or match[3] or match[4] or ""
    if not value.strip():
        raise ValueError(f"{match[1]} is blank")
    return match[1], value


def check_setting(name: str, value: str, *, known: set[str]) -> None:
    """Check a setting's value by the last word of its name. Raises ValueError with the reason."""
    if name not in known:
        near = get_close_matches(name, known, n=1)
        raise ValueError(f"{name} is no setting" + (f"; {near[0]} is" if near else ""))
    kind = name.rpartition("_")[2]
    if kind in _WHOLE_NUMBERS:
        low, high = _WHOLE_NUMBERS[kind]
        if not (value.isascii() and value.isdecimal() and low <= int(value) <= high):
            raise ValueError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
    elif kind == "BIND":
        try:
            ipaddress.IPv4Address(value)
        except ValueError:
            raise ValueError(f"{name} must be an IPv4 address, not {value!r}") from None
    elif kind in _WORDS:
        pattern, wanted = _WORDS[kind]
        if not re.fullmatch(pattern, value, re.ASCII):
            raise ValueError(f"{name} must be {wanted}, not {value!r}")


_WORDS = {
    "HOSTS": (r"[\w.-]+( [\w.-]+)*", "host names, a blank between them"),
    "MODE": (
        r"auto|none|mmap|mlock|mmap\+mlock|dio",
        "one of auto, none, mmap, mlock, mmap+mlock, dio",
    ),
    "NAME": (r"[a-z0-9][a-z0-9_-]*", "small letters, digits, - and _, a letter or digit first"),
    "MEMORY": (r"\d+(\.\d+)?[kmgtKMGT]?[bB]?", "a size, as 48g"),
}
_WHOLE_NUMBERS = {
    "PORT": (1024, 65535),
    "CONTEXT": (256, 256 * 202752),
    "SLOTS": (1, 256),
    "GATEWAY": (0, 1),
    "QUEUE": (0, 2000),
    "RATE": (1, 10**6),
    "CLIENTS": (1, 256),
    "UBATCH": (32, 8192),
    "CACHE": (0, 1),
    "SAMPLING": (0, 1),
    "THREADS": (0, 1024),
    "UID": (1, 2**31 - 1),
    "MS": (0, 60_000),
}


def interpolate(value: Any, settings: Settings) -> Any:
    """Return a YAML value with each ${NAME}, ${NAME-default} and ${NAME:-default} replaced."""
    if isinstance(value, dict):
        return {key: interpolate(item, settings) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolate(item, settings) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        if match["dollar"]:
            return "$"
        found = settings.get(match["name"])
        empty_counts = match["op"] != ":-"
        return found if found is not None and (found or empty_counts) else match["default"] or ""

    return VARIABLE.sub(replace, value)


def project(root: Path, document: dict[str, Any], *, settings: Settings) -> Project:
    """Turn a resolved Compose document, ours or Compose's own, into a Project.

    Raises:
        StackError: USAGE, naming the missing key.

    """
    secrets = {key: root / item["file"] for key, item in document["secrets"].items()}
    try:
        return Project(
            root=root,
            name=document["name"],
            settings=settings,
            engine=_engine(document["x-engine"]),
            default=document["x-default"],
            clients=int(document["x-clients"]),
            services={
                quant: _service(quant, model, document["services"][f"glm-{quant}"], root, secrets)
                for quant, model in document["x-models"].items()
            },
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StackError(
            f"compose.yaml lacks or mistypes {error}.",
            "Compare it with the published file.",
            Code.USAGE,
        ) from error


def _service(
    quant: str, model: dict[str, Any], raw: dict[str, Any], root: Path, secrets: dict[str, Path]
) -> Service:
    (port,) = raw["ports"]
    deploy = raw.get("deploy", {}).get("resources", {}).get("reservations", {})
    mounts = {Path(item["target"]): root / item["source"] for item in raw["volumes"]}
    mounts |= {Path(item["target"]): secrets[item["source"]] for item in raw["secrets"]}
    published, log = port.get("published", ""), raw["logging"]["options"]
    return Service(
        quant=quant,
        name=f"glm-{quant}",
        image=raw["image"],
        build_args=raw["build"]["args"],
        environment=raw["environment"],
        bind=port["host_ip"],
        port=int(published) if published else None,
        target_port=port["target"],
        mounts=mounts,
        gpus=tuple(g for item in deploy.get("devices", ()) for g in item["device_ids"]),
        stop_grace_s=float(raw["stop_grace_period"].removesuffix("s")),
        log_bytes=_bytes(log["max-size"]),
        log_files=int(log["max-file"]),
        uid=int(raw["user"].partition(":")[0]),
        model=Model(**{**model, "path": Path(model["path"])}),
    )


def _bytes(text: str) -> int:
    """Read a size as Docker does a log's. Raises ValueError, KeyError."""
    return int(text[:-1]) * {"k": 10**3, "m": 10**6, "g": 10**9}[text[-1]]
