"""A server that answers as a test says, byte by byte: what it sends and when is known exactly."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Step = bytes | float | None
"""Bytes to send, seconds to wait, or None: the connection is cut."""


@dataclass
class Request:
    """A request as it came; connection: the how manyeth connection it came on."""

    connection: int
    line: str
    headers: dict[str, str]
    body: Any


@dataclass
class FakeServer:
    """steps: how to answer a request. sent: when each of the bytes went out, in seconds of `perf_counter`."""

    steps: Callable[[Request], Sequence[Step]]
    url: str = ""
    requests: list[Request] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    connections: int = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                line, *fields = head.rstrip().split("\r\n")
                headers = {name.lower(): value for name, value in (f.split(": ", 1) for f in fields)}
                raw = await reader.readexactly(int(headers.get("content-length", 0)))
                request = Request(number, line, headers, json.loads(raw) if raw else None)
                self.requests.append(request)
                for step in self.steps(request):
                    if step is None:
                        return
                    if isinstance(step, float):
                        await asyncio.sleep(step)
                    else:
                        self.sent.append(time.perf_counter())
                        writer.write(step)
                        await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    @property
    def posts(self) -> list[Any]:
        """Bodies that were posted."""
        return [request.body for request in self.requests if request.body is not None]


@contextmanager
def serving(steps: Callable[[Request], Sequence[Step]], socket: Path | None = None) -> Iterator[FakeServer]:
    """A server in a thread, at a free port or a Unix socket."""
    fake = FakeServer(steps)
    loop = asyncio.new_event_loop()

    async def start() -> asyncio.Server:
        if socket is not None:
            fake.url = f"unix:{socket}"
            return await asyncio.start_unix_server(fake.handle, socket)
        server = await asyncio.start_server(fake.handle, "127.0.0.1", 0)
        fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server

    async def stop() -> None:
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield fake
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def head(status: str = "200 OK", *lines: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()


STREAM = head("200 OK", "Content-Type: text/event-stream; charset=utf-8", "Transfer-Encoding: chunked")


def whole(status: str, body: object) -> bytes:
    data = json.dumps(body).encode()
    return head(status, "Content-Type: application/json", f"Content-Length: {len(data)}") + data


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(value: object) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def text(value: str) -> bytes:
    return event({"choices": [{"index": 0, "text": value, "logprobs": None}], "usage": None})


def usage(prompt: int, output: int) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    return event({"choices": [], "usage": counts})


DONE = event(b"[DONE]")
END = chunk(b"")
BUSY = whole("429 Too Many Requests", {"error": {"message": "come back"}})
BROKEN = head("500 No", "Content-Length: 3") + b"o\xffh"
