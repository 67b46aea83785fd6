"""The running container lets its server do no more than serve.

Each promise is read back from the kernel or tried, by a check that an insecure twin of the same
container fails.
"""

import copy
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from docker.models.containers import Container

from stack import client, config, keys, runtime
from stack.compose import Docker
from stack.config import Service
from stack.host import run
from stack.runtime import Runtime
from stack.server import Server
from tests import workspace
from tests.checks.conftest import Notice, Target
from tests.hardening import CHECKS, Insecure, Seen, see
from tests.ledger import Ledger
from tests.outside import PORT, Outside, outside
from tests.workspace import ROOT, Deployment, free_port

DOCKER_SOCKET = {"Type": "bind", "Source": "/var/run/docker.sock", "Target": "/docker.sock"}
UNLIMITED = {"PidsLimit": 0, "Memory": 0, "MemorySwap": 0, "Ulimits": []}
BY_ROOT = {"User": "0:0"}
KEY = ["DAC_READ_SEARCH"]  # what root needs to read the key
TMP = "/tmp"  # noqa: S108  # the container's
INSECURE = {
    "root": Insecure(("user",), config=BY_ROOT, host={"CapAdd": KEY}),
    "root-group": Insecure(("user",), host={"GroupAdd": ["0"]}),
    "capability": Insecure(("capabilities",), host={"CapAdd": ["NET_ADMIN"]}),
    "setuid-may-gain": Insecure(
        ("privileges",), config={"Entrypoint": ["/app/llama-server"]}, host={"SecurityOpt": None}
    ),
    "no-seccomp": Insecure(("seccomp",), host={"SecurityOpt": ["seccomp=unconfined"]}),
    "unconfined": Insecure(("seccomp",), config={"Entrypoint": ["/app/llama-server"]}),
    "writable-root": Insecure(("mounts",), host={"ReadonlyRootfs": False}),
    "writable-root-of-root": Insecure(
        ("mounts", "written", "executed"),
        config=BY_ROOT,
        host={"CapAdd": KEY, "ReadonlyRootfs": False},
    ),
    "tmpfs-runs": Insecure(("executed",), host={"Tmpfs": {TMP: "rw,exec"}}),
    "tmpfs-more": Insecure(
        ("written",), host={"Tmpfs": {TMP: "rw", "/app/licenses": "rw,mode=1777"}}
    ),
    "device": Insecure(
        ("devices",),
        host={
            "Devices": [
                {
                    "PathOnHost": "/dev/null",
                    "PathInContainer": "/dev/nvidia7",
                    "CgroupPermissions": "rwm",
                }
            ]
        },
    ),
    "docker-socket": Insecure(("sockets",), host={"Mounts": [DOCKER_SOCKET]}),
    "host-network": Insecure(("namespaces",), host={"NetworkMode": "host", "PortBindings": None}),
    "host-pids": Insecure(("namespaces",), host={"PidMode": "host"}),
    "host-ipc": Insecure(("namespaces",), host={"IpcMode": "host"}),
    "host-uts": Insecure(("namespaces",), config={"Hostname": ""}, host={"UTSMode": "host"}),
    "no-limits": Insecure(("limits",), host=UNLIMITED),
    "privileged": Insecure(("capabilities", "seccomp", "devices"), host={"Privileged": True}),
    "setuid-shell": Insecure(
        ("setuid", "executables"), host={"ReadonlyRootfs": False}, file="bin/sh"
    ),
}


def in_docker(engine: Runtime) -> Docker:
    if not isinstance(engine, Docker):
        pytest.skip("a native server has the rights of its user")
    return engine


@pytest.fixture(scope="session")
def container(engine: Runtime, server: Server) -> Container:
    found = in_docker(engine).container(server.service)
    assert found
    return found


@pytest.fixture(scope="session")
def seen(engine: Runtime, server: Server, container: Container) -> Seen:
    return see(in_docker(engine), server.service, container)


@pytest.mark.unnoticed("each of CHECKS is seen to fail by its own name")
@pytest.mark.parametrize("check", CHECKS)
def test_server_holds(seen: Seen, target: Target, ledger: Ledger, check: str) -> None:
    expected = (CHECKS[check].__doc__ or "").rstrip(".")
    with ledger.trying("", check, expected=expected, target=target) as row:
        row.inputs = 1
        assert list(CHECKS[check](seen)) == []
        row.found = "as expected"


