"""`hexad bench serve`: figures written down by hand, and the command at a server whose answers are known."""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.fake_openai import (
    BROKEN,
    BUSY,
    DONE,
    END,
    STREAM,
    FakeServer,
    Request,
    Step,
    chunk,
    serving,
    text,
    usage,
    whole,
)
from typer.testing import CliRunner

from hexad.cli import app
from hexad.cli.bench_client import Answer
from hexad.cli.bench_run import percentile
from hexad.cli.bench_serve import (
    WORDS,
    Ask,
    Load,
    Requests,
    Served,
    Target,
    is_good,
    latencies,
    parse_goodput,
    parse_percentiles,
    peak_concurrency,
)
from hexad.cli.bench_workload import Workload
from hexad.errors import ConfigError

# --- figures ---

# In 10 s, four tokens in three events at 1, 2 and 4 s, a single one of another answer at 3 s, and a failure.
DONE_BY_HAND = Served(
    asks=[Ask([5] * 40, 4), Ask("six words, but nobody has counted", 1), Ask([7] * 9, 1)],
    answers=[
        Answer(due=100, sent=100, end=104, times=[101, 102, 104], prompt_tokens=41, output_tokens=4),
        Answer(due=100, sent=102, end=103, times=[103], output_tokens=1),
        Answer(due=104, sent=104, end=110, times=[105], error="HTTP 500", detail="oh"),
    ],
    begin=100,
    cpu_seconds=0.5,
)


def test_figures() -> None:
    assert latencies(DONE_BY_HAND.completed) == {
        "ttft": [1, 1],
        "tpot": [1.0],  # three seconds for three tokens; a single one has no time after the first
        "itl": [1, 2],
        "e2el": [4, 1],
    }
    found = DONE_BY_HAND.figures({"ttft": 1, "e2el": 3.9}, (25, 99))
    expected = {
        "seconds": 10,
        "requests": 3,
        "completed": 2,
        "failed": 1,
        "prompt_tokens": 41,
        "output_tokens": 5,
        "requests_per_s": 0.2,
        "output_tok_s": 0.5,
        "total_tok_s": 4.6,
        "goodput_requests_per_s": 0.1,
        "goodput_share": pytest.approx(1 / 3),
        "peak_concurrency": 2,
        "latest_s": 2,
        "generator_cpu_s": 0.5,
        "generator_cpu_share": 0.05,
        "e2el_mean_s": 2.5,
        "e2el_median_s": 2.5,
        "e2el_p25_s": 1.75,
        "itl_p99_s": pytest.approx(1.99),
    }
    assert {name: found[name] for name in expected} == expected
    assert DONE_BY_HAND.errors() == {"HTTP 500": {"count": 1, "example": "oh"}}
    assert DONE_BY_HAND.arrivals() == [(1, 4 / 3), (2, 4 / 3), (4, 4 / 3), (3, 1)]
    assert not [name for name in DONE_BY_HAND.figures({}, (99,)) if name.startswith("goodput")]


def test_without_counts_the_prompts_ids_and_the_events_count() -> None:
    answer = Answer(sent=0, end=5, times=[1, 3, 5])
    assert (answer.tokens, answer.tpot) == (3, 2)
    assert Served([Ask([1, 2, 3], 5)], [answer], 0, 0).prompt_tokens == [3]
    assert Served([Ask("text", 5)], [answer], 0, 0).prompt_tokens == [0]


def test_an_answer_without_text_ends_with_its_first_word() -> None:
    answer = Answer(sent=1, end=3, output_tokens=0)
    assert (answer.ttft, answer.e2el, answer.tpot) == (2, 2, None)


def test_good_answers_are_within_all_bounds() -> None:
    answer = Answer(sent=0, end=5, times=[1, 3, 5], output_tokens=5)
    assert is_good(answer, {"ttft": 1, "tpot": 1, "e2el": 5})
    for name, bound in (("ttft", 0.9), ("tpot", 0.9), ("e2el", 4.9)):
        assert not is_good(answer, {"ttft": 1, "tpot": 1, "e2el": 5} | {name: bound})
    assert is_good(Answer(sent=0, end=1, times=[1], output_tokens=1), {"tpot": 0.001})


def test_peak_concurrency() -> None:
    spans = [(0, 4), (1, 2), (2, 3), (2.5, 6), (6, 7)]  # one that ends frees its place for one that begins
    assert peak_concurrency([Answer(sent=begin, end=end) for begin, end in spans]) == 3


