"""The API key: made once, checked before every start, never optional.

The server treats an empty key file as "no authentication" and a key with a blank at its end as a
key that no client can send, so both are refused here.
"""

import ipaddress
import os
import secrets
import ssl
from pathlib import Path

from stack.config import Service
from stack.errors import Code, StackError
from stack.host import write_atomic


def make(service: Service) -> Path:
    """Write 32 random bytes as hex for the service's user alone, unless a key is there.

    Returns its path. As root the file is given to the container's user; otherwise that user is
    the caller (GLM_UID).
    """
    if not service.key_file.exists():
        _write(service, [secrets.token_hex(32)])
    return service.key_file


def rotate(service: Service) -> None:
    """Put a new key first; those before it stay valid. Raises as `read`."""
    _write(service, [secrets.token_hex(32), *_keys(service)])


def retire(service: Service) -> int:
    """Drop every key but the first; return how many. Raises as `read`."""
    first, *others = _keys(service)
    _write(service, [first])
    return len(others)


def _write(service: Service, keys: list[str]) -> None:
    owner = service.uid if os.getuid() == 0 else None
    text = "".join(f"{key}\n" for key in keys)
    write_atomic(service.key_file, text, mode=0o600, owner=owner)


def read(service: Service) -> str:
    """Return the first key of the service's key file.

    Raises:
        StackError: USAGE, for a file that would mean no key, an unusable one, or one that the
            server's user cannot read.

    """
    return _keys(service)[0]


def _keys(service: Service) -> list[str]:
    path = service.key_file
    try:
        raw = path.read_bytes().decode("ascii")
        status = path.stat()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not ASCII"
        raise _unusable(service, f"cannot be read: {reason}") from error
    keys = [line for line in raw.split("\n") if line and not line.startswith("#")]
    if not keys:
        raise _unusable(service, "holds no key, which would mean no authentication")
    for key in keys:
        if not key.isprintable() or any(c.isspace() or c == "," for c in key):
            raise _unusable(service, "has a blank, a comma or a carriage return in a key")
    _require_readable("key file", path, status, service.uid)
    return keys


def require_certificate(path: Path, service: Service) -> None:
    """Make sure that the gateway can show a certificate: there, with its key, readable by its user.

    Raises:
        StackError: USAGE.

    """
    try:
        status = path.stat()
        ssl.create_default_context().load_cert_chain(path, password="")
    except OSError as error:  # an SSLError is one
        raise StackError(
            f"GLM_TLS_FILE={path} is no certificate with its private key: {error.strerror}.",
            "Put both into one PEM file, the certificate first, the key without a passphrase.",
            Code.USAGE,
        ) from error
    _require_readable("certificate", path, status, service.uid)


def _require_readable(what: str, path: Path, status: os.stat_result, uid: int) -> None:
    readable = 0o400 if status.st_uid == uid else 0o004
    if not status.st_mode & readable:
        raise StackError(
            f"The {what} {path} cannot be read by the server's user {uid}.",
            f"chown {uid} {path}",
            Code.USAGE,
        )


def require(service: Service, *, first_start: bool) -> str:
    """Return the key; where there is none, make it if this may be the first start.

    Raises:
        StackError: USAGE, as `read`; also when there is none and the server would be published
            beyond loopback.

    """
    if not service.key_file.exists():
        require_reachable(service, first_start=first_start)
        make(service)
    return read(service)


def require_reachable(service: Service, *, first_start: bool) -> None:
    """Make sure that a service with no key may have one made at its first start.

    Raises:
        StackError: USAGE, where it would be published beyond loopback.

    """
    if not first_start or not ipaddress.ip_address(service.bind).is_loopback:
        raise StackError(
            f"There is no API key in {service.key_file} for {service.name} on {service.bind}.",
            "Make one with `invoke key`, and give it to your clients.",
            Code.USAGE,
        )


def _unusable(service: Service, why: str) -> StackError:
    return StackError(
        f"The key file {service.key_file} {why}.",
        "Remove it and run `invoke key`, which writes a new one.",
        Code.USAGE,
    )
