"""Profiles: settings that `invoke tune` found best, each for one card, engine, file and clients.

The project's own are in `profiles/`, those of this deployment, which come first, in
`.state/profiles/`. Here they are read and chosen; `bench.tune` makes them.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from stack import config, gpu, host, integrity
from stack.config import Project, Service, Settings

FOLDER = "profiles"
_TOLD = 2
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """What was tuned: a measurement of another one says nothing."""

    quant: str
    card: str
    """The GPU's name, or the CPU's and its cores."""
    engine: str
    """Build, commit and patches."""
    model: str
    """The file's name with the SHA-256 of its bytes, or the recipe of random weights."""


@dataclass(frozen=True)
class Profile:
    """Settings for a number of clients, and where they are from."""

    path: Path
    """From the project's root."""
    subject: Subject
    clients: int
    """The most of those that it was tuned with."""
    at: str
    """UTC, ISO 8601."""
    settings: Settings
    """By the names of `.env`, those that were set there among them."""


@dataclass(frozen=True)
class Selection:
    """The profile that holds, or why the others do not."""

    profile: Profile | None = None
    said: str = ""


def subject(project: Project, service: Service) -> Subject:
    """Say what would be tuned, or served, now. Raises StackError USAGE or INTEGRITY for its file.

    A file of ours is hashed (tiny in 10 ms); a locked one is what the lock says, which is verified
    before it is served.
    """
    device = next(iter(gpu.of(service)), None)
    engine = project.engine
    return Subject(
        quant=service.quant,
        card=device.name if device else host.processor(),
        engine=f"b{engine.build} {engine.commit[:12]}, patches {engine.patches}",
        model=f"{service.model_file.name}, {_identity(service)}",
    )


def _identity(service: Service) -> str:
    if service.model_file.name.endswith(integrity.STAND_IN):
        return f"random weights {service.model.random}"
    found = integrity.copies(service)
    if integrity.is_made_here(service):
        hashes = [integrity.hash_file(copy.path).sha256 for copy in found if copy.stamp]
    else:
        hashes = [copy.locked.sha256 for copy in found if copy.locked]
    if len(hashes) < len(found):
        return "no file yet"
    return f"SHA-256 {hashes[0] if len(hashes) == 1 else _joined(hashes)}"


def _joined(hashes: list[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def select(
    profiles: Iterable[Profile],
    wanted: Subject,
    *,
    clients: int,
    service: Service,
    pinned: Settings,
) -> Selection:
    """Choose the first profile that holds: of the same subject, for as many clients, no other pin.

    Profiles of other quants are not spoken of.
    """
    near = [each for each in profiles if each.subject.quant == wanted.quant]
    said = []
    for each in near:
        why = _unlike(each, wanted, clients, service, pinned)
        if not why:
            return Selection(each)
        said.append(f"{each.path} is {why}")
    more = f"; and {len(said) - _TOLD} more" if len(said) > _TOLD else ""
    return Selection(said=f"no profile holds: {'; '.join(said[:_TOLD])}{more}" if said else "")


def _unlike(
    profile: Profile, wanted: Subject, clients: int, service: Service, pinned: Settings
) -> str:
    ours = asdict(wanted)
    for name, theirs in asdict(profile.subject).items():
        if theirs != ours[name]:
            return f"of another {name} ({theirs})"
    if profile.clients != clients:
        return f"for up to {profile.clients}, not {clients}, clients"
    for name, value in profile.settings.items():
        if pinned.get(name, value) != value:
            return f"with {name}={value}, and {pinned[name]} is set"
        try:
            config.check_setting(name, value, known=set(service.settable))
        except ValueError as error:
            return f"not usable: {error}"
    return ""


def chosen(project: Project, service: Service) -> Selection:
    """Choose from the profiles of a project for what a service is now."""
    found = profiles(project)
    if not any(each.subject.quant == service.quant for each in found):
        return Selection()
    wanted = subject(project, service)
    return select(found, wanted, clients=project.clients, service=service, pinned=project.settings)


def own_folder(project: Project) -> Path:
    """Return where this deployment's own profiles are."""
    return project.state / FOLDER


def profiles(project: Project) -> tuple[Profile, ...]:
    """Read the profiles: this deployment's own first, the newest first; none that is broken."""
    found: list[Profile] = []
    for folder in (own_folder(project), project.root / FOLDER):
        read = [made for path in sorted(folder.glob("*.json")) if (made := _read(project, path))]
        found += sorted(read, key=lambda each: each.at, reverse=True)
    return tuple(found)


def _read(project: Project, path: Path) -> Profile | None:
    try:
        raw = json.loads(path.read_text())
        settings: Mapping[str, str] = raw["settings"]
        return Profile(
            path=path.relative_to(project.root),
            subject=Subject(**raw["subject"]),
            clients=max(raw["clients"]),
            at=str(raw["at"]),
            settings={str(name): str(value) for name, value in settings.items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s is no profile: %s.", path, error)
        return None
