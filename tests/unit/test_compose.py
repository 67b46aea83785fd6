"""Docker's refusals become a cause, a remedy and a code. The engine is real in the checks."""

import socket
from pathlib import Path

import pytest

from stack import config
from stack.compose import Docker, NoEngineError, failure
from stack.errors import Code, StackError
from stack.host import Result
from tests import workspace


@pytest.fixture
def docker(tmp_path: Path) -> Docker:
    return Docker(config.load(workspace.make(tmp_path)))


def test_forbidden_engine_is_told_from_an_absent_one(
    docker: Docker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    monkeypatch.setattr(socket.socket, "connect", refuse)

    with pytest.raises(StackError, match="may not talk to the Docker engine") as caught:
        docker.check()

    assert caught.value.code == Code.HOST
    assert not isinstance(caught.value, NoEngineError)


@pytest.mark.parametrize("there", [False, True], ids=["no-socket", "nobody-listens"])
def test_absent_engine_is_no_engine(
    docker: Docker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bool
) -> None:
    path = tmp_path / "docker.sock"
    if there:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")

    with pytest.raises(NoEngineError, match="No Docker engine answers"):
        docker.check()


@pytest.mark.parametrize(
    ("stderr", "code", "remedy"),
    [
        (
            'Error response from daemon: could not select device driver "nvidia"',
            Code.HOST,
            "nvidia-ctk",
        ),
        (
            "Error: Bind for 127.0.0.1:11346 failed: port is already allocated",
            Code.PORT,
            ".env",
        ),
        (
            "listen tcp4 10.9.9.9:80: bind: cannot assign requested address",
            Code.PORT,
            "GLM_BIND",
        ),
        ("write /var/lib/docker/x: no space left on device", Code.DISK, "docker system df"),
        ("unknown flag: --project-name\n\nUsage: docker", Code.HOST, "Compose plugin"),
        ("something else", Code.LOAD, "invoke doctor"),
        ("", Code.LOAD, "invoke doctor"),
    ],
    ids=["gpu", "port", "address", "disk", "plugin", "other", "silent"],
)
def test_failure_of_up_is_told_by_its_kind(stderr: str, code: Code, remedy: str) -> None:
    error = failure("up", Result(1, "", stderr))

    assert error.code == code
    assert remedy in error.remedy
    assert "\n" not in error.cause


def test_failure_of_build_is_a_failed_build() -> None:
    assert failure("build", Result(17, "", "")).code == Code.BUILD
