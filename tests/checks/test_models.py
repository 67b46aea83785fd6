"""Downloads meet the faults of hubs, networks and disks; what is not verified is never served.

Each test drives the command line in a deployment of its own, against a hub on loopback. Its `tiny`
has a repository, so that what was downloaded is really served.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE

from stack import config, host, integrity, models
from stack.compose import Docker, NoEngineError
from stack.errors import Code
from stack.native import Native
from stack.wait import wait_until
from tests import workspace
from tests.checks.conftest import IDLE, Broken, Notice
from tests.hub import ALWAYS, CDN, Fault, Hub
from tests.workspace import Started

FILE = "tiny.gguf"
LOCK = "models.lock"
OWN = {f".download/{name}" for name in (host.MARKER, "lock", "verified.json")}
TOKEN = "hf_that-nobody-may-see"
TAIL_BYTES = 32 << 20  # so that the file is several of the library's chunks long
NO_MORE: Mapping[str, str] = {}
PATIENCE_S = 60
BIG_BYTES = 1 << 29  # takes half a second to hash
MOMENTS = [random.Random(seed).random() for seed in range(20)]
GATING = b"deepseek2.expert_gating_func" + struct.pack("<I", 4)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 17\n" % 0
BAD: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda good: good[:-9] + bytes([good[-9] ^ 1]) + good[-8:],
    "short": lambda good: good[:-1000],
    "long": lambda good: good + b"x" * 1000,
    "empty": lambda _: b"",
    "page": lambda _: b"<!DOCTYPE html><title>Sign in to this network</title>",
    "pointer": lambda _: LFS,
    "truncated": lambda good: good[: -TAIL_BYTES - (1 << 20)],
    "hostile": lambda good: good[:16] + struct.pack("<Q", 1 << 63) + good[24:],
    "old": lambda good: good.replace(GATING + b"\2", GATING + b"\1"),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    models.write_random(folder / "good", recipe="tiny-q8_0", name="GLM-4.7-Flash tiny")
    good = (folder / "good").read_bytes() + hashlib.shake_128().digest(TAIL_BYTES)
    (folder / "good").write_bytes(good)
    for name, make in BAD.items():
        (folder / name).write_bytes(make(good))
    with Hub(folder) as hub:
        yield hub
    shutil.rmtree(folder)


@dataclass(frozen=True)
class Deployment:
    """A folder where `invoke` runs, and the hub that it downloads from."""

    folder: Path
    hub: Hub

    @property
    def models(self) -> Path:
        return self.folder / "models"

    @property
    def file(self) -> Path:
        return self.models / FILE

    def start(
        self, *arguments: str, by: tuple[str, ...] = (), env: Mapping[str, str] = NO_MORE
    ) -> Started:
        whole = self.hub.environment(self.folder) | {"HF_TOKEN": TOKEN, **env}
        return workspace.invoke(self.folder, *arguments, by=by, env=whole)

    def invoke(
        self, *arguments: str, by: tuple[str, ...] = (), env: Mapping[str, str] = NO_MORE
    ) -> host.Result:
        with self.start(*arguments, by=by, env=env) as process:
            return ended(process)

    def download(self, *arguments: str, env: Mapping[str, str] = NO_MORE) -> host.Result:
        return self.invoke("download", "--quant", "tiny", *arguments, env=env)

    def up(self, **env: str) -> host.Result:
        return self.invoke("up", "--quant", "tiny", "--native", env=env)

    def stop(self) -> None:
        project = config.load(self.folder)
        Native(project).stop(project.service("tiny"))

    def verified(self) -> list[str]:
        """Return the files that are called verified, after a look at each."""
        services = config.load(self.folder).services.values()
        names = [each.file for each in integrity.listing(services) if each.state == "verified"]
        locked = {entry["file"]: entry["sha256"] for entry in self.locked()}
        assert {name: sha256(self.models / name) for name in names}.items() <= locked.items()
        return names

    def locked(self) -> list[dict[str, Any]]:
        path = self.models / LOCK
        return list(json.loads(path.read_text())) if path.exists() else []

    def files(self) -> set[str]:
        found = (path for path in self.models.rglob("*") if path.is_file())
        return {str(path.relative_to(self.models)) for path in found}

    def kept_bytes(self) -> int:
        """Return how much there is of the file that the next run can go on with."""
        sizes = [(self.models / name).stat().st_size for name in self.files()]
        return max(sizes, default=0)


def ended(process: Started) -> host.Result:
    out, err = process.communicate(timeout=180)
    assert TOKEN not in out + err
    assert "Traceback" not in err, err
    return host.Result(process.returncode, out, err)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.fixture
def deployment(hub: Hub, tmp_path: Path) -> Iterator[Deployment]:
    hub.reset()
    hub.publish({FILE: "good"})
    deployment = Deployment(hub.deployment(tmp_path), hub)
    yield deployment
    deployment.stop()
    shutil.rmtree(deployment.models)
    assert not [
        each for each in hub.requests if each.host == CDN and "authorization" in each.headers
    ]


def assert_ended(done: host.Result, code: int, *words: str) -> None:
    """Check for the exit code and, of an error, one line of cause and one of remedy."""
    assert done.status == code, done
    told = done.stdout
    if code:
        *_, cause, remedy = done.stderr.strip().splitlines()  # after notes of what is tried again
        told = f"{cause} {remedy}"
    assert all(word in told for word in words), done


def assert_finishes(deployment: Deployment) -> None:
    """Check that the next run fetches what is missing, a chunk more at most, and serves."""
    hub, kept = deployment.hub, deployment.kept_bytes()
    hub.faults, hub.requests = [], []
    assert_ended(deployment.download(), 0)
    assert sha256(deployment.file) == sha256(hub.folder / "good")
    missing = deployment.file.stat().st_size - kept
    assert hub.sent_bytes() <= missing + DOWNLOAD_CHUNK_SIZE
    assert deployment.files() == {FILE, LOCK, *OWN}


MENDED = [
    pytest.param([Fault(cut=0)], 1, id="cut-at-0"),
    pytest.param([Fault(cut=0.5)], 1, id="cut-at-50"),
    pytest.param([Fault(cut=0.99)], 1, id="cut-at-99"),
    pytest.param([Fault(cut=0.5), Fault(ignore_range=True)], 1.5, id="cut-then-no-range"),
    pytest.param([Fault(stall=0.5)], 1, id="stall"),
    pytest.param([Fault(rate=50e3, cut=0.005)], 1, id="slow"),
    pytest.param([Fault(body="flipped")], 2, id="flipped-once"),
    pytest.param([Fault(status=429, headers={"Retry-After": "1"})], 1, id="429-once"),
    pytest.param([Fault(status=500)], 1, id="500-once"),
    pytest.param([Fault(step="resolve", status=500)], 1, id="500-of-metadata-once"),
]


@pytest.mark.parametrize(("faults", "files"), MENDED)
def test_passing_fault_is_got_over(
    deployment: Deployment, faults: list[Fault], files: float
) -> None:
    deployment.hub.faults = faults

    assert_ended(deployment.download(env={"HF_HUB_DOWNLOAD_TIMEOUT": "1"}), 0)
    assert deployment.verified() == [FILE]
    most = files * deployment.file.stat().st_size + DOWNLOAD_CHUNK_SIZE
    assert deployment.hub.sent_bytes() <= most


def lasting(step: str = "bytes", **fault: Any) -> list[Fault]:
    return [Fault(step=step, times=ALWAYS, **fault)]


def once(step: str, status: int) -> list[Fault]:
    """Refuse in a way that is not tried again: it would succeed."""
    return [Fault(step=step, status=status)]


def cut_off(share: float) -> list[Fault]:
    """Cut a download, and refuse to go on with it."""
    return [Fault(cut=share), *once("bytes", 403)]


NAMED = [
    pytest.param(cut_off(0.5), 20, ["403"], id="cut-at-50"),
    pytest.param(cut_off(0.99), 20, ["403"], id="cut-at-99"),
    pytest.param(lasting(stall=0), 20, [], id="stall"),
    pytest.param(lasting(body="flipped"), 21, [], id="flipped"),
    pytest.param(lasting(body="short"), 21, [], id="short"),
    pytest.param(lasting(body="long"), 21, [], id="long"),
    pytest.param(lasting(body="empty"), 21, ["empty"], id="empty"),
    pytest.param(lasting(body="page"), 21, ["HTML"], id="page"),
    pytest.param(lasting(body="pointer"), 21, ["git-lfs"], id="pointer"),
    pytest.param(lasting("resolve", body="page"), 20, [], id="page-for-metadata"),
    pytest.param(once("resolve", 401), 20, ["401", "HF_TOKEN"], id="401"),
    pytest.param(once("resolve", 403), 20, ["403", "HF_TOKEN"], id="403"),
    pytest.param(once("resolve", 404), 20, ["404", FILE], id="404"),
    pytest.param(once("bytes", 403), 20, ["403"], id="403-of-bytes"),
    pytest.param(lasting(status=429, headers={"Retry-After": "1"}), 20, ["HF_TOKEN"], id="429"),
    pytest.param(lasting(status=500, headers={"Retry-After": "0"}), 20, ["500"], id="500"),
    pytest.param(
        lasting("resolve", status=302, headers={"Location": "?"}), 20, ["redirect"], id="loop"
    ),
]


@pytest.mark.parametrize(("faults", "code", "words"), NAMED)
def test_fault_is_named_and_nothing_of_it_served(
    deployment: Deployment, faults: list[Fault], code: int, words: list[str]
) -> None:
    deployment.hub.faults = faults
    done = deployment.download(env={"HF_HUB_DOWNLOAD_TIMEOUT": "1"})

    assert_ended(done, code, *words)
    assert deployment.verified() == []
    assert deployment.up().status in (Code.INTEGRITY, Code.LOAD)
    assert_finishes(deployment)


@pytest.mark.parametrize(
    ("env_of", "word"),
    [
        (lambda _: {"HF_ENDPOINT": "http://127.0.0.1:1"}, "refused"),
        (lambda _: {"HF_ENDPOINT": "http://hub.invalid"}, "hub.invalid"),
        (lambda url: {"HF_ENDPOINT": url.replace("http", "https")}, "SSL"),
        (lambda _: {"HTTP_PROXY": "http://127.0.0.1:1", "NO_PROXY": ""}, "refused"),
    ],
    ids=["refused", "unknown-host", "tls", "proxy"],
)
def test_hub_out_of_reach(
    deployment: Deployment, env_of: Callable[[str], dict[str, str]], word: str
) -> None:
    assert_ended(deployment.download(env=env_of(deployment.hub.url)), 20, word)
    assert deployment.hub.requests == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("empty", ["empty"]),
        ("page", ["HTML"]),
        ("pointer", ["git-lfs"]),
        ("truncated", ["truncated"]),
        ("hostile", ["a count of"]),
        ("old", ["gating"]),
    ],
)
def test_published_file_that_is_no_such_model(
    deployment: Deployment, name: str, words: list[str]
) -> None:
    deployment.hub.publish({FILE: name})

    assert_ended(deployment.download(), 21, *words)
    assert deployment.up().status in (Code.INTEGRITY, Code.LOAD)


def timed_s(deployment: Deployment) -> float:
    """Return how long a download takes that has nothing to do."""
    start = time.monotonic()
    assert_ended(deployment.download(), 0, FILE)
    return time.monotonic() - start


def test_downloaded_once_it_is_served_and_needs_no_network(deployment: Deployment) -> None:
    assert_ended(deployment.download(), 0)
    deployment.hub.requests = []

    assert min(timed_s(deployment) for _ in range(3)) < 1
    assert deployment.hub.requests == []
    assert_ended(deployment.up(HF_HUB_OFFLINE="1"), 0)


def test_lock_names_commit_size_and_hash(deployment: Deployment) -> None:
    deployment.download()

    (entry,) = deployment.locked()
    assert entry["revision"] == deployment.hub.main
    assert entry["size"] == deployment.file.stat().st_size
    assert entry["sha256"] == sha256(deployment.file)


@pytest.mark.parametrize(
    ("by", "env"),
    [((), {"HF_HUB_OFFLINE": "1"}), (("unshare", "--net"), {})],
    ids=["told-so", "no-route"],
)
def test_offline_names_what_is_missing(
    deployment: Deployment, by: tuple[str, ...], env: dict[str, str]
) -> None:
    if by and host.run([*by, "true"]).status:
        pytest.skip("this user may not make a network namespace")
    done = deployment.invoke("download", "--quant", "tiny", by=by, env=env)

    assert_ended(done, 20, FILE)
    assert deployment.hub.requests == []


def test_locked_commit_is_kept_until_update(deployment: Deployment) -> None:
    deployment.download()
    first, second = deployment.hub.main, deployment.hub.publish({FILE: "long"})
    deployment.file.unlink()

    assert_finishes(deployment)
    assert_ended(deployment.download("--update"), 0, first[:12], second[:12])
    assert sha256(deployment.file) == sha256(deployment.hub.folder / "long")
    assert deployment.verified() == [FILE]


@pytest.mark.parametrize(
    ("published", "faults", "code"), [("long", cut_off(0.5), 20), ("old", [], 21)]
)
def test_failed_update_leaves_the_old_file_served(
    deployment: Deployment, published: str, faults: list[Fault], code: int
) -> None:
    deployment.download()
    deployment.hub.publish({FILE: published})
    deployment.hub.faults = faults

    assert_ended(deployment.download("--update"), code)
    assert deployment.verified() == [FILE]
    assert deployment.up().status == 0


def test_commit_with_other_content_than_locked_is_refused(deployment: Deployment) -> None:
    hub = deployment.hub
    deployment.download()
    hub.commits[hub.main][FILE] = hub.store("long")
    deployment.file.unlink()

    assert_ended(deployment.download(), 21, "--update")
    assert deployment.verified() == []


def test_branch_that_moves_between_two_tries(deployment: Deployment) -> None:
    deployment.hub.faults = cut_off(0.5)
    deployment.download()
    deployment.hub.faults = []
    deployment.hub.publish({FILE: "long"})

    assert_ended(deployment.download(), 0)
    assert deployment.verified() == [FILE]


def test_listing_tells_what_each_file_is(deployment: Deployment) -> None:
    deployment.download()
    for name in ("mine.gguf", "theirs.stand-in.gguf"):
        (deployment.models / name).touch()
    done = deployment.invoke("models", "--json")

    states = {row["file"]: row["state"] for row in json.loads(done.stdout)}
    ours = {FILE: "verified", "mine.gguf": "unused", "theirs.stand-in.gguf": "stand-in"}
    assert states.items() >= ours.items()


@pytest.mark.parametrize("kept_mtime", [False, True], ids=["mtime-changed", "mtime-kept"])
def test_flipped_bit_is_found(deployment: Deployment, kept_mtime: bool) -> None:
    deployment.download()
    before = deployment.file.stat()
    with deployment.file.open("r+b") as file:
        file.seek(-9, os.SEEK_END)
        file.write(b"\0")
    if kept_mtime:
        os.utime(deployment.file, ns=(before.st_atime_ns, before.st_mtime_ns))
        done = deployment.invoke("models", "--verify")
    else:
        done = deployment.up()

    assert_ended(done, 21, FILE)
    assert deployment.verified() == []
    assert deployment.up().status in (Code.INTEGRITY, Code.LOAD)
    assert_ended(deployment.download(), 0)
    assert deployment.verified() == [FILE]


def test_partial_file_that_a_tool_called_complete(deployment: Deployment) -> None:
    good = (deployment.hub.folder / "good").read_bytes()
    deployment.file.write_bytes(good[: len(good) // 2])

    assert_ended(deployment.up(), 21, FILE)
    assert_ended(deployment.download(), 21, "Move it away")
    deployment.file.unlink()
    assert_finishes(deployment)


def test_engine_older_than_the_model_needs(deployment: Deployment) -> None:
    deployment.download()
    compose = deployment.folder / "compose.yaml"
    compose.write_text(compose.read_text().replace("min_build: 7847", "min_build: 99999"))

    assert_ended(deployment.up(), 21, "99999")


def test_prune_removes_what_downloads_left_and_nothing_of_a_user(deployment: Deployment) -> None:
    theirs = {"mine.gguf", "mine.gguf.part", ".hidden", "notes.txt"}
    deployment.hub.faults = cut_off(0.5)
    deployment.download()
    for name in theirs:
        (deployment.models / name).write_text("mine")
    left = deployment.files() - theirs - {LOCK, *OWN}

    assert left
    assert_ended(deployment.invoke("models", "--prune"), 0, *left)
    assert deployment.files() - {LOCK, *OWN} == theirs
    assert all((deployment.models / name).read_text() == "mine" for name in theirs)


def split(good: bytes) -> list[bytes]:
    """Split a file as llama.cpp does: keys and tensors in the first part, none in the others."""

    def key(name: str, code: int, value: bytes) -> bytes:
        return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", code) + value

    tensors = struct.unpack("<Q", good[8:16])[0]
    parts = []
    for number in range(3):
        keys = key("split.no", 2, struct.pack("<H", number))
        keys += key("split.count", 2, struct.pack("<H", 3))
        keys += key("split.tensors.count", 5, struct.pack("<i", tensors))
        pad = -(len(keys) + len(key("pad", 8, bytes(8)))) % 32  # what comes after keeps its place
        keys += key("pad", 8, struct.pack("<Q", pad) + bytes(pad))
        count = struct.unpack("<Q", good[16:24])[0] + 4
        head = good[:16] + struct.pack("<Q", count) + keys + good[24:]
        parts.append(head if number == 0 else b"GGUF" + struct.pack("<IQQ", 3, 0, 4) + keys)
    return parts


def test_split_model_is_downloaded_verified_and_served_as_one(deployment: Deployment) -> None:
    names = [f"glm-tiny-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    good = (deployment.hub.folder / "good").read_bytes()
    for name, content in zip(names, split(good), strict=True):
        (deployment.hub.folder / name).write_bytes(content)
    deployment.hub.publish({name: name for name in names})
    env = deployment.folder / ".env"
    env.write_text(f"{env.read_text()}GLM_TINY_FILE={names[0]}\n")

    assert_ended(deployment.download(), 0)
    assert sorted(entry["file"] for entry in deployment.locked()) == names
    assert deployment.up().status == 0
    deployment.stop()
    (deployment.models / names[2]).unlink()
    assert deployment.up().status in (Code.INTEGRITY, Code.LOAD)


@pytest.fixture
def in_container(deployment: Deployment) -> Iterator[Deployment]:
    docker = Docker(config.load(deployment.folder))
    try:
        docker.check()
    except NoEngineError as error:
        pytest.skip(error.cause)
    yield deployment
    docker.compose("down")  # the network


def test_container_downloads_for_the_host(in_container: Deployment) -> None:
    assert_ended(in_container.download("--in-container"), 0)
    assert in_container.verified() == [FILE]
    assert in_container.file.stat().st_uid == in_container.models.stat().st_uid


@pytest.mark.parametrize(
    "script", ["true", f"head -c 99 /dev/zero >/app/models/{FILE}"], ids=["nothing", "a-part"]
)
def test_tool_that_calls_it_a_success(in_container: Deployment, script: str) -> None:
    compose = in_container.folder / "compose.yaml"
    tool = f"profiles: [models]\n    entrypoint: {json.dumps(['sh', '-c', script])}"
    compose.write_text(compose.read_text().replace("profiles: [models]", tool))

    assert_ended(in_container.download("--in-container"), 20, FILE)
    assert in_container.verified() == []


def await_(begun: Callable[[], object]) -> None:
    """Wait until a command has got somewhere."""
    wait_until(lambda: begun() or None, timeout_s=PATIENCE_S, what="the moment", interval_s=0.001)


@contextlib.contextmanager
def held(process: Started, deployment: Deployment) -> Iterator[None]:
    """Hold a download while the context lasts, from when its first bytes were sent."""
    await_(deployment.hub.sent_bytes)
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def test_two_downloads_at_once(deployment: Deployment) -> None:
    deployment.hub.faults = [Fault(rate=20e6)]
    with deployment.start("download", "--quant", "tiny") as first:
        with held(first, deployment):
            second = deployment.download()
        done = ended(first)

    assert_ended(second, Code.BUSY, f"pid {first.pid}")
    assert_ended(done, 0)
    assert deployment.verified() == [FILE]


@pytest.fixture
def small_disk(deployment: Deployment) -> Iterator[Callable[[str], None]]:
    """Put the models on a small file system of their own; return what changes its options."""

    def mount(options: str) -> int:
        argv = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(deployment.models)]
        return host.run(argv).status

    def remount(options: str) -> None:
        assert mount(f"remount,{options}") == 0

    if mount("size=64m"):
        pytest.skip("this user may not mount a small file system")
    yield remount
    host.run(["umount", deployment.models])


@pytest.mark.usefixtures("small_disk")
def test_disk_too_small_is_told_before_the_first_byte(deployment: Deployment) -> None:
    assert_ended(deployment.download(), Code.DISK, "GB")
    assert deployment.hub.sent_bytes() == 0
    assert deployment.files() <= OWN


def test_disk_that_is_read_only(deployment: Deployment, small_disk: Callable[[str], None]) -> None:
    small_disk("ro")

    assert_ended(deployment.download(), Code.DISK, "Read-only")


def test_disk_full_at_60_percent(deployment: Deployment, small_disk: Callable[[str], None]) -> None:
    small_disk("size=12g")
    deployment.hub.faults = [Fault(rate=20e6)]
    with deployment.start("download", "--quant", "tiny") as process:
        with held(process, deployment):
            small_disk("size=24m")
        done = ended(process)

    assert_ended(done, Code.DISK)
    assert len([each for each in deployment.hub.requests if each.step == "bytes"]) == 1
    assert deployment.verified() == []
    small_disk("size=12g")
    assert_finishes(deployment)


def test_half_written_notes_of_a_killed_run_go(deployment: Deployment) -> None:
    (deployment.models / ".download").mkdir()
    (deployment.models / ".download" / host.MARKER).touch()
    for name in (f".{LOCK}.k1ll3d_0", ".download/.verified.json.k1ll3d_0"):
        (deployment.models / name).write_text("[")

    assert_finishes(deployment)


def at_each_moment(kill: Callable[[float], int | None]) -> None:
    """Kill at each of the moments, on all cores at once; check that some came before the end."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        statuses = list(pool.map(kill, MOMENTS))
    assert statuses.count(-signal.SIGKILL) > len(MOMENTS) / 4


