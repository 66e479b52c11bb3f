"""HTTP/1.1 over a connection: uvicorn's, with bounds on what a client may keep waiting."""

from __future__ import annotations

import asyncio
from asyncio import TimerHandle
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEADERS = 64 * 1024
"""Longest head of a request in bytes, its line included."""

HEADER_TIMEOUT = 20.0
"""Seconds in which a new connection must bring a request's head, and a head that has begun must end."""

SEND_TIMEOUT = 60.0
"""Seconds after which a client is given up that takes nothing of what is sent."""


class Protocol(HttpToolsProtocol):
    """uvicorn leaves these to a proxy in front, which hexad need not have: heads that are too long or never
    end, connections on which nothing comes, readers who stop reading, and a request pipelined behind one that
    runs, which hid from the latter that the client had gone.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for the first head."""
        super().connection_made(transport)
        self._head_bytes = self._chunk = 0
        self._running: Any = None
        self._send_timer: TimerHandle | None = None
        self._head_timer: TimerHandle | None = self.loop.call_later(HEADER_TIMEOUT, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tells the request under way, which is not always the last one that came."""
        for timer in (self._head_timer, self._send_timer):
            if timer is not None:
                timer.cancel()
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Counts what comes while a head is incomplete."""
        self._chunk = len(data)
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_timer is None and not self._is_busy:  # line breaks, which may stand before a head
            self._head_timer = self.loop.call_later(HEADER_TIMEOUT, self._late)
        if self._head_timer is not None and self._head_bytes > MAX_HEADERS and self._is_open:
            self._refuse(431, f"The request's head is longer than {MAX_HEADERS} bytes.")

    def on_message_begin(self) -> None:
        """Gives the head its time."""
        super().on_message_begin()
        self._head_bytes = self._chunk
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEADER_TIMEOUT, self._late)

    def on_headers_complete(self) -> None:
        """The head is there."""
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """The client does not take what is sent."""
        super().pause_writing()
        self._send_timer = self.loop.call_later(SEND_TIMEOUT, self.transport.abort)

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    @property
    def _is_open(self) -> bool:
        return not self.transport.is_closing()

    @property
    def _is_busy(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def _late(self) -> None:
        self._head_timer = None
        if not self._is_open or self._is_busy:
            return  # behind a request under way: there is nobody to be kept waiting
        if self._head_bytes:
            self._refuse(408, f"The request's head did not come within {HEADER_TIMEOUT:g} seconds.")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        body = message.encode()
        self.transport.write(
            STATUS_LINE[status]
            + b"content-type: text/plain; charset=utf-8\r\nconnection: close\r\ncontent-length: "
            + str(len(body)).encode()
            + b"\r\n\r\n"
            + body
        )
        self.transport.close()
