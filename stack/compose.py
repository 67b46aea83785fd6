"""The Docker runtime, and the only module with a `docker` command line.

The SDK reads (inspect, logs); the `docker compose` program acts, since the SDK has no BuildKit.
"""

import datetime as dt
import ipaddress
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stack import gguf_header, provenance
from stack.config import GATEWAY, Project, Service, Settings
from stack.errors import Code, StackError
from stack.host import Process, Result, children, reason, run, write_atomic
from stack.server import Server
from stack.wait import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from docker.client import DockerClient
    from docker.models.containers import Container

_log = logging.getLogger(__name__)
_SOCKET = "unix:///var/run/docker.sock"
_ANSWER_LIMIT_S = 8
_UP_LIMIT_S = 30
_INIT_LIMIT_S = 10
_EVENTS_S = 1
_REMEMBERED = 256
_LABEL = "glm.engine.build"
_BOOTSTRAPPED = "glm-base:trixie"
_MARGIN_BYTES = 1 << 30
_CONFINE = "/app/confine"  # the image's entry point, which runs what follows
_GATEWAY_IMAGE = "glm-gateway"


class NoEngineError(StackError):
    """Nothing listens where a Docker engine would."""


class Docker:
    """Runs services as containers of one Compose project."""

    name = "docker"

    def __init__(self, project: Project, *, extra: Sequence[Path] = ()) -> None:
        """Bind to a project; nothing is asked of Docker before the first call.

        `extra` Compose files go over its own.
        """
        self.project = project
        self._extra = extra

    @cached_property
    def client(self) -> "DockerClient":
        """The SDK's client, once the engine has answered.

        Raises:
            NoEngineError: no engine is there.
            StackError: HOST, it is there but forbidden, or hangs.

        """
        import docker  # noqa: PLC0415  # 0.1 s that a native run does not need

        try:
            _knock()
            client = docker.from_env(timeout=_ANSWER_LIMIT_S)
        except (OSError, docker.errors.DockerException) as error:
            raise _no_answer(repr(error)) from error
        return client

    def check(self) -> None:
        """Make sure that the engine answers. Raises as `client`."""
        _ = self.client

    def compose(
        self,
        *arguments: str,
        show: int | None = None,
        timeout_s: float | None = None,
        settings: Settings | None = None,
    ) -> Result:
        """Run `docker compose` on this project with exactly its settings.

        Raises:
            StackError: see `failure`.

        """
        done = self._run(*arguments, show=show, timeout_s=timeout_s, settings=settings)
        if done.status:
            raise failure(arguments[0], done)
        return done

    def _run(
        self,
        *arguments: str,
        show: int | None = None,
        timeout_s: float | None = None,
        settings: Settings | None = None,
    ) -> Result:
        known = self.project.settings
        env = {k: v for k, v in os.environ.items() if not k.startswith(("GLM_", "COMPOSE_"))}
        argv = [
            *("docker", "compose", "--project-name", self.project.name),
            *("--project-directory", str(self.project.root), "--env-file", os.devnull),
        ]
        files = [self.project.root / "compose.yaml"]
        # What was started with a gateway must be found, whatever the setting is now.
        if self.project.gateway or arguments[0] in ("down", "logs", "restart"):
            files.append(self.project.root / GATEWAY)
        argv += [f"--file={file}" for file in (*files, *self._extra)]
        # Interrupted half-way, `up` would leave the engine to create a container later.
        patience_s = _UP_LIMIT_S if arguments[0] == "up" else 0
        return run(
            [*argv, *arguments],
            env={**env, **known, **(settings or {})},
            show=show,
            timeout_s=timeout_s,
            patience_s=patience_s,
        )

    def built(self, service: Service) -> bool:
        """Return whether the service's image is there, of the pinned engine and for its GPU.

        One from before servers were confined is not.
        """
        engine, labels = self.project.engine, self.image_labels(service)
        wanted = {
            "org.opencontainers.image.revision": engine.commit,
            _LABEL: str(engine.build),
            "glm.engine.patches": engine.patches,
            "glm.cuda.archs": service.build_args.get("CUDA_ARCH", ""),
        }
        if not all(labels.get(name) == value for name, value in wanted.items()):
            return False
        config = self.client.images.get(service.image).attrs["Config"]
        return bool(config["Entrypoint"][0] == _CONFINE)

    def image_labels(self, service: Service) -> dict[str, str]:
        """Return the labels of the service's image; empty when there is no image."""
        import docker  # noqa: PLC0415

        try:
            labels: dict[str, str] = self.client.images.get(service.image).labels
        except docker.errors.ImageNotFound:
            return {}
        return labels

    def image_id(self, name: str) -> str | None:
        """Return the id of an image; None where there is none of that name."""
        import docker  # noqa: PLC0415

        try:
            return str(self.client.images.get(name).id)
        except docker.errors.ImageNotFound:
            return None

    def name_image(self, image: str, name: str) -> None:
        """Give an image, by its id or name, another name. Raises StackError HOST."""
        done = run(["docker", "tag", image, name], timeout_s=60)
        if done.status:
            raise StackError(
                f"{name} cannot be made of {image}: {reason(done)}",
                "See `docker images`, then try again.",
                Code.HOST,
            )

    def drop_image(self, name: str) -> None:
        """Remove an image's name, and the image where it has no other; one in use stays."""
        run(["docker", "image", "rm", name], timeout_s=60)

    def build(self, service: Service, *, source: Path) -> None:
        """Build the service's image with the engine's source in `source`.

        Raises:
            StackError: BUILD; the former image, if any, stays as it was.

        """
        self.check()
        began = dt.datetime.now(dt.UTC)
        # A day's resolution, so that a second build the same day changes nothing.
        created = began.strftime("%Y-%m-%dT00:00:00Z")
        base = self._base(service)
        self.compose(
            *("build", *self._names(service)),
            show=2,
            settings={
                "GLM_BASE": base,
                "GLM_CA_FILE": self._ca_file,
                "GLM_CREATED": created,
                "GLM_ENGINE_SOURCE": str(source),
            },
        )
        images = self.client.images
        record = provenance.statement(
            self.project,
            service,
            image=str(images.get(service.image).id),
            base=(base, str(images.get(base).id)),
            builder=self.client.version()["Version"],
            began=began.isoformat(timespec="seconds"),
            ended=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        )
        write_atomic(self.provenance_file(service), json.dumps(record, indent=1))

    def provenance_file(self, service: Service) -> Path:
        """Return where the record of the build of the service's present image is kept.

        By the image's id, since an update gives an image other names.
        """
        image = (self.image_id(service.image) or "none").rpartition(":")[2]
        return self.project.root / Project.state_folder / "images" / f"{image[:12]}.json"

    def _names(self, service: Service) -> tuple[str, ...]:
        """Return the Compose services that serve a quant."""
        return (service.name, gateway(service)) if self.project.gateway else (service.name,)

    def _ensure_gateway(self, service: Service) -> None:
        """Build the gateway's image unless it is built. Raises StackError: BUILD."""
        if self.project.gateway and not self.client.images.list(name=_GATEWAY_IMAGE):
            settings = {"GLM_BASE": self._base(service)}
            self.compose("build", gateway(service), show=2, settings=settings)

    @property
    def _ca_file(self) -> str:
        """The certificates that a build trusts, where a proxy opens TLS."""
        named = self.project.settings.get("GLM_CA_FILE")
        return named or os.environ.get("SSL_CERT_FILE") or os.devnull

    def audit(self, service: Service) -> None:
        """Check the service's image, whoever built it, as the build does its own.

        Raises:
            StackError: BUILD, where the image is missing or is not what the service asks for.

        """
        if not self.client.images.list(name=service.image):
            raise StackError(
                f"There is no image {service.image}.", _build_again(service), Code.BUILD
            )
        done = run(
            [
                *("docker", "buildx", "build", self.project.root / "docker", "--target=audit"),
                *("--no-cache-filter=audit", "--output=type=cacheonly", "--progress=plain"),
                f"--build-context=image=docker-image://{service.image}",
                f"--secret=id=ca,src={self._ca_file}",
                *(
                    f"--build-arg={name}={value}"
                    for name, value in {**service.build_args, "BASE": self._base(service)}.items()
                ),
            ]
        )
        if done.status:
            found = re.search(r"^#\d+ [\d.]+ The image is wrong: (.+)", done.stderr, re.MULTILINE)
            reason = found[1] if found else done.stderr.strip().rpartition("\n")[2]
            raise StackError(
                f"{service.image}: {reason.strip(' .')}.", _build_again(service), Code.BUILD
            )

    def include_model(self, service: Service) -> str:
        """Build an image with the service's model and settings inside, and return its name.

        Raises:
            StackError: DISK, where Docker's file system has no room for it; BUILD.

        """
        name = f"{service.image}-{service.quant}"
        files = gguf_header.parts(service.model_file)
        # BuildKit keeps what it was sent beside the layer made of it.
        needed = 2 * sum(file.stat().st_size for file in files) + _MARGIN_BYTES
        root = self.client.info()["DockerRootDir"]
        if Path(root).exists() and (free := shutil.disk_usage(root).free) < needed:
            raise StackError(
                f"{name} needs {needed / 1e9:.1f} GB in {root}, {free / 1e9:.1f} GB are free.",
                "Free some (`docker system df`), or serve the model from a volume: `invoke up`.",
                Code.DISK,
            )
        settings = (f"{key}={json.dumps(value)}" for key, value in service.environment.items())
        copied = [*(file.name for file in files), f"{service.model.path.parent}/"]
        lines = [
            f"FROM {service.image}",
            f"COPY --chmod=0444 --from=models {json.dumps(copied)}",
            *(f"ENV {pair}".replace("$", r"\$") for pair in settings),
            'HEALTHCHECK --interval=10s --start-period=10m CMD ["/app/probe"]',
        ]
        with tempfile.TemporaryDirectory(prefix="glm-image-") as folder:
            (Path(folder) / "Dockerfile").write_text("\n".join(lines))
            done = run(
                [
                    *("docker", "buildx", "build", folder, f"--tag={name}"),
                    f"--build-context=models={service.model_file.parent}",
                ],
                show=2,
            )
        if done.status:
            raise failure("build", done)
        return name

    def alone(self, service: Service) -> list[str]:
        """Return the command that serves the image of `include_model`: it mounts only the key."""
        key = Path(service.environment["LLAMA_ARG_API_KEY_FILE"])
        return [
            *("docker", "run", "--detach", "--read-only", "--tmpfs=/tmp:noexec"),
            *("--cap-drop=ALL", "--security-opt=no-new-privileges", f"--user={service.uid}"),
            *(f"--gpus=device={gpu}" for gpu in service.gpus),
            f"--publish={service.bind}:{service.port or ''}:{service.target_port}",
            f"--volume={service.key_file}:{key}:ro",
            f"{service.image}-{service.quant}",
        ]

    def download(self, *arguments: str, token: str | None) -> int:
        """Run the service `models` on arguments, its words shown; return its exit status.

        Raises:
            StackError: BUILD where its image cannot be built.

        """
        self.check()
        service = next(iter(self.project.services.values()))
        self.compose(
            *("build", "--quiet", "models"),
            show=2,
            settings={"GLM_BASE": self._base(service), "GLM_CA_FILE": self._ca_file},
        )
        settings = {"GLM_CA_FILE": self._ca_file}
        if token:  # through the environment: a command line is there for all to read
            settings["HF_TOKEN"] = token
        if os.isatty(2):  # so that bars come through, though it has no terminal of its own
            settings |= {"TTY_COMPATIBLE": "1", "COLUMNS": str(os.get_terminal_size(2).columns)}
        flags = ("--rm", "--no-TTY")
        return self._run("run", *flags, "models", *arguments, show=2, settings=settings).status

    def _base(self, service: Service) -> str:
        """Return a base image that is here: the configured one, or one made of Debian's packages.

        Raises:
            StackError: BUILD when neither can be had.

        """
        import docker  # noqa: PLC0415

        wanted = service.build_args["BASE"]
        for tag in (wanted, _BOOTSTRAPPED):
            if self.client.images.list(name=tag):
                return tag
        try:
            _log.info("Pulling %s.", wanted)
            self.client.images.pull(wanted)
        except docker.errors.APIError as error:
            _log.info(
                "No registry gives %s (%s); bootstrapping %s from Debian's packages.",
                wanted,
                str(error.explanation or error).rpartition(":")[2].strip(),
                _BOOTSTRAPPED,
            )
            self._bootstrap()
            return _BOOTSTRAPPED
        return wanted

    def _bootstrap(self) -> None:
        with tempfile.TemporaryDirectory(prefix="glm-base-", ignore_cleanup_errors=True) as folder:
            tool = _debootstrap(Path(folder))
            root = Path(folder) / "root"
            done = run([*tool, "--variant=minbase", "trixie", root], timeout_s=900)
            archive = Path(folder) / "root.tar"
            if not done.status:
                done = run(["tar", "-C", root, "--numeric-owner", "-cf", archive, "."])
            if done.status:
                reason = (done.stderr or done.stdout).strip().rpartition("\n")[2]
                raise StackError(
                    f"The base image could not be bootstrapped: {reason}",
                    "Run this once as root, or let a registry give debian:trixie-slim.",
                    Code.BUILD,
                )
            repository, _, tag = _BOOTSTRAPPED.partition(":")
            self.client.api.import_image(str(archive), repository=repository, tag=tag)

    def told(self) -> dict[str, str]:
        """Return what the engine and its plugins say of themselves; empty where one is missing."""
        info = json.loads(_said("info", "--format", "{{json .}}") or "{}")
        return {
            "engine": info.get("ServerVersion", ""),
            "cgroup": info.get("CgroupDriver", ""),
            "root": info.get("DockerRootDir", ""),
            "compose": _said("compose", "version", "--short"),
            "buildx": _said("buildx", "version"),
        }

    def gpus_seen(self, service: Service) -> tuple[str, ...] | None:
        """Return the UUIDs of the GPUs that a container of a service sees; None without an image.

        Raises:
            StackError: HOST, as `failure`, where it cannot be given them.

        """
        bases = (service.image, service.build_args["BASE"], _BOOTSTRAPPED)
        image = next((each for each in bases if _said("images", "--quiet", each)), None)
        if image is None:
            return None
        flags = [f"--gpus=device={gpu}" for gpu in service.gpus]
        query = ("--query-gpu=uuid", "--format=csv,noheader")
        argv = ["docker", "run", "--rm", "--network=none", *flags, "--entrypoint=nvidia-smi"]
        done = run([*argv, image, *query], timeout_s=60)
        if done.status:
            raise failure("run", done)
        return tuple(done.stdout.split())

    def execute(self, service: Service, *argv: str) -> Result:
        """Run one of the image's own programs in a container of its own, to its end."""
        entry = ["docker", "run", "--rm", "--network=none", "--entrypoint", argv[0]]
        return run([*entry, service.image, *argv[1:]], timeout_s=60)

    def tool(self, service: Service, name: str, *arguments: str, timeout_s: float) -> Result:
        """Run one of the image's programs as the server would run: settings, model, GPU, limits.

        Raises:
            StackError: LOAD when it fails, HOST when it outlasts `timeout_s`.

        """
        container = f"{self.project.name}-{service.name}-tool"
        argv = ["--no-deps", "-T", "--name", container, "--entrypoint", _CONFINE]
        try:
            self._remove(container)
            program = self.program(service, name)
            argv += [service.name, program, *arguments]
            return self.compose("run", *argv, timeout_s=timeout_s, settings=service.chosen)
        finally:  # Compose leaves it running when it is interrupted, and its network in any case
            self._remove(container)
            for network in ("default", "inside"):  # unless it is in use
                run(["docker", "network", "rm", f"{self.project.name}_{network}"])

    def _remove(self, container: str) -> None:
        run(["docker", "rm", "--force", container], timeout_s=60)

    def sibling(self, service: Service, *argv: str) -> Result:
        """Run a command of the base image in a container beside the project's own."""
        network = f"--network={self.project.name}_default"
        return run(["docker", "run", "--rm", network, self._base(service), *argv], timeout_s=60)

    def beside(
        self, service: Service, container: "Container", script: str, *arguments: str
    ) -> Result:
        """Run a bash script of the base image among a container's processes, with its rights.

        Their files are under /proc/PID/root, which the container's user may enter.
        """
        rights = container.attrs["HostConfig"]
        options = [
            f"--user={container.attrs['Config']['User']}",
            f"--privileged={str(rights['Privileged']).lower()}",
            *(f"--cap-drop={name}" for name in rights["CapDrop"] or ()),
            *(f"--cap-add={name}" for name in rights["CapAdd"] or ()),
            *(f"--security-opt={option}" for option in rights["SecurityOpt"] or ()),
        ]
        argv = ["docker", "run", "--rm", "--network=none", f"--pid=container:{container.id}"]
        command = [self._base(service), "bash", "-c", script, *arguments]
        return run([*argv, *options, *command], timeout_s=60)

    def program(self, service: Service, name: str) -> str:  # noqa: ARG002
        """Return the path of one of the engine's programs in the image."""
        return f"/app/{name}"

    def container(self, service: Service) -> "Container | None":
        """Return the service's container in this project, running or not."""
        return self._container(service.name)

    def gateway(self, service: Service) -> "Container | None":
        """Return the container of the gateway before the service, running or not."""
        return self._container(gateway(service))

    def _container(self, name: str) -> "Container | None":
        labels = [
            f"com.docker.compose.project={self.project.name}",
            f"com.docker.compose.service={name}",
            "com.docker.compose.oneoff=False",
        ]
        found = self.client.containers.list(all=True, filters={"label": labels})
        if not found:
            return None
        folder = Path(found[0].labels["com.docker.compose.project.working_dir"])
        if folder.exists() and folder.resolve() != self.project.root.resolve():  # one moved is ours
            raise StackError(
                f"{name} of {folder} has the same name, {self.project.name}.",
                "Set another GLM_NAME in this deployment's .env.",
                Code.USAGE,
            )
        return found[0]

    def start(self, service: Service, *, key: str) -> Server:
        """Create and start the service's container.

        Raises:
            StackError: HOST, PORT or LOAD, by what Docker says; BUILD for its gateway's image.

        """
        self._ensure_gateway(service)
        arguments = ("up", "--detach", "--no-build", "--force-recreate", *self._names(service))
        self.compose(*arguments, settings=service.chosen)
        return self._begun(service, key=key)

    def _begun(self, service: Service, *, key: str) -> Server:
        def begun() -> Server | None:
            server = self.find(service, key=key)
            if server is None:
                raise _gone(service.name)
            return server if server.processes or server.ended() else None

        # Its init is there a moment before the server is.
        return wait_until(begun, timeout_s=_INIT_LIMIT_S, what=f"{service.name} has no process")

    def restart(self, service: Service, *, key: str) -> Server:
        """Restart the service's server, as it was started, so that it reads its key file anew.

        Its gateway does, too.
        """
        self.compose("restart", *self._there(service))
        return self._begun(service, key=key)

    def start_gateway(self, service: Service) -> "Container":
        """Create and start the gateway alone, before whatever `SERVER` names.

        Raises:
            StackError: HOST, PORT, BUILD or LOAD, by what Docker says.

        """
        self._ensure_gateway(service)
        self.compose("up", "--detach", "--no-build", gateway(service))
        container = self.gateway(service)
        if container is None:
            raise _gone(gateway(service))
        return container

    def find(self, service: Service, *, key: str) -> Server | None:
        """Return the service's server, running or ended; None when it has no container."""
        container = self.container(service)
        if container is None:
            return None
        front = self.gateway(service)
        ports = (front or container).attrs["NetworkSettings"]["Ports"] or {}
        published = ports.get(f"{service.target_port}/tcp") or [{}]
        port = published[0].get("HostPort", service.port)
        host = "127.0.0.1" if ipaddress.ip_address(service.bind).is_unspecified else service.bind
        init = container.attrs["State"]["Pid"]
        restarts = container.attrs["RestartCount"]
        certificate = self.project.certificate if front else None
        processes = map(Process.of, children(init) if init else ())
        pairs = (pair.partition("=") for pair in container.attrs["Config"]["Env"])
        settings = {name: value for name, _, value in pairs}
        return Server(
            runtime=self.name,
            service=service.as_started(settings),
            url=f"{'https' if certificate else 'http'}://{host}:{port}" if port else "",
            key=key,
            certificate=certificate,
            gateway=front is not None,
            processes=tuple(process for process in processes if process),
            logs=lambda lines: container.logs(tail=lines).decode(errors="replace"),
            ended=lambda: (
                _ended(self.client, container, restarts)
                or (_gateway_ended(self.client, front) if front else None)
            ),
            restarting=container.attrs["State"]["Status"] == "restarting",
            stopped=lambda: _stopped(self.client, container),
            restarts=restarts,
            image=f"{service.image} {container.attrs['Image'].removeprefix('sha256:')[:12]}",
        )

    def left(self) -> "Iterator[tuple[str, str, int, Callable[[], None]]]":
        """Yield what of this project is here: kind, name, bytes, and what removes it.

        Images are those of the services' names that carry our label.
        """
        ours = [
            f"com.docker.compose.project={self.project.name}",
            f"com.docker.compose.project.working_dir={self.project.root}",
        ]
        for container in self.client.containers.list(all=True, filters={"label": ours}):
            name = str(container.name)
            yield "container", name, 0, partial(self._delete, "container", "rm", "--force", name)
        for network in self.client.networks.list(filters={"label": ours[:1]}):
            name = str(network.name)
            yield "network", name, 0, partial(self._delete, "network", "rm", name)
        repositories = {
            service.image.rpartition(":")[0] for service in self.project.services.values()
        }
        for image in self.client.images.list(filters={"label": _LABEL}):
            for tag in image.tags:
                if tag.rpartition(":")[0] in repositories:
                    remove = partial(self._delete, "image", "rm", tag)
                    yield "image", tag, image.attrs["Size"], remove

    def _delete(self, *arguments: str) -> None:
        done = run(["docker", *arguments], timeout_s=60)
        if done.status:
            raise StackError(
                f"{arguments[-1]} cannot be removed: {reason(done)}",
                "Stop what uses it, then try again.",
                Code.HOST,
            )

    def follow(self, service: Service) -> None:
        """Show the service's log as it grows, until interrupted."""
        options = ("--follow", "--no-log-prefix", "--tail", "50")
        self.compose("logs", *options, *self._there(service), show=1)

    def stop(self, service: Service) -> bool:
        """Stop and remove the service's container and gateway; return whether there was one."""
        there = self._there(service)
        if there:
            self.compose("down", "--timeout", f"{service.stop_grace_s:.0f}", *there)
        return bool(there)

    def _there(self, service: Service) -> list[str]:
        """Return the Compose services of a quant that have a container, whatever was set."""
        return [name for name in (service.name, gateway(service)) if self._container(name)]