@pytest.mark.parametrize(
    ("rate", "begun", "span_s"),
    [
        (80e6, lambda deployment: deployment.hub.sent_bytes(), 0.5),
        (None, lambda deployment: (deployment.models / LOCK).exists(), 0.05),
    ],
    ids=["downloads", "renames"],
)
def test_killed_while_it(
    hub: Hub,
    tmp_path: Path,
    rate: float | None,
    begun: Callable[[Deployment], object],
    span_s: float,
) -> None:
    def kill(moment: float) -> int | None:
        folder = tmp_path / str(moment)
        folder.mkdir()
        with Hub(hub.folder) as own:
            own.publish({FILE: "good"})
            own.faults = [Fault(rate=rate)]
            deployment = Deployment(own.deployment(folder), own)
            with deployment.start("download", "--quant", "tiny") as process:
                await_(lambda: begun(deployment))
                time.sleep(span_s * moment)
                process.kill()
            assert deployment.verified() in ([], [FILE])
            assert_finishes(deployment)
        shutil.rmtree(folder)
        return process.returncode

    at_each_moment(kill)


def read_bytes(pid: int) -> int:
    """Return how much a process has read so far."""
    return int(Path(f"/proc/{pid}/io").read_text().split()[1])


def test_killed_while_it_hashes_a_file_that_changed(deployment: Deployment) -> None:
    big = deployment.hub.folder / "big"
    shutil.copy(deployment.hub.folder / "good", big)
    os.truncate(big, BIG_BYTES)
    deployment.hub.publish({FILE: "big"})
    deployment.download()
    with deployment.file.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")

    def kill(moment: float) -> int | None:
        with deployment.start("models", "--verify") as process:
            await_(lambda: read_bytes(process.pid) > BIG_BYTES / 8)
            time.sleep(0.3 * moment)
            process.kill()
        assert deployment.verified() == []
        return process.returncode

    at_each_moment(kill)


