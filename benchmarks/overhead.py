"""What the engine takes besides the model: its share of the steps of 32 streams, and its own steps a second.

    scripts/bench overhead [MODEL] [--threads N] [--slack FACTOR]

share: STREAMS requests through `LLM.generate`, sampled and detokenised. The native program is wrapped, so
that the time inside it is known; everything else from one forward pass to the next (drawing up and taking in
steps, the runner's arrays, text) is the engine's. Only steps that hold all streams and nothing else count. In
a run of its own the engine's parts are timed one by one; timing costs, so their sum is above the share.

alone: schedule and update of SEQUENCES running requests without detokenising, on an executor that computes
nothing, whose own time is taken off.

The exit status is 1 if a figure exceeds its bound; --slack widens the bounds, for machines that are busy with
other things.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from benchmarks.fake_executor import VOCAB_SIZE, FakeExecutor, make_engine
from benchmarks.report import table, write
from hexad import LLM, SamplingParams
from hexad.config import EngineConfig
from hexad.engine.detokenizer import Detokenizer
from hexad.runner import model_runner
from hexad.runner.executor import LocalExecutor

STREAMS = 32
PROMPT = 128
TOKENS = 160
RUNS = 3
SHARE_BOUND = 0.03

SEQUENCES = 256
STEPS = 200
ROUNDS = 7
RATE_BOUND = 2000.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2:135m")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--slack", type=float, default=1.0, metavar="FACTOR")
    options = parser.parse_args()
    with LLM(options.model, threads=options.threads, max_model_len=1024) as llm:
        steps = [step for run in range(RUNS) for step in measure_share(llm, run)]
        parts = measure_parts(llm)
    share = sum(step - native for step, native in steps) / sum(step for step, _ in steps)
    own = statistics.median(step - native for step, native in steps)
    whole = statistics.median(step for step, _ in steps)
    rates = measure_rates()
    rate = statistics.median(rates)
    rows: list[list[object]] = [
        [f"outside native calls, {STREAMS} streams, % of a step", 100 * share, f"≤ {100 * SHARE_BOUND:g}"],
        ["a step, ms (median)", 1e3 * whole, ""],
        ["outside native calls, µs (median)", 1e6 * own, ""],
        *([f"of it: {name}, µs", 1e6 * seconds, ""] for name, seconds in parts.items()),
        [f"schedule and update alone, {SEQUENCES} sequences, steps/s", rate, f"≥ {RATE_BOUND:,.0f}"],
    ]
    print(table(["", "measured", "bound"], rows))
    settings = {
        "model": options.model,
        "threads": options.threads,
        "streams": STREAMS,
        "prompt": PROMPT,
        "tokens": TOKENS,
        "sequences": SEQUENCES,
    }
    results = {
        "share": share,
        "step_s": whole,
        "own_s": own,
        "parts_s": parts,
        "steps": len(steps),
        "rates": rates,
    }
    print(f"\nwritten to {write('overhead', settings, results)}")
    over = []
    if share > SHARE_BOUND * options.slack:
        over.append(f"{share:.1%} of a step is outside native calls; the bound is {SHARE_BOUND:.0%}")
    if rate < RATE_BOUND / options.slack:
        over.append(f"{rate:,.0f} steps/s are under the bound of {RATE_BOUND:,.0f}")
    sys.exit("\n".join(over) or 0)


class TimedProgram:
    """A native program that keeps when each forward pass began, its rows, and the time inside until the next
    one began."""

    def __init__(self, program: Any) -> None:
        self._program = program
        self.begins: list[float] = []
        self.rows: list[int] = []
        self.inside: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def forward(self, tokens: Any, *arguments: Any) -> Any:
        begin = time.perf_counter()
        complete = self._program.forward(tokens, *arguments)
        self.begins.append(begin)
        self.rows.append(len(tokens))
        self.inside.append(time.perf_counter() - begin)
        return complete

    def sample(self, *arrays: Any) -> None:
        begin = time.perf_counter()
        self._program.sample(*arrays)
        self.inside[-1] += time.perf_counter() - begin


def measure_share(llm: LLM, seed: int) -> list[tuple[float, float]]:
    """(seconds of a step, of them in native calls) for each step of all streams."""
    executable: Any = _runner(llm).executable
    program = executable.program
    timed = executable.program = TimedProgram(program)
    try:
        _generate(llm, seed)
    finally:
        executable.program = program
    steady = [i for i, rows in enumerate(timed.rows[:-1]) if rows == timed.rows[i + 1] == STREAMS]
    return [(timed.begins[i + 1] - timed.begins[i], timed.inside[i]) for i in steady]


def measure_parts(llm: LLM) -> dict[str, float]:
    """Seconds a step that the engine's parts take, of steps of all streams. They do not overlap."""
    engine, runner = llm.engine, _runner(llm)
    sampler: Any = runner._sampler
    spent: Counter[str] = Counter()
    patched: list[tuple[Any, str, Any]] = []

    def clock(owner: Any, attribute: str, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, attribute)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            begin = time.perf_counter()
            result = function(*arguments, **keywords)
            spent[name] += time.perf_counter() - begin
            return result

        patched.append((owner, attribute, function))
        setattr(owner, attribute, timed)

    steps: list[dict[str, float]] = []
    execute = engine.executor.execute

    def executing(step: Any) -> Any:
        # The parts since the last step's execution began are of one step's length, if not of one step.
        if step.counts == [1] * STREAMS:
            steps.append(dict(spent))
        spent.clear()
        begin = time.perf_counter()
        result = execute(step)
        spent["execute"] += time.perf_counter() - begin
        return result

    executable: Any = runner.executable
    clock(engine.scheduler, "schedule", "schedule")
    clock(model_runner, "make_batch", "batch")
    clock(sampler, "rows", "sampled rows")
    clock(sampler, "make", "sampling parameters")
    clock(sampler, "accept", "draws taken in")
    clock(runner, "_drawn", "result")
    clock(engine, "_update", "update")
    clock(Detokenizer, "push", "text")
    program = executable.program
    timed = executable.program = TimedProgram(program)
    engine.executor.execute = executing  # type: ignore[method-assign]
    try:
        _generate(llm, RUNS)
    finally:
        executable.program = program
        engine.executor.execute = execute  # type: ignore[method-assign]
        for owner, attribute, function in reversed(patched):
            setattr(owner, attribute, function)
    assert timed.rows
    steady = steps[1:]
    parts = {name: statistics.median(step.get(name, 0.0) for step in steady) for name in steady[-1]}
    native = statistics.median(
        seconds for seconds, rows in zip(timed.inside, timed.rows, strict=True) if rows == STREAMS
    )
    inside = ("batch", "sampled rows", "sampling parameters", "draws taken in", "result")
    parts["other of the runner"] = parts.pop("execute") - native - sum(parts[name] for name in inside)
    parts["update"] -= parts["text"]
    return parts


