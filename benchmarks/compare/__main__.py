"""hexad beside other engines, by turns: prefill, decode and batches with the same files and token ids.

    scripts/bench compare MODEL.gguf … --peer NAME[@THREADS]=PYTHON … [--work WORK …] [--runs N]

Each peer runs under PYTHON, the interpreter of its own environment (benchmarks/README.md says how to make
them); @THREADS is for a peer that is faster on fewer threads than hexad's. All are loaded once and do one
piece of work in turn while the others idle; every round has fresh prompts, another engine begins it, and the
machine's rates are probed before it. It is void, and done again, if memory is slower than --least-bandwidth.

- prefill: prompt tokens ÷ the time until the first token;
- decode: DECODE ÷ (the time for DECODE + 1 tokens − the time for 1, the faster of two), greedy, end of
  generation ignored;
- batch: requests of 112, 113, … prompt tokens and DECODE more each: tokens made ÷ the time for all of it;
- load: from the start of the process until it can generate; peak: its resident memory, at most.

The first tokens after pieces of real text must agree with hexad's (--least-agreement), or the engines do not
compute the same model. results/compare-MODEL.json is written after every round. It keeps earlier sessions
with the same file and sizes for the peers and works that this one does not measure again: peers can be
measured one at a time. The ratio beside a peer's median is hexad's ÷ its own, of the same rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.compare import show
from benchmarks.compare.works import WORKS, Limits, Sizes, first_tokens, generate, samples
from benchmarks.report import RESULTS, commit, describe_model, machine, write
from benchmarks.worker import Worker
from hexad.placement import probe

HEXAD = "hexad"
ENGINES = {
    HEXAD: ("hexad", "gguf"),
    "llama.cpp": ("llama_cpp", "gguf"),
    "openvino-genai": ("openvino_genai", "gguf"),
    "onnxruntime-genai": ("onnxruntime_genai", "onnx-int4"),
    "ctranslate2": ("ctranslate2", "ct2-int8"),
    "transformers": ("transformers", "gguf"),
    "vllm-cpu": ("vllm", "hf"),
}
"""Module in benchmarks.compare.engines, and the ending of what it reads; see benchmarks.compare.convert."""
PAUSE = 0.3
"""Seconds between turns, so that the other engines' threads have gone to sleep."""


@dataclass(frozen=True)
class Engine:
    """One row of the table. name: of ENGINES. threads: None is as many as hexad has."""

    name: str
    python: str
    threads: int | None = None

    @property
    def label(self) -> str:
        return self.name if self.threads is None else f"{self.name}@{self.threads}"

    def weights(self, model: Path) -> Path:
        """The file or folder that it reads in place of `model`."""
        return model.with_name(f"{model.stem}.{ENGINES[self.name][1]}")


def main() -> None:
    options = _options()
    sizes = Sizes(options.prefill, options.prompt, options.decode, options.requests)
    settings = {"threads": options.threads, **asdict(sizes)}
    for model in options.models:
        earlier = _sessions(model, settings)
        for session in measure(model, options.engines, sizes, options):
            sessions = _needed([*earlier, session])
            results = {"model": describe_model(model), "sessions": sessions}
            path = write(_name(model), settings, results)
        title = f"{model.name} on {machine()['cpu']}, {options.threads} threads"
        print(f"\n{title}\n\n{show.table(sessions, settings)}\n\nwritten to {path}")
        print(show.picture(sessions, settings, title, path.with_suffix(".png")))
        sys.stdout.flush()


