"""Request: a prompt, its params, and the sequences that grow from it, each a token list and how much of it is
computed."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from hexad.config import BLOCK_TOKENS
from hexad.engine.beam import BeamSearch
from hexad.engine.block_manager import next_key, root_key
from hexad.engine.detokenizer import Detokenizer
from hexad.engine.step import SequenceSpec, TokenLogprobs
from hexad.outputs import (
    BeamSearchSequence,
    CompletionOutput,
    FinishReason,
    Logprob,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
)
from hexad.params import PoolingParams, RepetitionDetectionParams, RequestOutputKind, SamplingParams

TokenText = Callable[[int], str]


class Status(Enum):
    """Where a sequence is: in the queue, in the steps, or done."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One sequence on its way through the engine.

    token_ids: the tokens known, the request's prompt first; num_computed: how many of them are in the KV
    cache. Steps make the second catch up with the first, and the step in which it does draws the next token.

    sequence_id: unique in the engine. rank: who goes first, the smaller. block_table: its KV blocks. shares:
    the last of them may be another's, too, and not yet full, so that it is to be copied before it is written.
    keys: of its full blocks, as far as they have been needed; num_published: how many of them the prefix
    cache was told of. known: the runner has its spec. candidates: of a beam that waits for its siblings,
    (token, logprob).
    """

    __slots__ = (
        "block_table", "candidates", "cumulative_logprob", "detokenizer", "draw", "error", "finish_reason",
        "index", "keys", "known", "logprobs", "num_computed", "num_prompt", "num_published", "num_taken",
        "rank", "request", "sequence_id", "shares", "status", "stop_reason", "token_ids",
    )  # fmt: skip

    def __init__(
        self, request: Request, index: int, sequence_id: int, detokenizer: Detokenizer | None
    ) -> None:
        self.request = request
        self.index = index
        self.sequence_id = sequence_id
        self.draw = (sequence_id,)
        self.rank = (*request.rank, index)
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt = request.num_prompt
        self.num_computed = 0
        self.block_table: list[int] = []
        self.shares = False
        self.keys: list[bytes] = []
        self.num_published = 0
        self.known = False
        self.status = Status.WAITING
        self.detokenizer = detokenizer
        self.logprobs: list[PositionLogprobs] | None = [] if request.reports_logprobs else None
        self.cumulative_logprob = 0.0
        self.candidates: list[tuple[int, float]] | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.num_taken = 0

    @property
    def num_generated(self) -> int:
        """Tokens drawn so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_news(self) -> int:
        """What there has been to tell of it: its tokens, and its end."""
        return self.num_generated + (self.finish_reason is not None)

    def spec(self) -> SequenceSpec:
        """What the runner must know of it."""
        request = self.request
        return SequenceSpec(
            self.sequence_id, self.index, request.seed, request.prompt_token_ids, request.runner_params
        )

    def key(self, index: int) -> bytes:
        """The key of its index-th block, all of whose tokens are known."""
        keys, size = self.keys, BLOCK_TOKENS
        for i in range(len(keys), index + 1):
            keys.append(
                next_key(keys[-1] if i else self.request.root_key, self.token_ids[i * size : (i + 1) * size])
            )
        return keys[index]

    def append(self, token_id: int) -> None:
        """Takes a drawn token; sets `finish_reason` if it is the last. A token that ends the generation adds
        no text, unless the params include it."""
        request, token_ids = self.request, self.token_ids
        token_ids.append(token_id)
        count = len(token_ids)
        if token_id in request.stop_ids and count >= request.min_len:
            self.finish_reason = "stop"
            if token_id not in request.eos_ids:
                self.stop_reason = token_id
            if not request.includes_stop:
                return
        detokenizer = self.detokenizer
        if detokenizer is not None:
            stop = detokenizer.push(token_id, check_stop=count > request.min_len)
            if stop is not None:
                self.finish_reason, self.stop_reason = "stop", stop
        if self.finish_reason is None:
            if count == request.max_len:
                self.finish_reason = "length"
            elif request.repetition is not None and repeats(
                token_ids, request.num_prompt, request.repetition
            ):
                self.finish_reason = "repetition"

    def report(self, entry: TokenLogprobs, token_text: TokenText | None) -> None:
        """Takes the logprobs of the token drawn last."""
        assert self.logprobs is not None
        self.cumulative_logprob += entry.logprobs[0]
        self.logprobs.append(position_logprobs(entry, token_text))

    def finish(self, reason: FinishReason) -> None:
        """No more tokens will come. The text that was held back may still hold a stop string."""
        self.status = Status.FINISHED
        self.finish_reason = reason
        if self.detokenizer is not None:
            stop = self.detokenizer.finish()
            if stop is not None and reason == "length":
                self.finish_reason, self.stop_reason = "stop", stop

    def output(self, delta: bool) -> CompletionOutput:
        """What is known so far, or what is new since the last time, as plain data of its own."""
        start = self.num_taken if delta else 0
        if delta:
            self.num_taken = self.num_news
        text = ""
        if self.detokenizer is not None:
            text = self.detokenizer.take() if delta else self.detokenizer.text
        return CompletionOutput(
            self.index,
            text,
            self.token_ids[self.num_prompt + start :],
            None if self.logprobs is None else self.cumulative_logprob,
            None if self.logprobs is None else self.logprobs[start:],
            self.finish_reason,
            self.stop_reason,
            self.error,
        )


