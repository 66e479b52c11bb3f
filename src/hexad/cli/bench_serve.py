"""`hexad bench serve`: requests to any OpenAI server, at times of their own, and how it answers them."""

from __future__ import annotations

import asyncio
import json
import math
import platform
import random
import resource
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from hexad.checks import check_number, shown
from hexad.cli import bench_plot, note
from hexad.cli.bench import WARM_UP, Output, cpu_name, speeds
from hexad.cli.bench_client import Answer, Client, RequestFailed
from hexad.cli.bench_run import percentile
from hexad.cli.bench_workload import DEFAULT_LEN, Workload, read_prompts
from hexad.errors import ConfigError, HexadError

METRICS = ("ttft", "tpot", "itl", "e2el")

LOWEST_ID = 1000
"""Random prompts keep clear of the first ids of a vocabulary, where control tokens and bytes are."""

# One token each, with the space before it, in practically every vocabulary made from English text.
WORDS = """
time year people way day man thing woman life child world school state family student group country problem
hand part place case week company system program question work government number night point home water room
mother area money story fact month lot right study book eye job word business issue side kind head house
service friend father power hour game line end member law car city name team minute idea body information back
parent face others level office door health person art war history party result change morning reason research
girl guy moment air teacher force education
""".split()  # noqa: SIM905


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is asked. base_url, api_key, timeout: of `Client`. endpoint: a path that ends in
    "chat/completions" takes messages, any other a prompt. model: None is the first that the server lists.
    Raises ConfigError."""

    base_url: str
    endpoint: str
    model: str | None = None
    api_key: str | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        if not self.endpoint.startswith("/") or not self.endpoint.isascii() or " " in self.endpoint:
            raise ConfigError(f"--endpoint must be like /v1/completions, not {shown(self.endpoint)}.")

    @property
    def takes_messages(self) -> bool:
        return self.endpoint.endswith("chat/completions")

    def __str__(self) -> str:
        return self.base_url.rstrip("/").removesuffix("/v1") + self.endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """When requests come. request_rate: on average, per second; inf: all at once. burstiness: the shape of
    the gamma distribution of the gaps between them; 1 is a Poisson process, less comes in bursts, more
    evenly. max_concurrency: of requests; others wait, unsent. Raises ConfigError."""

    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None

    def __post_init__(self) -> None:
        if not self.request_rate > 0:
            raise ConfigError(f"--request-rate must be above 0, not {self.request_rate:g}.")
        check_number(ConfigError, "--burstiness", self.burstiness, "above 0", lambda shape: shape > 0)

    def arrivals(self, count: int, seed: int) -> list[float]:
        """When each of so many requests comes, in seconds after the first; the same for the same seed."""
        if math.isinf(self.request_rate):
            return [0.0] * count
        rng = random.Random(f"arrivals {seed}")
        scale = 1 / (self.request_rate * self.burstiness)
        gaps = (rng.gammavariate(self.burstiness, scale) for _ in range(count - 1))
        return list(accumulate(gaps, initial=0.0))

    def __str__(self) -> str:
        if math.isinf(self.request_rate):
            text = "all at once"
        else:
            text = f"{self.request_rate:g}/s"
            if self.burstiness != 1:
                text += f" with burstiness {self.burstiness:g}"
        return text + (f", at most {self.max_concurrency} at a time" if self.max_concurrency else "")


class Ask(NamedTuple):
    """A request: its prompt, as text or token ids, and the most tokens of the answer."""

    prompt: str | list[int]
    output_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """What requests say. Random prompts are token ids below vocab_size, or, as messages, words: about as many
    tokens. extra_body: JSON of an object with more fields, which go before any others. Raises ConfigError."""

    temperature: float = 0.0
    ignore_eos: bool = False
    extra_body: str | None = None
    vocab_size: int = 32_000

    def asks(self, workload: Workload, *, as_text: bool) -> list[Ask]:
        """The workload's prompts. Raises ConfigError."""
        if workload.dataset is not None:
            output_len = workload.output_len or DEFAULT_LEN
            prompts = read_prompts(workload.dataset, workload.num_prompts)
            return [Ask(prompt, length or output_len) for prompt, length in prompts]
        if as_text:
            return [Ask(" ".join(words), length) for words, length in workload.random_prompts(WORDS)]
        ids = range(min(LOWEST_ID, self.vocab_size // 2), self.vocab_size)
        return [Ask(prompt, length) for prompt, length in workload.random_prompts(ids)]

    def body(self, ask: Ask, model: str, *, as_messages: bool) -> bytes:
        """The JSON that is sent. Raises ConfigError."""
        fields: dict[str, Any] = {"model": model}
        if as_messages:
            fields["messages"] = [{"role": "user", "content": ask.prompt}]
        else:
            fields["prompt"] = ask.prompt
        fields |= {"max_tokens": ask.output_len, "temperature": self.temperature}
        if self.ignore_eos:
            fields["ignore_eos"] = True
        fields |= {"stream": True, "stream_options": {"include_usage": True}, **self._extra()}
        return json.dumps(fields).encode()

    def _extra(self) -> dict[str, Any]:
        if self.extra_body is None:
            return {}
        try:
            extra = json.loads(self.extra_body)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--extra-body {shown(self.extra_body)} is not JSON: {error}.") from error
        if not isinstance(extra, dict):
            raise ConfigError(f"--extra-body must be a JSON object, not {shown(self.extra_body)}.")
        return extra


def parse_goodput(texts: Sequence[str]) -> dict[str, float]:
    """Bounds in seconds by metric, of texts like "ttft:200 tpot:50", in ms. Raises ConfigError."""
    bounds: dict[str, float] = {}
    for part in " ".join(texts).replace(",", " ").split():
        name, _, value = part.partition(":")
        try:
            bound = float(value) / 1000
        except ValueError:
            bound = math.nan
        if name not in ("ttft", "tpot", "e2el") or not 0 < bound < math.inf or name in bounds:
            raise ConfigError(
                "--goodput takes ttft, tpot and e2el, each once and with its bound in ms, as in "
                f"ttft:200,tpot:50; not {shown(part)}."
            )
        bounds[name] = bound
    return bounds


def parse_percentiles(text: str) -> tuple[float, ...]:
    """Of a text like "90,99". Raises ConfigError."""
    try:
        percents = tuple(float(part) for part in text.split(","))
    except ValueError:
        percents = ()
    if not percents or not all(0 < percent <= 100 for percent in percents):
        raise ConfigError(f"--metric-percentiles must be like 90,99, of above 0 to 100; not {shown(text)}.")
    return percents


@dataclass(frozen=True, slots=True)
class Served:
    """What came of a load. Times of the answers are as in `Answer`; the first was due at `begin`.

    cpu_seconds: that this process spent meanwhile.
    """

    asks: Sequence[Ask]
    answers: Sequence[Answer]
    begin: float
    cpu_seconds: float

    @property
    def completed(self) -> list[Answer]:
        return [answer for answer in self.answers if not answer.error]

    @property
    def seconds(self) -> float:
        """From the first request to the end of the last."""
        return max(answer.end for answer in self.answers) - self.begin

    @property
    def prompt_tokens(self) -> list[int]:
        """Of each request that was completed: as the server says or, failing that, as ids were sent."""
        return [
            (len(ask.prompt) if isinstance(ask.prompt, list) else 0)
            if answer.prompt_tokens is None
            else answer.prompt_tokens
            for ask, answer in zip(self.asks, self.answers, strict=True)
            if not answer.error
        ]

    def figures(self, bounds: Mapping[str, float], percents: Sequence[float]) -> dict[str, float]:
        """Rates, of what was completed; spreads in seconds, with these percentiles; and, with bounds in
        seconds, goodput: requests within all of them."""
        completed, seconds = self.completed, self.seconds
        prompt, output = sum(self.prompt_tokens), sum(answer.tokens for answer in completed)
        found: dict[str, float] = {
            "seconds": seconds,
            "requests": len(self.answers),
            "completed": len(completed),
            "failed": len(self.answers) - len(completed),
            "prompt_tokens": prompt,
            "output_tokens": output,
            "requests_per_s": len(completed) / seconds,
            "output_tok_s": output / seconds,
            "total_tok_s": (prompt + output) / seconds,
        }
        if bounds:
            good = sum(is_good(answer, bounds) for answer in completed)
            found |= {"goodput_requests_per_s": good / seconds, "goodput_share": good / len(self.answers)}
        found |= {
            "peak_concurrency": peak_concurrency(self.answers),
            "latest_s": max(answer.sent - answer.due for answer in self.answers),
            "generator_cpu_s": self.cpu_seconds,
            "generator_cpu_share": self.cpu_seconds / seconds,
        }
        for name, values in latencies(completed).items():
            if values:
                ascending = sorted(values)
                found[f"{name}_mean_s"] = statistics.fmean(ascending)
                found[f"{name}_median_s"] = statistics.median(ascending)
                found |= {f"{name}_p{share:g}_s": percentile(ascending, share) for share in percents}
        return found

    def errors(self) -> dict[str, dict[str, Any]]:
        """How many of each kind, most first, with the words of one."""
        counts = Counter(answer.error for answer in self.answers if answer.error)
        example = {answer.error: answer.detail for answer in reversed(self.answers)}
        return {kind: {"count": n, "example": example[kind]} for kind, n in counts.most_common()}

    def arrivals(self) -> list[tuple[float, float]]:
        """(when, how many) tokens came, in seconds since the beginning."""
        return [
            (when - self.begin, answer.tokens / len(answer.times))
            for answer in self.completed
            for when in answer.times
        ]


def latencies(answers: Sequence[Answer]) -> dict[str, list[float]]:
    """Seconds. ttft, e2el: of each answer until its first text, and until its end. tpot: of each, per token
    after the first. itl: between two events that bring text or token ids, each of which may bring several
    tokens."""
    return {
        "ttft": [answer.ttft for answer in answers],
        "tpot": [tpot for answer in answers if (tpot := answer.tpot) is not None],
        "itl": [b - a for answer in answers for a, b in pairwise(answer.times)],
        "e2el": [answer.e2el for answer in answers],
    }


def is_good(answer: Answer, bounds: Mapping[str, float]) -> bool:
    """Whether an answer is within all bounds; one token alone has no TPOT to exceed."""
    return all((getattr(answer, name) or 0.0) <= bound for name, bound in bounds.items())


def peak_concurrency(answers: Sequence[Answer]) -> int:
    """Most requests under way at once."""
    changes = sorted([(a.sent, 1) for a in answers] + [(a.end, -1) for a in answers])
    return max(accumulate(change for _, change in changes))


async def run(
    client: Client, endpoint: str, asks: Sequence[Ask], bodies: Sequence[bytes], load: Load, seed: int
) -> Served:
    """Sends all requests, each when it is due, and waits for the answers. There must be one."""
    gate = asyncio.Semaphore(load.max_concurrency) if load.max_concurrency else nullcontext()

    async def send(body: bytes, answer: Answer) -> None:
        async with gate:
            await client.stream(endpoint, body, answer)

    cpu, begin = time.process_time(), time.perf_counter()
    answers = [Answer(due=begin + offset) for offset in load.arrivals(len(asks), seed)]
    async with asyncio.TaskGroup() as tasks:
        for body, answer in zip(bodies, answers, strict=True):
            if (wait := answer.due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.create_task(send(body, answer))
    return Served(asks, answers, begin, time.process_time() - cpu)


def serve(
    target: Target,
    load: Load,
    workload: Workload,
    requests: Requests,
    output: Output,
    *,
    warmup: int,
    bounds: Mapping[str, float],
    percents: Sequence[float],
) -> None:
    """Puts a load on a server and prints how it bears it. warmup: requests before it. bounds, percents: as in
    `Served.figures`.

    Raises ConfigError where the server does not answer at all, and HexadError if it answers no request.
    """
    output.check()
    _raise_file_limit()
    model, done = asyncio.run(_serve(target, load, workload, requests, warmup))
    found, errors = done.figures(bounds, percents), done.errors()
    lines = [
        f"{model} at {target}: {len(done.answers)} requests, {load}",
        _totals(done, found),
        *speeds(found, "output_tok_s", "total_tok_s", "requests_per_s"),
        *_goodput(found, bounds),
        f"{'completed':<16}{found['completed']:>10,}",
        *(f"{kind:<16}{error['count']:>10,}  {error['example']}".rstrip() for kind, error in errors.items()),
        f"{'generator':<16}{found['generator_cpu_s']:>10,.2f} s of CPU, "
        f"{found['generator_cpu_share']:.1%} of a core",
        *_spreads(found, percents),
    ]
    record = {
        "benchmark": "serve",
        "model": model,
        "target": {"base_url": target.base_url, "endpoint": target.endpoint},
        "versions": {"hexad": version("hexad"), "python": platform.python_version()},
        "machine": {"cpu": cpu_name(), "system": platform.platform()},
        "load": {
            **asdict(load),
            "request_rate": None if math.isinf(load.request_rate) else load.request_rate,
        },
        "workload": {**asdict(workload), "dataset": workload.dataset and str(workload.dataset)},
        "settings": asdict(requests),
        "goodput_bounds_s": dict(bounds),
        "figures": found,
        "errors": errors,
        "requests": _records(done),
    }
    ttft, itl = (latencies(done.completed)[name] for name in ("ttft", "itl"))
    output.write(record, lines, partial(bench_plot.plot_arrivals, done.arrivals(), ttft, itl))
    if not done.completed:
        raise HexadError(f"None of {len(done.answers)} requests was completed.")


async def _serve(
    target: Target, load: Load, workload: Workload, requests: Requests, warmup: int
) -> tuple[str, Served]:
    """(the model's name, what came of the load). Raises ConfigError."""
    client = Client(target.base_url, target.api_key, target.timeout)
    as_messages = target.takes_messages
    asks = requests.asks(workload, as_text=as_messages)
    try:
        model = target.model or await _first_model(client, target)
        bodies = [requests.body(ask, model, as_messages=as_messages) for ask in asks]
        if warmup:
            before = requests.asks(replace(WARM_UP, num_prompts=warmup), as_text=as_messages)
            bodies_before = [requests.body(ask, model, as_messages=as_messages) for ask in before]
            warm = await run(client, target.endpoint, before, bodies_before, Load(), 0)
            for kind, error in warm.errors().items():
                raise ConfigError(
                    f"{target} does not answer. {kind}: {error['example'] or 'no more is known'}"
                )
        note(f"sending {len(asks)} requests …")
        return model, await run(client, target.endpoint, asks, bodies, load, workload.seed)
    finally:
        client.close()


async def _first_model(client: Client, target: Target) -> str:
    try:
        names = await client.models()
    except RequestFailed as error:
        raise ConfigError(
            f"The model's name cannot be asked for at {target.base_url}. {error}. Check --base-url, and "
            "whether a server runs there (`hexad serve`), or give --model."
        ) from error
    except TimeoutError:
        raise ConfigError(f"{target.base_url} does not answer within {target.timeout:g} s.") from None
    if not names:
        raise ConfigError(f"{target.base_url} lists no model; give --model.")
    return names[0]


def _raise_file_limit() -> None:
    """Every request under way needs a connection; the usual soft limit is 1,024 files."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _totals(done: Served, found: Mapping[str, float]) -> str:
    text = f"{found['prompt_tokens']:,} tokens in, {found['output_tokens']:,} out, {found['seconds']:,.2f} s"
    if any(answer.output_tokens is None for answer in done.completed):
        text += "; the server does not count tokens: an event is taken for one"
    return text


def _goodput(found: Mapping[str, float], bounds: Mapping[str, float]) -> list[str]:
    if not bounds:
        return []
    terms = ", ".join(f"{name.upper()} ≤ {1000 * bound:g} ms" for name, bound in bounds.items())
    rate, share = found["goodput_requests_per_s"], found["goodput_share"]
    return [f"{'goodput':<16}{rate:>10,.2f} requests/s, {share:.0%} of them, with {terms}"]


def _spreads(found: Mapping[str, float], percents: Sequence[float]) -> list[str]:
    keys = ["mean", "median", *(f"p{share:g}" for share in percents)]
    lines = ["", f"{'ms':<16}" + "".join(f"{key:>10}" for key in keys)]
    for name in METRICS:
        if f"{name}_mean_s" in found:
            ms = (1000 * found[f"{name}_{key}_s"] for key in keys)
            lines.append(f"{name.upper():<16}" + "".join(f"{v:>10,.{2 if v < 100 else 0}f}" for v in ms))
    return lines


def _records(done: Served) -> list[dict[str, Any]]:
    return [
        {
            "due_s": answer.due - done.begin,
            "sent_s": answer.sent - done.begin,
            "ttft_s": None if answer.error else answer.ttft,
            "e2el_s": answer.e2el,
            "prompt_tokens": answer.prompt_tokens,
            "output_tokens": answer.output_tokens,
            "max_tokens": ask.output_len,
            "error": answer.error or None,
        }
        for ask, answer in zip(done.asks, done.answers, strict=True)
    ]
