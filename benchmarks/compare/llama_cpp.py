"""hexad and llama.cpp by turns: prefill and decode of one stream on the same GGUF file and token ids.

    scripts/bench compare.llama_cpp --peer-python PYTHON MODEL …

PYTHON is an interpreter of an environment in which llama-cpp-python was built for this machine
(benchmarks/README.md). Both engines are loaded once, each in its own process, and one idles while the other
works. Every round gives both the same fresh prompts:

- prefill: PREFILL prompt tokens ÷ the time until the first token;
- decode: DECODE ÷ (the time for DECODE + 1 tokens − the time for 1), after a prompt of PROMPT tokens, greedy,
  end of generation ignored.

The table shows medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.report import describe_model, machine, table, write
from benchmarks.worker import Worker

PREFILL = 512
PROMPT = 64
DECODE = 128
PAUSE = 0.3
"""Seconds between turns, so that the other engine's threads have gone to sleep."""


def main() -> None:
    options = _options()
    results = []
    for model in options.models:
        results.append(compare(model, options.peer_python, options.threads, options.runs))
        print(f"\n{model.name} on {machine()['cpu']}, {options.threads} threads, medians of {options.runs}\n")
        print(_table(results[-1]["engines"]), flush=True)
    settings = {
        "threads": options.threads,
        "runs": options.runs,
        "prefill": PREFILL,
        "prompt": PROMPT,
        "decode": DECODE,
    }
    print(f"\nwritten to {write('llama_cpp', settings, results)}")


def compare(model: Path, peer_python: str, threads: int, runs: int) -> dict[str, Any]:
    """Per engine its version, its system and the tokens/s of every round."""
    with ExitStack() as stack:
        workers = {
            "hexad": stack.enter_context(Worker(sys.executable, "benchmarks.hexad_worker")),
            "llama.cpp": stack.enter_context(Worker(peer_python, "benchmarks.compare.llama_cpp_worker")),
        }
        figures = {
            name: {**worker("load", model=str(model), threads=threads), "prefill": [], "decode": []}
            for name, worker in workers.items()
        }
        for turn in range(runs + 1):
            random_ids = random.Random(turn)
            long, short = ([random_ids.randrange(1000, 32000) for _ in range(n)] for n in (PREFILL, PROMPT))
            for name, worker in workers.items():
                time.sleep(PAUSE)
                prefill = worker("generate", tokens=long, count=1)["seconds"]
                first = worker("generate", tokens=short, count=1)["seconds"]
                whole = worker("generate", tokens=short, count=DECODE + 1)["seconds"]
                if turn > 0:  # the first turn warms up
                    figures[name]["prefill"].append(PREFILL / prefill)
                    figures[name]["decode"].append(DECODE / (whole - first))
    return {"model": describe_model(model), "engines": figures}


def _table(engines: dict[str, dict[str, Any]]) -> str:
    medians = {
        name: [statistics.median(figures[work]) for work in ("prefill", "decode")]
        for name, figures in engines.items()
    }
    rows: list[list[object]] = [
        [f"{name} {engines[name]['version']} ({engines[name]['system']})", *medians[name]] for name in engines
    ]
    rows.append(
        ["ratio", *(f"{a / b:.2f}×" for a, b in zip(medians["hexad"], medians["llama.cpp"], strict=True))]
    )
    return table(["engine", f"prefill {PREFILL}, tok/s", f"decode {DECODE}, tok/s"], rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="GGUF files")
    parser.add_argument("--peer-python", default=os.environ.get("PEER_PYTHON"), help="default: $PEER_PYTHON")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5, help="rounds that count (default: 5)")
    options = parser.parse_args()
    if not options.peer_python:
        parser.error("say which interpreter has llama-cpp-python: --peer-python or PEER_PYTHON")
    return options


if __name__ == "__main__":
    main()
