"""From ScheduledStep to the arrays of backends.backend."""

from __future__ import annotations

import numpy as np

from hexad.engine.step import SampleSpec, ScheduledSequence, ScheduledStep
from hexad.runner.batch import make_batch, make_sample_batch


def spec(**changes: float) -> SampleSpec:
    values = {
        "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "seed": 1, "sequence": 0, "position": 9,
    }  # fmt: skip
    return SampleSpec(**{**values, **changes})  # type: ignore[arg-type]


STEP = ScheduledStep(
    [
        ScheduledSequence("a", [5], 40, [7, 2], spec(seed=2**64 - 1, position=41)),
        ScheduledSequence("b", [1, 2, 3], 0, [4], None),
        ScheduledSequence("c", [8, 9], 63, [1, 3, 0], spec(temperature=0.0, top_k=-1, sequence=2**32 - 1)),
    ]
)


def test_rows_follow_the_sequences() -> None:
    batch = make_batch(STEP)
    np.testing.assert_array_equal(batch.tokens, [5, 1, 2, 3, 8, 9])
    np.testing.assert_array_equal(batch.row_starts, [0, 1, 4, 6])
    np.testing.assert_array_equal(batch.starts, [40, 0, 63])
    np.testing.assert_array_equal(batch.block_tables, [[7, 2, -1], [4, -1, -1], [1, 3, 0]])
    np.testing.assert_array_equal(batch.sample_rows, [0, 5])
    for array in (batch.tokens, batch.row_starts, batch.starts, batch.block_tables, batch.sample_rows):
        assert array.dtype == np.int32
        assert array.flags.c_contiguous


def test_sample_entries_follow_the_sample_rows() -> None:
    params = make_sample_batch(STEP)
    expected = {
        "temperature": ([0.5, 0.0], np.float32),
        "top_k": ([3, -1], np.int32),
        "top_p": ([0.9, 0.9], np.float32),
        "min_p": ([0.1, 0.1], np.float32),
        "seed": ([2**64 - 1, 1], np.uint64),
        "sequence": ([0, 2**32 - 1], np.uint32),
        "position": ([41, 9], np.uint32),
    }
    for field, (values, dtype) in expected.items():
        array = getattr(params, field)
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, np.array(values, dtype))


def test_nothing_to_sample() -> None:
    step = ScheduledStep([ScheduledSequence("b", [1, 2, 3], 0, [4], None)])
    assert make_batch(step).sample_rows.shape == (0,)
    assert make_batch(step).sample_rows.dtype == np.int32
    assert make_sample_batch(step).seed.shape == (0,)
