"""LLM: the offline front. Prompts in, finished texts out."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeGuard

from hexad.checks import shown
from hexad.config import EngineConfig
from hexad.engine.engine import Engine
from hexad.errors import CheckpointError, ConfigError, HexadError, ParamsError, PromptError
from hexad.outputs import RequestOutput
from hexad.params import SamplingParams

if TYPE_CHECKING:
    from types import TracebackType

    from hexad.checkpoint.tokenizer import Tokenizer
    from hexad.engine.request import Request
    from hexad.placement.plan import Plan

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text; token ids; {"prompt": text}; or {"prompt_token_ids": ids}, with or without the text beside it."""


class LLM:
    """A loaded model that answers lists of prompts.

    model: a path, "hf:owner/repo[:file]" or an alias; see `hexad.checkpoint.store`. backend: "cpu" or
    "reference". settings: the fields of EngineConfig.

    Raises ConfigError, ModelNotFoundError, CheckpointError, and before loading anything
    InsufficientMemoryError.
    An LLM is a context manager and belongs to one thread.
    """

    def __init__(
        self, model: str | os.PathLike[str] = "smollm2:135m", *, backend: str = "cpu", **settings: Any
    ) -> None:
        from hexad.checkpoint.open import open_checkpoint
        from hexad.checkpoint.store import resolve
        from hexad.runner.executor import LocalExecutor
        from hexad.runner.model_runner import ModelRunner

        self.config = _engine_config(settings)
        self._checkpoint = open_checkpoint(resolve(model))
        try:
            self._checkpoint.check_tokenizer()
            # Both spend their time in native code, so they overlap.
            with ThreadPoolExecutor(1) as thread:
                tokenizer = thread.submit(self._checkpoint.tokenizer)
                self._runner = ModelRunner(self._checkpoint, self.config, backend)
                self._tokenizer = tokenizer.result()
            self._check_vocabulary()
        except BaseException:
            self._checkpoint.close()
            raise
        self.plan: Plan = self._runner.plan
        self.engine = Engine(
            LocalExecutor(self._runner),
            self.config,
            max_model_len=self._runner.limits.max_model_len,
            kv_blocks=self._runner.limits.kv_blocks,
            vocab_size=self._runner.graph.vocab_size,
            eos_ids=self._tokenizer.eos_ids,
            new_stream=self._tokenizer.stream,
        )
        self._request_ids = map(str, itertools.count())

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers every prompt; the outputs are in the order of the prompts.

        prompts: one prompt or a list of them. sampling_params: one for all, or one per prompt. use_tqdm: show
        progress on stderr, if that is a terminal.

        Raises PromptError or ParamsError before anything runs if any prompt is refused. If it is interrupted,
        its requests are aborted.
        """
        prompt_list = _as_list(prompts)
        params_list = _params_for(prompt_list, sampling_params)
        requests: dict[str, Request] = {}
        try:
            for i, (prompt, params) in enumerate(zip(prompt_list, params_list, strict=True)):
                try:
                    request = self._add(prompt, params)
                except HexadError as error:
                    error.add_note(f"It is prompt {i} of the {len(prompt_list)} given, counted from 0.")
                    raise
                requests[request.request_id] = request
            left = len(requests)
            with _progress(left, use_tqdm) as report:
                while left:
                    advanced = [r for r in self.engine.step() if r.request_id in requests]
                    left -= sum(r.finished for r in advanced)
                    report(advanced)
        finally:
            for request_id in requests:
                self.engine.abort(request_id)
        return [request.output() for request in requests.values()]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Yields the output of one prompt so far, whenever it has a new token. Closing it aborts the request.

        Raises PromptError at the first `next`.
        """
        request = self._add(prompt, sampling_params or SamplingParams())
        try:
            seen, finished = 0, False
            while not finished:
                while request.num_generated == seen:
                    self.engine.step()
                seen, finished = request.num_generated, request.finished
                yield request.output()
        finally:
            self.engine.abort(request.request_id)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    def close(self) -> None:
        """Aborts what runs and frees the model. It can be called twice; anything else fails from now on."""
        for request_id in list(self.engine.scheduler.requests):
            self.engine.abort(request_id)
        self._runner.close()
        self._checkpoint.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_vocabulary(self) -> None:
        """Logits may be wider than the vocabulary (padded embeddings), but every token must have one."""
        tokens, logits = self._tokenizer.vocab_size, self._runner.graph.vocab_size
        if tokens > logits:
            raise CheckpointError(
                f"{self._checkpoint.path}: its tokenizer has {tokens} tokens, but its model has logits for "
                f"{logits} only; the two do not belong together."
            )

    def _add(self, prompt: Prompt, params: SamplingParams) -> Request:
        text, token_ids = self._read(prompt)
        return self.engine.add_request(next(self._request_ids), token_ids, params, prompt=text)

    def _read(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """A prompt's text, if it has one, and its tokens."""
        if isinstance(prompt, Mapping):
            text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            if prompt.keys() - {"prompt", "prompt_token_ids"} or (text is None and token_ids is None):
                raise PromptError(
                    "A prompt dict has the keys 'prompt' or 'prompt_token_ids' or both, not "
                    f"{sorted(map(str, prompt))}."
                )
            if text is not None and not isinstance(text, str):
                raise PromptError(f"'prompt' must be a str, not {_shown(text)}.")
        elif isinstance(prompt, str):
            text, token_ids = prompt, None
        else:
            text, token_ids = None, prompt
        if text is not None and token_ids is None:
            return text, self._tokenizer.encode(text)
        if not _is_list(token_ids) or not all(_is_token_id(i) for i in token_ids):
            raise PromptError(
                f"A prompt is a str, a list of int token ids or a dict, not {_shown(token_ids)}."
            )
        return text, list(token_ids)


def _engine_config(settings: Mapping[str, Any]) -> EngineConfig:
    known = [field.name for field in fields(EngineConfig)]
    for name in settings:
        if name not in known:
            raise ConfigError(f"There is no setting {name!r}; the settings are {', '.join(known)}.")
    return EngineConfig(**settings)


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: object) -> str:
    return f"{type(value).__name__} {shown(value)}"


def _as_list(prompts: Any) -> list[Any]:
    """A list of prompts; a list that starts with an int is one prompt."""
    if not _is_list(prompts) or (prompts and isinstance(prompts[0], int)):
        return [prompts]
    return list(prompts)


def _params_for(prompts: Sequence[Any], params: Any) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * len(prompts)
    if not _is_list(params) or not all(isinstance(p, SamplingParams) for p in params):
        raise ParamsError(
            f"sampling_params must be a SamplingParams or a list of them, not {_shown(params)}."
        )
    if len(params) != len(prompts):
        raise ParamsError(
            f"There are {len(params)} sampling_params for {len(prompts)} prompts; give one for each."
        )
    return list(params)


@contextmanager
def _progress(total: int, wanted: bool) -> Iterator[Callable[[list[Request]], None]]:
    """Shows requests done and generated tokens per second on stderr while the block runs.

    Yields what is to be called with the requests that got a token, after each step.
    """
    if not wanted or not sys.stderr.isatty():
        yield lambda advanced: None
        return
    import time

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.fields[rate]:6.1f} tok/s"), TimeRemainingColumn()
    with Progress(BarColumn(), MofNCompleteColumn(), *columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, rate=0.0)
        tokens, begin = 0, time.perf_counter()

        def report(advanced: list[Request]) -> None:
            nonlocal tokens
            tokens += len(advanced)
            rate = tokens / (time.perf_counter() - begin)
            bar.update(task, advance=sum(r.finished for r in advanced), rate=rate)

        yield report
