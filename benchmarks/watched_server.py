"""`hexad serve` in a process that tells where its CPU time goes, for `benchmarks.serve`.

    python3 -m benchmarks.watched_server MODEL [OPTIONS OF hexad serve]

`WatchedServer` starts one and asks it. Native calls are wrapped, so that the engine thread's CPU time in them
is known; all else that threads of Python take is the server's own: events, the engine's bookkeeping, reading
prompts. Native threads that help the engine's are none of Python's, and count for nothing here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from types import TracebackType
from typing import Any, NamedTuple

READY = "Ready:"


class Cpu(NamedTuple):
    """CPU seconds so far. loop: of the event loop. engine: of the engine's thread outside native calls;
    native: in them. other: of all other threads of Python, which read prompts."""

    loop: float
    engine: float
    other: float
    native: float

    def since(self, before: Cpu) -> Cpu:
        """What was spent since."""
        return Cpu(*(b - a for a, b in zip(before, self, strict=True)))

    @property
    def own(self) -> float:
        """All that is not native."""
        return self.loop + self.engine + self.other


class WatchedServer:
    """A server on a free port, in a `with` block. url: "http://127.0.0.1:PORT"."""

    def __init__(self, model: str, *arguments: str) -> None:
        command = [sys.executable, "-m", "benchmarks.watched_server", model, "--port", "0", *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.url = self._line("hexad listens on ")
        self._line(READY)

    def cpu(self) -> Cpu:
        """Where the server's time has gone."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Cpu(*json.loads(self._line("CPU ")))

    def _line(self, prefix: str) -> str:
        """What follows the prefix in the first line that has it."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(prefix):
                return line.removeprefix(prefix).strip()
        raise RuntimeError(f"the server ended, with status {self._process.wait()}")

    def __enter__(self) -> WatchedServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.communicate()


class _TimedProgram:
    """A native program that adds up the CPU time its caller's thread spends in it."""

    def __init__(self, program: Any) -> None:
        self._program = program
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def forward(self, *arguments: Any) -> Any:
        begin = time.thread_time()
        complete = self._program.forward(*arguments)
        self.seconds += time.thread_time() - begin
        return complete

    def sample(self, *arrays: Any) -> None:
        begin = time.thread_time()
        self._program.sample(*arrays)
        self.seconds += time.thread_time() - begin


def main() -> None:
    from hexad import AsyncLLM
    from hexad.cli import app
    from hexad.server import serve

    programs: list[_TimedProgram] = []

    class WatchedLLM(AsyncLLM):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            executor: Any = self._loaded.engine.executor
            executable = executor.runner.executable
            executable.program = _TimedProgram(executable.program)
            programs.append(executable.program)

    def answer() -> None:
        for _ in sys.stdin:
            spent: Counter[str] = Counter()
            for thread in threading.enumerate():
                if thread is not threading.current_thread() and thread.ident is not None:
                    spent[thread.name] += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
            native = sum(program.seconds for program in programs)
            loop, engine = spent.pop("MainThread"), spent.pop("hexad-engine") - native
            print("CPU", json.dumps(Cpu(loop, engine, spent.total(), native)), flush=True)

    serve.AsyncLLM = WatchedLLM  # type: ignore[attr-defined]
    threading.Thread(target=answer, daemon=True).start()
    app(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    main()
