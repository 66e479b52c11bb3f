"""Scheduler: who gets how much of a step, who waits, and who has to give way."""

from __future__ import annotations

import gc
import pickle
import random
import sys
from itertools import pairwise
from types import FrameType
from typing import Any

import pytest
from tests.fake_engine import assert_as_alone, finish, make_engine, shares

from hexad.engine.engine import Engine
from hexad.engine.pace import ATTENTION_MACS, BYTES, LEAST_TOKENS, LONGEST_STEP, MACS, STRETCH
from hexad.engine.request import Request, Status
from hexad.engine.scheduler import GIVING_UP, SETTLING
from hexad.engine.step import ScheduledStep, StepCost, StepResult
from hexad.params import PoolingParams, RequestOutputKind, SamplingParams


def add(engine: Engine, name: str, prompt: int | list[int], max_tokens: int = 50, **options: Any) -> Request:
    """A request with this prompt, or one of so many tokens; options are add_request's or the params'."""
    if isinstance(prompt, int):
        prompt = [ord(name[0]) + i % 7 for i in range(prompt)]
    arguments = {key: options.pop(key) for key in ("priority", "cache_salt", "watched") if key in options}
    params = SamplingParams(max_tokens=max_tokens, seed=options.pop("seed", 1), **options)
    return engine.add_request(name, prompt, params, **arguments)


def step(engine: Engine) -> dict[int, tuple[int, int]]:
    """Steps once: sequence id → (start, count), in scheduled order. Ids count from 0 where n is 1."""
    engine.step()
    return shares(engine.executor.steps[-1])


# Shares of the budget.


def test_a_prompt_is_cut_up_beside_running_sequences() -> None:
    engine = make_engine(max_num_seqs=4, max_num_batched_tokens=16)
    for name, length in (("a", 10), ("b", 40), ("c", 3)):
        add(engine, name, length, watched=False)
    assert step(engine) == {0: (0, 10), 1: (0, 6)}
    assert step(engine) == {0: (10, 1), 1: (6, 15)}
    assert step(engine) == {0: (11, 1), 1: (21, 15)}
    assert step(engine) == {0: (12, 1), 1: (36, 4), 2: (0, 3)}
    assert step(engine) == {0: (13, 1), 1: (40, 1), 2: (3, 1)}


@pytest.mark.parametrize("budget", [5, 16, 64])
@pytest.mark.parametrize("kv_blocks", [8, 200])
def test_no_step_exceeds_tokens_or_seats(budget: int, kv_blocks: int) -> None:
    engine, rng = (
        make_engine(max_num_seqs=5, max_num_batched_tokens=budget, kv_blocks=kv_blocks),
        random.Random(budget),
    )
    requests = []
    for i in range(40):
        prompt = [rng.randrange(3) for _ in range(rng.choice([1, 5, 32, 100]))]
        params = SamplingParams(seed=i, n=rng.choice([1, 1, 3, 9]), max_tokens=rng.randint(1, 40))
        requests.append(engine.add_request(str(i), prompt, params))
        for _ in range(rng.choice([0, 1, 7])):
            engine.step()
    finish(engine)
    for taken in engine.executor.steps:
        assert 1 <= sum(taken.counts) == len(taken.tokens) <= budget
        assert 1 <= len(taken.sequence_ids) <= 5
        assert sum(map(len, taken.draws)) <= 5
    for request in requests:
        assert_as_alone(request)
    assert max(len(taken.tokens) for taken in engine.executor.steps) == budget


def test_streams_come_before_prompts_of_higher_rank() -> None:
    engine = make_engine(max_num_seqs=4, max_num_batched_tokens=4, scheduling_policy="priority")
    add(engine, "stream", 3, priority=5)
    step(engine)
    add(engine, "prompt", 100, priority=0)
    assert step(engine) == {0: (3, 1), 1: (0, 3)}
    assert step(engine) == {0: (4, 1), 1: (3, 3)}


