"""AsyncEngine: requests go in, streams come out."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import threading
import time
from typing import Any

import pytest
from tests.fake_executor import FORBIDDEN_SEED, text_of
from tests.gated_engine import (
    PATIENCE,
    VOCAB,
    alone,
    final,
    in_event_loop,
    make_engine,
    params_of,
    running,
    until,
)

from hexad.engine.async_engine import AsyncEngine
from hexad.engine.engine import Engine
from hexad.errors import BackendError, EngineError, ParamsError, PromptError
from hexad.outputs import BeamSearchOutput, EmbeddingRequestOutput, RequestOutput
from hexad.params import BeamSearchParams, PoolingParams, RequestOutputKind


@in_event_loop
async def test_outputs_are_cumulative_new_or_final() -> None:
    async with running(make_engine()) as engine:
        streams = {
            kind: engine.submit(kind.name, [5, 6, 7], params_of(3, 20, output_kind=kind), prompt="text")
            for kind in RequestOutputKind
        }
        outputs = {kind: [output async for output in stream] for kind, stream in streams.items()}
    expected = alone([5, 6, 7], 3, 20)
    for kind, seen in outputs.items():
        assert [output.finished for output in seen] == [False] * (len(seen) - 1) + [True]
        assert {output.request_id for output in seen} == {kind.name}
        assert {output.prompt for output in seen} == {"text"}
    parts = [output.outputs[0] for output in outputs[RequestOutputKind.DELTA]]
    assert [token for part in parts for token in part.token_ids] == expected
    assert "".join(part.text for part in parts) == text_of(expected)
    growing = [output.outputs[0] for output in outputs[RequestOutputKind.CUMULATIVE]]
    assert all(text_of(expected).startswith(part.text) for part in growing)
    assert all(part.token_ids == expected[: len(part.token_ids)] for part in growing)
    assert growing[-1].token_ids == expected
    (only,) = outputs[RequestOutputKind.FINAL_ONLY]
    assert (only.outputs[0].token_ids, only.outputs[0].finish_reason) == (expected, "length")


@in_event_loop
async def test_who_reads_nothing_before_the_end_watches_nothing() -> None:
    """Prompts need not go slowly beside such a request."""
    inner = make_engine()
    executor: Any = inner.executor
    async with running(inner) as engine:
        for kind in RequestOutputKind:
            executor.hold()
            stream = engine.submit(kind.name, [5, 6, 7], params_of(3, 20, output_kind=kind))
            await executor.held()
            assert inner.requests[kind.name].watched == (kind is not RequestOutputKind.FINAL_ONLY)
            executor.go()
            await final(stream)


@pytest.mark.parametrize("seed", range(3))
def test_a_storm_of_submits_and_cancels(seed: int) -> None:
    """Requests of every kind come, go on, are cancelled, closed and dropped, in a pool too small."""
    rng = random.Random(seed)

    async def one(engine: AsyncEngine, number: int, prompt: list[int], max_tokens: int) -> None:
        await asyncio.sleep(rng.random() / 20)
        kind = rng.choice(list(RequestOutputKind))
        params = params_of(number, max_tokens, output_kind=kind)
        stream = engine.submit(str(number), prompt, params, priority=rng.randrange(3))
        fate = rng.choice(["read", "read", "cancel", "close", "drop", "slow"])
        tokens: list[int] = []
        output: Any = None
        async for output in stream:
            assert isinstance(output, RequestOutput)
            new = output.outputs[0].token_ids
            tokens = tokens + new if kind is RequestOutputKind.DELTA else new
            if fate == "slow":
                await asyncio.sleep(rng.random() / 100)
            elif fate != "read" and rng.random() < 0.3:
                if fate == "cancel":
                    engine.cancel(str(number))
                elif fate == "close":
                    await stream.aclose()
                else:
                    return
        expected = alone(prompt, number, max_tokens)
        assert output.finished
        if output.outputs[0].finish_reason == "abort":
            assert fate in ("cancel", "close")
            assert tokens == expected[: len(tokens)]
        else:
            assert (output.outputs[0].finish_reason, tokens) == ("length", expected)

    async def main() -> None:
        settings = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "scheduling_policy": "priority"}
        async with running(make_engine(kv_blocks=12, max_model_len=256, **settings)) as engine:
            jobs = []
            for number in range(60):
                prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 100))]
                jobs.append(one(engine, number, prompt, rng.randrange(1, 60)))
            await asyncio.gather(*jobs)

    asyncio.run(main())


@pytest.mark.parametrize("kind", RequestOutputKind)
@in_event_loop
async def test_who_never_reads_holds_one_output_and_nobody_up(kind: RequestOutputKind) -> None:
    async with running(make_engine()) as engine:
        params = params_of(1, 100, output_kind=kind, logprobs=0)
        unread = engine.submit("unread", [5, 6], params)
        read = await final(engine.submit("read", [7], params_of(2, 150)))
        assert read.outputs[0].token_ids == alone([7], 2, 150)
        outputs = [output async for output in unread]
    (output,) = outputs
    assert isinstance(output, RequestOutput)
    (completion,) = output.outputs
    expected = alone([5, 6], 1, 100)
    assert (completion.token_ids, completion.text) == (expected, text_of(expected))
    assert completion.finish_reason == "length"
    assert completion.logprobs is not None
    assert [next(iter(entry)) for entry in completion.logprobs] == expected


@in_event_loop
async def test_joined_deltas_keep_the_sequences_apart() -> None:
    async with running(make_engine()) as engine:
        params = params_of(1, 30, n=4, output_kind=RequestOutputKind.DELTA, prompt_logprobs=0)
        unread = engine.submit("unread", [5, 6], params)
        whole = await final(engine.submit("whole", [5, 6], params_of(1, 30, n=4, prompt_logprobs=0)))
        await until(lambda: unread._slot.ended)
        joined = await final(unread)
    for output in (joined, whole):
        output.request_id, output.metrics = "", None
    assert joined == whole
    assert len({tuple(completion.token_ids) for completion in joined.outputs}) == 4


@in_event_loop
async def test_a_step_calls_each_event_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests a step advances, and not at all while the last call still waits."""

    model = make_engine()
    loop = asyncio.get_running_loop()
    calls: list[str] = []
    original = loop.call_soon_threadsafe

    def counted(callback: Any, *args: Any, **options: Any) -> Any:
        calls.append(callback.__name__)
        return original(callback, *args, **options)

    async with running(model) as engine:
        streams = [engine.submit(str(i), [i + 2], params_of(i, 40)) for i in range(16)]
        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        await asyncio.gather(*map(final, streams))
        assert 0 < calls.count("_wake_readers") <= len(model.executor.steps)

        calls.clear()
        streams = [engine.submit(f"again {i}", [i + 2], params_of(i, 40)) for i in range(16)]
        while len(engine._slots):
            time.sleep(0.001)  # the event loop is busy
        assert calls.count("_wake_readers") == 1
        monkeypatch.undo()
        for i, stream in enumerate(streams):
            assert (await final(stream)).outputs[0].token_ids == alone([i + 2], i, 40)


