"""Plain HTTP, as a client without a library speaks it."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from typing import Any

from tests.server.process import ServerProcess


def call(server: ServerProcess, path: str, body: Any = None) -> tuple[int, Any]:
    """(status, JSON) of a POST, or of a GET where there is no body."""
    try:
        with _open(server, path, body) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def answer(server: ServerProcess, path: str, body: Any = None) -> Any:
    """The JSON of what succeeds."""
    status, value = call(server, path, body)
    assert status == 200, value
    return value


def lines(server: ServerProcess, path: str, body: Any) -> Generator[str, None, None]:
    """The lines of a stream as they come, without the empty ones."""
    with _open(server, path, body) as response:
        for line in response:
            if text := line.decode().rstrip("\n"):
                yield text


def events(server: ServerProcess, path: str, body: Any) -> list[Any]:
    """The data of server-sent events."""
    return [
        json.loads(line.removeprefix("data: "))
        for line in lines(server, path, body)
        if line.startswith("data: ")
    ]


def wait_until_idle(server: ServerProcess, seconds: float = 10) -> None:
    """Until nothing runs or waits."""
    deadline = time.monotonic() + seconds
    while (load := answer(server, "/load")["server_load"]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert load == 0


def _open(server: ServerProcess, path: str, body: Any) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.key}"}
    request = urllib.request.Request(server.url + path, data, headers)
    return urllib.request.urlopen(request, timeout=60)