@pytest.fixture
def twin(
    request: pytest.FixtureRequest, engine: Runtime, service: Service, container: Container
) -> Iterator[tuple[Insecure, Container]]:
    """A container like the server's own but for one thing."""
    docker, insecure = in_docker(engine), INSECURE[request.param]
    if service.gpus:
        pytest.skip(f"{service.name}: each of its twins would load the model once more")
    config = copy.deepcopy(container.attrs["Config"])
    config |= {"HostConfig": {**container.attrs["HostConfig"], **(insecure.host or {})}}
    config |= {"Labels": {}, **(insecure.config or {})}
    if mounts := (insecure.host or {}).get("Mounts"):
        config["HostConfig"]["Mounts"] = [*container.attrs["HostConfig"]["Mounts"], *mounts]
    create = docker.client.api.create_container_from_config
    twin = docker.client.containers.get(create(config)["Id"])  # type: ignore[no-untyped-call]
    try:
        if insecure.file:
            twin.put_archive("/", setuid(insecure.file))
        twin.start()
        yield insecure, twin
    finally:
        twin.remove(force=True)


def setuid(name: str) -> bytes:
    """Return an archive of one setuid program."""
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            info = tarfile.TarInfo(name)
            info.size, info.mode = 1, 0o4755
            archive.addfile(info, io.BytesIO(b"#"))
        return file.getvalue()


@pytest.mark.parametrize("twin", INSECURE, indirect=True)
def test_insecure_twin_does_not(
    twin: tuple[Insecure, Container],
    engine: Runtime,
    service: Service,
    ledger: Ledger,
    request: pytest.FixtureRequest,
) -> None:
    insecure, container = twin
    found = see(in_docker(engine), service, container)

    for name in insecure.fails:
        broken = f"a container: {request.node.callspec.params['twin']}"
        with ledger.catching(CHECKS[name], broken, says=r" == \[\]"):
            assert list(CHECKS[name](found)) == []


@pytest.mark.unnoticed("it holds the table of what is insecure, and tries nothing")
def test_every_check_has_a_twin_that_fails_it() -> None:
    assert {name for twin in INSECURE.values() for name in twin.fails} == set(CHECKS)


@pytest.fixture(scope="module")
def world() -> Iterator[Outside]:
    with outside() as there:
        yield there


