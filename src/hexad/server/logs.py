"""Logs on stderr: a line for people, or a JSON object, each with the request's id."""

from __future__ import annotations

import json
import logging
import sys
import time

from hexad.server.http import request_id

_FIELDS = ("method", "path", "status", "seconds", "client", "prompt_tokens", "completion_tokens")


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{clock} {record.levelname.lower():7} {request_id.get()[:8]:8} {record.getMessage()}"
        seconds = getattr(record, "seconds", None)
        if seconds is not None:
            line += f" {1000 * seconds:.0f} ms"
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
            **{name: getattr(record, name) for name in _FIELDS if getattr(record, name, None) is not None},
        }
        if record.exc_info:
            value["exception"] = self.formatException(record.exc_info)
        return json.dumps(value, ensure_ascii=False)


def configure(form: str, level: str) -> None:
    """Sends the logs of hexad and uvicorn to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JSON() if form == "json" else _Text())
    for name in ("hexad", "uvicorn"):
        log = logging.getLogger(name)
        log.handlers[:] = [handler]
        log.propagate = False
        log.setLevel(level.upper() if name == "hexad" else logging.WARNING)
