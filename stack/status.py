"""What each server is doing, in a word, with the figures that an operator asks for first.

Nothing here generates or takes a slot, so no cached prompt is lost by looking: only /health, /props
and /metrics are asked. The engine answers /metrics between the batches and while one is computed.
Its gauges are averages since whoever asked last: another scraper should use its counters.
"""

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from stack import client, fit, gpu, integrity, runtime
from stack.config import Project, Service
from stack.errors import StackError
from stack.gpu import Gpu
from stack.host import write_atomic
from stack.server import Server

STUCK_S = 60
_PATIENCE_S = 3
_FRESH_S = 10
_MOMENT_S = 0.5


@dataclass(frozen=True, kw_only=True)
class State:
    """What a service is, in a word, with the reason where it is not plain; None is unknown."""

    quant: str
    runtime: str = ""
    state: str
    """stopped, starting, loading, ready, busy, stuck, on the CPU, unhealthy, not answering, GPU
    lost, ended, or crashed so many times."""
    detail: str = ""
    url: str = ""
    model: str = ""
    trust: str = ""
    """`verified` against the lock, `stand-in`, `random`, `own`, or why not."""
    context: int = 0
    slots: int = 0
    running: int | None = None
    """Requests in slots."""
    waiting: int | None = None
    """Requests that no slot has taken yet."""
    tokens_s: float | None = None
    """Batches a second times the requests in them: of all slots together, and about."""
    vram_mib: int | None = None
    vram_plan_mib: int | None = None
    up_s: float | None = None
    restarts: int = 0
    engine: str = ""
    image: str = ""


@dataclass(frozen=True)
class Sample:
    """One look at a server's counters. Times are of `time.monotonic`, which processes share.

    `still_s` is since when requests run and nothing was decoded. From a million on the server
    rounds its counters to six digits, which hides no minute of work below 1e9 batches.
    """

    server: str
    time_s: float
    running: int
    waiting: int
    decodes: float
    still_s: float

    def after(self, before: "Sample | None") -> "Sample":
        """Return this look in the light of an earlier one at the same server."""
        same = before and (before.server, before.decodes) == (self.server, self.decodes)
        if before and same and before.running + before.waiting and self.running + self.waiting:
            return replace(self, still_s=before.still_s)
        return self