@in_event_loop
async def test_a_cancelled_request_is_gone_before_the_next_step() -> None:
    model = make_engine()
    async with running(model) as engine:
        goes = engine.submit("goes", [2] * 100, params_of(1, 400))
        stays = engine.submit("stays", [3], params_of(2, 400))
        await anext(goes)
        await model.executor.held()
        held = model.executor.allocated[-1]
        steps = len(model.executor.steps)
        engine.cancel("goes")
        engine.cancel("goes")
        engine.cancel("nobody")
        model.executor.go()
        output = await final(goes)
        assert output.outputs[0].finish_reason == "abort"
        await final(stays)
        # The step under way was number `steps`; the one after it is without the request and its blocks.
        assert held > 4
        assert model.executor.allocated[steps + 1] == len(model.executor.steps[steps + 1].block_tables[0])
        assert [len(step.sequence_ids) for step in model.executor.steps[steps : steps + 2]] == [2, 1]


@pytest.mark.parametrize("way", ["break", "never read", "close", "task"])
@in_event_loop
async def test_who_leaves_a_stream_cancels_its_request(way: str) -> None:
    model = make_engine()
    async with running(model) as engine:
        if way == "break":
            async for _ in engine.submit("r", [2], params_of(1, 500)):
                break
        elif way == "never read":
            await in_step_of(engine, model)
            model.executor.go()
        elif way == "close":
            async with contextlib.aclosing(engine.submit("r", [2], params_of(1, 500))) as stream:
                await anext(stream)
        else:
            task = asyncio.create_task(final(engine.submit("r", [2], params_of(1, 500))))
            await until(lambda: len(model.executor.steps) > 2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            del task
        gc.collect()
        await until(lambda: not model.has_unfinished)
        assert len(model.executor.steps) < 500
        success = {m.labels["finished_reason"]: m.value for m in engine.get_metrics() if m.labels}
        assert success["abort"] == 1


@in_event_loop
async def test_a_cancel_does_not_reach_the_next_request_of_the_same_id() -> None:
    model = make_engine()
    async with running(model) as engine:
        submitted, deliver = threading.Event(), engine._deliver

        def deliver_and_wait(requests: Any) -> None:
            deliver(requests)
            submitted.wait(PATIENCE)

        engine._deliver = deliver_and_wait  # type: ignore[method-assign]
        model.executor.hold()
        first = engine.submit("r", [2], params_of(1, 1))
        await model.executor.held()
        engine.cancel("r")
        model.executor.go()
        assert (await final(first)).outputs[0].finish_reason == "length"
        second = engine.submit("r", [3], params_of(2, 20))
        submitted.set()
        assert (await final(second)).outputs[0].token_ids == alone([3], 2, 20)


@in_event_loop
async def test_a_priority_that_cannot_be_compared_is_refused() -> None:
    async with running(make_engine(scheduling_policy="priority")) as engine:
        with pytest.raises(ParamsError, match="priority must be an integer, not 'high'"):
            engine.submit("r", [2], params_of(1, 1), priority="high")  # type: ignore[arg-type]
        assert (await final(engine.submit("r", [2], params_of(1, 1)))).finished


async def in_step_of(engine: AsyncEngine, model: Engine) -> None:
    stream = engine.submit("r", [2], params_of(1, 500))
    await model.executor.held()
    del stream


@in_event_loop
async def test_waiting_for_the_next_output_may_time_out() -> None:
    model = make_engine()
    model.executor.hold()
    async with running(model) as engine:
        stream = engine.submit("r", [2], params_of(1, 20))
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(stream), 0.01)
        model.executor.go()
        assert (await final(stream)).outputs[0].token_ids == alone([2], 1, 20)


