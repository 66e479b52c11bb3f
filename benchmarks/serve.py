"""What HTTP costs: speed beside `LLM.generate`, the server's own CPU time, streams as a long prompt comes.

    scripts/bench serve [MODEL] [--work cost|arrival] [--running N] [--rounds N] [--threads N] [--slack F]

cost: STREAMS requests at once through `LLM.generate` and, as streams of completions and of chat, through a
server in another process; the same prompts for the first two, new ones each round. The load generator is that
of `hexad bench serve`, in this process, and its own CPU time is told. The server's is taken thread by thread;
what its engine's thread spends in native calls is subtracted, and the rest divided by the tokens streamed.

arrival: --running streams run when a prompt of LONG tokens comes. The gaps between their tokens until its
first one are held against those before it, and its time to the first token against that on an idle server.

The exit status is 1 if a figure exceeds its bound; --slack widens the bounds, for machines that are busy with
other things.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from benchmarks.report import table, write
from benchmarks.watched_server import WatchedServer
from hexad import LLM, SamplingParams
from hexad.cli.bench_client import Answer, Client
from hexad.cli.bench_run import percentile
from hexad.cli.bench_serve import Ask, Load, Requests, Served, run
from hexad.cli.bench_workload import Workload

STREAMS = 16
PROMPT = 128
TOKENS = 128
SPEED_BOUND = 0.85
CPU_BOUND = 80e-6

LONG = 4000
SETTLED = 40
"""Tokens that each stream has had as the long prompt comes; those after the first few are the "before"."""
GAP_BOUND = 3.0
TTFT_BOUND = 3.0

MODEL = "model"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2:135m")
    parser.add_argument("--work", choices=("cost", "arrival"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--running", type=int, default=STREAMS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slack", type=float, default=1.0, metavar="FACTOR")
    options = parser.parse_args()
    arguments = ["--log-level", "warning", "--served-model-name", MODEL]
    if options.threads is not None:
        arguments += ["--threads", str(options.threads)]
    rows: list[list[object]] = []
    over: list[str] = []
    results: dict[str, Any] = {}

    def hold(name: str, value: float, bound: float, unit: str, scale: float = 1, least: bool = False) -> None:
        """A row; least: the bound is one from below."""
        rows.append([f"{name}, {unit}", scale * value, f"{'≥' if least else '≤'} {scale * bound:g}"])
        if value < bound / options.slack if least else value > bound * options.slack:
            over.append(f"{name}: {scale * value:.3g} {unit}, and the bound is {scale * bound:g}")

    with WatchedServer(options.model, *arguments) as server:
        if options.work != "arrival":
            results["cost"] = cost = measure_cost(server, options)
            rows.append([f"LLM.generate, {STREAMS} at once, tok/s", _median(cost, "direct_tok_s"), ""])
            rows.append(["the same through HTTP, tok/s", _median(cost, "http_tok_s"), ""])
            speed = statistics.median(each["http_tok_s"] / each["direct_tok_s"] for each in cost)
            hold("HTTP of LLM.generate", speed, SPEED_BOUND, "%", 100, least=True)
            hold("CPU of the server per token", _median(cost, "own_s"), CPU_BOUND, "µs", 1e6)
            for part in ("loop", "engine", "other"):
                rows.append([f"of it: {_PARTS[part]}, µs", 1e6 * _median(cost, f"{part}_s"), ""])
            hold("the same of chat", _median(cost, "chat_own_s"), CPU_BOUND, "µs", 1e6)
            rows.append(["the load generator, % of a core", 100 * _median(cost, "generator_share"), ""])
            rows.append(["the load generator per token, µs", 1e6 * _median(cost, "generator_s"), ""])
        if options.work != "cost":
            results["arrival"] = arrival = asyncio.run(measure_arrivals(server.url, options))
            for key, name in _ARRIVAL.items():
                rows.append([name, 1e3 * _median(arrival, key), ""])
            gaps = statistics.median(each["gap_p99_s"] / each["before_s"] for each in arrival)
            ttft = statistics.median(each["ttft_s"] / each["alone_s"] for each in arrival)
            hold("p99 gap meanwhile of the median before", gaps, GAP_BOUND, "times")
            hold("TTFT among streams of that alone", ttft, TTFT_BOUND, "times")
    print(table(["", "measured", "bound"], rows))
    settings = {
        "model": options.model,
        "threads": options.threads,
        "streams": STREAMS,
        "prompt": PROMPT,
        "tokens": TOKENS,
        "running": options.running,
        "long": LONG,
    }
    print(f"\nwritten to {write('serve', settings, results)}")
    sys.exit("\n".join(over) or 0)


_PARTS = {"loop": "event loop", "engine": "engine's thread", "other": "threads that read prompts"}

_ARRIVAL = {
    "before_s": "median gap of the streams before, ms",
    "gap_median_s": f"while {LONG} tokens come: median gap, ms",
    "gap_p99_s": "p99 gap, ms",
    "alone_s": f"TTFT of {LONG} tokens alone, ms",
    "ttft_s": "TTFT among the streams, ms",
}


def measure_cost(server: WatchedServer, options: argparse.Namespace) -> list[dict[str, float]]:
    """Figures of each round."""
    found = []
    with LLM(options.model, threads=options.threads, max_model_len=1024, prefault=True) as llm:
        for seed in range(-1, options.rounds):  # the first warms everything up
            measured: dict[str, float] = {}
            workload = Workload(num_prompts=STREAMS, input_len=PROMPT, output_len=TOKENS, seed=seed)
            asks = Requests().asks(workload, as_text=False)
            for way in ("direct", "http") if seed % 2 else ("http", "direct"):
                measured |= (
                    {"direct_tok_s": generate(llm, asks)} if way == "direct" else through(server, asks)
                )
            chat = through(server, Requests().asks(workload, as_text=True), CHAT)
            measured["chat_own_s"] = chat["own_s"]
            measured["chat_tok_s"] = chat["http_tok_s"]
            if seed >= 0:
                found.append(measured)
    return found


def generate(llm: LLM, asks: Sequence[Ask]) -> float:
    """Tokens a second through the library."""
    prompts = [ask.prompt for ask in asks]
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert tokens == STREAMS * TOKENS
    return tokens / seconds


def through(server: WatchedServer, asks: Sequence[Ask], endpoint: str = COMPLETIONS) -> dict[str, float]:
    """Tokens a second through HTTP, and CPU seconds per token."""
    requests = Requests(ignore_eos=True)
    bodies = [requests.body(ask, MODEL, as_messages=endpoint == CHAT) for ask in asks]

    async def load() -> Served:
        client = Client(server.url)
        try:
            return await run(client, endpoint, asks, bodies, Load(), 0)
        finally:
            client.close()

    before = server.cpu()
    served = asyncio.run(load())
    spent = server.cpu().since(before)
    assert not served.errors(), served.errors()
    tokens = sum(answer.tokens for answer in served.answers)
    assert tokens == len(asks) * TOKENS
    return {
        "http_tok_s": tokens / served.seconds,
        "own_s": spent.own / tokens,
        "loop_s": spent.loop / tokens,
        "engine_s": spent.engine / tokens,
        "other_s": spent.other / tokens,
        "generator_s": served.cpu_seconds / tokens,
        "generator_share": served.cpu_seconds / served.seconds,
    }


async def measure_arrivals(url: str, options: argparse.Namespace) -> list[dict[str, float]]:
    """Figures of each round."""
    client = Client(url)
    try:
        await _first_token(client, LONG, -1)  # buffers get their pages, and the engine learns its pace
        found = []
        for seed in range(options.rounds):
            alone = await _first_token(client, LONG, 2 * seed)
            found.append({"alone_s": alone, **await _arrival(client, options.running, 2 * seed + 1)})
        return found
    finally:
        client.close()


async def _arrival(client: Client, running: int, seed: int) -> dict[str, float]:
    answers = [Answer() for _ in range(running)]
    tasks = [
        asyncio.create_task(client.stream(COMPLETIONS, _body(PROMPT, 4000, 100 * seed + i), answer))
        for i, answer in enumerate(answers)
    ]
    while any(len(answer.times) < SETTLED for answer in answers):
        await asyncio.sleep(0.01)
    begin = max(answer.times[SETTLED // 4] for answer in answers)  # by then all are running
    sent = time.perf_counter()
    ttft = await _first_token(client, LONG, seed)
    came = time.perf_counter()
    failed = {answer.error for answer in answers if answer.error}
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks)
    await asyncio.sleep(0.5)  # the server takes note
    assert not failed, failed
    gaps = [(b, b - a) for answer in answers for a, b in pairwise(answer.times) if a >= begin]
    before = [gap for when, gap in gaps if when <= sent]
    meanwhile = sorted(gap for when, gap in gaps if sent < when <= came)
    return {
        "before_s": statistics.median(before),
        "gap_median_s": statistics.median(meanwhile),
        "gap_p99_s": percentile(meanwhile, 99),
        "gaps": len(meanwhile),
        "ttft_s": ttft,
    }


async def _first_token(client: Client, length: int, seed: int) -> float:
    answer = Answer()
    await client.stream(COMPLETIONS, _body(length, 1, seed), answer)
    assert not answer.error, answer
    return answer.ttft


def _body(length: int, tokens: int, seed: int) -> bytes:
    prompt = random.Random(f"{length} {seed}").choices(range(1000, 32000), k=length)
    # With their ids, tokens without text are seen to come, too: parts of a character, special ones.
    requests = Requests(ignore_eos=True, extra_body='{"return_token_ids": true}')
    return requests.body(Ask(prompt, tokens), MODEL, as_messages=False)


def _median(rounds: Sequence[dict[str, float]], key: str) -> float:
    return statistics.median(each[key] for each in rounds)


if __name__ == "__main__":
    main()
