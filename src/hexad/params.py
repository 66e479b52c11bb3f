"""SamplingParams: how one request is turned into tokens."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from hexad.checks import check_integer, check_number
from hexad.errors import ParamsError

GREEDY_EPSILON = 1e-5
"""Temperatures below this mean greedy decoding, as in vLLM."""

MIN_TEMPERATURE = 0.01
"""Temperatures above 0 are raised to at least this, as in vLLM."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Parameters of one request. Names, defaults and rules are vLLM's.

    temperature: 0 … 2. With 0 decoding is greedy, and top_k, top_p and min_p have no effect; between 0 and
        0.01 it is raised to 0.01, with a warning.
    top_k: keep the k most likely tokens, at most 2**31 - 1; 0 and -1 keep all.
    top_p: keep the smallest set of tokens whose probabilities reach top_p, in (0, 1].
    min_p: drop tokens less likely than min_p × the most likely one, in [0, 1].
    seed: fixes the random numbers of this request, 0 … 2**64 - 1; None and -1 draw a fresh seed.
    max_tokens: most tokens to generate; None means up to the end of the context.
    ignore_eos: go on past end-of-generation tokens (for benchmarks).

    Raises ParamsError naming the field, its value and the range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        check_number(ParamsError, "temperature", self.temperature, "between 0 and 2", lambda v: 0 <= v <= 2)
        check_integer(
            ParamsError, "top_k", self.top_k, "an integer from -1 to 2**31 - 1", lambda v: -1 <= v < 2**31
        )
        check_number(ParamsError, "top_p", self.top_p, "above 0 and at most 1", lambda v: 0 < v <= 1)
        check_number(ParamsError, "min_p", self.min_p, "between 0 and 1", lambda v: 0 <= v <= 1)
        if self.seed is not None:
            check_integer(
                ParamsError, "seed", self.seed, "None or an integer from -1 to 2**64 - 1",
                lambda v: -1 <= v < 2**64,
            )  # fmt: skip
        if self.max_tokens is not None:
            check_integer(ParamsError, "max_tokens", self.max_tokens, "None or at least 1", lambda v: v >= 1)
        if 0 < self.temperature < MIN_TEMPERATURE:
            logger.warning("temperature %s is raised to %s; 0 is greedy.", self.temperature, MIN_TEMPERATURE)
            object.__setattr__(self, "temperature", MIN_TEMPERATURE)
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
