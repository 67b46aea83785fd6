"""A user's configuration file survives a merge whole, or is refused and untouched."""

import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stack import client, config, opencode
from stack.errors import Code, StackError
from stack.opencode import merge, provider
from stack.server import Server
from tests import workspace

OURS = {
    "$schema": opencode.SCHEMA,
    "provider": {
        "glm-q4": {
            "npm": opencode.PACKAGE,
            "options": {"baseURL": "http://hordak:11346/v1", "apiKey": "{env:GLM_API_KEY}"},
            "models": {"glm": {"limit": {"context": 8192, "output": 2048}}},
        }
    },
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "opencode.json"


def test_missing_file_is_made_with_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "new" / "opencode.json"

    assert merge(file, OURS) == opencode.Merged(changed=True)
    assert json.loads(file.read_text()) == OURS
    assert file.stat().st_mode & 0o777 == 0o600


def test_second_merge_changes_nothing(file: Path) -> None:
    merge(file, OURS)
    before = file.stat()

    assert merge(file, OURS) == opencode.Merged(changed=False)
    assert file.stat() == before
    assert [*file.parent.iterdir()] == [file]


def test_former_file_is_kept_with_its_mode(file: Path) -> None:
    file.write_text('{"theme":"ü"}')
    file.chmod(0o640)

    done = merge(file, OURS)

    assert done.backup
    assert done.backup.read_text() == '{"theme":"ü"}'
    assert {each.stat().st_mode & 0o777 for each in (file, done.backup)} == {0o640}
    assert json.loads(file.read_text()) == {"theme": "ü"} | OURS


def test_what_we_do_not_know_of_stays(file: Path) -> None:
    theirs = {
        "model": "other/x",
        "provider": {
            "other": {"npm": "@ai-sdk/anthropic"},
            "glm-q4": {
                "options": {"timeout": 600000, "apiKey": "a-key-in-the-clear"},
                "models": {"glm": {"name": "mine", "limit": {"context": 1}}, "old": {}},
            },
        },
    }
    file.write_text(json.dumps(theirs))

    merge(file, OURS)

    merged = json.loads(file.read_text())
    ours = merged["provider"]["glm-q4"]
    assert merged["model"] == "other/x"
    assert merged["provider"]["other"] == {"npm": "@ai-sdk/anthropic"}
    assert ours["options"] == OURS["provider"]["glm-q4"]["options"] | {"timeout": 600000}  # type: ignore[index]
    assert ours["models"]["glm"] == {"name": "mine", "limit": {"context": 8192, "output": 2048}}
    assert "old" in ours["models"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"theme": "x"} // mine', "comments"),
        ('{/* mine */ "theme": "x"}', "comments"),
        ('{"theme": "http://x",}', "not plain JSON (line 1)"),
        ('{"theme": "x"', "not plain JSON"),
        (" ", "not plain JSON"),
        ('\ufeff{"theme": "x"}', "not plain JSON"),
        ("[" * 100_000, "not plain JSON"),
        ('{"theme": NaN}', "NaN is no JSON"),
        ('{"theme": 1e999}', "not plain JSON"),
        ('{"theme": "x", "theme": "y"}', "a key stands twice"),
        ('{"theme": "\\ud800"}', "half a character"),
        ("[]", "holds no object"),
        ('{"name": "x", "dependencies": {}}', "no configuration of OpenCode's: it has name"),
        ('{"$schema": "https://json.schemastore.org/package"}', "another schema"),
        ('{"provider": []}', "no object in provider"),
        ('{"provider": {"glm-q4": null}}', "no object in provider.glm-q4"),
        ('{"provider": {"glm-q4": {"models": []}}}', "no object in provider.glm-q4.models"),
        ('{"provider": {"glm-q4": {"npm": "@ai-sdk/openai"}}}', "another package"),
    ],
)
def test_file_that_would_be_damaged_is_refused(file: Path, text: str, reason: str) -> None:
    file.write_text(text)
    assert_refused(file, reason)
    assert file.read_text() == text


