"""The `hexad` command. This module only declares it: the work of every subcommand is in a module of its own,
imported when it runs, so that `--help` is quick and `run` pays for nothing it does not use."""

from __future__ import annotations

import errno
import io
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from hexad.errors import HexadError

# As in `checkpoint.store`, whose package brings in NumPy; a test holds them equal.
DEFAULT_MODEL = "smollm2:135m"


class _Group(TyperGroup):
    """Commands whose errors end in one line on stderr, and whose interruptions end quietly."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _reported():  # --help and --version write, too
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _reported():
            return super().invoke(ctx)


@contextmanager
def _reported() -> Iterator[None]:
    try:
        _prepare_streams()
        try:
            yield
        finally:
            sys.stdout.flush()  # what cannot be written fails here, not as the interpreter leaves
    except HexadError as error:
        print_error(error)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        # The shell's prompt shall not follow what was being written.
        if terminal := next((stream for stream in (sys.stderr, sys.stdout) if stream.isatty()), None):
            print(file=terminal)
        raise typer.Exit(130) from None
    except OSError as error:
        # Nothing may try to flush again what stdout did not take.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):  # the reader has left, as in `hexad run … | head`
            raise typer.Exit(141) from None
        print_error(HexadError(f"{error.filename or 'Input or output failed'}: {error.strerror or error}."))
        raise typer.Exit(1) from error


def _prepare_streams() -> None:
    """Makes stdout and stderr fit to write to. Raises OSError if stdout is closed."""
    if sys.stderr is None:  # Python's stand-in for a closed stream, which `print` takes for stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process lives)
    if sys.stdout is None:
        raise OSError(errno.EBADF, "it is closed", "stdout")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character shows `?` instead of ending the program.
        sys.stdout.reconfigure(errors="replace")
    if os.environ.get("NO_COLOR"):
        os.environ["TTY_COMPATIBLE"] = "0"  # rich would still write bold and dim text


def print_error(error: HexadError) -> None:
    """Says on stderr what went wrong, with the notes added on the way up."""
    print("error:", " ".join([str(error), *getattr(error, "__notes__", [])]), file=sys.stderr)


def note(text: str) -> None:
    """A word beside the output: on stderr, dim on a terminal."""
    print(f"\033[2m{text}\033[0m" if _takes_styles(sys.stderr) else text, file=sys.stderr)


def _takes_styles(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


app = typer.Typer(
    name="hexad",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Runs large language models, fast and exact, on a plain CPU.",
)

_MODEL_HELP = "A GGUF file, a model's folder, hf:owner/repo[:file] or an alias (see `hexad list`)."

ModelArgument = Annotated[str, typer.Argument(metavar="[MODEL]", help=_MODEL_HELP)]
ModelOption = Annotated[str, typer.Option("--model", "-m", help=_MODEL_HELP)]
Threads = Annotated[int | None, typer.Option(help="CPU threads; what this machine allows if left out.")]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Longest sequence in tokens; the model's own if left out.")
]
Compute = Annotated[str, typer.Option(help="int8 or float: the type of activations at quantised weights.")]
KVDtype = Annotated[str, typer.Option(help="Type of the KV cache: auto, f32, f16 or q8.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; up to 2.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens that reach this probability.")]
TopK = Annotated[int, typer.Option(help="Keep this many tokens; 0 keeps all.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less likely than this × the likeliest.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]

# Of `serve` and `run-batch`, whose defaults the server's settings know.
ServedModelName = Annotated[
    list[str] | None, typer.Option(help="What clients call the model; it can be repeated.")
]
MaxNumSeqs = Annotated[int | None, typer.Option(help="Most sequences in one step; 64.")]
ServerCompute = Annotated[str | None, typer.Option(help="int8 or float.")]
ServerKVDtype = Annotated[str | None, typer.Option(help="auto, f32, f16 or q8.")]
ChatTemplate = Annotated[
    str | None, typer.Option(help="A Jinja template instead of the model's, or a file with it.")
]
ToolCallParser = Annotated[
    str | None, typer.Option(help="hermes, llama3 or mistral; by the template if left out.")
]
ReasoningParser = Annotated[str | None, typer.Option(help="think or none; by the template if left out.")]
GenerationConfig = Annotated[str | None, typer.Option(help="auto: the model's own defaults; vllm: none.")]
Config = Annotated[
    Path | None, typer.Option(help="A TOML file with these settings; HEXAD_* variables go before it.")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from hexad import __version__

        print(f"hexad {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave."),
    ] = False,
) -> None: ...


@app.command()
def run(
    prompt: Annotated[str | None, typer.Argument(help="The question; - or nothing reads a pipe.")] = None,
    model: ModelOption = DEFAULT_MODEL,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without chat template.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with text and timings.")
    ] = False,
    threads: Threads = None,
    max_model_len: MaxModelLen = None,
    compute: Compute = "int8",
    kv_dtype: KVDtype = "auto",
) -> None:
    """Answer one prompt; the answer streams to stdout."""
    from hexad.cli.run import run
    from hexad.params import SamplingParams

    params = SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, max_tokens=max_tokens
    )
    settings = _settings(threads, max_model_len, compute, kv_dtype)
    run(prompt, model, params, settings, raw=raw, as_json=json)


@app.command()
def chat(
    model: ModelArgument = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens in one answer.")] = 1024,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    threads: Threads = None,
    max_model_len: MaxModelLen = None,
    compute: Compute = "int8",
    kv_dtype: KVDtype = "auto",
) -> None:
    """Talk with a model; /help lists the commands."""
    from hexad.cli.chat import chat
    from hexad.params import SamplingParams

    params = SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, max_tokens=max_tokens
    )
    chat(model, system, params, _settings(threads, max_model_len, compute, kv_dtype))


@app.command()
def serve(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=_MODEL_HELP)] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 if left out.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 8000 if left out, 0 chooses one.")] = None,
    uds: Annotated[str | None, typer.Option(help="Listen on this Unix socket instead.")] = None,
    root_path: Annotated[str | None, typer.Option(help="Path at which a proxy shows the server.")] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="Let in only who has this key; it can be repeated.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file of keys, one per line.")] = None,
    served_model_name: ServedModelName = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Most tokens in one step; 512.")] = None,
    max_step_ms: MaxStepMs = None,
    kv_cache_gib: KVCacheGib = None,
    prefix_caching: Annotated[
        bool | None, typer.Option(help="Whether requests share what is computed.")
    ] = None,
    scheduling_policy: Annotated[str | None, typer.Option(help="fcfs or priority.")] = None,
    prefault: Annotated[
        bool | None,
        typer.Option(help="Whether to take the memory of the KV cache at once, not as it is used."),
    ] = None,
    threads: Threads = None,
    compute: ServerCompute = None,
    kv_dtype: ServerKVDtype = None,
    seed: Seed = None,
    chat_template: ChatTemplate = None,
    tool_call_parser: ToolCallParser = None,
    reasoning_parser: ReasoningParser = None,
    generation_config: GenerationConfig = None,
    max_logprobs: Annotated[int | None, typer.Option(help="Most logprobs per token; 20.")] = None,
    max_waiting: Annotated[
        int | None, typer.Option(help="Sequences that may wait; more are refused (429). 1024.")
    ] = None,
    max_n: Annotated[int | None, typer.Option(help="Most continuations of one request; 128.")] = None,
    max_stored_responses: Annotated[
        int | None, typer.Option(help="Most responses kept for /v1/responses; 1024.")
    ] = None,
    max_stored_mib: Annotated[float | None, typer.Option(help="Memory for them in MiB; 64.")] = None,
    max_body_mib: Annotated[float | None, typer.Option(help="Longest body of a request; 16.")] = None,
    max_grammar_kib: Annotated[float | None, typer.Option(help="Longest grammar or schema; 256.")] = None,
    body_timeout: Annotated[float | None, typer.Option(help="Seconds in which a body must come; 60.")] = None,
    request_timeout: Annotated[float | None, typer.Option(help="Longest request in seconds; 600.")] = None,
    timeout_graceful: Annotated[
        float | None, typer.Option(help="Seconds for what runs to end after SIGTERM; 30.")
    ] = None,
    timeout_keep_alive: Annotated[
        int | None, typer.Option(help="Seconds that an idle connection is kept; 5.")
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option(help="Origin that may call from a browser, or *; can be repeated.")
    ] = None,
    ssl_certfile: Annotated[Path | None, typer.Option(help="Certificate, for https.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="Its key.")] = None,
    ssl_keyfile_password: Annotated[str | None, typer.Option(help="The key's password.")] = None,
    ssl_ca_certs: Annotated[Path | None, typer.Option(help="Authorities of clients' certificates.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="Send traces there (needs hexad\\[otel]).")
    ] = None,
    config: Config = None,
) -> None:
    """Serve a model: OpenAI's and others' APIs, and a page to chat on."""
    given = {name: value for name, value in locals().items() if value not in (None, [], ())}
    from hexad.server.serve import serve
    from hexad.server.settings import collect

    given.pop("config", None)
    if "prefix_caching" in given:
        given["enable_prefix_caching"] = given.pop("prefix_caching")
    if code := serve(collect(given, os.environ, config)):
        raise typer.Exit(code)


@app.command("run-batch")
def run_batch(
    source: Annotated[
        str | None, typer.Argument(metavar="IN", help="A file of requests; - is stdin.")
    ] = None,
    target: Annotated[
        str | None, typer.Argument(metavar="OUT", help="Where the answers go; - is stdout.")
    ] = None,
    input_file: Annotated[str | None, typer.Option("--input-file", "-i", help="The same as IN.")] = None,
    output_file: Annotated[str | None, typer.Option("--output-file", "-o", help="The same as OUT.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help=_MODEL_HELP)] = None,
    served_model_name: ServedModelName = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    kv_cache_gib: KVCacheGib = None,
    threads: Threads = None,
    compute: ServerCompute = None,
    kv_dtype: ServerKVDtype = None,
    seed: Seed = None,
    chat_template: ChatTemplate = None,
    tool_call_parser: ToolCallParser = None,
    reasoning_parser: ReasoningParser = None,
    generation_config: GenerationConfig = None,
    max_body_mib: Annotated[float | None, typer.Option(help="Longest line; 16.")] = None,
    config: Config = None,
) -> None:
    """Answer a file of requests in OpenAI's batch format.

    Answers are written as they are finished.
    Where OUT has some already, it goes on from there.
    """
    given = {name: value for name, value in locals().items() if value not in (None, [], ())}
    files = [given.pop(name) for name in ("source", "target", "input_file", "output_file") if name in given]
    if len(files) != 2 or (source is None) != (target is None):
        raise typer.BadParameter("name both once, as IN OUT or as -i IN -o OUT.", param_hint="IN, OUT")
    from hexad.cli.batch import run_batch
    from hexad.server.settings import collect

    given.pop("config", None)
    run_batch(collect(given, os.environ, config), *files)


@app.command()
def inspect(
    model: ModelArgument = DEFAULT_MODEL,
    threads: Threads = None,
    max_model_len: MaxModelLen = None,
    compute: Compute = "int8",
    kv_dtype: KVDtype = "auto",
) -> None:
    """Show a model's graph, formats, kernels, costs and limits here."""
    from hexad.cli.inspect import inspect

    inspect(model, _settings(threads, max_model_len, compute, kv_dtype))


