"""What crosses between the engine and the runner: plain, picklable data, one of each per step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from hexad.params import PoolingParams, SamplingParams


@dataclass(slots=True)
class SequenceSpec:
    """What a runner must know of a sequence before its first step; it keeps it until told to forget.

    sequence_id: unique in the engine's life. index: of the sequence within its request; with `seed` and the
    index of the token being drawn it keys the counter-based random numbers: a draw depends on nothing else.
    prompt_token_ids: what it starts from; tokens drawn are appended by the runner itself. params: how its
    tokens are drawn and what is to be reported of them, or how its hidden states are pooled.
    """

    sequence_id: int
    index: int
    seed: int
    prompt_token_ids: list[int]
    params: SamplingParams | PoolingParams


@dataclass(slots=True)
class ScheduledStep:
    """The scheduler's answer: one entry per scheduled sequence in each of the first six lists.

    sequence_ids: who. counts: tokens it computes now. starts: position of the first of them; everything
    before it is in the KV cache already. tokens: those tokens, sequence after sequence. block_tables: numbers
    of the KV blocks that hold the first start + count positions; the lists are the scheduler's own and
    good until its next call. draws: ids of the sequences for which a token is drawn after the last of
    these tokens: none while it catches up; itself once it has; and where n > 1 sequences grow from one
    prompt, its siblings too.

    new: sequences that no step has named before. finished: those that no step will name again.
    block_copies: (source, destination) KV blocks to copy before computing. optional: how many of the last
    sequences, pieces of prompts from which nothing is drawn, may be given up where the step takes longer than
    the `expected` seconds: streams would stutter.
    """

    sequence_ids: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    block_tables: list[list[int]] = field(default_factory=list)
    draws: list[tuple[int, ...]] = field(default_factory=list)
    new: list[SequenceSpec] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    optional: int = 0
    expected: float = 0.0


class TokenLogprobs(NamedTuple):
    """Logprobs at one position, before penalties, masks and temperature.

    The first entry is the token drawn (or, in a prompt, the token that stands there), then those asked for by
    id, then the likeliest ones in order. ranks: 1 + the number of tokens with a larger logit.
    """

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


@dataclass(slots=True)
class StepResult:
    """What came of a step. Every dict is keyed by the sequence's id and holds only those that have any.

    token_ids: for the i-th scheduled sequence, the tokens drawn for step.draws[i], in that order. logprobs:
    of the token drawn, where its params ask for them. prompt_logprobs: one for each of the prompt tokens that
    follow the positions computed in this step. embeddings: the pooled hidden state, of a sequence whose last
    token has been computed. errors: sequences that cannot go on, and why; the token drawn for such a one is
    -1. given_up: whether the optional sequences were not computed.
    """

    token_ids: list[list[int]]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    embeddings: dict[int, list[float]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    given_up: bool = False


@dataclass(frozen=True, slots=True)
class StepCost:
    """What steps cost, in work; `engine.pace` turns it into time.

    step_bytes: read whatever the step holds (the weights). token_macs: multiply-adds with weights per token.
    draw_macs: of the output head, per drawn token. pair_macs: of attention, per pair of a computed token and
    a position it looks at. position_bytes: of KV, per position that a sequence looks back on.
    """

    step_bytes: int
    token_macs: int
    draw_macs: int
    pair_macs: int
    position_bytes: int


class Executor(Protocol):
    """Carries a step to wherever it is computed and brings its tokens back."""

    @property
    def step_cost(self) -> StepCost:
        """What this model's steps cost."""

    def check(self, params: SamplingParams | PoolingParams) -> None:
        """Refuses what it could not carry out: raises ParamsError, e.g. for a grammar that does not compile.
        May be called from any thread."""

    def execute(self, step: ScheduledStep) -> StepResult:
        """Computes the step. If it raises, the sequences of the step are lost; others are not touched."""

    def sleep(self) -> None:
        """Frees weights and KV cache. No sequence may be alive."""

    def wake(self) -> None:
        """Loads them again."""
