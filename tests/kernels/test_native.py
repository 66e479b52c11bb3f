"""The native layer takes nothing on trust: what contradicts itself is a BackendError, never a crash."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.sampling import make_batch as make_sample_batch
from tests.tiny_models import limits_for, make_batch, one_sequence, tiny_llama

from hexad import _native
from hexad.backends.backend import Batch, CompileOptions, Limits
from hexad.backends.cpu import CpuBackend, CpuExecutable
from hexad.backends.sampling import SampleBatch
from hexad.errors import BackendError
from hexad.graph.fuse import fuse
from hexad.weights import Q4_1

LIMITS = Limits(max_rows=64, max_seqs=4, max_model_len=4096, kv_blocks=8)
GOOD = make_batch([(range(40), 0, [0, 5]), ([3], 70, [1, 2, 4])])


def compiled(threads: int = 2, limits: Limits = LIMITS, isa: str | None = None) -> CpuExecutable:
    model = tiny_llama(format=Q4_1)
    return CpuBackend(isa).compile(
        fuse(model.graph()), model.weights, CompileOptions(threads=threads), limits
    )


def ints(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


BAD = {
    "token past the vocabulary": {"tokens": np.append(np.arange(40), 160).astype(np.int32)},
    "negative token": {"tokens": np.append(np.arange(40), -1).astype(np.int32)},
    "too many rows": {"tokens": np.zeros(65, np.int32), "row_starts": ints(0, 40, 65)},
    "no rows": {
        "tokens": ints(), "row_starts": ints(0), "starts": ints(), "block_tables": np.zeros((0, 1), np.int32),
    },
    "an empty sequence": {"row_starts": ints(0, 41, 41)},
    "rows left over": {"row_starts": ints(0, 40, 40)},
    "rows that do not exist": {"row_starts": ints(0, 40, 42)},
    "first row is not 0": {"row_starts": ints(1, 40, 41)},
    "falling row starts": {"row_starts": ints(0, 45, 41)},
    "row starts far beyond the rows": {
        "row_starts": ints(0, 10_000_000, 41), "block_tables": np.zeros((2, 400_000), np.int32),
    },
    "negative row starts": {"row_starts": ints(0, -5, 41)},
    "too few row starts": {"row_starts": ints(0, 41)},
    "too many sequences": {
        "tokens": np.zeros(5, np.int32), "row_starts": np.arange(6, dtype=np.int32),
        "starts": np.zeros(5, np.int32), "block_tables": np.arange(5, dtype=np.int32)[:, None],
    },
    "negative start": {"starts": ints(0, -1)},
    "start past the block table": {"starts": ints(0, 96)},
    "start near the end of int32": {"starts": ints(0, 2**31 - 1)},
    "block past the pool": {"block_tables": ints([0, 8, -1], [1, 2, 4])},
    "missing block": {"block_tables": ints([0, -1, -1], [1, 2, 4])},
    "huge block": {"block_tables": ints([0, 2**31 - 1, -1], [1, 2, 4])},
    "one block table for two": {"block_tables": ints([0, 1, 2])},
    "empty block tables": {"block_tables": np.zeros((2, 0), np.int32)},
    "sample row past the batch": {"sample_rows": ints(39, 41)},
    "negative sample row": {"sample_rows": ints(-1, 40)},
    "falling sample rows": {"sample_rows": ints(40, 39)},
    "more sample rows than are planned for": {"sample_rows": np.zeros(65, np.int32)},
    "int64 tokens": {"tokens": np.zeros(41, np.int64)},
    "float tokens": {"tokens": np.zeros(41, np.float32)},
    "two-dimensional tokens": {"tokens": np.zeros((41, 1), np.int32)},
    "flat block tables": {"block_tables": ints(0, 1)},
    "strided tokens": {"tokens": np.zeros(82, np.int32)[::2]},
    "fortran block tables": {"block_tables": np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3))},
}  # fmt: skip


@pytest.mark.parametrize("wrong", BAD.values(), ids=[name.replace(" ", "-") for name in BAD])
def test_bad_batch(wrong: dict[str, np.ndarray]) -> None:
    executable = compiled()
    executable.forward(GOOD)
    before = executable.logits()
    with pytest.raises(BackendError):
        executable.forward(replace(GOOD, **wrong))
    executable.forward(GOOD)
    assert np.array_equal(executable.logits(), before)


@pytest.mark.parametrize("field", fields(SampleBatch), ids=lambda field: field.name)
def test_bad_sampling_parameters(field: Any) -> None:
    """Arrays of another length, type or shape; tests/kernels/test_sampler.py has wrong contents."""
    executable = compiled()
    executable.forward(GOOD)
    good = make_sample_batch([{"mask": 0}, {}], 160, [[1], [2]], [{3: 1.0}, {4: 1.0}], [[5], [6]], [[7]])
    executable.sample(good)
    array = getattr(good, field.name)
    wrong = [array[:0], array.repeat(2)]
    if array.dtype.names is None:
        wrong.append(array.astype(np.float64))
    for other in wrong:
        with pytest.raises(BackendError):
            executable.sample(replace(good, **{field.name: other}))


@pytest.mark.parametrize("copy", [(-1, 0), (0, 8), (8, 0), (0, -1), (2**40, 0)])
def test_bad_block_copy(copy: tuple[int, int]) -> None:
    executable = compiled()
    with pytest.raises(BackendError):
        executable.copy_blocks([copy])


def test_bad_output_array() -> None:
    executable = compiled()
    executable.forward(GOOD)
    for out in (np.empty((3, 160), np.float32), np.empty((2, 159), np.float32), np.empty(320, np.float32)):
        with pytest.raises((ValueError, TypeError)):
            executable.program.logits(out)
    with pytest.raises((ValueError, TypeError)):
        executable.program.logits(np.empty((2, 160), np.float64))


@pytest.mark.parametrize(
    "wrong", [{"max_rows": 0}, {"max_seqs": -1}, {"kv_blocks": 0}, {"kv_blocks": -(2**40)}]
)
def test_bad_limits(wrong: dict[str, int]) -> None:
    with pytest.raises(BackendError):
        compiled(limits=replace(LIMITS, **wrong))


@pytest.mark.parametrize("threads", [-1, 5000])
def test_bad_threads(threads: int) -> None:
    with pytest.raises(BackendError, match="threads"):
        compiled(threads=threads)


def test_unknown_isa() -> None:
    with pytest.raises(BackendError, match=r"'mmx'.*generic.*HEXAD_ISA"):
        compiled(isa="mmx")


def program(**settings: Any) -> _native.Program:
    defaults = {"isa": "", "threads": 1, "quantised": True, "kv_dtype": "f16"}
    return _native.Program(**{**defaults, "max_rows": 8, "max_seqs": 1, "kv_blocks": 1, **settings})


def test_bad_weights() -> None:
    p = program()
    for stored, rows, columns in (
        ("Q4_1", 4, 33), ("Q4_1", 0, 32), ("F32", -1, 4), ("F32", 4, 0), ("Q9_9", 4, 32), ("F32", 2**31, 1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r".+"):
            p.add_weight(stored, rows, columns)


def with_a_weight() -> _native.Program:
    """A program that wants a Q4_1 weight of 4 × 64, which has 160 bytes."""
    p = program()
    p.op_embed(p.add_weight("Q4_1", 4, 64), p.add_buffer(64))
    p.seal()
    return p


def test_bad_sources(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(8 + 160))
    fine = np.zeros(160, np.uint8)
    with file.open("rb") as opened:
        fd = opened.fileno()
        for sources in (
            [],
            [fine, fine],
            [np.zeros(159, np.uint8)],
            [np.zeros(161, np.uint8)],
            [(fd, -1, None)],
            [(fd, 2**60, None)],
            [(fd, 8, np.arange(3))],
            [(fd, 8, np.array([0, 1, 2, 4]))],
            [(fd, 8, np.array([0, 1, 2, -1]))],
        ):
            with pytest.raises(ValueError, match=r".+"):
                with_a_weight().pack(sources)
        for wrong in (None, "", np.zeros(160, np.int8), (fd, 8), (fd, 8, np.zeros(4, np.int32))):
            with pytest.raises((TypeError, RuntimeError)):
                with_a_weight().pack([wrong])  # type: ignore[list-item]
        with pytest.raises(OSError, match="ends") as short:
            with_a_weight().pack([(fd, 9, None)])
        assert short.value.filename == fd
        with_a_weight().pack([(fd, 8, np.arange(4)[::-1].copy())])
    with pytest.raises(OSError, match="descriptor"):
        with_a_weight().pack([(fd, 8, None)])
    p = with_a_weight()
    p.pack([fine])
    with pytest.raises(ValueError, match="once"):
        p.pack([fine])


def test_weights_come_before_use() -> None:
    p = with_a_weight()
    ids = np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="no weights yet"):
        p.forward(ids, np.array([0, 1], np.int32), ids, ids.reshape(1, 1), ids[:0])


def test_ops_that_do_not_fit() -> None:
    p = program()
    table = p.add_weight("F32", 10, 16)
    x, y, narrow = p.add_buffer(16), p.add_buffer(16), p.add_buffer(8)
    scale = p.add_vector(np.ones(16, np.float32))
    rope, head_scale = p.add_rope(np.ones(4, np.float32), 1.0), p.add_vector(np.ones(8, np.float32))
    p.set_cache(1, 1, 8)
    attention = {
        "q": x, "q_column": 0, "k": x, "k_column": 0, "v": x, "v_column": 8, "rope": -1, "q_norm": -1,
        "k_norm": -1, "norm_eps": 0.0, "layer": 0, "heads": 1, "kv_heads": 1, "head_dim": 8, "scale": 1.0,
        "window": 0, "out": narrow,
    }  # fmt: skip
    calls = [
        lambda: p.op_embed(table, narrow),
        lambda: p.op_embed(table, 99),
        lambda: p.op_embed(7, x),
        lambda: p.op_norm(x, 5, 1e-5, 1, y),
        lambda: p.op_norm(narrow, scale, 1e-5, 1, narrow),
        lambda: p.op_norm(x, scale, 1e-5, 2, y),
        lambda: p.op_norm(x, head_scale, 1e-5, 1, y),
        lambda: p.op_norm(x, head_scale, 1e-5, 3, y),
        lambda: p.op_norm(x, scale, 1e-5, 0, y),
        lambda: p.op_linear(x, -1, 0.0, [], "store", -1, y),
        lambda: p.op_linear(x, -1, 0.0, [(table, -1)], "store", -1, y),
        lambda: p.op_linear(x, -1, 0.0, [(table, -1)], "multiply", -1, y),
        lambda: p.op_linear(x, -1, 0.0, [(table, scale)], "store", -1, y),
        lambda: p.op_linear(narrow, -1, 0.0, [(table, -1)], "store", -1, y),
        lambda: p.op_linear(x, -1, 0.0, [(table, -1)], "gated", -1, y),
        lambda: p.op_rope(x, rope, 5, y),
        lambda: p.op_rope(x, rope, 4, y),
        lambda: p.op_rope(x, 3, 8, y),
        lambda: p.op_gated(x, narrow, y),
        lambda: p.op_add(x, y, narrow),
        lambda: p.op_take_rows(x, x),
        lambda: p.op_logits(x, -1, 0.0, table),  # before take_rows
        *(
            lambda wrong=wrong: p.op_attention(**{**attention, **wrong})
            for wrong in (
                {"layer": 1}, {"heads": 3}, {"kv_heads": 2}, {"v_column": 9}, {"q_column": -1}, {"out": x},
                {"head_dim": 16}, {"rope": 4}, {"heads": 0}, {"q": 44}, {"window": -1},
                {"q_norm": 9}, {"k_norm": scale}, {"rope": rope}, {"q_norm": head_scale},  # q and k overlap
            )
        ),
        lambda: p.forward(*(getattr(one_sequence([1]), name) for name in Batch.__slots__)),  # not sealed
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match=r".+"):
            call()
    p.op_attention(**attention)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads(threads: int) -> None:
    executable = compiled(threads)
    assert executable.program.threads == threads
    executable.forward(GOOD)
    expected = compiled(1)
    expected.forward(GOOD)
    assert np.array_equal(executable.logits(), expected.logits())


FORK = """
import os, sys
import numpy as np
from tests.kernels.test_native import GOOD, compiled

