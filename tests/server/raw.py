"""A server by raw sockets: requests as bytes, and what becomes of them."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from tests.server.process import ServerProcess

LAUNCH = "from hexad.cli import main; main()"
"""The command, for code that changes something before it."""


def launched(code: str, *arguments: str, **more: Any) -> ServerProcess:
    return ServerProcess(*arguments, command=("-c", code, "serve"), **more)


class Connection:
    """A raw connection to a server."""

    def __init__(self, server: ServerProcess) -> None:
        host, port = server.url.rpartition("/")[2].rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), timeout=30)

    def send(self, data: bytes) -> Connection:
        self.socket.sendall(data)
        return self

    def read_until(self, end: bytes) -> bytes:
        data = b""
        while end not in data and (piece := self.socket.recv(65536)):
            data += piece
        return data

    def read(self) -> bytes:
        """All until the server closes."""
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := self.socket.recv(65536):
                data += piece
        return data

    def reset(self) -> None:
        """Goes as a process does that is killed with data unread."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()


def request(body: bytes | dict[str, Any], path: str = "/v1/completions", *headers: str) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = (f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers)
    head = "\r\n".join((*lines, f"Content-Length: {len(content)}", "", ""))
    return head.encode() + content


def completion(tokens: int, stream: bool = False, **more: Any) -> dict[str, Any]:
    given = {"prompt": "One, two, three,", "max_tokens": tokens, "ignore_eos": True, "stream": stream}
    return {**given, "temperature": 0, **more}


def post(server: ServerProcess, body: Any, *headers: str) -> tuple[int, dict[str, str], Any]:
    """(status, headers, JSON) of a completion."""
    with Connection(server) as connection:
        connection.send(request(body, "/v1/completions", "Connection: close", *headers))
        head, _, content = connection.read().partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    named = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(status.split()[1]), named, json.loads(content)


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> float:
    """Seconds until it holds."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, "it did not come to be"
        time.sleep(0.02)
    return time.monotonic() - begin


def is_idle(server: ServerProcess) -> bool:
    return all(
        server.metric(f"hexad:{name}") == 0
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "server_load")
    )


def streaming(server: ServerProcess, tokens: int = 480) -> Connection:
    """A stream whose first event has come."""
    connection = Connection(server).send(request(completion(tokens, stream=True)))
    assert b"200 OK" in connection.read_until(b"data: ")
    return connection
