"""Service: what all APIs ask of the engine. Prompts in, streams of outputs out; nothing of HTTP's forms."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, cast

from hexad.async_llm import AsyncLLM
from hexad.engine.async_engine import Output, Params, Stream
from hexad.errors import HexadError, ParamsError, PromptError
from hexad.outputs import BeamSearchOutput, CompletionOutput, EmbeddingRequestOutput, RequestOutput
from hexad.params import BeamSearchParams, PoolingParams, RequestOutputKind, SamplingParams
from hexad.prompts import Prompt, PromptReader, TokenPrompt
from hexad.server.errors import ApiError, api_error
from hexad.server.logs import facts
from hexad.server.settings import ServerSettings


class Service:
    """A loaded model, with the bounds within which it serves.

    llm: owned by whoever made the service. names: what the model may be called, the first being its own name.
    in_flight: sequences asked for and not ended.
    """

    def __init__(self, llm: AsyncLLM, settings: ServerSettings, names: Sequence[str]) -> None:
        self.llm = llm
        self.settings = settings
        self.names = tuple(names)
        self.created = int(time.time())
        self.tokenizer = llm.get_tokenizer()
        self.default_params = llm.get_default_sampling_params()
        self.max_model_len = llm.plan.max_model_len
        self.prompts = PromptReader(self.tokenizer)
        self.in_flight = 0
        self._ids = itertools.count()
        self._seconds = 1.0  # of late, from a request's arrival to its end
        # No prompt that fits has more characters: none of its tokens is longer than the longest.
        longest = max(len(self.tokenizer.token_bytes(i)) for i in range(self.tokenizer.vocab_size))
        self.max_prompt_chars = self.max_model_len * longest

    def check_model(self, name: str | None) -> str:
        """The name to answer with. Raises ApiError 404 for a model that is not served here."""
        if name is None or name in self.names:
            return name or self.names[0]
        raise ApiError(
            404,
            f"The model {name[:200]!r} does not exist here; there is {', '.join(map(repr, self.names))}.",
            param="model",
            code="model_not_found",
        )

    def read(self, prompt: Prompt, *, add_special: bool = True) -> TokenPrompt:
        """A prompt's tokens. It takes a while; call it in a thread, as `start` does. Raises PromptError."""
        if isinstance(prompt, str):
            self.check_length(len(prompt))
            if not add_special:
                return TokenPrompt(prompt, self.tokenizer.encode(prompt, add_special=False))
        return self.prompts.read(prompt)

    def check_length(self, characters: int) -> None:
        """Raises PromptError for a text that cannot fit: encoding it would only take time."""
        if characters > self.max_prompt_chars:
            raise PromptError(
                f"The prompt has {characters:,} characters; with a context of {self.max_model_len} tokens no "
                f"text of more than {self.max_prompt_chars:,} fits."
            )

    async def start(
        self,
        read: Callable[[], Sequence[TokenPrompt]],
        params: Params,
        *,
        stream: bool,
        priority: int = 0,
        generate: bool = True,
        adapt: Callable[[TokenPrompt, SamplingParams], Params] | None = None,
    ) -> Generation:
        """Queues requests, one per prompt that `read` returns, and gives back what will come of them.

        read: called in a thread; it may be a while. adapt: makes a prompt's params of `params`. stream:
        outputs hold what is new; else there is one at the end. generate: False computes the prompts and no
        more, for their logprobs.

        Raises ApiError: 400 for what is wrong, 429 where too many wait, 503 if the engine no longer runs.
        """
        n = params.n if isinstance(params, SamplingParams) else 1
        if isinstance(params, SamplingParams):
            kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
            params = replace(params, output_kind=kind)
        generation = Generation(self)
        generation.reserve(n)  # before anything is read: who must wait outside costs nothing
        engine = self.llm.engine

        def prepare() -> list[tuple[TokenPrompt, Params]]:
            prepared = []
            for prompt in read():
                own: Params = params
                if adapt is not None and isinstance(params, SamplingParams):
                    own = adapt(prompt, params)
                self._check_grammar(own)
                engine.check(prompt.token_ids, own, generate=generate)
                prepared.append((prompt, own))
            return prepared

        try:
            try:
                prepared = await asyncio.to_thread(prepare)
                generation.check_time()
                generation.prompts = [prompt for prompt, _ in prepared]
                generation.reserve(n * (len(prepared) - 1))
                for prompt, own in prepared:
                    stream_ = engine.submit(
                        f"http-{next(self._ids)}",
                        prompt.token_ids,
                        own,
                        prompt=prompt.text,
                        priority=priority,
                        cache_salt=prompt.cache_salt,
                        generate=generate,
                        checked=True,
                    )
                    generation.streams.append(stream_)
            except HexadError as error:
                raise api_error(error) from error
        except BaseException:
            generation.close()
            raise
        return generation

    async def embed(
        self, read: Callable[[], Sequence[TokenPrompt]], params: PoolingParams, *, priority: int = 0
    ) -> list[EmbeddingRequestOutput]:
        """The embeddings of prompts. Raises what `start` raises."""
        generation = await self.start(read, params, stream=False, priority=priority)
        outputs = await generation.collect()
        assert all(isinstance(output, EmbeddingRequestOutput) for output in outputs)
        return outputs

    def beam_search(
        self, prompt: TokenPrompt, params: SamplingParams, length_penalty: float
    ) -> BeamSearchParams:
        """A search with params.n beams in place of drawing; most of `params` means nothing to it, as in vLLM.

        Raises ParamsError for what would be missed in its results.
        """
        for field in ("logprobs", "prompt_logprobs", "stop"):
            if getattr(params, field) is not None:
                raise ParamsError(f"{field} must be left out of a beam search: it has none.")
        room = max(1, self.max_model_len - len(prompt.token_ids))
        return BeamSearchParams(
            beam_width=params.n,
            max_tokens=room if params.max_tokens is None else params.max_tokens,
            ignore_eos=params.ignore_eos,
            length_penalty=length_penalty,
            include_stop_str_in_output=params.include_stop_str_in_output,
            structured_outputs=params.structured_outputs,
        )

    def _check_grammar(self, params: Params) -> None:
        """Raises ApiError 400 for a grammar or schema that is longer than this server takes."""
        given = params.structured_outputs if isinstance(params, SamplingParams) else None
        if given is None:
            return
        kib, most = len(repr(given)) / 1024, self.settings.max_grammar_kib
        if kib > most:
            raise ApiError(
                400,
                f"The grammar or schema has {kib:.0f} KiB; this server takes at most {most:g}.",
                param="structured_outputs",
            )

    def reserve(self, count: int) -> None:
        """Takes places for sequences. Raises ApiError 429 where there are not so many."""
        settings = self.settings
        capacity = settings.max_num_seqs + settings.max_waiting
        if self.in_flight + count > capacity and self.in_flight:
            patience = self._seconds * max(1.0, self.in_flight / settings.max_num_seqs)
            raise ApiError(
                429,
                f"The server is full: {self.in_flight} sequences run or wait, and it takes {capacity}. Try "
                "again later.",
                code="queue_full",
                headers={"Retry-After": str(min(3600, math.ceil(patience)))},
            )
        self.in_flight += count

    def release(self, count: int, seconds: float) -> None:
        """Gives places back, after so many seconds."""
        self.in_flight -= count
        self._seconds += 0.1 * (seconds - self._seconds)


