"""`hexad serve` left running: load, lost and hostile clients, signals, failures. By raw sockets."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.server.process import ServerProcess

LAUNCH = "from hexad.cli import main; main()"

IMPATIENT = f"""
from hexad.server import protocol
protocol.HEADER_TIMEOUT, protocol.SEND_TIMEOUT = 2.0, 2.0
{LAUNCH}
"""

SLOW_TO_LOAD = f"""
import time
from hexad.server import serve
serve.AsyncLLM = lambda *given, **more: time.sleep(600)
{LAUNCH}
"""

BREAKABLE = f"""
import os
from hexad.runner.model_runner import ModelRunner
execute = ModelRunner.execute
def breaking(self, step):
    for error in (ValueError, SystemExit):
        if step.sequence_ids and os.path.exists(f"{{os.environ['TRIGGER']}}.{{error.__name__}}"):
            os.remove(f"{{os.environ['TRIGGER']}}.{{error.__name__}}")
            raise error("broken by a test")
    return execute(self, step)
ModelRunner.execute = breaking
{LAUNCH}
"""


def launched(code: str, *arguments: str, **more: Any) -> ServerProcess:
    return ServerProcess(*arguments, command=("-c", code, "serve"), **more)


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


class Connection:
    """A raw connection to a server."""

    def __init__(self, server: ServerProcess) -> None:
        host, port = server.url.rpartition("/")[2].rsplit(":", 1)
        self.socket = socket.create_connection((host, int(port)), timeout=30)

    def send(self, data: bytes) -> Connection:
        self.socket.sendall(data)
        return self

    def read_until(self, end: bytes) -> bytes:
        data = b""
        while end not in data and (piece := self.socket.recv(65536)):
            data += piece
        return data

    def read(self) -> bytes:
        """All until the server closes."""
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := self.socket.recv(65536):
                data += piece
        return data

    def reset(self) -> None:
        """Goes as a process does that is killed with data unread."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()


def request(body: bytes | dict[str, Any], path: str = "/v1/completions", *headers: str) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = (f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers)
    head = "\r\n".join((*lines, f"Content-Length: {len(content)}", "", ""))
    return head.encode() + content


def completion(tokens: int, stream: bool = False, **more: Any) -> dict[str, Any]:
    given = {"prompt": "One, two, three,", "max_tokens": tokens, "ignore_eos": True, "stream": stream}
    return {**given, "temperature": 0, **more}


