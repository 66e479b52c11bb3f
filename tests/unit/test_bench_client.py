"""The client of `hexad bench serve`: bytes cut anywhere, connections kept and lost, servers that fail."""

from __future__ import annotations

import asyncio

import pytest
from tests.fake_openai import (
    BROKEN,
    BUSY,
    DONE,
    END,
    STREAM,
    FakeServer,
    Request,
    Step,
    chunk,
    event,
    head,
    serving,
    text,
    usage,
    whole,
)

from hexad.cli.bench_client import Answer, Client, Events, RequestFailed, Response
from hexad.errors import ConfigError

# --- HTTP and events, cut anywhere ---

CHUNKED = (
    head("200 OK", "Transfer-Encoding: chunked", "X: 1") + b"5;a=b\r\nhello\r\n00A\r\n, world\r\n!\r\n0\r\n"
)
BODIES = {
    "length": (head("200 OK", "content-LENGTH: 15") + b"hello, world\r\n!", True),
    "chunks": (CHUNKED + b"\r\n", True),
    "trailers": (CHUNKED + b"Expires: never\r\n\r\n", True),
    "interim": (head("100 Continue") + head("103 Early Hints", "Link: x") + CHUNKED + b"\r\n", True),
    "to the end": (head("200 OK") + b"hello, world\r\n!", False),
    "close": (head("200 OK", "Connection: close", "Content-Length: 15") + b"hello, world\r\n!", False),
    "old": (b"HTTP/1.0 200\r\nContent-Length: 15\r\n\r\nhello, world\r\n!", False),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_response_cut_anywhere_is_the_same(name: str) -> None:
    data, reusable = BODIES[name]
    for size in range(1, len(data) + 1):
        response = Response()
        body = b""
        for at in range(0, len(data), size):
            assert not response.complete
            body += response.feed(data[at : at + size])
        assert response.complete != (name == "to the end")
        assert response.end()
        assert (response.status, body) == (200, b"hello, world\r\n!")
        assert response.reusable == reusable


@pytest.mark.parametrize("headers", [["Content-Length: 0"], ["Transfer-Encoding: chunked"], []])
def test_responses_without_a_body(headers: list[str]) -> None:
    response = Response()
    assert response.feed(head("204 No Content" if not headers else "200 OK", *headers)) == b""
    assert response.complete != ("Transfer-Encoding: chunked" in headers)


@pytest.mark.parametrize("name", ["length", "chunks"])
def test_a_response_that_ends_too_early_is_not_complete(name: str) -> None:
    data, _ = BODIES[name]
    for length in range(len(data)):
        response = Response()
        response.feed(data[:length])
        assert not response.end()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "first line is 'SSH"),
        (head("200 OK", "Content-Length: -1"), "Content-Length of '-1'"),
        (head("200 OK", "Transfer-Encoding: chunked") + b"g\r\n", "a chunk's size of b'g'"),
        (head("200 OK", "Transfer-Encoding: chunked") + b"1\r\nabc", "longer than its size"),
        (head("200 OK", "Content-Length: 1") + b"ab", "bytes after its end"),
        (b"H" * 70_000, "more than 65,536 bytes"),
        (head("200 OK", "Transfer-Encoding: chunked") + b"1" * 70_000, "more than 65,536 bytes"),
    ],
)
def test_malformed_responses(data: bytes, words: str) -> None:
    with pytest.raises(RequestFailed, match=words) as error:
        Response().feed(data)
    assert error.value.kind == "malformed response"


def test_events_cut_anywhere_are_the_same() -> None:
    data = (
        b": hi\n\ndata: one\n\r\nevent: x\r\nid: 3\r\ndata:two\r\ndata:  three\r\n\r\n\ndata:\n\ndata: half"
    )
    expected = [b"one", b"two\n three", b""]
    for size in range(1, len(data) + 1):
        events = Events()
        found = [e for at in range(0, len(data), size) for e in events.feed(data[at : at + size])]
        assert found == expected


def test_endless_events_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hexad.cli.bench_client.MAX_EVENT", 100)
    events = Events()
    events.feed(b"x" * 100)
    with pytest.raises(RequestFailed, match="more than 100 bytes"):
        events.feed(b"x")


# --- the client at a server ---

HELLO = STREAM + chunk(text("he")) + chunk(text("llo")) + chunk(usage(3, 2)) + chunk(DONE) + END


def ask(
    fake: FakeServer, count: int = 1, timeout: float | None = 30, path: str = "/v1/completions"
) -> list[Answer]:
    """The answers to requests sent one after another."""

    async def main() -> list[Answer]:
        client = Client(fake.url, "key", timeout)
        answers = [Answer() for _ in range(count)]
        for answer in answers:
            await client.stream(path, b'{"n": 1}', answer)
        client.close()
        return answers

    return asyncio.run(main())


def test_an_answer_has_its_times_and_counts() -> None:
    steps = [
        STREAM,
        0.02,
        chunk(event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})),
        0.03,
        chunk(event({"choices": [{"delta": {"content": 'say "text": "x"'}}]})),
        0.04,
        chunk(event({"choices": [{"delta": {"reasoning_content": "é"}}]})),
        chunk(usage(3, 7) + DONE) + END,
    ]
    with serving(lambda request: steps) as fake:
        (answer,) = ask(fake)
    assert (answer.error, answer.prompt_tokens, answer.output_tokens) == ("", 3, 7)
    assert len(answer.times) == 2
    _, role, first, second, end = fake.sent
    assert role - answer.sent >= 0.02
    assert answer.ttft >= 0.05  # the role alone is no text
    for seen, sent in zip([*answer.times, answer.end], (first, second, end), strict=True):
        assert seen >= sent