def measure_rates() -> list[float]:
    """Steps a second of schedule and update alone, round by round."""
    executor = FakeExecutor()
    length = 100 + STEPS * (ROUNDS + 1) + SEQUENCES
    config = EngineConfig(max_num_seqs=SEQUENCES, max_num_batched_tokens=2048)
    blocks = SEQUENCES * (-(-length // 32) + 1)
    engine = make_engine(executor, config, max_model_len=2 * length, kv_blocks=blocks)
    rng = random.Random(0)
    params = SamplingParams(max_tokens=length, ignore_eos=True, detokenize=False)
    for i in range(SEQUENCES):
        prompt = rng.choices(range(VOCAB_SIZE), k=rng.randint(50, 150))
        engine.add_request(str(i), prompt, params)
    while any(request.num_generated < 2 for request in engine.requests.values()):
        engine.step()
    rates = []
    for _ in range(ROUNDS):
        executor.seconds = 0.0
        begin = time.perf_counter()
        for _ in range(STEPS):
            engine.step()
        rates.append(STEPS / (time.perf_counter() - begin - executor.seconds))
        assert len(executor.last.sequence_ids) == engine.scheduler.num_running == SEQUENCES
    return rates


def _generate(llm: LLM, seed: int) -> None:
    rng = random.Random(seed)
    prompts = [rng.choices(range(1000, 32000), k=PROMPT) for _ in range(STREAMS)]
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=seed, max_tokens=TOKENS, ignore_eos=True)
    llm.generate(prompts, params, use_tqdm=False)


def _runner(llm: LLM) -> model_runner.ModelRunner:
    executor = llm.engine.executor
    assert isinstance(executor, LocalExecutor)
    return executor.runner


if __name__ == "__main__":
    main()