class Looks:
    """Looks at servers, and keeps what it saw: one look cannot tell a stuck server from a busy one.

    All commands of a project share the file; a corrupt one is a first look.
    """

    def __init__(self, project: Project) -> None:
        """Read what was seen before."""
        self.project = project
        self._file = project.state / "samples.json"
        self._plans: dict[tuple[object, ...], int | None] = {}
        self.samples: dict[str, Sample] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            kept = json.loads(self._file.read_text())
            self.samples = {name: Sample(**each) for name, each in kept.items()}

    def all(self) -> tuple[State, ...]:
        """Return the state of every service, in each runtime that has it, or `stopped`."""
        found, runtimes = [], runtime.present(self.project)
        for quant, service in self.project.services.items():
            servers = [server for _, server in runtime.servers_of(service, runtimes)]
            states = [self.state(server) for server in servers]
            found += states or [State(quant=quant, state="stopped")]
        return tuple(found)

    def state(self, server: Server, *, stuck_s: float = STUCK_S) -> State:
        """Return what a server is doing, in its own words where it answers."""
        known = State(
            quant=server.service.quant,
            runtime=server.runtime,
            state="",
            restarts=server.restarts,
            image=server.image,
        )
        if how := server.ended():
            word = f"crashed {server.restarts + 1} times" if server.restarts else "ended"
            return replace(known, state=word, detail=f"{how}. {client.evidence(server)}")
        ages = [age for process in server.processes if (age := process.age_s()) is not None]
        known = replace(known, url=server.url, up_s=max(ages, default=None))
        if server.service.gpus and (reason := gpu.lost(server.service.gpus[0])):
            return replace(known, state="GPU lost", detail=reason)
        word = client.health(server, timeout_s=_PATIENCE_S) if server.url else "starting"
        if word != "ready":
            return replace(known, state=word)
        try:
            says = client.props(server)
            sample = self._sample(server)
            return self._told(self._active(known, server, sample, stuck_s), server, says)
        except StackError as error:
            return replace(known, state="unhealthy", detail=error.cause)
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__} {error}".strip()
            detail = f"/health is well, /props or /metrics is not: {why}."
            return replace(known, state="unhealthy", detail=detail)

    def _active(self, known: State, server: Server, sample: Sample | None, stuck_s: float) -> State:
        if sample is None:
            return replace(known, state="ready", detail="it has no /metrics")
        name = f"{known.quant} {known.runtime}"
        before = self.samples.get(name)
        if sample.running and (not before or sample.time_s - before.time_s > _FRESH_S):
            sample = before = self._keep(name, sample.after(before))
            time.sleep(_MOMENT_S)  # a rate takes two looks
            sample = self._sample(server) or sample
        sample = self._keep(name, sample.after(before))
        tokens_s = None if sample.running else 0.0
        if before and before.server == sample.server and sample.time_s > before.time_s:
            decodes_s = (sample.decodes - before.decodes) / (sample.time_s - before.time_s)
            tokens_s = decodes_s * sample.running
        pending = sample.running + sample.waiting
        still_s = sample.time_s - sample.still_s if pending else 0
        return replace(
            known,
            state="stuck" if pending and still_s >= stuck_s else "busy" if pending else "ready",
            detail=f"nothing decoded for {still_s:.0f} s" if still_s > _PATIENCE_S else "",
            running=sample.running,
            waiting=sample.waiting,
            tokens_s=tokens_s,
        )

    def _told(self, known: State, server: Server, says: Mapping[str, Any]) -> State:
        """Add what the server says of itself, and what lock, plan and driver say of its model."""
        service, model = server.service, Path(says["model_path"]).name
        told = replace(
            known,
            model=model,
            trust=_trust(server) if model == service.model.path.name else "not the configured file",
            context=says["default_generation_settings"]["n_ctx"],
            slots=says["total_slots"],
            engine=says["build_info"],
        )
        device = _device(server)
        if device is None:
            return told
        pids = [process.pid for process in server.processes]
        used_mib, planned_mib = gpu.used_by(pids, device.uuid), self._planned_mib(service)
        told = replace(told, vram_mib=used_mib, vram_plan_mib=planned_mib)
        why = fit.off_gpu(server, device)
        return replace(told, state="on the CPU", detail=why) if why else told

    def _planned_mib(self, service: Service) -> int | None:
        key = (service.quant, *service.environment.items())
        if key not in self._plans:  # a header takes a while, and stays
            self._plans[key] = None
            with contextlib.suppress(StackError):
                self._plans[key] = fit.plans([service])[0].ledger.total_mib
        return self._plans[key]

    def _sample(self, server: Server) -> Sample | None:
        with client.session(server, timeout_s=_PATIENCE_S) as session:
            found = client.metrics(session)
        if not found:
            return None
        now = time.monotonic()
        running, waiting, decodes = (
            found[name] for name in ("requests_processing", "requests_deferred", "n_decode_total")
        )
        which = f"{server.url} {[(each.pid, each.started) for each in server.processes]}"
        return Sample(which, now, int(running), int(waiting), decodes, now)

    def _keep(self, name: str, sample: Sample) -> Sample:
        self.samples[name] = sample
        kept = {name: asdict(each) for name, each in self.samples.items()}
        with contextlib.suppress(OSError):  # another user may look, too
            write_atomic(self._file, json.dumps(kept, indent=1))
        return sample


def _device(server: Server) -> Gpu | None:
    wanted = {*server.service.gpus}
    return next((each for each in gpu.gpus() if wanted & {str(each.index), each.uuid}), None)


def _trust(server: Server) -> str:
    try:
        listed = integrity.listing([server.service])
    except StackError as error:
        return error.cause
    states = {each.state for each in listed if each.quant}
    return states.pop() if len(states) == 1 else "partly verified"