def gateway(service: Service) -> str:
    """Return the name of the Compose service that stands before a quant's server."""
    return f"gateway-{service.quant}"


def _gateway_ended(client: "DockerClient", container: "Container") -> str | None:
    """Say how a gateway ended and why, or None."""
    how = _ended(client, container, container.attrs["RestartCount"])
    if how is None:
        return None
    lines = container.logs(tail=50).decode(errors="replace").splitlines()
    alerts = [line for line in lines if "[ALERT]" in line]
    return f"has no gateway, which {how}: {(alerts or lines or ['it said nothing'])[0]};"


def _gone(name: str) -> StackError:
    return StackError(
        f"{name} was started and its container is gone.",
        "Somebody else removes containers on this machine; try again.",
        Code.LOAD,
    )


def _build_again(service: Service) -> str:
    return f"Build it: `invoke build --docker --quant {service.quant}`."


def _said(*arguments: str) -> str:
    done = run(["docker", *arguments], timeout_s=_ANSWER_LIMIT_S)
    return "" if done.status else done.stdout.strip()


def _ended(client: "DockerClient", container: "Container", restarts: int) -> str | None:
    """Say how a container ended, or None; one brought back by its restart policy ended too."""
    import docker  # noqa: PLC0415

    try:
        container.reload()
    except docker.errors.NotFound:
        return "was removed"
    state: dict[str, Any] = container.attrs["State"]
    if state["Status"] == "running" and container.attrs["RestartCount"] == restarts:
        return None
    oom, code = state["OOMKilled"], state["ExitCode"]
    if state["Status"] == "running":  # the state is that of the new run
        oom, code = _last_end(client, container)
    if oom:
        return f"was killed by its memory limit (exit {code})"
    return f"ended (exit {code}) {state['Error']}".strip()