@app.command()
def pull(model: ModelArgument = DEFAULT_MODEL) -> None:
    """Fetch a model into the store and print its path."""
    from hexad.cli.models import pull

    pull(model)


@app.command("list")
def list_models() -> None:
    """List the models in the store and those it can fetch by alias."""
    from hexad.cli.models import list_models

    list_models()


bench = typer.Typer(no_args_is_help=True, help="Measure speed.")
app.add_typer(bench, name="bench")


InputLen = Annotated[int | None, typer.Option(min=1, help="Prompt tokens of each request.")]
OutputLen = Annotated[int | None, typer.Option(min=1, help="Tokens generated for each request.")]
WorkloadSeed = Annotated[int, typer.Option(help="Of the random tokens and lengths.")]
MaxNumBatchedTokens = Annotated[int | None, typer.Option(help="Most tokens in one step.")]
MaxStepMs = Annotated[float | None, typer.Option(help="Longest step while streams run, in ms.")]
KVCacheGib = Annotated[float | None, typer.Option(help="Memory for the KV cache in GiB.")]
RandomRangeRatio = Annotated[
    float, typer.Option(min=0, max=1, help="Draw lengths from ± this fraction of the two.")
]
PrefixLen = Annotated[int, typer.Option(min=0, help="Tokens that all prompts begin with, before their own.")]
Dataset = Annotated[
    Path | None,
    typer.Option(help='Prompts instead: lines of text, or of JSON with "prompt" and perhaps "output_len".'),
]
JsonFile = Annotated[Path | None, typer.Option(help="Write the figures to this file, too; - is stdout.")]
ProfileOps = Annotated[bool, typer.Option("--profile", help="Show what each kind of op takes.")]
PlotFile = Annotated[Path | None, typer.Option(help="Draw them to this file (needs hexad\\[plot]).")]