def post(server: ServerProcess, body: Any, *headers: str) -> tuple[int, dict[str, str], Any]:
    """(status, headers, JSON) of a completion."""
    with Connection(server) as connection:
        connection.send(request(body, "/v1/completions", "Connection: close", *headers))
        head, _, content = connection.read().partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    named = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(status.split()[1]), named, json.loads(content)


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> float:
    """Seconds until it holds."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, "it did not come to be"
        time.sleep(0.02)
    return time.monotonic() - begin


def is_idle(server: ServerProcess) -> bool:
    return all(
        server.metric(f"hexad:{name}") == 0
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "server_load")
    )


def streaming(server: ServerProcess, tokens: int = 480) -> Connection:
    """A stream whose first event has come."""
    connection = Connection(server).send(request(completion(tokens, stream=True)))
    assert b"200 OK" in connection.read_until(b"data: ")
    return connection


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


# Signals.


def test_sigterm_lets_what_runs_finish() -> None:
    with ServerProcess("--max-model-len", "512") as server:
        streams = [streaming(server, 200) for _ in range(4)]
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "finishing what runs" in server.output)
        status, _, answer = post(server, completion(1))
        assert (status, answer["error"]["code"]) == (503, "shutting_down")
        assert server.get("/health")[0] == 503
        for connection in streams:
            with connection:
                assert b'"finish_reason":"length"' in connection.read_until(b"data: [DONE]\n\n")
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.output


def test_what_does_not_finish_in_time_is_told() -> None:
    with ServerProcess("--timeout-graceful", "0.2", "--max-model-len", "4096") as server:
        with streaming(server, 4000) as connection:
            server.process.send_signal(signal.SIGTERM)
            assert "shuts down" in connection.read().decode()
        assert server.process.wait(30) == 0


def test_a_second_signal_ends_it_at_once() -> None:
    with ServerProcess("--max-model-len", "4096") as server, streaming(server, 4000):
        server.process.send_signal(signal.SIGINT)
        wait_for(lambda: "finishing what runs" in server.output)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(5) == 128 + signal.SIGINT


def test_it_listens_while_it_loads_and_can_be_ended() -> None:
    with launched(SLOW_TO_LOAD, ready=False) as server:
        status, headers, answer = post(server, completion(1))
        assert (status, answer["error"]["code"]) == (503, "loading")
        assert headers["retry-after"] == "1"
        assert server.get("/health")[0] == 503
        assert server.metric("process_resident_memory_bytes") > 0
        begin = time.monotonic()
        assert server.terminate(10) == 0
        assert time.monotonic() - begin < 5


def test_health_turns_200_when_it_is_ready(busy: ServerProcess) -> None:
    assert busy.get("/health") == (200, b'{"status":"ok"}')


# Failures.


def test_a_step_that_fails_ends_its_requests_and_a_broken_engine_the_server(tmp_path: Path) -> None:
    trigger = tmp_path / "trigger"
    with launched(BREAKABLE, environment={"TRIGGER": str(trigger)}) as server:
        Path(f"{trigger}.ValueError").touch()
        status, _, answer = post(server, completion(1))
        assert status == 500
        assert "broken by a test" in answer["error"]["message"]
        assert post(server, completion(1))[0] == 200  # it goes on

        with streaming(server) as stream, Connection(server) as whole:
            whole.send(request(completion(480)))
            wait_for(lambda: server.metric("hexad:num_requests_running") == 2)
            Path(f"{trigger}.SystemExit").touch()
            assert b"The engine broke" in stream.read()
            assert b" 503 " in whole.read()
        assert server.process.wait(20) == 1


def test_a_log_that_nobody_reads_holds_nothing_up() -> None:
    with ServerProcess("--log-level", "info") as probe:
        url = probe.url  # where a port is free
    port = url.rsplit(":", 1)[1]
    command = [sys.executable, "-m", "hexad", "serve", "smollm2:135m", "--port", port]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:

        def get(path: str) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=10)
            try:
                connection.request("GET", path)
                return connection.getresponse().status
            except ConnectionRefusedError:
                return 0
            finally:
                connection.close()

        wait_for(lambda: get("/health") == 200)
        for _ in range(400):  # more than a pipe holds
            assert get("/" + "x" * 200) == 404
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disks_and_readers_that_leave_do_not_end_it() -> None:
    with ServerProcess() as probe:
        port = probe.url.rsplit(":", 1)[1]
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "hexad", "serve", "smollm2:135m", "--port", port]
        process = subprocess.Popen(command, stdout=full, stderr=full)
        try:

            def is_up() -> bool:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(port)), 5) as s:
                    s.sendall(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
                    return b" 200 " in s.recv(65536)
                return False

            wait_for(is_up)
            process.terminate()
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()


def refused(*arguments: str, code: int = 1) -> str:
    """What a server says that does not come up: one line."""
    command = [sys.executable, "-m", "hexad", "serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_what_keeps_it_from_coming_up_is_one_line(busy: ServerProcess, tmp_path: Path) -> None:
    port = busy.url.rsplit(":", 1)[1]
    assert "cannot be listened on: Address already in use" in refused("--port", port)
    assert "no-such-model" in refused("no-such-model", "--port", "0")
    assert "certificate" in refused("--ssl-certfile", str(tmp_path / "none.pem"), "--port", "0")
    assert "needs OpenTelemetry" in refused("--otlp-endpoint", "http://127.0.0.1:9", "--port", "0")
    assert "max_model_len" in refused("--max-model-len", "999999", "--port", "0")
    assert "chat_template" in refused("--chat-template", "{% broken", "--port", "0")
    (tmp_path / "file").touch()
    assert "is no socket" in refused("--uds", str(tmp_path / "file"))


# Other ways in.


def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "hexad.sock"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()  # as a server leaves it that was killed
    with ServerProcess("--uds", str(path)) as server:
        assert server.url == f"unix:{path}"
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nConnection: close\r\n\r\n")
            assert b" 200 " in connection.recv(65536)
        assert "in use" in refused("--uds", str(path))
        assert server.terminate() == 0
    assert not path.exists()


def test_tls_with_clients_certificates(tmp_path: Path) -> None:
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=here"
    for name in ("server", "client"):
        files = ["-keyout", str(tmp_path / f"{name}.key"), "-out", str(tmp_path / f"{name}.pem")]
        subprocess.run(
            [*make.split(), "-addext", "subjectAltName=IP:127.0.0.1", *files], check=True, capture_output=True
        )
    locked = ["openssl", "ec", "-in", str(tmp_path / "server.key"), "-aes256", "-passout", "pass:open"]
    subprocess.run([*locked, "-out", str(tmp_path / "locked.key")], check=True, capture_output=True)
    files = ["--ssl-certfile", str(tmp_path / "server.pem"), "--ssl-keyfile", str(tmp_path / "locked.key")]
    assert "cannot be used" in refused(*files, "--port", "0")  # and is not asked for on the terminal
    files += ["--ssl-keyfile-password", "open", "--ssl-ca-certs", str(tmp_path / "client.pem")]
    with ServerProcess(*files) as server:
        assert server.url.startswith("https://")
        port = int(server.url.rsplit(":", 1)[1])
        context = ssl.create_default_context(cafile=str(tmp_path / "server.pem"))

        def status() -> int:
            connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=10)
            with contextlib.closing(connection):
                connection.request("GET", "/v1/models")
                return connection.getresponse().status

        with pytest.raises(OSError, match=r"certificate|alert|reset|EOF|closed"):
            status()
        context.load_cert_chain(tmp_path / "client.pem", tmp_path / "client.key")
        assert status() == 200


def test_behind_a_proxy_at_a_path() -> None:
    with ServerProcess("--root-path", "/llm/", "--api-key", "k") as server:
        for path, expected in (
            ("/llm/health", 200),
            ("/health", 200),
            ("/llm/v1/models", 401),
            ("/llm/x", 401),
        ):
            assert server.get(path)[0] == expected, path
