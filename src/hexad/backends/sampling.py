"""What a backend's `sample` is given and gives back. `reference_sampler` defines how tokens are drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SAMPLER_IDS = {
    "penalties": 1, "dry": 2, "temperature": 3, "top_n_sigma": 4, "typical_p": 5, "min_p": 6, "top_k": 7,
    "top_p": 8, "xtc": 9,
}  # fmt: skip
"""Numbers of the samplers in ROW_DTYPE's `order`; 0 ends it."""

ROW_DTYPE = np.dtype(
    [
        ("seed", np.uint64),
        ("position", np.uint32),  # of the token being drawn; keys the random numbers, too
        ("sequence", np.uint32),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("typical_p", np.float32),
        ("top_n_sigma", np.float32),
        ("xtc_probability", np.float32),
        ("xtc_threshold", np.float32),
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("dry_multiplier", np.float32),
        ("dry_base", np.float32),
        ("mirostat_tau", np.float32),
        ("mirostat_eta", np.float32),
        ("mirostat_mu", np.float32),
        ("dynatemp_range", np.float32),
        ("dynatemp_exponent", np.float32),
        ("top_k", np.int32),
        ("repeat_last_n", np.int32),
        ("num_prompt", np.int32),  # how many of the history's tokens are prompt
        ("dry_allowed_length", np.int32),
        ("dry_last_n", np.int32),
        ("dry_breakers", np.int32),  # row of `masks` that holds the breakers; -1: none
        ("mirostat", np.int32),
        ("mask", np.int32),  # row of `masks` that holds the tokens that may be drawn; -1: all
        ("draw", np.int32),  # 1: draw a token; 0: only report
        ("num_logprobs", np.int32),  # likeliest tokens to report; -1: not even the drawn one
        ("order", np.uint8, (12,)),
    ]
)
"""A sample row's parameters; csrc/sampler.h has the same struct. See SamplingParams for the fields."""


@dataclass(frozen=True, slots=True)
class SampleBatch:
    """What is wanted of each sample row of a forward pass. A row that wants nothing costs no logits.

    rows: ROW_DTYPE [n]. Ragged arrays, row i having [starts[i], starts[i + 1]), starts int64 [n + 1]: history
    int32: the tokens before the one being drawn, for rows with penalties or DRY; others may have none.
    bias_ids int32, bias_values float32: added to logits before anything else; −inf forbids a token. ask_ids
    int32: tokens whose logprob and rank are wanted. masks: uint32 [m, ⌈vocab / 32⌉], bit t % 32 of word t //
    32 for token t.
    """

    rows: NDArray[np.void]
    history: NDArray[np.int32]
    history_starts: NDArray[np.int64]
    bias_ids: NDArray[np.int32]
    bias_values: NDArray[np.float32]
    bias_starts: NDArray[np.int64]
    ask_ids: NDArray[np.int32]
    ask_starts: NDArray[np.int64]
    masks: NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class SampleOutput:
    """tokens int32 [n]: the tokens drawn; −1 where none can be (no finite logit is left), and where draw is
    0.

    mirostat_mu float32 [n]: for the next draw of the same sequence. logprobs float32 [n], ranks int32 [n]: of
    the tokens drawn, where num_logprobs ≥ 0. top_ids int32, top_logprobs float32 [n, largest num_logprobs]:
    the likeliest tokens first, row i filled up to its own num_logprobs. ask_logprobs float32, ask_ranks
    int32, like ask_ids. Logprobs are those of the logits as the model gave them, log softmax; a rank is 1 +
    the number of larger logits.
    """

    tokens: NDArray[np.int32]
    mirostat_mu: NDArray[np.float32]
    logprobs: NDArray[np.float32]
    ranks: NDArray[np.int32]
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]
    ask_logprobs: NDArray[np.float32]
    ask_ranks: NDArray[np.int32]