def test_a_token_without_text_has_its_time_if_ids_are_told() -> None:
    steps = [
        STREAM,
        chunk(event({"prompt_token_ids": [1], "choices": [{"text": "", "token_ids": []}]})),
        chunk(event({"choices": [{"text": "", "token_ids": [7]}]})),
        chunk(event({"choices": [{"text": "é", "token_ids": [8]}]})),
        chunk(DONE) + END,
    ]
    with serving(lambda request: steps) as fake:
        (answer,) = ask(fake)
    assert (answer.error, len(answer.times)) == ("", 2)


def test_a_stream_cut_anywhere_is_the_same() -> None:
    for size in (1, 2, 3, 7, 50, 120):
        parts = [HELLO[at : at + size] for at in range(0, len(HELLO), size)]
        with serving(lambda request, parts=parts: parts) as fake:
            (answer,) = ask(fake)
        assert (answer.error, len(answer.times), answer.output_tokens) == ("", 2, 2)


def test_connections_are_kept() -> None:
    with serving(lambda request: [HELLO]) as fake:
        answers = ask(fake, 5)
    assert [answer.error for answer in answers] == [""] * 5
    assert fake.connections == 1
    assert fake.requests[0].headers["authorization"] == "Bearer key"
    assert fake.requests[0].line == "POST /v1/completions HTTP/1.1"


def test_a_kept_connection_that_the_server_closes_is_replaced() -> None:
    """The first two requests of a connection are taken, the third finds it closed without a word."""
    taken: list[int] = []

    def steps(request: Request) -> list[Step]:
        taken.append(request.connection)
        return [None] if taken.count(request.connection) == 3 else [HELLO]

    with serving(steps) as fake:
        answers = ask(fake, 5)
    assert [answer.error for answer in answers] == [""] * 5
    assert taken == [1, 1, 1, 2, 2, 2, 3]


def test_a_new_connection_that_is_closed_is_a_failure() -> None:
    with serving(lambda request: [None]) as fake:
        answers = ask(fake, 2)
    assert [answer.error for answer in answers] == ["connection closed"] * 2
    assert len(fake.requests) == 2


def test_a_server_may_close_after_each_answer() -> None:
    closing = HELLO.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    with serving(lambda request: [closing, None]) as fake:
        answers = ask(fake, 3)
    assert [answer.error for answer in answers] == [""] * 3
    assert fake.connections == 3


def test_a_server_may_end_its_stream_with_the_connection() -> None:
    body = head("200 OK", "Content-Type: text/event-stream") + text("a") + usage(1, 1) + DONE
    with serving(lambda request: [body, None]) as fake:
        (answer,) = ask(fake)
    assert (answer.error, answer.tokens) == ("", 1)


FAILURES: dict[str, tuple[list[Step], str, str]] = {
    "busy": ([BUSY], "HTTP 429", "come back"),
    "broken": ([BROKEN], "HTTP 500", "o\ufffdh"),
    "cut": ([STREAM + chunk(text("a")), 0.01, None], "connection closed", ""),
    "cut in a chunk": ([STREAM + chunk(text("a"))[:-5], None], "connection closed", ""),
    "no end": ([STREAM + chunk(text("a")) + END], "malformed response", "without [DONE]"),
    "an error later": (
        [STREAM + chunk(text("a")), chunk(event({"error": {"message": "a step failed", "code": 500}}))],
        "error in stream",
        "a step failed",
    ),
    "no stream": ([whole("200 OK", {"choices": []})], "malformed response", "application/json, not a stream"),
    "no HTTP": ([b"220 ready\r\n\r\n"], "malformed response", "'220 ready'"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures(name: str) -> None:
    steps, kind, words = FAILURES[name]
    with serving(lambda request: steps) as fake:
        (answer,) = ask(fake)
    assert answer.error == kind
    assert words in answer.detail
    assert answer.end > answer.sent


def test_a_failed_stream_spoils_no_other() -> None:
    kinds = iter(["broken", "cut", "an error later", "no end", "busy"])

    def steps(request: Request) -> list[Step]:
        kind = next(kinds, None)
        return FAILURES[kind][0] if kind else [HELLO]

    with serving(steps) as fake:
        answers = ask(fake, 7)
    assert [bool(answer.error) for answer in answers] == [True] * 5 + [False] * 2


def test_a_server_that_says_nothing_times_out() -> None:
    with serving(lambda request: [STREAM, chunk(text("a")), 30.0]) as fake:
        (answer,) = ask(fake, timeout=0.05)
    assert (answer.error, answer.detail) == ("timed out", "after 0.05 s")


def test_nobody_there() -> None:
    with serving(lambda request: []) as fake:
        pass
    (answer,) = ask(fake)
    assert answer.error == "no connection"
    assert "refused" in answer.detail


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "ftp://x", "http://", "http://x:port", "http://x:99999", "http://x/ y\r\n"]
)
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--base-url"):
        Client(url)
