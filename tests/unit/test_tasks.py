import math
import time
from pathlib import Path

import pytest

from stack.errors import Code
from tests import workspace
from verbs.terminal import Shown, dump


@pytest.fixture
def shown() -> Shown:
    """What was heard of ten seconds ago, a tenth done."""
    return Shown(begun=time.monotonic() - 10, before=1_000_000_000)


def test_steps_are_shown_as_a_share(shown: Shown) -> None:
    assert shown.amount(5, 10) == "50 %"
    assert shown.left(5, 10) == ""


def test_bytes_are_shown_with_rate_and_total(shown: Shown) -> None:
    assert shown.amount(3_000_000_000, 10_000_000_000) == "30 %, 3.00 of 10.00 GB, 200 MB/s"


def test_bytes_are_shown_with_the_time_left(shown: Shown) -> None:
    assert shown.left(3_000_000_000, 21_000_000_000) == ", 1:30 left"


def test_what_began_anew_promises_no_time(shown: Shown) -> None:
    assert shown.left(0, 21_000_000_000) == ""


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("switch", "--to=tiny", "--drain=soon"), "--drain must be a whole number from 0 on"),
        (("ask", "hi", "--tokens=-1"), "--tokens must be a whole number from 0 on, not '-1'"),
        (("watch", "--once", "--interval=inf"), "--interval must be a number from 0 on"),
        (("update",), "--to is missing"),
        (("ask", "hi", "--quant=q4"), "q4 is not running."),
        (("switch", "--to=q4"), "Nothing runs."),
    ],
)
def test_what_a_command_line_lacks_or_mistypes_is_named(
    tmp_path: Path, arguments: tuple[str, ...], cause: str
) -> None:
    done = workspace.Deployment(workspace.make(tmp_path), "").invoke(
        *arguments, DOCKER_HOST="unix:///nonexistent"
    )

    assert (done.status, len(done.stderr.splitlines())) == (Code.USAGE, 2), done.stderr
    assert done.stderr.startswith(cause)


def test_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    folder = workspace.make(tmp_path)
    (folder / ".env").unlink()
    (folder / ".env").mkdir()
    done = workspace.Deployment(folder, "").invoke("plan")

    assert (done.status, len(done.stderr.splitlines())) == (Code.HOST, 2), done.stderr
    assert f"{folder / '.env'} cannot be used: Is a directory." in done.stderr


def test_what_a_terminal_cannot_show_is_replaced(tmp_path: Path) -> None:
    done = workspace.Deployment(workspace.make(tmp_path), "").invoke(
        "doctor", "--quant=tiny", DOCKER_HOST="unix:///nonexistent", PYTHONIOENCODING="ascii"
    )

    assert done.stderr == ""
    assert "? Start it (`sudo systemctl start docker`)" in done.stdout


def test_json_has_no_number_that_json_lacks() -> None:
    assert dump([{"high": math.inf, "value": math.nan, "low": 0.5}]) == (
        '[\n {\n  "high": null,\n  "value": null,\n  "low": 0.5\n }\n]'
    )
