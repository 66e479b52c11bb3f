"""How soon a fresh process answers, and how much memory it takes, file by file.

    scripts/bench cold MODEL.gguf … [--peer llama.cpp=PYTHON] [--runs N] [--within SECONDS]

- first token: from before the process exists until the first byte of `hexad run`'s answer can be read; of a
  peer, until the answer of a worker that loads the file and makes one token. Engines take turns; the file is
  in the page cache. The phases are of a hexad worker: start (the interpreter and imports), opening the file,
  planning, packing the weights, what the tokenizer takes longer, and the first token after loading.
- peak: most resident memory (VmHWM) of a worker, loaded, and after a prompt of 512 tokens with 128 more. The
  bound for hexad is its packed weights + the KV cache asked for (672 tokens) + 150 MB.

The exit status is 1 where the peak is over its bound, or the median time over --within.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.compare.__main__ import ENGINES, HEXAD
from benchmarks.report import table, write
from benchmarks.startup import first_token_seconds
from benchmarks.worker import Worker
from hexad.checkpoint.open import open_checkpoint
from hexad.config import BLOCK_TOKENS
from hexad.graph.fuse import fuse
from hexad.models import build_graph
from hexad.placement import cpu_count
from hexad.runner.model_runner import make_backend, weight_bytes

CONTEXT, PROMPT, MORE = 672, 512, 128
BESIDE = 150e6
"""Bytes that a process may take beside packed weights and KV cache."""
QUESTION = "What is the capital of France?"
IDS = range(1000, 32000)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--within", type=float, metavar="SECONDS")
    options = parser.parse_args()
    engines = [(HEXAD, sys.executable), *(tuple(peer.split("=", 1)) for peer in options.peer)]
    rows, results, over = [], {}, []
    for model in options.models:
        subprocess.run(["cat", str(model)], check=True, stdout=subprocess.DEVNULL)  # into the page cache
        bound = _bound(model)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name, _ in engines}
        for _ in range(options.runs):
            for name, python in engines:
                runs[name].append(_run(name, python, model))
        results[model.name] = {"bound": bound, "runs": runs}
        for name, _ in engines:
            first = statistics.median(run["first token"] for run in runs[name])
            loaded, peak = (max(run[key] for run in runs[name]) / 1e6 for key in ("loaded", "peak"))
            last = runs[name][-1]["phases"]
            phases = " · ".join(f"{phase} {1e3 * seconds:.0f}" for phase, seconds in last.items())
            limit = f"{bound / 1e6:.0f}" if name == HEXAD else ""
            rows.append([model.stem, name, first, phases, f"{loaded:.0f}", f"{peak:.0f}", limit])
            if name == HEXAD and 1e6 * peak > bound:
                over.append(f"{model.name}: peak memory of {peak:.0f} MB is over {bound / 1e6:.0f}")
            if name == HEXAD and options.within and first > options.within:
                over.append(f"{model.name}: first token after {first:.2f} s, not {options.within:g}")
    header = ["model", "engine", "first token, s", "phases, ms", "loaded, MB", "peak, MB", "bound, MB"]
    print(table(header, rows))
    print(f"\nwritten to {write('cold', {'runs': options.runs, 'context': CONTEXT}, results)}")
    sys.exit("\n".join(over) or 0)


def _bound(model: Path) -> int:
    """Bytes that hexad's process may have in memory."""
    with open_checkpoint(model) as checkpoint:
        graph = fuse(build_graph(checkpoint.config, checkpoint.weights, checkpoint.path))
        backend = make_backend("cpu")
        packed = sum(weight_bytes(graph, backend).values())
    return packed + -(-CONTEXT // BLOCK_TOKENS) * backend.kv_block_bytes(graph, "f16") + int(BESIDE)


def _run(name: str, python: str, model: Path) -> dict[str, Any]:
    """One fresh process of an engine, and for hexad its command as well. Seconds and bytes."""
    ids = random.Random(0)
    prompt = [[ids.choice(IDS) for _ in range(PROMPT)]]
    begin = time.perf_counter()
    with Worker(python, f"benchmarks.compare.engines.{ENGINES[name][0]}") as worker:
        worker("load", model=str(model), threads=cpu_count(), context=CONTEXT, batch=0, batch_context=0)
        ready = time.perf_counter()
        phases = worker("load_seconds") if name == HEXAD else {}
        worker("generate", prompts=[prompt[0][:8]], count=1)
        first = time.perf_counter()
        loaded = worker("peak_memory")
        worker("generate", prompts=prompt, count=MORE)
        peak = worker("peak_memory")
    phases = {"start": ready - begin - sum(phases.values()), **phases, "token": first - ready}
    whole = first - begin
    if name == HEXAD:
        whole = first_token_seconds("--raw", "--max-tokens", "4", "--model", str(model), QUESTION)
    return {"first token": whole, "loaded": loaded, "peak": peak, "phases": phases}


if __name__ == "__main__":
    main()
