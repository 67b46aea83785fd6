"""The engine that was built is the one that was asked for.

With `--backend cuda` the production image is built and checked without a GPU.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from docker.models.containers import Container

from bench import prefill
from stack import client, config, keys, runtime
from stack.compose import Docker
from stack.config import UNPATCHED, Project, Service
from stack.errors import Code, StackError
from stack.host import Result, run
from stack.runtime import Runtime
from stack.server import Server
from tests import workspace
from tests.checks.conftest import Broken, Notice, Target

Logged = tuple[Server, Path]

PROGRAMS = ("llama-server", "llama-bench", "llama-batched-bench", "llama-fit-params")
LOADER = "/lib64/ld-linux-x86-64.so.2"


def image(engine: Runtime) -> Docker:
    if not isinstance(engine, Docker):
        pytest.skip("a native build has no image")
    return engine


@pytest.fixture
def execute(engine: Runtime, startable: Service) -> Callable[..., Result]:
    """Run a program with the target's engine."""
    return partial(engine.execute, startable)


def test_version_equals_the_pin(
    execute: Callable[..., Result], engine: Runtime, project: Project, service: Service
) -> None:
    says = execute(engine.program(service, "llama-server"), "--version")

    assert says.status == 0
    assert f"build {project.engine.build}, commit {project.engine.commit}" in (
        says.stdout + says.stderr
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_library_is_missing(
    execute: Callable[..., Result], engine: Runtime, service: Service, program: str
) -> None:
    found = execute(LOADER, "--list", engine.program(service, program))

    assert found.status == 0
    assert "not found" not in found.stdout


def test_engine_knows_every_setting_of_compose(
    execute: Callable[..., Result], engine: Runtime, project: Project, service: Service
) -> None:
    says = execute(engine.program(service, "llama-server"), "--help")

    known = {*re.findall(r"LLAMA_ARG_\w+", says.stdout), "GLIBC_TUNABLES"}  # which is glibc's own
    assert known.issuperset(chain(*(each.environment for each in project.services.values())))


def test_image_passes_the_gate_of_its_build(engine: Runtime, service: Service) -> None:
    image(engine).audit(service)


@pytest.mark.parametrize(
    ("argument", "other", "says"),
    [
        ("ENGINE_COMMIT", "f" * 40, "f was asked for"),
        ("CUDA_ARCH", "75-real;90a-real", "asks for 'sm_75 sm_90a'"),
    ],
)
def test_gate_refuses_an_image_of_another_build(
    engine: Runtime, service: Service, argument: str, other: str, says: str
) -> None:
    if argument not in service.build_args:
        pytest.skip(f"{service.name} has no {argument}")
    another = replace(service, build_args={**service.build_args, argument: other})

    with pytest.raises(StackError, match=says) as caught:
        image(engine).audit(another)

    assert caught.value.code == Code.BUILD


def test_gate_refuses_an_image_that_is_not_there(engine: Runtime, service: Service) -> None:
    with pytest.raises(StackError, match="There is no image glm-none"):
        image(engine).audit(replace(service, image="glm-none"))


@pytest.fixture
def alone(engine: Runtime, project: Project, runnable: Service) -> Iterator[Container]:
    """A container of an image with the target's model inside."""
    docker = image(engine)
    if runnable.gpus:
        pytest.skip(f"{runnable.name}: its model would stand on this disk three times")
    keys.make(runnable)
    started = run(runtime.include_model(project, runnable))
    container = docker.client.containers.get(started.stdout.strip())
    yield container
    container.remove(force=True)
    docker.client.images.remove(container.attrs["Config"]["Image"])


def test_image_with_model_serves_with_no_volume_but_the_key(
    alone: Container, runnable: Service
) -> None:
    alone.reload()
    port = alone.attrs["NetworkSettings"]["Ports"][f"{runnable.target_port}/tcp"][0]
    key = keys.read(runnable)
    server = Server("docker", runnable, f"http://{port['HostIp']}:{port['HostPort']}", key)
    client.wait_ready(server)

    assert [mount["Destination"] for mount in alone.attrs["Mounts"]] == ["/run/secrets/api-key"]
    assert client.complete(server, "Hello", tokens=16).tokens == 16
    assert client.props(server)["total_slots"] == runnable.slots


def test_image_with_model_is_refused_where_docker_has_no_room(
    engine: Runtime, service: Service, tmp_path: Path
) -> None:
    with (tmp_path / service.model.path.name).open("wb") as file:
        file.truncate(8 << 40)
    huge = replace(service, mounts={service.model.path.parent: tmp_path})

    with pytest.raises(StackError, match=r"-\w+ needs 17593\.3 GB in /") as caught:
        image(engine).include_model(huge)

    assert caught.value.code == Code.DISK


def test_image_does_not_run_as_root(engine: Runtime, service: Service) -> None:
    user = image(engine).client.images.get(service.image).attrs["Config"]["User"]

    assert user not in ("", "0", "root", "0:0")


def invalid(bill: str) -> object:
    """Return what CycloneDX's own validator says against a bill of materials, or None."""
    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill)


