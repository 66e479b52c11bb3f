"""AsyncEngine's thread: how it sleeps, ends and breaks, and whom it serves."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import pytest
from tests.gated_engine import (
    PATIENCE,
    alone,
    final,
    in_event_loop,
    make_engine,
    params_of,
    running,
    until,
)

from hexad.engine.async_engine import AsyncEngine, Stream
from hexad.errors import EngineError


@in_event_loop
async def test_when_the_thread_breaks_everybody_is_told() -> None:
    model = make_engine(max_num_seqs=1)

    def broken() -> Any:
        raise ZeroDivisionError("a bug")

    engine = AsyncEngine(model)
    running, waiting = (engine.submit(name, [2], params_of(1, 100)) for name in ("running", "waiting"))
    await model.executor.held()
    sleeping = asyncio.create_task(engine.sleep())
    await asyncio.sleep(0)
    model.step = broken  # type: ignore[method-assign]
    model.executor.go()
    with pytest.raises(EngineError, match="cannot sleep while there are requests, 2 now"):
        await sleeping
    for stream in (running, waiting):
        with pytest.raises(EngineError, match="ZeroDivisionError: a bug") as caught:
            async for _ in stream:
                pass
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(EngineError, match="ZeroDivisionError: a bug"):
        engine.submit("late", [2], params_of(1, 3))
    with pytest.raises(EngineError, match="ZeroDivisionError: a bug"):
        await engine.reset_prefix_cache()
    engine.cancel("running")
    await engine.shutdown()
    engine.close()


@in_event_loop
async def test_a_call_that_waits_for_a_broken_thread_fails() -> None:
    model = make_engine()
    engine = AsyncEngine(model)
    stream = engine.submit("r", [2], params_of(1, 100))
    await model.executor.held()

    def bad_abort(request_id: str) -> Any:
        raise ZeroDivisionError("a bug")

    model.abort = bad_abort  # type: ignore[method-assign]
    engine.cancel("r")
    call = asyncio.create_task(engine.reset_prefix_cache())
    await asyncio.sleep(0)
    model.executor.go()
    with pytest.raises(EngineError, match="a bug"):
        await call
    with pytest.raises(EngineError, match="a bug"):
        await final(stream)
    await engine.shutdown()


@in_event_loop
async def test_sleep_frees_and_requests_wait_until_it_wakes() -> None:
    model = make_engine()
    async with running(model) as engine:
        stream = engine.submit("r", [2] * 100, params_of(1, 200))
        await model.executor.held()  # at its first step, so that it cannot end before it is told to sleep
        sleeping = asyncio.create_task(engine.sleep())
        await asyncio.sleep(0)
        model.executor.go()
        with pytest.raises(EngineError, match="requests, 1 now"):
            await sleeping
        engine.cancel("r")
        await final(stream)
        await engine.sleep()
        await engine.sleep()
        assert (engine.is_sleeping, model.executor.asleep) == (True, True)
        steps = len(model.executor.steps)
        waiting = engine.submit("waits", [2] * 100, params_of(1, 5))
        leaves = engine.submit("leaves", [2], params_of(1, 5))
        engine.cancel("leaves")
        assert (await final(leaves)).outputs[0].finish_reason == "abort"
        assert len(model.executor.steps) == steps
        await engine.wake()
        await engine.wake()
        assert (engine.is_sleeping, model.executor.asleep) == (False, False)
        output = await final(waiting)
        assert output.outputs[0].token_ids == alone([2] * 100, 1, 5)
        assert output.num_cached_tokens == 0  # the cache was freed


@in_event_loop
async def test_it_sleeps_on_if_it_cannot_wake() -> None:
    model = make_engine()
    async with running(model) as engine:
        await engine.sleep()
        wake = model.executor.wake
        model.executor.wake = lambda: (_ for _ in ()).throw(MemoryError("none left"))
        with pytest.raises(MemoryError, match="none left"):
            await engine.wake()
        assert engine.is_sleeping
        waiting = engine.submit("waits", [2], params_of(1, 5))
        model.executor.wake = wake
        await engine.wake()
        assert (await final(waiting)).outputs[0].token_ids == alone([2], 1, 5)


@pytest.mark.parametrize("drain", [True, False])
@pytest.mark.parametrize("asleep", [True, False])
@in_event_loop
async def test_shutdown_drains_or_cancels(drain: bool, asleep: bool) -> None:
    model = make_engine(max_num_seqs=2)
    engine = AsyncEngine(model)
    if asleep:
        await engine.sleep()
    else:
        model.executor.hold()
    streams = [engine.submit(str(i), [i + 2], params_of(i, 20)) for i in range(5)]
    ending = asyncio.create_task(engine.shutdown(drain=drain))
    await asyncio.sleep(0)
    with pytest.raises(EngineError, match="shut down"):
        engine.submit("late", [2], params_of(1, 3))
    model.executor.go()
    await ending
    outputs = await asyncio.gather(*map(final, streams))
    reasons = {output.outputs[0].finish_reason for output in outputs}
    assert reasons == ({"length"} if drain and not asleep else {"abort"})
    assert not engine._thread.is_alive()
    assert model.blocks.num_allocated == 0
    with pytest.raises(EngineError, match="shut down"):
        await engine.sleep()
    engine.close()
    await engine.shutdown()


def test_two_event_loops_share_an_engine() -> None:
    model = make_engine(max_num_seqs=6)
    engine = AsyncEngine(model)
    tokens: dict[int, list[int]] = {}

    async def one(number: int) -> None:
        stream = engine.submit(str(number), [number + 2], params_of(number, 40))
        tokens[number] = (await final(stream)).outputs[0].token_ids

    async def main(first: int) -> None:
        await asyncio.gather(*map(one, range(first, first + 10)))

    threads = [threading.Thread(target=asyncio.run, args=(main(first),)) for first in (0, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    engine.close()
    assert tokens == {number: alone([number + 2], number, 40) for number in range(20)}
    assert not model.has_unfinished
    gc.collect()
    assert not engine._outboxes


def test_a_closed_event_loop_holds_nobody_up() -> None:
    model = make_engine()
    engine = AsyncEngine(model)
    left: list[Stream] = []

    async def leave() -> None:
        left.append(engine.submit("left", [2], params_of(1, 100)))
        await anext(left[0])

    async def stay() -> list[int]:
        return (await final(engine.submit("stays", [3], params_of(2, 50)))).outputs[0].token_ids

    asyncio.run(leave())
    assert asyncio.run(stay()) == alone([3], 2, 50)
    left.clear()
    engine.close()
    assert model.blocks.num_allocated == 0


@contextlib.contextmanager
def counted_work() -> Iterator[tuple[list[int], threading.Event]]:
    """Counts bytecode instructions of threads started within; yields (their number, whether to count)."""
    work, on = [0], threading.Event()

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if not on.is_set():
            return None
        frame.f_trace_opcodes = True
        work[0] += event == "opcode"
        return trace

    threading.settrace(trace)
    try:
        yield work, on
    finally:
        threading.settrace(None)  # type: ignore[arg-type]


def work_per_step(num_waiting: int) -> float:
    """How many instructions the engine's thread takes from one step to the next, the median of several."""

    async def main() -> float:
        model = make_engine(max_num_seqs=4)
        model.executor.keep = False
        with counted_work() as (work, on):
            async with running(model) as engine:
                await engine.sleep()
                streams = [engine.submit(f"runs {i}", [i + 2], params_of(i, 400)) for i in range(4)]
                streams += [engine.submit(f"waits {i}", [2], params_of(1, 20)) for i in range(num_waiting)]
                await until(lambda: len(model.requests) == num_waiting + 4)
                marks: list[int] = []
                model.executor.on_step = lambda: marks.append(work[0])
                on.set()
                await engine.wake()
                await until(lambda: len(marks) > 40)
                on.clear()
                for stream in streams:
                    stream.close()
            # Requests begin in the first ones.
            return median(after - before for before, after in pairwise(marks[2:40]))

    return asyncio.run(main())