BROKEN: dict[str, tuple[Callable[..., None], dict[str, object], tuple[str, str], str]] = {
    "an `up` that takes any file": (
        test_flipped_bit_is_found,
        {"kept_mtime": False},
        ('if copy.state != "verified":\n            raise', "if False:\n            raise"),
        "status=0",
    ),
    "a `models --prune` that removes a user's file": (
        test_prune_removes_what_downloads_left_and_nothing_of_a_user,
        {},
        ('folder.glob(".*.gguf.part")', 'folder.glob("*.gguf.part")'),
        "mine.gguf.part",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_program_is_noticed(deployment: Deployment, notice: Notice, broken: str) -> None:
    check, given, (old, new), says = BROKEN[broken]
    workspace.change(deployment.folder, "stack/integrity.py", old, new)

    notice(check, broken, says=says, **given)


NO_FILE = {"says": "No such file|not enough values|Expecting value"}
NOBODY_KILLS: Broken = (
    "a kill that kills nobody",
    {"patch": {"subprocess.Popen.kill": lambda _: None, f"{__name__}.MOMENTS": MOMENTS[:2]}},
)
UNLIKE: dict[Callable[..., None], Broken] = {
    **dict.fromkeys(
        (
            test_passing_fault_is_got_over,
            test_fault_is_named_and_nothing_of_it_served,
            test_hub_out_of_reach,
            test_published_file_that_is_no_such_model,
            test_downloaded_once_it_is_served_and_needs_no_network,
            test_offline_names_what_is_missing,
            test_failed_update_leaves_the_old_file_served,
            test_branch_that_moves_between_two_tries,
            test_partial_file_that_a_tool_called_complete,
            test_engine_older_than_the_model_needs,
            test_split_model_is_downloaded_verified_and_served_as_one,
            test_container_downloads_for_the_host,
            test_tool_that_calls_it_a_success,
            test_disk_too_small_is_told_before_the_first_byte,
            test_disk_that_is_read_only,
            test_two_downloads_at_once,
            test_disk_full_at_60_percent,
        ),
        (IDLE[0], IDLE[1] | {"patch": {f"{__name__}.PATIENCE_S": 1}}),
    ),
    **dict.fromkeys(
        (
            test_lock_names_commit_size_and_hash,
            test_locked_commit_is_kept_until_update,
            test_commit_with_other_content_than_locked_is_refused,
            test_listing_tells_what_each_file_is,
            test_half_written_notes_of_a_killed_run_go,
        ),
        (IDLE[0], IDLE[1] | NO_FILE),
    ),
    test_killed_while_it: NOBODY_KILLS,
    test_killed_while_it_hashes_a_file_that_changed: NOBODY_KILLS,
}


@pytest.mark.parametrize("check", UNLIKE, ids=lambda check: check.__name__)
@pytest.mark.usefixtures("deployment")
def test_what_is_unlike_is_noticed(notice: Notice, check: Callable[..., None]) -> None:
    broken, how = UNLIKE[check]

    notice(check, broken, **how)
