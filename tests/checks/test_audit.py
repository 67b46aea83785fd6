"""Nothing that we ship or use has a known weakness that nobody has looked at."""

import datetime as dt
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stack import host
from tests import audit
from tests.audit import NoDataError, Weakness
from tests.checks.conftest import Notice
from tests.ledger import Ledger
from tests.workspace import ROOT

WEAK = "requests==2.19.0\n"  # CVE-2018-18074


def judged(found: list[Weakness]) -> list[str]:
    excepted = audit.exceptions(ROOT / "tests" / "advisories.yaml")
    return audit.judge(found, excepted, today=dt.datetime.now(dt.UTC).date())


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every Python package that uv.lock or the CUDA build may install."""
    folder = tmp_path_factory.mktemp("requirements")
    export = ["uv", "export", "--frozen", "--all-groups", "--no-emit-project", "--quiet"]
    done = host.run([*export, "--no-annotate", "--output-file", folder / "all.txt"], cwd=ROOT)
    assert done.status == 0, done.stderr
    return folder / "all.txt"


def weaknesses(requirements: Path) -> list[Weakness]:
    try:
        return audit.python(requirements)
    except NoDataError as error:
        pytest.skip(f"PyPI's advisories cannot be had here: {error}")


def test_python_packages_have_no_known_weakness(locked: Path) -> None:
    assert judged(weaknesses(locked)) == []


def test_cuda_packages_have_no_known_weakness() -> None:
    assert judged(weaknesses(ROOT / "docker" / "cuda-toolkit.txt")) == []


PYTHON = pytest.mark.parametrize(
    "check",
    [test_python_packages_have_no_known_weakness, test_cuda_packages_have_no_known_weakness],
    ids=lambda check: check.__name__,
)


@PYTHON
def test_a_weak_package_is_noticed(
    tmp_path: Path, notice: Notice, check: Callable[..., None]
) -> None:
    weak = tmp_path / "weak.txt"
    weak.write_text(WEAK)
    found = weaknesses(weak)

    notice(check, WEAK.strip(), says="requests", patch={f"{__name__}.weaknesses": lambda _: found})


@PYTHON
def test_weakness_that_nobody_excepted_is_noticed(
    notice: Notice, check: Callable[..., None]
) -> None:
    """Needs nobody's data: it is known."""
    known = Weakness("CVE-2018-18074", "requests", "2.19.0")

    patch = {f"{__name__}.weaknesses": lambda _: [known]}
    notice(check, f"{known.id} in {WEAK.strip()}", says=known.id, patch=patch)


def outdated(bill: str) -> list[Weakness]:
    try:
        return audit.debian(bill)
    except NoDataError as error:
        pytest.skip(f"Debian's archive cannot be asked from here: {error}")


def test_debian_packages_in_the_image_are_the_newest(bill: str) -> None:
    assert judged(outdated(bill)) == []


def test_an_old_debian_package_is_noticed(bill: str, ledger: Ledger) -> None:
    old = json.loads(bill)
    for each in old["components"]:
        if each["name"] == "libc6":
            each["version"] = "2.41-1"
    found = outdated(json.dumps(old))

    check = test_debian_packages_in_the_image_are_the_newest
    with ledger.catching(check, "libc6 of last year", says="libc6"):
        assert judged(found) == []
