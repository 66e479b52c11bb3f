"""From a scheduled step to the ragged arrays a backend computes on."""

from __future__ import annotations

from itertools import chain

import numpy as np

from hexad.backends.backend import Batch, SampleBatch
from hexad.engine.step import ScheduledStep


def make_batch(step: ScheduledStep) -> Batch:
    """The rows of every sequence, one after another; one that samples wants the logits of its last row."""
    sequences = step.sequences
    row_starts = np.zeros(len(sequences) + 1, np.int32)
    np.cumsum([len(s.token_ids) for s in sequences], out=row_starts[1:])
    width = max((len(s.block_table) for s in sequences), default=0)
    block_tables = np.full((len(sequences), width), -1, np.int32)
    for row, sequence in zip(block_tables, sequences, strict=True):
        row[: len(sequence.block_table)] = sequence.block_table
    samples = np.array([s.sample is not None for s in sequences], bool)
    return Batch(
        tokens=np.fromiter(chain.from_iterable(s.token_ids for s in sequences), np.int32, step.num_tokens),
        row_starts=row_starts,
        starts=np.array([s.start for s in sequences], np.int32),
        block_tables=block_tables,
        sample_rows=row_starts[1:][samples] - np.int32(1),
    )


def make_sample_batch(step: ScheduledStep) -> SampleBatch:
    """One entry per sequence that samples, in the order of `Batch.sample_rows`."""
    specs = [s.sample for s in step.sequences if s.sample is not None]
    return SampleBatch(
        temperature=np.array([s.temperature for s in specs], np.float32),
        top_k=np.array([s.top_k for s in specs], np.int32),
        top_p=np.array([s.top_p for s in specs], np.float32),
        min_p=np.array([s.min_p for s in specs], np.float32),
        seed=np.array([s.seed for s in specs], np.uint64),
        sequence=np.array([s.sequence for s in specs], np.uint32),
        position=np.array([s.position for s in specs], np.uint32),
    )
