"""Each check of `invoke doctor` has a fixture here on which it must find what is wrong."""

import contextlib
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from stack import compose, config, doctor, host
from stack.doctor import Case, Finding
from tests import workspace
from tests.unit.fake_nvml import FakeNvml

INFO = "info --format {{json .}}"
SEEN = (
    "run --rm --network=none --gpus=device=0 --entrypoint=nvidia-smi glm-server:cuda "
    "--query-gpu=uuid --format=csv,noheader"
)
DRIVER = 'docker: Error response from daemon: could not select device driver "" with capabilities'


class Machine:
    """A machine on which every check passes, until a test breaks it: programs, GPU, kernel, disk.

    Its `docker` and `nvidia-ctk` are strict: what they were not taught ends with status 97.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.folder = workspace.make(
            root, GLM_MODELS=str(root / "models"), GLM_Q4_PORT=str(workspace.free_port())
        )
        self.bin = root / "bin"
        for name in ("bin", "models", "dev", ".state"):
            (root / name).mkdir()
        monkeypatch.setenv("PATH", f"{self.bin}:/usr/bin:/bin")
        monkeypatch.setenv("DOCKER_HOST", f"unix://{root}/nothing")
        monkeypatch.setattr(host, "clock_synchronised", lambda: True)
        self.docker = {
            INFO: self.info(),
            "compose version --short": "2.20.2",
            "buildx version": "github.com/docker/buildx v0.13.0 abc",
            "images --quiet glm-server:cuda": "abc",
            SEEN: "GPU-0",
        }
        self.toolkit = "NVIDIA Container Toolkit CLI version 1.17.8"
        self.nvml = FakeNvml({})
        self.labels: dict[str, str] | None = {}
        project = config.load(self.folder)
        self.project = config.load(self.folder, overrides=config.stand_ins(project))
        self.service = self.project.service("q4")
        self.service.model_file.touch()
        for name in ("nvidiactl", "nvidia-uvm"):
            (root / "dev" / name).touch()
        self.log = root / "kmsg"
        self.log.write_text("6,1,1,-;usb 1-1: new device\n")
        self.meminfo = root / "meminfo"
        self.meminfo.write_text("MemTotal: 99999999 kB\nMemAvailable: 88888888 kB\n")

    @staticmethod
    def info(version: str = "26.0.0", cgroup: str = "cgroupfs") -> str:
        return (
            f'{{"ServerVersion":"{version}","CgroupDriver":"{cgroup}","DockerRootDir":"/nowhere"}}'
        )

    def _program(self, name: str, answers: dict[str, str]) -> None:
        cases = [
            f"'{argv}') cat <<'END'\n{said}\nEND\n;;"
            if not said.startswith("docker:")
            else f"'{argv}') echo '{said}' >&2; exit 125;;"
            for argv, said in answers.items()
        ]
        program = self.bin / name
        program.write_text("\n".join(["#!/bin/sh", 'case "$*" in', *cases, "*) exit 97;;", "esac"]))
        program.chmod(0o755)

    def examine(self) -> dict[str, Finding]:
        self._program("docker", self.docker)
        if self.toolkit:
            self._program("nvidia-ctk", {"--version": self.toolkit})
        self.nvml.install(self.monkeypatch)
        case = Case(self.project, [self.service], kernel_log=self.log, meminfo=self.meminfo)
        case.devices = self.folder / "dev"
        if self.labels is not None:
            engine = self.project.engine
            labels = {
                "org.opencontainers.image.revision": engine.commit,
                "glm.engine.build": str(engine.build),
                "glm.engine.patches": engine.patches,
                "glm.cuda.archs": self.service.build_args["CUDA_ARCH"],
            } | self.labels
            attrs = {"Config": {"Entrypoint": [compose._CONFINE]}}  # noqa: SLF001
            images = SimpleNamespace(get=lambda _: SimpleNamespace(labels=labels, attrs=attrs))
            vars(case.docker)["client"] = SimpleNamespace(images=images)
        return {found.id: found for found in doctor.run(case)}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_nothing_is_found_where_nothing_is_wrong(machine: Machine) -> None:
    found = machine.examine()

    assert {name: each for name, each in found.items() if each.severity != "ok"} == {}
    assert doctor.status(found.values()) == 0


def _key(m: Machine) -> None:
    m.service.key_file.write_text("")


def _forbidden(m: Machine) -> None:
    def knock() -> None:
        raise PermissionError(13, "Permission denied")

    m.labels = None
    m.monkeypatch.setattr(compose, "_knock", knock)


def _unknown_file(m: Machine) -> None:
    m.service.model_file.rename(m.folder / "models" / "GLM-4.7-Flash-UD-Q4_K_XL.gguf")
    m.project = config.load(m.folder)
    m.service = m.project.service("q4")


def _full_disk(m: Machine) -> None:
    usage = SimpleNamespace(free=10**6)
    m.monkeypatch.setattr(doctor, "shutil", SimpleNamespace(disk_usage=lambda _: usage))


def _taken(m: Machine) -> socket.socket:
    return socket.create_server(("127.0.0.1", m.service.port or 0))


def _future(m: Machine) -> None:
    file = m.folder / "compose.yaml"
    file.unlink()
    shutil.copy(workspace.ROOT / "compose.yaml", file)
    os.utime(file, (2e10, 2e10))


def _set(**changes: object) -> Callable[[Machine], None]:
    return lambda m: vars(m).update(changes)


def _docker(argv: str, said: str) -> Callable[[Machine], None]:
    return lambda m: m.docker.update({argv: said})


def _xid(number: int) -> Callable[[Machine], object]:
    line = f"3,2,2,-;NVRM: Xid (PCI:0000:01:00): {number}, pid=1, GPU has fallen off the bus.\n"
    return lambda m: m.log.write_text(line)


FAULTS: list[tuple[str, Callable[[Machine], object], str, str]] = [
    ("key", _key, "failure", "holds no key"),
    ("docker", _set(labels=None), "doubt", "No Docker engine answers"),
    ("docker", _forbidden, "failure", "may not talk"),
    ("docker-version", _docker(INFO, Machine.info("20.10.24")), "failure", "26.0.0 is needed"),
    ("compose", _docker("compose version --short", "v2.20.1"), "failure", "2.20.2 is needed"),
    ("compose", lambda m: m.docker.pop("compose version --short"), "failure", "missing"),
    ("buildx", lambda m: m.docker.pop("buildx version"), "failure", "missing"),
    ("gpu-in-container", _docker(SEEN, DRIVER), "failure", "could not select device driver"),
    ("gpu-in-container", _docker(SEEN, ""), "failure", "sees the GPUs none"),
    ("gpu-in-container", _docker(SEEN, "GPU-7"), "failure", "sees the GPUs GPU-7"),
    ("gpu", _set(nvml=FakeNvml()), "failure", "no NVIDIA GPU"),
    ("gpu", _set(nvml=FakeNvml({"nvmlDeviceGetMigMode": [1, 1]})), "failure", "MIG mode"),
    ("gpu", _set(nvml=FakeNvml({}, {})), "failure", "needs a choice of GPU"),
    (
        "gpu-driver",
        _set(nvml=FakeNvml({}, nvmlSystemGetDriverVersion="570.86.15")),
        "failure",
        "570.86.15 < 580",
    ),
    ("gpu-devices", lambda m: (m.folder / "dev/nvidia-uvm").unlink(), "failure", "nvidia-uvm"),
    (
        "gpu-libraries",
        lambda m: m.monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/local/cuda-13/compat"),
        "failure",
        "compat",
    ),
    ("gpu-xid", _xid(79), "failure", "gone until it is reset"),
    ("gpu-xid", _xid(31), "doubt", "faulted"),
    ("container-toolkit", _set(toolkit="version 1.17.7"), "failure", "CVE-2025-23266"),
    ("container-toolkit", _set(toolkit=""), "failure", "missing"),
    ("cgroup-driver", _docker(INFO, Machine.info(cgroup="systemd")), "doubt", "daemon-reload"),
    ("engine", _set(labels={"glm.engine.build": "1"}), "doubt", "not built"),
    ("models", lambda m: m.service.model_file.unlink(), "doubt", "is missing"),
    ("models", _unknown_file, "failure", "not known to be the locked one"),
    ("disk", _full_disk, "failure", "1.0 GB are needed"),
    ("memory", lambda m: m.meminfo.write_text("MemAvailable: 9999 kB"), "doubt", "available"),
    ("ports", _taken, "failure", f"pid {os.getpid()}"),
    ("clock", lambda m: m.monkeypatch.setattr(host, "clock_synchronised", bool), "doubt", "not sy"),
    ("clock", _future, "failure", "before this tree was written"),
]


@pytest.mark.parametrize(
    ("check", "break_it", "severity", "words"),
    FAULTS,
    ids=[f"{number}-{check}" for number, (check, *_) in enumerate(FAULTS)],
)
def test_fault_is_found_and_no_other(
    machine: Machine,
    check: str,
    break_it: Callable[[Machine], object],
    severity: str,
    words: str,
) -> None:
    kept = break_it(machine)
    with kept if isinstance(kept, socket.socket) else contextlib.nullcontext():
        found = machine.examine()

    assert (found[check].severity, words in found[check].evidence) == (severity, True), found
    assert found[check].remedy
    others = {each.id for each in found.values() if each.severity in ("doubt", "failure")}
    assert others - {check} <= FOLLOW.get(check, set()), found


# Without a GPU nothing of it works, and a driver that is too old is asked in both.
FOLLOW = {"gpu": {"gpu-driver", "gpu-in-container"}, "docker": {"engine"}, "models": {"disk"}}


def test_every_check_has_a_fault() -> None:
    assert {check for check, *_ in FAULTS} | {"settings"} == set(doctor.CHECKS)


def test_settings_that_cannot_be_read_end_the_examination(tmp_path: Path) -> None:
    folder = workspace.make(tmp_path, GLM_COLOUR="red")

    (found,) = doctor.examine(folder)

    assert (found.id, found.severity) == ("settings", "failure")
    assert "GLM_COLOUR" in found.evidence


@pytest.mark.parametrize(
    ("severities", "code"),
    [(("ok", "moot"), 0), (("ok", "doubt"), 1), (("doubt", "failure", "ok"), 2)],
)
def test_exit_code_is_the_worst_finding(severities: tuple[str, ...], code: int) -> None:
    assert doctor.status(Finding("x", each, "") for each in severities) == code


@pytest.fixture
def buses(tmp_path: Path) -> Path:
    (tmp_path / "0000:01:00.0").mkdir()
    return tmp_path


def test_card_without_a_driver_is_seen_on_its_bus(buses: Path) -> None:
    (buses / "0000:01:00.0" / "vendor").write_text("0x10de\n")

    assert doctor._nvidia(buses)  # noqa: SLF001
