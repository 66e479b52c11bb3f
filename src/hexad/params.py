"""SamplingParams: how one request is turned into tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hexad.errors import ParamsError

GREEDY_EPSILON = 1e-5
"""Temperatures below this mean greedy decoding, as in vLLM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Parameters of one request. Names, defaults and rules are vLLM's.

    temperature: 0 … 2; below 1e-5 decoding is greedy and top_k, top_p and min_p have no effect.
    top_k: keep the k most likely tokens; 0 and -1 keep all.
    top_p: keep the smallest set of tokens whose probabilities reach top_p, in (0, 1].
    min_p: drop tokens less likely than min_p × the most likely one, in [0, 1].
    seed: fixes the random numbers of this request; None draws a fresh seed.
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
        _number("temperature", self.temperature, "between 0 and 2", lambda v: 0 <= v <= 2)
        _integer("top_k", self.top_k, "-1, 0 or a positive integer", lambda v: v >= -1)
        _number("top_p", self.top_p, "above 0 and at most 1", lambda v: 0 < v <= 1)
        _number("min_p", self.min_p, "between 0 and 1", lambda v: 0 <= v <= 1)
        if self.seed is not None:
            _integer("seed", self.seed, "None or an integer of at most 64 bits", lambda v: -1 <= v < 2**64)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, "None or at least 1", lambda v: v >= 1)
        if self.seed == -1:
            object.__setattr__(self, "seed", None)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_EPSILON


def _number(field: str, value: object, allowed: str, holds: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ParamsError(f"{field} must be a number {allowed}, not {value!r}.")
    if not math.isfinite(value) or not holds(value):
        raise ParamsError(f"{field} must be {allowed}, not {value}.")


def _integer(field: str, value: object, allowed: str, holds: Callable[[int], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not holds(value):
        raise ParamsError(f"{field} must be {allowed}, not {value!r}.")
