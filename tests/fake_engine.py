"""Engines over the fake executor, and what may be asked of their steps."""

from __future__ import annotations

from typing import Any

from tests.fake_executor import FakeExecutor, FakeStream, generate_alone

from hexad.config import EngineConfig
from hexad.engine.engine import Engine
from hexad.engine.request import Request
from hexad.engine.step import ScheduledStep, StepCost

VOCAB = 1000


def make_engine(
    *,
    kv_blocks: int = 64,
    max_model_len: int = 256,
    vocab_size: int = VOCAB,
    eos_ids: frozenset[int] = frozenset(),
    cost: StepCost | None = None,
    **settings: Any,
) -> Engine:
    """An engine whose pace keeps to its first guess: how fast this machine is makes no difference."""
    executor = FakeExecutor(kv_blocks=kv_blocks, vocab_size=vocab_size)
    executor.step_cost = cost or executor.step_cost
    engine = Engine(
        executor,
        EngineConfig(**settings),
        max_model_len=max_model_len,
        kv_blocks=kv_blocks,
        vocab_size=vocab_size,
        eos_ids=eos_ids,
        new_stream=lambda params: FakeStream(),
        token_text=lambda token_id: f"<{token_id}>",
    )
    engine.scheduler.pace.end = lambda seconds: None
    return engine


def finish(engine: Engine) -> None:
    """Steps until nothing is left; all blocks must be free then."""
    for _ in range(100_000):
        if not engine.has_unfinished:
            break
        engine.step()
    assert not engine.has_unfinished
    assert engine.blocks.num_allocated == 0
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (0, 0)


def shares(step: ScheduledStep) -> dict[int, tuple[int, int]]:
    """Sequence id → (start, count)."""
    return dict(zip(step.sequence_ids, zip(step.starts, step.counts, strict=True), strict=True))


def assert_as_alone(request: Request, vocab_size: int = VOCAB) -> None:
    """Every sequence of a finished request (with seed and max_tokens, without stops) is as it is alone."""
    prompt, params = request.prompt_token_ids, request.params
    outputs = request.output().outputs
    assert [output.index for output in outputs] == list(range(params.n))
    for output in outputs:
        tokens, reason = generate_alone(
            prompt, seed=params.seed, max_len=len(prompt) + params.max_tokens, stop_ids=frozenset(),
            vocab_size=vocab_size, index=output.index,
        )  # fmt: skip
        assert (output.token_ids, output.finish_reason) == (tokens, reason)