def test_running_sequences_come_before_waiting_ones_of_higher_rank() -> None:
    engine = make_engine(max_num_seqs=2, max_num_batched_tokens=8, scheduling_policy="priority")
    add(engine, "running", 20, priority=5)
    step(engine)
    add(engine, "waiting", 20, priority=0)
    assert step(engine) == {0: (8, 8)}
    assert step(engine) == {0: (16, 4), 1: (0, 4)}


@pytest.mark.parametrize(("policy", "order"), [("fcfs", [0, 1, 2, 3]), ("priority", [1, 3, 2, 0])])
def test_who_is_served_first(policy: str, order: list[int]) -> None:
    engine = make_engine(max_num_seqs=1, scheduling_policy=policy)
    for name, priority in zip("abcd", (9, -1, 3, -1), strict=True):
        add(engine, name, 5, 2, priority=priority)
    finish(engine)
    assert list(dict.fromkeys(i for s in engine.executor.steps for i in s.sequence_ids)) == order


# Shares of the time. Times are those that StepCost predicts on the machine that Pace guesses.


def predicted(cost: StepCost, taken: ScheduledStep, *, prompts: bool = True) -> float:
    """Seconds of a step; without its prompts, of the streams in it."""
    seconds = 0.0
    streams = [
        start
        for start, count, draws in zip(taken.starts, taken.counts, taken.draws, strict=True)
        if count == 1 and draws
    ]
    if streams:
        moved = cost.step_bytes + sum(streams) * cost.position_bytes
        seconds = moved / BYTES + len(streams) * (cost.token_macs + cost.draw_macs) / MACS
    if prompts:
        for start, count in zip(taken.starts, taken.counts, strict=True):
            if count > 1:
                pairs = count * (start + count / 2)
                seconds += count * cost.token_macs / MACS + pairs * cost.pair_macs / ATTENTION_MACS
                seconds += start * cost.position_bytes / BYTES
    return seconds


@pytest.mark.parametrize("max_step_ms", [None, 100, 300])
def test_prompts_do_not_make_streams_stutter(max_step_ms: float | None) -> None:
    engine = make_engine(
        max_step_ms=max_step_ms,
        max_model_len=4096,
        kv_blocks=300,
        max_num_batched_tokens=4096,
        max_num_seqs=20,
    )
    cost = engine.executor.step_cost
    for i in range(10):
        add(engine, f"{i}", 9, 999)
    for _ in range(1 + SETTLING):
        step(engine)
    before = predicted(cost, engine.executor.steps[-1], prompts=False)
    add(engine, "prompt", 2000, 9)
    chunks = []
    while (taken := step(engine)).get(10, (0, 2))[1] > 1:
        chunks.append(taken[10][1])
        whole = predicted(cost, engine.executor.steps[-1], prompts=True)
        bound = STRETCH * before if max_step_ms is None else max_step_ms / 1000
        assert whole <= bound or chunks[-1] == LEAST_TOKENS
        if sum(chunks) < 2000:  # and no token less than fits
            assert whole > bound - 2 * (cost.token_macs / MACS + 2000 * cost.pair_macs / ATTENTION_MACS)
    assert sum(chunks) == 2000
    assert len(chunks) > 5
    assert chunks[-2] < chunks[0]  # later tokens look at more


@pytest.mark.parametrize("late", [False, True])
def test_prompts_given_up_are_computed_later(late: bool) -> None:
    engine = make_engine(max_model_len=4096, kv_blocks=300, max_num_seqs=20)
    executor, cost = engine.executor, engine.executor.step_cost
    requests = [add(engine, f"{i}", 9, 300, seed=i) for i in range(4)]
    for _ in range(1 + SETTLING):
        step(engine)
    executor.late = late
    requests += [add(engine, name, 700, 9, seed=9) for name in "ab"]
    computed = {4: 0, 5: 0}
    given_up = []
    while len(executor.steps) < 200:
        step(engine)
        taken = executor.steps[-1]
        if taken.optional:
            prompts = [i for i, (start, _) in shares(taken).items() if i in computed and start < 700]
            assert taken.sequence_ids[-taken.optional :] == prompts
            assert taken.expected == pytest.approx(predicted(cost, taken))
            given_up += [len(executor.steps)] * late
        for i, (start, count) in shares(taken).items():
            if i in computed and start < 700:
                assert start == computed[i], "nothing is left out"
                computed[i] += 0 if taken.optional and late else count
    assert computed == {4: 700, 5: 700}
    assert all(b - a == GIVING_UP for a, b in pairwise(given_up[:3]))
    assert len(given_up) > 3 if late else not given_up
    finish(engine)
    for request in requests:
        assert_as_alone(request)


