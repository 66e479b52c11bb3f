"""`hexad bench`: how fast a model runs here, and how near that is to what the machine allows."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from hexad.cli import bench_plot, note
from hexad.cli.bench_run import Run, Spread, Work, decode_work, figures, prefill_work, run, work
from hexad.cli.bench_workload import Job, Workload
from hexad.errors import ConfigError

if TYPE_CHECKING:
    from hexad.backends.backend import Profile
    from hexad.graph.cost import StepNumbers
    from hexad.llm import LLM
    from hexad.placement import Hardware
    from hexad.runner.model_runner import ModelRunner

STDOUT = Path("-")

WARM_UP = Workload(num_prompts=2, input_len=64, output_len=8, seed=-1)
"""What runs before a measured workload: buffers get their pages, and the engine learns its pace."""


@dataclass(frozen=True, slots=True)
class Output:
    """Where the figures go, besides the table. json_file: "-" is stdout, and the table then goes to stderr.

    `check` raises ConfigError for what is not going to work, before it costs time.
    """

    json_file: Path | None = None
    plot_file: Path | None = None

    def check(self) -> None:
        """Raises ConfigError."""
        if self.plot_file is not None:
            bench_plot.check(self.plot_file)
        for file in (self.json_file, self.plot_file):
            if file not in (None, STDOUT) and not file.parent.is_dir():
                raise ConfigError(f"{file} cannot be written: there is no folder {file.parent}.")

    def write(
        self, record: Mapping[str, Any], lines: Sequence[str], plot: Callable[[str, str, Path], None]
    ) -> None:
        """Writes everything; the files first, in case stdout cannot take the table. plot: draws to a path,
        given a title and a subtitle, which are the first two lines."""
        text = json.dumps(record, indent=2)
        if self.json_file is not None and self.json_file != STDOUT:
            try:
                self.json_file.write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                raise ConfigError(
                    f"The figures cannot be written to {self.json_file}: {error.strerror}."
                ) from error
        if self.plot_file is not None:
            title, subtitle, *_ = lines
            plot(title, subtitle, self.plot_file)
        stdout: TextIO = sys.stdout
        if self.json_file == STDOUT:
            print(text)
            stdout = sys.stderr
        print("\n".join(lines), file=stdout)


def throughput(
    model: str, settings: Mapping[str, Any], workload: Workload, output: Output, *, profile: bool = False
) -> None:
    """Runs all jobs of a workload, which arrive at once, and prints how fast, and with `profile` what each
    kind of op takes of it. settings: of EngineConfig.

    Raises HexadErrors.
    """
    from hexad.cli.bench_profile import Phase
    from hexad.llm import LLM

    output.check()
    with LLM(model, **settings) as llm:
        jobs = workload.jobs(llm.get_tokenizer())
        _check_context(llm, jobs)
        note(f"running {len(jobs)} requests …")
        run(llm.engine, WARM_UP.jobs(llm.get_tokenizer()))
        llm.reset_prefix_cache()
        done = run(llm.engine, jobs, _profiler(llm) if profile else None)
        machine = Machine.of(llm)
        config = llm.config
    found = figures([done])
    needed = work(
        done, max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens
    )
    found["limit_fraction"] = machine.least_seconds(needed) / found["seconds"]
    phases = [Phase.of("all", [done], slice(0, 3), needed, machine)] if profile else []
    rates = ("output_tok_s", "total_tok_s", "requests_per_s")
    found |= {f"limit_{rate}": found[rate] / found["limit_fraction"] for rate in rates}
    lines = [
        f"{model}: {len(jobs)} requests, {_lengths(jobs)}",
        str(machine),
        *speeds(found, *rates),
        f"{'prefix cache':<16}{found['cached_tokens']:>10,} of {found['prompt_tokens']:,} prompt tokens",
        f"{'preemptions':<16}{found['preemptions']:>10,}",
        *_spreads(found),
        *(line for phase in phases for line in phase.lines()),
    ]
    record = {
        **_record("throughput", model, llm, machine),
        "workload": {**asdict(workload), "dataset": workload.dataset and str(workload.dataset)},
        "figures": found,
        "requests": _requests(done),
        "profile": [phase.record() for phase in phases],
    }
    output.write(record, lines, partial(bench_plot.plot, [done]))


def latency(
    model: str,
    settings: Mapping[str, Any],
    workload: Workload,
    output: Output,
    *,
    iters: int,
    warmup: int,
    profile: bool = False,
) -> None:
    """Runs batches of workload.num_prompts jobs at once, each with tokens of its own, and prints how long
    they take, and with `profile` what each kind of op takes of it. Raises ConfigError if a batch cannot run
    all at once, and other HexadErrors."""
    from hexad.cli.bench_profile import Phase
    from hexad.llm import LLM

    output.check()
    with LLM(model, **settings) as llm:
        batches = [
            replace(workload, seed=workload.seed + i).jobs(llm.get_tokenizer()) for i in range(warmup + iters)
        ]
        _check_context(llm, batches[0])
        _check_blocks(llm, batches[0])
        note(f"running {warmup} + {iters} batches …")
        profiler = _profiler(llm) if profile else None
        runs = [run(llm.engine, jobs, profiler) for jobs in batches][warmup:]
        machine = Machine.of(llm)
        config = llm.config
    jobs = runs[0].jobs
    prefill = prefill_work(jobs, max_num_batched_tokens=config.max_num_batched_tokens)
    found = {
        **figures(runs),
        **{f"batch_{key}_s": value for key, value in Spread.of(r.seconds for r in runs)._asdict().items()},
        "prefill_tok_s": _median(runs, lambda r: prefill.tokens / r.last_first_token),
        "limit_prefill_tok_s": prefill.tokens / machine.least_seconds(prefill),
    }
    phases = [Phase.of("prefill", runs, slice(0, 2), prefill, machine)] if profile else []
    if jobs[0].output_len > 1:
        decode = decode_work(jobs)
        if profile:
            phases.append(Phase.of("decode", runs, slice(1, 3), decode, machine))
        found["decode_tok_s"] = _median(runs, _decode_speed)
        found["limit_decode_tok_s"] = decode.tokens / machine.least_seconds(decode)
    lines = [
        f"{model}: batches of {len(jobs)}, {_lengths(jobs)}, {iters} times",
        str(machine),
        *speeds(found, "prefill_tok_s", "decode_tok_s"),
        *_spreads(found, "batch"),
        *(line for phase in phases for line in phase.lines()),
    ]
    record = {
        **_record("latency", model, llm, machine),
        "workload": {
            "batch_size": len(jobs),
            "input_len": workload.input_len,
            "output_len": workload.output_len,
            "iters": iters,
            "warmup": warmup,
            "seed": workload.seed,
        },
        "figures": found,
        "batch_seconds": [r.seconds for r in runs],
        "profile": [phase.record() for phase in phases],
    }
    output.write(record, lines, partial(bench_plot.plot, runs))


@dataclass(frozen=True, slots=True)
class Machine:
    """What ran the model, and what it could do at best. cost: of the model's steps. nodes: each node's kind
    and its part of the cost."""

    cpu: str
    threads: int
    hardware: Hardware
    cost: StepNumbers
    nodes: Sequence[tuple[str, StepNumbers]]

    @classmethod
    def of(cls, llm: LLM) -> Machine:
        """Measures the machine, which takes a moment."""
        from hexad.cli.bench_profile import kinds
        from hexad.graph.cost import node_numbers, step_numbers
        from hexad.placement import cpu_count, probe

        graph, kv_dtype = _runner(llm).graph, llm.config.resolved_kv_dtype
        threads = min(llm.config.threads or cpu_count(), cpu_count())
        return cls(
            cpu_name(),
            threads,
            probe(threads, rates=True),
            step_numbers(graph, graph.weights, kv_dtype=kv_dtype),
            list(zip(kinds(graph), node_numbers(graph, graph.weights, kv_dtype=kv_dtype), strict=True)),
        )

    def least_seconds(self, needed: Work, cost: StepNumbers | None = None) -> float:
        """The least time that work takes here. cost: of what does it; the whole model if left out."""
        bandwidth, int8_rate = self.hardware.bandwidth, self.hardware.int8_rate
        assert bandwidth is not None
        assert int8_rate is not None
        return needed.seconds(cost or self.cost, bandwidth=bandwidth, int8_rate=int8_rate)

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        bandwidth, int8_rate = self.hardware.bandwidth or 0, self.hardware.int8_rate or 0
        rates = f"{bandwidth / 1e9:.1f} GB/s, {int8_rate / 1e9:,.0f} GMAC/s in int8"
        return f"{self.cpu}, {threads}, {self.hardware.isa}, {rates}; hexad {version('hexad')}"


def _runner(llm: LLM) -> ModelRunner:
    from hexad.runner.executor import LocalExecutor

    executor = llm.engine.executor
    assert isinstance(executor, LocalExecutor)
    return executor.runner


def _profiler(llm: LLM) -> Callable[[], Profile]:
    return _runner(llm).executable.profile


def _check_context(llm: LLM, jobs: Sequence[Job]) -> None:
    """The engine would cut a generation off at the end of the context, and a benchmark would not notice."""
    context = llm.plan.max_model_len
    for i, (token_ids, output_len) in enumerate(jobs):
        if len(token_ids) + output_len > context:
            raise ConfigError(
                f"Prompt {i} has {len(token_ids)} tokens, and {output_len} are to be generated, "
                f"{len(token_ids) + output_len} in all; the context is {context} tokens. Lower --input-len "
                "or --output-len, or raise --max-model-len if the model allows."
            )


def _check_blocks(llm: LLM, jobs: Sequence[Job]) -> None:
    """Sequences that wait for KV blocks would be measured as slow ones."""
    from hexad.engine.block_manager import blocks_for

    needed = sum(blocks_for(len(job.token_ids) + job.output_len) for job in jobs)
    if needed > llm.plan.kv_blocks:
        raise ConfigError(
            f"A batch of {len(jobs)} needs {needed} KV cache blocks to run all at once; there are "
            f"{llm.plan.kv_blocks}. Lower --input-len, --output-len or --batch-size, or raise --kv-cache-gib."
        )


def _decode_speed(done: Run) -> float:
    """Tokens per second once all have their first."""
    begin = done.last_first_token
    return sum(step.drawn for step in done.steps if step.end > begin) / (done.seconds - begin)


def _median(runs: Sequence[Run], value: Callable[[Run], float]) -> float:
    return Spread.of(map(value, runs)).median


def _requests(done: Run) -> list[dict[str, float]]:
    return [
        {
            "prompt_tokens": len(job.token_ids),
            "output_tokens": job.output_len,
            "cached_tokens": cached,
            "ttft_s": times[0],
            "e2e_s": times[-1],
        }
        for job, cached, times in zip(done.jobs, done.cached, done.token_times, strict=True)
    ]


def _record(benchmark: str, model: str, llm: LLM, machine: Machine) -> dict[str, Any]:
    hardware = machine.hardware
    return {
        "benchmark": benchmark,
        "model": model,
        "versions": {
            "hexad": version("hexad"),
            "numpy": version("numpy"),
            "python": platform.python_version(),
        },
        "machine": {
            "cpu": machine.cpu,
            "cpus": hardware.cpus,
            "threads": machine.threads,
            "isa": hardware.isa,
            "bandwidth_bytes_s": hardware.bandwidth,
            "int8_macs_s": hardware.int8_rate,
            "system": platform.platform(),
        },
        "settings": {
            **asdict(llm.config),
            "max_model_len": llm.plan.max_model_len,
            "kv_blocks": llm.plan.kv_blocks,
            "kv_dtype": llm.config.resolved_kv_dtype,
        },
    }


_NAMES = {
    "output_tok_s": "output tok/s",
    "total_tok_s": "total tok/s",
    "requests_per_s": "requests/s",
    "prefill_tok_s": "prefill tok/s",
    "decode_tok_s": "decode tok/s",
}


def speeds(found: Mapping[str, float], *keys: str) -> list[str]:
    """Each figure that there is, with the machine's limit beside it, if any is known."""
    lines = []
    for key in keys:
        if key in found:
            line = f"{_NAMES[key]:<16}{_number(found[key]):>10}"
            if (limit := found.get(f"limit_{key}")) is not None:
                line += f"  {found[key] / limit:.0%} of this machine's limit of {_number(limit)}"
            lines.append(line)
    return lines


def _number(value: float) -> str:
    return f"{value:,.{2 if value < 100 else 0}f}"


def _spreads(found: Mapping[str, float], *first: str) -> list[str]:
    lines = ["", f"{'ms':<16}{'mean':>10}{'median':>10}{'p99':>10}"]
    for name in (*first, "ttft", "tpot", "itl", "e2e"):
        if f"{name}_mean_s" in found:
            ms = (1000 * found[f"{name}_{key}_s"] for key in Spread._fields)
            title = name if name in first else name.upper()
            lines.append(f"{title:<16}" + "".join(f"{v:>10,.{2 if v < 100 else 0}f}" for v in ms))
    return lines


def _lengths(jobs: Sequence[Job]) -> str:
    """ "112–143 tokens in, 128 out"."""
    ranges = []
    for lengths in ([len(job.token_ids) for job in jobs], [job.output_len for job in jobs]):
        low, high = min(lengths), max(lengths)
        ranges.append(f"{low:,}" if low == high else f"{low:,}–{high:,}")
    return "{} tokens in, {} out".format(*ranges)


def cpu_name() -> str:
    """The processor's name; on Linux the kernel's, which Python does not pass on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
