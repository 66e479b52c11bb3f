"""Anthropic's Messages API."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from json.encoder import encode_basestring as quoted
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from hexad.errors import HexadError
from hexad.outputs import CompletionOutput
from hexad.params import SamplingParams
from hexad.server.anthropic_messages import chat_tools, conversation
from hexad.server.anthropic_schemas import CountTokensRequest, MessagesRequest
from hexad.server.blocks import Block, Blocks, call_arguments
from hexad.server.chat import Chat, ChatGeneration, ChatRequest, served
from hexad.server.errors import ApiError, api_error
from hexad.server.http import EventStream, JSONResponse, encode, unless_gone
from hexad.server.logs import request_id
from hexad.server.sampling import response_format

router = APIRouter(prefix="/v1/messages")

_ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(error: ApiError) -> dict[str, Any]:
    """An error as Anthropic writes it."""
    kind = _ERRORS.get(error.status) or ("api_error" if error.status >= 500 else "invalid_request_error")
    return {
        "type": "error",
        "error": {"type": kind, "message": error.message},
        "request_id": request_id.get(),
    }


@router.post("")
async def messages(request: Request, body: MessagesRequest) -> Response:
    """Answers a conversation."""
    chat = served(request)
    name = chat.service.check_model(body.model)
    generation = await chat.start(_chat_request(chat, body, _params(chat, body)), stream=True)
    answer = _Answer(name, generation)
    if body.stream:
        return EventStream(answer.stream())
    return JSONResponse(await unless_gone(request, answer.whole()))


@router.post("/count_tokens")
async def count_tokens(request: Request, body: CountTokensRequest) -> Response:
    """How many tokens a conversation is."""
    chat = served(request)
    chat.service.check_model(body.model)
    count = await chat.count(_chat_request(chat, body, chat.service.default_params))
    return JSONResponse({"input_tokens": count})


class _Answer:
    """A message in the making, and the events that tell of it."""

    def __init__(self, model: str, generation: ChatGeneration) -> None:
        self._generation = generation
        self._blocks = Blocks()
        self._generated = self._cached = 0
        self._message: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(16)}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    async def whole(self) -> dict[str, Any]:
        """The message when it is complete. Raises ApiError."""
        with contextlib.closing(self._generation):
            async for _ in self._events():
                pass
        return self._message

    async def stream(self) -> AsyncIterator[bytes]:
        """Its events; an error is one, too."""
        with contextlib.closing(self._generation):
            try:
                async for event in self._events():
                    yield event
            except ApiError as error:
                yield _written("error", error_body(error))

    async def _events(self) -> AsyncIterator[bytes]:
        yield _written("message_start", {"type": "message_start", "message": self._message})
        yield _written("ping", {"type": "ping"})
        async for output, pieces in self._generation:
            for completion, delta in pieces:
                self._generated += len(completion.token_ids)
                self._cached = output.num_cached_tokens
                for kind, block, text in self._blocks.push(delta):
                    yield self._event(kind, block, text)
                if completion.finished:
                    self._message |= _stop(self._generation, completion)
        for kind, block, text in self._blocks.close():
            yield self._event(kind, block, text)
        self._message["content"] = [_content(block) for block in self._blocks.blocks]
        self._message["usage"] = self._usage()
        delta_ = {key: self._message[key] for key in ("stop_reason", "stop_sequence")}
        fields = {"type": "message_delta", "delta": delta_, "usage": self._message["usage"]}
        yield _written("message_delta", fields)
        yield _written("message_stop", {"type": "message_stop"})

    def _event(self, kind: str, block: Block, text: str) -> bytes:
        """What happens to a block."""
        index = len(self._blocks.blocks) - 1
        if kind == "more":
            delta, field = _DELTAS[block.kind]
            return (
                f'event: content_block_delta\ndata: {{"type":"content_block_delta","index":{index},'
                f'"delta":{{"type":"{delta}","{field}":{quoted(text)}}}}}\n\n'
            ).encode()
        fields: dict[str, Any] = {"type": f"content_block_{'start' if kind == 'begin' else 'stop'}"}
        fields["index"] = index
        if kind == "begin":
            fields["content_block"] = _content(block)
        return _written(fields["type"], fields)

    def _usage(self) -> dict[str, int]:
        """What was computed before is counted apart."""
        return {
            "input_tokens": self._generation.generation.num_prompt_tokens - self._cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self._cached,
            "output_tokens": self._generated,
        }


_DELTAS = {
    "text": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}


def _written(kind: str, fields: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), encode(fields))


def _content(block: Block) -> dict[str, Any]:
    """A block of the message, as far as it is there."""
    if block.kind == "text":
        return {"type": "text", "text": block.text}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    # Empty where the model was cut off: there is no way to say so.
    arguments = call_arguments(block.text) or {}
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": arguments}


def _stop(generation: ChatGeneration, completion: CompletionOutput) -> dict[str, Any]:
    reason = generation.finish_reason(completion)
    if reason == "stop" and isinstance(completion.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": completion.stop_reason}
    names = {"length": "max_tokens", "tool_calls": "tool_use"}
    return {"stop_reason": names.get(reason or "", "end_turn")}


def _params(chat: Chat, body: MessagesRequest) -> SamplingParams:
    if body.n not in (None, 1):
        raise ApiError(400, f"n must be 1 for a message, not {body.n}.", param="n")
    given = body.output_format or (body.output_config.format if body.output_config else None)
    thinking = body.thinking
    budget = thinking.budget_tokens if thinking is not None and thinking.type == "enabled" else None
    try:
        text_format = response_format(given, "output_config.format")
        return body.sampling_params(
            replace(chat.service.default_params, max_tokens=None),
            max_tokens=body.max_tokens,
            stop=body.stop_sequences or None,
            thinking_token_budget=budget if chat.reasoning_format is not None else None,
            structured_outputs=text_format,
        )
    except HexadError as error:
        raise api_error(error) from error


def _chat_request(chat: Chat, body: CountTokensRequest, params: SamplingParams) -> ChatRequest:
    thinking, choice = body.thinking, body.tool_choice
    tool_choice: str | dict[str, str] = "auto"
    if choice is not None:
        tool_choice = {"any": "required"}.get(choice.type, choice.type)
        if choice.type == "tool":
            if choice.name is None:
                raise ApiError(400, "tool_choice.name must be a tool's name.", param="tool_choice")
            tool_choice = {"name": choice.name}
    kwargs: dict[str, Any] = {}
    if thinking is not None:
        kwargs["enable_thinking"] = thinking.type != "disabled"
    if body.output_config is not None and body.output_config.effort is not None:
        kwargs["reasoning_effort"] = body.output_config.effort
    turns = conversation(body.messages, body.system)
    # An answer that has begun is gone on with.
    begun = bool(turns) and turns[-1]["role"] == "assistant" and "tool_calls" not in turns[-1]
    return ChatRequest(
        messages=turns,
        params=params,
        tools=chat_tools(body.tools or ()),
        tool_choice=tool_choice,
        parallel_tool_calls=not (choice is not None and choice.disable_parallel_tool_use),
        include_reasoning=not (
            thinking is not None and (thinking.type == "disabled" or thinking.display == "omitted")
        ),
        add_generation_prompt=not begun,
        continue_final_message=begun,
        template_kwargs=kwargs,
    )
