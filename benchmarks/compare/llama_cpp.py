"""hexad and llama.cpp by turns: prefill, decode and batches on the same GGUF file and token ids.

    scripts/bench compare.llama_cpp --peer-python PYTHON MODEL … [--work WORK …]

PYTHON is an interpreter of an environment in which llama-cpp-python was built for this machine
(benchmarks/README.md). Both engines are loaded once, each in its own process, and one idles while the other
works. Every round gives both the same fresh prompts:

- prefill: PREFILL prompt tokens ÷ the time until the first token;
- decode: DECODE ÷ (the time for DECODE + 1 tokens − the time for 1), after a prompt of PROMPT tokens, greedy,
  end of generation ignored;
- batch: BATCH prompts of BATCH_PROMPTS tokens, and DECODE tokens after each: tokens generated ÷ the time for
  all of it, prompts included.

The table shows medians over the rounds. How often both engines' first tokens of a batch agree is shown, too:
they round differently, but compute the same model.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.report import describe_model, machine, table, write
from benchmarks.worker import Worker

PREFILL = 512
PROMPT = 64
DECODE = 128
BATCH_PROMPTS = range(112, 144)
"""Tokens of the prompts of a batch, each length once."""
BATCH = len(BATCH_PROMPTS)
WORKS = ("prefill", "decode", "batch")
PAUSE = 0.3
"""Seconds between turns, so that the other engine's threads have gone to sleep."""


def main() -> None:
    options = _options()
    works = [work for work in WORKS if work in (options.work or WORKS)]
    results = []
    for model in options.models:
        results.append(compare(model, options.peer_python, options.threads, options.runs, works))
        print(f"\n{model.name} on {machine()['cpu']}, {options.threads} threads, medians of {options.runs}\n")
        print(_table(results[-1]["engines"], works))
        if "batch" in works:
            print(f"\nfirst tokens of the batches that agree: {results[-1]['agreement']:.0%}")
        sys.stdout.flush()
    settings = {
        "threads": options.threads,
        "runs": options.runs,
        "work": works,
        "prefill": PREFILL,
        "prompt": PROMPT,
        "decode": DECODE,
        "batch": BATCH,
        "batch_prompts": [BATCH_PROMPTS.start, BATCH_PROMPTS.stop - 1],
    }
    print(f"\nwritten to {write('llama_cpp', settings, results)}")


def compare(model: Path, peer_python: str, threads: int, runs: int, works: Sequence[str]) -> dict[str, Any]:
    """Per engine its version, its system and the tokens/s of every round; and the share of batches' first
    tokens that agree."""
    agreeing: list[bool] = []
    with ExitStack() as stack:
        workers = {
            "hexad": stack.enter_context(Worker(sys.executable, "benchmarks.hexad_worker")),
            "llama.cpp": stack.enter_context(Worker(peer_python, "benchmarks.compare.llama_cpp_worker")),
        }
        figures = {
            name: {**worker("load", model=str(model), threads=threads), **{work: [] for work in works}}
            for name, worker in workers.items()
        }
        for turn in range(runs + 1):
            warm = turn > 0  # the first turn warms up
            for work in works:
                prompts = _prompts(work, random.Random(f"{work} {turn}"))
                firsts = []
                for name, worker in workers.items():
                    time.sleep(PAUSE)
                    speed, tokens = _measure(worker, work, prompts, DECODE if warm else 4)
                    if warm:
                        figures[name][work].append(speed)
                    firsts.append([made[0] for made in tokens])
                if work == "batch":
                    agreeing += [a == b for a, b in zip(*firsts, strict=True)]
    agreement = statistics.fmean(agreeing) if agreeing else None
    if agreement is not None and agreement < 0.5:
        raise SystemExit(
            f"Only {agreement:.0%} of the first tokens agree: the engines compute different models."
        )
    return {"model": describe_model(model), "engines": figures, "agreement": agreement}


def _prompts(work: str, random_ids: random.Random) -> list[list[int]]:
    lengths = {"prefill": [PREFILL], "decode": [PROMPT], "batch": [*BATCH_PROMPTS]}[work]
    return [[random_ids.randrange(1000, 32000) for _ in range(length)] for length in lengths]


def _measure(
    worker: Worker, work: str, prompts: list[list[int]], decode: int
) -> tuple[float, list[list[int]]]:
    """Tokens/s of one piece of work, and the tokens made."""
    if work == "prefill":
        done = worker("generate", tokens=prompts[0], count=1)
        return PREFILL / done["seconds"], [done["tokens"]]
    if work == "decode":
        first = worker("generate", tokens=prompts[0], count=1)
        whole = worker("generate", tokens=prompts[0], count=decode + 1)
        return decode / (whole["seconds"] - first["seconds"]), [whole["tokens"]]
    done = worker("generate_batch", prompts=prompts, count=decode)
    assert [len(tokens) for tokens in done["tokens"]] == [decode] * len(prompts)
    return decode * len(prompts) / done["seconds"], done["tokens"]


def _table(engines: dict[str, dict[str, Any]], works: Sequence[str]) -> str:
    titles = {
        "prefill": f"prefill {PREFILL}, tok/s",
        "decode": f"decode {DECODE}, tok/s",
        "batch": f"batch of {BATCH}, tok/s",
    }
    medians = {
        name: [statistics.median(figures[work]) for work in works] for name, figures in engines.items()
    }
    rows: list[list[object]] = [
        [f"{name} {engines[name]['version']} ({engines[name]['system']})", *medians[name]] for name in engines
    ]
    rows.append(
        ["ratio", *(f"{a / b:.2f}×" for a, b in zip(medians["hexad"], medians["llama.cpp"], strict=True))]
    )
    return table(["engine", *(titles[work] for work in works)], rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="GGUF files")
    parser.add_argument("--peer-python", default=os.environ.get("PEER_PYTHON"), help="default: $PEER_PYTHON")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", nargs="+", choices=WORKS, help="default: all")
    parser.add_argument("--runs", type=int, default=5, help="rounds that count (default: 5)")
    options = parser.parse_args()
    if not options.peer_python:
        parser.error("say which interpreter has llama-cpp-python: --peer-python or PEER_PYTHON")
    return options


if __name__ == "__main__":
    main()
