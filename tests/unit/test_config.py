import json
import re
from pathlib import Path

import pytest
import yaml

from stack import config, host
from stack.errors import Code, StackError
from tests import workspace

KNOWN = {"GLM_BIND", "GLM_TINY_PORT", "GLM_SLOTS", "GLM_GPU"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in KNOWN:
        monkeypatch.delenv(name, raising=False)
    return workspace.make(tmp_path)


def add(folder: Path, line: bytes) -> Path:
    path = folder / ".env"
    path.write_bytes(path.read_bytes() + line)
    return folder


def resolved_by_compose(project: config.Project) -> config.Project:
    """Read the same file through Docker Compose, which needs no engine for that."""
    env = {**project.settings, "PATH": "/usr/local/bin:/usr/bin:/bin"}
    argv = ["docker", "compose", "--project-directory", str(project.root), "--profile", "*"]
    done = host.run([*argv, "--env-file", "/dev/null", "config", "--format", "json"], env=env)
    assert done.status == 0, done.stderr
    return config.project(project.root, json.loads(done.stdout), settings=project.settings)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"GLM_Q4_PORT": "", "GLM_BIND": "192.0.2.1", "GLM_GPU": "GPU-1"}, {"GLM_SLOTS": "9"}],
    ids=["defaults", "network", "slots"],
)
def test_our_reading_equals_composes(folder: Path, overrides: dict[str, str]) -> None:
    try:
        host.run(["docker", "compose", "version"])
    except StackError as error:
        pytest.skip(error.cause)
    ours = config.load(folder, overrides=overrides)

    assert resolved_by_compose(ours) == ours


def test_every_model_has_a_service_and_every_service_a_model() -> None:
    raw = yaml.safe_load((workspace.ROOT / "compose.yaml").read_text())

    assert {f"glm-{quant}" for quant in raw["x-models"]} == set(raw["services"]) - {"models"}


def test_default_ports_differ() -> None:
    services = config.load(workspace.ROOT).services.values()

    assert len({service.port for service in services}) == len(services)


@pytest.mark.parametrize("name", ["q9", "", "../../x", "--foo"])
def test_unknown_quant_is_refused_with_the_known_ones(folder: Path, name: str) -> None:
    with pytest.raises(StackError, match="q4, q8, tiny") as caught:
        config.load(folder).service(name)

    assert caught.value.code == Code.USAGE


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"GLM_SLOTS=", "blank"),
        (b"GLM_SLOTS=''", "blank"),
        (b"GLM_GPU=0\nGLM_GPU=1", "twice"),
        (b"GLM_SLOT=4", "GLM_SLOT is no setting; GLM_SLOTS is"),
        (b"GLM_SLOTS=four", "whole number"),
        (b"GLM_SLOTS=-1", "whole number"),
        ("GLM_SLOTS=٤".encode(), "whole number"),
        (b"GLM_CONTEXT=0", "from 256 to 51904512"),
        (b"GLM_CONTEXT=51904513", "from 256 to 51904512"),
        (b"GLM_TINY_PORT=0", "from 1024 to 65535"),
        (b"GLM_TINY_PORT=70000", "from 1024 to 65535"),
        (b"GLM_BIND=everywhere", "IPv4"),
        (b"GLM_GATEWAY=yes", "from 0 to 1"),
        (b"GLM_HOSTS=a,b", "host names"),
        (b"GLM_LOAD_MODE=fast", "one of auto"),
        (b"GLM_MEMORY=lots", "a size"),
        (b"GLM_GPU = 0", "NAME=value"),
        (b"GLM_GPU=$HOME", "NAME=value"),
        (b"GLM_GPU='0", "NAME=value"),
        (b"GLM_GPU=\xff", "utf-8"),
    ],
)
def test_bad_line_of_env_is_refused_with_its_number(folder: Path, line: bytes, reason: str) -> None:
    before = (folder / ".env").read_bytes().count(b"\n")

    with pytest.raises(
        StackError, match=rf"\.env, line {before + line.count(b'%c' % 10) + 1}: "
    ) as caught:
        config.load(add(folder, line))

    assert reason in caught.value.cause
    assert caught.value.code == Code.USAGE


@pytest.mark.parametrize(
    "line",
    [b"GLM_GPU=1", b"GLM_GPU='1'", b'GLM_GPU="1"', b"GLM_GPU=1\r", b"# note\n\nGLM_GPU=1  "],
    ids=["plain", "single", "double", "crlf", "comment"],
)
def test_good_line_of_env_is_taken(folder: Path, line: bytes) -> None:
    project = config.load(add(folder, line))

    assert project.service("q4").gpus == ("1",)


def test_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"\xef\xbb\xbfGLM_GPU=1\n")

    assert config.read_env(tmp_path / ".env", known=KNOWN) == {"GLM_GPU": "1"}


