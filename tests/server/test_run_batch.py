"""`hexad run-batch`: what is answered, what is refused, and how it goes on after it was stopped."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send
from tests.server.raw import wait_for

from hexad import LLM, SamplingParams
from hexad.errors import ConfigError, EngineError, HexadError
from hexad.server.batch import Counts, Target, _Batch
from hexad.server.settings import ServerSettings

COMMAND = [sys.executable, "-m", "hexad", "run-batch"]

Line = dict[str, Any]


def ask(custom_id: object, url: str = "/v1/completions", **body: Any) -> Line:
    if url == "/v1/completions":
        body = {"prompt": "Once upon a time", "max_tokens": 2, "temperature": 0} | body
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(file: Path, *lines: Line | bytes) -> Path:
    raw = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    file.write_bytes(b"".join(line + b"\n" for line in raw))
    return file


def read(file: Path) -> list[Line]:
    lines = file.read_bytes().split(b"\n")
    assert lines.pop() == b"", "the last line is torn"
    return [json.loads(line) for line in lines]


def run_batch(*arguments: object, **settings: Any) -> subprocess.CompletedProcess[bytes]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, **{"capture_output": True, "timeout": 120, **settings})


# With the model.


def test_every_api(tmp_path: Path, llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    source = write(
        tmp_path / "in.jsonl",
        ask("chat", "/v1/chat/completions", messages=messages, max_tokens=4, seed=1, n=4),
        ask("text", model="tiny"),
        ask("vector", "/v1/embeddings", input=["a", "b"]),
        ask("response", "/v1/responses", input="Hello", max_output_tokens=4),
        ask("\ud800 \u2028\n"),
        b"",
    )
    # What a server's environment may say of its clients is not for a batch.
    narrow = {"HEXAD_MAX_WAITING": "0", "HEXAD_API_KEY": "key", "HEXAD_REQUEST_TIMEOUT": "0.001"}
    flags = "--max-num-seqs", 4, "--served-model-name", "tiny"
    result = run_batch(source, tmp_path / "out.jsonl", *flags, env={**os.environ, **narrow})
    assert (result.returncode, result.stdout) == (0, b"")
    assert result.stderr == b"5 answered, 0 of them with errors.\n"
    lines = {line["custom_id"]: line for line in read(tmp_path / "out.jsonl")}
    assert sorted(lines) == ["chat", "response", "text", "vector", "\ud800 \u2028\n"]
    for line in lines.values():
        assert line.keys() == {"id", "custom_id", "response", "error"}
        assert line["id"].startswith("batch_req_")
        assert line["error"] is None
        assert line["response"].keys() == {"status_code", "request_id", "body"}
        assert line["response"]["status_code"] == 200
        assert line["response"]["request_id"]
    assert len({line["id"] for line in lines.values()}) == 5
    bodies = {name: line["response"]["body"] for name, line in lines.items()}
    params = SamplingParams(max_tokens=2, temperature=0)
    [expected] = llm.generate(["Once upon a time"], params, use_tqdm=False)
    assert bodies["text"]["choices"][0]["text"] == expected.outputs[0].text
    assert bodies["text"]["model"] == "tiny"
    assert all(choice["message"]["content"] for choice in bodies["chat"]["choices"])
    assert len(bodies["chat"]["choices"]) == 4
    assert [len(vector["embedding"]) for vector in bodies["vector"]["data"]] == [576, 576]
    assert bodies["response"]["usage"]["output_tokens"] == 4


def test_what_is_wrong_is_one_line_each_and_is_said_once(tmp_path: Path) -> None:
    source = write(
        tmp_path / "in.jsonl",
        ask("good"),
        b"{not json",
        b'{"custom_id": "\xff"}',
        b"[1]",
        b"[" * 100_000,
        ask(7),
        ask("good", max_tokens=1),
        ask("get") | {"method": "GET"},
        ask("where", "/v1/audio"),
        ask("list", ["/v1/completions"]),
        ask("body") | {"body": "x"},
        ask("stream", stream=True),
        ask("long", prompt="x" * 40_000),
        ask("range", max_tokens=-1),
        ask("model", model="gpt-5"),
    )
    out = tmp_path / "out.jsonl"
    arguments = (source, out, "--max-body-mib", 0.03)
    result = run_batch(*arguments)
    assert result.returncode == 0
    assert result.stderr == b"15 answered, 14 of them with errors.\n"
    lines = read(out)
    refused = {
        int(line["error"]["message"].split()[1][:-1]): line["error"]["message"].partition(": ")[2]
        for line in lines
        if line["error"]
    }
    for number, reason in {
        2: "it is not JSON: Expecting property name",
        3: "it is not JSON: 'utf-8' codec can't decode byte 0xff",
        4: "it is not a JSON object",
        5: "it has 100,001 bytes, and may have 31,457",
        6: "custom_id must be a text that names the line, not 7",
        7: "an earlier line has the custom_id 'good'",
        8: "method must be 'POST', not 'GET'",
        9: "url must be one of /v1/chat/completions, ",
        10: "url must be one of /v1/chat/completions, ",
        11: "body must be a JSON object, not 'x'",
        12: "stream must be left out",
        13: "it has ",
    }.items():
        assert refused.pop(number).startswith(reason)
    assert not refused
    answered = {line["custom_id"]: line["response"] for line in lines if line["response"]}
    assert answered.keys() == {"good", "range", "model"}
    assert {name: answer["status_code"] for name, answer in answered.items()} == {
        "good": 200, "range": 400, "model": 404,
    }  # fmt: skip
    assert answered["range"]["body"]["error"]["param"] == "max_tokens"
    assert all(line["custom_id"] is None for line in lines if "an earlier" in json.dumps(line["error"]))

    before = out.read_bytes()
    again = run_batch(*arguments)
    assert again.stderr == b"0 answered, 0 of them with errors; 15 had been before.\n"
    assert out.read_bytes() == before


def test_it_goes_on_after_an_interruption_and_a_torn_line(tmp_path: Path) -> None:
    names = [f"request {i}" for i in range(12)]
    body = {"max_tokens": 40, "ignore_eos": True}
    source = write(tmp_path / "in.jsonl", *(ask(name, **body) for name in names))
    out = tmp_path / "out.jsonl"
    arguments = [*COMMAND, "-i", str(source), "-o", str(out), "--max-num-seqs", "1"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE) as process:
        wait_for(lambda: out.exists() and out.read_bytes().count(b"\n") >= 2)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    first = out.read_bytes()
    done = len(read(out))
    assert 2 <= done < 12
    assert said.decode().startswith(f"Interrupted: {done} answered, 0 of them with errors.")

    out.write_bytes(first + first[:100])
    result = run_batch(source, out)
    assert result.returncode == 0
    assert result.stderr.decode() == f"{12 - done} answered, 0 of them with errors; {done} had been before.\n"
    assert out.read_bytes().startswith(first)
    lines = read(out)
    assert sorted(line["custom_id"] for line in lines) == sorted(names)
    texts = {line["response"]["body"]["choices"][0]["text"] for line in lines}
    assert len(texts) == 1


def test_streams_are_answered_while_they_are_open(tmp_path: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*COMMAND, "-", "-"], **pipes) as process:  # type: ignore[call-overload]
        process.stdin.write(json.dumps(ask("first")).encode() + b"\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["custom_id"] == "first"
        process.send_signal(signal.SIGTERM)  # while it waits for a line
        assert process.wait(30) == 128 + signal.SIGTERM
        assert process.stdout.read() == b""
        assert process.stderr.read().startswith(b"Interrupted: 1 answered")


def test_a_reader_that_takes_nothing_does_not_keep_it(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *(ask(str(i), "/v1/embeddings", input="x") for i in range(40)))
    with subprocess.Popen([*COMMAND, str(source), "-"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        time.sleep(0.5)  # the pipe is full: 40 vectors are ten times what it holds
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tmp_path: Path) -> None:
    result = run_batch(write(tmp_path / "in.jsonl", ask("a")), "/dev/full")
    assert result.returncode == 1
    assert result.stderr.startswith(b"error: /dev/full can no longer be written: No space left on device.")


def test_the_bar(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ask("a"), b"x")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "TTY_COMPATIBLE": "1"}
    command = [*COMMAND, str(source), str(tmp_path / "out.jsonl")]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        text = b""
        try:
            while data := os.read(ours, 4096):
                text += data
        except OSError:  # EIO: nobody has the other end any more
            pass
        assert process.wait(60) == 0
    os.close(ours)
    assert "2 answered, 1 with errors" in text.decode()
    assert "━" in text.decode()


# Without it.


@pytest.mark.parametrize("arguments", [[], ["in"], ["-i", "in"], ["in", "-o", "out"], ["a", "b", "-o", "c"]])
def test_wrong_usage(arguments: list[str], tmp_path: Path) -> None:
    result = run_batch(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert b"as IN OUT or as -i IN -o OUT" in b" ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("missing", "out", "missing cannot be read: No such file or directory."),
        (".", "out", ". cannot be read: Is a directory."),
        ("in", ".", ". cannot be written: Is a directory."),
        ("in", "no/out", "no/out cannot be written: No such file or directory."),
        ("empty", "empty", "empty is both the input and the output; name two files."),
        ("in", "notes", "Line 1 of notes is not the answer of a batch; name another file"),
        ("in", "in", "Line 1 of in is not the answer of a batch"),
    ],
)
def test_files_are_checked_before_the_model_loads(
    source: str, target: str, message: str, tmp_path: Path
) -> None:
    write(tmp_path / "in", ask("a"))
    (tmp_path / "empty").touch()
    (tmp_path / "notes").write_text("dear diary")
    result = run_batch(source, target, "-m", "no-such-model", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.decode().startswith(f"error: {message}")
    assert (tmp_path / "notes").read_text() == "dear diary"
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    result = run_batch(write(tmp_path / "in", ask("a")), tmp_path / "out", "-m", str(tmp_path / "none.gguf"))
    assert result.returncode == 1
    assert result.stderr.startswith(b"error: ")
    assert b"none.gguf" in result.stderr


def test_only_one_batch_writes_to_a_file(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with Target(out), pytest.raises(ConfigError, match="out is being written by another batch"):
        Target(out)
    with Target(out):
        pass


def test_a_last_line_without_its_end(tmp_path: Path) -> None:
    """As other programs write it: with spaces, and as an editor may leave it."""
    out = tmp_path / "out"
    out.write_text('{"id": "x", "custom_id": "a", "response": {}, "error": null}')
    with Target(str(out)) as target:
        assert len(target.answered) == 1
        target.write(b"next\n")
    assert out.read_text().splitlines()[1:] == ["next"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    out = tmp_path / "out"
    batch(Answering(), Lines(3), out)
    out.write_bytes(out.read_bytes()[:-5])
    counts = batch(Answering(), Lines(5), out)
    assert (counts.answered, counts.skipped) == (3, 2)
    assert len(read(out)) == 5


@pytest.mark.parametrize("depth", [50, 300, 900, 1100, 5000, 100_000])
def test_what_nests_deep(depth: int, tmp_path: Path) -> None:
    deep = b"[" * depth + b"]" * depth
    lines = [ask(field) | {field: "DEEP"} for field in ("custom_id", "method", "url", "body")]
    raw = b"".join(
        json.dumps(line).encode() + b"\n" for line in [*lines, ask("s", stream="DEEP"), ask("last")]
    )
    counts = batch(Answering(), Lines(raw.replace(b'"DEEP"', deep)), tmp_path / "out")
    assert (counts.answered, counts.failed) == (6, 5)
    assert "last" in {line["custom_id"] for line in read(tmp_path / "out") if line["response"]}


class Answering:
    """An application that answers `status`. most: so many requests were under way at once."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.running = self.most = 0
        self.lines_read: Callable[[], int] = lambda: 0
        self.answered = self.ahead = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        await receive()
        await asyncio.sleep(0.001)
        self.ahead = max(self.ahead, self.lines_read() - self.answered)
        self.running -= 1
        self.answered += 1
        start: Message = {"type": "http.response.start", "status": self.status}
        await send(start | {"headers": [(b"x-request-id", b"id")]})
        await send({"type": "http.response.body", "body": b'{"error":{"message":"It broke."}}'})


