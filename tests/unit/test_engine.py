"""Engine: what it refuses, how requests end, what they give back, and what it counts."""

from __future__ import annotations

import logging
import pickle
from typing import Any

import pytest
from tests.fake_engine import VOCAB, assert_as_alone, finish, make_engine
from tests.fake_executor import FORBIDDEN_SEED, generate_alone, next_token, text_of

from hexad.engine.engine import Engine
from hexad.engine.request import Request
from hexad.errors import BackendError, ParamsError, PromptError
from hexad.outputs import CompletionOutput
from hexad.params import (
    BeamSearchParams,
    PoolingParams,
    RepetitionDetectionParams,
    SamplingParams,
    StructuredOutputsParams,
)


def complete(engine: Engine, prompt: list[int], **params: Any) -> CompletionOutput:
    request = engine.add_request("r", prompt, SamplingParams(**params))
    finish(engine)
    (output,) = request.output().outputs
    return output


def alone(prompt: list[int], max_tokens: int, seed: int = 1) -> list[int]:
    return generate_alone(
        prompt, seed=seed, max_len=len(prompt) + max_tokens, stop_ids=frozenset(), vocab_size=VOCAB
    )[0]


# What is refused on arrival.


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "empty"),
        ([1, 2, VOCAB], {}, rf"id {VOCAB} at position 2 .* 999"),
        ([5, -1], {}, "id -1 at position 1"),
        ([10**5000], {}, "id int of more digits than can be shown at position 0"),
        ([1] * 256, {}, "has 256 tokens; with a context of 256 at most 255"),
        ([1] * 300, {"max_tokens": None}, "has 300 tokens"),
        (
            [1] * 100,
            {"max_tokens": 100},
            r"grow to 200 tokens \(100 of them prompt\), which takes 7 .* there are 4",
        ),
        ([1], {"max_tokens": None}, "grow to 256 tokens"),
    ],
)
def test_refuses_on_arrival_what_can_never_run(
    prompt: list[int], params: dict[str, Any], message: str
) -> None:
    engine = make_engine(kv_blocks=4)
    with pytest.raises(PromptError, match=message):
        engine.add_request("r", prompt, SamplingParams(**params))
    with pytest.raises(PromptError, match=message):
        engine.check(prompt, SamplingParams(**params))
    assert not engine.has_unfinished
    assert engine.scheduler.num_waiting == 0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(seed=FORBIDDEN_SEED), f"seed must not be {FORBIDDEN_SEED}"),
        (SamplingParams(logprobs=30), "30"),
        (SamplingParams(stop_token_ids=[VOCAB]), str(VOCAB)),
        (
            BeamSearchParams(beam_width=9, max_tokens=1),
            r"beam_width must be at most max_num_seqs \(8\), not 9",
        ),
    ],
)
def test_refuses_params_that_cannot_be_followed(params: Any, message: str) -> None:
    engine = make_engine(max_num_seqs=8)
    with pytest.raises(ParamsError, match=message):
        engine.add_request("r", [1], params)
    assert not engine.has_unfinished


def test_a_prompt_alone_may_fill_the_context() -> None:
    """Nothing comes after it, so it needs no room for a new token."""
    engine = make_engine(max_model_len=64, kv_blocks=2)
    embedding = engine.add_request("e", [1] * 64, PoolingParams())
    score = engine.add_request("s", [1] * 64, SamplingParams(prompt_logprobs=0, max_tokens=1), generate=False)
    for params, generate in ((PoolingParams(), True), (SamplingParams(), False)):
        with pytest.raises(PromptError, match="65 tokens; with a context of 64 at most 64 fit"):
            engine.check([1] * 65, params, generate=generate)
    finish(engine)
    assert embedding.embedding == [64.0]
    output = score.output()
    assert (len(output.prompt_logprobs), output.outputs[0].token_ids) == (64, [])
    assert (score.num_generated, output.outputs[0].finish_reason) == (0, "length")


def test_ids_in_use_are_not_taken_twice() -> None:
    engine = make_engine()
    engine.add_request("r", [1], SamplingParams())
    with pytest.raises(AssertionError, match="in use"):
        engine.add_request("r", [1], SamplingParams())


