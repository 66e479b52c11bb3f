"""Request: a token list, how much of it is computed, its block table and its params."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from hexad.engine.detokenizer import Detokenizer
from hexad.outputs import CompletionOutput, FinishReason, RequestOutput
from hexad.params import SamplingParams


class RequestStatus(Enum):
    """Where a request is: in the queue, in the steps, or done."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One request on its way through the engine.

    token_ids: the tokens known, the prompt's num_prompt first; num_computed: how many of them are in the KV
    cache. Steps make the second catch up with the first, and the step in which it does draws the next token.
    max_len: most tokens this request can ever know, prompt included. stop_ids: tokens that end it.
    """

    request_id: str
    prompt: str | None
    token_ids: list[int]
    params: SamplingParams
    seed: int
    max_len: int
    stop_ids: frozenset[int]
    detokenizer: Detokenizer
    num_prompt: int = field(init=False)
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.num_prompt = len(self.token_ids)

    @property
    def num_generated(self) -> int:
        """Tokens drawn so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def finished(self) -> bool:
        """Whether it has all the tokens it will ever get."""
        return self.finish_reason is not None

    @property
    def max_computed(self) -> int:
        """Most tokens it can ever have in the KV cache: the last one drawn is never computed."""
        return self.max_len - 1

    def append(self, token_id: int) -> None:
        """Takes a drawn token; sets `finish_reason` if it is the last. A stop token adds no text."""
        self.token_ids.append(token_id)
        if token_id in self.stop_ids:
            self.finish_reason = "stop"
            return
        self.detokenizer.push(token_id)
        if len(self.token_ids) == self.max_len:
            self.finish_reason = "length"

    def output(self) -> RequestOutput:
        """What is known so far, as plain data of its own: copies, which take time in proportion to the
        number of tokens."""
        completion = CompletionOutput(
            index=0,
            text=self.detokenizer.text,
            token_ids=self.token_ids[self.num_prompt :],
            finish_reason=self.finish_reason,
        )
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.token_ids[: self.num_prompt],
            outputs=[completion],
            finished=self.finished,
        )
