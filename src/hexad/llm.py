"""LLM: the offline front. Prompts in, finished texts, beams, embeddings or scores out."""

from __future__ import annotations

import itertools
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from hexad.checks import shown
from hexad.errors import BackendError, ConfigError, EngineError, ParamsError, PromptError
from hexad.loader import engine_config, load
from hexad.outputs import (
    BeamSearchOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    RequestOutput,
    ScoreOutput,
)
from hexad.params import BeamSearchParams, PoolingParams, RequestOutputKind, SamplingParams
from hexad.prompts import (
    Messages,
    Prompt,
    PromptReader,
    TokenPrompt,
    conversation_list,
    is_list,
    naming_prompt,
    prompt_list,
    read_each,
)

if TYPE_CHECKING:
    from types import FrameType, TracebackType

    from hexad.checkpoint.tokenizer import Tokenizer
    from hexad.engine.metrics import Metric
    from hexad.engine.request import Request

Params = SamplingParams | PoolingParams | BeamSearchParams
P = TypeVar("P", SamplingParams, PoolingParams, BeamSearchParams)

_NOT_READY = {
    "closed": "The model is closed.",
    "asleep": "The model is asleep; `wake_up` loads it again.",
}


class LLM:
    """A loaded model that answers lists of prompts.

    model: a path, "hf:owner/repo[:file]" or an alias; see `hexad.checkpoint.store`. backend: "cpu" or
    "reference". generation_config: where the parameters of a request that brings none are from; "auto": what
    the checkpoint recommends, "vllm": the defaults of SamplingParams. settings: the fields of EngineConfig,
    and those of vLLM's arguments that ask for nothing hexad does not do.

    Raises ConfigError, ModelNotFoundError, CheckpointError, and before loading anything
    InsufficientMemoryError. An LLM is a context manager. Threads that share one take turns, call by call: for
    many requests at once give them in one call, or use AsyncLLM. Every call that takes
    prompts raises PromptError or ParamsError before anything runs if any of them is refused; where it is
    interrupted, its requests are aborted. Its results are in the order of the prompts.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "smollm2:135m",
        *,
        backend: str = "cpu",
        generation_config: str = "auto",
        **settings: Any,
    ) -> None:
        self.config = engine_config(settings)
        self._loaded = load(model, backend, self.config, generation_config=generation_config)
        self._default_params = self._loaded.default_params
        self.plan = self._loaded.plan
        self.load_seconds = self._loaded.seconds
        self.engine = self._loaded.engine
        self._prompts = PromptReader(self._loaded.tokenizer)
        self._request_ids = map(str, itertools.count())
        self._state: Literal["ready", "asleep", "closed"] = "ready"
        self._turn = threading.RLock()  # one thread at a time drives the engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answers every prompt.

        prompts: one prompt or a list of them. sampling_params: one for all, or one per prompt. use_tqdm:
        show progress on stderr, if that is a terminal. priority: one for all, or one per prompt; the lowest
        is served first where scheduling_policy="priority".

        A request whose step failed is finished with finish_reason "error" and says why in `error`.
        """
        given = prompt_list(prompts)
        params = _one_each(
            "sampling_params", SamplingParams, sampling_params, len(given), self._default_params
        )
        read = read_each(given, self._prompts.read)
        return [
            request.output()
            for request in self._run(read, params, use_tqdm, _priorities(priority, len(given)))
        ]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of a list of them, written in the model's chat template.

        chat_template: a Jinja template instead of the model's. add_generation_prompt: end with the opening
        of the assistant's turn. continue_final_message: leave the last message open for the model to go on
        with; it excludes add_generation_prompt. tools, chat_template_kwargs: for the template to use.

        Raises TokenizerError where there is no template, or a broken one.
        """
        given = conversation_list(messages)
        params = _one_each(
            "sampling_params", SamplingParams, sampling_params, len(given), self._default_params
        )
        read = read_each(
            given,
            lambda conversation: self._prompts.chat(
                conversation,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                variables=chat_template_kwargs,
            ),
        )
        return [request.output() for request in self._run(read, params, use_tqdm)]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Yields outputs of one prompt as its tokens come: all so far, or as `sampling_params.output_kind`
        says. Closing it aborts the request.

        Raises PromptError and ParamsError at the first `next`.
        """
        [params] = _one_each("sampling_params", SamplingParams, sampling_params, 1, self._default_params)
        read = self._prompts.read(prompt)
        with self._turn:
            request = self._submit(read, params)
        delta = params.output_kind is RequestOutputKind.DELTA
        final_only = params.output_kind is RequestOutputKind.FINAL_ONLY
        try:
            seen, finished = 0, False
            while not finished:
                with self._turn:
                    self._check_ready()
                    with _whole_steps() as between:
                        while not request.finished and (final_only or request.num_generated == seen):
                            self._step()
                            between()
                    seen, finished = request.num_generated, request.finished
                    output = request.output(delta)
                yield output
        finally:
            with self._turn:
                self.engine.abort(request.request_id)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of every prompt. Raises BackendError if a step fails."""
        read = read_each(prompt_list(prompts), self._prompts.read)
        requests = self._run(read, _one_each("params", BeamSearchParams, params, len(read)), use_tqdm)
        return [BeamSearchOutput(_whole(request).beams or []) for request in requests]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """The embedding of every prompt, from the hidden states after the last norm. Raises BackendError if
        a step fails."""
        read = read_each(prompt_list(prompts), self._prompts.read)
        params = _one_each("pooling_params", PoolingParams, pooling_params, len(read), PoolingParams())
        outputs = []
        for request in self._run(read, params, use_tqdm):
            embedding = _whole(request).embedding
            assert embedding is not None
            outputs.append(
                EmbeddingRequestOutput(
                    request.request_id, EmbeddingOutput(embedding), request.prompt_token_ids
                )
            )
        return outputs

    def score(self, prompts: Prompt | Sequence[Prompt], *, use_tqdm: bool = True) -> list[ScoreOutput]:
        """How likely the model holds every text; nothing is generated. Raises PromptError for a text of less
        than two tokens, BackendError if a step fails."""
        read = read_each(prompt_list(prompts), self._read_scorable)
        params = [SamplingParams(prompt_logprobs=0, max_tokens=1, detokenize=False)] * len(read)
        return [_score(_whole(request)) for request in self._run(read, params, use_tqdm, generate=False)]

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._loaded.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters of a request that brings none; see generation_config."""
        return self._default_params

    def get_metrics(self) -> list[Metric]:
        """Counters, gauges and histograms of everything so far, under vLLM's names with "hexad:"."""
        return self.engine.get_metrics()

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes. Returns True: requests that run keep their blocks and hinder
        nothing."""
        with self._turn:
            self.engine.reset_prefix_cache()
        return True

    def sleep(self, level: int = 1) -> None:
        """Frees the weights and the KV cache until `wake_up`; at level 1 as at 2, for they are read from the
        file again. Raises EngineError while a stream is open."""
        if level not in (1, 2):
            raise ConfigError(f"level must be 1 or 2, not {shown(level)}.")
        with self._turn:
            self._check_ready()
            if self.engine.has_unfinished:
                raise EngineError(
                    "The model cannot sleep while a stream is open; read it to its end or close it."
                )
            self.engine.reset_prefix_cache()
            self.engine.executor.sleep()
            self._state = "asleep"

    def wake_up(self) -> None:
        """Loads the model again after `sleep`. Raises InsufficientMemoryError if the memory is no longer
        free."""
        with self._turn:
            if self._state == "asleep":
                self.engine.executor.wake()
                self._state = "ready"
            self._check_ready()

    def close(self) -> None:
        """Aborts what runs and frees the model. It can be called twice; what needs the model fails from now
        on."""
        with self._turn:
            self._state = "closed"
            self._loaded.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(
        self,
        prompts: Sequence[TokenPrompt],
        params: Sequence[Params],
        show_progress: bool,
        priorities: Sequence[int] = (),
        *,
        generate: bool = True,
    ) -> list[Request]:
        """Submits all, steps until all have ended, and returns them in the same order."""
        requests: dict[str, Request] = {}
        with self._turn:
            try:
                for i, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
                    with naming_prompt(i, len(prompts)):
                        priority = priorities[i] if priorities else 0
                        request = self._submit(prompt, param, priority, generate=generate, watched=False)
                    requests[request.request_id] = request
                left = len(requests)
                with _progress(left, show_progress) as report, _whole_steps() as between:
                    while left:
                        advanced = [r for r in self._step() if r.request_id in requests]
                        left -= sum(r.finished for r in advanced)
                        report(advanced)
                        between()
            finally:
                for request_id in requests:
                    self.engine.abort(request_id)
            return list(requests.values())

    def _submit(
        self,
        prompt: TokenPrompt,
        params: Params,
        priority: int = 0,
        *,
        generate: bool = True,
        watched: bool = True,
    ) -> Request:
        self._check_ready()
        return self.engine.add_request(
            next(self._request_ids),
            prompt.token_ids,
            params,
            prompt=prompt.text,
            priority=priority,
            cache_salt=prompt.cache_salt,
            generate=generate,
            watched=watched,
        )

    def _step(self) -> list[Request]:
        self._check_ready()
        return self.engine.step()

    def _check_ready(self) -> None:
        if self._state != "ready":
            raise EngineError(_NOT_READY[self._state])

    def _read_scorable(self, prompt: Prompt) -> TokenPrompt:
        read = self._prompts.read(prompt)
        if len(read.token_ids) == 1:
            raise PromptError("A text of one token has no score: its first token follows nothing.")
        return read


def _whole(request: Request) -> Request:
    """The request, if it was carried out; raises the BackendError of what went wrong otherwise."""
    for sequence in request.sequences:
        if sequence.finish_reason == "error":
            raise BackendError(sequence.error)
    return request


def _score(request: Request) -> ScoreOutput:
    output = request.output()
    assert output.prompt_logprobs is not None
    logprobs = [
        position[token_id].logprob
        for token_id, position in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        if position is not None
    ]
    perplexity = math.exp(-math.fsum(logprobs) / len(logprobs))
    return ScoreOutput(output.prompt, output.prompt_token_ids, logprobs, perplexity)


def _one_each(
    name: str, kind: type[P], given: P | Sequence[P] | None, count: int, default: P | None = None
) -> list[P]:
    """The params of each of `count` prompts: those given one by one, or one object for all. Raises
    ParamsError."""
    if given is None:
        given = default
    if isinstance(given, kind):
        return [given] * count
    if not is_list(given) or not all(isinstance(params, kind) for params in given):
        raise ParamsError(
            f"{name} must be a {kind.__name__} or a list of them, not {type(given).__name__} {shown(given)}."
        )
    if len(given) != count:
        raise ParamsError(f"There are {len(given)} {name} for {count} prompts; give one for each.")
    return list(given)


def _priorities(given: int | Sequence[int] | None, count: int) -> list[int]:
    priorities: list[Any] = list(given) if is_list(given) else [0 if given is None else given] * count
    if len(priorities) != count or not all(isinstance(priority, int) for priority in priorities):
        raise ParamsError(
            f"priority must be an int, or {count} of them, one for each prompt, not {shown(given)}."
        )
    return priorities


@contextmanager
def _whole_steps() -> Iterator[Callable[[], None]]:
    """Holds Ctrl-C back while the block runs, so that it does not leave the engine in the midst of a step.
    What it yields is called between steps, and raises KeyboardInterrupt if it has been pressed. A second one,
    of a user in a hurry, does not wait; a handler that is not Python's own is left alone."""
    python_s = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not python_s or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def between() -> None:
        if pressed:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, press)
    try:
        yield between
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _progress(total: int, wanted: bool) -> Iterator[Callable[[list[Request]], None]]:
    """Shows requests done, and prompt and generated tokens per second, on stderr while the block runs.

    Yields what is to be called after each step with the requests that it advanced.
    """
    if not wanted or not sys.stderr.isatty():
        yield lambda advanced: None
        return
    import time

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rates = TextColumn("in {task.fields[input]:,.0f} tok/s, out {task.fields[output]:,.0f} tok/s")
    columns = BarColumn(), MofNCompleteColumn(), rates, TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, input=0.0, output=0.0)
        begin = time.perf_counter()
        prompt_tokens: dict[str, int] = {}
        generated: dict[str, int] = {}

        def report(advanced: list[Request]) -> None:
            for request in advanced:
                prompt_tokens[request.request_id] = len(request.prompt_token_ids)
                generated[request.request_id] = request.num_generated
            seconds = time.perf_counter() - begin
            bar.update(
                task,
                advance=sum(request.finished for request in advanced),
                input=sum(prompt_tokens.values()) / seconds,
                output=sum(generated.values()) / seconds,
            )

        yield report
