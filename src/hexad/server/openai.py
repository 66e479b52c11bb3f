"""OpenAI's API: models, completions and chat."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from json.encoder import encode_basestring as quoted
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from hexad.errors import HexadError
from hexad.outputs import CompletionOutput, RequestOutput
from hexad.params import SamplingParams
from hexad.prompts import Prompt, TokenPrompt
from hexad.server.chat import ChatGeneration, ChatMessage, ChatRequest, ToolCall, served
from hexad.server.errors import ApiError, api_error
from hexad.server.http import EventStream, JSONResponse, encode, unless_gone
from hexad.server.openai_logprobs import CompletionLogprobs, chat_logprobs, prompt_logprobs
from hexad.server.openai_schemas import ChatCompletionRequest, CompletionRequest, GenerationBody
from hexad.server.parsers.deltas import Delta
from hexad.server.sampling import response_format
from hexad.server.service import Generation, Service

router = APIRouter()


def error_body(error: ApiError) -> dict[str, Any]:
    """An error as OpenAI writes it."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}


def error_event(error: ApiError) -> bytes:
    """An error in the middle of a stream."""
    return b"data: " + encode(error_body(error)) + b"\n\n"


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The names under which the model is served."""
    service = served(request).service
    return JSONResponse({"object": "list", "data": [_model(service, name) for name in service.names]})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """One of the names."""
    service = served(request).service
    return JSONResponse(_model(service, service.check_model(name)))


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continues prompts: texts or lists of token ids."""
    service = served(request).service
    name = service.check_model(body.model)
    if body.suffix:
        raise ApiError(400, "suffix is not supported here; /infill fills text in.", param="suffix")
    if body.best_of not in (None, body.n or 1):
        raise ApiError(400, "best_of is not supported; use_beam_search finds the n best.", param="best_of")
    generate = body.max_tokens != 0
    if not generate and not body.echo:
        raise ApiError(400, "max_tokens must be at least 1, or 0 with echo.", param="max_tokens")
    try:
        params = _params(
            body,
            service.default_params,
            max_tokens=16 if body.max_tokens is None else body.max_tokens or 1,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo and not body.stream else None,
        )
        prompts = _prompts(body.prompt)
    except HexadError as error:
        raise api_error(error) from error

    def read() -> list[TokenPrompt]:
        add = body.add_special_tokens is not False
        return [_cut(service.read(prompt, add_special=add), body, params, service) for prompt in prompts]

    generation = await service.start(
        read,
        params,
        stream=bool(body.stream),
        priority=body.priority,
        generate=generate,
        adapt=partial(service.beam_search, length_penalty=body.length_penalty)
        if body.use_beam_search and generate
        else None,
    )
    reply = _Reply("cmpl-", "text_completion", name, body, generation)
    if body.stream:
        return EventStream(_completion_events(generation, reply, service, body, params.n))
    outputs = await unless_gone(request, generation.collect())
    choices = []
    for i, output in enumerate(outputs):
        prompt = generation.prompts[i]
        for completion in output.outputs:
            text, ids = completion.text, completion.token_ids
            logprobs = CompletionLogprobs(service, reply.as_ids)
            if body.echo:
                text = _text_of(service, prompt) + (text if generate else "")
                if output.prompt_logprobs is not None:
                    logprobs.add(prompt.token_ids, output.prompt_logprobs)
            if generate and completion.logprobs is not None:
                logprobs.add(ids, completion.logprobs)
            choices.append(
                {
                    "index": i * params.n + completion.index,
                    "text": text,
                    "logprobs": logprobs.value() if body.logprobs is not None else None,
                    "finish_reason": _reason(completion),
                    "stop_reason": completion.stop_reason,
                    **_token_ids(body, prompt, ids),
                    **prompt_logprobs(body, output),
                }
            )
    return JSONResponse(reply.whole(choices, _usage(outputs)))