@bench.command()
def throughput(
    model: ModelArgument = DEFAULT_MODEL,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Requests, all at once; 64, or all of the dataset.")
    ] = None,
    input_len: InputLen = None,
    output_len: OutputLen = None,
    random_range_ratio: RandomRangeRatio = 0.0,
    prefix_len: PrefixLen = 0,
    dataset: Dataset = None,
    seed: WorkloadSeed = 0,
    json: JsonFile = None,
    plot: PlotFile = None,
    profile: ProfileOps = False,
    max_num_seqs: Annotated[int | None, typer.Option(help="Most sequences in one step.")] = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    max_step_ms: MaxStepMs = None,
    kv_cache_gib: KVCacheGib = None,
    prefix_caching: Annotated[bool, typer.Option(help="Whether requests share what is computed.")] = True,
    threads: Threads = None,
    max_model_len: MaxModelLen = None,
    compute: Compute = "int8",
    kv_dtype: KVDtype = "auto",
) -> None:
    """Time many requests at once: tokens a second, and how long each waits.

    Lengths are 128 tokens in and 128 out, if left out.
    """
    from hexad.cli.bench import Output, throughput
    from hexad.cli.bench_workload import Workload

    workload = Workload(
        num_prompts=num_prompts,
        input_len=input_len,
        output_len=output_len,
        range_ratio=random_range_ratio,
        prefix_len=prefix_len,
        dataset=dataset,
        seed=seed,
    )
    settings = _bench_settings(
        max_num_seqs,
        max_num_batched_tokens,
        max_step_ms=max_step_ms,
        kv_cache_gib=kv_cache_gib,
        enable_prefix_caching=prefix_caching,
        **_settings(threads, max_model_len, compute, kv_dtype),
    )
    throughput(model, settings, workload, Output(json, plot), profile=profile)