class Lines(io.BytesIO):
    """A file of these lines, or of so many requests, that counts them as they are read. It fails at its end
    with `error`."""

    def __init__(self, lines: int | bytes, error: OSError | None = None) -> None:
        if isinstance(lines, int):
            lines = b"".join(json.dumps(ask(str(i))).encode() + b"\n" for i in range(lines))
        super().__init__(lines)
        self.count = 0
        self.error = error

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        self.count += 1
        if not line and self.error is not None:
            raise self.error
        return line


def batch(application: Answering, lines: Lines, out: Path) -> Counts:
    counts = Counts()
    settings = ServerSettings(max_num_seqs=4)
    application.lines_read = lambda: lines.count
    with Target(str(out)) as target:
        asyncio.run(_Batch(application, lines, target, settings, counts, lambda counts: None).run())
    return counts


def test_lines_are_read_as_they_are_needed(tmp_path: Path) -> None:
    application = Answering()
    counts = batch(application, Lines(300), tmp_path / "out")
    assert (counts.answered, counts.failed, counts.skipped) == (300, 0, 0)
    assert application.most == 8  # twice max_num_seqs
    assert application.ahead <= 8 + 2  # one is read before there is a place for it
    assert len({line["custom_id"] for line in read(tmp_path / "out")}) == 300


def test_a_broken_engine_ends_it_and_answers_nothing(tmp_path: Path) -> None:
    lines = Lines(100)
    with pytest.raises(EngineError, match=r"It broke\."):
        batch(Answering(503), lines, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b""
    assert lines.count < 100


def test_an_input_that_fails(tmp_path: Path) -> None:
    with pytest.raises(HexadError, match="The input can no longer be read: Input/output error"):
        batch(Answering(), Lines(3, OSError(errno.EIO, os.strerror(errno.EIO))), tmp_path / "out")
