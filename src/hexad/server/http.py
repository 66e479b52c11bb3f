"""What all APIs share of HTTP: the gate that every request passes, answers in JSON, and streams of events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hexad.server.errors import ApiError, ClientGone

T = TypeVar("T")

logger = logging.getLogger("hexad.server")

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""The id of the request under way, for logs."""

ErrorBody = Callable[[ApiError], Mapping[str, Any]]
"""How an API writes its errors."""


def encode(value: object) -> bytes:
    """A value as compact JSON."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, in what a client gave and gets back
        return json.dumps(value, separators=(",", ":")).encode()


class JSONResponse(Response):
    """A value as JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content)


class EventStream(Response):
    """Chunks of bytes as they come, until the client hangs up: `chunks` is closed then.

    close: called in any case at the end.
    """

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
        task = asyncio.current_task()
        assert task is not None
        gone = False

        async def watch() -> None:
            nonlocal gone
            await _disconnected(receive)
            gone = True
            task.cancel()

        watcher = asyncio.create_task(watch())
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except asyncio.CancelledError:
            if not gone:
                raise
            task.uncancel()
            scope["hexad.gone"] = True
        except OSError:  # the client is gone while something was sent
            scope["hexad.gone"] = True
        finally:
            watcher.cancel()
            if (close := getattr(self._chunks, "aclose", None)) is not None:
                await close()


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
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Gate:
    """The outermost layer: ids, keys, limits of the body, and one line in the log for each request.

    keys: bearers of one of them may enter; empty: anybody. open_paths: where no key is needed. refusal: why
    nothing but open paths is answered now, or None. error_body: how an error is written at a path.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Iterable[str],
        open_paths: Iterable[str],
        max_body: int,
        body_timeout: float,
        refusal: Callable[[str], ApiError | None],
        error_body: Callable[[str], ErrorBody],
    ) -> None:
        self.app = app
        self._keys = [key.encode() for key in keys]
        self._open = frozenset(open_paths)
        self._max_body = max_body
        self._body_timeout = body_timeout
        self._refusal = refusal
        self._error_body = error_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin = time.perf_counter()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        name = given if 0 < len(given) <= 128 and given.isprintable() else secrets.token_hex(16)
        request_id.set(name)
        scope["hexad.request_id"] = name
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = name.encode("latin-1")  # the second is Anthropic's name for it
                message["headers"] = [*message["headers"], (b"x-request-id", own), (b"request-id", own)]
            await send(message)

        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
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
                scope["hexad.gone"] = True
            except Exception:
                logger.exception("A request failed.")
                failure = ApiError(500, "The server failed at this request; its log says why.")
                await self._refuse(path, failure, status, scope, receive, send_named)
        finally:
            if logger.isEnabledFor(logging.INFO) and path not in _QUIET:
                client = scope.get("client")
                logger.info(
                    "%s %s %s",
                    scope["method"],
                    path,
                    "gone" if scope.get("hexad.gone") else status,
                    extra={
                        "method": scope["method"],
                        "path": path,
                        "status": 499 if scope.get("hexad.gone") else status,
                        "seconds": round(time.perf_counter() - begin, 4),
                        "client": client[0] if client else None,
                        **scope.get("hexad.log", {}),
                    },
                )

    def _check(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> None:
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
        if length.isdigit() and int(length) > self._max_body:
            raise self._too_long()
        received, complete, deadline = 0, False, time.monotonic() + self._body_timeout

        async def bounded() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    message = await receive()
            except TimeoutError as error:
                raise ApiError(
                    408, f"The body did not come within {self._body_timeout:g} seconds.", code="timeout"
                ) from error
            received += len(message.get("body", b""))
            if received > self._max_body:
                raise self._too_long()
            complete = not message.get("more_body", False)
            return message

        return bounded

    def _too_long(self) -> ApiError:
        return ApiError(413, f"The body is longer than {self._max_body:,} bytes, the server's limit.")

    async def _refuse(
        self, path: str, error: ApiError, status: int, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if status:  # the answer has begun; all that can be done is to end it
            return
        response = JSONResponse(self._error_body(path)(error), error.status, error.headers)
        if error.status in (408, 413):  # what is left of the body is not waited for
            response.headers["Connection"] = "close"
        await response(scope, receive, send)


_QUIET = frozenset({"/health", "/metrics", "/ping", "/load"})
