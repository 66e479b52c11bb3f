"""`hexad serve` under load, and with clients that are lost, slow or hostile."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.server.process import ServerProcess
from tests.server.raw import (
    LAUNCH,
    Connection,
    completion,
    is_idle,
    launched,
    post,
    request,
    streaming,
    wait_for,
)

IMPATIENT = f"""
from hexad.server import protocol
protocol.HEADER_TIMEOUT, protocol.SEND_TIMEOUT = 2.0, 2.0
{LAUNCH}
"""


@pytest.fixture(scope="module")
def busy() -> Iterator[ServerProcess]:
    """A server for 16 sequences that is short with who is slow."""
    arguments = (
        "--max-num-seqs",
        "16",
        "--max-model-len",
        "512",
        "--log-format",
        "json",
        "--body-timeout",
        "2",
    )
    with launched(IMPATIENT, *arguments) as process:
        yield process
        assert process.process.poll() is None


# Load.


def test_50_clients_that_drop_their_streams_leave_nothing_behind(busy: ServerProcess) -> None:
    wait_for(lambda: is_idle(busy))
    begun = [Connection(busy).send(request(completion(480, stream=True))) for _ in range(50)]
    for connection in begun[:16]:
        connection.read_until(b"data: ")
    for i, connection in enumerate(begun):
        connection.reset() if i % 2 else connection.socket.close()
    assert wait_for(lambda: busy.metric("hexad:num_requests_running") == 0, 10) < 2
    wait_for(lambda: is_idle(busy), 2)


def test_dropped_clients_of_whole_answers_are_cancelled_too(busy: ServerProcess) -> None:
    for stream in (False, True):  # a chat's answer, too, is not finished for nobody
        with Connection(busy) as connection:
            connection.send(request(completion(480, stream)))
            wait_for(lambda: busy.metric("hexad:num_requests_running") == 1)
        wait_for(lambda: is_idle(busy), 2)


def test_200_requests_at_once_all_finish(busy: ServerProcess) -> None:
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(lambda i: post(busy, completion(8, prompt=f"{i} and")), range(200)))
    assert {status for status, _, _ in answers} == {200}
    assert all(answer["usage"]["completion_tokens"] == 8 for _, _, answer in answers)
    assert busy.metric("hexad:num_requests_running") == 0


def test_handles_do_not_grow_with_dropped_clients(busy: ServerProcess) -> None:
    wait_for(lambda: is_idle(busy))

    def drop(count: int) -> float:
        for _ in range(count):
            streaming(busy).reset()
        wait_for(lambda: is_idle(busy))
        return busy.metric("process_open_fds")

    before = drop(10)
    assert drop(150) <= before + 2


# Clients that are slow, or worse.


def test_slow_heads_and_bodies_are_ended(busy: ServerProcess) -> None:
    with (
        Connection(busy) as silent,
        Connection(busy) as head,
        Connection(busy) as breaks,
        Connection(busy) as body,
    ):
        head.send(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        breaks.send(b"\r\n")
        body.send(request(completion(1))[:-5])
        assert post(busy, completion(1))[0] == 200  # nobody else waits
        assert silent.read() == b""
        assert b" 408 " in head.read()
        breaks.read()
        answer = body.read()
        assert b" 408 " in answer
        assert b"within 2 seconds" in answer


def send_for_ever(connection: Connection) -> None:
    for _ in range(200):
        connection.send(b"x" * 65536)
        time.sleep(0.01)


def test_a_head_that_never_ends_is_refused(busy: ServerProcess) -> None:
    with Connection(busy) as connection:
        connection.send(b"GET /health HTTP/1.1\r\nX-Long: ")
        with pytest.raises(ConnectionError):
            send_for_ever(connection)
    with Connection(busy) as connection:
        connection.send(
            b"GET /health HTTP/1.1\r\nConnection: close\r\nX-Long: " + b"x" * 70_000 + b"\r\n\r\n"
        )
        assert b" 431 " in connection.read()


def test_a_reader_who_stops_reading_is_given_up(busy: ServerProcess) -> None:
    size = len(busy.get("/openapi.json")[1])
    with Connection(busy) as connection:
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        ask = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
        connection.socket.settimeout(1)
        with contextlib.suppress(OSError):
            connection.send(ask * 4000)
        time.sleep(4)
        connection.socket.settimeout(10)
        assert len(connection.read()) < 2000 * size  # and not a time-out: the server has closed
    assert post(busy, completion(1))[0] == 200


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\xff\x16\x03\x01" * 100,
        b"GET\r\n\r\n",
        b"BREW /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_a_400(busy: ServerProcess, data: bytes) -> None:
    with Connection(busy) as connection:
        assert b" 400 " in connection.send(data).read_until(b"\r\n")


def test_pipelined_requests_are_answered_in_order(busy: ServerProcess) -> None:
    names = [f"name-{i}" for i in range(20)]
    asked = b"".join(f"GET /health HTTP/1.1\r\nX-Request-Id: {name}\r\n\r\n".encode() for name in names)
    with Connection(busy) as connection:
        connection.send(asked + b"GET /version HTTP/1.1\r\nConnection: close\r\n\r\n")
        answer = connection.read().decode()
    found = [line.split()[1] for line in answer.split("\r\n") if line.startswith("x-request-id: name-")]
    assert found == names
    assert '"version"' in answer


def test_a_client_that_goes_with_a_request_pipelined_is_noticed(busy: ServerProcess) -> None:
    wait_for(lambda: is_idle(busy))
    connection = streaming(busy)
    connection.send(request(completion(480)))
    time.sleep(0.1)
    connection.reset()
    wait_for(lambda: is_idle(busy), 2)


# Bodies.


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"{", (), 400, "not valid JSON"),
        (b"", (), 400, "must be a JSON object"),
        (b"[1]", (), 400, "must be a JSON object"),
        (b'{"prompt": "\xff"}', (), 400, "not UTF-8"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", (), 400, "nests too deep"),
        (b'{"prompt": "x", "seed": ' + b"1" * 5000 + b"}", (), 400, "cannot be read"),
        (b'{"prompt": "x", "max_tokens": "5"}', (), 400, "max_tokens"),
        (b'{"prompt": "\\ud800"}', (), 400, "Unicode"),
        (b'{"prompt": "x", "model": "\\ud800"}', (), 404, "does not exist"),
        (b" " * (17 << 20), (), 413, "longer than 16,777,216 bytes"),
    ],
)
def test_bodies_that_are_refused(
    busy: ServerProcess, body: bytes, headers: tuple[str, ...], status: int, message: str
) -> None:
    found, named, answer = post(busy, body, *headers)
    assert (found, message in answer["error"]["message"]) == (status, True), answer
    assert named["x-request-id"]


def test_a_chunked_body_is_bounded_too(busy: ServerProcess) -> None:
    with Connection(busy) as connection:
        connection.send(b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n")
        connection.send(b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(20):
            connection.send(b"100000\r\n" + b" " * 0x100000 + b"\r\n")
        assert b" 413 " in connection.send(b"0\r\n\r\n").read_until(b"\r\n\r\n")
    assert post(busy, completion(1))[0] == 200


def test_a_body_of_another_type_is_refused(busy: ServerProcess) -> None:
    content = b'{"prompt": "x"}'
    head = (
        f"POST /v1/completions HTTP/1.1\r\nContent-Type: text/plain\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    with Connection(busy) as connection:
        answer = connection.send(head.encode() + content).read_until(b"}}")
    assert b" 400 " in answer
    assert b"application/json" in answer


# What operators see.


def test_figures(busy: ServerProcess) -> None:
    before = busy.metric("hexad:generation_tokens_total")
    post(busy, completion(3))
    busy.get("/nothing/here/1")
    busy.get("/nothing/here/2")
    assert busy.metric("hexad:generation_tokens_total") == before + 3
    text = busy.get("/metrics")[1].decode()
    assert 'http_requests_total{method="POST",handler="/v1/completions",status="200"}' in text
    assert "nothing/here" not in text  # paths are no labels: there is no end of them
    assert 'handler="none",status="404"' in text
    assert f'num_gpu_blocks="{8 * 512 // 32}"' in text
    assert busy.metric("process_resident_memory_bytes") > busy.metric("hexad:weights_bytes")
    assert busy.get("/load") == (200, b'{"server_load":0}')
    from prometheus_client.parser import text_string_to_metric_families

    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["hexad:time_to_first_token_seconds"].type == "histogram"
    assert families["hexad:request_success"].type == "counter"


def test_logs_are_json_with_the_requests_id_and_no_secret(busy: ServerProcess) -> None:
    post(
        busy,
        completion(4, prompt="A secret of mine"),
        "X-Request-Id: one-of-mine",
        "Authorization: Bearer s3cret",
    )
    wait_for(lambda: "one-of-mine" in busy.output)
    line = json.loads(next(line for line in busy.output.splitlines() if "one-of-mine" in line))
    assert line["request_id"] == "one-of-mine"
    assert (line["path"], line["status"], line["completion_tokens"]) == ("/v1/completions", 200, 4)
    assert line["finish_reasons"] == ["length"]
    assert line["time_to_first_token"] <= line["seconds"]
    assert "secret of mine" not in busy.output
    assert "s3cret" not in busy.output


def test_docs_need_nothing_from_elsewhere(busy: ServerProcess) -> None:
    status, page = busy.get("/docs")
    assert status == 200
    assert b"http" not in page.replace(b"http-equiv", b"")
    document = json.loads(busy.get("/openapi.json")[1])
    completions = document["paths"]["/v1/completions"]["post"]
    assert {"200", "400", "401", "413", "429", "503"} <= completions["responses"].keys()
    assert "422" not in completions["responses"]
    assert "text/event-stream" in completions["responses"]["200"]["content"]


# Bounds of the queue and of time, and keys.


def test_a_full_queue_answers_at_once_and_long_requests_end() -> None:
    arguments = (
        "--max-num-seqs",
        "2",
        "--max-waiting",
        "2",
        "--request-timeout",
        "1.5",
        "--max-model-len",
        "4096",
    )
    with ServerProcess(*arguments) as server:
        begun = [Connection(server).send(request(completion(4000, stream=True))) for _ in range(3)]
        whole = Connection(server).send(request(completion(4000)))
        wait_for(
            lambda: (
                server.metric("hexad:num_requests_running") + server.metric("hexad:num_requests_waiting") == 4
            )
        )
        at = time.monotonic()
        status, headers, answer = post(server, completion(1))
        assert time.monotonic() - at < 1
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
        for connection in begun:
            with connection:
                assert b"longer than 1.5 seconds" in connection.read_until(b"[DONE]")
        with whole:
            assert b" 504 " in whole.read_until(b"}}")
        wait_for(lambda: is_idle(server), 2)
        assert post(server, completion(1))[0] == 200


def test_keys_open_all_but_what_says_whether_it_is_up(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("k1\nk2\n")
    with ServerProcess("--api-key-file", str(tmp_path / "keys"), "--cors", "https://a.example") as server:
        for path, expected in (("/health", 200), ("/docs", 200), ("/metrics", 401), ("/v1/models", 401)):
            assert server.get(path)[0] == expected, path
        assert post(server, completion(1), "Authorization: Bearer k3")[0] == 401
        assert post(server, completion(1), "Authorization: Bearer k2")[0] == 200
        assert post(server, completion(1), "X-Api-Key: k1")[0] == 200
        _, headers, _ = post(server, completion(1), "Origin: https://a.example")  # refused, and readable
        assert headers["access-control-allow-origin"] == "https://a.example"
        _, headers, _ = post(server, completion(1), "Origin: https://b.example")
        assert "access-control-allow-origin" not in headers
