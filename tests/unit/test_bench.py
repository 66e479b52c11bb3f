"""`hexad bench`: workloads, figures of a run written down by hand, limits; commands on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.character_tokenizer import VOCAB, CharacterTokenizer
from tests.tiny_models import tiny_llama
from typer.testing import CliRunner

from hexad.checkpoint.checkpoint import Checkpoint
from hexad.cli import app
from hexad.cli.bench_run import (
    Run,
    Spread,
    Step,
    Work,
    decode_work,
    figures,
    latencies,
    prefill_work,
    work,
)
from hexad.cli.bench_workload import Job, Workload, read_dataset
from hexad.errors import ConfigError
from hexad.graph.cost import FLOAT_SHARE, StepNumbers

CONTEXT = 256


TOKENIZER: Any = CharacterTokenizer()


# --- workloads ---


def test_lengths_are_fixed_or_drawn_from_the_whole_range() -> None:
    fixed = Workload(num_prompts=5, input_len=40, output_len=9).jobs(TOKENIZER)
    assert [(len(ids), out) for ids, out in fixed] == [(40, 9)] * 5
    drawn = Workload(num_prompts=500, input_len=40, output_len=10, range_ratio=0.25).jobs(TOKENIZER)
    assert {len(job.token_ids) for job in drawn} == set(range(30, 51))
    assert {job.output_len for job in drawn} == set(range(7, 14))
    least = Workload(num_prompts=500, input_len=2, output_len=1, range_ratio=1).jobs(TOKENIZER)
    assert {len(job.token_ids) for job in least} == {1, 2, 3, 4}
    assert {job.output_len for job in least} == {1, 2}


def test_a_seed_makes_the_workload_and_tokens_are_ordinary_ones() -> None:
    one, again, other = (Workload(range_ratio=0.5, seed=seed).jobs(TOKENIZER) for seed in (1, 1, 2))
    assert one == again != other
    assert len(one) == 64
    assert {token_id for job in one for token_id in job.token_ids} == set(range(3, VOCAB - 1))


def test_prompts_share_a_prefix_and_nothing_more() -> None:
    jobs = Workload(num_prompts=20, input_len=30, prefix_len=50).jobs(TOKENIZER)
    assert {len(job.token_ids) for job in jobs} == {80}
    assert len({tuple(job.token_ids[:50]) for job in jobs}) == 1
    assert len({tuple(job.token_ids[50:60]) for job in jobs}) == 20


def test_datasets_of_text_and_of_json(tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_text("one\n\n  two  \n[3]\n", encoding="utf-8")
    read = read_dataset(file, TOKENIZER, 7, None)
    assert [("".join(map(chr, ids)), out) for ids, out in read] == [("one", 7), ("two", 7), ("[3]", 7)]
    entries = [{"prompt": "a b", "max_tokens": 3}, {"prompt": "c", "output_len": 5}, {"prompt": "d"}]
    file.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    read = read_dataset(file, TOKENIZER, 7, None)
    assert [("".join(map(chr, ids)), out) for ids, out in read] == [("a b", 3), ("c", 5), ("d", 7)]
    assert read_dataset(file, TOKENIZER, 7, 2) == read[:2]


@pytest.mark.parametrize(
    ("text", "num_prompts", "words"),
    [
        (b"", None, "no prompts"),
        (b"\n \n", None, "no prompts"),
        (b"one\ntwo", 3, "2 prompts; --num-prompts asks for 3"),
        (b"\xff", None, "not UTF-8"),
        (b'{"prompt": "a"}\ntwo', None, "line 2"),
        (b'{"prompt": "a"}\n\n{"text": "b"}', None, "line 3"),
        (b'{"prompt": ["a"]}', None, "line 1"),
        (b'{"prompt": "a", "max_tokens": 0}', None, "max_tokens must be a positive integer, not 0"),
        (b'{"prompt": "a", "output_len": true}', None, "output_len must be a positive integer, not True"),
    ],
)
def test_datasets_that_are_refused(tmp_path: Path, text: bytes, num_prompts: int | None, words: str) -> None:
    file = tmp_path / "prompts"
    file.write_bytes(text)
    with pytest.raises(ConfigError, match=words):
        read_dataset(file, TOKENIZER, 7, num_prompts)


def test_a_dataset_excludes_random_lengths(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_dataset(tmp_path / "nothing", TOKENIZER, 7, None)
    options: list[dict[str, Any]] = [{"input_len": 5}, {"range_ratio": 0.1}, {"prefix_len": 1}]
    for option in options:
        with pytest.raises(ConfigError, match="lengths of their own"):
            Workload(dataset=tmp_path, **option)


# --- figures ---

# Two jobs: the first's tokens come at 1, 2 and 4 s, the second's at 2 s.
DONE = Run(
    jobs=[Job([5] * 40, 3), Job([6] * 50, 1)],
    steps=[Step(1.0, 60, 1), Step(2.0, 31, 2), Step(4.0, 1, 1)],
    token_times=[[1.0, 2.0, 4.0], [2.0]],
    cached=[0, 32],
    preemptions=1,
)


def test_figures() -> None:
    assert latencies([DONE]) == {
        "ttft": [1.0, 2.0],
        "tpot": [1.5],  # a single token has no time after the first
        "itl": [1.0, 2.0],
        "e2e": [4.0, 2.0],
    }
    found = figures([DONE, DONE])
    expected = {
        "seconds": 8.0,
        "requests": 4,
        "prompt_tokens": 180,
        "output_tokens": 8,
        "cached_tokens": 64,
        "preemptions": 2,
        "steps": 6,
        "requests_per_s": 0.5,
        "output_tok_s": 1.0,
        "total_tok_s": 23.5,
        "ttft_mean_s": 1.5,
        "ttft_median_s": 1.5,
        "e2e_p99_s": 4.0,
        "tpot_median_s": 1.5,
    }
    assert {name: found[name] for name in expected} == expected
    single = Run([Job([5], 1)], [Step(1.0, 1, 1)], [[1.0]], [0], 0)
    assert not [name for name in figures([single]) if name.startswith(("tpot", "itl"))]


def test_spreads() -> None:
    assert Spread.of([3.0]) == (3.0, 3.0, 3.0)
    mean, median, p99 = Spread.of(range(100, -1, -1))
    assert (mean, median) == (50.0, 50.0)
    assert p99 == pytest.approx(99.0)
    assert Spread.of([0.0, 10.0]).p99 == pytest.approx(9.9)


def test_the_work_of_a_run_counts_each_position() -> None:
    lookups = [[p + 1 for p in range(42)], [p + 1 for p in range(32, 50)]]
    streams = [41, 42]  # positions that the first job's second and third token look back on
    needed = work(DONE, max_num_seqs=2, max_num_batched_tokens=64)
    assert needed == Work(3, 60, 4, sum(map(sum, lookups)), sum(streams))
    assert work(DONE, max_num_seqs=1, max_num_batched_tokens=64).steps == 4
    assert work(DONE, max_num_seqs=2, max_num_batched_tokens=10).steps == 6


def test_what_is_shared_need_be_read_only_once() -> None:
    done = Run([Job([5] * 40, 3)], DONE.steps, DONE.token_times, [32], 0)
    assert work(done, max_num_seqs=2, max_num_batched_tokens=64).positions == 41 + 42 - 2 * 32


def test_the_work_of_prefill_and_decode_is_that_of_the_run() -> None:
    jobs = [Job([5] * 40, 3), Job([6] * 50, 3)]
    whole = work(Run(jobs, [], [], [0, 0], 0), max_num_seqs=2, max_num_batched_tokens=64)
    prefill, decode = prefill_work(jobs, max_num_batched_tokens=64), decode_work(jobs)
    assert (prefill.steps, decode.steps) == (2, 2)
    for field in ("tokens", "draws", "pairs", "positions"):
        assert getattr(prefill, field) + getattr(decode, field) == getattr(whole, field)


def test_the_limit_is_the_slower_of_memory_and_arithmetic() -> None:
    cost = StepNumbers(step_bytes=100, token_macs=10, draw_macs=5, pair_macs=2, position_bytes=3)
    needed = Work(steps=4, tokens=7, draws=3, pairs=11, positions=13)
    moved, macs = 4 * 100 + 13 * 3, 7 * 10 + 3 * 5 + FLOAT_SHARE * 11 * 2
    assert needed.seconds(cost, bandwidth=1.0, int8_rate=1e9) == moved
    assert needed.seconds(cost, bandwidth=1e9, int8_rate=1.0) == macs


# --- commands on a tiny model ---


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model "tiny" is a random one, whose tokens are characters."""

    def open_checkpoint(path: Path) -> Checkpoint:
        model = tiny_llama(vocab=VOCAB, context=CONTEXT)
        return Checkpoint(path, model.config, model.weights, lambda: TOKENIZER, lambda: None)

    monkeypatch.setattr("hexad.checkpoint.store.resolve", Path)
    monkeypatch.setattr("hexad.checkpoint.open.open_checkpoint", open_checkpoint)


