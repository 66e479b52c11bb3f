"""Batches: a file of requests answered into a file, without a server.

The lines are those of OpenAI's Batch API (platform.openai.com/docs/api-reference/batch): {"custom_id",
"method", "url", "body"} in, {"id", "custom_id", "response", "error"} out. Each request goes through the
server's own application, so that it means here what it means there.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import secrets
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from starlette.types import ASGIApp, Message, Scope

from hexad.checks import shown
from hexad.errors import ConfigError, EngineError, HexadError
from hexad.server.app import State, create_app
from hexad.server.http import encode
from hexad.server.serve import load
from hexad.server.settings import ServerSettings

URLS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"
"""What a line may ask."""

STREAM = "-"
"""The name of stdin and of stdout."""


@dataclass
class Counts:
    """How far a batch is.

    answered: lines written now, `failed` of them with an error or a status of 400 and above. skipped: lines
    that had been answered before. read: bytes of the lines that are done, of `size` in the file; None where
    that is not known. signal: what interrupted it, or 0.
    """

    size: int | None = None
    answered: int = 0
    failed: int = 0
    skipped: int = 0
    read: int = 0
    signal: int = 0


def run_batch(
    settings: ServerSettings, source: str, target: str, progress: Callable[[Counts], object]
) -> Counts:
    """Answers the lines of `source` into `target`, in the order in which they are finished, until the end or
    until SIGINT or SIGTERM. What `target` has already is not asked again.

    source, target: paths, or "-". progress: told after each line, by one of two threads. Must be called by
    the main thread.

    Raises ConfigError for files that cannot be used and what AsyncLLM raises, before it answers anything;
    then HexadError where a file can no longer be read or written, EngineError where the engine broke.
    """
    settings = settings.model_copy(update=_ALONE)
    # Whoever reads the lines closes them: to close a file waits for a thread that reads it.
    lines = _opened(source)
    with Target(target) as answers:
        there = os.fstat(lines.fileno())
        if os.path.samestat(there, os.fstat(answers.fd)) and stat.S_ISREG(there.st_mode):
            raise ConfigError(f"{source} is both the input and the output; name two files.")
        counts = Counts(there.st_size if stat.S_ISREG(there.st_mode) else None)
        llm, chat = load(settings)
        try:
            state = State()
            state.chat = chat
            batch = _Batch(create_app(settings, state), lines, answers, settings, counts, progress)
            asyncio.run(batch.run())
        except HexadError as error:
            if answers.is_file:
                error.add_note("What is answered is kept; the same command goes on from there.")
            raise
        finally:
            llm.shutdown()
    return counts


_ALONE: dict[str, Any] = {
    "api_key": [], "api_key_file": None, "root_path": "", "cors": [], "max_waiting": sys.maxsize,
    "request_timeout": math.inf, "max_stored_responses": 0,
}  # fmt: skip
"""Settings of a server whose only client is the batch."""


class Target:
    """The file of answers. Only one batch at a time writes to it.

    fd: its descriptor. is_file: whether a later batch can go on from it. answered: keys of the lines that it
    has. Raises ConfigError for a file that cannot be written, or that has something else in it.
    """

    def __init__(self, name: str) -> None:
        self.name = "stdout" if name == STREAM else name
        self.answered: set[bytes] = set()
        try:
            self.fd = (
                os.dup(1) if name == STREAM else os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            )
        except OSError as error:
            raise ConfigError(f"{self.name} cannot be written: {error.strerror}.") from error
        try:
            self.is_file = name != STREAM and stat.S_ISREG(os.fstat(self.fd).st_mode)
            if self.is_file:
                self._take_up()
        except BaseException:
            os.close(self.fd)
            raise

    def _take_up(self) -> None:
        """Reads what is there, and cuts off a last line that was not finished."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):  # else a file system without locks
                raise ConfigError(f"{self.name} is being written by another batch.") from error
        end, line = 0, b"\n"
        with open(self.fd, "rb", closefd=False) as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n") and line[: len(_BEGIN)] == _BEGIN[: len(line)]:
                    line = b"\n"
                    break
                try:
                    self.answered.add(_key_of_answer(json.loads(line)))
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    raise ConfigError(
                        f"Line {number} of {self.name} is not the answer of a batch; name another file, "
                        "which need not be there yet."
                    ) from error
                end += len(line)
        os.ftruncate(self.fd, end)
        if not line.endswith(b"\n"):  # an editor's doing
            self.write(b"\n")

    def write(self, line: bytes) -> None:
        """Appends a line. Raises HexadError where it cannot, BrokenPipeError where nobody reads any more."""
        left = memoryview(line)
        try:
            while left:
                left = left[os.write(self.fd, left) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise HexadError(f"{self.name} can no longer be written: {error.strerror}.") from error

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.fd)