@bench.command()
def latency(
    model: ModelArgument = DEFAULT_MODEL,
    input_len: InputLen = 32,
    output_len: OutputLen = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    iters: Annotated[int, typer.Option(min=1, help="Measured batches.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Batches before these.")] = 2,
    seed: WorkloadSeed = 0,
    json: JsonFile = None,
    plot: PlotFile = None,
    profile: ProfileOps = False,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    max_step_ms: MaxStepMs = None,
    kv_cache_gib: KVCacheGib = None,
    threads: Threads = None,
    max_model_len: MaxModelLen = None,
    compute: Compute = "int8",
    kv_dtype: KVDtype = "auto",
) -> None:
    """Time batches of random prompts, one after another: whole, prefill, decode, per token."""
    from hexad.cli.bench import Output, latency
    from hexad.cli.bench_workload import Workload

    workload = Workload(num_prompts=batch_size, input_len=input_len, output_len=output_len, seed=seed)
    settings = _bench_settings(
        max(batch_size, 64),
        max_num_batched_tokens,
        max_step_ms=max_step_ms,
        kv_cache_gib=kv_cache_gib,
        **_settings(threads, max_model_len, compute, kv_dtype),
    )
    latency(model, settings, workload, Output(json, plot), iters=iters, warmup=warmup, profile=profile)


