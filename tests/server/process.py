"""`hexad serve` as a process of its own, as users run it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType


class ServerProcess:
    """A server on a port of its choice, in a `with` block; it is ready when the block begins.

    url: "http://127.0.0.1:PORT". key: the API key that tests send. log: the file its output goes to.
    """

    def __init__(
        self,
        *arguments: str,
        model: str = "smollm2:135m",
        environment: dict[str, str] | None = None,
        ready: bool = True,
        command: tuple[str, ...] = ("-m", "hexad", "serve"),
    ) -> None:
        self.key = ""
        self.log = Path(tempfile.mkstemp(prefix="hexad-serve-", suffix=".log")[1])
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command, model, "--port", "0", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            )
        try:
            found = self._wait_for(r"listens on (https?://\S+|unix:\S+)")
            self.url = found[1]
            if ready:
                self._wait_for(r"^Ready:")
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    @property
    def output(self) -> str:
        """What it has written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> tuple[int, bytes]:
        """(status, body) of a GET."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def metric(self, name: str) -> float:
        """The value of a metric without labels, as /metrics says."""
        found = re.search(
            rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", self.get("/metrics")[1].decode(), re.M
        )
        assert found, f"no metric {name}"
        return float(found[1])

    def terminate(self, timeout: float = 60) -> int:
        """Sends SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def _wait_for(self, pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if found := re.search(pattern, self.output, re.M):
                return found
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"the server did not come up:\n{self.output}")

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.terminate()
        self.log.unlink(missing_ok=True)