def test_what_completes_a_prompt_or_nobody_watches_is_not_given_up() -> None:
    engine = make_engine(max_num_seqs=20)
    engine.executor.late = True
    add(engine, "stream", 9, 100)
    add(engine, "other", 9, 100, watched=False)
    for _ in range(1 + SETTLING):
        step(engine)
    add(engine, "prompt", 5, 9)
    assert step(engine)[2] == (0, 5)
    assert not engine.executor.steps[-1].optional
    engine.abort("stream")
    add(engine, "long", 200, 9)
    step(engine)
    assert not engine.executor.steps[-1].optional
    finish(engine)


def test_prompts_share_the_time_of_a_step() -> None:
    engine = make_engine(max_step_ms=100)
    add(engine, "stream", 9, 200)
    step(engine)
    for name in "abc":
        add(engine, name, 40, 9)
    assert list(step(engine).values())[:3] == [(9, 1), (0, 40), (0, 40)]
    assert predicted(engine.executor.step_cost, engine.executor.steps[-1]) <= 0.1


def test_prompts_get_on_however_little_time_there_is() -> None:
    engine = make_engine(max_step_ms=0.001, max_num_seqs=20)
    add(engine, "stream", 9, 200)
    step(engine)
    add(engine, "prompt", 100, 9)
    add(engine, "next", 100, 9)
    least = LEAST_TOKENS
    assert [step(engine)[1] for _ in range(24)] == [(least * i, least) for i in range(24)]
    # Once the first has had its least, the next waits for a step of its own.
    assert step(engine) == {0: (33, 1), 1: (96, 4)}
    assert step(engine) == {0: (34, 1), 1: (100, 1), 2: (0, LEAST_TOKENS)}


def test_time_overdrawn_by_one_prompt_leaves_none_for_the_next() -> None:
    """The last tokens of a long prompt take more time than there is, because they come in any case."""
    cost = StepCost(1000, 1000, 1000, 100_000, 1000)
    engine = make_engine(
        cost=cost,
        max_step_ms=0.001,
        max_model_len=4096,
        kv_blocks=300,
        max_num_batched_tokens=4096,
        max_num_seqs=4,
    )
    add(engine, "stream", 9, 999)
    step(engine)
    requests = [add(engine, "long", 1001, 3), add(engine, "short", 50, 3)]
    while not all(request.finished for request in requests):
        engine.step()
    for request in requests:
        assert_as_alone(request)


def test_no_step_takes_more_than_a_second() -> None:
    engine = make_engine(max_model_len=8192, kv_blocks=600, max_num_batched_tokens=8192)
    add(engine, "prompt", 5000, 1, watched=False)
    finish(engine)
    times = [predicted(engine.executor.step_cost, taken) for taken in engine.executor.steps]
    assert max(times) <= LONGEST_STEP
    assert sum(times) / len(times) > 0.8 * LONGEST_STEP
    assert min(times) > 0.6 * LONGEST_STEP  # pieces are about equal: no small one is left over


@pytest.mark.parametrize("unwatched", [{"watched": False}, {"output_kind": RequestOutputKind.FINAL_ONLY}])
def test_streams_that_nobody_watches_hold_up_no_prompt(unwatched: dict[str, Any]) -> None:
    engine = make_engine(max_step_ms=0.001)
    add(engine, "stream", 9, 99, **unwatched)
    step(engine)
    add(engine, "prompt", 200, 9)  # watched itself, but it has no tokens yet
    assert step(engine) == {0: (9, 1), 1: (0, 200)}
    add(engine, "next", 200, 9)
    assert step(engine)[2] == (0, LEAST_TOKENS)  # beside the one that is watched