def test_percentiles_are_interpolated() -> None:
    values = [10.0, 20.0, 30.0, 50.0]
    expected = {100: 50.0, 50: 25.0, 90: 44.0, 1e-9: 10.0}
    assert {percent: percentile(values, percent) for percent in expected} == pytest.approx(expected)
    assert percentile([7.0], 99) == 7.0


# --- when requests come, and what they say ---


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_burstiness_asked_for(burstiness: float) -> None:
    load = Load(request_rate=5, burstiness=burstiness)
    times = load.arrivals(20_000, seed=3)
    assert times == load.arrivals(20_000, seed=3) != load.arrivals(20_000, seed=4)
    assert times[0] == 0
    gaps = [b - a for a, b in pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 5, rel=0.05)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(burstiness**-0.5, rel=0.05)


def test_a_poisson_process_forgets() -> None:
    gaps = [b - a for a, b in pairwise(Load(request_rate=1).arrivals(20_000, seed=0))]
    for later in (1, 2):
        assert sum(gap > later for gap in gaps) / len(gaps) == pytest.approx(math.exp(-later), rel=0.05)
    assert Load().arrivals(3, seed=0) == [0, 0, 0]


def test_random_prompts_are_ids_of_exact_lengths_or_words() -> None:
    workload = Workload(num_prompts=9, input_len=20, output_len=5, range_ratio=0.5, prefix_len=7)
    ids = Requests(vocab_size=300).asks(workload, as_text=False)
    words = Requests().asks(workload, as_text=True)
    assert ids == Requests(vocab_size=300).asks(workload, as_text=False)
    for (by_ids, _), (by_words, _) in zip(ids, words, strict=True):
        assert isinstance(by_ids, list)
        assert isinstance(by_words, str)
        assert 17 <= len(by_ids) <= 37
        assert set(by_ids) <= set(range(150, 300))
        assert 17 <= len(by_words.split()) <= 37
        assert set(by_words.split()) <= set(WORDS)
        assert by_ids[:7] == ids[0].prompt[:7]
    assert min(min(ask.prompt) for ask in Requests().asks(workload, as_text=False)) >= 1000  # type: ignore[type-var]


def test_bodies() -> None:
    requests = Requests(temperature=0.5, ignore_eos=True, extra_body='{"top_k": 3, "temperature": 1}')
    body = json.loads(requests.body(Ask([1, 2], 7), "m", as_messages=False))
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    shared = {"model": "m", "max_tokens": 7, "temperature": 1, "ignore_eos": True, "top_k": 3, **stream}
    assert body == {**shared, "prompt": [1, 2]}
    body = json.loads(requests.body(Ask("hi", 7), "m", as_messages=True))
    assert body == {**shared, "messages": [{"role": "user", "content": "hi"}]}
    assert "ignore_eos" not in json.loads(Requests().body(Ask("hi", 7), "m", as_messages=False))


def test_bounds_and_percentiles_are_read() -> None:
    assert parse_goodput(["ttft:200 tpot:50", "e2el:1.5"]) == {"ttft": 0.2, "tpot": 0.05, "e2el": 0.0015}
    assert parse_goodput(["ttft:200,e2el:50"]) == {"ttft": 0.2, "e2el": 0.05}
    assert parse_goodput([]) == {}
    for refused in ("ttft", "ttft:", "ttft:x", "ttft:0", "ttft:-1", "ttft:inf", "itl:5", "ttft:1 ttft:2"):
        with pytest.raises(ConfigError, match="--goodput"):
            parse_goodput([refused])
    assert parse_percentiles("50, 99.9,100") == (50, 99.9, 100)
    for refused in ("", "p99", "0", "101", "nan", "50,,"):
        with pytest.raises(ConfigError, match="--metric-percentiles"):
            parse_percentiles(refused)


# --- the command ---


