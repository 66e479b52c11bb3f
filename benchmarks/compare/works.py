"""The work every engine does: its prompts, how it is timed, and the machine's limit for it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import ROOT
from benchmarks.worker import Worker
from hexad.checkpoint.open import open_checkpoint
from hexad.cli.bench_run import Run, Work, decode_work, prefill_work, work
from hexad.cli.bench_workload import Job
from hexad.graph.cost import step_numbers
from hexad.models import build_graph
from hexad.placement import Hardware

WORKS = ("prefill", "decode", "batch")
IDS = range(1000, 32000)
"""Random prompts are of these tokens: ordinary ones in every vocabulary measured."""
SAMPLES = range(40, 72)
"""Tokens of the pieces of real text after which engines must agree."""

Prompts = list[list[int]]


@dataclass(frozen=True)
class Sizes:
    """Tokens. prefill: of the prompt of that work. prompt, decode: in and out, of one stream. requests: in a
    batch, whose prompts are of 112, 113, … tokens with `decode` after each."""

    prefill: int = 512
    prompt: int = 64
    decode: int = 128
    requests: int = 32

    @property
    def batch_prompts(self) -> range:
        return range(112, 112 + self.requests)

    def room(self, works: Sequence[str]) -> dict[str, int]:
        """What `load` of an engine is told. Sequences of a batch get whole blocks of 32, and fit SAMPLES."""
        longest = max(self.batch_prompts[-1] if "batch" in works else 0, SAMPLES[-1]) + self.decode + 1
        context = max(self.prefill + 1, self.prompt + self.decode + 1)
        return {"context": context, "batch": max(self.requests, 1), "batch_context": -(-longest // 32) * 32}

    def prompts(self, name: str, turn: int) -> Prompts:
        """Fresh ones for each turn, the same in every session."""
        lengths = {"prefill": [self.prefill], "decode": [self.prompt], "batch": self.batch_prompts}[name]
        ids = random.Random(f"{name} {turn}")
        return [[ids.choice(IDS) for _ in range(length)] for length in lengths]

    def measure(self, worker: Worker, name: str, prompts: Prompts) -> float:
        """Tokens/s: of the prompt until the first token; of one stream, by the difference between
        `decode` + 1 tokens and 1, the faster of two; made by a batch, its prompts' time included."""
        if name == "prefill":
            return self.prefill / generate(worker, prompts, 1)[0]
        if name == "batch":
            return self.decode * len(prompts) / generate(worker, prompts, self.decode)[0]
        first = min(generate(worker, prompts, 1)[0] for _ in range(2))  # a stall in it would be taken off
        whole, _ = generate(worker, prompts, self.decode + 1)
        return self.decode / (whole - first)

    def least_work(self, name: str) -> tuple[int, Work]:
        """The tokens that count, and what must be computed and read for them."""
        if name == "prefill":
            return self.prefill, prefill_work([_job(self.prefill, 1)], max_num_batched_tokens=self.prefill)
        if name == "decode":
            return self.decode, decode_work([_job(self.prompt, self.decode + 1)])
        jobs = [_job(length, self.decode) for length in self.batch_prompts]
        tokens = sum(len(job.token_ids) + job.output_len for job in jobs)
        run = Run(jobs, (), (), [0] * len(jobs), 0)
        return self.decode * len(jobs), work(run, max_num_seqs=len(jobs), max_num_batched_tokens=tokens)


def generate(worker: Worker, prompts: Prompts, count: int) -> tuple[float, Prompts]:
    """Seconds, and the tokens made. Ends the comparison if there are not as many as asked for."""
    done = worker("generate", prompts=prompts, count=count)
    if [len(tokens) for tokens in done["tokens"]] != [count] * len(prompts):
        raise SystemExit(
            f"{worker.name} made {[len(t) for t in done['tokens']]} tokens instead of {count} each."
        )
    return done["seconds"], done["tokens"]


def samples(model: Path) -> Prompts:
    """Pieces of the texts in tests/golden/texts, in the model's tokens."""
    with open_checkpoint(model) as checkpoint:
        tokenizer = checkpoint.tokenizer()
        texts = [
            path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests/golden/texts").glob("*.txt"))
        ]
    tokens = [token for text in texts for token in tokenizer.encode(text)]
    step = (len(tokens) - SAMPLES[-1]) // len(SAMPLES)
    return [tokens[i * step : i * step + length] for i, length in enumerate(SAMPLES)]


def first_tokens(worker: Worker, prompts: Prompts) -> list[int]:
    """The token after each prompt. Ends the comparison if a batch gives others than one prompt alone, but
    for one: some engines round differently, and a tie may break."""
    _, made = generate(worker, prompts, 1)
    batch = [tokens[0] for tokens in made]
    alone = [generate(worker, [prompt], 1)[1][0][0] for prompt in prompts[:4]]
    if sum(a != b for a, b in zip(alone, batch, strict=False)) > 1:
        raise SystemExit(f"{worker.name} says {alone} alone and {batch[:4]} in a batch.")
    return batch


class Limits:
    """Tokens/s that no engine can pass which reads this file's tensors once a step, keeps a KV cache of f16
    and multiplies in int8; see hexad.cli.bench_run.Work."""

    def __init__(self, model: Path, sizes: Sizes) -> None:
        with open_checkpoint(model) as checkpoint:
            graph = build_graph(checkpoint.config, checkpoint.weights)
            self._cost = step_numbers(graph, graph.weights, kv_dtype="f16")
        self._sizes = sizes

    def of(self, name: str, hardware: Hardware) -> float:
        """hardware: with its rates probed."""
        assert hardware.bandwidth is not None
        assert hardware.int8_rate is not None
        tokens, least = self._sizes.least_work(name)
        return tokens / least.seconds(self._cost, bandwidth=hardware.bandwidth, int8_rate=hardware.int8_rate)


def _job(prompt: int, output: int) -> Job:
    return Job([0] * prompt, output)
