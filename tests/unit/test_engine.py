"""Engine: what it refuses, how requests end, and where seeds come from."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from tests.fake_executor import FakeExecutor, FakeStream, generate_alone, next_token

from hexad.config import EngineConfig
from hexad.engine.engine import Engine
from hexad.engine.request import Request
from hexad.errors import PromptError
from hexad.outputs import CompletionOutput
from hexad.params import SamplingParams

VOCAB = 1000


def make_engine(
    *, kv_blocks: int = 64, max_model_len: int = 256, eos_ids: frozenset[int] = frozenset(), **settings: Any
) -> Engine:
    return Engine(
        FakeExecutor(kv_blocks=kv_blocks, vocab_size=VOCAB),
        EngineConfig(**settings),
        max_model_len=max_model_len,
        kv_blocks=kv_blocks,
        vocab_size=VOCAB,
        eos_ids=eos_ids,
        new_stream=FakeStream,
    )


def finish(engine: Engine, prompt: list[int], **params: Any) -> CompletionOutput:
    engine.add_request("r", prompt, SamplingParams(**params))
    outputs = []
    while engine.has_unfinished:
        outputs += [request.output() for request in engine.step()]
    assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
    assert engine.scheduler.blocks.num_allocated == 0
    return outputs[-1].outputs[0]


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
    assert not engine.has_unfinished


def test_longest_prompt_gets_its_one_token() -> None:
    output = finish(make_engine(), [1] * 255, max_tokens=100)
    assert (len(output.token_ids), output.finish_reason) == (1, "length")


def test_length_ends_at_max_tokens_or_at_the_context() -> None:
    for params, expected in (({"max_tokens": 5}, 5), ({"max_tokens": None}, 246), ({"max_tokens": 999}, 246)):
        output = finish(make_engine(), [7] * 10, **params)
        assert (len(output.token_ids), output.finish_reason) == (expected, "length")


def test_eos_stops_and_stays_out_of_the_text() -> None:
    tokens, _ = generate_alone([7], seed=1, max_len=11, stop_ids=frozenset(), vocab_size=VOCAB)
    eos = tokens[4]
    assert eos not in tokens[:4]
    output = finish(make_engine(eos_ids=frozenset({eos, VOCAB})), [7], seed=1, max_tokens=10)
    assert output.token_ids == tokens[:5]
    assert output.text == "".join(f"<{t}>" for t in tokens[:4])
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    # "stop" wins where the stop token is also the last one allowed.
    output = finish(make_engine(eos_ids=frozenset({eos})), [7], seed=1, max_tokens=5)
    assert output.finish_reason == "stop"

    output = finish(make_engine(eos_ids=frozenset({eos})), [7], seed=1, max_tokens=10, ignore_eos=True)
    assert output.token_ids == tokens
    assert output.text == "".join(f"<{t}>" for t in tokens)
    assert output.finish_reason == "length"


def test_prompt_may_hold_the_eos_token() -> None:
    output = finish(make_engine(eos_ids=frozenset({7})), [7, 7], seed=2, max_tokens=1)
    assert output.token_ids == [next_token([7, 7], 2, VOCAB)]


def drawn_seeds(engine: Engine, seeds: list[int | None]) -> list[int]:
    for i, seed in enumerate(seeds):
        engine.add_request(str(i), [1], SamplingParams(seed=seed))
    engine.step()
    return [s.sample.seed for s in engine.executor.steps[-1].sequences]


def test_seeds() -> None:
    with_seed, again, other, without = (
        drawn_seeds(make_engine(seed=seed), [None, 5, None]) for seed in (0, 0, 2, None)
    )
    assert with_seed == again
    assert with_seed[1] == other[1] == without[1] == 5
    assert len({*with_seed, *other, *without}) == 7


def test_abort_frees_at_once_and_leaves_the_others_alone() -> None:
    engine = make_engine()
    for name in "abc":
        engine.add_request(name, [ord(name)] * 40, SamplingParams(seed=3, max_tokens=20))
    for _ in range(5):
        engine.step()
    assert engine.scheduler.blocks.num_allocated == 6
    aborted = engine.abort("b")
    assert aborted is not None
    assert (len(aborted.outputs[0].token_ids), aborted.outputs[0].finish_reason) == (5, "abort")
    assert engine.scheduler.blocks.num_allocated == 4
    assert engine.abort("b") is None
    assert engine.abort("no such request") is None
    outputs = {}
    while engine.has_unfinished:
        outputs.update((r.request_id, r.output()) for r in engine.step())
    for name in "ac":
        tokens, _ = generate_alone(
            [ord(name)] * 40, seed=3, max_len=60, stop_ids=frozenset(), vocab_size=VOCAB
        )
        assert outputs[name].outputs[0].token_ids == tokens
    assert outputs.keys() == {"a", "c"}


def test_outputs_are_plain_data_of_their_own() -> None:
    engine = make_engine()
    engine.add_request("r", [1, 2], SamplingParams(max_tokens=3), prompt="one two")
    (request,) = engine.step()
    first = request.output()
    saved = pickle.dumps(first)
    engine.step()
    assert first == pickle.loads(saved)
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
    tokens, _ = generate_alone([1, 2, 3], seed=1, max_len=7, stop_ids=frozenset(), vocab_size=VOCAB)
    output = request.output()
    assert (output.prompt_token_ids, output.outputs[0].token_ids) == ([1, 2, 3], tokens)


def test_a_step_makes_no_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are copies of all tokens so far: made at every step they would cost the square of the length."""
    monkeypatch.setattr(Request, "output", lambda request: pytest.fail("an output was made"))
    engine = make_engine()
    request = engine.add_request("r", [1, 2], SamplingParams(max_tokens=3))
    assert [engine.step() for _ in range(3)] == [[request]] * 3
    assert (request.num_generated, request.finished, request.finish_reason) == (3, True, "length")


def test_steps_are_plain_data_of_their_own() -> None:
    engine = make_engine()
    engine.add_request("r", [1] * 31, SamplingParams(max_tokens=5))
    engine.step()
    step = engine.executor.steps[0]
    saved = pickle.dumps(step)
    for _ in range(3):
        engine.step()
    assert step == pickle.loads(saved)
    assert len(engine.executor.steps[2].sequences[0].block_table) == 2


def test_ids_in_use_are_not_taken_twice() -> None:
    engine = make_engine()
    engine.add_request("r", [1], SamplingParams())
    with pytest.raises(AssertionError, match="in use"):
        engine.add_request("r", [1], SamplingParams())