# How a generation ends.


def test_longest_prompt_gets_its_one_token() -> None:
    output = complete(make_engine(), [1] * 255, max_tokens=100)
    assert (len(output.token_ids), output.finish_reason) == (1, "length")


def test_length_ends_at_max_tokens_or_at_the_context() -> None:
    for params, expected in (({"max_tokens": 5}, 5), ({"max_tokens": None}, 246), ({"max_tokens": 999}, 246)):
        output = complete(make_engine(), [7] * 10, **params)
        assert (len(output.token_ids), output.finish_reason) == (expected, "length")


def test_the_last_token_needs_no_block() -> None:
    assert len(complete(make_engine(kv_blocks=1), [1] * 32, max_tokens=1).token_ids) == 1


def test_eos_stops_and_stays_out_of_the_text() -> None:
    tokens = alone([7], 10)
    eos = tokens[4]
    assert eos not in tokens[:4]
    output = complete(make_engine(eos_ids=frozenset({eos, VOCAB})), [7], seed=1, max_tokens=10)
    assert (output.token_ids, output.text) == (tokens[:5], text_of(tokens[:4]))
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    engine = make_engine(eos_ids=frozenset({eos}))
    # "stop" wins where the stop token is also the last one allowed.
    assert complete(engine, [7], seed=1, max_tokens=5).finish_reason == "stop"
    output = complete(engine, [7], seed=1, max_tokens=10, ignore_eos=True)
    assert (output.token_ids, output.text, output.finish_reason) == (tokens, text_of(tokens), "length")
    output = complete(engine, [7], seed=1, max_tokens=10, include_stop_str_in_output=True)
    assert (output.token_ids, output.text) == (tokens[:5], text_of(tokens[:5]))


def test_prompt_may_hold_the_eos_token() -> None:
    output = complete(make_engine(eos_ids=frozenset({7})), [7, 7], seed=2, max_tokens=1)
    assert output.token_ids == [next_token([7, 7], 2, VOCAB)]


@pytest.mark.parametrize("include", [False, True])
def test_stop_ids_end_it_and_say_so(include: bool) -> None:
    tokens = alone([7], 10)
    params = {"seed": 1, "max_tokens": 10, "include_stop_str_in_output": include}
    output = complete(make_engine(), [7], stop_token_ids=[tokens[6], tokens[3]], ignore_eos=True, **params)
    assert (output.token_ids, output.finish_reason, output.stop_reason) == (tokens[:4], "stop", tokens[3])
    assert output.text == text_of(tokens[: 3 + include])


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_cut_the_text(include: bool) -> None:
    tokens = alone([7], 10)
    stop = f"><{tokens[3]}"  # begins in a token and ends in the next
    params = {"seed": 1, "max_tokens": 10, "include_stop_str_in_output": include}
    output = complete(make_engine(), [7], stop=["no such", stop], **params)
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.text == text_of(tokens[:3])[:-1] + stop * include
    # The stream shows a token's text when it is sure of it: with the next token.
    assert output.token_ids == tokens[:5]


def test_a_stop_string_in_the_last_token_counts() -> None:
    tokens = alone([7], 5)
    output = complete(make_engine(), [7], seed=1, max_tokens=5, stop=f"<{tokens[4]}>")
    assert (output.token_ids, output.text) == (tokens, text_of(tokens[:4]))
    assert (output.finish_reason, output.stop_reason) == ("stop", f"<{tokens[4]}>")


def test_nothing_stops_it_before_min_tokens() -> None:
    tokens = alone([7], 10)
    engine = make_engine(eos_ids=frozenset({tokens[2]}))
    text = f"<{tokens[3]}>"
    lengths = [
        len(complete(engine, [7], seed=1, max_tokens=10, min_tokens=least, **stop).token_ids)
        for least in (0, 6)
        for stop in ({}, {"stop_token_ids": [tokens[1]]}, {"stop": text, "ignore_eos": True})
    ]
    assert lengths == [3, 2, 5, 10, 10, 10]
    output = complete(engine, [7], seed=1, max_tokens=10, min_tokens=6, stop=text)
    assert (output.text, output.finish_reason) == (text_of(tokens), "length")


