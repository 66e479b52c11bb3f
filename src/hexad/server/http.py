"""What all APIs share of HTTP: the gate that every request passes, answers in JSON, and streams of events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hexad.server.errors import ApiError, ClientGone
from hexad.server.logs import facts, request_id
from hexad.server.metrics import Metrics
from hexad.server.protocol import MAX_HEADERS
from hexad.server.tracing import Tracer

T = TypeVar("T")

logger = logging.getLogger("hexad.server")

ErrorBody = Callable[[ApiError], Mapping[str, Any]]
"""How an API writes its errors."""


def encode(value: object) -> bytes:
    """A value as compact JSON. Halves of characters, which a client may have sent, become "?"."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


class JSONResponse(Response):
    """A value as JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content)


class EventStream(Response):
    """Chunks of bytes as they come, until the client hangs up: `chunks` is closed then."""

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        *,
        media_type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # X-Accel-Buffering: nginx is not to hold events back.
        super().__init__(
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})},
            media_type=media_type,
        )
        del self.headers["content-length"]
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        # In a task of their own and past the layers above, chunks cost a third less: to wake a task, Python
        # goes through all the calls it waits in.
        pump = asyncio.create_task(self._pump(scope.get("hexad:send", send)))
        watcher = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((pump, watcher), return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                await pump
            else:
                scope["hexad:gone"] = True
        except OSError:  # the client is gone while something was sent
            scope["hexad:gone"] = True
        finally:
            watcher.cancel()
            await _cancelled(pump)
            if (close := getattr(self._chunks, "aclose", None)) is not None:  # it may never have begun
                await close()

    async def _pump(self, send: Send) -> None:
        async for chunk in self._chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def unless_gone(request: Request, answer: Coroutine[Any, Any, T]) -> T:
    """What `answer` returns; it is cancelled, and ClientGone raised, when the client hangs up before."""
    task = asyncio.create_task(answer)
    watcher = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        watcher.cancel()
        await _cancelled(task)


async def _cancelled(task: asyncio.Task[Any]) -> None:
    """Ends a task that has not ended, and waits until it has."""
    if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Gate:
    """The outermost layer: ids, keys, limits of the body, and one line in the log for each request.

    keys: bearers of one of them may enter; empty: anybody. open_paths: where no key is needed. root_path:
    what a proxy in front may leave before paths. refusal: why nothing but open paths is answered now, or
    None. error_body: how an error is written at a path.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Iterable[str],
        open_paths: Iterable[str],
        root_path: str,
        max_body: int,
        body_timeout: float,
        refusal: Callable[[str], ApiError | None],
        error_body: Callable[[str], ErrorBody],
        metrics: Metrics,
        tracer: Tracer | None,
    ) -> None:
        self.app = app
        self._keys = [key.encode() for key in keys]
        self._open = frozenset(open_paths)
        self._root = root_path.rstrip("/")
        self._max_body = max_body
        self._body_timeout = body_timeout
        self._refusal = refusal
        self._error_body = error_body
        self._metrics = metrics
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin = time.perf_counter()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        name = given if 0 < len(given) <= 128 and given.isprintable() else secrets.token_hex(16)
        request_id.set(name)
        scope["hexad:request_id"] = name
        log: dict[str, Any] = {}
        facts.set(log)
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = name.encode("latin-1")  # the second is Anthropic's name for it
                message["headers"] = [*message["headers"], (b"x-request-id", own), (b"request-id", own)]
            await send(message)

        path = self._path(scope)
        scope["hexad:path"] = path
        scope["hexad:send"] = send
        if path.startswith(_LENIENT) and b"origin" not in headers:
            scope["headers"] = [*((k, v) for k, v in scope["headers"] if k != b"content-type"), _JSON]
        counted = path not in _QUIET
        self._metrics.active += counted
        try:
            try:
                self._check(scope["method"], path, headers)
                await self.app(scope, self._bounded(receive, headers), send_named)
            except ApiError as error:
                await self._refuse(path, error, status, scope, receive, send_named)
            except RecursionError:
                deep = ApiError(400, "The body nests too deep.")
                await self._refuse(path, deep, status, scope, receive, send_named)
            except ClientGone:
                scope["hexad:gone"] = True
            except Exception:
                logger.exception("A request failed.")
                failure = ApiError(500, "The server failed at this request; its log says why.")
                await self._refuse(path, failure, status, scope, receive, send_named)
        finally:
            self._metrics.active -= counted
            seconds = time.perf_counter() - begin
            if scope.get("hexad:gone"):
                status = 499  # nginx's, for a client that hung up
            route = getattr(scope.get("route"), "path", None)
            self._metrics.observe(scope["method"], route, status, seconds)
            if counted:
                client = scope.get("client")
                log |= {
                    "method": scope["method"],
                    "path": path[:_LOGGED_PATH],
                    "status": status,
                    "seconds": round(seconds, 4),
                    "client": client[0] if client else None,
                }
                logger.info("%s %s %s", log["method"], log["path"], status, extra=log)
                if self._tracer is not None:
                    self._tracer.record(route, name, log, headers.get(b"traceparent", b"").decode("latin-1"))

    def _path(self, scope: Scope) -> str:
        path: str = scope["path"]
        if self._root and path.startswith(self._root + "/"):
            return path[len(self._root) :]
        return path

    def _check(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> None:
        if sum(len(name) + len(value) for name, value in headers.items()) > MAX_HEADERS:
            raise ApiError(431, f"The request's head is longer than {MAX_HEADERS:,} bytes.")
        if path in self._open or method == "OPTIONS":
            return
        if self._keys:
            given = headers.get(b"authorization", b"")
            scheme, _, key = given.partition(b" ")
            bearer = key.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
            # Every key is compared, in constant time: how long it takes says nothing.
            if not sum([secrets.compare_digest(bearer, key) for key in self._keys]):
                raise ApiError(
                    401,
                    "The API key is missing or wrong. Send it as 'Authorization: Bearer KEY'.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if (error := self._refusal(path)) is not None:
            raise error

    def _bounded(self, receive: Receive, headers: Mapping[bytes, bytes]) -> Receive:
        """`receive` that refuses bodies which are too long, or too slow to come."""
        length = headers.get(b"content-length", b"")
        received = int(length) if length.isdigit() and int(length) > self._max_body else 0
        complete, deadline = False, time.monotonic() + self._body_timeout

        async def bounded() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            message: Message = {}
            if received <= self._max_body:
                try:
                    async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                        message = await receive()
                except TimeoutError as error:
                    raise ApiError(
                        408,
                        f"The body did not come within {self._body_timeout:g} seconds.",
                        code="timeout",
                        headers={"Connection": "close"},
                    ) from error
                received += len(message.get("body", b""))
            if received > self._max_body:
                if b"expect" not in headers:  # else the client waits to be told whether to send it
                    await _discard(receive)
                raise ApiError(
                    413,
                    f"The body is longer than {self._max_body:,} bytes, the server's limit.",
                    headers={"Connection": "close"},
                )
            complete = not message.get("more_body", False)
            return message

        return bounded

    async def _refuse(
        self, path: str, error: ApiError, status: int, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if not status:  # else the answer has begun, and all that can be done is to end it
            response = JSONResponse(self._error_body(path)(error), error.status, error.headers)
            await response(scope, receive, send)


async def _discard(receive: Receive) -> None:
    """Reads what is left of a body: most clients send all of it before they read the answer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARDING):
            while (await receive()).get("more_body"):
                pass


_QUIET = frozenset({"/health", "/metrics", "/ping", "/load"})
"""What is asked every few seconds, and is not worth a line."""

_LENIENT = ("/api/", "/completion", "/infill", "/tokenize", "/detokenize", "/apply-template", "/embedding")
"""Paths whose own servers take JSON by any name, as `curl -d` sends it. Pages of other origins, whom
browsers let send that without asking first, are known by their Origin."""

_JSON = (b"content-type", b"application/json")

_DISCARDING = 10.0
"""Seconds for which what is left of a body that is too long is read, and forgotten."""

_LOGGED_PATH = 200
"""Characters of a path that are logged."""