def bench(fake: FakeServer, *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command."""
    command = ["bench", "serve", "--base-url", fake.url, *map(str, arguments)]
    result = CliRunner().invoke(app, command, env={"OPENAI_API_KEY": None})
    return result.exit_code, result.stdout, result.stderr


def answering(request: Request) -> list[Step]:
    """As a server would: max_tokens tokens, two to an event."""
    if request.line.startswith("GET /v1/models "):
        return [whole("200 OK", {"object": "list", "data": [{"id": "first"}, {"id": "second"}]})]
    if request.line.startswith("GET "):
        return [whole("404 Not Found", {"detail": "Not Found"})]
    body = request.body
    prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"].split()
    count = body["max_tokens"]
    events = [text("ab") for _ in range(0, count, 2)]
    return [STREAM, *map(chunk, events), chunk(usage(len(prompt), count)), chunk(DONE) + END]


def test_command(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    sizes = ("--num-prompts", 6, "--input-len", 20, "--output-len", 4, "--prefix-len", 30, "--warmup", 1)
    with serving(answering) as fake:
        status, out, _ = bench(
            fake, *sizes, "--goodput", "ttft:60000", "--json", file, "--max-concurrency", 2, "--ignore-eos"
        )
    assert status == 0
    assert f"first at {fake.url}/v1/completions: 6 requests, all at once, at most 2 at a time" in out
    assert "300 tokens in, 24 out" in out
    assert re.search(r"^goodput +\d.* requests/s, 100% of them, with TTFT ≤ 60000 ms$", out, re.MULTILINE)
    assert re.search(r"^ms +mean +median +p90 +p99$", out, re.MULTILINE)
    for row in ("TTFT", "TPOT", "ITL", "E2EL", r"generator +[\d.]+ s of CPU, [\d.]+% of a core$"):
        assert re.search(rf"^{row}", out, re.MULTILINE)
    warm, *posts = fake.posts
    assert (len(warm["prompt"]), warm["max_tokens"]) == (64, 8)
    assert [(len(post["prompt"]), post["max_tokens"], post["ignore_eos"]) for post in posts] == [
        (50, 4, True)
    ] * 6
    assert len({tuple(post["prompt"][:30]) for post in posts}) == 1
    assert fake.connections <= 3  # the one that lists models, and two at a time
    record = json.loads(file.read_text())
    found = record["figures"]
    assert (found["completed"], found["failed"], found["peak_concurrency"]) == (6, 0, 2)
    assert found["output_tok_s"] == found["output_tokens"] / found["seconds"]
    assert found["generator_cpu_share"] == found["generator_cpu_s"] / found["seconds"] > 0
    assert record["load"] == {"request_rate": None, "burstiness": 1.0, "max_concurrency": 2}
    assert [request["output_tokens"] for request in record["requests"]] == [4] * 6


def test_command_with_messages_from_a_file_in_time(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a b c", "max_tokens": 2}\n{"prompt": "d"}\n')
    with serving(answering) as fake:
        status, out, err = bench(
            fake, "--endpoint", "/v1/chat/completions", "--dataset", prompts, "--output-len", 3,
            "--model", "x", "--request-rate", 20, "--warmup", 0, "--json", "-", "--metric-percentiles", 50,
        )  # fmt: skip
    assert status == 0
    assert [(post["messages"][0]["content"], post["max_tokens"]) for post in fake.posts] == [
        ("a b c", 2),
        ("d", 3),
    ]
    assert {post["model"] for post in fake.posts} == {"x"}
    record = json.loads(out)
    first, second = record["requests"]
    assert (first["prompt_tokens"], second["prompt_tokens"]) == (3, 1)
    due = Load(request_rate=20).arrivals(2, seed=0)[1]
    assert second["due_s"] == pytest.approx(due)
    assert second["sent_s"] >= second["due_s"]
    assert record["figures"]["ttft_p50_s"] == record["figures"]["ttft_median_s"]
    assert "20/s" in err


def test_command_at_a_server_that_fails_at_times() -> None:
    seen = 0

    def steps(request: Request) -> list[Step]:
        nonlocal seen
        seen += request.body is not None
        return [BUSY] if request.body and seen % 3 == 0 else answering(request)

    with serving(steps) as fake:
        sizes = ("--num-prompts", 9, "--input-len", 2, "--output-len", 1, "--max-concurrency", 1)
        status, out, _ = bench(fake, *sizes, "--warmup", 0, "--goodput", "ttft:60000")
    assert status == 0
    assert re.search(r"^HTTP 429 +3  come back$", out, re.MULTILINE)
    assert re.search(r"^completed +6$", out, re.MULTILINE)
    assert "67% of them" in out
    assert "ITL" not in out  # no answer has two events


def test_command_at_a_server_that_only_fails(tmp_path: Path) -> None:
    def steps(request: Request) -> list[Step]:
        return answering(request) if request.body is None else [BROKEN]

    file = tmp_path / "figures.json"
    with serving(steps) as fake:
        status, out, err = bench(fake, "--num-prompts", 3)
        assert (status, out) == (1, "")
        assert f"{fake.url}/v1/completions does not answer. HTTP 500: o" in err
        status, out, err = bench(fake, "--num-prompts", 3, "--warmup", 0, "--json", file)
        assert status == 1
        assert "None of 3 requests" in err
        assert re.search(r"^HTTP 500 +3", out, re.MULTILINE)
        assert json.loads(file.read_text())["errors"]["HTTP 500"]["count"] == 3


def test_command_at_a_server_that_does_not_count() -> None:
    def steps(request: Request) -> list[Step]:
        return [
            step for step in answering(request) if not (isinstance(step, bytes) and b'"total_tokens"' in step)
        ]

    with serving(steps) as fake:
        status, out, _ = bench(fake, "--num-prompts", 2, "--input-len", 9, "--output-len", 6, "--warmup", 0)
    assert status == 0
    assert "18 tokens in, 6 out" in out
    assert "an event is taken for one" in out


def test_command_over_a_socket(tmp_path: Path) -> None:
    with serving(answering, tmp_path / "socket") as fake:
        status, out, _ = bench(fake, "--num-prompts", 2, "--output-len", 2)
    assert status == 0
    assert "first at unix:" in out


def test_command_where_nothing_is(tmp_path: Path) -> None:
    with serving(answering) as fake:
        pass
    status, out, err = bench(fake)
    assert (status, out) == (1, "")
    assert "refused" in err
    assert "hexad serve" in err
    fake.url = f"unix:{tmp_path}/nothing"
    assert "No such file" in bench(fake)[2]


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ([whole("401 Unauthorized", {"error": {"message": "which key?"}})], "HTTP 401: which key?"),
        ([whole("200 OK", {"data": []})], "lists no model; give --model"),
        ([whole("200 OK", ["odd"])], "lists no model; give --model"),
        ([30.0], "does not answer within 0.05 s"),
    ],
)
def test_command_without_a_list_of_models(listed: list[Step], words: str) -> None:
    with serving(lambda request: listed) as fake:
        status, out, err = bench(fake, "--timeout", 0.05)
    assert (status, out) == (1, "")
    assert words in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--request-rate", 0],
        ["--request-rate", "nan"],
        ["--burstiness", 0],
        ["--burstiness", "inf"],
        ["--endpoint", "completions"],
        ["--extra-body", "{"],
        ["--extra-body", "[]"],
        ["--goodput", "itl:3"],
        ["--metric-percentiles", "p99"],
        ["--api-key", "a b"],
        ["--dataset", "nothing"],
        ["--json", "no/folder/figures.json"],
    ],
)
def test_refusals(arguments: list[object]) -> None:
    with serving(answering) as fake:
        status, out, err = bench(fake, *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    words: Any = {"--dataset": "cannot be read", "--json": "there is no folder"}
    assert words.get(arguments[0], arguments[0]) in err
    assert not fake.posts


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "figures.png"
    with serving(answering) as fake:
        assert bench(fake, "--num-prompts", 4, "--output-len", 5, "--plot", file)[0] == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    from hexad.cli.bench_plot import plot_arrivals

    # All at one time, and answers without text.
    plot_arrivals([(0.0, 3.0)], [0.0], [0.0, 0.0], "title", "subtitle", tmp_path / "one.svg")
    assert (tmp_path / "one.svg").read_text().count("median") == 2
    plot_arrivals([], [0.5], [], "title", "subtitle", tmp_path / "none.svg")


def test_a_load_brings_in_nothing_heavy() -> None:
    """The generator shares a machine with what it measures."""
    import subprocess

    program = (
        "import sys, hexad.cli.bench_serve; print('numpy' in sys.modules, 'hexad._native' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_targets() -> None:
    shown = Target(base_url="http://host:1/v1/", endpoint="/v1/chat/completions")
    assert str(shown) == "http://host:1/v1/chat/completions"
    assert shown.takes_messages
    assert not Target(base_url="http://host:1", endpoint="/v1/completions").takes_messages