def test_repetition_ends_it() -> None:
    """A vocabulary of one token. The prompt's own do not count."""
    detection = RepetitionDetectionParams(max_pattern_size=3, min_pattern_size=2, min_count=4)
    output = complete(
        make_engine(vocab_size=1), [0] * 20, max_tokens=50, ignore_eos=True, repetition_detection=detection
    )
    assert (len(output.token_ids), output.finish_reason) == (8, "repetition")
    varied = complete(make_engine(), [0] * 20, seed=1, max_tokens=50, repetition_detection=detection)
    assert (len(varied.token_ids), varied.finish_reason) == (50, "length")


# When something goes wrong.


def test_a_failing_step_ends_its_requests_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(max_num_seqs=3)
    requests = [
        engine.add_request(name, [i] * 40, SamplingParams(seed=1, max_tokens=9, n=2))
        for i, name in enumerate("abc")
    ]
    for _ in range(3):
        engine.step()
    assert engine.scheduler.num_running == 3
    engine.executor.fail_next = True
    with caplog.at_level(logging.ERROR):
        failed = engine.step()
    assert failed == requests[:2]  # b's first sequence ran beside a's two
    assert "was told to fail" in caplog.text
    for request in failed:
        output = request.output()
        assert output.finished
        for completion in output.outputs:
            assert completion.finish_reason == "error"
            assert completion.error == "RuntimeError: the fake executor was told to fail"
    assert engine.abort("a") is None
    assert (engine.blocks.num_allocated, engine.stats.success["error"]) == (0, 2)
    finish(engine)
    assert_as_alone(requests[2])
    later = engine.add_request("a", [1] * 40, SamplingParams(seed=1, max_tokens=9))
    finish(engine)
    assert_as_alone(later)