def test_env_file_wins_over_an_exported_setting_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GLM_SLOTS", "9")

    project = config.load(add(folder, b"GLM_SLOTS=3"))

    assert project.service("q4").slots == 3
    assert "GLM_SLOTS" in caplog.text


def test_bad_exported_setting_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLM_SLOTS", "many")

    with pytest.raises(StackError, match="environment: GLM_SLOTS"):
        config.load(folder)


def test_broken_compose_file_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "compose.yaml").write_text("services: [\n")

    with pytest.raises(StackError, match=r"compose\.yaml cannot be read.*line 2") as caught:
        config.load(tmp_path)

    assert caught.value.code == Code.USAGE


def test_missing_compose_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"compose\.yaml cannot be read") as caught:
        config.load(tmp_path)

    assert caught.value.code == Code.USAGE


def test_missing_key_of_compose_is_named(tmp_path: Path) -> None:
    (tmp_path / "compose.yaml").write_text("name: x\nsecrets: {}\nx-engine: {repository: r}\n")

    with pytest.raises(StackError, match="'commit'"):
        config.load(tmp_path)


def test_env_example_shows_each_setting_with_its_default() -> None:
    text = "".join((workspace.ROOT / name).read_text() for name in ("compose.yaml", config.GATEWAY))
    defaults = {"GLM_GATEWAY": "0"} | {
        match["name"]: match["default"] or ""
        for match in config.VARIABLE.finditer(text)
        if match["name"] and match["name"] not in config.INTERNAL
    }
    lines = (workspace.ROOT / ".env.example").read_text().splitlines()
    shown = dict(line.removeprefix("#").split("=", 1) for line in lines if line.startswith("#GLM_"))

    assert shown == defaults


def record(root: Path, **changed: object) -> None:
    pin = config.pinned(root)
    moved = {"pin": pin.commit, "current": {"commit": "folderabc", "build": 12345}} | changed
    host.write_atomic(root / config.ENGINE_RECORD, json.dumps(moved))


def test_engine_is_the_one_that_an_update_made_current(tmp_path: Path) -> None:
    root = workspace.make(tmp_path)
    record(root)

    project = config.load(root)

    assert (project.engine.commit, project.engine.build) == ("folderabc", 12345)
    assert project.service("q4").build_args["ENGINE_COMMIT"] == "folderabc"
    assert config.pinned(root).commit != "folderabc"


def test_moved_pin_wins_over_an_earlier_update(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = workspace.make(tmp_path)
    record(root, pin="an earlier one")

    assert config.load(root).engine == config.pinned(root)
    assert "the pin counts" in caplog.text


def test_every_quant_has_a_gateway_on_its_port() -> None:
    """Read as text: no YAML library knows the tags that take the servers' own ports away."""
    overlay = (workspace.ROOT / config.GATEWAY).read_text()
    ports = (workspace.ROOT / "compose.yaml").read_text().split("\nservices:")[1]

    for quant in config.load(workspace.ROOT).services:
        _, own, before = overlay.partition(f"\n  glm-{quant}:\n")
        server, _, gateway = before.partition(f"\n  gateway-{quant}:\n")
        (published,) = re.findall(rf"ports: .*GLM_{quant.upper()}_PORT.*", ports)
        assert own
        assert "ports: !reset []" in server
        assert published in gateway


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"GLM_GATEWAY=2", "from 0 to 1"),
        (b"GLM_QUEUE=-1", "whole number"),
        (b"GLM_RATE=0", "from 1"),
        (b"GLM_HOSTS=a,b", "host names"),
        (b"GLM_HOSTS='a  b'", "host names"),
    ],
)
def test_bad_setting_of_the_gateway_is_refused(folder: Path, line: bytes, reason: str) -> None:
    with pytest.raises(StackError, match=reason):
        config.load(add(folder, line))


def test_service_as_started_has_what_its_server_was_given() -> None:
    service = config.load(workspace.ROOT).service("q4")
    given = {"LLAMA_ARG_N_PARALLEL": "7", "LLAMA_ARG_PORT": "1", "LLAMA_ARG_MODEL": "/a/b.gguf"}

    found = service.as_started(given)

    assert (found.slots, found.chosen) == (7, {"GLM_SLOTS": "7"})
    changed = {"LLAMA_ARG_N_PARALLEL": "7", "LLAMA_ARG_MODEL": "/app/models/b.gguf"}
    assert found.environment == {**service.environment, **changed}
    assert found.model.path == Path("/app/models/b.gguf")


def test_changed_project_can_be_varied_like_one_that_was_read() -> None:
    project = config.changed(config.load(workspace.ROOT), GLM_Q4_PORT="12000")

    assert project.service("q4").settable == config.load(workspace.ROOT).service("q4").settable


def test_private_caches_divide_the_context() -> None:
    service = config.load(workspace.ROOT).service("q4")

    private = service.choosing({"GLM_SHARED_CACHE": "0", "GLM_CONTEXT": "1024", "GLM_SLOTS": "4"})

    assert (private.private, private.cells, private.context) == (True, 1024, 256)