def test_file_in_another_encoding_is_refused(file: Path) -> None:
    file.write_bytes('{"theme": "ü"}'.encode("latin-1"))
    assert_refused(file, "not UTF-8")


def make_link(file: Path) -> None:
    target = file.with_name("target")
    target.write_text("{}")
    file.symlink_to(target.name)


def make_second_name(file: Path) -> None:
    file.write_text("{}")
    file.with_name("second").hardlink_to(file)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_link, "is a link to target"),
        (make_second_name, "several names"),
        (Path.mkdir, "no plain file"),
        (os.mkfifo, "no plain file"),
    ],
    ids=["link", "hard-link", "folder", "pipe"],
)
def test_what_is_no_plain_file_is_refused(
    file: Path, make: Callable[[Path], object], reason: str
) -> None:
    make(file)
    before = sorted(file.parent.iterdir())

    assert_refused(file, reason)
    assert sorted(file.parent.iterdir()) == before
    assert not file.is_symlink() or file.with_name("target").read_text() == "{}"


def assert_refused(file: Path, reason: str) -> None:
    with pytest.raises(StackError) as caught:
        merge(file, OURS)

    assert reason in caught.value.cause
    assert caught.value.code == Code.USAGE


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)
DOCUMENTS = st.dictionaries(
    st.sampled_from(("provider", "theme", "model")) | st.text(), VALUES, max_size=5
)


@given(document=DOCUMENTS)
def test_any_file_keeps_all_that_it_said_or_is_untouched(
    document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("any") / "opencode.json"
    text = json.dumps(document)
    file.write_text(text)
    try:
        merge(file, OURS)
    except StackError:
        assert file.read_text() == text
        return
    merged = json.loads(file.read_text())
    others = {key: value for key, value in document.items() if key not in OURS}
    assert {key: merged[key] for key in others} == others
    assert merged["provider"]["glm-q4"] == OURS["provider"]["glm-q4"]  # type: ignore[index]


@pytest.fixture
def server(tmp_path: Path) -> Server:
    service = config.load(workspace.make(tmp_path)).service("q4")
    return Server(runtime="attached", service=service, url="http://hordak:11346", key="k")


@pytest.mark.parametrize(
    ("context", "most", "output"),
    [(202752, -1, 32000), (8192, -1, 2048), (202752, 4096, 4096)],
    ids=["whole", "tiny", "limited-by-the-server"],
)
def test_limits_are_the_servers(
    server: Server, monkeypatch: pytest.MonkeyPatch, context: int, most: int, output: int
) -> None:
    told = {"n_ctx": context, "params": {"n_predict": most}}
    answers: Mapping[str, Any] = {"default_generation_settings": told, "data": [{"id": "glm"}]}
    monkeypatch.setattr(client, "_get", lambda *_: answers)

    made = provider(server, key="{env:GLM_API_KEY}")

    assert made["provider"]["glm-q4"]["models"]["glm"]["limit"] == {
        "context": context,
        "output": output,
    }


@pytest.mark.parametrize("text", ["one\ntwo\n", "# mine\none\n", ""])
def test_key_file_with_more_than_the_key_is_no_reference(server: Server, text: str) -> None:
    path = server.service.key_file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)

    with pytest.raises(StackError, match="does not hold just that"):
        opencode.key_by_file(path)


@pytest.mark.parametrize("host", ["", "a b", "http://hordak", "hordak:11346", "user@hordak", "::g"])
def test_what_is_no_host_is_refused(server: Server, host: str) -> None:
    with pytest.raises(StackError, match="neither a host name nor an address"):
        opencode.at(host, 1, server.service, key="k")


@pytest.mark.parametrize("certificate", [None, Path("tls.pem")])
def test_gateway_with_a_certificate_is_reached_by_https(
    server: Server, certificate: Path | None
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        found = opencode.at("localhost", port, server.service, key="k", certificate=certificate)

    assert found.url == f"{'https' if certificate else 'http'}://localhost:{port}"
    assert found.certificate == certificate