def test_requests_that_come_together_begin_together() -> None:
    """A stream that has only just begun holds up no prompt."""
    engine = make_engine(max_num_batched_tokens=64)
    for name in "abcd":
        add(engine, name, 40, 99)
    step(engine)
    assert step(engine) == {0: (40, 1), 1: (24, 16), 2: (0, 40), 3: (0, 7)}
    while engine.requests["a"].num_generated <= SETTLING:
        step(engine)
    add(engine, "late", 40, 99)
    assert 0 < step(engine)[4][1] < 40


def test_a_bound_that_was_asked_for_holds_from_the_first_token() -> None:
    engine = make_engine(max_step_ms=0.001)
    for name in "ab":
        add(engine, name, 40, 99)
        step(engine)
    assert step(engine)[1] == (LEAST_TOKENS, LEAST_TOKENS)


# Room for blocks.


def test_waits_for_room_for_all_its_tokens_and_is_not_overtaken() -> None:
    engine = make_engine(kv_blocks=4, max_num_batched_tokens=64, max_model_len=128)
    add(engine, "a", 40, 5)  # 2 blocks
    add(engine, "b", 70, 5)  # 3
    add(engine, "c", 1, 5)
    for _ in range(5):
        assert step(engine).keys() == {0}
        assert engine.scheduler.num_waiting == 2
    assert step(engine)[1] == (0, 64)


@pytest.mark.parametrize(("policy", "victim"), [("fcfs", 2), ("priority", 0)])
def test_the_last_in_rank_gives_way_and_comes_to_the_same_end(policy: str, victim: int) -> None:
    """Three sequences of up to 3 blocks each, in 6."""
    engine = make_engine(kv_blocks=6, max_model_len=96, scheduling_policy=policy, enable_prefix_caching=False)
    requests = [add(engine, name, 30, 60, priority=-i) for i, name in enumerate("abc")]
    while not engine.scheduler.num_preemptions:
        engine.step()
    assert [r.sequences[0].status for r in requests].count(Status.WAITING) == 1
    assert requests[victim].sequences[0].status is Status.WAITING
    assert requests[victim].metrics.num_preemptions == 1
    finish(engine)
    assert engine.stats.preemptions == engine.scheduler.num_preemptions >= 1
    assert sum(r.metrics.num_preemptions for r in requests) == engine.stats.preemptions
    first = min(requests, key=lambda r: r.rank)
    assert first.metrics.num_preemptions == 0
    for request in requests:
        assert_as_alone(request)


def test_prompts_that_hold_each_others_last_blocks_get_on() -> None:
    engine = make_engine(kv_blocks=8, max_model_len=256, max_num_batched_tokens=64, max_num_seqs=8)
    requests = [add(engine, name, 100, 150) for name in "abcdef"]
    finish(engine)
    assert engine.stats.preemptions > 0
    for request in requests:
        assert_as_alone(request)


def test_a_cancelled_waiting_request_is_passed_over() -> None:
    engine = make_engine(max_num_seqs=1)
    for name in "abcd":
        add(engine, name, 5, 3)
    step(engine)
    assert engine.scheduler.num_waiting == 3
    for name in "cb":
        assert engine.abort(name).finished
    assert engine.scheduler.num_waiting == 1
    finish(engine)
    assert {i for taken in engine.executor.steps for i in taken.sequence_ids} == {0, 3}


def lines_run(engine: Engine, steps: int) -> int:
    """Lines of Python that so many steps run."""
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    gc.collect()  # what other tests left behind may run lines of its own when it goes
    gc.disable()
    sys.settrace(trace)
    try:
        for _ in range(steps):
            engine.step()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


