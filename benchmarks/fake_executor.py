"""An executor that computes nothing, to measure the engine alone."""

from __future__ import annotations

import time

from hexad.config import EngineConfig
from hexad.engine.engine import Engine
from hexad.engine.step import ScheduledStep, StepCost, StepResult
from hexad.params import PoolingParams, SamplingParams

TOKEN = 5
VOCAB_SIZE = 1000
EOS = 2


class FakeExecutor:
    """Draws TOKEN wherever a token is wanted. seconds: that it has taken so far. last: the latest step."""

    step_cost = StepCost(100_000_000, 100_000_000, 30_000_000, 20_000, 20_000)

    def __init__(self) -> None:
        self.seconds = 0.0
        self.last = ScheduledStep()

    def check(self, params: SamplingParams | PoolingParams) -> None:
        pass

    def execute(self, step: ScheduledStep) -> StepResult:
        begin = time.perf_counter()
        self.last = step
        result = StepResult([[TOKEN] * len(draws) for draws in step.draws])
        self.seconds += time.perf_counter() - begin
        return result

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass


class NoText:
    """A TextStream for those who do not detokenise."""

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def make_engine(
    executor: FakeExecutor, config: EngineConfig, *, max_model_len: int, kv_blocks: int
) -> Engine:
    """An engine on it."""
    return Engine(
        executor,
        config,
        max_model_len=max_model_len,
        kv_blocks=kv_blocks,
        vocab_size=VOCAB_SIZE,
        eos_ids=frozenset({EOS}),
        new_stream=lambda params: NoText(),
        token_text=str,
    )
