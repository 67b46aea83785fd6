"""Rules of the Dockerfiles and of the Compose files that hadolint does not know.

Each rule yields what breaks it. For each, a mutation of the real file must be caught.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stack import config, host
from tests.workspace import ROOT

DOCKERFILES = sorted(path.name for path in (ROOT / "docker").glob("*Dockerfile"))
COMPOSE = sorted(path.name for path in ROOT.glob("compose*.yaml"))
LOCKS = ("cuda-toolkit.txt", "models.txt")
SECRET = re.compile(r"(?i)token|passw|secret|credential|(^|_)key$")
# Why a service may do what the others may not.
EXCEPTIONS = {
    ("models", "user"): "it becomes the owner of the folder of models, and ends",
    ("models", "host network"): "it reaches a proxy or mirror on the host's loopback",
    ("models", "writes"): "it downloads into the folder of models",
    ("models", "capabilities"): "SETUID and SETGID, to become that owner",
    ("models", "secret"): "HF_TOKEN by name alone: the shell has the value",
    ("models", "limits"): "it runs while somebody waits for it",
    ("models.Dockerfile", "user"): "models.sh gives up root itself",
}

Broken = Iterator[str]


def instructions(text: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile: name and the rest, comments and line ends gone."""
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    lines = re.sub(r"\\\n", " ", kept).splitlines()
    return [
        (word.upper(), rest) for word, _, rest in (line.partition(" ") for line in lines) if word
    ]


def stages(text: str) -> set[str]:
    return set(re.findall(r"(?m)^FROM .+ AS (\S+)", text))


def from_known_images(text: str) -> Broken:
    """An image from elsewhere is named once, as BASE, with a tag that is not `latest`."""
    for name, rest in instructions(text):
        image = rest.split()[0] if rest else ""
        own = image in {*stages(text), "scratch", "${BASE}"} or image.startswith("build-$")
        if name == "FROM" and not own:
            yield f"FROM {image}"
        if (
            name == "ARG"
            and rest.startswith("BASE=")
            and not re.search(r":(?!latest)[\w.-]+$", rest)
        ):
            yield rest


def copies_from_stages(text: str) -> Broken:
    for name, rest in instructions(text):
        for source in re.findall(r"(?:--|,)from=([^\s,]+)", rest):
            # The build contexts: the engine's source, and an image to audit.
            if name in ("COPY", "RUN") and source not in {*stages(text), "engine", "image"}:
                yield f"{name} from={source}"


def installs_by_hash(text: str) -> Broken:
    wanted = ("--require-hashes", "--no-deps", "--only-binary=:all:")
    for _, rest in instructions(text):
        for command in re.findall(r"pip install .+", rest):
            yield from (f"pip without {flag}" for flag in wanted if flag not in command)


def fetches_nothing_unchecked(text: str) -> Broken:
    for name, rest in instructions(text):
        if name == "ADD" or re.search(r"\b(curl|wget|git clone)\b", rest):
            yield f"{name} {rest}"


def has_no_secret(text: str) -> Broken:
    """Build arguments and the environment stand in the image's history for all to read."""
    for name, rest in instructions(text):
        if name in ("ARG", "ENV"):
            yield from (word for word in re.findall(r"(\w+)(?:=|$)", rest) if SECRET.search(word))