def test_bill_of_materials_is_valid_and_names_what_is_inside(
    bill: str, project: Project, service: Service
) -> None:
    assert invalid(bill) is None
    named = {each["name"]: each["purl"] for each in json.loads(bill)["components"]}
    assert named["llama.cpp"] == f"pkg:github/ggml-org/llama.cpp@{project.engine.commit}"
    assert set(named) >= {"libc6", "libstdc++6", "libgomp1", "cpp-httplib", "nlohmann-json"}
    assert ("nvidia-cublas" in named) == (service.backend == "cuda")


def test_broken_bill_of_materials_is_noticed(bill: str, notice: Notice) -> None:
    broken = bill.replace('"type":"application"', '"type":"appliance"')

    notice(
        test_bill_of_materials_is_valid_and_names_what_is_inside,
        "a component of no known type",
        says="appliance",
        bill=broken,
    )


def test_provenance_is_of_the_image_that_was_built(
    engine: Runtime, project: Project, service: Service
) -> None:
    docker = image(engine)
    runtime.build(docker, project, service)

    told = json.loads(docker.provenance_file(service).read_text())

    built = docker.client.images.get(service.image)
    assert f"sha256:{told['subject'][0]['digest']['sha256']}" == built.id
    inputs = {
        each["uri"]: each["digest"]
        for each in told["predicate"]["buildDefinition"]["resolvedDependencies"]
    }
    dockerfile = (project.root / "docker" / "Dockerfile").read_bytes()
    assert inputs["docker/Dockerfile"] == {"sha256": hashlib.sha256(dockerfile).hexdigest()}
    assert {"gitCommit": project.engine.commit} in inputs.values()


def test_labels_tell_the_build(engine: Runtime, project: Project, service: Service) -> None:
    labels = image(engine).image_labels(service)

    assert labels["org.opencontainers.image.revision"] == project.engine.commit
    assert labels["glm.engine.build"] == str(project.engine.build)
    assert labels["glm.engine.backend"] == service.backend
    assert labels["glm.cuda.archs"] == service.build_args.get("CUDA_ARCH", "")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.+Z", labels["org.opencontainers.image.created"])


@pytest.fixture
def side_by_side(project: Project, target: Target, tmp_path: Path) -> Iterator[list[Logged]]:
    """Two servers with private caches that sample in their backend: our engine, and unpatched."""
    if target != Target("native", project.default):
        pytest.skip(f"is compared natively, with {project.default}")
    folder = workspace.make(tmp_path, GLM_ENGINE_PATCHES=UNPATCHED)
    overrides = {f"GLM_{project.default.upper()}_PORT": ""}
    servers = []
    for each in (project, config.load(folder, overrides=overrides)):
        chosen, service = runtime.native(each), each.service(each.default)
        runtime.ensure_engine(chosen, each, service)
        settings = {"N_PARALLEL": "8", "KV_UNIFIED": "0", "BACKEND_SAMPLING": "1"}
        settings |= {"CTX_SIZE": "32768", "PROMPT_STEP_MS": "25"}
        environment = {f"LLAMA_ARG_{name}": value for name, value in settings.items()}
        varied = replace(service, environment={**service.environment, **environment})
        log = each.state / "native" / f"{service.name}.log"
        servers.append((runtime.serving(chosen, each, varied), log))
    with contextlib.ExitStack() as stack:
        yield [(stack.enter_context(up).server, log) for up, log in servers]


def test_our_patches_change_no_answer_and_work(side_by_side: list[Logged]) -> None:
    (ours, our_log), (plain, plain_log) = side_by_side

    def ask(server: Server, number: int) -> str:
        prompt = f"{number} of {number % 7} apples, once upon a time"
        warm = number % 2
        return client.complete(server, prompt, tokens=16, seed=number, temperature=warm).text

    def texts(server: Server) -> list[str]:
        with ThreadPoolExecutor(3) as clients:
            return list(clients.map(partial(ask, server), range(24)))

    assert texts(ours) == texts(plain)
    logs = [log.read_text() for log in (our_log, plain_log)]
    reserved = [log.count("reserving ...") for log in logs]
    assert reserved[0] < 5
    assert reserved[1] > 12  # for each request once, or for some that begin together
    assert _apart(logs[0]) == 0 < _apart(logs[1])


def test_long_prompt_holds_streams_up_for_less(side_by_side: list[Logged]) -> None:
    waits = []
    for server, _ in side_by_side:
        *_, last = prefill.read(server, [1000, 1000])  # the first shows what a step takes
        waits.append(last.longest_gap_ms)

    assert waits[0] < waits[1] / 2


def _apart(log: str) -> int:
    """Count the choices of a slot that is no neighbour of the busy ones, where there are any."""
    busy: set[int] = set()
    apart = 0
    for line in log.splitlines():
        if found := re.search(r"id +(\d+) \| task -1 \| selected slot by (LRU|LCP)", line):
            slot = int(found[1])
            apart += found[2] == "LRU" and bool(busy) and not {slot - 1, slot + 1} & busy
            busy.add(slot)
        elif found := re.search(r"id +(\d+) \| task \d+ \| stop processing", line):
            busy.discard(int(found[1]))
    return apart


