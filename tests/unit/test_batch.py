"""From ScheduledStep to the arrays of backends.backend."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hexad.engine.step import ScheduledStep
from hexad.runner.batch import make_batch

STEP = ScheduledStep(
    sequence_ids=[7, 3, 9],
    counts=[1, 3, 2],
    starts=[40, 0, 63],
    tokens=[5, 1, 2, 3, 8, 9],
    block_tables=[[7, 2], [4], [1, 3, 0]],
    draws=[(7,), (), (9, 11, 12)],
)


def test_rows_follow_the_sequences() -> None:
    batch = make_batch(STEP)
    np.testing.assert_array_equal(batch.tokens, [5, 1, 2, 3, 8, 9])
    np.testing.assert_array_equal(batch.row_starts, [0, 1, 4, 6])
    np.testing.assert_array_equal(batch.starts, [40, 0, 63])
    np.testing.assert_array_equal(batch.block_tables, [[7, 2, -1], [4, -1, -1], [1, 3, 0]])
    for array in (batch.tokens, batch.row_starts, batch.starts, batch.block_tables, batch.sample_rows):
        assert array.dtype == np.int32
        assert array.flags.c_contiguous


def test_a_row_is_wanted_as_often_as_it_is_drawn_from() -> None:
    np.testing.assert_array_equal(make_batch(STEP).sample_rows, [0, 5, 5, 5])


def test_reports_come_before_draws() -> None:
    batch = make_batch(STEP, {1: range(1, 3), 2: range(63, 64)})
    np.testing.assert_array_equal(batch.sample_rows, [0, 2, 3, 4, 5, 5, 5])
    assert batch.sample_rows.dtype == np.int32


def test_optional_sequences_are_the_last_rows_unless_something_is_reported_of_them() -> None:
    step = replace(STEP, draws=[(7,), (), ()], optional=2, expected=0.5)
    batch = make_batch(step)
    assert (batch.optional_rows, batch.expected_seconds) == (5, 0.5)
    assert make_batch(step, {2: range(63, 64)}).optional_rows == 0
    assert make_batch(replace(step, optional=1), {1: range(1, 2)}).optional_rows == 2
    assert make_batch(STEP).optional_rows == 0


def test_nothing_is_wanted() -> None:
    step = ScheduledStep([3], [3], [0], [1, 2, 3], [[4]], [()])
    assert make_batch(step).sample_rows.shape == (0,)
    assert make_batch(step).sample_rows.dtype == np.int32
