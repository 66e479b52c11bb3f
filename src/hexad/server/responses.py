"""OpenAI's Responses API: answers as items, which are kept so that a conversation can go on from them."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from json.encoder import encode_basestring as quoted
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from hexad.errors import HexadError
from hexad.outputs import CompletionOutput
from hexad.params import SamplingParams
from hexad.server.blocks import Block, Blocks, call_arguments
from hexad.server.chat import ChatGeneration, ChatRequest, served
from hexad.server.errors import ApiError, api_error
from hexad.server.http import EventStream, JSONResponse, encode, unless_gone
from hexad.server.openai import tool_choice
from hexad.server.openai_logprobs import chat_logprobs
from hexad.server.response_items import (
    Item,
    chat_tools,
    conversation,
    input_items,
    new_id,
    output_item,
    output_part,
)
from hexad.server.response_store import ResponseStore, StoredResponse
from hexad.server.responses_schemas import ResponsesRequest
from hexad.server.sampling import response_format
from hexad.server.service import Service

router = APIRouter(prefix="/v1/responses")

_LOGPROBS = "message.output_text.logprobs"


@router.post("")
async def create(request: Request, body: ResponsesRequest) -> Response:
    """Answers an input, or goes on from an earlier response."""
    chat = served(request)
    name = chat.service.check_model(body.model)
    store = _store(request)
    items = _items(store, body)
    conversation_ = _chat_request(chat.service, body, items)
    generation = await chat.start(conversation_, stream=True)
    answer = _Answer(body, name, generation, conversation_.params, items, store)
    if body.stream:
        return EventStream(answer.stream())
    return JSONResponse(await unless_gone(request, answer.whole()))


@router.post("/input_tokens")
async def input_tokens(request: Request, body: ResponsesRequest) -> Response:
    """How many tokens an input would be."""
    chat = served(request)
    chat.service.check_model(body.model)
    count = await chat.count(_chat_request(chat.service, body, _items(_store(request), body)))
    return JSONResponse({"object": "response.input_tokens", "input_tokens": count})


@router.get("/{response_id}")
async def retrieve(request: Request, response_id: str, stream: bool = False) -> Response:
    """A response that was stored."""
    stored = _stored(request, response_id)
    if stream:
        raise ApiError(400, "Only background responses can be streamed again.", param="stream")
    return Response(stored.response, media_type="application/json")


@router.delete("/{response_id}")
async def delete(request: Request, response_id: str) -> Response:
    """Forgets a response."""
    _stored(request, response_id)
    _store(request).delete(response_id)
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


@router.post("/{response_id}/cancel")
async def cancel(request: Request, response_id: str) -> Response:
    """Refused: only background responses can be cancelled, and there are none."""
    _stored(request, response_id)
    raise ApiError(400, "Only background responses can be cancelled; hang up to end any other.")


@router.get("/{response_id}/input_items")
async def list_input_items(
    request: Request,
    response_id: str,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """The items that went into a response, page by page."""
    items = json.loads(_stored(request, response_id).items)
    if order == "desc":
        items.reverse()
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise ApiError(400, f"There is no item {after[:100]!r} in it.", param="after")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    return JSONResponse(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(items) > limit,
        }
    )


class _Answer:
    """A response in the making: its items, and the events that tell of them."""

    def __init__(
        self,
        body: ResponsesRequest,
        model: str,
        generation: ChatGeneration,
        params: SamplingParams,
        items: Sequence[Item],
        store: ResponseStore,
    ) -> None:
        self._body = body
        self._generation = generation
        self._items = items
        self._store = store
        self._blocks = Blocks()
        self._output: list[Item] = []
        self._item_id = ""
        self._logprobs: list[Any] = []
        self._held_logprobs: list[Any] = []
        self._generated = self._cached = 0
        self._number = -1
        self._response = _response(body, model, params)

    async def whole(self) -> dict[str, Any]:
        """The response when it is complete. Raises ApiError."""
        with contextlib.closing(self._generation):
            async for _ in self._events():
                pass
        return self._response

    async def stream(self) -> AsyncIterator[bytes]:
        """Its events; an error is one, too."""
        with contextlib.closing(self._generation):
            try:
                async for event in self._events():
                    yield event
            except ApiError as error:
                self._response["error"] = {"code": "server_error", "message": error.message}
                self._finish("failed")
                yield self._lifecycle("failed")

    async def _events(self) -> AsyncIterator[bytes]:
        yield self._lifecycle("created")
        yield self._lifecycle("in_progress")
        status = "completed"
        async for output, pieces in self._generation:
            for completion, delta in pieces:
                self._generated += len(completion.token_ids)
                self._cached = output.num_cached_tokens
                if completion.finish_reason == "length":
                    status = "incomplete"
                    self._response["incomplete_details"] = {"reason": "max_output_tokens"}
                self._held_logprobs += self._logprobs_of(completion)
                if delta:  # else its text is held back, and with it what is said of it
                    held, self._held_logprobs = self._held_logprobs, []
                    for kind, block, text in self._blocks.push(delta):
                        yield self._event(kind, block, text, held)
        for kind, block, text in self._blocks.close():
            yield self._event(kind, block, text, [], status)
        self._finish(status)
        if self._body.store is not False:
            stored = StoredResponse(encode(self._response), encode(self._items))
            self._store.put(self._response["id"], stored)
        yield self._lifecycle(status)

    def _event(
        self, kind: str, block: Block, text: str, logprobs: list[Any], status: str = "completed"
    ) -> bytes:
        """What happens to a block."""
        if kind == "more":
            self._logprobs += logprobs if block.kind == "text" else []
            fields = f'"delta":{quoted(text)}'
            if block.kind == "text":
                fields += f',"logprobs":{_json(logprobs)}' if logprobs else ',"logprobs":[]'
            return self._on_item(_DELTAS[block.kind], fields, in_part=block.kind != "call")
        if kind == "begin":
            self._item_id = new_id(_PREFIXES[block.kind])
            item = output_item(block, self._item_id, "in_progress")
            event = self._write("output_item.added", {"output_index": self._index, "item": item})
            if block.kind == "call":
                return event
            part = output_part(block)
            return event + self._on_item("content_part.added", f'"part":{_json(part)}', in_part=True)
        if block.kind == "call" and call_arguments(block.text) is not None:
            status = "completed"  # it was there before the message was cut off
        item = output_item(block, self._item_id, status, self._logprobs)
        if block.kind == "call":
            fields = f'"arguments":{quoted(block.text)},"name":{quoted(block.name)}'
            event = self._on_item("function_call_arguments.done", fields, in_part=False)
        else:
            part = output_part(block, self._logprobs)
            fields = f'"text":{quoted(block.text)}'
            if block.kind == "text":
                fields += f',"logprobs":{_json(self._logprobs)}'
            event = self._on_item(_DONE[block.kind], fields, in_part=True)
            event += self._on_item("content_part.done", f'"part":{_json(part)}', in_part=True)
        event += self._write("output_item.done", {"output_index": self._index, "item": item})
        self._output.append(item)
        self._logprobs = []
        return event

    @property
    def _index(self) -> int:
        """Of the item that is open."""
        return len(self._output)

    def _on_item(self, kind: str, fields: str, *, in_part: bool) -> bytes:
        """An event about the item that is open, or about the only part of its content."""
        self._number += 1
        part = '"content_index":0,' if in_part else ""
        return (
            f'event: response.{kind}\ndata: {{"type":"response.{kind}","sequence_number":{self._number},'
            f'"item_id":"{self._item_id}","output_index":{self._index},{part}{fields}}}\n\n'
        ).encode()

    def _write(self, kind: str, fields: dict[str, Any]) -> bytes:
        self._number += 1
        value = {"type": f"response.{kind}", "sequence_number": self._number, **fields}
        return b"event: response.%s\ndata: %s\n\n" % (kind.encode(), encode(value))

    def _lifecycle(self, kind: str) -> bytes:
        return self._write(kind, {"response": self._response})

    def _logprobs_of(self, completion: CompletionOutput) -> list[Any]:
        found = chat_logprobs(self._generation.service, completion, as_ids=False)
        return found["content"] if found else []

    def _finish(self, status: str) -> None:
        num_prompt = self._generation.generation.num_prompt_tokens
        encode_ = self._generation.service.tokenizer.encode
        reasoning = (block.text for block in self._blocks.blocks if block.kind == "reasoning")
        self._response |= {
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "output": self._output,
            "usage": {
                "input_tokens": num_prompt,
                "input_tokens_details": {"cached_tokens": self._cached, "cache_write_tokens": 0},
                "output_tokens": self._generated,
                "output_tokens_details": {
                    "reasoning_tokens": sum(len(encode_(text, add_special=False)) for text in reasoning)
                },
                "total_tokens": num_prompt + self._generated,
            },
        }


_PREFIXES = {"text": "msg", "reasoning": "rs", "call": "fc"}
_DELTAS = {
    "text": "output_text.delta",
    "reasoning": "reasoning_text.delta",
    "call": "function_call_arguments.delta",
}
_DONE = {"text": "output_text.done", "reasoning": "reasoning_text.done"}


def _items(store: ResponseStore, body: ResponsesRequest) -> list[Item]:
    """All that the answer goes on from: an earlier response's items, and the input."""
    items = input_items(body.input)
    if body.previous_response_id is not None:
        before = store.get(body.previous_response_id)
        if before is None:
            raise ApiError(
                400,
                f"There is no response {body.previous_response_id[:100]!r} to go on from: it was not stored, "
                "or was deleted, or is so old that it made room for others.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        items = [*json.loads(before.items), *json.loads(before.response)["output"], *items]
    if not items:
        raise ApiError(400, "input must not be empty.", param="input")
    return items


def _chat_request(service: Service, body: ResponsesRequest, items: Sequence[Item]) -> ChatRequest:
    for field in ("background", "conversation", "prompt"):
        if getattr(body, field):
            raise ApiError(400, f"{field} is not supported here.", param=field)
    if body.n not in (None, 1):
        raise ApiError(400, f"n must be 1 for a response, not {body.n}.", param="n")
    tools, choice = chat_tools(body.tools or ()), body.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        allowed = choice.get("tools")
        if not isinstance(allowed, list) or choice.get("mode") not in ("auto", "required"):
            raise ApiError(
                400, "tool_choice of allowed_tools must have 'mode' and 'tools'.", param="tool_choice"
            )
        names = [tool.get("name") for tool in allowed if isinstance(tool, dict)]
        tools = [tool for tool in tools if tool["function"].get("name") in names]
        choice = choice["mode"]
    logprobs = body.top_logprobs
    if logprobs is None and _LOGPROBS in (body.include or ()):
        logprobs = 0
    kwargs = dict(body.chat_template_kwargs or {})
    if body.reasoning is not None and body.reasoning.effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning.effort)
        if body.reasoning.effort == "none":
            kwargs.setdefault("enable_thinking", False)
    try:
        text_format = response_format(body.text.format if body.text else None, "text.format")
        if text_format is not None and body.structured_outputs is not None:
            raise ApiError(400, "text.format and structured_outputs exclude each other.", param="text.format")
        params = body.sampling_params(
            replace(service.default_params, max_tokens=None),
            max_tokens=body.max_output_tokens,
            logprobs=logprobs,
            structured_outputs=text_format,
        )
    except HexadError as error:
        raise api_error(error) from error
    return ChatRequest(
        messages=conversation(items, body.instructions),
        params=params,
        tools=tools,
        tool_choice=tool_choice(choice),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        template_kwargs=kwargs,
        cache_salt=body.cache_salt,
        priority=body.priority,
    )


def _response(body: ResponsesRequest, model: str, params: SamplingParams) -> dict[str, Any]:
    """A response that has just begun."""
    reasoning = body.reasoning
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {
            "effort": reasoning.effort if reasoning else None,
            "summary": reasoning.summary if reasoning else None,
        },
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": params.temperature,
        "text": {"format": (body.text and body.text.format) or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": [
            {"description": None, "parameters": None, "strict": None, **tool} for tool in body.tools or ()
        ],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _store(request: Request) -> ResponseStore:
    store: ResponseStore = request.app.state.responses
    return store


def _stored(request: Request, id: str) -> StoredResponse:
    stored = _store(request).get(id)
    if stored is None:
        raise ApiError(404, f"There is no response {id[:100]!r} here.", param="response_id")
    return stored


def _json(value: object) -> str:
    return encode(value).decode()
