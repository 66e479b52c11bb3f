"""The client of `hexad bench serve`: HTTP/1.1 with streams of events, straight on asyncio's transports.

It shall cost little beside what it measures: an event is stamped as its bytes arrive, looked at with a few
regular expressions, and parsed only if it brings token counts or an error.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from hexad.checks import shown
from hexad.errors import ConfigError

MAX_HEAD = 1 << 16
"""Bytes of a response's status and headers, or of a chunk's size with its extensions."""
MAX_EVENT = 1 << 24
"""Bytes of one event, or of a body that is no stream."""

# In JSON the quotes of a text are escaped, so that none of these is found inside generated text.
_NEWS = re.compile(
    rb'"(?:text|content|reasoning|reasoning_content|refusal|arguments|name)"\s*:\s*"[^"]'
    rb'|"token_ids"\s*:\s*\[\s*\d'
)
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_ERROR = re.compile(rb'"error"\s*:\s*[{"]')


class RequestFailed(Exception):
    """A request has not got its answer. kind: what errors are counted by."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind
        self.detail = detail


class _Closed(RequestFailed):
    """The connection has ended too early. answered: whether a part of the response had come."""

    def __init__(self, *, answered: bool, detail: str = "") -> None:
        super().__init__("connection closed", detail)
        self.answered = answered


class Response:
    """An HTTP response as its bytes come in, cut anywhere. headers: by names in lower case.

    Interim responses (1xx) are passed over. Source: RFC 9112.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.complete = False
        self.answered = False
        self._rest = b""
        self._left: int | None = None  # bytes of the body or of its chunk; None: until the connection ends
        self._parse: Callable[[], bytes | None] = self._head

    def feed(self, data: bytes) -> bytes:
        """What these bytes add to the body. Raises RequestFailed."""
        self.answered = True
        self._rest = self._rest + data if self._rest else data
        body = b""
        while not self.complete and (part := self._parse()) is not None:
            body = body + part if body else part
        if self.complete and self._rest:
            raise RequestFailed("malformed response", f"bytes after its end: {shown(self._rest)}")
        return body

    def end(self) -> bool:
        """Whether the response is complete now that the connection has ended."""
        if self.status and self._parse == self._body and self._left is None:
            self.complete = True
        return self.complete

    @property
    def reusable(self) -> bool:
        """Whether the connection may carry another exchange."""
        return self.complete and self.headers.get("connection", "").lower() != "close"

    # Each of these takes its part off `_rest` and returns what of it is body, or None to wait for more.

    def _head(self) -> bytes | None:
        head, found, rest = self._rest.partition(b"\r\n\r\n")
        if len(head) > MAX_HEAD:
            raise RequestFailed("malformed response", f"headers of more than {MAX_HEAD:,} bytes")
        if not found:
            return None
        first, *lines = head.decode("latin-1").split("\r\n")
        status = re.match(r"HTTP/1\.([01]) (\d{3})\b", first)
        if status is None:
            raise RequestFailed("malformed response", f"its first line is {shown(first)}")
        self._rest = rest
        if status[2].startswith("1"):
            return b""
        self.status = int(status[2])
        pairs = (line.partition(":") for line in lines)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        if status[1] == "0":
            self.headers.setdefault("connection", "close")
        length = self.headers.get("content-length")
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            self._parse = self._chunk_size
        elif self.status in (204, 304):
            self.complete = True
        else:
            if length is None:
                self.headers["connection"] = "close"
            elif re.fullmatch(r"\d{1,18}", length):
                self._left = int(length)
                self.complete = self._left == 0
            else:
                raise RequestFailed("malformed response", f"a Content-Length of {shown(length)}")
            self._parse = self._body
        return b""

    def _body(self) -> bytes | None:
        part = self._take()
        self.complete = self._left == 0
        return part or None

    def _take(self) -> bytes:
        if self._left is None:
            part, self._rest = self._rest, b""
        else:
            part, self._rest = self._rest[: self._left], self._rest[self._left :]
            self._left -= len(part)
        return part

    def _line(self) -> bytes | None:
        line, found, rest = self._rest.partition(b"\r\n")
        if len(line) > MAX_HEAD:
            raise RequestFailed("malformed response", f"a line of more than {MAX_HEAD:,} bytes")
        if not found:
            return None
        self._rest = rest
        return line

    def _chunk_size(self) -> bytes | None:
        if (line := self._line()) is None:
            return None
        size = line.partition(b";")[0].strip()
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,15}", size):
            raise RequestFailed("malformed response", f"a chunk's size of {shown(size)}")
        self._left = int(size, 16)
        self._parse = self._chunk if self._left else self._trailer
        return b""

    def _chunk(self) -> bytes | None:
        part = self._take()
        if self._left == 0:
            self._parse = self._chunk_end
        return part or None

    def _chunk_end(self) -> bytes | None:
        if len(self._rest) < 2:
            return None
        if not self._rest.startswith(b"\r\n"):
            raise RequestFailed("malformed response", "a chunk is longer than its size")
        self._rest = self._rest[2:]
        self._parse = self._chunk_size
        return b""

    def _trailer(self) -> bytes | None:
        if (line := self._line()) is None:
            return None
        self.complete = not line
        return b""


class Events:
    """The data of server-sent events, as their bytes come in. Lines end in LF or CR LF."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        """The events that end with these bytes. Raises RequestFailed."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_EVENT:
            raise RequestFailed("malformed response", f"an event of more than {MAX_EVENT:,} bytes")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        return events


