"""A coding agent reaches the server with what we print for it: OpenCode itself, and its parts.

OpenCode and its client package come from npm, by the lock in `opencode/`.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.answers import body_of, question_set
from bench.questions import TOOLS, Dialogue
from stack import host
from stack.config import Project
from stack.errors import Code
from stack.server import Server
from tests import workspace
from tests.checks.conftest import Target

HERE = Path(__file__).parent / "opencode"
LIMIT_S = 120


def invoke(project: Project, *arguments: str, **env: str) -> host.Result:
    with workspace.invoke(project.root, *arguments, env={**os.environ, **env}) as process:
        out, err = process.communicate(timeout=LIMIT_S)
        return host.Result(process.returncode, out, err)


@pytest.fixture(scope="session")
def configuration(project: Project, server: Server, target: Target) -> str:
    """What `invoke opencode` prints for the running server."""
    if target.runtime == "attached":
        pytest.skip("an attached server is none of this folder's")
    done = invoke(project, "opencode", "--quant", server.service.quant)
    assert done.status == 0, done
    assert server.key not in done.stdout
    return done.stdout


@pytest.fixture
def printed(configuration: str, tmp_path: Path) -> Path:
    """It as a file, in a folder of its own."""
    path = tmp_path / "opencode.json"
    path.write_text(configuration)
    return path


@pytest.fixture(scope="session")
def packages(project: Project) -> Path:
    """The folder of OpenCode and its client package, by the lock's hashes."""
    folder = project.cache / "opencode"
    folder.mkdir(parents=True, exist_ok=True)
    lock = HERE / "package-lock.json"
    done = folder / "done"
    if done.exists() and done.read_text() == lock.read_text():
        return folder
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / name, folder)
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    said = host.run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=folder)
    if said.status:
        pytest.skip(f"npm cannot install OpenCode: {host.reason(said)}")
    host.write_atomic(done, lock.read_text())
    return folder


@pytest.fixture
def trained(server: Server) -> Server:
    if server.service.model.repository:
        pytest.skip(f"{server.service.name} has no record of right answers")
    return server


def opencode(packages: Path, configuration: Path, *arguments: str) -> host.Result:
    """Run OpenCode in the configuration's folder, with a home of its own and no other network."""
    program = packages / "node_modules" / "opencode-linux-x64-baseline" / "bin" / "opencode"
    own = {name: str(configuration.parent / name) for name in ("HOME", "XDG_CONFIG_HOME")}
    quiet = {"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1"}
    foreign = ("OPENCODE", "XDG_", "GLM_", "PWD")  # the last wins over the real one
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    return host.run(
        [program, *arguments],
        cwd=configuration.parent,
        env=inherited | own | quiet,
        timeout_s=LIMIT_S,
    )


def provider(configuration: Path) -> tuple[str, dict[str, Any]]:
    ((name, each),) = json.loads(configuration.read_text())["provider"].items()
    return name, each


def test_opencode_understands_every_word(printed: Path, packages: Path) -> None:
    done = opencode(packages, printed, "debug", "config")

    assert done.status == 0, done
    expected = json.loads(printed.read_text())["provider"]
    understood = json.loads(done.stdout)["provider"]
    for each in (*expected.values(), *understood.values()):
        assert each["options"].pop("apiKey")
    assert understood == expected


def test_opencode_refuses_a_wrong_one(printed: Path, packages: Path) -> None:
    """What the test above would say of a configuration that OpenCode does not take."""
    printed.write_text(printed.read_text().replace('"output": ', '"output": "", "out": '))

    done = opencode(packages, printed, "debug", "config")

    assert done.status != 0
    assert "limit.output" in done.stdout + done.stderr


def test_opencode_gets_an_answer(printed: Path, packages: Path, server: Server) -> None:
    """An agent without tools, since OpenCode's own prompt fills tiny's whole context."""
    document = json.loads(printed.read_text())
    document["agent"] = {"plain": {"mode": "primary", "prompt": "Hi", "tools": {"*": False}}}
    printed.write_text(json.dumps(document))
    name, each = provider(printed)
    (model,) = each["models"]

    run = ("run", "--title", "t", "--agent", "plain", "--format", "json")
    done = opencode(packages, printed, *run, "--model", f"{name}/{model}", "hello")

    assert done.status == 0, done
    events = [json.loads(line) for line in done.stdout.splitlines()]
    finished = next(each["part"] for each in events if each["type"] == "step_finish")
    assert finished["tokens"]["output"] > 0, events
    assert finished["reason"] in {"stop", "length"}
    assert server.ended() is None


