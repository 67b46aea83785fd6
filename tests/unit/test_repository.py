"""What the checked-in files promise one another."""

import ast
import hashlib
import re
import sys
from pathlib import Path

import pytest
import yaml

from stack import config, host
from tests.workspace import ROOT

STACK = sorted((ROOT / "stack").glob("*.py"))
SIBLINGS = {"compose", "native", "client", "gpu", "hub", "models", "engine", "plan"}


def imports(path: Path) -> set[str]:
    """Return the modules of `stack` that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "stack":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stack."):
            found.add(str(node.module).removeprefix("stack."))
    return found


@pytest.mark.parametrize("name", sorted(SIBLINGS))
def test_siblings_do_not_import_one_another(name: str) -> None:
    assert not imports(ROOT / "stack" / f"{name}.py") & SIBLINGS


@pytest.mark.parametrize("path", STACK, ids=lambda path: path.stem)
def test_library_does_not_print(path: Path) -> None:
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))

    assert "print" not in {getattr(call.func, "id", "") for call in calls}


def test_one_module_has_a_docker_command_line() -> None:
    pattern = re.compile(r"""["']docker["'], """)

    assert [path.stem for path in STACK if pattern.search(path.read_text())] == ["compose"]


def test_one_module_starts_processes() -> None:
    assert [path.stem for path in STACK if "import subprocess" in path.read_text()] == ["host"]


def test_the_commit_stands_twice_in_compose_and_is_the_same() -> None:
    raw = config.interpolate(yaml.safe_load((ROOT / "compose.yaml").read_text()), {})

    context = raw["x-server"]["build"]["additional_contexts"]["engine"]
    assert context.endswith(f"#{raw['x-engine']['commit']}")


def test_patches_are_those_that_compose_yaml_names() -> None:
    patches = sorted((ROOT / "docker" / "patches").iterdir())
    digest = hashlib.sha256(b"".join(patch.read_bytes() for patch in patches)).hexdigest()

    assert digest.startswith(config.load(ROOT).engine.patches)


def test_packages_of_the_container_are_those_of_the_lock(tmp_path: Path) -> None:
    """The second line of the file is the command that made it."""
    pinned = (ROOT / "docker" / "models.txt").read_text()
    command = pinned.splitlines()[1].lstrip("# ").split()
    done = host.run([*command[:-1], tmp_path / "models.txt"], cwd=ROOT)

    assert done.status == 0, done.stderr
    again = (tmp_path / "models.txt").read_text()
    assert again.splitlines()[2:] == pinned.splitlines()[2:]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/operate.md"])
def test_documents_name_tasks_and_sessions_that_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    tasks = {
        name
        for module in (ROOT / "verbs").glob("*.py")
        for name in re.findall(r"@task\ndef (\w+)", module.read_text())
    }
    sessions = set(re.findall(r"@nox\.session.*\ndef (\w+)", (ROOT / "noxfile.py").read_text()))

    assert set(re.findall(r"invoke (?!-)(\w+)", text)) <= tasks
    assert {
        name for names in re.findall(r"nox -s ((?:\w+ ?)+)", text) for name in names.split()
    } <= sessions


def test_every_check_has_a_session() -> None:
    noxfile = (ROOT / "noxfile.py").read_text()
    checks = {path.name for path in (ROOT / "tests" / "checks").glob("test_*.py")}

    assert checks == set(re.findall(r"tests/checks/(test_\w+\.py)", noxfile))


def test_session_of_an_unknown_quant_names_the_known_ones() -> None:
    done = host.run([sys.executable, "-m", "pytest", "tests/checks", "--quant=q9"], cwd=ROOT)

    assert done.status == pytest.ExitCode.USAGE_ERROR
    assert "Known quants: q4, q8, tiny." in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"), [([], "bench-against COMMIT"), (["0"], "reference")]
)
def test_benchmark_against_nothing_is_refused(arguments: list[str], says: str) -> None:
    done = host.run([ROOT / "scripts" / "bench-against", *arguments])

    assert done.status
    assert says in done.stderr
    assert "Traceback" not in done.stderr
