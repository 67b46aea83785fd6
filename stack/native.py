"""The native runtime: the same pinned engine and settings as a plain process."""

import contextlib
import ipaddress
import json
import logging
import os
import re
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

from stack.bounded_log import older
from stack.config import UNPATCHED, Project, Service
from stack.errors import Code, StackError
from stack.host import Process, Result, listening_port, own_folder, reason, run, spawn, write_atomic
from stack.server import Server
from stack.wait import WaitTimeoutError, wait_until

_log = logging.getLogger(__name__)
TARGETS = ("llama-server", "llama-bench", "llama-batched-bench", "llama-fit-params")
_LISTEN_LIMIT_S = 60
_PID_S = 1
_AGAIN_S = 8  # as docker/confine.c
_KILL_S = 10


class Native:
    """Runs services as processes of this user, each in a session of its own."""

    name = "native"

    def __init__(
        self, project: Project, *, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Bind to a project. `progress` receives (done, total) steps of a build."""
        self.project = project
        self._progress = progress
        self._folder = project.state / "native"

    def check(self) -> None:
        """Nothing has to answer before a native run."""

    def execute(self, service: Service, *argv: str) -> Result:  # noqa: ARG002
        """Run one of the engine's programs to its end."""
        return run(argv, timeout_s=60)

    def tool(self, service: Service, name: str, *arguments: str, timeout_s: float) -> Result:
        """Run one of the engine's programs as the server would run: settings, model, GPU.

        Raises:
            StackError: LOAD when it fails, HOST when it outlasts `timeout_s`.

        """
        translated = (_on_host(service, argument) for argument in arguments)
        env = _inherited() | _settings(service)
        done = run([self.program(service, name), *translated], env=env, timeout_s=timeout_s)
        if done.status:
            raise StackError(
                f"{name} failed ({done.status}): {reason(done)}",
                "See whether the model and its context fit in the memory that is free.",
                Code.LOAD,
            )
        return done

    def program(self, service: Service, name: str) -> str:
        """Return the path of one of the engine's programs for the service's backend."""
        return str(self._build_folder(service) / "bin" / name)

    def _build_folder(self, service: Service) -> Path:
        engine = self.project.engine
        name = f"{engine.commit[:12]}-{engine.patches}-{service.backend}"
        return self.project.cache / "engine" / name

    def built(self, service: Service) -> bool:
        """Return whether the pinned engine is built for the service's backend and GPU."""
        done = self._build_folder(service) / "done"
        return done.exists() and done.read_text() == self._identity(service)

    def _identity(self, service: Service) -> str:
        return f"{self.project.engine.commit} {service.build_args.get('CUDA_ARCH', '')}\n"

    def build(self, service: Service, *, source: Path) -> None:
        """Compile the engine with CMake; unchanged files are not compiled again.

        Raises:
            StackError: BUILD, with the compiler's last words; HOST without nvcc for CUDA.

        """
        own_folder(self.project.cache)
        folder = self._build_folder(service)
        folder.mkdir(parents=True, exist_ok=True)
        engine, source = self.project.engine, self._patched(source, folder / "source")
        configure: list[str | Path] = [
            *("-C", self.project.root / "docker" / "engine.cmake"),
            *("-S", source, "-B", folder, "-G", "Ninja"),
            f"-DLLAMA_BUILD_NUMBER={engine.build}",
            f"-DLLAMA_BUILD_COMMIT={engine.commit}",
        ]
        if service.backend == "cuda":
            configure += self._cuda(service)
        if shutil.which("ccache"):
            configure += [f"-DCMAKE_{x}_COMPILER_LAUNCHER=ccache" for x in ("C", "CXX", "CUDA")]
        # A clone in another folder shares the compiler cache.
        env = {**os.environ, "CCACHE_BASEDIR": str(self.project.cache), "CCACHE_NOHASHDIR": "1"}
        if not all(map(shutil.which, ("cmake", "ninja", "c++"))):
            tools = self._toolchain()
            env["PATH"] = f"{tools}:{env['PATH']}"
        if not shutil.which("c++"):
            _log.info("No C++ compiler here; building with Zig's, from PyPI.")
            roles = {"C_COMPILER": "cc", "CXX_COMPILER": "c++", "AR": "ar", "RANLIB": "ranlib"}
            configure += [f"-DCMAKE_{role}={tools}/zig-{name}" for role, name in roles.items()]
            # Zig brings no OpenMP, and each shared library its own copy of the C++ library,
            # between which the engine's strings would be freed by the wrong one.
            configure += ["-DGGML_OPENMP=OFF", "-DBUILD_SHARED_LIBS=OFF"]
        _log.info("Compiling the engine for %s.", service.backend)
        log: list[str] = []
        steps: list[list[str | Path]] = [
            ["cmake", *configure],
            ["cmake", "--build", folder, "--target", *TARGETS],
        ]
        for argv in steps:
            done = run(argv, env=env, line=lambda text: self._step(text, log))
            if done.status:
                (folder / "build.log").write_text("\n".join(log))
                failing = [line for line in log if "error" in line.lower()] or log
                raise StackError(
                    f"The engine did not build: {' / '.join(failing[-3:])}",
                    f"The whole log is in {folder / 'build.log'}.",
                    Code.BUILD,
                )
        write_atomic(folder / "done", self._identity(service))

    def _patched(self, source: Path, copy: Path) -> Path:
        """Make and return a copy of the engine's source with our patches.

        It lies in the build's folder, so that the compiler cache knows each file by one name.

        Raises:
            StackError: BUILD, where one does not apply.

        """
        patches = sorted((self.project.root / "docker" / "patches").glob("*.patch"))
        if self.project.engine.patches == UNPATCHED:
            patches = []
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(source, copy)
        # Inside a repository git would look for the files from its root on.
        env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(copy.parent)}
        for patch in patches:
            done = run(["git", "apply", patch.resolve()], cwd=copy, env=env)
            if done.status:
                raise StackError(
                    f"docker/patches/{patch.name} does not apply to {source}: {reason(done)}",
                    "GLM_ENGINE_PATCHES=none in .env builds it without ours.",
                    Code.BUILD,
                )
        return copy

    def _step(self, text: str, log: list[str]) -> None:
        log.append(text)
        if self._progress and (match := re.match(r"\[(\d+)/(\d+)\]", text)):
            self._progress(int(match[1]), int(match[2]))

    def _cuda(self, service: Service) -> list[str | Path]:
        if not shutil.which("nvcc"):
            raise StackError(
                f"{service.name} needs CUDA, and nvcc is not on PATH.",
                "Install NVIDIA's CUDA toolkit, or use Docker, whose build brings its own.",
                Code.HOST,
            )
        return ["-DGGML_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={service.build_args['CUDA_ARCH']}"]

    def _toolchain(self) -> Path:
        """Return the folder of CMake, Ninja and Zig from the lock file's toolchain group."""
        environment = self.project.cache / "toolchain"
        uv = os.environ.get("UV", "uv")
        env = {**os.environ, "UV_PROJECT_ENVIRONMENT": str(environment)}
        env.pop("VIRTUAL_ENV", None)
        argv = [uv, "sync", "--frozen", "--quiet", "--only-group", "toolchain"]
        done = run(argv, cwd=self.project.root, env=env, timeout_s=600)
        if done.status:
            raise StackError(
                f"CMake and Ninja cannot be installed: {done.stderr.strip()}",
                "Mend the network and try again.",
                Code.BUILD,
            )
        tools = environment / "bin"
        (zig,) = environment.glob("lib/*/site-packages/ziglang/zig")
        for name in ("cc", "c++", "ar", "ranlib"):  # CMake wants each as one program
            write_atomic(tools / f"zig-{name}", f'#!/bin/sh\nexec {zig} {name} "$@"\n', mode=0o755)
        return tools

    def start(self, service: Service, *, key: str) -> Server:
        """Start the service's process with the settings of `compose.yaml`, paths translated.

        Raises:
            StackError: LOAD, when it ends before it listens.

        """
        return self._start(service, _settings(service), key=key)

    def restart(self, service: Service, *, key: str) -> Server:
        """Restart the service's server, as it was started, so that it reads its key file anew.

        Raises:
            StackError: LOAD, when it ends before it listens.

        """
        settings = json.loads(self._record_file(service).read_text())["settings"]
        self.stop(service)
        return self._start(service, settings, key=key)

    def _start(self, service: Service, settings: Mapping[str, str], *, key: str) -> Server:
        self._folder.mkdir(parents=True, exist_ok=True)
        # The record first: a server without one would be nobody's.
        record = {"bind": service.bind, "settings": settings}
        write_atomic(self._record_file(service), json.dumps(record, indent=1))
        spawn(
            [self.program(service, "llama-server")],
            env={**_inherited(), **settings},
            log=self._log_file(service),
            pid_file=self._pid_file(service),
            log_bytes=service.log_bytes,
            log_files=service.log_files,
        )

        def listening() -> Server | None:
            server = self.find(service, key=key)
            if server is None or (server.ended() and not server.url):
                raise StackError(
                    f"{service.name} ended before it listened. {self._log_file(service)} says why.",
                    f"See `invoke logs --quant {service.quant}`.",
                    Code.LOAD,
                )
            return server if server.url else None

        return wait_until(
            listening, timeout_s=_LISTEN_LIMIT_S, what=f"{service.name} not listening"
        )

    def _log_file(self, service: Service) -> Path:
        return self._folder / f"{service.name}.log"

    def _pid_file(self, service: Service) -> Path:
        return self._folder / f"{service.name}.pid"

    def _record_file(self, service: Service) -> Path:
        return self._folder / f"{service.name}.json"

    def find(self, service: Service, *, key: str) -> Server | None:
        """Return the service's server, running or ended; None where none was started."""
        record_file = self._record_file(service)
        try:
            record = json.loads(record_file.read_text())
            bind, settings = record["bind"], record["settings"]
            port = settings["LLAMA_ARG_PORT"]
            process = wait_until(
                lambda: Process.read(self._pid_file(service)), timeout_s=_PID_S, what="no pid"
            )
        except (FileNotFoundError, WaitTimeoutError):
            return None
        except (ValueError, KeyError, TypeError):
            aside = record_file.with_suffix(".corrupt")
            record_file.replace(aside)
            _log.warning("%s is no record of ours; moved to %s.", record_file, aside.name)
            return None
        log_file = self._log_file(service)
        if port == "0":  # the platform's choice
            port = str(listening_port(process.pid) or "")
        host = "127.0.0.1" if ipaddress.ip_address(bind).is_unspecified else bind
        return Server(
            runtime=self.name,
            service=service.as_started(settings),
            url=f"http://{host}:{port}" if port else "",
            key=key,
            processes=(process,),
            logs=lambda lines: _tail(log_file, lines),
            ended=lambda: None if process.alive() else "ended",
            image=self._build_folder(service).name,
        )

    def follow(self, service: Service) -> None:
        """Show the service's log as it grows, until interrupted."""
        run(["tail", "-n", "50", "-F", self._log_file(service)], show=1)

    def stop(self, service: Service) -> bool:
        """Stop the service's process; return whether it was running.

        The server's handler of SIGTERM may wait for ever for a lock that the thread it interrupts
        holds; a second one ends it at once, SIGKILL what hangs otherwise.
        """
        server = self.find(service, key="")
        running = server is not None and server.ended() is None
        if server and running:
            limits = (_AGAIN_S, service.stop_grace_s - _AGAIN_S, _KILL_S)
            numbers = (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL)
            for number, limit_s in zip(numbers, limits, strict=True):
                server.processes[0].signal_group(number)
                with contextlib.suppress(WaitTimeoutError):
                    wait_until(server.ended, timeout_s=limit_s, what=f"{service.name} still runs")
                    break
        self._record_file(service).unlink(missing_ok=True)
        self._pid_file(service).unlink(missing_ok=True)
        return running


def _on_host(service: Service, value: str) -> str:
    return str(service.host_path(Path(value))) if value.startswith("/") else value


def _settings(service: Service) -> dict[str, str]:
    """Return the settings of `compose.yaml` for a process of the host."""
    settings = {name: _on_host(service, value) for name, value in service.environment.items()}
    settings |= {"LLAMA_ARG_HOST": service.bind, "LLAMA_ARG_PORT": str(service.port or 0)}
    if service.gpus:  # counted as nvidia-smi and Docker do
        settings |= {"CUDA_VISIBLE_DEVICES": ",".join(service.gpus)}
        settings |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return settings


def _inherited() -> dict[str, str]:
    foreign = ("LLAMA_", "GLM_", "HF_", "CUDA_")
    return {k: v for k, v in os.environ.items() if not k.startswith(foreign)}


def _tail(log: Path, lines: int) -> str:
    """Return the last lines of a log, reading no more than 64 KiB of each of its last two parts."""
    text = b""
    for part in (older(log), log):
        with contextlib.suppress(FileNotFoundError), part.open("rb") as file:
            file.seek(max(0, part.stat().st_size - 65536))
            text += file.read()
    return "\n".join(text.decode(errors="replace").splitlines()[-lines:])