@dataclass(slots=True)
class Answer:
    """What came of one request. due, sent, end: when it should have been sent, was sent, and was answered
    or failed; times: of the events that brought text or token ids; all in seconds of `perf_counter`. Token
    counts are the server's; None where it told none. error: the kind of failure, or "".
    """

    due: float = 0.0
    sent: float = 0.0
    end: float = 0.0
    times: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    error: str = ""
    detail: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of output; as many as events where the server told nothing."""
        return len(self.times) if self.output_tokens is None else self.output_tokens

    @property
    def ttft(self) -> float:
        """Seconds until the first text, or until the end of an answer without text."""
        return (self.times[0] if self.times else self.end) - self.sent

    @property
    def e2el(self) -> float:
        """Seconds until the answer was complete."""
        return self.end - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None where there is none."""
        return (self.e2el - self.ttft) / (self.tokens - 1) if self.tokens > 1 else None


class _Taker:
    """Takes in the body of a response: an event stream's into an answer, any other's as it is."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.body = b""
        self.done = False
        self._events = Events()
        self._usage = b""

    def __call__(self, response: Response, data: bytes, now: float) -> None:
        if response.status != 200 or "event-stream" not in response.headers.get("content-type", ""):
            self.body += data
            if len(self.body) > MAX_EVENT:
                raise RequestFailed("malformed response", f"a body of more than {MAX_EVENT:,} bytes")
            return
        for event in self._events.feed(data):
            if _NEWS.search(event):
                self.answer.times.append(now)
            if event == b"[DONE]":
                self.done = True
                self.answer.end = now
            elif _USAGE.search(event):
                self._usage = event
            elif _ERROR.search(event):
                raise RequestFailed("error in stream", _message(event))

    def check(self, response: Response) -> None:
        """Raises RequestFailed for all but a complete stream."""
        if response.status != 200:
            raise RequestFailed(f"HTTP {response.status}", _message(self.body))
        if not self.done:
            kind = response.headers.get("content-type", "a body without type")
            what = "its stream ends without [DONE]" if "event-stream" in kind else f"{kind}, not a stream"
            raise RequestFailed("malformed response", what)
        if self._usage:
            usage = _parsed(self._usage).get("usage")
            counts = usage if isinstance(usage, dict) else {}
            self.answer.prompt_tokens = _count(counts.get("prompt_tokens"))
            self.answer.output_tokens = _count(counts.get("completion_tokens"))


class _Connection(asyncio.Protocol):
    """A connection, with one exchange at a time."""

    def __init__(self) -> None:
        self.closed = False
        self._transport: asyncio.Transport | None = None
        self._response: Response | None = None
        self._take: Callable[[Response, bytes, float], None]
        self._done: asyncio.Future[None]

    async def exchange(self, request: bytes, take: Callable[[Response, bytes, float], None]) -> Response:
        """Sends a request and passes the body on as it comes. Raises RequestFailed, also what `take` raises;
        the connection is closed then, and wherever it must be."""
        assert self._transport is not None
        response = self._response = Response()
        self._take = take
        self._done = asyncio.get_running_loop().create_future()
        try:
            if self.closed:
                raise _Closed(answered=False)
            self._transport.write(request)
            await self._done
        finally:
            self._response = None
            if not response.reusable:
                self.close()
        return response

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        response = self._response
        if response is None or self._done.done():  # nobody asked
            self.close()
            return
        try:
            body = response.feed(data)
            if body:
                self._take(response, body, now)
        except RequestFailed as error:
            self._done.set_exception(error)
        else:
            if response.complete:
                self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        response = self._response
        if response is None or self._done.done():
            return
        if exc is None and response.end():
            self._done.set_result(None)
        else:
            detail = "" if exc is None else str(exc)
            self._done.set_exception(_Closed(answered=response.answered, detail=detail))


class Client:
    """A client of one server; its connections are kept and used again.

    base_url: http://…, https://… or unix:PATH of a socket; a path in it comes before those of requests, "/v1"
    at its end may be left out. timeout: seconds that one request may take.
    Raises ConfigError for any other URL.
    """

    def __init__(self, base_url: str, api_key: str | None = None, timeout: float | None = None) -> None:
        self._timeout = timeout
        self._idle: list[_Connection] = []
        self._ssl: ssl.SSLContext | None = None
        self._socket: str | None = None
        self._prefix = ""
        if base_url.startswith("unix:"):
            self._socket = base_url.removeprefix("unix:")
            if self._socket.startswith("//"):  # unix:///run/hexad.sock
                self._socket = self._socket[2:]
            host = "localhost"
        else:
            host = self._take_url(base_url)
        lines = [f"Host: {host}"]
        if api_key:
            if not re.fullmatch(r"[!-~]+", api_key):
                raise ConfigError("--api-key must be of printable ASCII characters, without spaces.")
            lines.append(f"Authorization: Bearer {api_key}")
        self._headers = "\r\n".join(lines)

    def _take_url(self, base_url: str) -> str:
        try:
            url = urlsplit(base_url)
            port = url.port
        except ValueError as error:
            raise ConfigError(f"--base-url {shown(base_url)} is not a URL: {error}.") from error
        if url.scheme not in ("http", "https") or not url.hostname or not re.fullmatch(r"[!-~]+", base_url):
            raise ConfigError(
                "--base-url must be like http://127.0.0.1:8000 or unix:/run/hexad.sock, "
                f"not {shown(base_url)}."
            )
        if url.scheme == "https":
            self._ssl = ssl.create_default_context()
        self._host, self._port = url.hostname, port or (443 if self._ssl else 80)
        self._prefix = url.path.rstrip("/").removesuffix("/v1")
        return url.netloc.rpartition("@")[2]

    async def get(self, path: str) -> bytes:
        """The body at a path. Raises RequestFailed for any status but 200, and TimeoutError."""
        taker = _Taker(Answer())
        async with asyncio.timeout(self._timeout):
            response = await self._exchange("GET", path, b"", taker)
        if response.status != 200:
            raise RequestFailed(f"HTTP {response.status}", _message(taker.body))
        return taker.body

    async def models(self) -> list[str]:
        """The names at /v1/models. Raises what `get` raises."""
        listed = _parsed(await self.get("/v1/models")).get("data")
        entries = listed if isinstance(listed, list) else []
        names = [entry.get("id") for entry in entries if isinstance(entry, dict)]
        return [name for name in names if isinstance(name, str)]

    async def stream(self, path: str, body: bytes, answer: Answer) -> None:
        """Posts a JSON body, and notes in the answer what comes back, failures as well."""
        answer.sent = perf_counter()
        taker = _Taker(answer)
        try:
            async with asyncio.timeout(self._timeout):
                taker.check(await self._exchange("POST", path, body, taker))
        except RequestFailed as error:
            answer.error, answer.detail = error.kind, error.detail
        except TimeoutError:
            answer.error, answer.detail = "timed out", f"after {self._timeout:g} s"
        if answer.error:
            answer.end = perf_counter()

    async def _exchange(
        self, method: str, path: str, body: bytes, take: Callable[[Response, bytes, float], None]
    ) -> Response:
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._headers}\r\nAccept: */*\r\n"
        if method == "POST":
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        request = f"{head}\r\n".encode("ascii") + body
        while True:
            kept = self._kept()
            connection = kept or await self._connect()
            try:
                response = await connection.exchange(request, take)
            except _Closed as error:
                # A server may close an idle connection just as it is used again.
                if kept and not error.answered:
                    continue
                raise
            if not connection.closed:
                self._idle.append(connection)
            return response

    def _kept(self) -> _Connection | None:
        while self._idle:
            if not (connection := self._idle.pop()).closed:
                return connection
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            if self._socket is not None:
                _, connection = await loop.create_unix_connection(_Connection, self._socket)
            else:
                _, connection = await loop.create_connection(
                    _Connection, self._host, self._port, ssl=self._ssl
                )
        except (OSError, ValueError) as error:  # ValueError: a host that cannot be a name
            # asyncio has words of its own where the system's would say why.
            code = getattr(error, "errno", None) or 0
            reason = os.strerror(code) if code > 0 else getattr(error, "strerror", None) or str(error)
            raise RequestFailed("no connection", reason) from error
        return connection

    def close(self) -> None:
        """Ends the connections kept."""
        for connection in self._idle:
            connection.close()


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _message(body: bytes) -> str:
    """What an error's body says: the message of OpenAI's form, or the text's beginning."""
    error = _parsed(body).get("error")
    message = error.get("message") if isinstance(error, dict) else error
    text = message if isinstance(message, str) else body.decode("utf-8", "replace")
    return " ".join(text[:1000].split())[:300]


def _count(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None