def test_thousands_that_wait_cost_nothing() -> None:
    # They differ by a call or two, with how busy the event loop is; a glance at each of 5,000 would show.
    few, many = work_per_step(10), work_per_step(5000)
    assert 1000 < many < few + 500


@in_event_loop
async def test_an_idle_engine_does_nothing() -> None:
    with counted_work() as (work, on):
        async with running(make_engine()) as engine:
            await final(engine.submit("r", [2], params_of(1, 5)))
            await until(lambda: not engine._slots)
            await asyncio.sleep(0.01)
            on.set()
            before = time.thread_time(), work[0]
            await asyncio.sleep(0.2)
            assert work[0] == before[1]
            await final(engine.submit("again", [2], params_of(1, 5)))
            assert work[0] > before[1]


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter."""
    root = str(Path(__file__).parents[2])
    imports = "from tests.gated_engine import *; from hexad.errors import EngineError"
    code = f"import sys; sys.path.insert(0, {root!r}); {imports}\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("ending", ["pass", "sys.exit(3)", "raise KeyboardInterrupt"])
@pytest.mark.parametrize("busy", [True, False])
def test_exit_without_shutdown(ending: str, busy: bool) -> None:
    code = f"""
async def main():
    engine = AsyncEngine(make_engine(kv_blocks=4096, max_model_len=100_000))
    stream = engine.submit("r", [2], params_of(1, {90_000 if busy else 2}))
    async for output in stream:
        if {busy}:
            break
    print(engine._thread.is_alive(), flush=True)
    globals().update(stream=stream, engine=engine)
    {ending}
asyncio.run(main())
"""
    done = fresh(code)
    assert done.stdout == "True\n"
    if "Keyboard" in ending:
        assert done.stderr.rstrip().endswith("KeyboardInterrupt")
    else:
        assert (done.returncode, done.stderr) == (3 if "exit" in ending else 0, "")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_forked_child_is_told_that_it_has_no_engine() -> None:
    code = """
import os, warnings
warnings.simplefilter("ignore")
engine = AsyncEngine(make_engine())
child = os.fork()
async def main():
    try:
        print((await final(engine.submit("r", [2], params_of(1, 3)))).finished)
    except EngineError as error:
        print(error)
if child:
    assert os.waitpid(child, 0)[1] == 0
asyncio.run(main())
"""
    done = fresh(code)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "The engine's thread did not survive the fork; load the model in this process.",
        "True",
    ]


@in_event_loop
async def test_metrics_follow_the_requests() -> None:
    model = make_engine(max_num_seqs=2)
    async with running(model) as engine:

        def values(*names: str) -> list[Any]:
            found = {metric.name: metric for metric in engine.get_metrics()}
            return [found[f"hexad:{name}"].value for name in names]

        await engine.sleep()
        streams = [engine.submit(str(i), [i + 2] * 40, params_of(i, 4)) for i in range(5)]
        await until(lambda: len(model.requests) == 5)
        now = "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"
        assert values(*now) == [0, 5, 0]
        model.executor.hold()
        await engine.wake()
        await until(lambda: model.executor.in_step)
        assert values(*now) == [2, 3, 4 / 64]
        model.executor.go()
        await asyncio.gather(*map(final, streams))
        assert values(*now) == [0, 0, 0]
        assert values("prompt_tokens", "generation_tokens") == [200, 20]