@pytest.fixture(scope="module")
def confine(container: Container, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's launcher, to run other programs under its filter."""
    stream, _ = container.get_archive("/app/confine")
    folder = tmp_path_factory.mktemp("confine")
    with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as archive:
        archive.extractall(folder, filter="data")
    return folder / "confine"


DENIED = {"EPERM", "ENOENT"}


def calls(there: Outside, *confined: Path) -> dict[str, str]:
    argv = [sys.executable, "-m", "tests.calls", there.address, str(PORT)]
    done = run([*confined, *argv], cwd=ROOT)
    ways: dict[str, str] = json.loads(done.stdout)
    return ways


def test_no_way_out_passes_the_servers_filter(
    confine: Path, world: Outside, target: Target, ledger: Ledger
) -> None:
    expected = "each is refused by its own filter of system calls"
    with ledger.trying("", "ways to open a connection", expected=expected, target=target) as row:
        ways = calls(world, confine)
        row.inputs, row.found = len(ways), "as expected"
        assert set(ways.values()) == DENIED, ways


def test_ways_out_are_open_without_the_filter(world: Outside, ledger: Ledger) -> None:
    ways = calls(world)

    with ledger.catching(
        test_no_way_out_passes_the_servers_filter, "no filter", says="'tcp': 'ok'"
    ):
        assert set(ways.values()) == DENIED, ways
    assert (ways["tcp"], ways["udp"], ways["fast-open"]) == ("ok", "ok", "ok")
    assert ways["unix"] == "ok"
    assert not DENIED & set(ways.values()), ways


def reaches(docker: Docker, service: Service, there: Outside) -> bool:
    """Return whether a container on the server's network, with no filter, gets an answer."""
    connect = f"exec 3<>/dev/tcp/{there.address}/{PORT}"
    return docker.sibling(service, "timeout", "3", "bash", "-c", connect).status == 0


def test_network_of_the_server_has_no_way_out(
    engine: Runtime, server: Server, world: Outside, target: Target, ledger: Ledger
) -> None:
    expected = "it gets no answer from a host beyond"
    with ledger.trying("", "a neighbour with no filter", expected=expected, target=target) as row:
        row.inputs = 1
        assert not reaches(in_docker(engine), server.service, world)
        row.found = "as expected"


def test_an_ordinary_network_has_one(
    engine: Runtime, service: Service, world: Outside, ledger: Ledger
) -> None:
    docker = in_docker(engine)
    other = Docker(replace(docker.project, name=f"{docker.project.name}-open"))
    network = docker.client.networks.create(f"{other.project.name}_default")
    check = test_network_of_the_server_has_no_way_out
    try:
        with ledger.catching(check, "an ordinary network", says="not True"):
            assert not reaches(other, service, world)
    finally:
        network.remove()


def test_server_published_on_a_network_answers_its_hosts(
    engine: Runtime,
    runnable: Service,
    world: Outside,
    tmp_path: Path,
    *,
    target: Target,
    ledger: Ledger,
) -> None:
    in_docker(engine)
    folder = workspace.make(tmp_path, GLM_BIND=world.here)
    project = config.load(folder, overrides={f"GLM_{runnable.quant.upper()}_PORT": ""})
    service = project.service(runnable.quant)
    keys.make(service)
    expected = "they get 200 with the key, 401 with another"
    with (
        ledger.trying(
            "", "hosts of the network of GLM_BIND", expected=expected, target=target
        ) as row,
        runtime.serving(Docker(project), project, service) as up,
    ):
        row.inputs = 2
        url = f"{up.server.url}/v1/models"
        assert world.fetch(url, key=up.server.key) == "200"
        assert world.fetch(url, key="wrong") == "401"
        row.found = "as expected"


def test_server_published_on_loopback_does_not(
    server: Server, world: Outside, target: Target, ledger: Ledger
) -> None:
    port = urlsplit(server.url).port
    expected = "a host of another network does not reach it"
    with ledger.trying("", "published on loopback", expected=expected, target=target) as row:
        row.inputs = 1
        assert world.fetch(f"http://{world.here}:{port}/health", key="") == ""
        row.found = "as expected"


@pytest.fixture
def cuda(request: pytest.FixtureRequest, tmp_path: Path, target: Target) -> Iterator[Deployment]:
    """A deployment of tiny in the image for GPUs, with a driver that finds none.

    The driver's library is an empty one: the engine then computes on the CPU.
    """
    if target != Target("docker", "tiny"):
        pytest.skip("is tried once")
    in_docker(request.getfixturevalue("engine"))
    models = tmp_path / "models"
    models.mkdir()
    os.link(ROOT / "models" / "tiny.gguf", models / "tiny.gguf")
    empty: list[str | Path] = ["-x", "c", "/dev/null", "-o", models / "libcuda.so.1"]
    if not shutil.which("cc") or run(["cc", "-shared", *empty]).status:
        pytest.skip("there is no C compiler, to make an empty library")
    folder = workspace.make(tmp_path, GLM_TINY_PORT=str(free_port()), GLM_MODELS=str(models))
    workspace.change(folder, "compose.yaml", "image: glm-server:cpu", "image: glm-server:cuda")
    alias = "      LLAMA_ARG_ALIAS: glm-4.7-flash-tiny\n"
    library = f"{alias}      LD_LIBRARY_PATH: /app/models\n"
    workspace.change(folder, "compose.yaml", alias, library)
    deployment = Deployment(folder, "--docker")
    docker = Docker(deployment.project)
    if not docker.image_id(deployment.service.image):
        pytest.skip(f"{deployment.service.image} is not built here")
    yield deployment
    docker.stop(deployment.service)


def test_image_for_gpus_serves_under_the_same_limits(
    cuda: Deployment, target: Target, ledger: Ledger
) -> None:
    expected = "with a driver that finds no GPU it serves from the CPU, and holds all of these"
    with ledger.trying("", "the CUDA image", expected=expected, target=target) as row:
        server = cuda.start_server()
        client.wait_ready(server)
        assert client.complete(server, "hello", tokens=16).tokens == 16
        assert "failed to initialize CUDA" in server.logs(2000)
        docker = Docker(cuda.project)
        container = docker.container(cuda.service)
        assert container
        found = see(docker, cuda.service, container)
        complaints = {name: list(check(found)) for name, check in CHECKS.items()}
        row.inputs, row.found = len(CHECKS), "as expected"
        assert {name: said for name, said in complaints.items() if said} == {}


def test_image_for_gpus_that_may_write_is_noticed(cuda: Deployment, notice: Notice) -> None:
    workspace.change(cuda.folder, "compose.yaml", "  read_only: true\n  cap_drop", "  cap_drop")

    notice(
        test_image_for_gpus_serves_under_the_same_limits,
        "a CUDA image in a container that may write",
        says="is mounted for writing",
        cuda=cuda,
    )


FETCHED = {
    test_server_published_on_a_network_answers_its_hosts: ("a host that reaches nothing", ""),
    test_server_published_on_loopback_does_not: ("a host that reaches it", "200"),
}


@pytest.mark.parametrize("check", FETCHED, ids=lambda check: check.__name__)
@pytest.mark.usefixtures("target")
def test_host_that_reaches_something_else_is_noticed(
    notice: Notice, check: Callable[..., None]
) -> None:
    broken, status = FETCHED[check]

    notice(check, broken, patch={"tests.outside.Outside.fetch": lambda *_, **__: status})