class Generation:
    """What comes of the prompts of one HTTP request. Read it once, by `async for` or `collect`; `close` it.

    It ends all that still runs when it is closed, dropped, or older than the server's request_timeout.

    num_generated: tokens, so far.
    """

    def __init__(self, service: Service) -> None:
        self.prompts: Sequence[TokenPrompt] = ()
        self.streams: list[Stream] = []
        self._service = service
        self._reserved = 0
        self._begin = time.monotonic()
        self._first: float | None = None
        self.num_generated = 0
        self._cached: dict[int, int] = {}
        self._reasons: list[str] = []
        self._facts = facts.get()
        self._expired = False
        self._merged: AsyncIterator[tuple[int, Output]] | None = None
        # Weakly, for it is to end when nobody holds it any more: a stream may be dropped before it was begun.
        expire = weakref.WeakMethod(self._expire)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(service.settings.request_timeout, lambda: (end := expire()) and end())

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(len(prompt.token_ids) for prompt in self.prompts)

    @property
    def num_cached_tokens(self) -> int:
        """Those of the prompts so far whose KV came from the prefix cache."""
        return sum(self._cached.values())

    def reserve(self, count: int) -> None:
        """Takes so many more places. Raises ApiError 400 where they are more than max_n, and what
        Service.reserve raises."""
        asked, most = self._reserved + count, self._service.settings.max_n
        if asked > most:
            raise ApiError(
                400,
                f"The request asks for {asked} continuations; this server makes at most {most}.",
                param="n",
            )
        self._service.reserve(count)
        self._reserved += count

    def close(self) -> None:
        """Cancels what has not ended. It can be called twice."""
        self._timer.cancel()
        for stream in self.streams:
            stream.close()
        if not self._reserved:
            return
        self._service.release(self._reserved, time.monotonic() - self._begin)
        self._reserved = 0
        if self._facts is not None and self.streams:
            self._facts |= {
                "model": self._service.names[0],
                "prompt_tokens": self.num_prompt_tokens,
                "completion_tokens": self.num_generated,
                "finish_reasons": self._reasons,
            }
            if self._first is not None:
                self._facts["time_to_first_token"] = round(self._first - self._begin, 4)

    def __del__(self) -> None:
        self.close()

    def check_time(self) -> None:
        """Raises ApiError 504 if the request has had its time."""
        if self._expired:
            raise self._failure(None)

    def __aiter__(self) -> Generation:
        return self

    def __anext__(self) -> Coroutine[Any, Any, tuple[int, RequestOutput]]:
        """(prompt's index, what is new of it). Raises ApiError if something fails on the way."""
        return cast("Coroutine[Any, Any, tuple[int, RequestOutput]]", self._next())

    async def collect(self) -> list[Any]:
        """The last output of each prompt: RequestOutput, which beams become, too, best first; or
        EmbeddingRequestOutput. Raises ApiError."""
        results: list[Any] = [None] * len(self.streams)
        with contextlib.suppress(StopAsyncIteration):
            while True:
                index, output = await self._next()
                results[index] = output
        return results

    def _expire(self) -> None:
        self._expired = True
        self.close()

    def _failure(self, error: str | None) -> ApiError:
        if self._expired:
            limit = self._service.settings.request_timeout
            return ApiError(504, f"The request took longer than {limit:g} seconds, the server's limit.")
        if error is None:  # cancelled by somebody other than its reader
            return ApiError(503, "The request was cancelled: the server shuts down.")
        return ApiError(500, f"The model failed at this request: {error}")

    async def _next(self) -> tuple[int, Output]:
        try:
            if len(self.streams) == 1:
                index, output = 0, await anext(self.streams[0])
            else:
                if self._merged is None:
                    self._merged = _merged(self.streams)
                index, output = await anext(self._merged)
        except BaseException as error:  # the end, too
            self.close()
            if isinstance(error, HexadError):
                raise (self._failure(None) if self._expired else api_error(error)) from error
            raise
        if self._first is None:
            self._first = time.monotonic()
        if isinstance(output, BeamSearchOutput):
            output = _beams(self.streams[index].request_id, self.prompts[index], output)
        if isinstance(output, RequestOutput):
            self._cached[index] = output.num_cached_tokens
            for completion in output.outputs:
                self.num_generated += len(completion.token_ids)
                if completion.finish_reason is not None:
                    self._reasons.append(completion.finish_reason)
                    if completion.finish_reason in ("error", "abort"):
                        self.close()
                        raise self._failure(completion.error)
        return index, output


def _beams(request_id: str, prompt: TokenPrompt, output: BeamSearchOutput) -> RequestOutput:
    """Beams in the form of continuations."""
    num_prompt = len(prompt.token_ids)
    completions = [
        CompletionOutput(
            i, beam.text, beam.tokens[num_prompt:], beam.cum_logprob, finish_reason=beam.finish_reason
        )
        for i, beam in enumerate(output.sequences)
    ]
    return RequestOutput(request_id, prompt.text, prompt.token_ids, completions, finished=True)


async def _merged(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, Output]]:
    """The outputs of several streams, whichever comes first."""
    waiting = {asyncio.ensure_future(anext(stream)): i for i, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in sorted(done, key=waiting.__getitem__):
                index = waiting.pop(future)
                try:
                    output = future.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(streams[index]))] = index
                yield index, output
    finally:
        for future in waiting:
            future.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