async def _completion_events(
    generation: Generation, reply: _Reply, service: Service, body: CompletionRequest, n: int
) -> AsyncIterator[bytes]:
    offsets: dict[int, CompletionLogprobs] = {}
    begun: set[int] = set()
    with contextlib.closing(generation):
        try:
            async for i, output in generation:
                for completion in output.outputs:
                    index = i * n + completion.index
                    text = completion.text
                    first = index not in begun
                    if first:
                        begun.add(index)
                        if body.echo:
                            text = _text_of(service, generation.prompts[i]) + text
                    reason = _reason(completion)
                    logprobs = None
                    if completion.logprobs is not None:
                        log = offsets.setdefault(index, CompletionLogprobs(service, reply.as_ids))
                        logprobs = log.add(completion.token_ids, completion.logprobs).take()
                    more = None
                    if body.return_token_ids:
                        prompt = generation.prompts[i] if first else None
                        more = _token_ids(body, prompt, completion.token_ids)
                    if text or reason or logprobs or more:
                        yield reply.event(
                            index, f'"text":{quoted(text)}', logprobs, reason, completion.stop_reason, more
                        )
            if reply.include_usage:
                yield reply.last()
        except ApiError as error:
            yield error_event(error)
        yield b"data: [DONE]\n\n"


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, body: ChatCompletionRequest) -> Response:
    """Answers a conversation."""
    chat = served(request)
    name = chat.service.check_model(body.model)
    for field in ("functions", "function_call"):
        if getattr(body, field) is not None:
            raise ApiError(400, f"{field} is no longer OpenAI's; use tools and tool_choice.", param=field)
    if set(body.modalities or ()) - {"text"}:
        raise ApiError(400, "modalities must be ['text']: this model makes nothing else.", param="modalities")
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    try:
        params = _params(
            body,
            replace(chat.service.default_params, max_tokens=None),
            max_tokens=most,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=None,
        )
    except HexadError as error:
        raise api_error(error) from error
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")
    kwargs = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    conversation = ChatRequest(
        messages=body.messages,
        params=params,
        tools=body.tools or (),
        tool_choice=tool_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        include_reasoning=body.include_reasoning,
        length_penalty=body.length_penalty if body.use_beam_search else None,
        chat_template=body.chat_template,
        add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
        continue_final_message=body.continue_final_message,
        template_kwargs=kwargs,
        cache_salt=body.cache_salt,
        priority=body.priority,
    )
    generation = await chat.start(conversation, stream=bool(body.stream))
    reply = _Reply("chatcmpl-", "chat.completion", name, body, generation.generation)
    if body.stream:
        return EventStream(_chat_events(generation, reply, body, params.n))
    output, messages = await unless_gone(request, generation.collect())
    service, echoed = chat.service, _echoed(body)
    choices = [
        {
            "index": completion.index,
            "message": chat_message(message, echoed),
            "logprobs": chat_logprobs(service, completion, reply.as_ids) if body.logprobs else None,
            "finish_reason": generation.finish_reason(completion),
            "stop_reason": completion.stop_reason,
            **_token_ids(body, None, completion.token_ids),
        }
        for completion, message in zip(output.outputs, messages, strict=True)
    ]
    whole = reply.whole(choices, _usage([output]))
    if body.return_token_ids:
        whole["prompt_token_ids"] = generation.prompt.token_ids
    return JSONResponse({**whole, **prompt_logprobs(body, output)})


async def _chat_events(
    generation: ChatGeneration, reply: _Reply, body: ChatCompletionRequest, n: int
) -> AsyncIterator[bytes]:
    service = generation.service
    with contextlib.closing(generation):
        try:
            for index in range(n):
                role = {"role": "assistant", "content": _echoed(body)}
                first = {"prompt_token_ids": generation.prompt.token_ids} if body.return_token_ids else None
                yield reply.event(index, f'"delta":{_json(role)}', more=first)
            async for _, output in generation.generation:
                for completion in output.outputs:
                    delta = generation.delta(completion)
                    reason = generation.finish_reason(completion)
                    logprobs = chat_logprobs(service, completion, reply.as_ids) if body.logprobs else None
                    more = _token_ids(body, None, completion.token_ids) if body.return_token_ids else None
                    if delta or reason or body.logprobs or more:
                        yield reply.event(
                            completion.index, f'"delta":{_delta_json(delta)}', logprobs, reason,
                            completion.stop_reason, more,
                        )  # fmt: skip
            if reply.include_usage:
                yield reply.last()
        except ApiError as error:
            yield error_event(error)
        yield b"data: [DONE]\n\n"


def tool_choice(value: str | Mapping[str, Any] | None) -> str | dict[str, str]:
    """OpenAI's tool_choice as ChatRequest has it. Raises ApiError."""
    if value is None:
        return "auto"
    if isinstance(value, str):
        return value
    function = value.get("function", value)
    name = function.get("name") if isinstance(function, Mapping) else None
    if value.get("type") != "function" or not isinstance(name, str):
        raise ApiError(
            400,
            "tool_choice must be 'auto', 'none', 'required' or {'type': 'function', 'function': {'name': …}}"
            ".",
            param="tool_choice",
        )
    return {"name": name}


def chat_message(message: ChatMessage, prefix: str = "") -> dict[str, Any]:
    """A message as OpenAI writes it."""
    value: dict[str, Any] = {"role": "assistant", "content": prefix + message.content}
    if message.reasoning:
        value["reasoning_content"] = message.reasoning
    if message.tool_calls:
        value["content"] = value["content"] or None
        value["tool_calls"] = [tool_call(call) for call in message.tool_calls]
    return value


def tool_call(call: ToolCall) -> dict[str, Any]:
    """A call as OpenAI writes it."""
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _delta_json(delta: Delta) -> str:
    if not delta.tool_calls and not delta.reasoning:  # nearly always
        return f'{{"content":{quoted(delta.content)}}}' if delta.content else "{}"
    value: dict[str, Any] = {}
    if delta.content:
        value["content"] = delta.content
    if delta.reasoning:
        value["reasoning_content"] = delta.reasoning
    if delta.tool_calls:
        value["tool_calls"] = [
            {
                "index": piece.index,
                **({"id": piece.id, "type": "function"} if piece.name is not None else {}),
                "function": {
                    **({"name": piece.name} if piece.name is not None else {}),
                    "arguments": piece.arguments,
                },
            }
            for piece in delta.tool_calls
        ]
    return _json(value)


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "hexad",
        "root": service.names[0],
        "parent": None,
        "max_model_len": service.max_model_len,
    }


