"""Tries every way that we know to open a connection: python calls.py ADDRESS PORT; prints JSON.

Each way is told by how it ended: `ok`, or the name of the error.
"""

import ctypes
import errno
import json
import socket
import sys
from collections.abc import Callable

ADDRESS, PORT = sys.argv[1], int(sys.argv[2])
SCTP, MPTCP, MSG_FASTOPEN = 132, 262, 0x20000000
IO_URING_SETUP, PIDFD_GETFD, X32_CONNECT = 425, 438, 0x40000000 + 42


def system_call(number: int, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "")


def message(flags: int) -> None:
    with socket.socket() as tcp:
        tcp.sendmsg([b"GET / HTTP/1.0\r\n\r\n"], [], flags, (ADDRESS, PORT))


def packet(flags: int, kind: int = socket.SOCK_STREAM) -> None:
    with socket.socket(socket.AF_INET, kind) as any_:
        any_.sendto(b"GET / HTTP/1.0\r\n\r\n", flags, (ADDRESS, PORT))


def open_(family: int, kind: int, protocol: int = 0) -> None:
    socket.socket(family, kind, protocol).close()


def local() -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as unix:
        listener.bind("")  # a name of the kernel's choice
        listener.listen()
        unix.connect(listener.getsockname())


WAYS: dict[str, Callable[[], object]] = {
    "tcp": lambda: socket.create_connection((ADDRESS, PORT), timeout=3).close(),
    "udp": lambda: packet(0, socket.SOCK_DGRAM),
    "fast-open": lambda: packet(MSG_FASTOPEN),
    "fast-open-message": lambda: message(MSG_FASTOPEN),
    "udp-ipv6": lambda: open_(socket.AF_INET6, socket.SOCK_DGRAM),
    "icmp": lambda: open_(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP),
    "mptcp": lambda: open_(socket.AF_INET, socket.SOCK_STREAM, MPTCP),
    "sctp": lambda: open_(socket.AF_INET, socket.SOCK_STREAM, SCTP),
    "vsock": lambda: open_(socket.AF_VSOCK, socket.SOCK_STREAM),
    "unix": local,
    "io-uring": lambda: system_call(IO_URING_SETUP, 1, 0),
    "another-process": lambda: system_call(PIDFD_GETFD, -1, 0, 0),
    "x32": lambda: system_call(X32_CONNECT, 0, 0, 0),
}


def tried(way: Callable[[], object]) -> str:
    try:
        way()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "ok"


if __name__ == "__main__":
    print(json.dumps({name: tried(way) for name, way in WAYS.items()}))  # noqa: T201