class Request:
    """One request: what was asked, and the sequences that answer it. The engine makes them.

    rank: who goes first, the smaller. max_len, min_len: most and fewest tokens of a sequence, prompt
    included. seed: of its random numbers. eos_ids, stop_ids: tokens that end a sequence, the model's own and
    all. num_started: how many of its n sequences there have been. num_left: how many have not ended. watched:
    somebody sees its tokens come.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams | PoolingParams,
        *,
        prompt: str | None,
        rank: tuple[int, int],
        max_len: int,
        seed: int,
        eos_ids: frozenset[int],
        cache_salt: str | None,
        search: BeamSearch | None,
        generate: bool,
        watched: bool,
        arrival_time: float,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.num_prompt = len(prompt_token_ids)
        self.params = self.runner_params = params
        self.rank = rank
        self.max_len = max_len
        self.seed = seed
        self.root_key = root_key(cache_salt)
        self.search = search
        self.generate = generate
        self.watched = watched
        self.metrics = RequestMetrics(arrival_time)
        self.n = 1
        self.min_len = self.num_prompt
        self.eos_ids = self.stop_ids = eos_ids
        self.includes_stop = False
        self.repetition: RepetitionDetectionParams | None = None
        self.reports_logprobs = False
        self.prompt_logprobs: list[PositionLogprobs | None] | None = None
        if isinstance(params, SamplingParams):
            final_only = search is not None or params.output_kind is RequestOutputKind.FINAL_ONLY
            self.watched = watched and not final_only
            self.n = params.n if generate else 1
            self.min_len += params.min_tokens
            self.eos_ids = frozenset() if params.ignore_eos else eos_ids
            self.stop_ids = self.eos_ids.union(params.stop_token_ids or ())
            self.includes_stop = params.include_stop_str_in_output
            self.repetition = params.repetition_detection
            self.reports_logprobs = search is None and (
                params.logprobs is not None or params.logprob_token_ids is not None
            )
            if params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None:
                # The first token has none; up to prompt_logprob_start only prompt_logprobs asks for any.
                start = 0 if params.prompt_logprobs is not None else params.prompt_logprob_start or 0
                self.prompt_logprobs = [None] * min(start + 1, self.num_prompt)
        self.sequences: list[Sequence] = []
        self.num_left = self.n
        self.num_cached_tokens = 0
        self.embedding: list[float] | None = None
        self.beams: list[BeamSearchSequence] | None = None
        self._shown_prompt: list[int] | None = None

    @property
    def num_started(self) -> int:
        """How many of its n sequences there have been."""
        return len(self.sequences)

    @property
    def finished(self) -> bool:
        """Whether all its sequences have ended."""
        return not self.num_left

    @property
    def num_generated(self) -> int:
        """Tokens drawn so far, of all sequences."""
        return sum(sequence.num_generated for sequence in self.sequences)

    @property
    def reads_cache(self) -> bool:
        """Whether computed blocks may stand in for computing the prompt: not where every position must
        report."""
        if isinstance(self.params, PoolingParams):
            return False
        if self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt:
            return False
        return not self.params.skip_reading_prefix_cache

    def report_prompt(self, start: int, entries: list[TokenLogprobs], token_text: TokenText | None) -> None:
        """Takes the logprobs of the prompt tokens from position start + 1 on."""
        assert self.prompt_logprobs is not None
        # A preempted prompt is computed, and reported, once more.
        for entry in entries[len(self.prompt_logprobs) - start - 1 :]:
            self.prompt_logprobs.append(position_logprobs(entry, token_text))

    def output(self, delta: bool = False) -> RequestOutput:
        """What is known so far as plain data of its own, which takes time in proportion to the number of
        tokens.

        delta: only what is new since the last time; the prompt's tokens are one list for all of these.
        """
        prompt_logprobs = self.prompt_logprobs
        if not delta or self._shown_prompt is None:
            self._shown_prompt = list(self.prompt_token_ids)
        return RequestOutput(
            self.request_id,
            self.prompt,
            self._shown_prompt,
            [s.output(delta) for s in self.sequences if not delta or s.num_taken < s.num_news],
            not self.num_left,
            None if prompt_logprobs is None else list(prompt_logprobs),
            self.metrics.copy(),
            self.num_cached_tokens,
        )


def position_logprobs(entry: TokenLogprobs, token_text: TokenText | None) -> PositionLogprobs:
    """A runner's plain lists as users see them; a token that is named twice keeps its first place."""
    return {
        token_id: Logprob(logprob, rank, token_text(token_id) if token_text else None)
        for token_id, logprob, rank in zip(*entry, strict=True)
    }


def repeats(token_ids: list[int], start: int, detection: RepetitionDetectionParams) -> bool:
    """Whether the tokens from index `start` on end with a pattern repeated often enough; see
    RepetitionDetectionParams."""
    for size in range(detection.min_pattern_size, detection.max_pattern_size + 1):
        begin = len(token_ids) - size * detection.min_count
        if begin < start:
            break
        # Repeated is what equals itself shifted by one pattern.
        if token_ids[begin : len(token_ids) - size] == token_ids[begin + size :]:
            return True
    return False