@pytest.mark.parametrize("blocked", [False, True])
def test_waiting_requests_cost_nothing(blocked: bool) -> None:
    """Steps beside 10,000 of them run as many lines of Python as beside 10, whatever they wait for."""

    def lines(waiting: int) -> int:
        engine = make_engine(max_num_seqs=64 if blocked else 4, kv_blocks=9)
        for name in "abcd":
            add(engine, name, 33, 30)  # 2 blocks each
        step(engine)
        for i in range(waiting):
            add(engine, f"{i}", 33, 30)
        assert engine.scheduler.num_waiting == waiting
        return lines_run(engine, 10)

    assert lines(10_000) == lines(10) > 100


# Several sequences of one prompt.


def most_blocks(engine: Engine) -> int:
    most = 0
    while engine.has_unfinished:
        engine.step()
        most = max(most, engine.blocks.num_allocated)
    return most


def test_sequences_of_one_prompt_share_its_blocks() -> None:
    taken = []
    for n in (1, 4):
        engine = make_engine(max_model_len=512, kv_blocks=100)
        request = add(engine, "r", 400, 32, n=n)
        taken.append(most_blocks(engine))
        assert_as_alone(request)
    # 12 full blocks are common; each has the rest of the prompt's 13th, and a 14th, for itself.
    assert taken == [14, 12 + 4 * 2]
    assert taken[1] < 1.5 * taken[0]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("prompt", [1, 31, 32, 33, 64])
@pytest.mark.parametrize("max_tokens", [1, 2, 40])
def test_more_sequences_than_seats(prompt: int, max_tokens: int, caching: bool) -> None:
    """With one token each, all but the first have no sibling left to take the prompt from."""
    engine = make_engine(max_num_seqs=3, max_num_batched_tokens=16, enable_prefix_caching=caching)
    requests = [add(engine, name, prompt, max_tokens, n=10) for name in "ab"]
    engine.step()
    assert len(requests[0].sequences) <= 4  # the rest take no memory yet
    finish(engine)
    for request in requests:
        assert_as_alone(request)


def test_sequences_start_from_a_prompt_that_is_computed_once() -> None:
    engine = make_engine(max_num_seqs=8, max_num_batched_tokens=512)
    add(engine, "r", 100, 5, n=8)
    finish(engine)
    assert sum(sum(taken.counts) for taken in engine.executor.steps) == 100 + 8 * 4


def test_a_sequence_that_starts_late_shares_too() -> None:
    """It computes the last token of the prompt once more, for its logits."""
    engine = make_engine(max_num_seqs=3, enable_prefix_caching=False)
    add(engine, "short", 1, 3, watched=False)
    request = add(engine, "r", 100, 20, n=3, watched=False)
    finish(engine)
    assert_as_alone(request)
    assert sum(len(taken.tokens) for taken in engine.executor.steps) == 3 + (100 + 3 * 19) + 1


def test_sequences_that_give_way_share_again() -> None:
    engine = make_engine(kv_blocks=8, max_model_len=200, max_num_batched_tokens=64)
    requests = [add(engine, "a", 70, 90, n=4), add(engine, "b", 20, 90, n=3)]
    finish(engine)
    assert engine.stats.preemptions > 0
    for request in requests:
        assert_as_alone(request)


# The prefix cache.


def run(
    engine: Engine, name: str, prompt: list[int], params: Any = None, **options: Any
) -> tuple[Request, int]:
    """Runs one request alone. Returns it, and the first position it computed."""
    count = len(engine.executor.steps)
    params = params or SamplingParams(max_tokens=3, seed=1)
    request = engine.add_request(name, prompt, params, **options)
    finish(engine)
    return request, engine.executor.steps[count].starts[0]


@pytest.mark.parametrize(("length", "cached"), [(31, 0), (32, 0), (33, 32), (64, 32), (65, 64), (100, 96)])
def test_at_least_the_last_token_of_a_prompt_is_computed(length: int, cached: int) -> None:
    engine, prompt = make_engine(), [5] * length
    first, second = (run(engine, name, prompt) for name in "ab")
    assert [(r.num_cached_tokens, start) for r, start in (first, second)] == [(0, 0), (cached, cached)]
    assert second[0].output().outputs == first[0].output().outputs
    assert (engine.stats.prefix_queries, engine.stats.prefix_hits) == (2 * length, cached)


