"""Engine: turns requests into tokens, one `step()` at a time."""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Callable
from collections.abc import Sequence as Tokens

from hexad.checks import shown
from hexad.config import EngineConfig
from hexad.engine.beam import Beam, BeamSearch
from hexad.engine.block_manager import BlockManager, blocks_for
from hexad.engine.detokenizer import Detokenizer, TextStream
from hexad.engine.metrics import EngineStats, Metric
from hexad.engine.pace import Pace
from hexad.engine.request import Request, Sequence, Status
from hexad.engine.scheduler import SETTLING, Scheduler
from hexad.engine.step import Executor, ScheduledStep, StepResult
from hexad.errors import HexadError, ParamsError, PromptError
from hexad.outputs import BeamSearchSequence, FinishReason
from hexad.params import BeamSearchParams, PoolingParams, SamplingParams

logger = logging.getLogger(__name__)


class Engine:
    """Prompts in, Requests with new tokens out, step after step. One caller at a time, but for `check`.

    executor: computes the steps. max_model_len: longest sequence in tokens. kv_blocks: size of the KV cache
    in blocks. vocab_size: token ids are below it. eos_ids: tokens that end a generation. new_stream: makes
    the TextStream of a new sequence. token_text: the text of one token, for logprobs.
    """

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig,
        *,
        max_model_len: int,
        kv_blocks: int,
        vocab_size: int,
        eos_ids: frozenset[int],
        new_stream: Callable[[SamplingParams], TextStream],
        token_text: Callable[[int], str],
    ) -> None:
        self.executor = executor
        self.config = config
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.eos_ids = eos_ids
        self.requests: dict[str, Request] = {}
        self.stats = EngineStats()
        self.blocks = BlockManager(kv_blocks, caching=config.enable_prefix_caching)
        self.scheduler = Scheduler(
            self.blocks,
            Pace(executor.step_cost, config.max_step_ms),
            self._new_sequence,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            settling=SETTLING if config.max_step_ms is None else 0,  # a bound that was asked for always holds
        )
        self._new_stream = new_stream
        self._token_text = token_text
        self._seeds = random.SystemRandom() if config.seed is None else random.Random(config.seed)
        self._arrivals = itertools.count()
        self._sequence_ids = itertools.count()
        self._last_step_time = 0.0

    @property
    def has_unfinished(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self.requests)

    def check(
        self, prompt_token_ids: Tokens[int], params: SamplingParams | PoolingParams | BeamSearchParams,
        *, generate: bool = True,
    ) -> None:  # fmt: skip
        """Refuses a request that can never run: no tokens, ids outside the vocabulary, no room for a new
        token in the context, more KV cache than there is, params that the model or the machine cannot follow.
        It reads nothing that changes, so any thread may call it.

        Raises PromptError, ParamsError.
        """
        num_prompt = len(prompt_token_ids)
        if not num_prompt:
            raise PromptError("The prompt is empty: there must be at least one token.")
        if not 0 <= min(prompt_token_ids) <= max(prompt_token_ids) < self.vocab_size:
            position, token_id = next(
                (i, t) for i, t in enumerate(prompt_token_ids) if not 0 <= t < self.vocab_size
            )
            raise PromptError(
                f"Token id {shown(token_id)} at position {position} of the prompt is outside the vocabulary "
                f"(0 … {self.vocab_size - 1})."
            )
        generate = generate and not isinstance(params, PoolingParams)
        if num_prompt + generate > self.max_model_len:
            raise PromptError(
                f"The prompt has {num_prompt} tokens; with a context of {self.max_model_len} at most "
                f"{self.max_model_len - generate} {'leave room for a new one' if generate else 'fit'}. "
                "Shorten it, or raise max_model_len if the model allows."
            )
        max_len = self._max_len(num_prompt, params, generate)
        needed = blocks_for(max_len - generate)  # the last token drawn is never computed
        if needed > self.blocks.num_blocks:
            raise PromptError(
                f"The request can grow to {max_len} tokens ({num_prompt} of them prompt), which takes "
                f"{needed} KV cache blocks; there are {self.blocks.num_blocks}. Lower max_tokens or raise "
                "kv_cache_gib."
            )
        if isinstance(params, BeamSearchParams):
            if params.beam_width > self.config.max_num_seqs:
                raise ParamsError(
                    f"beam_width must be at most max_num_seqs ({self.config.max_num_seqs}), "
                    f"not {params.beam_width}."
                )
            if params.structured_outputs is not None:
                raise ParamsError("structured_outputs must be None in a beam search: beams take no grammar.")
        elif isinstance(params, SamplingParams):
            params.check_vocabulary(self.vocab_size, self.config.max_logprobs)
            self.executor.check(params)
        else:
            self.executor.check(params)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams | PoolingParams | BeamSearchParams,
        *,
        prompt: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        generate: bool = True,
        watched: bool = True,
        arrival_time: float | None = None,
        checked: bool = False,
    ) -> Request:
        """Queues a request under an id of the caller's choice. Returns the request, which `step` carries on.

        prompt: its text, passed on to the output. priority: the lower, the sooner, with scheduling_policy
        "priority". cache_salt: only requests with the same one share cached blocks. generate: False computes
        the prompt and no more, e.g. for its logprobs. watched: somebody sees the tokens come, so that prompts
        shall not make them stutter. arrival_time: of time.monotonic(), None: now. checked: `check` has been
        called.

        Raises PromptError, ParamsError; see `check`.
        """
        assert request_id not in self.requests, f"request id {request_id} is in use"
        if not checked:
            self.check(prompt_token_ids, params, generate=generate)
        generate = generate and not isinstance(params, PoolingParams)
        max_len = self._max_len(len(prompt_token_ids), params, generate)
        search = None
        if isinstance(params, BeamSearchParams):
            search = BeamSearch(params, max_len - len(prompt_token_ids), self.eos_ids)
            # Of the runner beams want nothing but the likeliest tokens.
            params = SamplingParams(
                temperature=0,
                max_tokens=params.max_tokens,
                logprobs=min(search.num_candidates, self.vocab_size),
                detokenize=False,
            )
        by_priority = self.config.scheduling_policy == "priority"
        seed = params.seed if isinstance(params, SamplingParams) else 0
        request = Request(
            request_id,
            list(prompt_token_ids),
            params,
            prompt=prompt,
            rank=(priority if by_priority else 0, next(self._arrivals)),
            max_len=max_len,
            seed=self._seeds.getrandbits(64) if seed is None else seed,
            eos_ids=self.eos_ids,
            cache_salt=cache_salt,
            search=search,
            generate=generate,
            watched=watched,
            arrival_time=time.monotonic() if arrival_time is None else arrival_time,
        )
        self.requests[request_id] = request
        self.scheduler.add(self._new_sequence(request))
        return request

    def step(self) -> list[Request]:
        """Runs one step; there must be something to do. Returns the requests that got new tokens or have
        ended, each once. They live on: their `output()` is plain data, for whoever wants it at this step.

        If the executor raises, the requests of the step end with an error; the others go on.
        """
        begin = time.monotonic()
        scheduler = self.scheduler
        step = scheduler.schedule(begin)
        try:
            result = self.executor.execute(step)
        except Exception as error:
            if not isinstance(error, HexadError):
                logger.exception("A step failed; its %d requests end.", len(step.sequence_ids))
            return self._fail_step(error)
        now = time.monotonic()
        if result.given_up:
            scheduler.give_up(step)
        else:
            scheduler.pace.end(now - begin)
        advanced = self._update(step, result, now)
        stats = self.stats
        stats.steps += 1
        stats.iteration_tokens.observe(sum(step.counts))
        stats.preemptions = scheduler.num_preemptions
        stats.prefix_queries, stats.prefix_hits = scheduler.prefix_queries, scheduler.prefix_hits
        return advanced

    def abort(self, request_id: str) -> Request | None:
        """Ends a request and frees its blocks at once. Returns it, or None if it has ended before."""
        request = self.requests.get(request_id)
        if request is not None:
            self._end(request, "abort", time.monotonic())
        return request

    def reset_prefix_cache(self) -> None:
        """Forgets all computed blocks that could be used again. What runs is not disturbed."""
        self.blocks.forget()

    def get_metrics(self) -> list[Metric]:
        """What the engine has counted, under vLLM's names."""
        running = len({id(sequence.request) for sequence in self.scheduler.running})
        return self.stats.snapshot(
            num_running=running,
            num_waiting=len(self.requests) - running,
            kv_used_fraction=self.blocks.num_allocated / self.blocks.num_blocks,
        )

    def _max_len(
        self, num_prompt: int, params: SamplingParams | PoolingParams | BeamSearchParams, generate: bool
    ) -> int:
        """Most tokens a sequence can come to, prompt included."""
        if not generate or isinstance(params, PoolingParams):
            return num_prompt
        if params.max_tokens is None:
            return self.max_model_len
        return min(self.max_model_len, num_prompt + params.max_tokens)

    def _new_sequence(self, request: Request) -> Sequence:
        params, detokenizer = request.params, None
        if isinstance(params, SamplingParams) and params.detokenize and request.generate:
            detokenizer = Detokenizer(
                self._new_stream(params), params.stop_strings, include_stop=params.include_stop_str_in_output
            )
        sequence = Sequence(request, request.num_started, next(self._sequence_ids), detokenizer)
        request.sequences.append(sequence)
        return sequence

    def _update(self, step: ScheduledStep, result: StepResult, now: float) -> list[Request]:
        """Takes what the step computed and drew. Returns the requests that have news, in scheduled order."""
        scheduler, errors = self.scheduler, result.errors
        advanced: dict[Request, None] = {}
        drawn: list[Sequence] = []
        streams = tokenless = 0  # of those drawn, the ones that got no token
        for sequence, start, count, token_ids in zip(
            scheduler.scheduled, step.starts, step.counts, result.token_ids, strict=True
        ):
            if not count:  # given up
                continue
            request = sequence.request
            scheduler.advance(sequence, count)
            if start < sequence.num_prompt:
                self._update_prompt(sequence, start, result, bool(token_ids), now)
                if len(token_ids) > 1:
                    for sibling, token_id in zip(request.sequences[1:], token_ids[1:], strict=False):
                        scheduler.fork(sequence, sibling)
                        if token_id >= 0:
                            sibling.append(token_id)
                        else:  # it has failed
                            tokenless += 1
                        drawn.append(sibling)
            else:
                streams += 1
            if token_ids:
                advanced[request] = None
                drawn.append(sequence)
                if token_ids[0] < 0:
                    tokenless += 1
                elif request.search is None:
                    sequence.append(token_ids[0])
                else:
                    entry = result.logprobs[sequence.sequence_id]
                    sequence.candidates = list(zip(entry.token_ids[1:], entry.logprobs[1:], strict=True))
            elif sequence.num_computed == request.max_len or sequence.sequence_id in errors:  # a prompt alone
                advanced[request] = None
                sequence.finish_reason = "length"
                drawn.append(sequence)
                tokenless += 1
        for sequence in drawn:
            if sequence.status is Status.FINISHED:  # a beam whose search ended with its sibling's turn
                continue
            if sequence.logprobs is not None and len(sequence.logprobs) < sequence.num_generated:
                detokenize = sequence.detokenizer is not None
                sequence.report(
                    result.logprobs[sequence.sequence_id], self._token_text if detokenize else None
                )
            if errors and (error := errors.get(sequence.sequence_id)) is not None:
                # A search cannot do without any of its beams, nor can n sequences begin without the first.
                request = sequence.request
                if request.search is not None or request.num_started == 1:
                    self._end(request, "error", now, error)
                    continue
                sequence.error, sequence.finish_reason = error, "error"
            if sequence.finish_reason is not None:
                self._end_sequence(sequence, sequence.finish_reason, now)
            elif sequence.candidates is not None:
                self._advance_beams(sequence.request, now)
        self.stats.generation_tokens += len(drawn) - tokenless
        if streams:
            self.stats.inter_token_latency.observe(now - self._last_step_time, streams)
        self._last_step_time = now
        return list(advanced)

    def _update_prompt(
        self, sequence: Sequence, start: int, result: StepResult, drew: bool, now: float
    ) -> None:
        """Takes what a step computed of a prompt, or of one that is computed again."""
        request, sequence_id = sequence.request, sequence.sequence_id
        entries = result.prompt_logprobs.get(sequence_id)
        if entries:
            params = request.params
            detokenize = isinstance(params, SamplingParams) and params.detokenize
            request.report_prompt(start, entries, self._token_text if detokenize else None)
        request.embedding = result.embeddings.get(sequence_id, request.embedding)
        if request.metrics.first_token_time is None and sequence.num_computed >= request.num_prompt:
            self.stats.prompt_tokens += request.num_prompt
            if drew:
                request.metrics.first_token_time = now
                self.stats.time_to_first_token.observe(now - request.metrics.arrival_time)

    def _advance_beams(self, request: Request, now: float) -> None:
        """Once all live beams of a request have their candidates, the best of these become the next beams."""
        search = request.search
        live = [sequence for sequence in request.sequences if sequence.status is not Status.FINISHED]
        candidates = [sequence.candidates for sequence in live if sequence.candidates is not None]
        if search is None or len(candidates) < len(live):
            return
        moves = search.advance(candidates)
        if not moves:
            request.beams = [
                BeamSearchSequence(
                    tokens=[*request.prompt_token_ids, *beam.token_ids],
                    text=self._text_of(beam, keep_stop=search.params.include_stop_str_in_output),
                    cum_logprob=beam.cum_logprob,
                    finish_reason=beam.finish_reason,
                )
                for beam in search.results()
            ]
            self._end(request, "length", now)
            return
        beams = live + [self._new_sequence(request) for _ in range(len(moves) - len(live))]
        self.scheduler.regrow(live, beams, moves)

    def _text_of(self, beam: Beam, keep_stop: bool) -> str:
        token_ids = beam.token_ids
        if beam.finish_reason == "stop" and not keep_stop:
            token_ids = token_ids[:-1]
        stream = self._new_stream(SamplingParams(skip_special_tokens=not keep_stop))
        return "".join([*map(stream.push, token_ids), stream.flush()])

    def _end_sequence(self, sequence: Sequence, reason: FinishReason, now: float) -> None:
        self.scheduler.remove(sequence)
        sequence.finish(reason)
        request = sequence.request
        request.num_left -= 1
        if not request.num_left:
            self._forget(request, sequence.finish_reason or reason, now)

    def _end(self, request: Request, reason: FinishReason, now: float, error: str | None = None) -> None:
        """Ends all that is left of a request."""
        for sequence in request.sequences:
            if sequence.status is not Status.FINISHED:
                sequence.error = error
                self.scheduler.remove(sequence)
                sequence.finish(reason)
        request.num_left = 0
        self._forget(request, reason, now)

    def _forget(self, request: Request, reason: FinishReason, now: float) -> None:
        del self.requests[request.request_id]
        metrics = request.metrics
        metrics.finished_time = now
        if metrics.first_token_time is not None:
            metrics.last_token_time = now
        self.stats.request_finished(metrics, request.num_prompt, request.num_generated, reason)

    def _fail_step(self, error: Exception) -> list[Request]:
        failed = {sequence.request: None for sequence in self.scheduler.scheduled}
        for request in failed:
            self._end(request, "error", time.monotonic(), f"{type(error).__name__}: {error}")
        return list(failed)