def _params(
    body: GenerationBody,
    defaults: SamplingParams,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    text_format = response_format(body.response_format)
    if text_format is not None and body.structured_outputs is not None:
        raise ApiError(
            400, "response_format and structured_outputs exclude each other.", param="response_format"
        )
    if body.use_beam_search and body.stream:
        raise ApiError(
            400, "A beam search cannot be streamed: which beam is best shows at its end.", param="stream"
        )
    return body.sampling_params(
        defaults,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs if body.prompt_logprobs is not None else prompt_logprobs,
        structured_outputs=text_format,
        temperature=1.0 if body.use_beam_search else None,  # beams are many at temperature 0, too
    )


def _prompts(prompt: str | Sequence[Any]) -> list[Prompt]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ApiError(400, "prompt must not be an empty list.", param="prompt")
    prompts: list[Any] = list(prompt)
    return [prompts] if isinstance(prompts[0], int) else prompts


def _cut(prompt: TokenPrompt, body: GenerationBody, params: SamplingParams, service: Service) -> TokenPrompt:
    """The prompt with its salt, and cut to truncate_prompt_tokens."""
    ids, most = prompt.token_ids, body.truncate_prompt_tokens
    if most == -1:
        most = max(1, service.max_model_len - (params.max_tokens or 1))
    if most is not None and len(ids) > most:
        ids = ids[:most] if body.truncation_side == "right" else ids[len(ids) - most :]
        return TokenPrompt(None, ids, body.cache_salt)
    return prompt._replace(cache_salt=body.cache_salt)


def _text_of(service: Service, prompt: TokenPrompt) -> str:
    return service.tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text


def _echoed(body: ChatCompletionRequest) -> str:
    """With echo, the content of the last message, which the answer goes on from."""
    content = body.messages[-1].get("content") if body.echo and body.messages else None
    return content if isinstance(content, str) else ""


def _reason(completion: CompletionOutput) -> str | None:
    return "stop" if completion.finish_reason == "repetition" else completion.finish_reason


def _json(value: object) -> str:
    return "null" if value is None else json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _token_ids(body: GenerationBody, prompt: TokenPrompt | None, ids: Sequence[int]) -> dict[str, Any]:
    if not body.return_token_ids:
        return {}
    first = {} if prompt is None else {"prompt_token_ids": prompt.token_ids}
    return {**first, "token_ids": list(ids)}


def usage(prompt: int, generated: int, cached: int) -> dict[str, Any]:
    """Numbers of tokens as OpenAI writes them."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    return usage(
        sum(len(output.prompt_token_ids) for output in outputs),
        sum(len(completion.token_ids) for output in outputs for completion in output.outputs),
        sum(output.num_cached_tokens for output in outputs),
    )


class _Reply:
    """Writes the answers of one generation, whole or in chunks."""

    def __init__(
        self, prefix: str, kind: str, model: str, body: GenerationBody, generation: Generation
    ) -> None:
        self._generation = generation
        self._head = {
            "id": f"{prefix}{body.request_id or secrets.token_hex(16)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        options = body.stream_options
        self.include_usage = options is not None and options.include_usage
        self._continuous_usage = options is not None and options.continuous_usage_stats
        self.as_ids = body.return_tokens_as_token_ids
        chunk = {**self._head, "object": f"{kind}.chunk" if kind == "chat.completion" else kind}
        self._begin = f'data: {_json(chunk)[:-1]},"choices":['
        self._end = '],"usage":null}\n\n' if self.include_usage else "]}\n\n"

    def whole(self, choices: list[Any], usage: Mapping[str, Any]) -> dict[str, Any]:
        """An answer that is not streamed."""
        return {**self._head, "choices": choices, "usage": usage}

    def event(
        self,
        index: int,
        new: str,
        logprobs: Mapping[str, Any] | None = None,
        reason: str | None = None,
        stop_reason: int | str | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> bytes:
        """A chunk with one choice. new: the field of its JSON object that says what is new."""
        fields = _NOTHING_ELSE
        if logprobs or reason:
            fields = (
                f'"logprobs":{_json(logprobs)},"finish_reason":{_json(reason)},'
                f'"stop_reason":{_json(stop_reason)}'
            )
        if more:
            fields = f"{fields},{_json(more)[1:-1]}"
        end = self._usage() if self._continuous_usage else self._end
        return f'{self._begin}{{"index":{index},{new},{fields}}}{end}'.encode()

    def last(self) -> bytes:
        """The chunk with the usage."""
        return f"{self._begin}{self._usage()}".encode()

    def _usage(self) -> str:
        generation = self._generation
        value = usage(generation.num_prompt_tokens, generation.num_generated, generation.num_cached_tokens)
        return f'],"usage":{_json(value)}}}\n\n'


_NOTHING_ELSE = '"logprobs":null,"finish_reason":null,"stop_reason":null'
"""The other fields of a choice that goes on: of nearly all."""