def test_generated_tokens_are_found_too() -> None:
    engine = make_engine()
    first, _ = run(engine, "a", [5] * 40, SamplingParams(max_tokens=50, seed=1))
    conversation = [*first.prompt_token_ids, *first.output().outputs[0].token_ids, 7, 8]
    assert run(engine, "b", conversation)[1] == 64


def test_a_salt_keeps_prefixes_apart() -> None:
    engine, prompt = make_engine(), [5] * 100
    salts = [None, "x", "y", "x", None]
    assert [run(engine, str(i), prompt, cache_salt=salt)[1] for i, salt in enumerate(salts)] == [
        0,
        0,
        0,
        96,
        96,
    ]


@pytest.mark.parametrize(
    "params",
    [
        PoolingParams(),
        SamplingParams(max_tokens=3, prompt_logprobs=0),
        SamplingParams(max_tokens=3, skip_reading_prefix_cache=True),
    ],
)
def test_who_must_see_the_whole_prompt_computes_it(params: Any) -> None:
    engine, prompt = make_engine(), [5] * 100
    run(engine, "a", prompt)
    engine.reset_prefix_cache()
    # It leaves its blocks to others all the same.
    assert [run(engine, name, prompt, params)[1] for name in "bc"] == [0, 0]
    assert run(engine, "d", prompt)[1] == 96
    # Of the two who looked, one found something.
    assert (engine.stats.prefix_queries, engine.stats.prefix_hits) == (200, 96)


def test_without_prefix_caching_nothing_is_found_or_counted() -> None:
    engine, prompt = make_engine(enable_prefix_caching=False), [5] * 100
    assert [run(engine, name, prompt)[1] for name in "ab"] == [0, 0]
    assert (engine.stats.prefix_queries, engine.stats.prefix_hits) == (0, 0)


def test_running_sequences_share_a_prefix_at_once() -> None:
    engine = make_engine()
    a = add(engine, "a", [5] * 100, 50)
    step(engine)
    b = add(engine, "b", [5] * 96 + [6], 50)
    step(engine)
    assert b.num_cached_tokens == 96
    assert b.sequences[0].block_table[:3] == a.sequences[0].block_table[:3]
    finish(engine)
    for request in (a, b):
        assert_as_alone(request)


# What crosses to the runner.


def test_steps_and_results_are_plain_data() -> None:
    engine = make_engine(max_num_seqs=4, kv_blocks=6)
    results: list[StepResult] = []
    execute = engine.executor.execute

    def through_pickle(taken: ScheduledStep) -> StepResult:
        copy = pickle.loads(pickle.dumps(taken))
        assert copy == taken
        results.append(execute(copy))
        copied = pickle.loads(pickle.dumps(results[-1]))
        assert copied == results[-1]
        return copied

    engine.executor.execute = through_pickle
    requests = [add(engine, "a", 40, 60, n=3, logprobs=1, prompt_logprobs=0), add(engine, "b", 20, 60)]
    embedding = engine.add_request("e", [1, 2], PoolingParams())
    finish(engine)
    for request in requests:
        assert_as_alone(request)
    assert embedding.embedding == [3.0]
    assert any(r.logprobs for r in results)
    assert any(r.prompt_logprobs for r in results)


def test_cancelled_waiting_requests_do_not_pile_up() -> None:
    engine = make_engine(kv_blocks=2, max_num_seqs=1)
    engine.add_request("first", [1] * 60, SamplingParams(max_tokens=4))
    engine.step()
    for i in range(1000):
        engine.add_request(str(i), [1] * 60, SamplingParams(max_tokens=4))
        engine.abort(str(i))
    assert engine.scheduler.num_waiting == 0
    assert len(engine.scheduler._waiting) <= 101
