"""Profiles: every op shows, the parts fit into the whole, and timing changes no number."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from tests.sampling import make_batch as make_sample_batch
from tests.tiny_models import make_batch, tiny_llama

from hexad.backends.backend import Batch, CompileOptions, Executable, Limits, OpTime
from hexad.backends.cpu import CpuBackend, CpuExecutable
from hexad.backends.reference import ReferenceBackend
from hexad.errors import BackendError
from hexad.graph import Graph
from hexad.graph.fuse import fuse
from hexad.weights import Q4_1

LAYERS = 3
LIMITS = Limits(max_rows=64, max_seqs=4, max_model_len=4096, kv_blocks=8)
# A prompt beside a stream, several tiles; then a stream alone.
BATCHES = [
    make_batch([(range(40), 0, [0, 5]), ([3], 70, [1, 2, 4])]),
    make_batch([([7], 40, [0, 5])]),
]


def compiled(threads: int = 2) -> tuple[Graph, CpuExecutable]:
    tiny = tiny_llama(format=Q4_1, layers=LAYERS)
    graph = fuse(tiny.graph())
    options = CompileOptions(threads=threads)
    return graph, CpuBackend().compile(graph, tiny.weights, options, LIMITS)


def steps(executable: Executable) -> list[Any]:
    found: list[Any] = []
    for batch in BATCHES:
        executable.forward(batch)
        found.append(executable.logits())
        found.append(executable.sample(wanted(batch)).tokens)
    return found


def wanted(batch: Batch) -> Any:
    return make_sample_batch([{"temperature": 0.9}] * len(batch.sample_rows), 160)


def test_timing_changes_no_number() -> None:
    _, plain = compiled()
    _, timed = compiled()
    timed.profile()
    for expected, found in zip(steps(plain), steps(timed), strict=True):
        assert np.array_equal(expected, found)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_op_shows_once_a_step(threads: int) -> None:
    graph, executable = compiled(threads)
    steps(executable)
    assert executable.profile().calls == OpTime()  # nothing before the first call of it
    steps(executable)
    profile = executable.profile()
    assert len(profile.nodes) == len(graph.nodes)
    for node, time in zip(graph.nodes, profile.nodes, strict=True):
        runs = 2 * len(BATCHES) if node.op == "fused_logits" else len(BATCHES)
        assert (node.op, time.runs) == (node.op, runs)
        assert time.barriers >= time.runs
        assert 0 <= time.waited <= time.seconds
        assert time.seconds > 0
    assert set(profile.others) == {"rope table", "sampling"}
    assert {time.runs for time in profile.others.values()} == {len(BATCHES)}
    parts = sum(time.seconds for time in (*profile.nodes, *profile.others.values()))
    assert 0 < parts <= profile.calls.seconds
    assert profile.calls.runs >= 3 * len(BATCHES)
    if threads == 1:
        assert sum(time.waited for time in profile.nodes) == 0
    else:
        assert sum(time.waited for time in profile.nodes) > 0


def test_barriers_of_a_layer() -> None:
    """One stream: one for each linear, whose activations every thread prepares for itself, and two for
    attention: keys are there before anybody attends."""
    graph, executable = compiled()
    executable.profile()
    executable.forward(BATCHES[1])
    barriers = {
        node.op: time.barriers for node, time in zip(graph.nodes, executable.profile().nodes, strict=True)
    }
    assert (barriers["fused_linear"], barriers["fused_attention"]) == (1, 2)


def test_a_refused_call_is_no_run() -> None:
    _, executable = compiled()
    executable.profile()
    with pytest.raises(BackendError):
        executable.sample(wanted(BATCHES[0]))  # of a forward that never was
    profile = executable.profile()
    assert all(time == OpTime() for time in (*profile.nodes, *profile.others.values()))


def test_the_reference_has_one_too() -> None:
    model = tiny_llama()
    graph = model.graph()
    executable = ReferenceBackend().compile(graph, model.weights, CompileOptions(), LIMITS)
    for batch in BATCHES:
        executable.forward(batch)
        executable.sample(wanted(batch))
    profile = cast(Executable, executable).profile()
    assert [time.runs for time in profile.nodes] == [len(BATCHES)] * len(graph.nodes)
    assert profile.calls.seconds >= sum(time.seconds for time in profile.nodes) > 0