def test_an_error_that_says_what_to_do_is_not_logged_as_a_crash(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()

    def fail(step: object) -> None:
        raise BackendError("The core says no.")

    monkeypatch.setattr(engine.executor, "execute", fail)
    engine.add_request("r", [1], SamplingParams())
    (request,) = engine.step()
    assert request.output().outputs[0].error == "BackendError: The core says no."
    assert caplog.text == ""


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_broken_sequence_ends_alone(broken: int) -> None:
    """Sequences 0 and 1 are the request's own, 2 is another's; 0 draws the first tokens of both."""
    engine = make_engine()
    two = engine.add_request("two", [1] * 40, SamplingParams(seed=1, max_tokens=9, n=2))
    engine.executor.broken = {broken} if broken < 2 else set()
    engine.step()
    one = engine.add_request("one", [2] * 40, SamplingParams(seed=1, max_tokens=9))
    while one.num_generated < 4:
        engine.step()
    engine.executor.broken = {broken}
    finish(engine)
    outputs = [*two.output().outputs, *one.output().outputs]
    for i, (output, request, index) in enumerate(zip(outputs, (two, two, one), (0, 1, 0), strict=True)):
        tokens, _ = generate_alone(
            request.prompt_token_ids, seed=1, max_len=49, stop_ids=frozenset(), vocab_size=VOCAB, index=index
        )
        if i == broken:
            assert (output.finish_reason, output.error) == ("error", "the fake model broke")
            assert output.token_ids == tokens[: 0 if broken < 2 else 4]
            assert output.text == text_of(output.token_ids)
        else:
            assert (output.finish_reason, output.error, output.token_ids) == ("length", None, tokens)


def test_abort_frees_at_once_and_leaves_the_others_alone() -> None:
    engine = make_engine(max_num_seqs=4)
    requests = {
        name: engine.add_request(name, [ord(name)] * 40, SamplingParams(seed=3, max_tokens=20))
        for name in "abcd"
    }
    waiting = engine.add_request("w", [1], SamplingParams())
    for _ in range(5):
        engine.step()
    assert engine.blocks.num_allocated == 8
    assert engine.abort("b") is requests["b"]
    (output,) = requests["b"].output().outputs
    assert (len(output.token_ids), output.text) == (5, text_of(output.token_ids))
    assert (output.finish_reason, requests["b"].finished) == ("abort", True)
    assert engine.blocks.num_allocated == 6
    assert engine.abort("w") is waiting
    assert waiting.output().outputs[0].finish_reason == "abort"
    assert engine.abort("b") is engine.abort("no such request") is None
    assert all(request.request_id != "b" for request in engine.step())
    finish(engine)
    for name in "acd":
        assert_as_alone(requests[name])
    assert engine.stats.success == {"stop": 0, "length": 3, "abort": 2, "error": 0, "repetition": 0}


# What it gives back.


def test_step_returns_whom_it_has_news_of() -> None:
    engine = make_engine(max_num_batched_tokens=64, max_num_seqs=8)
    short = engine.add_request("short", [1], SamplingParams(max_tokens=4, n=3), watched=False)
    long = engine.add_request("long", [1] * 150, SamplingParams(max_tokens=2))
    news = []
    while engine.has_unfinished:
        news.append(engine.step())
    # The short one's sequences take three tokens of each step; the long prompt, the rest of three steps.
    assert news == [[short], [short], [short, long], [short, long]]
    engine.add_request("prompt", [1] * 130, PoolingParams())
    assert [len(engine.step()) for _ in range(3)] == [0, 0, 1]


def test_deltas_join_to_the_whole() -> None:
    engine = make_engine()
    tokens = alone([7], 20)
    request = engine.add_request(
        "r",
        [7],
        SamplingParams(seed=1, max_tokens=20, n=3, logprobs=1, stop=f"<{tokens[7]}>", detokenize=True),
    )
    parts: dict[int, list[CompletionOutput]] = {0: [], 1: [], 2: []}
    while engine.has_unfinished:
        engine.step()
        for output in request.output(delta=True).outputs:
            parts[output.index].append(output)
    for whole in request.output().outputs:
        mine = parts[whole.index]
        assert [token_id for part in mine for token_id in part.token_ids] == whole.token_ids
        assert "".join(part.text for part in mine) == whole.text
        assert [entry for part in mine for entry in part.logprobs] == whole.logprobs
        assert len(whole.logprobs) == len(whole.token_ids)
        # Each says once that it has ended, and none comes without news.
        assert [part.finish_reason for part in mine] == [None] * (len(mine) - 1) + [whole.finish_reason]
        assert all(part.token_ids for part in mine)
    assert request.output().outputs[0].finish_reason == "stop"
    assert request.output().outputs[1].finish_reason == "length"
    assert request.output(delta=True).outputs == []


def test_outputs_are_plain_data_of_their_own() -> None:
    engine = make_engine()
    engine.add_request(
        "r", [1, 2], SamplingParams(max_tokens=3, logprobs=1, prompt_logprobs=1), prompt="one two"
    )
    (request,) = engine.step()
    first = request.output()
    saved = pickle.dumps(first)
    engine.step()
    assert first.outputs == pickle.loads(saved).outputs
    assert first.prompt_logprobs == pickle.loads(saved).prompt_logprobs
    assert (first.prompt, first.prompt_token_ids, first.request_id) == ("one two", [1, 2], "r")


def test_what_is_done_to_an_output_or_a_prompt_stays_there() -> None:
    engine = make_engine()
    prompt = [1, 2, 3]
    request = engine.add_request("r", prompt, SamplingParams(max_tokens=4, seed=1))
    prompt.clear()
    while engine.has_unfinished:
        engine.step()
        output = request.output()
        output.prompt_token_ids.append(99)
        output.outputs[0].token_ids.clear()
    output = request.output()
    assert (output.prompt_token_ids, output.outputs[0].token_ids) == ([1, 2, 3], alone([1, 2, 3], 4))


def test_a_step_makes_no_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are copies of all tokens so far: made at every step they would cost the square of the length."""
    monkeypatch.setattr(Request, "output", lambda request: pytest.fail("an output was made"))
    engine = make_engine()
    request = engine.add_request("r", [1, 2], SamplingParams(max_tokens=3))
    assert [engine.step() for _ in range(3)] == [[request]] * 3
    assert (request.num_generated, request.finished) == (3, True)


def test_logprobs_of_prompt_and_tokens() -> None:
    engine = make_engine(max_num_batched_tokens=16, max_num_seqs=2, vocab_size=11)
    prompt = [i % 11 for i in range(40)]
    request = engine.add_request(
        "r", prompt, SamplingParams(max_tokens=3, seed=1, logprobs=2, prompt_logprobs=0)
    )
    finish(engine)
    output = request.output()
    assert output.prompt_logprobs[0] is None
    assert [next(iter(entry)) for entry in output.prompt_logprobs[1:]] == prompt[1:]
    (completion,) = output.outputs
    assert [next(iter(entry)) for entry in completion.logprobs] == completion.token_ids
    drawn = [e[t].logprob for e, t in zip(completion.logprobs, completion.token_ids, strict=True)]
    assert completion.cumulative_logprob == sum(drawn)
    assert all(entry[t].decoded_token == f"<{t}>" for entry in completion.logprobs for t in entry)


# Seeds, and what is counted.


def drawn_seeds(engine: Engine, seeds: list[int | None]) -> list[int]:
    for i, seed in enumerate(seeds):
        engine.add_request(str(i), [1], SamplingParams(seed=seed))
    engine.step()
    return [spec.seed for spec in engine.executor.steps[-1].new]


def test_seeds() -> None:
    with_seed, again, other, without = (
        drawn_seeds(make_engine(seed=seed), [None, 5, None]) for seed in (0, 0, 2, None)
    )
    assert with_seed == again
    assert with_seed[1] == other[1] == without[1] == 5
    assert len({*with_seed, *other, *without}) == 7


def test_stats_count_what_happened() -> None:
    engine = make_engine(max_num_seqs=8)
    requests = [
        engine.add_request("a", [1] * 40, SamplingParams(seed=1, max_tokens=9)),
        engine.add_request("b", [2] * 10, SamplingParams(seed=1, max_tokens=6, n=3)),
        engine.add_request("s", [3] * 20, SamplingParams(prompt_logprobs=0), generate=False),
        engine.add_request("e", [4] * 30, PoolingParams()),
    ]
    finish(engine)
    stats, steps = engine.stats, engine.executor.steps
    assert stats.steps == stats.iteration_tokens.count == len(steps)
    assert stats.iteration_tokens.sum == sum(len(step.tokens) for step in steps)
    assert stats.prompt_tokens == 40 + 10 + 20 + 30
    assert stats.generation_tokens == sum(r.num_generated for r in requests) == 9 + 3 * 6
    # One first token per request that has tokens; times between tokens for each sequence.
    assert stats.time_to_first_token.count == 2
    assert stats.inter_token_latency.count == 8 + 3 * 5
    assert stats.success["length"] == 4
    assert (stats.request_prompt_tokens.sum, stats.request_generation_tokens.sum) == (100, 27)
    assert stats.preemptions == 0


def test_broken_sequences_bring_no_tokens_to_count() -> None:
    engine = make_engine()
    engine.executor.broken = {1}
    request = engine.add_request("r", [1] * 10, SamplingParams(seed=1, max_tokens=6, n=2))
    finish(engine)
    assert engine.stats.generation_tokens == request.num_generated == 6


def test_times_are_in_order() -> None:
    engine = make_engine(max_num_seqs=1)
    requests = [engine.add_request(name, [1] * 9, SamplingParams(max_tokens=3)) for name in "ab"]
    finish(engine)
    for request in requests:
        m = request.metrics
        times = [
            m.arrival_time,
            m.first_scheduled_time,
            m.first_token_time,
            m.last_token_time,
            m.finished_time,
        ]
        assert None not in times
        assert times == sorted(times)
    assert requests[1].metrics.first_scheduled_time >= requests[0].metrics.finished_time


def test_beams_take_no_grammar() -> None:
    params = BeamSearchParams(
        beam_width=2, max_tokens=4, structured_outputs=StructuredOutputsParams(json_object=True)
    )
    engine = make_engine()
    with pytest.raises(ParamsError, match="structured_outputs must be None"):
        engine.add_request("r", [1], params)
    assert not engine.has_unfinished
