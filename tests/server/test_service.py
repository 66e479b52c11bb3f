"""Generation: however a request ends, it gives its places back, once. And what systemd is told."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hexad.server.errors import ApiError
from hexad.server.logs import facts
from hexad.server.serve import notify
from hexad.server.service import Generation, Service
from hexad.server.settings import ServerSettings


class Stream:
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def service(**settings: Any) -> Any:
    """A Service without a model."""
    made: Any = object.__new__(Service)
    made.settings = ServerSettings(max_num_seqs=4, max_waiting=4, **settings)
    made.names, made.in_flight, made._seconds = ("m",), 0, 1.0
    return made


def running(test: Callable[[], Any]) -> Any:
    async def run() -> Any:
        return await test()

    return asyncio.run(run())


def test_it_ends_when_it_is_dropped_before_anybody_read_it() -> None:
    async def test() -> None:
        given, stream = service(), Stream()
        generation = Generation(given)
        generation.reserve(3)
        generation.streams.append(stream)  # type: ignore[arg-type]
        outputs = generation.__aiter__()  # an answer's generator that is never begun
        assert given.in_flight == 3
        del generation, outputs
        gc.collect()
        assert (given.in_flight, stream.closed) == (0, 1)

    running(test)


def test_it_ends_when_its_time_is_over_though_nobody_reads() -> None:
    async def test() -> None:
        given, stream = service(request_timeout=0.01), Stream()
        generation = Generation(given)
        generation.reserve(2)
        generation.streams.append(stream)  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        assert (given.in_flight, stream.closed) == (0, 1)
        with pytest.raises(ApiError, match=r"longer than 0\.01 seconds") as caught:
            generation.check_time()
        assert caught.value.status == 504
        generation.close()
        assert given.in_flight == 0

    running(test)


def test_a_request_may_ask_for_so_many_continuations_over_all_its_prompts() -> None:
    async def test() -> None:
        given = service(max_n=6)
        generation = Generation(given)
        generation.reserve(3)
        with pytest.raises(ApiError, match="asks for 7 continuations; this server makes at most 6"):
            generation.reserve(4)
        generation.close()

    running(test)


def test_places_are_bounded_and_the_answer_says_when_to_come_again() -> None:
    async def test() -> None:
        given = service()
        first = Generation(given)
        first.reserve(8)
        second = Generation(given)
        with pytest.raises(ApiError, match="8 sequences run or wait, and it takes 8") as caught:
            second.reserve(1)
        assert (caught.value.status, caught.value.headers["Retry-After"]) == (429, "2")
        first.close()
        second.reserve(1)
        second.close()
        assert given.in_flight == 0

    running(test)


def test_what_is_logged_of_it() -> None:
    async def test() -> None:
        log: dict[str, Any] = {}
        facts.set(log)
        generation = Generation(service())
        generation.reserve(1)
        generation.streams.append(Stream())  # type: ignore[arg-type]
        generation.prompts = [SimpleNamespace(token_ids=[1, 2, 3])]  # type: ignore[list-item]
        generation.close()
        assert (log["prompt_tokens"], log["completion_tokens"], log["finish_reasons"]) == (3, 0, [])

    running(test)


def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify("READY=1")
        assert channel.recv(100) == b"READY=1"
    notify("STOPPING=1")  # systemd is gone: no error