@dataclass(frozen=True, slots=True)
class _Request:
    """A line of the input. size: its bytes. error: (code, message), where it cannot be asked."""

    size: int
    custom_id: str | None
    url: str = ""
    body: bytes = b""
    error: tuple[str, str] | None = None


class _Batch:
    """Reads lines in a thread of its own, which may have to wait for them, and no more than are answered at
    once; asks, and writes answers, on the event loop."""

    def __init__(
        self,
        app: ASGIApp,
        lines: IO[bytes],
        answers: Target,
        settings: ServerSettings,
        counts: Counts,
        progress: Callable[[Counts], object],
    ) -> None:
        self._app = app
        self._lines = lines
        self._answers = answers
        self._longest = int(settings.max_body_mib * 2**20)
        # While one half is in the engine's batch, the other one waits to step into it.
        self._width = 2 * settings.max_num_seqs
        self._places = threading.Semaphore(self._width)
        self._counts = counts
        self._progress = progress
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def run(self) -> None:
        """Until all is answered, or a signal comes. Raises what `run_batch` raises."""
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        # Not by the loop, which a reader of stdout that takes nothing holds up.
        signals = {
            number: signal.signal(number, self._signalled) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            # A daemon: it may wait for a line of stdin that never comes.
            threading.Thread(target=self._read, name="hexad-batch", daemon=True).start()
            await self._ended
        finally:
            self._stopping = True
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for number, handler in signals.items():
                signal.signal(number, handler)

    def _signalled(self, number: int, frame: object) -> None:
        if self._counts.signal:  # a second time: at once
            os._exit(128 + number)
        self._counts.signal = number
        self._call(self._end)

    def _end(self, error: BaseException | None = None) -> None:
        if self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)

    # The thread that reads.

    def _read(self) -> None:
        try:
            with self._lines:
                for request in self._requests():
                    self._places.acquire()
                    if self._stopping:
                        return
                    self._call(self._ask, request)
            for _ in range(self._width):  # all have come back: nothing is asked any more
                self._places.acquire()
            self._call(self._end)
        except OSError as error:
            self._call(self._end, HexadError(f"The input can no longer be read: {error.strerror}."))
        except BaseException as error:
            self._call(self._end, error)

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Has the event loop call a function."""
        with contextlib.suppress(RuntimeError):  # it is closed: nobody waits for more
            self._loop.call_soon_threadsafe(function, *arguments)

    def _requests(self) -> Iterator[_Request]:
        """What is still to be answered."""
        answered, seen = self._answers.answered, set[bytes]()
        number = 0
        while line := self._lines.readline(self._longest + 1):
            number += 1
            size, end = len(line), line
            while not end.endswith(b"\n") and (end := self._lines.readline(2**20)):
                size += len(end)
            if size == len(line) and not line.strip():
                self._counts.read += size
                continue
            request = _parse(number, line, size, self._longest)
            if request.custom_id is not None:
                key = _key(request.custom_id, "")
                if key in seen:  # the first one alone is to be found under this name
                    reason = (
                        f"Line {number}: an earlier line has the custom_id {shown(request.custom_id)}, too."
                    )
                    request = _Request(size, None, error=("duplicate_custom_id", reason))
                seen.add(key)
            key = _key(request.custom_id, request.error[1] if request.error else "")
            if key in answered:
                answered.discard(key)
                self._counts.skipped += 1
                self._counts.read += size
                self._progress(self._counts)
            else:
                yield request

    # The event loop.

    def _ask(self, request: _Request) -> None:
        if self._stopping:
            return
        task = self._loop.create_task(self._answer(request))
        self._tasks.add(task)
        task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._end(error)
        self._places.release()

    async def _answer(self, request: _Request) -> None:
        counts, response = self._counts, b"null"
        failed = request.error is not None
        if not failed:
            status, request_id, body = await _post(self._app, request.url, request.body)
            if status == 503:  # no answer to this request, but the end of all
                raise EngineError(json.loads(body)["error"]["message"])
            failed = status >= 400
            head = f'{{"status_code":{status},"request_id":"{request_id}","body":'
            response = head.encode() + body + b"}"
        self._answers.write(_line(request, response))
        counts.answered += 1
        counts.failed += failed
        counts.read += request.size
        self._progress(counts)


def _opened(source: str) -> IO[bytes]:
    """The input. Raises ConfigError."""
    try:
        # Not sys.stdin, whose lock the thread that reads may hold as the interpreter ends.
        return open(0, "rb", closefd=False) if source == STREAM else open(source, "rb")
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {error.strerror}.") from error


def _parse(number: int, line: bytes, size: int, longest: int) -> _Request:
    """A line as a request; what is wrong with it is its error."""

    def wrong(reason: str, custom_id: str | None = None) -> _Request:
        return _Request(size, custom_id, error=("invalid_request", f"Line {number}: {reason}"))

    if size > longest + 1:
        return wrong(f"it has {size:,} bytes, and may have {longest:,} (max_body_mib).")
    try:
        value = json.loads(line)
        if not isinstance(value, dict):
            return wrong("it is not a JSON object.")
        custom_id, method, url, body = (value.get(name) for name in ("custom_id", "method", "url", "body"))
        if not isinstance(custom_id, str) or not custom_id:
            return wrong(f"custom_id must be a text that names the line, not {shown(custom_id)}.")
        if method != "POST":
            return wrong(f"method must be 'POST', not {shown(method)}.", custom_id)
        if url not in URLS:
            return wrong(f"url must be one of {', '.join(URLS)}, not {shown(url)}.", custom_id)
        if not isinstance(body, dict):
            return wrong(f"body must be a JSON object, not {shown(body)}.", custom_id)
        if body.get("stream"):
            return wrong("stream must be left out or false: an answer is one line.", custom_id)
        return _Request(size, custom_id, url, encode(body))
    except RecursionError:
        return wrong("it nests too deep.")
    except ValueError as error:
        return wrong(f"it is not JSON: {str(error)[:200]}.")


async def _post(app: ASGIApp, path: str, body: bytes) -> tuple[int, str, bytes]:
    """(status, X-Request-Id, body) of what an ASGI application (asgi.readthedocs.io) answers to JSON."""
    length = str(len(body)).encode()
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"content-length", length)],
        "client": None,
        "server": None,
    }
    sent: list[Message] = []
    unread = [body]

    async def receive() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await asyncio.Future[Message]()  # it never hangs up

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    start, *rest = sent
    request_id = dict(start["headers"])[b"x-request-id"].decode("latin-1")
    return start["status"], request_id, b"".join(message.get("body", b"") for message in rest)


_BEGIN = b'{"id":"batch_req_'


def _line(request: _Request, response: bytes) -> bytes:
    """A line of the output. response: its JSON."""
    # In ASCII, so that halves of characters are found again when the file is taken up.
    custom_id = json.dumps(request.custom_id).encode()
    error = None if request.error is None else dict(zip(("code", "message"), request.error, strict=True))
    return b'%b%b","custom_id":%b,"response":%b,"error":%b}\n' % (
        _BEGIN, secrets.token_hex(16).encode(), custom_id, response, encode(error),
    )  # fmt: skip


def _key(custom_id: str | None, message: str) -> bytes:
    """By what a line is known in the output: its custom_id; without one, the error's message, which has the
    line's number. A digest, for there may be millions."""
    text = f"error {message}" if custom_id is None else f"id {custom_id}"
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def _key_of_answer(answer: Any) -> bytes:
    """The key of a line of the output. Raises ValueError, TypeError or KeyError for anything else."""
    custom_id, error = answer["custom_id"], answer["error"]
    if not isinstance(custom_id, str | None) or "response" not in answer:
        raise ValueError
    return _key(custom_id, "" if custom_id is not None else error["message"])