def _last_end(client: "DockerClient", container: "Container") -> tuple[bool, str]:
    """Return whether a container that was brought back hit its memory limit, and its exit code."""
    told = _events(client, container=container.id, event=["die", "oom"])
    codes = [event["Actor"]["Attributes"].get("exitCode", "unknown") for event in told]
    return "oom" in {event["Action"] for event in told[-2:]}, codes[-1] if codes else "unknown"


def _stopped(client: "DockerClient", container: "Container") -> bool:
    """Return whether `docker stop` ended it, as far as the engine remembers.

    An engine that was killed ends, as it starts, what still ran, and that looks the same; but then
    nothing else of the container comes before it.
    """
    told = _events(client)
    own = [event["Action"] for event in told if event["Actor"]["ID"] == container.id]
    return "stop" in own and (len(told) >= _REMEMBERED or own[0] != "kill")


def _events(client: "DockerClient", **filters: Any) -> list[dict[str, Any]]:
    """Return what the engine remembers: its last 256 events, health checks too.

    By no end in time, which would go by a clock that may have been set since.
    """
    told = client.events(since=0, decode=True, filters=filters)
    threading.Timer(_EVENTS_S, told.close).start()  # what it remembers comes at once
    return list(told)


def _knock() -> None:
    """Connect to the engine's socket, since the SDK leaks one that does not. Raises OSError."""
    where = os.environ.get("DOCKER_HOST", _SOCKET)
    if where.startswith("unix://"):
        with socket.socket(socket.AF_UNIX) as door:
            door.settimeout(_ANSWER_LIMIT_S)
            door.connect(where.removeprefix("unix://"))


