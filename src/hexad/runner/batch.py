"""From a scheduled step to the ragged arrays a backend computes on."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import numpy as np

from hexad.backends.backend import Batch
from hexad.engine.step import ScheduledStep

NO_REPORTS: Mapping[int, range] = {}


def make_batch(step: ScheduledStep, reports: Mapping[int, range] = NO_REPORTS) -> Batch:
    """The rows of every sequence, one after another; wanted is each sequence's last row, as often as tokens
    are drawn from it.

    reports: positions, by the sequence's place in the step, of which something else is wanted: their rows
    come before the last one, or are the last one of a sequence that draws nothing.
    """
    # Lists until the end: a step sweeps the caches, after which each call into NumPy costs microseconds.
    row_ends = list(accumulate(step.counts))
    width = max(map(len, step.block_tables), default=0)
    blocks: list[int] = []
    for table in step.block_tables:
        blocks += table
        if len(table) < width:
            blocks += [-1] * (width - len(table))
    if reports:
        sample_rows: list[int] = []
        for place, (end, draws) in enumerate(zip(row_ends, step.draws, strict=True)):
            first_row = end - step.counts[place] - step.starts[place]  # of position 0
            sample_rows += [first_row + position for position in reports.get(place, ())]
            sample_rows += [end - 1] * len(draws)
    else:
        sample_rows = [end - 1 for end, draws in zip(row_ends, step.draws, strict=True) for _ in draws]
    optional_rows = sum(step.counts[len(step.counts) - step.optional :])
    if optional_rows and sample_rows and sample_rows[-1] >= row_ends[-1] - optional_rows:
        optional_rows = 0  # something is reported of them
    return Batch(
        tokens=np.array(step.tokens, np.int32),
        row_starts=np.array([0, *row_ends], np.int32),
        starts=np.array(step.starts, np.int32),
        block_tables=np.array(blocks, np.int32).reshape(len(row_ends), width),
        sample_rows=np.array(sample_rows, np.int32),
        optional_rows=optional_rows,
        expected_seconds=step.expected,
    )