for threads in (1, 2, 8):
    executable = compiled(threads)
    executable.forward(GOOD)
    expected = executable.logits()
    for _ in range(2):
        child = os.fork()
        executable.forward(GOOD)  # parent and child go on, each with members of its own
        same = np.array_equal(executable.logits(), expected)
        if child == 0:
            os._exit(0 if same else 1)
        _, status = os.waitpid(child, 0)
        assert same and status == 0, (threads, same, status)
    child = os.fork()
    if child == 0:  # never runs it, but frees it
        del executable
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
print("done")
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system has no fork")
def test_fork() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "done\n", done.stderr


def test_limits_are_filled_exactly() -> None:
    """As many rows, sequences and blocks as were planned for."""
    limits = limits_for(batch_rows=64, seqs=4, kv_blocks=4)
    executable = compiled(limits=limits)
    batch = make_batch(
        [(range(29), 0, [3]), (range(32), 0, [1]), ([5], 31, [0]), ([9, 9], 0, [2])], sample="all"
    )
    executable.forward(batch)
    assert np.isfinite(executable.logits()).all()
    assert executable.logits().shape == (64, 160)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be bound here")
def test_threads_that_part_may_go_anywhere_afterwards() -> None:
    """Those that find themselves on one CPU leave it, but are bound to none."""
    before = {int(task.name) for task in Path("/proc/self/task").iterdir()}
    executable = compiled(8)
    expected = compiled(1)
    expected.forward(GOOD)
    added = [int(task.name) for task in Path("/proc/self/task").iterdir() if int(task.name) not in before]
    assert len(added) == 7
    allowed = os.sched_getaffinity(0)
    for _ in range(20):
        for thread in (0, *added):  # all on one, and free to leave it
            os.sched_setaffinity(thread, {min(allowed)})
            os.sched_setaffinity(thread, allowed)
        executable.forward(GOOD)
        assert np.array_equal(executable.logits(), expected.logits())
        assert all(os.sched_getaffinity(thread) == allowed for thread in (0, *added))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be bound here")
