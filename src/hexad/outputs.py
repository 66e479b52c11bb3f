"""What a request gives back, with vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error", "repetition"]


@dataclass(slots=True)
class Logprob:
    """One token at one position. rank: 1 is the likeliest. decoded_token: its text, None without
    detokenising."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]
"""Token id → Logprob at one position: the token drawn, those asked for by id, and the likeliest ones."""


@dataclass(slots=True)
class CompletionOutput:
    """One generated continuation.

    cumulative_logprob, logprobs: None unless SamplingParams.logprobs (or logprob_token_ids) asks for them;
        `logprobs` then has one entry per token of `token_ids`.
    finish_reason: "stop" (an end-of-generation token or a stop of the request's own), "length" (max_tokens or
        the context is used up), "repetition" (SamplingParams.repetition_detection), "abort" (cancelled),
        "error" (`error` says what), or None while it is still running.
    stop_reason: the string or token id of the request's own stops that ended it.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        """Whether it has all the tokens it will ever get."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds of time.monotonic(); None: not yet.

    num_preemptions: how often a sequence of it had to make room and was computed again.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0

    @property
    def time_in_queue(self) -> float | None:
        """Seconds until it was first scheduled."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    def copy(self) -> RequestMetrics:
        """Like `dataclasses.replace`, in a seventh of the time: each streamed token brings one."""
        return RequestMetrics(
            self.arrival_time,
            self.first_scheduled_time,
            self.first_token_time,
            self.last_token_time,
            self.finished_time,
            self.num_preemptions,
        )


@dataclass(slots=True)
class RequestOutput:
    """The state of one request: its prompt and what has been generated so far.

    prompt_logprobs: one entry per prompt token, the first None; None unless asked for.
    num_cached_tokens: prompt tokens whose KV came from the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0


@dataclass(slots=True)
class EmbeddingOutput:
    """A pooled hidden state, float [hidden size]."""

    embedding: list[float]


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """The embedding of one prompt."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True


@dataclass(slots=True)
class ScoreOutput:
    """How likely a model holds a given text.

    logprobs: of each of its tokens but the first, given those before it. perplexity: exp(−mean logprob).
    """

    prompt: str | None
    prompt_token_ids: list[int]
    logprobs: list[float]
    perplexity: float


@dataclass(slots=True)
class BeamSearchSequence:
    """One beam. tokens: prompt and continuation. text: of the continuation. cum_logprob: summed over it."""

    tokens: list[int]
    text: str
    cum_logprob: float
    finish_reason: FinishReason
    logprobs: list[PositionLogprobs] = field(default_factory=list)


@dataclass(slots=True)
class BeamSearchOutput:
    """The beams of one prompt, best first by cum_logprob / length ** length_penalty."""

    sequences: list[BeamSearchSequence]
