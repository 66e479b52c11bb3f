"""Sample batches from plain data, for the tests of every backend's sampler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hexad.backends.sampling import ROW_DTYPE, SAMPLER_IDS, SampleBatch
from hexad.params import DEFAULT_SAMPLERS

NEUTRAL: dict[str, Any] = {
    "seed": 1, "temperature": 1.0, "top_p": 1.0, "typical_p": 1.0, "top_n_sigma": -1.0, "xtc_threshold": 0.1,
    "repetition_penalty": 1.0, "repeat_last_n": -1,
    "dry_base": 1.75, "dry_allowed_length": 2, "dry_last_n": -1, "dry_breakers": -1,
    "dynatemp_exponent": 1.0, "mirostat_tau": 5.0, "mirostat_eta": 0.1, "mirostat_mu": 10.0,
    "mask": -1, "draw": 1, "num_logprobs": -1, "order": DEFAULT_SAMPLERS,
}  # fmt: skip
"""A row that draws from the plain distribution and reports nothing; fields not named here are 0."""


def make_batch(
    rows: Sequence[Mapping[str, Any]],
    vocab: int,
    history: Sequence[Sequence[int]] | None = None,
    bias: Sequence[Mapping[int, float]] | None = None,
    asks: Sequence[Sequence[int]] | None = None,
    masks: Sequence[Iterable[int]] = (),
) -> SampleBatch:
    """rows: what differs from NEUTRAL, by ROW_DTYPE's names, `order` as names of samplers. history, bias
    (token → what is added), asks: one per row. masks: the tokens in each; rows name a mask by its index.
    """
    table = np.zeros(len(rows), ROW_DTYPE)
    for row, given in zip(table, rows, strict=True):
        for name, value in (NEUTRAL | dict(given)).items():
            if name == "order":
                row["order"][: len(value)] = [SAMPLER_IDS[sampler] for sampler in value]
            else:
                row[name] = value
    history_ids, history_starts = _ragged(history, len(rows))
    bias_ids, bias_starts = _ragged(None if bias is None else [list(row) for row in bias], len(rows))
    ask_ids, ask_starts = _ragged(asks, len(rows))
    values = [value for row in bias or () for value in row.values()]
    return SampleBatch(
        rows=table,
        history=history_ids,
        history_starts=history_starts,
        bias_ids=bias_ids,
        bias_values=np.array(values, np.float32),
        bias_starts=bias_starts,
        ask_ids=ask_ids,
        ask_starts=ask_starts,
        masks=_masks(masks, vocab),
    )


def _ragged(lists: Sequence[Sequence[int]] | None, rows: int) -> tuple[np.ndarray, np.ndarray]:
    lists = [()] * rows if lists is None else lists
    assert len(lists) == rows
    starts = np.cumsum([0, *map(len, lists)], dtype=np.int64)
    return np.array([token for tokens in lists for token in tokens], np.int32), starts


def _masks(masks: Sequence[Iterable[int]], vocab: int) -> np.ndarray:
    words = np.zeros((len(masks), -(-vocab // 32)), np.uint32)
    for row, tokens in zip(words, masks, strict=True):
        for token in tokens:
            row[token // 32] |= np.uint32(1 << token % 32)
    return words
