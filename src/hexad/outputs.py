"""What a request gives back: RequestOutput and CompletionOutput, with vLLM's field names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(slots=True)
class CompletionOutput:
    """One generated continuation.

    finish_reason: "stop" (an end-of-generation token), "length" (max_tokens or the context is used up),
        "abort" (cancelled), or None while it is still running.
    stop_reason: the token id that stopped it where that is not the model's own end of generation.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestOutput:
    """The state of one request: its prompt and what has been generated so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
