"""Known weaknesses of what we ship and use, from those who publish them, less what we excepted.

PyPI tells of Python packages (through pip-audit), Debian's archive of its own: a package with an
update in the archive, the security suite first, is one that should have been taken.
"""

import datetime as dt
import json
import lzma
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml

from stack import host

ARCHIVE = "https://deb.debian.org"
SUITES = ("debian-security/dists/trixie-security", "debian/dists/trixie")
LONGEST = dt.timedelta(days=90)
"""How long an exception may last."""


class NoDataError(Exception):
    """Those who publish weaknesses cannot be asked from here."""


@dataclass(frozen=True)
class Weakness:
    """One that is known: its name, the package and version that have it."""

    id: str
    package: str
    version: str


@dataclass(frozen=True)
class Excepted:
    """A weakness that is tolerated for a while, and why."""

    id: str
    package: str
    until: dt.date
    reason: str


def exceptions(path: Path) -> list[Excepted]:
    """Read the file of exceptions. Raises ValueError for one without a reason."""
    found = [Excepted(**each) for each in yaml.safe_load(path.read_text()) or ()]
    for each in found:
        if len(each.reason.split()) < 3:
            raise ValueError(f"{each.id} of {each.package} needs a reason")
    return found


def judge(found: Iterable[Weakness], excepted: Iterable[Excepted], *, today: dt.date) -> list[str]:
    """Return what must be done: weaknesses not excepted, and exceptions that ended or never do."""
    excepted = list(excepted)
    known = {(each.id, each.package) for each in excepted}
    wrong = [
        f"{each.package} {each.version}: {each.id}"
        for each in found
        if (each.id, each.package) not in known
    ]
    for each in excepted:
        if each.until < today:
            wrong.append(f"{each.package}: the exception of {each.id} ended on {each.until}")
        elif each.until > today + LONGEST:
            wrong.append(f"{each.package}: the exception of {each.id} lasts beyond 90 days")
    return wrong


def python(requirements: Path) -> list[Weakness]:
    """Ask PyPI of each locked requirement. Raises NoDataError."""
    argv = ["pip-audit", "--format=json", "--progress-spinner=off", "--disable-pip", "--no-deps"]
    done = host.run([*argv, f"--requirement={requirements}"], timeout_s=300)
    try:
        asked = json.loads(done.stdout)["dependencies"]
    except ValueError as error:
        raise NoDataError(host.reason(done)) from error
    if asked and all("skip_reason" in each for each in asked):
        raise NoDataError(asked[0]["skip_reason"])
    unknown = [{"id": "PyPI does not know it"}]
    return [
        Weakness(weakness["id"], each["name"], each.get("version", ""))
        for each in asked
        for weakness in each.get("vulns", unknown)
    ]


def debian(bill: str) -> list[Weakness]:
    """Hold each Debian package of a bill of materials against the archive. Raises NoDataError."""
    there = {
        each["name"]: each["version"]
        for each in json.loads(bill)["components"]
        if each["purl"].startswith("pkg:deb/")
    }
    found = []
    for suite in SUITES:
        for name, version in _newest(suite).items():
            if name in there and _older(there[name], version):
                found.append(Weakness(f"{version} in {Path(suite).name}", name, there[name]))
    return found


def _newest(suite: str) -> Mapping[str, str]:
    """Return the version of each package of a suite."""
    try:
        answer = httpx.get(f"{ARCHIVE}/{suite}/main/binary-amd64/Packages.xz", timeout=60)
        text = lzma.decompress(answer.raise_for_status().content).decode()
    except (httpx.HTTPError, lzma.LZMAError) as error:
        raise NoDataError(str(error)) from error
    return dict(re.findall(r"(?m)^Package: (.+)\n(?:.+\n)*?Version: (.+)$", text))


def _older(one: str, other: str) -> bool:
    return host.run(["dpkg", "--compare-versions", one, "lt", other]).status == 0