def measure(
    model: Path, engines: Sequence[Engine], sizes: Sizes, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """After every round that counts, what has been measured so far."""
    works = [work for work in WORKS if work in options.work]
    limits = Limits(model, sizes)
    session: dict[str, Any] = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "rates": [],
        "void": 0,
        "limits": {work: [] for work in works},
        "engines": {},
    }
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for engine in engines:
            weights = engine.weights(model)
            described = describe_model(
                weights
            )  # before it is loaded: all find their weights in the page cache
            begin = time.perf_counter()
            module = f"benchmarks.compare.engines.{ENGINES[engine.name][0]}"
            worker = workers[engine.label] = stack.enter_context(Worker(engine.python, module))
            threads = engine.threads or options.threads
            facts = worker("load", model=str(weights), threads=threads, **sizes.room(works))
            session["engines"][engine.label] = {
                **facts,
                "threads": threads,
                "weights": described,
                "load_seconds": time.perf_counter() - begin,
                **{work: [] for work in works},
            }
        _warm_up(workers, works, sizes, session)
        _check_agreement(workers, samples(model)[: sizes.requests], options.least_agreement, session)
        turn = 0
        while turn < options.runs:
            time.sleep(PAUSE)
            hardware = probe(options.threads, rates=True)
            assert hardware.bandwidth is not None
            if hardware.bandwidth < 1e9 * options.least_bandwidth:
                session["void"] += 1
                print(f"void: memory at {hardware.bandwidth / 1e9:.1f} GB/s", file=sys.stderr)
                if session["void"] > options.runs:
                    raise SystemExit("Memory is too slow too often: something else is using this machine.")
                time.sleep(2)
                continue
            turn += 1
            session["rates"].append([hardware.bandwidth, hardware.int8_rate])
            labels = [*workers]
            first = turn % len(labels)
            for work in works:
                session["limits"][work].append(limits.of(work, hardware))
                prompts = sizes.prompts(work, turn)
                for label in labels[first:] + labels[:first]:
                    time.sleep(PAUSE)
                    session["engines"][label][work].append(sizes.measure(workers[label], work, prompts))
            for label, worker in workers.items():
                session["engines"][label]["peak_bytes"] = worker("peak_memory")
            yield session


def _warm_up(workers: dict[str, Worker], works: Sequence[str], sizes: Sizes, session: dict[str, Any]) -> None:
    """A little of each work, single streams first: their peak of memory is told apart from batches'."""
    for label, worker in workers.items():
        for work in works:
            if work != "batch":
                generate(worker, sizes.prompts(work, 0), 1 if work == "prefill" else 4)
        session["engines"][label]["peak_bytes_alone"] = worker("peak_memory")
        if "batch" in works:
            generate(worker, sizes.prompts("batch", 0), 4)


def _check_agreement(
    workers: dict[str, Worker], prompts: list[list[int]], least: float, session: dict[str, Any]
) -> None:
    truth = first_tokens(workers[HEXAD], prompts)
    for label, worker in workers.items():
        made = first_tokens(worker, prompts)
        share = statistics.fmean(a == b for a, b in zip(made, truth, strict=True))
        session["engines"][label]["agreement"] = share
        if share < least:
            raise SystemExit(
                f"After {share:.0%} of {len(prompts)} pieces of text {label} goes on like hexad, less than "
                f"{least:.0%}: they compute different models."
            )


def _name(model: Path) -> str:
    return f"compare-{model.stem}"


def _sessions(model: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that there are of this very file with these settings."""
    try:
        record = json.loads((RESULTS / f"{_name(model)}.json").read_text())
    except FileNotFoundError:
        return []
    same = record["settings"] == settings and record["results"]["model"] == describe_model(model)
    return record["results"]["sessions"] if same else []


def _needed(sessions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without those of which later ones have everything."""
    kept = []
    known: set[tuple[str, str]] = set()
    for session in reversed(sessions):
        measured = {
            (label, work)
            for label, engine in session["engines"].items()
            for work in WORKS
            if label != HEXAD and engine.get(work)
        }
        if session is sessions[-1] or not measured <= known:
            kept.append(session)
            known |= measured
    return kept[::-1]


def _engine(text: str) -> Engine:
    head, separator, python = text.partition("=")
    name, _, threads = head.partition("@")
    if not separator or name not in ENGINES or name == HEXAD or not (threads or "1").isdecimal():
        names = ", ".join(name for name in ENGINES if name != HEXAD)
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME[@THREADS]=PYTHON, NAME one of {names}")
    return Engine(name, python, int(threads) if threads else None)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="GGUF files")
    parser.add_argument("--peer", action="append", type=_engine, default=[], help="NAME[@THREADS]=PYTHON")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", nargs="+", choices=WORKS, default=WORKS, help="default: all")
    parser.add_argument("--runs", type=int, default=5, help="rounds that count (default: 5)")
    for field, value in asdict(Sizes()).items():
        parser.add_argument(f"--{field}", type=int, default=value, help=f"default: {value}")
    parser.add_argument("--least-bandwidth", type=float, metavar="GB/S", help="default: 11 per thread")
    parser.add_argument("--least-agreement", type=float, default=0.5, help="default: 0.5")
    options = parser.parse_args()
    if options.least_bandwidth is None:
        options.least_bandwidth = 11.0 * options.threads
    options.engines = [Engine(HEXAD, sys.executable), *options.peer]
    for engine in options.peer:
        for model in options.models:
            if not engine.weights(model).exists():
                parser.error(
                    f"{engine.name} reads {engine.weights(model)}; benchmarks.compare.convert makes it"
                )
    return options


if __name__ == "__main__":
    main()