@in_event_loop
async def test_a_stream_has_one_reader() -> None:
    model = make_engine()
    model.executor.hold()
    async with running(model) as engine:
        stream = engine.submit("r", [2], params_of(1, 3))
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="one reader"):
            await anext(stream)
        model.executor.go()
        await first


@pytest.mark.parametrize(
    ("prompt", "params", "error", "message"),
    [
        ([], params_of(1, 3), PromptError, "empty"),
        ([VOCAB], params_of(1, 3), PromptError, "outside the vocabulary"),
        ([2] * 600, params_of(1, 3), PromptError, "600 tokens"),
        ([2], params_of(FORBIDDEN_SEED, 3), ParamsError, "seed must not be"),
        ([2], BeamSearchParams(beam_width=1000, max_tokens=3), ParamsError, "beam_width"),
    ],
    ids=["empty", "vocabulary", "too long", "refused by the executor", "beams"],
)
@in_event_loop
async def test_the_submitter_is_told_what_is_wrong(
    prompt: list[int], params: Any, error: type[Exception], message: str
) -> None:
    model = make_engine()
    async with running(model) as engine:
        with pytest.raises(error, match=message):
            engine.submit("r", prompt, params)
        await final(engine.submit("r", [2], params_of(1, 3)))
    assert len(model.executor.steps) == 3


