"""What is given to others works and tells no secret: to OpenCode, to a helper, to the next owner.

OpenCode and its client package come from npm, by the lock in `opencode/`.
"""

import json
import os
import re
import secrets
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.answers import body_of, question_set
from bench.questions import TOOLS, Dialogue
from stack import client, config, host, keys, runtime
from stack.compose import Docker, NoEngineError
from stack.config import Project
from stack.errors import Code
from stack.server import Server
from tests import workspace
from tests.checks.conftest import IDLE, RUNTIMES, Broken, Notice, Target, skip_unasked

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


def test_configuration_with_a_wrong_word_is_noticed(printed: Path, notice: Notice) -> None:
    printed.write_text(printed.read_text().replace('"output": ', '"output": "", "out": '))

    notice(
        test_opencode_understands_every_word,
        "a configuration with a wrong word",
        says="limit.output",
        printed=printed,
    )


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


SECRET = "canary" + secrets.token_hex(8)


@pytest.fixture(params=RUNTIMES)
def own(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Project, str]]:
    """A deployment of its own, in a home of its own; the runtime's name."""
    skip_unasked(request, request.param)
    home = tmp_path / "home" / f"home-of-{SECRET}"
    root = home / "deployment"
    root.mkdir(parents=True)
    settings = {"GLM_TINY_PORT": str(workspace.free_port()), "GLM_MODELS": str(home / "models")}
    project = config.load(workspace.make(root, **settings))
    (home / "models").mkdir()
    shutil.copy(workspace.ROOT / "models" / "tiny.gguf", home / "models")
    try:
        chosen = runtime.choose(project, want=request.param)
    except NoEngineError as error:
        pytest.skip(error.cause)
    service = project.service("tiny")
    runtime.ensure_engine(chosen, project, service)
    yield project, request.param
    chosen.stop(service)


def test_report_tells_the_fault_and_no_secret(own: tuple[Project, str], tmp_path: Path) -> None:
    """A canary in each input: keys, token, home, proxy, requests, records."""
    project, where = own
    service = project.service("tiny")
    keys.make(service).write_text(f"key-{SECRET}\nsecond-{SECRET}\n")
    home = str(project.root.parent)
    env = {"HOME": home, "HF_TOKEN": f"hf_{SECRET}", "HTTPS_PROXY": f"http://me:{SECRET}@proxy"}
    assert invoke(project, "up", f"--{where}", **env).status == 0
    server = runtime.running(project, "tiny")
    provoke(server)
    record = {"prompt": SECRET, "messages": [{"content": f"a {SECRET}"}], "rate": 17.5}
    host.write_atomic(project.state / "loadtest" / "record.json", json.dumps(record))
    header = f"<log>Authorization: Bearer {SECRET}\nHF_TOKEN={SECRET} /home/{SECRET}/x</log>"
    host.write_atomic(project.state / "checks" / "load.xml", header)
    assert SECRET in server.logs(2000)

    done = invoke(project, "report", **env)

    assert done.status == 0, done
    path = Path(done.stdout.split(" holds:")[0])
    assert path.stat().st_mode & 0o777 == 0o600
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "out", filter="data")
    files = {
        file.relative_to(tmp_path / "out").as_posix().partition("/")[2]: file.read_text()
        for file in (tmp_path / "out").rglob("*")
        if file.is_file()
    }
    leaks = {name for name, text in files.items() if SECRET in name + text}
    assert not leaks, {name: re.findall(f".*{SECRET}.*", files[name]) for name in leaks}
    log = files[f"{where}-glm-tiny.log"]
    assert "model loaded" in log
    assert "got exception" in log
    assert json.loads(files["versions.json"])["engine"]["commit"] == project.engine.commit
    assert json.loads(files["configuration.json"])["settings"]["GLM_MODELS"] == "~/models"
    assert json.loads(files["evidence/loadtest/record.json"])["rate"] == 17.5
    assert "evidence/checks/load.xml" in files
    states = {each["quant"]: each["state"] for each in json.loads(files["status.json"])}
    assert states["tiny"] == "ready"
    inspect = json.loads(files.get("docker-glm-tiny.inspect.json", "{}"))
    assert (where == "docker") == bool(inspect.get("container", {}).get("Image"))


def test_report_that_takes_nothing_out_is_noticed(own: tuple[Project, str], notice: Notice) -> None:
    project, where = own
    if where == "docker":
        pytest.skip("shown natively")
    start = '"""Return the text without them."""\n'
    workspace.change(project.root, "stack/bundle.py", start, f"{start}        return text\n")

    notice(
        test_report_tells_the_fault_and_no_secret,
        "a report that takes no key out",
        says="canary",
        own=own,
    )


