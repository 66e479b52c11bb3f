"""`hexad serve` from its start to its end: signals, failures, and the ways in."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.server.process import ServerProcess
from tests.server.raw import LAUNCH, Connection, completion, launched, post, request, streaming, wait_for

from hexad.errors import ConfigError
from hexad.server.tracing import Tracer

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


def test_health_turns_200_when_it_is_ready(server: ServerProcess) -> None:
    assert server.get("/health") == (200, b'{"status":"ok"}')


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


def test_what_keeps_it_from_coming_up_is_one_line(server: ServerProcess, tmp_path: Path) -> None:
    port = server.url.rsplit(":", 1)[1]
    assert "cannot be listened on: Address already in use" in refused("--port", port)
    assert "no-such-model" in refused("no-such-model", "--port", "0")
    assert "certificate" in refused("--ssl-certfile", str(tmp_path / "none.pem"), "--port", "0")
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


def test_without_opentelemetry_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(ConfigError, match=r"pip install 'hexad\[otel\]'"):
        Tracer("http://collector:4318")
