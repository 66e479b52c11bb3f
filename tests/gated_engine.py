"""An engine in a thread whose steps a test can stop, for tests of AsyncEngine."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from tests.fake_executor import FakeExecutor, FakeStream, generate_alone

from hexad.config import EngineConfig
from hexad.engine.async_engine import AsyncEngine, Stream
from hexad.engine.engine import Engine
from hexad.engine.step import ScheduledStep, StepResult
from hexad.outputs import RequestOutput
from hexad.params import SamplingParams

VOCAB = 50
EOS = frozenset({1})
PATIENCE = 30.0


class GatedExecutor(FakeExecutor):
    """Its steps pass a gate. `allocated`: blocks held at each of them; each calls `on_step` as it begins."""

    def __init__(self, *, kv_blocks: int) -> None:
        super().__init__(kv_blocks=kv_blocks, vocab_size=VOCAB)
        self.allocated: list[int] = []
        self.engine: Engine
        self.on_step: Callable[[], None] = lambda: None
        self.in_step = False
        self._open = True
        self._gate = threading.Condition()

    def hold(self) -> None:
        """Closes the gate."""
        with self._gate:
            self._open = False

    def go(self) -> None:
        """Opens it."""
        with self._gate:
            self._open = True
            self._gate.notify_all()

    async def held(self) -> None:
        """Closes the gate and waits until a step stands before it."""
        self.hold()
        await until(lambda: self.in_step)

    def execute(self, step: ScheduledStep) -> StepResult:
        self.allocated.append(self.engine.blocks.num_allocated)
        self.on_step()
        with self._gate:
            self.in_step = True
            assert self._gate.wait_for(lambda: self._open, PATIENCE)
            self.in_step = False
        return super().execute(step)

    def sleep(self) -> None:
        # It hears of those that have ended with the next step only.
        specs, self.specs = self.specs, {}
        super().sleep()
        self.specs = specs


def in_event_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Makes an ordinary test of an asynchronous one."""

    @functools.wraps(test)
    def run(*args: Any, **options: Any) -> None:
        asyncio.run(test(*args, **options))

    return run


def make_engine(*, kv_blocks: int = 64, max_model_len: int = 512, **settings: Any) -> Engine:
    executor = GatedExecutor(kv_blocks=kv_blocks)
    executor.engine = Engine(
        executor,
        EngineConfig(**settings),
        max_model_len=max_model_len,
        kv_blocks=kv_blocks,
        vocab_size=VOCAB,
        eos_ids=EOS,
        new_stream=lambda params: FakeStream(),
        token_text=lambda token_id: f"<{token_id}>",
    )
    return executor.engine


@contextlib.asynccontextmanager
async def running(engine: Engine) -> AsyncIterator[AsyncEngine]:
    """The engine in its thread. At the end, nothing of any request is left."""
    async_engine = AsyncEngine(engine)
    try:
        yield async_engine
    finally:
        engine.executor.go()
        await async_engine.shutdown()
    assert not engine.has_unfinished
    assert engine.blocks.num_allocated == 0
    assert not async_engine._slots


def params_of(seed: int, max_tokens: int, **fields: Any) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=max_tokens, ignore_eos=True, **fields)


def alone(prompt: list[int], seed: int, max_tokens: int) -> list[int]:
    """The tokens that such a request comes to by itself."""
    max_len = len(prompt) + max_tokens
    return generate_alone(prompt, seed=seed, max_len=max_len, stop_ids=frozenset(), vocab_size=VOCAB)[0]


async def final(stream: Stream) -> RequestOutput:
    """The last output of a stream."""
    output = [output async for output in stream][-1]
    assert isinstance(output, RequestOutput)
    assert output.finished
    return output


async def until(condition: Callable[[], bool]) -> None:
    """Waits for what the engine's thread is about to do."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)
