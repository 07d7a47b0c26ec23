"""Another user of the machine, who tries every file, port and process of a pool; runs as root and becomes `nobody`.

    python intruder.py < order.json

Prints what could be read, written or talked to. Nothing else may be imported once the user is another one.
"""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401  # a socket asks for it, when it is too late
import json
import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator

NOBODY = 65534
METHODS = (
    "InternalKVGcsService/InternalKVKeys",
    "ActorInfoGcsService/GetAllActorInfo",
    "NodeManagerService/GetNodeStats",
    "ObjectManagerService/Pull",
    "ObjectManagerService/Push",
    "CoreWorkerService/GetCoreWorkerStats",
    "CoreWorkerService/PushTask",
)
"""Of Ray's services; each port is asked for all of them, with an empty request."""
HTTP = b"POST /get_or_create_runtime_env HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
WAIT_S = 1.0


def main() -> None:
    """Try all that the order names: `paths`, `ports`, `pids`."""
    order = json.load(sys.stdin)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    found = {
        "paths": [done for path in order["paths"] for done in entered(path)],
        "ports": {port: talked(port) for port in order["ports"]},
        "processes": [done for pid in order["pids"] for done in looked_into(pid)],
    }
    print(json.dumps(found))


def entered(path: str) -> Iterator[str]:
    """What can be done with a file, folder or socket."""
    with contextlib.suppress(OSError):
        mode = os.stat(path).st_mode
        yield f"stat {path}"
        if stat.S_ISSOCK(mode):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                yield f"connect {path}"
    for name, flags in (("read", os.O_RDONLY), ("write", os.O_WRONLY)):
        with contextlib.suppress(OSError):
            os.close(os.open(path, flags))
            yield f"{name} {path}"
    with contextlib.suppress(OSError):
        link = os.path.join(path, "debug_state.txt.new")
        os.symlink("/etc/passwd", link)
        yield f"link in {path}"


def looked_into(pid: int) -> Iterator[str]:
    """What can be read of a process that only its user should know."""
    for name in ("environ", "mem", "maps", "fd/0"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/{name}", "rb"):
            yield f"/proc/{pid}/{name}"


def talked(port: int) -> list[str]:
    """What a port answers: a method and gRPC's status for each, and the first line of HTTP."""
    spoken = METHODS if grpc_status(port, METHODS[0]) else METHODS[:1]
    answers = [f"{method} {grpc_status(port, method)}" for method in spoken]
    return [*answers, f"http {first_line(port)}"]


def first_line(port: int) -> str:
    """Of the answer to a POST without a token."""
    return said(port, HTTP).split(b"\r\n")[0].decode("latin-1")


def grpc_status(port: int, method: str, token: str = "") -> str:
    """Call a method of Ray over HTTP/2; "" where nothing understands that."""
    headers = [(":method", "POST"), (":scheme", "http"), (":path", f"/ray.rpc.{method}"), (":authority", "localhost")]
    headers += [("te", "trailers"), ("content-type", "application/grpc")]
    if token:
        headers.append(("authorization", f"Bearer {token}"))
    block = b"".join(b"\x00" + _text(name) + _text(value) for name, value in headers)
    begin = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b"")
    answer = said(port, begin + _frame(1, 4, 1, block) + _frame(0, 1, 1, b"\0" * 5))
    _, found, rest = answer.rpartition(b"grpc-status")
    return rest[1 : 1 + rest[0]].decode("latin-1") if found else ""


def said(port: int, request: bytes) -> bytes:
    """Everything that comes back on a connection, until it is quiet."""
    answer = b""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as client:
        client.sendall(request)
        while b"grpc-status" not in answer and not answer.startswith(b"HTTP/1"):
            part = client.recv(1 << 16)
            if not part:
                break
            answer += part
    return answer


def _text(value: str) -> bytes:
    """A string of HPACK, without Huffman's code."""
    assert len(value) < 127
    return bytes([len(value)]) + value.encode()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


if __name__ == "__main__":
    main()
