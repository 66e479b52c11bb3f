"""LLM: the offline front. Prompts in, finished texts out."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeGuard

from hexad.config import EngineConfig
from hexad.engine.engine import Engine
from hexad.errors import ConfigError, HexadError, ParamsError, PromptError
from hexad.outputs import RequestOutput
from hexad.params import SamplingParams

if TYPE_CHECKING:
    from types import TracebackType

    from hexad.checkpoint.tokenizer import Tokenizer
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

    def __init__(self, model: str = "smollm2:135m", *, backend: str = "cpu", **settings: Any) -> None:
        from hexad.checkpoint.open import open_checkpoint
        from hexad.checkpoint.store import resolve
        from hexad.runner.executor import LocalExecutor
        from hexad.runner.model_runner import ModelRunner

        self.config = _engine_config(settings)
        self._checkpoint = open_checkpoint(resolve(model))
        try:
            # Both spend their time in native code, so they overlap.
            with ThreadPoolExecutor(1) as thread:
                tokenizer = thread.submit(self._checkpoint.tokenizer)
                self._runner = ModelRunner(self._checkpoint, self.config, backend)
                self._tokenizer = tokenizer.result()
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
        self._streams: dict[str, RequestOutput | None] = {}

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
        request_ids: list[str] = []
        finished: dict[str, RequestOutput] = {}
        try:
            for i, (prompt, params) in enumerate(zip(prompt_list, params_list, strict=True)):
                try:
                    request_ids.append(self._add(prompt, params))
                except HexadError as error:
                    error.add_note(f"It is prompt {i} of the {len(prompt_list)} given, counted from 0.")
                    raise
            with _progress(len(request_ids), use_tqdm) as report:
                while len(finished) < len(request_ids):
                    outputs = self._step()
                    finished.update((o.request_id, o) for o in outputs if o.finished)
                    report(outputs)
        finally:
            for request_id in request_ids:
                self.engine.abort(request_id)
        return [finished[request_id] for request_id in request_ids]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Yields the output of one prompt so far, whenever it has a new token. Closing it aborts the request.

        Raises PromptError at the first `next`.
        """
        request_id = self._add(prompt, sampling_params or SamplingParams())
        self._streams[request_id] = None
        try:
            finished = False
            while not finished:
                while (output := self._streams[request_id]) is None:
                    self._step()
                self._streams[request_id] = None
                finished = output.finished
                yield output
        finally:
            self.engine.abort(request_id)
            del self._streams[request_id]

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

    def _add(self, prompt: Prompt, params: SamplingParams) -> str:
        text, token_ids = self._read(prompt)
        request_id = next(self._request_ids)
        self.engine.add_request(request_id, token_ids, params, prompt=text)
        return request_id

    def _step(self) -> list[RequestOutput]:
        """One engine step. Hands the outputs of open streams to these and returns the others."""
        others = []
        for output in self.engine.step():
            if output.request_id in self._streams:
                self._streams[output.request_id] = output
            else:
                others.append(output)
        return others

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
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


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
def _progress(total: int, wanted: bool) -> Iterator[Callable[[list[RequestOutput]], None]]:
    """Shows requests done and generated tokens per second on stderr while the block runs.

    Yields what is to be called with the outputs of each step: one new token each.
    """
    if not wanted or not sys.stderr.isatty():
        yield lambda outputs: None
        return
    import time

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.fields[rate]:6.1f} tok/s"), TimeRemainingColumn()
    with Progress(BarColumn(), MofNCompleteColumn(), *columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, rate=0.0)
        tokens, begin = 0, time.perf_counter()

        def report(outputs: list[RequestOutput]) -> None:
            nonlocal tokens
            tokens += len(outputs)
            rate = tokens / (time.perf_counter() - begin)
            bar.update(task, advance=sum(o.finished for o in outputs), rate=rate)

        yield report
