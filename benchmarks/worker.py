"""One engine in a process of its own, driven by JSON lines, so that engines with environments of their own
can be measured by turns in one session.

An engine's module defines functions and ends with `serve(load, generate, logits)`. The driver starts it under
any interpreter and calls the functions by name: `Worker(python, module)("generate", prompts=[[…]], count=1)`.
Every engine also answers "peak_memory", with the most bytes that its process has had in memory so far.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Worker:
    """A running engine. Use it as a context manager; leaving it ends the process."""

    def __init__(self, python: str, module: str) -> None:
        self.name = module
        self._process = subprocess.Popen(
            [python, "-m", module],
            cwd=Path(__file__).resolve().parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Calls a function of the engine and returns what it returned."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([command, arguments]) + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            raise SystemExit(f"{self.name} ended during {command!r} (exit status {self._process.wait()}).")
        return json.loads(reply)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(*commands: Callable[..., Any]) -> None:
    """Answers calls from standard input until it closes."""
    # Native libraries print to descriptor 1 as they please; replies keep a copy of it to themselves.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    by_name = {command.__name__: command for command in (*commands, peak_memory)}
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(by_name[name](**arguments)), file=replies, flush=True)


def peak_memory() -> int:
    """Bytes. On Linux the kernel's own mark: getrusage's begins with what the parent had when it forked."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
