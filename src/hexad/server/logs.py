"""Logs on stderr: a line for people, or a JSON object, each with the request's id.

A thread of its own writes them: whoever reads them may be slow, or have stopped, and no request waits for
that.
"""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
import time
from contextvars import ContextVar
from typing import Any, TextIO

request_id: ContextVar[str] = ContextVar("request_id", default="-")
"""The id of the request under way."""

facts: ContextVar[dict[str, Any] | None] = ContextVar("facts", default=None)
"""What is to be logged of the request under way when it ends, by the names in FIELDS."""

FIELDS = (
    "method", "path", "status", "seconds", "client", "model", "prompt_tokens", "completion_tokens",
    "time_to_first_token", "finish_reasons",
)  # fmt: skip
"""The fields of a line in JSON beside time, level, request_id, message and exception."""

_MOST_WAITING = 10_000
"""Lines that wait to be written; more are dropped, and counted."""


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = (
            f"{clock} {record.levelname.lower():7} {request_id.get()[:8]:8} {_printable(record.getMessage())}"
        )
        if (seconds := getattr(record, "seconds", None)) is not None:
            line += f" {1000 * seconds:.0f} ms"
        if (tokens := getattr(record, "completion_tokens", None)) is not None:
            line += f" {getattr(record, 'prompt_tokens', 0)} → {tokens} tokens"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _JSON(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        value = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "request_id": request_id.get(),
            "message": record.getMessage(),
            **{name: getattr(record, name) for name in FIELDS if getattr(record, name, None) is not None},
        }
        if record.exc_info:
            value["exception"] = self.formatException(record.exc_info)
        return json.dumps(value)


class Writer(logging.Handler):
    """Writes records to a stream from a thread of its own; those that find too many waiting are dropped."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: queue.Queue[str | threading.Event] = queue.Queue(_MOST_WAITING)
        self._dropped = 0
        # A daemon, which does not keep the process from ending.
        threading.Thread(target=self._write, name="hexad-logs", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Formats the record here, where the request's id is known."""
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._dropped += 1
        except Exception:
            self.handleError(record)

    def flush(self, timeout: float = 1.0) -> None:
        """Waits until what came before is written, but not longer than `timeout` seconds."""
        written = threading.Event()
        try:
            self._lines.put(written, timeout=timeout)
        except queue.Full:
            return
        written.wait(timeout)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                line = f"{dropped} lines of the log could not be written in time and are lost\n{line}"
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # a full disk, a reader that has left: the server goes on
                pass


def configure(form: str, level: str) -> Writer:
    """Sends the logs of hexad and uvicorn to stderr."""
    handler = Writer(sys.stderr)
    handler.setFormatter(_JSON() if form == "json" else _Text())
    for name in ("hexad", "uvicorn"):
        log = logging.getLogger(name)
        log.handlers[:] = [handler]
        log.propagate = False
        log.setLevel(level.upper() if name == "hexad" else logging.WARNING)
    return handler


def _printable(text: str) -> str:
    """One line, whatever a client wrote."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
