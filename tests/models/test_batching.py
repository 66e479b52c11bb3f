"""Batching changes nothing: requests that come and go beside each other get what each of them gets alone.

Bit by bit: token ids, texts and logprobs, for every budget of tokens, with and without the prefix cache, and
where the KV cache is so small that sequences lose their blocks and are computed again. No tolerance anywhere
in this file.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from hexad import LLM, SamplingParams
from hexad.config import BLOCK_TOKENS
from hexad.engine.pace import Pace
from hexad.engine.request import Request
from hexad.outputs import RequestOutput

MAX_MODEL_LEN = 192
NUM_REQUESTS = 64

STEM = (
    "The lighthouse keeper counted the ships that went by, one after the other, and wrote each of them down. "
)
BEGINNINGS = ["Once upon a time", "def main():\n", "Dear Sir or Madam,", "Naïve café 日本語 🙂", "1, 2, 3,"]


@dataclass
class Case:
    """A request, and after how many tokens it is cancelled, if it is."""

    prompt: list[int]
    params: SamplingParams
    cancel_after: int | None = None
    priority: int = 0


def make_cases(llm: LLM) -> list[Case]:
    """Mixed lengths, a third with a beginning in common; each kind of sampling beside each other."""
    rng = random.Random(3)
    tokenizer = llm.get_tokenizer()
    stem, beginnings = tokenizer.encode(STEM * 3), [tokenizer.encode(text) for text in BEGINNINGS]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
        {"temperature": 1.3},
        {"temperature": 0.8, "n": 4, "top_p": 0.9},
        {"temperature": 0.7, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 1.0, "logprobs": 0, "n": 2, "stop": [" the", "e"], "min_tokens": 3},
        {"temperature": 0.0, "prompt_logprobs": 1},
    ]
    cases = []
    for i in range(NUM_REQUESTS):
        prompt = rng.choice(beginnings) + [
            rng.randrange(1000, 40000) for _ in range(rng.choice([0, 1, 9, 31]))
        ]
        if i % 3 == 0:
            prompt = stem[: rng.choice([BLOCK_TOKENS, 40, 2 * BLOCK_TOKENS])] + prompt[: rng.randint(0, 9)]
        params = SamplingParams(
            seed=i, max_tokens=rng.randint(3, 12), ignore_eos=i % 2 == 0, **kinds[i % len(kinds)]
        )
        cancel = rng.randint(0, params.n * 4) if i % 7 == 5 else None
        cases.append(Case(prompt, params, cancel, priority=rng.randint(0, 2)))
    return cases


def run(llm: LLM, cases: list[Case], *, together: bool) -> list[RequestOutput]:
    """Each request alone, to its end; or all together, a few coming at a time and some cancelled midway."""
    engine, rng = llm.engine, random.Random(9)
    waiting = list(enumerate(cases))
    requests: dict[int, Request] = {}
    while waiting or engine.has_unfinished:
        alone = not together and not engine.has_unfinished
        for _ in range(rng.choice([0, 1, 2, 5]) if together else alone):
            if waiting:
                i, case = waiting.pop(0)
                requests[i] = engine.add_request(str(i), case.prompt, case.params, priority=case.priority)
        if engine.has_unfinished:
            engine.step()
        if together:
            for i, request in requests.items():
                cancel_after = cases[i].cancel_after
                if (
                    cancel_after is not None
                    and not request.finished
                    and request.num_generated >= cancel_after
                ):
                    engine.abort(str(i))
    assert engine.scheduler.blocks.num_allocated == 0
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (0, 0)
    return [requests[i].output() for i in range(len(cases))]


@pytest.fixture(scope="module")
def solo(smollm2_path: Path) -> tuple[list[Case], list[RequestOutput]]:
    """The requests, and what each of them comes to alone in an engine that keeps nothing."""
    with LLM(smollm2_path, max_model_len=MAX_MODEL_LEN, enable_prefix_caching=False, threads=2) as llm:
        cases = make_cases(llm)
        return cases, run(llm, cases, together=False)


def test_the_requests_differ(solo: tuple[list[Case], list[RequestOutput]]) -> None:
    """Else a mix-up would not show."""
    cases, outputs = solo
    results = [tuple(c.token_ids) for output in outputs for c in output.outputs if len(c.token_ids) > 2]
    assert len(results) > NUM_REQUESTS
    assert len(set(results)) > 0.9 * len(results)
    assert {c.finish_reason for output in outputs for c in output.outputs} == {"stop", "length"}
    assert sum(case.cancel_after is not None for case in cases) > 5
    assert all(len(output.outputs) == case.params.n for case, output in zip(cases, outputs, strict=True))


@pytest.mark.parametrize(
    ("budget", "caching", "settings"),
    [
        *((budget, caching, {}) for budget in (16, 64, 2048) for caching in (True, False)),
        # 8 blocks for 64 requests that want 1 to 4 each.
        (64, True, {"kv_cache_tokens": 256}),
        (2048, False, {"kv_cache_tokens": 256, "scheduling_policy": "priority"}),
    ],
)
def test_together_as_alone(
    smollm2_path: Path,
    solo: tuple[list[Case], list[RequestOutput]],
    budget: int,
    caching: bool,
    settings: dict[str, Any],
) -> None:
    cases, expected = solo
    llm = LLM(
        smollm2_path,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=budget,
        max_num_seqs=min(64, budget),
        enable_prefix_caching=caching,
        threads=2,
        **settings,
    )
    cancelled = 0
    with llm:
        outputs = run(llm, cases, together=True)
        stats = llm.engine.stats
        assert (stats.preemptions > 0) == bool(settings)
        assert (stats.prefix_hits > 0) == caching
        new_stream = llm.engine._new_stream
        for case, output, alone in zip(cases, outputs, expected, strict=True):
            if case.cancel_after is None or not any(c.finish_reason == "abort" for c in output.outputs):
                assert (output.outputs, output.prompt_logprobs) == (alone.outputs, alone.prompt_logprobs)
                continue
            cancelled += 1
            for got, whole in zip(output.outputs, alone.outputs, strict=False):
                if got.finish_reason == "abort":
                    count = len(got.token_ids)
                    stream = new_stream(case.params)
                    text = "".join([*map(stream.push, got.token_ids), stream.flush()])
                    assert (got.token_ids, got.text) == (whole.token_ids[:count], text)
                    assert got.logprobs == (None if whole.logprobs is None else whole.logprobs[:count])
                else:
                    assert got == whole
    assert cancelled > 3


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> Iterator[LLM]:
    with LLM(smollm2_path, max_model_len=1024, threads=2) as llm:
        yield llm


def test_a_shared_prefix_is_computed_once(llm: LLM) -> None:
    rng = random.Random(1)
    prefix = [rng.randrange(1000, 40000) for _ in range(512)]
    prompts = [{"prompt_token_ids": prefix + tail} for tail in ([5, 6, 7, 8], [9, 10])]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=2)
    (alone,) = llm.generate(prompts[1], params, use_tqdm=False)
    llm.reset_prefix_cache()
    first, second = (llm.generate(prompt, params, use_tqdm=False)[0] for prompt in prompts)
    assert (alone.num_cached_tokens, first.num_cached_tokens) == (0, 0)
    assert second.num_cached_tokens >= 480
    assert second.outputs == alone.outputs
    assert second.outputs[0].text != ""


def test_sequences_of_one_prompt_share_its_blocks(llm: LLM) -> None:
    prompt = [1000 + i for i in range(400)]

    def most_blocks(n: int) -> int:
        llm.reset_prefix_cache()
        llm.engine.add_request("r", prompt, SamplingParams(n=n, seed=1, max_tokens=32, ignore_eos=True))
        most = 0
        while llm.engine.has_unfinished:
            llm.engine.step()
            most = max(most, llm.engine.scheduler.blocks.num_allocated)
        return most

    assert most_blocks(4) < 1.5 * most_blocks(1)


def test_late_as_alone(
    smollm2_path: Path, solo: tuple[list[Case], list[RequestOutput]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every step that may give up prompts does so."""
    cases, expected = solo
    monkeypatch.setattr(Pace, "expected", 1e-9)
    given_up = []
    with LLM(smollm2_path, max_model_len=MAX_MODEL_LEN, max_num_batched_tokens=16, max_num_seqs=16) as llm:
        scheduler = llm.engine.scheduler
        scheduler._settling = 0
        give_up = scheduler.give_up
        monkeypatch.setattr(scheduler, "give_up", lambda step: given_up.append(step) or give_up(step))
        outputs = run(llm, [replace(case, cancel_after=None) for case in cases], together=True)
    assert len(given_up) > 5
    compared = 0
    for case, output, alone in zip(cases, outputs, expected, strict=True):
        if case.cancel_after is None:
            assert (output.outputs, output.prompt_logprobs) == (alone.outputs, alone.prompt_logprobs)
            compared += 1
    assert compared > 50