def _no_answer(evidence: str) -> StackError:
    where = os.environ.get("DOCKER_HOST", _SOCKET)
    if "PermissionError" in evidence:
        return StackError(
            f"This user may not talk to the Docker engine at {where}.",
            "Join the docker group (`sudo usermod -aG docker $USER`) and log in again.",
            Code.HOST,
        )
    if "imed out" in evidence or "imeout" in evidence:
        return StackError(
            f"The Docker engine at {where} hangs: no answer within {_ANSWER_LIMIT_S} s.",
            "Restart it (`sudo systemctl restart docker`).",
            Code.HOST,
        )
    return NoEngineError(
        f"No Docker engine answers at {where}.",
        "Start it (`sudo systemctl start docker`), or use --native.",
        Code.HOST,
    )


_FAILURES = (
    (
        "could not select device driver",
        "install NVIDIA's container toolkit, `sudo nvidia-ctk runtime configure`, restart Docker",
        Code.HOST,
    ),
    ("port is already allocated", "free the port, or set another in .env", Code.PORT),
    ("address already in use", "free the port, or set another in .env", Code.PORT),
    (
        "cannot assign requested address",
        "set GLM_BIND in .env to an address of this machine",
        Code.PORT,
    ),
    ("no space left on device", "free disk space (`docker system df`)", Code.DISK),
    ("unknown flag: --project-name", "install the Compose plugin, 2.20.2 or later", Code.HOST),
)