def provoke(server: Server) -> None:
    """Send requests that the engine refuses with their own words in its log, and a good one."""
    refused = (
        f'{{"messages": [{{"role": "user", "content": "{SECRET}"}}] x',
        json.dumps({"messages": [], "grammar": f"root ::= \n%% {SECRET}"}),
        json.dumps({"messages": [], "json_schema": {"type": SECRET}}),
        json.dumps({"prompt": {SECRET: SECRET}}),
    )
    with client.session(server) as session:
        for body in refused:
            for route in ("/v1/chat/completions", "/completion"):
                assert session.post(route, content=body).status_code >= 400
    for _ in client.stream(server, f"Repeat: {SECRET}", tokens=64):
        pass


@pytest.mark.row(
    "S11",
    "`clean` while it serves, and of a folder that is a link or holds what is not ours",
    "refused; lists, then removes what is ours alone",
)
def test_clean_lists_then_removes_its_own(own: tuple[Project, str]) -> None:
    project, where = own
    assert invoke(project, "up", f"--{where}").status == 0
    running = invoke(project, "clean", "--yes")
    assert running.status == Code.USAGE, running
    assert invoke(project, "down").status == 0
    cache = project.root / ".cache"
    linked = invoke(project, "clean", "--yes")
    assert linked.status == Code.USAGE, linked
    assert "is a link" in linked.stderr
    cache.unlink()
    cache.mkdir()
    (cache / "theirs").write_text("precious")
    strange = invoke(project, "clean", "--yes")
    assert strange.status == Code.USAGE, strange
    assert "somebody else's" in strange.stderr
    assert (cache / "theirs").read_text() == "precious"
    assert service_key(project).exists()
    (cache / "theirs").unlink()
    host.own_folder(cache)
    (cache / "link").symlink_to(project.root / "stack")
    name = f"image: {project.name}:"
    workspace.change(project.root, "compose.yaml", "image: glm-server:", name)
    image = config.load(project.root).service("tiny").image
    assert image == f"{project.name}:cpu"
    foreign = f"{project.name}-foreign:cpu"
    docker = Docker(project)
    if where == "docker":
        docker.client.images.get("glm-server:cpu").tag(image)
        docker.client.images.get("glm-server:cpu").tag(foreign)

    listed = invoke(project, "clean")
    assert listed.status == 0, listed
    assert service_key(project).exists()
    assert "glm-server" not in listed.stdout
    done = invoke(project, "clean", "--yes")

    assert done.status == 0, done
    assert not cache.exists()
    assert not project.state.exists()
    assert (workspace.ROOT / "stack" / "host.py").exists()
    assert (project.root.parent / "models" / "tiny.gguf").exists()
    if where == "docker":
        assert image in listed.stdout
        assert not docker.client.images.list(name=image)
        assert docker.client.images.list(name=foreign)
        docker.client.images.remove(foreign)
    again = invoke(project, "clean")
    assert again.stdout == "There is nothing.\n", again


def service_key(project: Project) -> Path:
    return project.service("tiny").key_file


UNLIKE: dict[Callable[..., None], Broken] = {
    **dict.fromkeys(
        (
            test_host_where_no_server_answers,
            test_wrong_key_is_told,
            test_write_refuses_what_it_would_damage,
            test_clean_lists_then_removes_its_own,
        ),
        IDLE,
    ),
    test_configuration_for_another_machine: (IDLE[0], IDLE[1] | {"says": "No such file"}),
}


@pytest.mark.parametrize("own", ["native"], indirect=True)
@pytest.mark.parametrize("check", UNLIKE, ids=lambda check: check.__name__)
@pytest.mark.usefixtures("natively", "own", "server")
def test_what_is_unlike_is_noticed(notice: Notice, check: Callable[..., None]) -> None:
    broken, how = UNLIKE[check]

    notice(check, broken, **how)


DEAF = (
    test_opencode_gets_an_answer,
    test_tool_call_and_its_result_through_the_client_package,
    test_tool_call_by_plain_http,
)


@pytest.mark.parametrize("check", DEAF, ids=lambda check: check.__name__)
def test_server_that_does_not_know_the_key_is_noticed(
    printed: Path, notice: Notice, check: Callable[..., None]
) -> None:
    document = json.loads(printed.read_text())
    ((_, each),) = document["provider"].items()
    wrong = printed.with_name("wrong-key")
    wrong.write_text("wrong\n")
    each["options"]["apiKey"] = f"{{file:{wrong}}}"
    printed.write_text(json.dumps(document))

    notice(check, "a configuration with another key", says="assert|401")
