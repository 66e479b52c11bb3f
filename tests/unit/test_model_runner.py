"""ModelRunner: what it does with a step, and what it counts as memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tiny_models import dense, tiny_llama

from hexad.backends.backend import CompileOptions, Limits
from hexad.backends.cpu import CpuBackend
from hexad.backends.reference import ReferenceBackend
from hexad.checkpoint.checkpoint import Checkpoint
from hexad.config import EngineConfig
from hexad.engine.step import SampleSpec, ScheduledSequence, ScheduledStep
from hexad.errors import BackendError
from hexad.graph.fuse import fuse
from hexad.runner.model_runner import ModelRunner, make_backend, weight_bytes
from hexad.weights import F16, Q4_0, Q4_1, Q8_0


def greedy(position: int) -> SampleSpec:
    return SampleSpec(temperature=0, top_k=0, top_p=1, min_p=0, seed=0, sequence=0, position=position)


@pytest.fixture
def runner() -> ModelRunner:
    model = tiny_llama()
    checkpoint = Checkpoint(
        Path("tiny"), model.config, model.weights, lambda: pytest.fail("no text here"), lambda: None
    )
    return ModelRunner(checkpoint, EngineConfig(max_num_seqs=4), "reference")


PROMPT = [(7 * i + 3) % 160 for i in range(40)]


def test_tokens_stand_where_they_were_asked_for(runner: ModelRunner) -> None:
    whole = ScheduledSequence("a", PROMPT, 0, [3, 1], greedy(40))
    ((expected,),) = runner.execute(ScheduledStep([whole])).token_ids
    part = ScheduledSequence("b", PROMPT[:20], 0, [5], None)
    assert runner.execute(ScheduledStep([part])).token_ids == [[]]
    rest = ScheduledSequence("b", PROMPT[20:], 20, [5, 0], greedy(40))
    other = ScheduledSequence("c", [1, 2], 0, [9], None)
    assert runner.execute(ScheduledStep([other, rest])).token_ids == [[], [expected]]


def test_blocks_are_copied_before_anything_is_computed(runner: ModelRunner) -> None:
    runner.execute(ScheduledStep([ScheduledSequence("a", PROMPT, 0, [3, 1], None)]))
    last = ScheduledSequence("a", [9], 40, [3, 1], greedy(41))
    expected = runner.execute(ScheduledStep([last])).token_ids
    overwrite = ScheduledSequence("b", PROMPT[::-1], 0, [3, 1], None)
    copied = ScheduledSequence("a", [9], 40, [6, 8], greedy(41))
    step = ScheduledStep([overwrite, copied], block_copies=[(3, 6), (1, 8)])
    assert runner.execute(step).token_ids == [[], *expected]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_damaged_model_is_an_error_and_no_answer(backend: str) -> None:
    model = tiny_llama()
    weights = {**model.weights, "model.norm.weight": dense(np.full(64, np.nan, np.float32))}
    checkpoint = Checkpoint(
        Path("tiny"), model.config, weights, lambda: pytest.fail("no text here"), lambda: None
    )
    runner = ModelRunner(checkpoint, EngineConfig(max_num_seqs=4), backend)
    with pytest.raises(BackendError, match="not finite"):
        runner.execute(ScheduledStep([ScheduledSequence("a", PROMPT, 0, [3, 1], greedy(40))]))


def test_reference_runs_the_graph_as_written(runner: ModelRunner) -> None:
    assert not any(node.op.startswith("fused") for node in runner.graph.nodes)


@pytest.mark.parametrize("threads", [1, 16])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_planned_is_what_the_program_takes(tied: bool, threads: int) -> None:
    formats: Any = {"q_proj": Q4_0, "v_proj": Q8_0, "lm_head": Q8_0, "down_proj": F16}
    model = tiny_llama(tied=tied, format=Q4_1, formats=formats, vocab=130, intermediate=416, head_dim=40)
    graph, backend = fuse(model.graph()), CpuBackend()
    options, limits = CompileOptions(threads=threads), Limits(500, 8, 256, 8)
    program = backend.compile(graph, model.weights, options, limits).program
    assert sum(weight_bytes(graph, backend).values()) == program.weight_bytes
    planned = backend.workspace_bytes(graph, options, limits)
    assert program.workspace_bytes <= 1.01 * planned  # sizes are rounded here and there
    assert planned <= 1.1 * program.workspace_bytes


def test_weight_bytes_of_the_reference_are_float32() -> None:
    model = tiny_llama(format=Q4_1, vocab=130)
    sizes = weight_bytes(model.graph(), make_backend("reference"))
    assert sizes["model.embed_tokens.weight"] == 130 * 64 * 4
    assert sizes["model.norm.weight"] == 64 * 4


def test_kv_block_bytes() -> None:
    graph = tiny_llama(layers=3, kv_heads=2, head_dim=40, heads=4).graph()
    assert CpuBackend().kv_block_bytes(graph, "f16") == 3 * 2 * 2 * 32 * 64 * 2  # heads padded to 64
    assert CpuBackend().kv_block_bytes(fuse(graph), "f32") == 3 * 2 * 2 * 32 * 64 * 4
    assert ReferenceBackend().kv_block_bytes(graph, "f32") == 3 * 2 * 2 * 32 * 40 * 4