# --- What is broken, each of which a check above must notice.


@pytest.mark.usefixtures("target")
def test_pin_that_was_moved_is_noticed(notice: Notice, project: Project) -> None:
    moved = replace(project.engine, build=project.engine.build + 1)

    notice(
        test_version_equals_the_pin,
        "a pin of the next build",
        says=f"build {moved.build}",
        project=replace(project, engine=moved),
    )


def test_library_that_is_missing_is_noticed(
    notice: Notice, engine: Runtime, service: Service, tmp_path: Path
) -> None:
    if engine.name != "native":
        pytest.skip("shown on the native build")
    built = Path(engine.program(service, PROGRAMS[0]))
    for file in built.parent.iterdir():
        if file.name != "libllama.so.0":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / built.name).unlink()
    program = shutil.copy(built, tmp_path)
    without = SimpleNamespace(program=lambda *_: program)

    notice(
        test_no_library_is_missing,
        "a build without libllama",
        says="libllama.so.0",
        engine=without,
        program=built.name,
    )


@pytest.mark.usefixtures("target")
def test_setting_that_the_engine_does_not_know_is_noticed(notice: Notice, tmp_path: Path) -> None:
    folder = workspace.make(tmp_path)
    workspace.change(folder, "compose.yaml", 'ARG_UI: "0"', 'ARG_UI: "0"\n  LLAMA_ARG_U: "0"')

    notice(
        test_engine_knows_every_setting_of_compose,
        "a setting LLAMA_ARG_U",
        says="False",
        project=config.load(folder),
    )


CHANGED = {
    test_image_does_not_run_as_root: ("USER root", "'root' not in"),
    test_labels_tell_the_build: ("LABEL glm.engine.build=1", "'1' == "),
}


@pytest.mark.parametrize("check", CHANGED, ids=lambda check: check.__name__)
def test_image_of_other_settings_is_noticed(
    notice: Notice, engine: Runtime, service: Service, check: Callable[..., None]
) -> None:
    docker, (changed, says) = image(engine), CHANGED[check]
    name = f"{docker.project.name}-changed"
    container = docker.client.containers.create(service.image)
    try:
        container.commit(name, "x", changes=[changed])
    finally:
        container.remove()
    try:
        other = replace(service, image=f"{name}:x")
        notice(check, f"an image with {changed}", says=says, service=other)
    finally:
        docker.client.images.remove(f"{name}:x")


@pytest.mark.parametrize(
    ("check", "says"),
    [
        (test_our_patches_change_no_answer_and_work, "< 5"),
        (test_long_prompt_holds_streams_up_for_less, " < "),
    ],
)
def test_patches_taken_for_one_another_are_noticed(
    notice: Notice, side_by_side: list[Logged], check: Callable[..., None], says: str
) -> None:
    notice(
        check,
        "the engine without patches in the place of ours",
        says=says,
        side_by_side=side_by_side[::-1],
    )


def nothing(*_: object, **__: object) -> None:
    """Stand for a step that is left out."""


LETS_PASS: Broken = (
    "a gate that lets all pass",
    {"patch": {"stack.compose.Docker.audit": nothing}},
)
UNLIKE: dict[Callable[..., None], Broken] = {
    test_gate_refuses_an_image_of_another_build: LETS_PASS,
    test_gate_refuses_an_image_that_is_not_there: LETS_PASS,
    test_image_with_model_is_refused_where_docker_has_no_room: (
        "a copy that looks for no room",
        {"patch": {"stack.compose.Docker.include_model": nothing}},
    ),
}


@pytest.mark.parametrize("check", UNLIKE, ids=lambda check: check.__name__)
def test_what_is_unlike_is_noticed(
    engine: Runtime, notice: Notice, check: Callable[..., None]
) -> None:
    image(engine)
    broken, how = UNLIKE[check]

    notice(check, broken, **how)


def test_other_build_is_noticed(
    engine: Runtime, project: Project, service: Service, notice: Notice
) -> None:
    docker, other, build = image(engine), "f" * 40, runtime.build
    build_args = {**service.build_args, "ENGINE_COMMIT": other}
    notice(
        test_image_passes_the_gate_of_its_build,
        "an image of another commit",
        says="was asked for",
        service=replace(service, build_args=build_args),
    )
    notice(
        test_provenance_is_of_the_image_that_was_built,
        "the provenance of another commit",
        project=replace(project, engine=replace(project.engine, commit=other)),
        patch={"stack.runtime.build": lambda *_: build(docker, project, service)},
    )


def test_other_settings_in_an_image_with_model_are_noticed(
    alone: Container, runnable: Service, notice: Notice
) -> None:
    more = {**runnable.environment, "LLAMA_ARG_N_PARALLEL": str(runnable.slots + 1)}
    notice(
        test_image_with_model_serves_with_no_volume_but_the_key,
        "a slot less than configured",
        says="4 == 5",
        alone=alone,
        runnable=replace(runnable, environment=more),
    )