def failure(verb: str, done: Result) -> StackError:
    """Turn a failed `docker compose` into a cause, a remedy and a code."""
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["see above"]
    for sign, remedy, code in _FAILURES:
        for line in lines:
            if sign in line:
                return StackError(f"docker compose {verb}: {line}", f"Please {remedy}.", code)
    said = (reason(done) if verb == "run" else lines[-1]).removeprefix(
        "Error response from daemon: "
    )
    code = Code.BUILD if verb == "build" else Code.LOAD
    remedy = "Read the lines above." if verb == "build" else "`invoke doctor` looks for the reason."
    return StackError(f"docker compose {verb} failed ({done.status}): {said}", remedy, code)


def _debootstrap(folder: Path) -> list[str | Path]:
    """Return a command that runs debootstrap, unpacked into `folder` where it is not installed."""
    try:
        run(["debootstrap", "--version"])
    except StackError:
        (folder / "lists" / "partial").mkdir(parents=True)
        # apt's own user may not enter our folder.
        own = ["-o", f"Dir::State::Lists={folder}/lists", "-o", "APT::Sandbox::User=root"]
        run(["apt-get", *own, "update"])
        run(["apt-get", *own, "download", "debootstrap"], cwd=folder)
        for package in folder.glob("debootstrap_*.deb"):
            run(["dpkg-deb", "-x", package, folder])
        share = f"{folder}/usr/share/debootstrap"
        return ["env", f"DEBOOTSTRAP_DIR={share}", folder / "usr/sbin/debootstrap"]
    return ["debootstrap"]
