"""Says what an image was built from: an in-toto statement with SLSA's provenance predicate.

It is not signed: it tells what this machine did to who trusts this machine.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from stack.config import Engine, Project, Service

BUILD_TYPE = "https://docs.docker.com/build/"


def statement(
    project: Project,
    service: Service,
    *,
    image: str,
    base: tuple[str, str],
    builder: str,
    began: str,
    ended: str,
) -> dict[str, Any]:
    """Describe the build of a service's image.

    `image` is the id of what came of it, `base` the name and id of the base image (`sha256:…`),
    `builder` the Docker engine's version; `began` and `ended` are times in RFC 3339.
    """
    engine, folder = project.engine, project.root / "docker"
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": service.image, "digest": _digest(image)}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"dockerfile": "Dockerfile", "args": {**service.build_args}},
                "resolvedDependencies": [
                    _source(engine),
                    {"uri": f"docker-image://{base[0]}", "digest": _digest(base[1])},
                    *(_file(path) for path in sorted(folder.iterdir()) if path.is_file()),
                ],
            },
            "runDetails": {
                "builder": {"id": "https://mobyproject.org/", "version": {"docker": builder}},
                "metadata": {"startedOn": began, "finishedOn": ended},
            },
        },
    }


def _source(engine: Engine) -> dict[str, Any]:
    """Describe the engine's source; that of a folder is no commit of any repository."""
    if not re.fullmatch(r"[0-9a-f]{40}", engine.commit):
        return {"uri": f"urn:glm-engine:{engine.commit}"}
    uri = f"git+{engine.repository}@{engine.commit}"
    return {"uri": uri, "digest": {"gitCommit": engine.commit}}


def _digest(identity: str) -> dict[str, str]:
    kind, _, value = identity.partition(":")
    return {kind: value}


def _file(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"uri": f"docker/{path.name}", "digest": {"sha256": digest}}