def questions() -> list[Dialogue]:
    """Ask for a tool's call, once for each tool."""
    drawn = (each for each in question_set({"tool": 60}, seed=7) if each.answer.call)
    return [*{each.answer.call[0]: each for each in drawn if each.answer.call}.values()]


@pytest.mark.parametrize("question", questions(), ids=lambda q: str(q.answer.call[0]))
def test_tool_call_and_its_result_through_the_client_package(
    printed: Path, packages: Path, trained: Server, question: Dialogue
) -> None:
    assert question.answer.call
    name, arguments = question.answer.call
    result = TOOLS[name][2][0]

    node = ("node", HERE / "tool_call.mjs", packages, printed)
    done = host.run([*node, json.dumps(body_of(question)), result], timeout_s=LIMIT_S)

    assert done.status == 0, done
    said = json.loads(done.stdout)
    assert said["call"] == [name, arguments], trained.service.name
    assert result in said["text"]


def ask(options: Mapping[str, str], body: Mapping[str, object], **env: str) -> httpx.Response:
    """Ask as OpenCode would with these options, and nothing but them."""
    kind, _, where = options["apiKey"].strip("{}").partition(":")
    key = env[where] if kind == "env" else Path(where).read_text().strip()
    with httpx.Client(trust_env=False, timeout=LIMIT_S) as session:
        return session.post(
            f"{options['baseURL']}/chat/completions",
            headers={"Authorization": f"Bearer {key}"},
            json=body,
        )


def test_tool_call_by_plain_http(printed: Path, trained: Server) -> None:
    name, each = provider(printed)
    (model,) = each["models"]
    question = questions()[0]

    answer = ask(each["options"], {**body_of(question), "model": model})

    assert answer.status_code == 200, (name, answer.text, trained.service.name)
    (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
    function = call["function"]
    assert (function["name"], json.loads(function["arguments"])) == question.answer.call


def test_configuration_for_another_machine(
    project: Project, server: Server, printed: Path, tmp_path: Path
) -> None:
    quant = server.service.quant
    path = tmp_path / "other.json"
    arguments = ("--quant", quant, "--host", "localhost", "--write", str(path))

    done = invoke(project, "opencode", *arguments)

    assert done.status == 0, done
    assert server.key not in path.read_text() + done.stdout + done.stderr
    _, each = provider(path)
    here = provider(printed)[1]["options"]["baseURL"]
    assert each["options"]["baseURL"] == here.replace("127.0.0.1", "localhost")
    assert ask(each["options"], {"messages": []}, GLM_API_KEY="wrong").status_code == 401
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    assert ask(each["options"], body, GLM_API_KEY=server.key).status_code == 200


@pytest.mark.parametrize(
    ("name", "code"),
    [("nowhere.invalid", Code.PORT), ("127.9.9.9", Code.PORT), ("http://x/", Code.USAGE)],
)
def test_host_where_no_server_answers(
    project: Project, server: Server, name: str, code: Code
) -> None:
    done = invoke(project, "opencode", "--quant", server.service.quant, "--host", name)

    assert done.status == code, done
    assert len(done.stderr.splitlines()) == 2


def test_wrong_key_is_told(project: Project, server: Server) -> None:
    where = ("--quant", server.service.quant, "--host", "localhost")
    done = invoke(project, "opencode", *where, GLM_API_KEY="wrong")

    assert done.status == Code.VERIFY, done
    assert "refuses the key" in done.stderr


def test_write_refuses_what_it_would_damage(
    project: Project, server: Server, tmp_path: Path
) -> None:
    path = tmp_path / "opencode.json"
    text = '{\n  // mine\n  "theme": "dark"\n}\n'
    path.write_text(text)

    done = invoke(project, "opencode", "--quant", server.service.quant, "--write", str(path))

    assert done.status == Code.USAGE, done
    assert "comments, which would be lost" in done.stderr
    assert path.read_text() == text
    assert [*tmp_path.iterdir()] == [path]
