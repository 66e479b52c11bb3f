"""What crosses between the engine and the runner: plain, picklable data, one of each per step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """How the token after a sequence's last scheduled token is drawn.

    seed: of the request. sequence: index of the sequence within its request. Together with `position`, the
    index of the token being drawn, they key the counter-based random numbers: a draw depends on nothing else.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    sequence: int
    position: int


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """One sequence's share of a step.

    token_ids: the tokens to compute now. start: the position of the first of them; everything before it is in
    the KV cache already. block_table: numbers of the KV blocks that hold the first start + len(token_ids)
    positions. sample: None while the sequence is still catching up with its prompt.
    """

    request_id: str
    token_ids: list[int]
    start: int
    block_table: list[int]
    sample: SampleSpec | None


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """The scheduler's answer. block_copies: (source, destination) KV blocks to copy before computing."""

    sequences: list[ScheduledSequence]
    block_copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(len(sequence.token_ids) for sequence in self.sequences)


@dataclass(frozen=True, slots=True)
class StepResult:
    """token_ids[i]: the tokens drawn for the i-th scheduled sequence; empty where it had no `sample`."""

    token_ids: list[list[int]]


class Executor(Protocol):
    """Carries a step to wherever it is computed and brings its tokens back."""

    def execute(self, step: ScheduledStep) -> StepResult:
        """Computes the step. If it raises, nothing may be assumed about the KV of the step's own tokens."""