@bench.command("serve")
def serving(
    base_url: Annotated[
        str, typer.Option(help="Where the server is: http://…, https://… or unix:PATH of its socket.")
    ] = "http://127.0.0.1:8000",
    endpoint: Annotated[
        str, typer.Option(help="/v1/completions, or /v1/chat/completions for messages.")
    ] = "/v1/completions",
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Its name there; the first listed if left out.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="Sent as bearer token.")
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Requests; 64, or all of the dataset.")
    ] = None,
    request_rate: Annotated[
        float, typer.Option(help="Requests per second, on average; inf sends all at once.")
    ] = math.inf,
    burstiness: Annotated[
        float, typer.Option(help="1 is a Poisson process, less comes in bursts, more evenly.")
    ] = 1.0,
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="Most requests under way.")] = None,
    input_len: InputLen = None,
    output_len: OutputLen = None,
    random_range_ratio: RandomRangeRatio = 0.0,
    prefix_len: PrefixLen = 0,
    dataset: Dataset = None,
    seed: WorkloadSeed = 0,
    vocab_size: Annotated[
        int, typer.Option(min=2, help="Random prompts are of token ids below; messages, of words.")
    ] = 32_000,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Ask for answers of full length, where servers can.")
    ] = False,
    temperature: Temperature = 0.0,
    extra_body: Annotated[
        str | None, typer.Option(metavar="JSON", help="An object of more fields for each request.")
    ] = None,
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BOUNDS", help="Count requests within these, in ms, as in ttft:200,tpot:50,e2el:5000."
        ),
    ] = None,
    metric_percentiles: Annotated[str, typer.Option(help="Of all times.")] = "90,99",
    warmup: Annotated[int, typer.Option(min=0, help="Requests before the measured ones.")] = 2,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds a request may take.")] = 3600.0,
    json: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Put a load on any OpenAI server: how soon, how fast and how evenly it answers.

    Requests come at times of their own, whether others are answered or not.
    Lengths are 128 tokens in and at most 128 out, if left out.
    """
    from hexad.cli.bench import Output
    from hexad.cli.bench_serve import Load, Requests, Target, parse_goodput, parse_percentiles, serve
    from hexad.cli.bench_workload import Workload

    serve(
        Target(base_url=base_url, endpoint=endpoint, model=model, api_key=api_key, timeout=timeout),
        Load(request_rate=request_rate, burstiness=burstiness, max_concurrency=max_concurrency),
        Workload(
            num_prompts=num_prompts,
            input_len=input_len,
            output_len=output_len,
            range_ratio=random_range_ratio,
            prefix_len=prefix_len,
            dataset=dataset,
            seed=seed,
        ),
        Requests(
            temperature=temperature, ignore_eos=ignore_eos, extra_body=extra_body, vocab_size=vocab_size
        ),
        Output(json, plot),
        warmup=warmup,
        bounds=parse_goodput(goodput or []),
        percents=parse_percentiles(metric_percentiles),
    )


def _bench_settings(
    max_num_seqs: int | None, max_num_batched_tokens: int | None, **settings: Any
) -> dict[str, Any]:
    """Settings with the two that bound each other; a step takes all sequences unless told otherwise."""
    if max_num_seqs is not None:
        settings["max_num_seqs"] = max_num_seqs
        settings["max_num_batched_tokens"] = max(max_num_seqs, 512)
    if max_num_batched_tokens is not None:
        settings["max_num_batched_tokens"] = max_num_batched_tokens
    return settings


def _settings(threads: int | None, max_model_len: int | None, compute: str, kv_dtype: str) -> dict[str, Any]:
    """The EngineConfig fields that commands offer; EngineConfig itself checks them."""
    return {"threads": threads, "max_model_len": max_model_len, "compute": compute, "kv_dtype": kv_dtype}


def main() -> None:
    """The entry point of the `hexad` script. Exit codes: 1 an error, 2 wrong usage, 130 interrupted,
    141 the reader of stdout has left."""
    app()