@in_event_loop
async def test_an_id_may_be_used_again_once_its_request_has_ended() -> None:
    model = make_engine()
    model.executor.hold()
    async with running(model) as engine:
        first = engine.submit("r", [2], params_of(1, 3))
        with pytest.raises(EngineError, match="request 'r' already"):
            engine.submit("r", [3], params_of(2, 3))
        model.executor.go()
        assert (await final(first)).outputs[0].token_ids == alone([2], 1, 3)
        second = engine.submit("r", [3], params_of(2, 3))
        del first  # which must not cancel its namesake
        gc.collect()
        assert (await final(second)).outputs[0].token_ids == alone([3], 2, 3)


@in_event_loop
async def test_a_failed_step_ends_its_own_requests_only() -> None:
    model = make_engine(max_num_seqs=2)
    async with running(model) as engine:
        await engine.sleep()
        streams = [engine.submit(str(i), [i + 2], params_of(i, 400)) for i in range(5)]
        await until(lambda: len(model.requests) == 5)
        await engine.wake()
        await asyncio.gather(anext(streams[0]), anext(streams[1]))
        await model.executor.held()
        model.executor.fail_next = True
        model.executor.go()
        outputs = await asyncio.gather(*map(final, streams))
    completions = [output.outputs[0] for output in outputs]
    assert [completion.finish_reason for completion in completions] == ["error"] * 2 + ["length"] * 3
    for i, completion in enumerate(completions):
        expected = alone([i + 2], i, 400)
        if i < 2:
            assert completion.error == "RuntimeError: the fake executor was told to fail"
            assert completion.token_ids == expected[: len(completion.token_ids)]
        else:
            assert completion.token_ids == expected


@in_event_loop
async def test_embeddings_beams_and_prompts_alone() -> None:
    model = make_engine()
    async with running(model) as engine:
        beams = engine.submit("beams", [2, 3], BeamSearchParams(beam_width=2, max_tokens=4))
        (embedding,) = [o async for o in engine.submit("embed", [2, 3, 4], PoolingParams())]
        scored = await final(
            engine.submit("score", [2, 3, 4], params_of(1, 1, prompt_logprobs=0), generate=False)
        )
        (found,) = [output async for output in beams]

        await engine.reset_prefix_cache()
        model.executor.hold()
        for params in (PoolingParams(), BeamSearchParams(beam_width=2, max_tokens=4)):
            failed = engine.submit("failed", [2, 3], params)
            await model.executor.held()
            model.executor.fail_next = True
            model.executor.go()
            with pytest.raises(BackendError, match="told to fail"):
                await anext(failed)
    assert isinstance(embedding, EmbeddingRequestOutput)
    assert (embedding.outputs.embedding, embedding.prompt_token_ids) == ([9.0], [2, 3, 4])
    assert isinstance(found, BeamSearchOutput)
    assert len(found.sequences) == 2
    assert scored.outputs[0].token_ids == []
    assert scored.prompt_logprobs is not None
    assert [entry and list(entry) for entry in scored.prompt_logprobs] == [None, [3], [4]]


@in_event_loop
async def test_a_cancelled_embedding_is_an_error() -> None:
    model = make_engine(max_num_seqs=1)
    model.executor.hold()
    async with running(model) as engine:
        first = engine.submit("first", [2], params_of(1, 3))
        waiting = engine.submit("waiting", [2, 3], PoolingParams())
        engine.cancel("waiting")
        model.executor.go()
        with pytest.raises(EngineError, match="'waiting' was cancelled"):
            await anext(waiting)
        with pytest.raises(StopAsyncIteration):
            await anext(waiting)
        await final(first)
