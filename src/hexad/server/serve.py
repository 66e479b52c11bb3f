"""The server's process: sockets, loading, signals, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import ssl
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import uvicorn

from hexad.async_llm import AsyncLLM
from hexad.errors import ConfigError, HexadError, PromptError
from hexad.params import RequestOutputKind, SamplingParams
from hexad.server.app import State, create_app
from hexad.server.chat import Chat
from hexad.server.logs import configure
from hexad.server.protocol import Protocol
from hexad.server.service import Service
from hexad.server.settings import ServerSettings
from hexad.server.tracing import Tracer

logger = logging.getLogger("hexad.server")

_MEASURED = 9
"""Tokens generated to say how fast the model is."""


def serve(settings: ServerSettings) -> int:
    """Serves until a signal ends it. Returns the exit code: 0 when it was told to end, 1 when it failed.

    Raises ConfigError for addresses, keys and certificates that cannot be used.
    """
    logs = configure(settings.log_format, settings.log_level)
    tracer = Tracer(settings.otlp_endpoint) if settings.otlp_endpoint else None
    state = State()
    config = uvicorn.Config(
        create_app(settings, state, tracer),
        http=Protocol,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=settings.timeout_keep_alive,
        timeout_graceful_shutdown=5,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        # Never none: OpenSSL would ask for the password of a locked key on the terminal, and wait.
        ssl_keyfile_password=settings.ssl_keyfile_password or "-",
        ssl_ca_certs=None if settings.ssl_ca_certs is None else str(settings.ssl_ca_certs),
        ssl_cert_reqs=ssl.CERT_NONE if settings.ssl_ca_certs is None else ssl.CERT_REQUIRED,
        lifespan="off",
        ws="none",
    )
    try:
        config.load()
    except OSError as error:  # ssl's errors are, too
        raise ConfigError(
            f"The certificate {settings.ssl_certfile}, its key or its authorities cannot be used: {error}."
        ) from error
    sockets = [_listen(settings)]
    process = _Process(settings, state, _Server(config))
    try:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            code = runner.run(process.run(sockets))
            if process.is_loading:  # its thread cannot be told to end, and the process would wait for it
                logs.flush()
                sys.stdout.flush()
                os._exit(code)
            return code
    finally:
        if tracer is not None:
            tracer.close()
        logs.flush()


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
        self.is_loading = True

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
        notify("STOPPING=1")
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
        try:
            llm, chat = await asyncio.to_thread(load, self.settings)
            self._llm = llm
            self.is_loading = False
            speed = await _speed(llm)
            if self._stop.is_set():
                return
            names = chat.service.names
            self.state.metrics.serve(llm, names[0])
            # What is there now stays. Else each collection would go through all of it, between two tokens.
            gc.collect()
            gc.freeze()
            self.state.chat = chat
            loop = asyncio.get_running_loop()
            llm.engine.on_broken(lambda: loop.call_soon_threadsafe(self._broke))
            _print(
                *str(llm.plan).splitlines(),
                f"speed      {speed:6,.0f} tok/s  one stream",
                f"Ready: {', '.join(names)}.",
            )
            notify("READY=1")
        except HexadError as error:
            _print("error: " + " ".join([str(error), *getattr(error, "__notes__", [])]), file=sys.stderr)
            self._fail()
        except Exception:
            logger.exception("The model could not be loaded.")
            self._fail()

    def _broke(self) -> None:
        """The engine's thread died: those who waited have been told; a new process may do better."""
        self.state.broken = True
        self._fail()

    def _fail(self) -> None:
        self._code = 1
        self.is_loading = False
        self._stop.set()


def load(settings: ServerSettings) -> tuple[AsyncLLM, Chat]:
    """The model, and how to talk with it. Raises what AsyncLLM raises."""
    llm = AsyncLLM(settings.model, generation_config=settings.generation_config, **settings.engine)
    try:
        chat = Chat(Service(llm, settings, settings.served_model_name or [settings.model]))
        if settings.chat_template is not None:  # that a template is broken is better said now than later
            with contextlib.suppress(PromptError):
                chat.service.prompts.chat(
                    [{"role": "user", "content": "Hello"}], chat_template=settings.chat_template
                )
    except BaseException:
        llm.shutdown()
        raise
    return llm, chat


async def _speed(llm: AsyncLLM) -> float:
    """Tokens per second of one stream, from a few of them; they warm the model up, too."""
    most = min(_MEASURED, llm.plan.max_model_len - 1)
    params = SamplingParams(
        max_tokens=max(1, most), temperature=0, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    times: list[float] = []
    async for output in llm.generate({"prompt_token_ids": [0]}, params, "hexad-warm-up"):
        times += [time.perf_counter()] * len(output.outputs[0].token_ids)
    times = times[len(times) // 3 :]  # the first ones touch memory that later ones find
    return (len(times) - 1) / (times[-1] - times[0]) if times and times[-1] > times[0] else 0.0


def _listen(settings: ServerSettings) -> socket.socket:
    """The listening socket. Raises ConfigError if it cannot be had."""
    if settings.uds is not None:
        path = Path(settings.uds)
        if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
            raise ConfigError(f"uds {path} is there, and is no socket.")
        with socket.socket(socket.AF_UNIX) as other, contextlib.suppress(OSError):
            other.settimeout(1)
            other.connect(str(path))
            raise ConfigError(f"uds {path} is in use: another server listens on it.")
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
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"{settings.host}:{settings.port} cannot be listened on: {reason}. Choose "
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
    _print(f"hexad listens on {where}")
    if settings.uds is None:
        _print(
            f"  a page to chat on   {where}/",
            f"  OpenAI's API        {where}/v1",
            f"  documents           {where}/docs",
        )


def _print(*lines: str, file: TextIO | None = None) -> None:
    """Says it to whoever listens. A full disk, or a reader that has left, does not end a server."""
    stream = file or sys.stdout
    try:
        print(*lines, sep="\n", file=stream, flush=True)
    except OSError:
        with contextlib.suppress(OSError):  # what was not taken would be tried again as the process ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def notify(state: str) -> None:
    """Tells systemd, where it asked to be told (Type=notify; sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith(("/", "@")):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)
