"""AsyncLLM: the front for event loops. Many requests at once, each a stream of outputs."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from hexad.checks import check_integer, shown
from hexad.engine.async_engine import AsyncEngine, Params, Stream
from hexad.errors import ConfigError, ParamsError
from hexad.loader import engine_config, load
from hexad.outputs import EmbeddingRequestOutput, RequestOutput
from hexad.params import BeamSearchParams, PoolingParams, SamplingParams
from hexad.prompts import Messages, Prompt, PromptReader, TokenPrompt

if TYPE_CHECKING:
    from types import TracebackType

    from hexad.checkpoint.checkpoint import Checkpoint
    from hexad.checkpoint.tokenizer import Tokenizer
    from hexad.engine.metrics import Metric


class AsyncLLM:
    """A loaded model that answers any number of requests at once.

        async with AsyncLLM("smollm2:135m") as llm:
            async for output in llm.generate("The capital of France is", SamplingParams(temperature=0)):
                print(output.outputs[0].text)

    model: a path, "hf:owner/repo[:file]" or an alias; see `hexad.checkpoint.store`. backend: "cpu" or
    "reference". generation_config: where the parameters of a request that brings none are from; "auto": what
    the checkpoint recommends, "vllm": the defaults of SamplingParams. settings: the fields of EngineConfig.

    Making one loads the model, and raises ConfigError, ModelNotFoundError, CheckpointError and
    InsufficientMemoryError; `shutdown` frees it. Several event loops may use it. Whatever takes a prompt
    raises PromptError, ParamsError, and EngineError if the engine was shut down or broke. A request whose
    step failed ends with finish_reason "error" and says why in `error`.
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
        self.plan = self._loaded.plan
        self.engine = AsyncEngine(self._loaded.engine)
        self._prompts = PromptReader(self._loaded.tokenizer)
        self._request_ids = map("request-{}".format, itertools.count())

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields outputs of one prompt as its tokens come: all so far, or as `sampling_params.output_kind`
        says. Closing it cancels the request.

        request_id: None makes one. priority: the lowest is served first where scheduling_policy="priority".
        """
        return self._answer(lambda: self._prompts.read(prompt), sampling_params, request_id, priority)

    def chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Like `generate`, for a conversation, which is written in the model's chat template.

        chat_template: a Jinja template instead of the model's. add_generation_prompt: end with the opening
        of the assistant's turn. continue_final_message: leave the last message open for the model to go on
        with; it excludes add_generation_prompt. tools, chat_template_kwargs: for the template to use.

        Raises TokenizerError where there is no template, or a broken one.
        """

        def read() -> TokenPrompt:
            return self._prompts.chat(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template=chat_template,
                variables=chat_template_kwargs,
            )

        return self._answer(read, sampling_params, request_id, priority)

    async def embed(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> EmbeddingRequestOutput:
        """The embedding of a prompt, from the hidden states after the last norm. Raises BackendError if its
        step fails, EngineError if it is cancelled."""
        params = PoolingParams() if pooling_params is None else pooling_params
        read = partial(self._prompts.read, prompt)
        stream = await self._submit(read, params, request_id, priority, (PoolingParams,))
        try:
            output = await anext(stream)
        finally:
            stream.close()
        assert isinstance(output, EmbeddingRequestOutput)
        return output

    async def submit(
        self,
        prompt: Prompt,
        params: Params | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> Stream:
        """Queues a request of any kind and returns its stream, whose outputs may be read at leisure."""
        kinds = SamplingParams, PoolingParams, BeamSearchParams
        return await self._submit(partial(self._prompts.read, prompt), params, request_id, priority, kinds)

    def cancel(self, request_id: str) -> None:
        """Ends a request before the next step; its last output says "abort". Any thread may call it. Does
        nothing for a request that has ended."""
        self.engine.cancel(request_id)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """`cancel`, for one request or several."""
        for one in [request_id] if isinstance(request_id, str) else request_id:
            self.engine.cancel(one)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._loaded.tokenizer

    @property
    def checkpoint(self) -> Checkpoint:
        """The open model: its config, and how its weights are stored."""
        return self._loaded.checkpoint

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters of a request that brings none; see generation_config."""
        return self._loaded.default_params

    def get_metrics(self) -> list[Metric]:
        """Counters, gauges and histograms of everything so far, under vLLM's names with "hexad:"."""
        return self.engine.get_metrics()

    async def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes. Returns True: requests that run keep their blocks and hinder
        nothing."""
        await self.engine.reset_prefix_cache()
        return True

    async def sleep(self, level: int = 1) -> None:
        """Frees the weights and the KV cache until `wake_up`; at level 1 as at 2, for they are read from the
        file again. Requests that come meanwhile wait. Raises EngineError while there are requests."""
        if level not in (1, 2):
            raise ConfigError(f"level must be 1 or 2, not {shown(level)}.")
        await self.engine.sleep()

    async def wake_up(self) -> None:
        """Loads the model again after `sleep`. Raises InsufficientMemoryError if the memory is no longer
        free."""
        await self.engine.wake()

    async def is_sleeping(self) -> bool:
        """Whether weights and KV cache are freed."""
        return self.engine.is_sleeping

    def shutdown(self) -> None:
        """Cancels what runs and frees the model, after the step under way. It can be called twice."""
        self.engine.close()
        self._loaded.close()

    async def aclose(self, *, drain: bool = False) -> None:
        """`shutdown` that keeps no event loop waiting. drain: what runs goes on to its end before."""
        await self.engine.shutdown(drain=drain)
        self._loaded.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _answer(
        self,
        read: Callable[[], TokenPrompt],
        params: SamplingParams | None,
        request_id: str | None,
        priority: int,
    ) -> AsyncGenerator[RequestOutput, None]:
        stream = await self._submit(read, params, request_id, priority, (SamplingParams,))
        try:
            async for output in stream:
                assert isinstance(output, RequestOutput)
                yield output
        finally:
            stream.close()

    async def _submit(
        self,
        read: Callable[[], TokenPrompt],
        params: Params | None,
        request_id: str | None,
        priority: int,
        kinds: tuple[type[Params], ...],
    ) -> Stream:
        if params is None:
            params = self._loaded.default_params
        # What is wrong is refused here: in the engine's thread it would fail every other request, too.
        if not isinstance(params, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ParamsError(f"The params must be {names}, not {type(params).__name__} {shown(params)}.")
        check_integer(ParamsError, "priority", priority, "an integer", lambda v: True)
        if not isinstance(request_id, str | None):
            raise ParamsError(f"request_id must be None or a str, not {shown(request_id)}.")

        def prepare() -> TokenPrompt:
            prompt = read()
            self.engine.check(prompt.token_ids, params)
            return prompt

        # A long text or a large grammar takes a while, and other streams are not to stutter for it.
        prompt = await asyncio.to_thread(prepare)
        return self.engine.submit(
            next(self._request_ids) if request_id is None else request_id,
            prompt.token_ids,
            params,
            prompt=prompt.text,
            priority=priority,
            cache_salt=prompt.cache_salt,
            checked=True,
        )