def bench(*arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    command, *rest = map(str, arguments)
    result = CliRunner().invoke(app, ["bench", command, "tiny", *rest])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.usefixtures("tiny")
class TestTiny:
    def test_throughput(self, tmp_path: Path) -> None:
        file = tmp_path / "figures.json"
        sizes = ("--num-prompts", 6, "--input-len", 20, "--output-len", 5, "--random-range-ratio", 0.5)
        status, out, _ = bench("throughput", *sizes, "--prefix-len", 64, "--max-num-seqs", 2, "--json", file)
        assert status == 0
        assert "6 requests" in out
        record = json.loads(file.read_text())
        found, requests = record["figures"], record["requests"]
        assert found["requests"] == len(requests) == 6
        for name, total in (("prompt_tokens", 6 * 74), ("output_tokens", 15), ("cached_tokens", 4 * 64)):
            assert sum(request[name] for request in requests) == found[name] >= total
        assert found["output_tok_s"] == found["output_tokens"] / found["seconds"]
        assert 0 < found["ttft_median_s"] <= found["e2e_median_s"] <= found["seconds"]
        share = found["output_tok_s"] / found["limit_output_tok_s"]  # the same but for rounding
        assert 0 < found["limit_fraction"] == pytest.approx(share, rel=1e-12)
        assert record["settings"]["max_num_seqs"] == 2
        assert record["workload"]["seed"] == 0
        assert {"cpu", "threads", "isa", "bandwidth_bytes_s"} <= record["machine"].keys()
        assert "hexad" in record["versions"]

    def test_json_on_stdout_is_alone_there(self, tmp_path: Path) -> None:
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text('{"prompt": "abc", "max_tokens": 2}\n{"prompt": "defg"}\n')
        status, out, err = bench("throughput", "--dataset", prompts, "--output-len", 4, "--json", "-")
        assert status == 0
        assert [(r["prompt_tokens"], r["output_tokens"]) for r in json.loads(out)["requests"]] == [
            (3, 2),
            (4, 4),
        ]
        assert "requests/s" in err

    def test_without_prefix_cache(self) -> None:
        sizes = ("--num-prompts", 3, "--prefix-len", 64, "--input-len", 5, "--output-len", 2)
        status, out, _ = bench(
            "throughput", *sizes, "--max-num-seqs", 1, "--no-prefix-caching", "--json", "-"
        )
        assert status == 0
        assert json.loads(out)["figures"]["cached_tokens"] == 0

    def test_latency(self) -> None:
        sizes = ("--batch-size", 3, "--input-len", 9, "--output-len", 4, "--iters", 2, "--warmup", 1)
        status, out, _ = bench("latency", *sizes, "--json", "-")
        assert status == 0
        record = json.loads(out)
        found = record["figures"]
        assert (found["requests"], found["output_tokens"], found["cached_tokens"]) == (6, 24, 0)
        assert sum(record["batch_seconds"]) == pytest.approx(found["seconds"])
        for phase in ("prefill", "decode"):
            assert found[f"{phase}_tok_s"] > 0
            assert found[f"limit_{phase}_tok_s"] > 0
        status, out, _ = bench("latency", "--output-len", 1, "--iters", 1)
        assert (status, "prefill" in out, "decode" in out) == (0, True, False)

    def test_profile(self) -> None:
        sizes = ("--batch-size", 3, "--input-len", 9, "--output-len", 4, "--iters", 2, "--warmup", 1)
        status, out, err = bench("latency", *sizes, "--json", "-", "--profile")
        assert status == 0
        record = json.loads(out)
        prefill, decode = record["profile"]
        assert (prefill["phase"], decode["phase"]) == ("prefill", "decode")
        assert (prefill["steps"], decode["steps"]) == (2 * 1, 2 * 3)
        whole = sum(record["batch_seconds"])
        assert prefill["seconds"] + decode["seconds"] == pytest.approx(whole)
        names = [
            "embed F32", "q+k+v F32", "attention", "o F32", "gate+up F32", "down F32", "take_rows",
            "logits F32", "rope table", "sampling", "begin and end of calls", "Python between calls",
        ]  # fmt: skip
        for phase in (prefill, decode):
            parts = {part["name"]: part for part in phase["parts"]}
            assert list(parts) == names
            assert sum(part["seconds"] for part in parts.values()) == pytest.approx(phase["seconds"])
            assert all(part["seconds"] >= part["waited_seconds"] >= 0 for part in parts.values())
            assert parts["q+k+v F32"]["runs"] == 2 * phase["steps"]  # layers
            assert parts["sampling"]["runs"] == phase["steps"]
            assert phase["limit_seconds"] <= sum(part["limit_seconds"] for part in parts.values())
            title, *rows = err[err.index(f"\n{phase['phase']}, ") :].strip().split("\n\n")[0].splitlines()
            assert "limit %" in title
            assert [row[:32].strip() for row in rows] == [*names, "all"]
        # The figures beside the table are about the same work.
        limit = 2 * 3 * 9 / prefill["limit_seconds"]
        assert limit == pytest.approx(record["figures"]["limit_prefill_tok_s"])

    def test_profile_of_a_workload(self) -> None:
        sizes = ("--num-prompts", 3, "--input-len", 9, "--output-len", 4)
        status, out, _ = bench("throughput", *sizes, "--json", "-", "--profile")
        assert status == 0
        record = json.loads(out)
        (phase,) = record["profile"]
        assert phase["seconds"] == record["figures"]["seconds"]
        assert sum(part["seconds"] for part in phase["parts"]) == pytest.approx(phase["seconds"])
        assert phase["limit_seconds"] / phase["seconds"] == pytest.approx(record["figures"]["limit_fraction"])
        assert json.loads(bench("throughput", *sizes, "--json", "-")[1])["profile"] == []

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["throughput", "--input-len", 200, "--output-len", 57], "257 in all; the context is 256"),
            (["latency", "--input-len", 200, "--output-len", 57], "257 in all; the context is 256"),
            (["latency", "--input-len", 200, "--batch-size", 5, "--output-len", 50, "--kv-cache-gib", 0.0002],
             "blocks to run all at once"),
            (["throughput", "--dataset", "nothing"], "cannot be read"),
            (["throughput", "--json", "no/folder/figures.json"], "there is no folder"),
            (["throughput", "--max-num-seqs", 0], "max_num_seqs"),
            (["throughput", "--max-num-seqs", 600, "--max-num-batched-tokens", 64], "max_num_batched_tokens"),
        ],
    )  # fmt: skip
    def test_refusals(self, arguments: list[object], words: str) -> None:
        status, out, err = bench(*arguments)
        assert (status, out) == (1, "")
        assert err.startswith("error: ")
        assert words in err

    def test_a_failing_step_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*arguments: object) -> None:
            raise RuntimeError("out of luck")

        monkeypatch.setattr("hexad.runner.model_runner.ModelRunner.execute", fail)
        status, _, err = bench("throughput", "--num-prompts", 1, "--input-len", 5, "--output-len", 2)
        assert status == 1
        assert "out of luck" in err

    @pytest.mark.parametrize("command", ["throughput", "latency"])
    def test_plot(self, command: str, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        file = tmp_path / "figures.png"
        sizes = ("--input-len", 5, "--output-len", 4)
        assert bench(command, *sizes, "--plot", file)[0] == 0
        assert file.read_bytes().startswith(b"\x89PNG")
        status, _, err = bench(command, *sizes, "--plot", tmp_path / "figures.nonsense")
        assert (status, "must end in one of" in err) == (1, True)

    def test_plot_without_matplotlib(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        status, _, err = bench("throughput", "--plot", "figures.png")
        assert (status, "hexad[plot]" in err) == (1, True)


def test_the_spread_of_bins_keeps_the_amount() -> None:
    from hexad.cli.bench_plot import BINS, _spread

    bins = [0.0] * BINS
    _spread(bins, 0.5, 2.5, 4.0)
    assert bins[:4] == [1.0, 2.0, 1.0, 0.0]
    _spread(bins, BINS - 0.5, BINS, 3.0)
    assert (bins[-1], sum(bins)) == (3.0, 7.0)