def test_threads_stay_on_their_cpus_during_runs() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    cpus = [[allowed[0]], [allowed[-1]], allowed]

    def of_threads() -> list[set[int]]:
        threads = [int(task.name) for task in Path("/proc/self/task").iterdir()]
        return [os.sched_getaffinity(thread) for thread in threads if thread not in before]

    before = {int(task.name) for task in Path("/proc/self/task").iterdir()}
    settings: dict[str, Any] = {
        "isa": "", "quantised": True, "kv_dtype": "f32", "max_rows": 1, "max_seqs": 1, "kv_blocks": 1,
    }  # fmt: skip
    program = _native.Program(threads=3, cpus=cpus, **settings)
    program.op_embed(program.add_weight("F32", 320, 32), program.add_buffer(32))
    program.seal()
    program.pack([np.zeros(320 * 32 * 4, np.uint8)])  # a run: all have begun
    assert sorted(map(sorted, of_threads())) == sorted(cpus[1:])
    assert os.sched_getaffinity(0) == set(allowed)  # the caller is free again
    del program
    with pytest.raises(ValueError, match="CPUs of 3 threads for a team of 2"):
        _native.Program(threads=2, cpus=cpus, **settings)


def test_members_that_stay_out_change_nothing() -> None:
    """Eight threads wait for each other's CPUs wherever there are fewer: some are left out of runs, and
    taken in again (csrc/thread_team.h)."""
    alone, crowd = compiled(1), compiled(8)
    alone.forward(GOOD)
    expected = alone.logits()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        crowd.forward(GOOD)
        assert np.array_equal(crowd.logits(), expected)
