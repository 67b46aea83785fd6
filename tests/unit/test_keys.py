import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stack import config, keys
from stack.config import Service
from stack.errors import Code, StackError
from tests import workspace


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return config.load(workspace.make(tmp_path)).service("tiny")


def write(service: Service, content: bytes, mode: int = 0o644) -> None:
    service.key_file.parent.mkdir()
    service.key_file.write_bytes(content)
    service.key_file.chmod(mode)


def test_made_key_is_32_random_bytes_for_the_servers_user_alone(service: Service) -> None:
    path = keys.make(service)

    assert len(bytes.fromhex(keys.read(service))) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_uid == service.uid


def test_made_key_is_kept(service: Service) -> None:
    keys.make(service)
    first = keys.read(service)

    keys.make(service)

    assert keys.read(service) == first


def test_first_of_several_keys_is_ours(service: Service) -> None:
    write(service, b"# rotated in May\nnew\nold\n")

    assert keys.read(service) == "new"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no authentication"),
        (b"\n\n", "no authentication"),
        (b"# only a comment\n", "no authentication"),
        (b"key\r\n", "carriage return"),
        (b"key \n", "blank"),
        (b"a key\n", "blank"),
        (b"a,b\n", "comma"),
        (b"good\nbad \n", "blank"),
        ("schlüssel\n".encode(), "ASCII"),
    ],
)
def test_unusable_key_is_refused(service: Service, content: bytes, reason: str) -> None:
    write(service, content)

    with pytest.raises(StackError, match=reason) as caught:
        keys.read(service)

    assert caught.value.code == Code.USAGE


def test_missing_key_is_refused(service: Service) -> None:
    with pytest.raises(StackError, match="No such file"):
        keys.read(service)


def test_key_that_the_server_cannot_read_is_refused_with_the_command(service: Service) -> None:
    write(service, b"key\n", mode=0o600)
    other = dataclasses.replace(service, uid=service.uid + 1)

    with pytest.raises(StackError, match=f"chown {other.uid}"):
        keys.read(other)


def test_first_start_on_loopback_makes_a_key(service: Service) -> None:
    assert keys.require(service, first_start=True) == keys.read(service)


def test_publishing_without_a_key_is_refused(service: Service) -> None:
    public = dataclasses.replace(service, bind="0.0.0.0")  # noqa: S104

    with pytest.raises(StackError, match="invoke key"):
        keys.require(public, first_start=True)


def test_configured_key_file_that_is_missing_is_refused(service: Service) -> None:
    with pytest.raises(StackError, match="no API key"):
        keys.require(service, first_start=False)


def test_new_key_comes_first_and_the_old_ones_stay_until_retired(service: Service) -> None:
    keys.make(service)
    old = keys.read(service)

    keys.rotate(service)

    new = keys.read(service)
    assert service.key_file.read_text() == f"{new}\n{old}\n"
    assert (new != old, len(bytes.fromhex(new))) == (True, 32)
    assert (keys.retire(service), keys.retire(service)) == (1, 0)
    assert service.key_file.read_text() == f"{new}\n"
    assert service.key_file.stat().st_mode & 0o777 == 0o600
    assert service.key_file.stat().st_uid == service.uid


def test_unusable_key_is_not_rotated(service: Service) -> None:
    write(service, b"key \n")

    with pytest.raises(StackError, match="has a blank"):
        keys.rotate(service)

    assert service.key_file.read_bytes() == b"key \n"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_text("none"), "no certificate with its private key"),
        (lambda path: path.chmod(0o600), "chown"),
    ],
    ids=["missing", "no-pem", "unreadable"],
)
def test_certificate_that_the_gateway_cannot_show_is_refused(
    service: Service, tmp_path: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    path = Path(
        shutil.copy(
            workspace.ROOT / "tests" / "unit" / "loopback.pem", tmp_path / "certificate.pem"
        )
    )
    path.chmod(0o644)
    keys.require_certificate(path, service)
    spoil(path)

    with pytest.raises(StackError) as caught:
        keys.require_certificate(path, dataclasses.replace(service, uid=12345))

    assert reason in str(caught.value)
    assert caught.value.code == Code.USAGE