def last_stage_is_no_root(text: str) -> Broken:
    last = text[text.rindex("\nFROM ") :]
    users = [rest for name, rest in instructions(last) if name == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d+:[1-9]\d+", users[-1]):
        yield f"USER {users}"


DOCKERFILE_RULES: dict[Callable[[str], Broken], tuple[str, str, str]] = {
    # rule: a file, what to replace in it, and by what, so that it is broken
    from_known_images: ("Dockerfile", "BASE=debian:trixie-slim", "BASE=debian:latest"),
    copies_from_stages: ("Dockerfile", "COPY --from=verified", "COPY --from=alpine:3"),
    installs_by_hash: ("Dockerfile", "--require-hashes ", ""),
    fetches_nothing_unchecked: ("models.Dockerfile", "COPY models.sh", "ADD https://host/x"),
    has_no_secret: ("models.Dockerfile", "ENV PYTHONPATH=", "ENV HF_TOKEN=x PYTHONPATH="),
    last_stage_is_no_root: ("Dockerfile", "USER 10001:10001", "USER root"),
}


def read(name: str) -> str:
    return (ROOT / "docker" / name).read_text()


@pytest.mark.parametrize("rule", DOCKERFILE_RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfile_keeps(rule: Callable[[str], Broken], name: str) -> None:
    if rule is last_stage_is_no_root and (name, "user") in EXCEPTIONS:
        assert "setpriv" in read("models.sh")
        return
    assert list(rule(read(name))) == []


@pytest.mark.parametrize("rule", DOCKERFILE_RULES, ids=lambda rule: rule.__name__)
def test_broken_dockerfile_is_caught(rule: Callable[[str], Broken]) -> None:
    name, old, new = DOCKERFILE_RULES[rule]
    text = read(name)
    assert old in text

    assert list(rule(text.replace(old, new)))


@pytest.mark.parametrize(
    ("added", "status"), [("", 0), ("RUN apt-get install gcc\n", 1), ("MAINTAINER me\n", 1)]
)
def test_hadolint_lets_the_dockerfile_pass_and_a_worse_one_not(
    tmp_path: Path, added: str, status: int
) -> None:
    (tmp_path / "Dockerfile").write_text(read("models.Dockerfile") + added)
    settings = f"--config={ROOT / 'docker' / 'hadolint.yaml'}"

    assert host.run(["hadolint", settings, tmp_path / "Dockerfile"]).status == status


def unhashed(text: str) -> list[str]:
    """Return the requirements of a lock that any file of that version would meet."""
    entries = re.split(r"\n(?=\S)", re.sub(r"(?m)^\s*#.*\n", "", text))
    return [e for e in entries if e.strip() and not re.match(r"\S+==\S+[^#]*--hash=sha256:", e)]


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_is_locked_by_hash(name: str) -> None:
    assert unhashed(read(name)) == []


@pytest.mark.parametrize("name", LOCKS)
def test_package_without_a_hash_is_caught(name: str) -> None:
    assert unhashed(read(name) + "left-pad==1.0\n") == ["left-pad==1.0\n"]


Service = dict[str, Any]


class Loader(yaml.SafeLoader):
    """Knows the tags with which an overlay replaces what it changes."""


for tag in ("!reset", "!override"):
    Loader.add_constructor(tag, lambda *_: None)


def services(text: str) -> dict[str, Service]:
    """Return the services of a Compose file, its anchors and settings filled in."""
    raw: dict[str, Any] = config.interpolate(yaml.load(text, Loader), {})  # noqa: S506
    named: dict[str, Service] = raw["services"]
    return {name: {**service, "x-name": name} for name, service in named.items()}


def whole(service: Service) -> bool:
    """Return whether a service is described here, not changed by an overlay."""
    return "image" in service


def drops_capabilities(service: Service) -> Broken:
    if service.get("cap_drop") != ["ALL"]:
        yield "cap_drop"
    if service.get("cap_add") and (service["x-name"], "capabilities") not in EXCEPTIONS:
        yield f"cap_add {service['cap_add']}"


def gains_no_privileges(service: Service) -> Broken:
    if "no-new-privileges:true" not in service.get("security_opt", ()):
        yield "no-new-privileges"
    if service.get("privileged") or "seccomp=unconfined" in service.get("security_opt", ()):
        yield "privileged"


def is_read_only(service: Service) -> Broken:
    if service.get("read_only") is not True:
        yield "read_only"
    for mount in service.get("volumes", ()):
        if not mount.get("read_only") and (service["x-name"], "writes") not in EXCEPTIONS:
            yield f"{mount['target']} is writable"
        if "docker.sock" in mount["source"]:
            yield "the Docker socket"
    for options in service.get("tmpfs", ()):
        if not {"noexec", "nosuid", "nodev"} <= set(re.split("[:,]", options)):
            yield f"tmpfs {options}"


def is_no_root(service: Service) -> Broken:
    user = str(service.get("user", ""))
    if not re.match(r"[1-9]", user) and (service["x-name"], "user") not in EXCEPTIONS:
        yield f"user {user!r}"


def shares_no_namespace(service: Service) -> Broken:
    for key in ("network_mode", "pid", "ipc", "uts", "userns_mode"):
        allowed = key == "network_mode" and (service["x-name"], "host network") in EXCEPTIONS
        if service.get(key) == "host" and not allowed:
            yield f"{key}: host"


def publishes_on_loopback(service: Service) -> Broken:
    for port in service.get("ports", ()):
        if port["host_ip"] != "127.0.0.1":
            yield f"published on {port['host_ip'] or 'all addresses'} by default"


def has_limits(service: Service) -> Broken:
    if (service["x-name"], "limits") in EXCEPTIONS:
        return
    yield from (key for key in ("pids_limit", "mem_limit", "logging") if not service.get(key))
    if not re.fullmatch(r"no|on-failure:\d", str(service.get("restart", "no"))):
        yield f"restart: {service['restart']}"


def names_its_image(service: Service) -> Broken:
    if re.search(r":latest$", service["image"]):
        yield service["image"]


def holds_no_secret(service: Service) -> Broken:
    """Everybody who may ask Docker reads the environment; a secret comes by file."""
    for name, value in (service.get("environment") or {}).items():
        if SECRET.search(name) and value is not None:
            yield name


COMPOSE_RULES: dict[Callable[[Service], Broken], tuple[str, str]] = {
    # rule: what to replace in compose.yaml, and by what, so that it is broken
    drops_capabilities: ("cap_drop: [ALL]", "cap_drop: [NET_RAW]"),
    gains_no_privileges: ("no-new-privileges:true", "no-new-privileges:false"),
    is_read_only: ("noexec,nosuid,nodev", "nosuid,nodev"),
    is_no_root: ("user: ${GLM_UID:-10001}", "user: ${GLM_UID:-0}"),
    shares_no_namespace: ("  init: false", "  pid: host\n  init: false"),
    publishes_on_loopback: ("GLM_BIND:-127.0.0.1", "GLM_BIND:-0.0.0.0"),
    has_limits: ("restart: on-failure:3", "restart: always"),
    names_its_image: ("image: glm-server:cpu", "image: glm-server:latest"),
    holds_no_secret: ("  LLAMA_ARG_HOST:", "  LLAMA_API_KEY: abc\n  LLAMA_ARG_HOST:"),
}


@pytest.mark.parametrize("rule", COMPOSE_RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", COMPOSE)
def test_services_keep(rule: Callable[[Service], Broken], name: str) -> None:
    found = services((ROOT / name).read_text())

    broken = {name: list(rule(each)) for name, each in found.items() if whole(each)}
    assert not any(broken.values()), broken


@pytest.mark.parametrize("rule", COMPOSE_RULES, ids=lambda rule: rule.__name__)
def test_broken_service_is_caught(rule: Callable[[Service], Broken]) -> None:
    text = (ROOT / "compose.yaml").read_text()
    old, new = COMPOSE_RULES[rule]
    assert old in text

    assert any(list(rule(each)) for each in services(text.replace(old, new)).values())


def test_engine_is_pinned_to_a_commit() -> None:
    raw = config.interpolate(yaml.safe_load((ROOT / "compose.yaml").read_text()), {})

    assert re.fullmatch(r"[0-9a-f]{40}", raw["x-engine"]["commit"])


def test_every_exception_is_of_something_that_is_there() -> None:
    named = {name for file in COMPOSE for name in services((ROOT / file).read_text())}

    assert {name for name, _ in EXCEPTIONS} <= named | set(DOCKERFILES)
