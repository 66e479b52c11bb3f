"""The server's process: sockets, loading, signals, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import uvicorn

from hexad.async_llm import AsyncLLM
from hexad.errors import ConfigError, HexadError
from hexad.server.app import State, create_app
from hexad.server.chat import Chat
from hexad.server.logs import configure
from hexad.server.service import Service
from hexad.server.settings import ServerSettings

logger = logging.getLogger("hexad.server")


def serve(settings: ServerSettings) -> int:
    """Serves until a signal ends it. Returns the exit code: 0 when it was told to end, 1 when it failed.

    Raises ConfigError for addresses, keys and certificates that cannot be used.
    """
    configure(settings.log_format, settings.log_level)
    sockets = [_listen(settings)]
    state = State()
    config = uvicorn.Config(
        create_app(settings, state),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=settings.timeout_keep_alive,
        timeout_graceful_shutdown=5,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_keyfile_password=settings.ssl_keyfile_password,
        ssl_ca_certs=None if settings.ssl_ca_certs is None else str(settings.ssl_ca_certs),
        lifespan="off",
        ws="none",
    )
    try:
        config.load()
    except OSError as error:
        raise ConfigError(f"The certificate cannot be used: {error}.") from error
    process = _Process(settings, state, _Server(config))
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        return runner.run(process.run(sockets))


class _Server(uvicorn.Server):
    """uvicorn's, which leaves the signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Process:
    """Loads the model beside the running server, and sees to its end."""

    def __init__(self, settings: ServerSettings, state: State, server: _Server) -> None:
        self.settings = settings
        self.state = state
        self.server = server
        self._stop = asyncio.Event()
        self._code = 0
        self._llm: AsyncLLM | None = None

    async def run(self, sockets: list[socket.socket]) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        _say(self.settings, sockets)
        serving = asyncio.create_task(self.server.serve(sockets))
        loading = asyncio.create_task(self._load())
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        self.state.draining = True
        if self._llm is not None and not self.state.broken:
            await self._drain()
        self.server.should_exit = True
        await serving
        loading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loading
        if self._llm is not None:
            await self._llm.aclose()
        if self.settings.uds is not None:
            Path(self.settings.uds).unlink(missing_ok=True)
        return self._code

    def _signalled(self, number: int) -> None:
        if self._stop.is_set():  # a second time: at once
            logger.warning("Ending at once.")
            os._exit(128 + number)
        logger.info("%s: finishing what runs.", signal.Signals(number).name)
        self._stop.set()

    async def _drain(self) -> None:
        """Waits until nothing runs, as long as timeout_graceful."""
        chat = self.state.chat
        if chat is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.timeout_graceful):
                while chat.service.in_flight:
                    await asyncio.sleep(0.02)
        if chat.service.in_flight:
            logger.warning("%d sequences did not end in time; they are cancelled.", chat.service.in_flight)
            await chat.service.llm.aclose()

    async def _load(self) -> None:
        settings = self.settings
        try:
            llm = await asyncio.to_thread(self._make)
            if self._stop.is_set():
                await llm.aclose()
                return
            self._llm = llm
            names = settings.served_model_name or [settings.model]
            self.state.chat = await asyncio.to_thread(lambda: Chat(Service(llm, settings, names)))
            for line in str(llm.plan).splitlines():
                print(line, flush=True)
            print(f"Ready: {', '.join(names)}.", flush=True)
            loop = asyncio.get_running_loop()
            llm.engine.on_broken(lambda: loop.call_soon_threadsafe(self._broke))
        except HexadError as error:
            print("error:", " ".join([str(error), *getattr(error, "__notes__", [])]), file=sys.stderr)
            self._fail()
        except Exception:
            logger.exception("The model could not be loaded.")
            self._fail()

    def _make(self) -> AsyncLLM:
        settings = self.settings
        return AsyncLLM(settings.model, generation_config=settings.generation_config, **settings.engine)

    def _broke(self) -> None:
        """The engine's thread died: those who waited have been told; a new process may do better."""
        self.state.broken = True
        self._fail()

    def _fail(self) -> None:
        self._code = 1
        self._stop.set()


def _listen(settings: ServerSettings) -> socket.socket:
    """The listening socket. Raises ConfigError if it cannot be had."""
    if settings.uds is not None:
        path = Path(settings.uds)
        if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
            raise ConfigError(f"uds {path} is there, and is no socket.")
        try:
            path.unlink(missing_ok=True)  # left behind by a server that was killed
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(path))
        except OSError as error:
            raise ConfigError(f"uds {path} cannot be used: {error.strerror or error}.") from error
    else:
        try:
            family, _, _, _, address = socket.getaddrinfo(
                settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.socket(family)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Connections have the listener's options. A client whose machine is gone is found out.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if sys.platform == "linux":
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)
            listener.bind(address)
        except OSError as error:
            raise ConfigError(
                f"{settings.host}:{settings.port} cannot be listened on: {error.strerror or error}. Choose "
                "another --port, or stop what uses it."
            ) from error
    listener.listen(2048)
    listener.setblocking(False)
    return listener


def _say(settings: ServerSettings, sockets: Sequence[socket.socket]) -> None:
    """The addresses, on stdout."""
    if settings.uds is not None:
        where = f"unix:{settings.uds}"
    else:
        host, port = sockets[0].getsockname()[:2]
        scheme = "https" if settings.ssl_certfile else "http"
        where = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
    print(f"hexad listens on {where}", flush=True)
    if settings.uds is None:
        print(f"  a page to chat on   {where}/", flush=True)
        print(f"  OpenAI's API        {where}/v1", flush=True)
        print(f"  documents           {where}/docs", flush=True)
