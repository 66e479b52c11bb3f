"""A server under mixed traffic for a while: does it answer everything rightly, and does its memory stay?

    scripts/bench soak [MODEL] [--seconds N] [--users N] [--seed N] [--no-prefault]

Users send one request after another to a `hexad serve` in another process: short and long ones, streams and
whole answers, conversations, some that hang up on the way, some that are wrong in ways that must be refused.
Memory is what the server's process has in RAM (RSS); that of its KV pool, its largest mapping, is told apart.
After the first minute, or a third of a shorter run, all else may grow by GROWTH of itself + SLACK_MIB.

The exit status is 1 if memory grows beyond that, an answer is another than the request deserves, sequences
are left over at the end, or the server does not leave with 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from benchmarks.report import table, write
from hexad.cli.bench_client import Answer, Client, RequestFailed

GROWTH = 0.05
SLACK_MIB = 8.0
SETTLED = 60.0
"""Seconds after which memory shall have found its level."""

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2:135m")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--users", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prefault", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    command = [sys.executable, "-m", "hexad", "serve", options.model, "--port", "0", "--log-level", "warning"]
    command += ["--served-model-name", "model", "--max-num-seqs", "16", "--kv-cache-gib", "0.5"]
    command += ["--no-prefault"] * (not options.prefault)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = ""
        for line in server.stdout:
            if found := re.search(r"listens on (\S+)", line):
                url = found[1]
            if line.startswith("Ready:"):
                break
        else:
            sys.exit("the server did not come up")
        try:
            soak = Soak(url, server.pid, options.seed)
            asyncio.run(soak.run(options.users, options.seconds))
        finally:
            server.send_signal(signal.SIGTERM)
            status = server.wait(60)
    first, last = soak.settled, soak.samples[-1]
    most = first.rest * (1 + GROWTH) + SLACK_MIB
    rows: list[list[object]] = [
        [f"MiB beside the KV pool after {first.seconds:.0f} s", first.rest, ""],
        [f"MiB beside the KV pool after {last.seconds:.0f} s", last.rest, f"≤ {most:.1f}"],
        ["MiB of the KV pool, then and now", f"{first.pool:.0f}, {last.pool:.0f}", ""],
        *([f"requests: {kind}", count, ""] for kind, count in sorted(soak.sent.items())),
    ]
    print(table(["", "measured", "bound"], rows))
    results = {
        "samples": [sample.__dict__ for sample in soak.samples],
        "requests": dict(soak.sent),
        "wrong": soak.wrong,
        "exit_status": status,
    }
    print(f"\nwritten to {write('soak', vars(options), results)}")
    complaints = [f"{len(soak.wrong)} answers were wrong, first: {soak.wrong[0]}"] if soak.wrong else []
    if last.rest > most:
        complaints.append(
            f"memory grew from {first.rest:.1f} to {last.rest:.1f} MiB; {most:.1f} were allowed"
        )
    if status:
        complaints.append(f"the server left with status {status}")
    sys.exit("\n".join(complaints) or 0)


class Memory:
    """What a process has in RAM now, in MiB. pool: of its largest mapping; rest: all else."""

    def __init__(self, pid: int, seconds: float) -> None:
        sizes = [(0, 0)]
        resident = 0
        for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name == "Size":
                size = int(value.split()[0])
            elif name == "Rss":
                rss = int(value.split()[0])
                resident += rss
                sizes.append((size, rss))
        self.seconds = seconds
        self.pool = max(sizes)[1] / 1024
        self.rest = resident / 1024 - self.pool


class Soak:
    """Traffic on a server. sent: how many requests of each kind; wrong: answers that were not as they should
    be; samples: of the server's memory; settled: the one that the last is held against."""

    def __init__(self, url: str, pid: int, seed: int) -> None:
        self.client = Client(url, timeout=120)
        self.sent: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.samples: list[Memory] = []
        self._pid = pid
        self._rng = random.Random(seed)

    async def run(self, users: int, seconds: float) -> None:
        """Keeps so many users busy for so long; then looks whether all is quiet."""
        begin = time.monotonic()
        settled = min(SETTLED, seconds / 3)
        tasks = [asyncio.create_task(self._use(begin + seconds)) for _ in range(users)]
        while (now := time.monotonic() - begin) < seconds:
            if now >= settled:
                self.samples.append(Memory(self._pid, now))
            await asyncio.sleep(min(5.0, max(settled - now, 0.0) or seconds - now))
        await asyncio.gather(*tasks)
        self.samples.append(Memory(self._pid, time.monotonic() - begin))
        self.settled = self.samples[0]
        await self._expect_quiet()
        self.client.close()

    async def _use(self, end: float) -> None:
        kinds: dict[str, tuple[int, Callable[[], Awaitable[str]]]] = {
            "short": (30, lambda: self._stream(COMPLETIONS, self._prompt(1, 64), self._rng.randint(1, 48))),
            "long": (
                4,
                lambda: self._stream(COMPLETIONS, self._prompt(500, 1500), self._rng.randint(50, 200)),
            ),
            "chat": (12, lambda: self._stream(CHAT, self._messages(), self._rng.randint(1, 64))),
            "several": (
                6,
                lambda: self._stream(COMPLETIONS, {**self._prompt(9, 99), "n": 3, "temperature": 1}, 16),
            ),
            "whole": (12, self._whole),
            "cancelled": (20, self._cancelled),
            "invalid": (20, self._invalid),
        }
        names = list(kinds)
        weights = [weight for weight, _ in kinds.values()]
        while time.monotonic() < end:
            name = self._rng.choices(names, weights)[0]
            self.sent[name] += 1
            if complaint := await kinds[name][1]():
                self.wrong.append(f"{name}: {complaint}")
                await asyncio.sleep(0.1)  # a server that is gone is not to be asked a million times

    def _prompt(self, least: int, most: int) -> dict[str, object]:
        return {"prompt": self._rng.choices(range(1000, 32000), k=self._rng.randint(least, most))}

    def _messages(self) -> dict[str, object]:
        words = " ".join(
            self._rng.choices(("river", "Straße", "雪", "7", "if", "🙂"), k=self._rng.randint(1, 99))
        )
        return {"messages": [{"role": "user", "content": words}]}

    def _body(self, fields: dict[str, object], tokens: int, *, stream: bool = True) -> bytes:
        more: dict[str, object] = {"temperature": self._rng.choice((0, 0.8)), "max_tokens": tokens}
        if stream:
            more |= {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps({"model": "model", **more, **fields}).encode()

    async def _stream(self, path: str, fields: dict[str, object], tokens: int) -> str:
        answer = Answer()
        await self.client.stream(path, self._body(fields, tokens), answer)
        if answer.error:
            return f"{answer.error}: {answer.detail}"
        most = tokens * int(str(fields.get("n", 1)))
        return "" if 1 <= answer.tokens <= most else f"{answer.tokens} tokens of {most}"

    async def _whole(self) -> str:
        answer = Answer()
        body = self._body(self._prompt(1, 64), 24, stream=False)
        await self.client.stream(COMPLETIONS, body, answer)
        whole = answer.detail.startswith("application/json")  # answered 200, and not as a stream
        return "" if whole else f"{answer.error}: {answer.detail}"

    async def _cancelled(self) -> str:
        answer = Answer()
        body = self._body(self._prompt(1, 800), 500)
        task = asyncio.create_task(self.client.stream(COMPLETIONS, body, answer))
        await asyncio.sleep(self._rng.expovariate(2))  # before, while or after tokens come
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return f"{answer.error}: {answer.detail}" if answer.error else ""

    async def _invalid(self) -> str:
        path, body, status = self._rng.choice(_INVALID)
        answer = Answer()
        await self.client.stream(path, body, answer)
        expected = f"HTTP {status}"
        return "" if answer.error == expected else f"{answer.error or 'HTTP 200'} in place of {expected}"

    async def _expect_quiet(self) -> None:
        """Nothing runs or waits once the last answer is there."""
        left: list[str] = []
        for _ in range(40):
            try:
                text = (await self.client.get("/metrics")).decode()
            except (RequestFailed, TimeoutError) as error:
                self.wrong.append(f"/metrics: {error}")
                return
            left = re.findall(r"^hexad:num_requests_(?:running|waiting)\b\S* (\S+)$", text, re.MULTILINE)
            if left and not any(map(float, left)):
                return
            await asyncio.sleep(0.05)
        self.wrong.append(f"at the end, requests run and wait: {left}")


def _json(**fields: object) -> bytes:
    return json.dumps(fields).encode()


_INVALID: list[tuple[str, bytes, int]] = [
    (COMPLETIONS, b"{", 400),
    (COMPLETIONS, b"\xff\xfe", 400),
    (COMPLETIONS, b"[" * 50_000, 400),
    (COMPLETIONS, _json(model="model"), 400),
    (COMPLETIONS, _json(model="model", prompt=""), 400),
    (COMPLETIONS, _json(model="model", prompt=[10**9]), 400),
    (COMPLETIONS, _json(model="model", prompt=[5] * 9000), 400),
    (COMPLETIONS, _json(model="model", prompt="x" * 3_000_000), 400),
    (COMPLETIONS, _json(model="model", prompt="a", n=100_000), 400),
    (COMPLETIONS, _json(model="model", prompt="a", temperature="hot"), 400),
    (COMPLETIONS, _json(model="model", prompt="a", max_tokens=-1), 400),
    (COMPLETIONS, _json(model="model", prompt="a", logit_bias={"x": 1}), 400),
    (COMPLETIONS, _json(model="another", prompt="a"), 404),
    (CHAT, _json(model="model", messages="hello"), 400),
    (CHAT, _json(model="model", messages=[{"role": 5}]), 400),
    (CHAT, _json(model="model", messages=[{"role": "user", "content": "a"}], tool_choice="x"), 400),
    ("/v1/nothing", _json(), 404),
]


if __name__ == "__main__":
    main()
