"""Ollama's API."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from json.encoder import encode_basestring as quoted
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from hexad.errors import HexadError
from hexad.outputs import CompletionOutput, RequestOutput
from hexad.params import PoolingParams, SamplingParams, StructuredOutputsParams
from hexad.prompts import TokenPrompt
from hexad.server.chat import Chat, ChatGeneration, ChatMessage, served
from hexad.server.chat import ChatRequest as Conversation
from hexad.server.dialects import LLAMA_DEFAULTS, Timings, constraint, finish_reason, refuse, sampling_params
from hexad.server.errors import ApiError, api_error
from hexad.server.http import EventStream, JSONResponse, encode, unless_gone
from hexad.server.infill import FillInTheMiddle, infill_of
from hexad.server.ollama_schemas import (
    NEUTRAL,
    NEUTRAL_OPTIONS,
    ChatRequest,
    EmbedRequest,
    GenerateRequest,
    GenerationBody,
    OldEmbeddingRequest,
    Options,
    ShowRequest,
)
from hexad.server.parsers.deltas import Delta
from hexad.server.service import Generation, Service

router = APIRouter(tags=["Ollama"])

VERSION = "0.13.0"
"""The Ollama whose API this is: clients ask for it."""

_DEFAULTS = replace(
    LLAMA_DEFAULTS,
    top_p=0.9,
    min_p=0.0,
    repetition_penalty=1.1,
    samplers=("penalties", "top_k", "typical_p", "temperature", "top_p", "min_p"),
)


def error_body(error: ApiError) -> dict[str, Any]:
    """An error as Ollama writes it."""
    return {"error": error.message}


@router.post("/api/generate")
async def generate(request: Request, body: GenerateRequest) -> Response:
    """Answers a prompt, or continues it as it is where it is raw."""
    chat = served(request)
    name = _check_model(chat.service, body.model)
    refuse(body, NEUTRAL)
    if body.context:
        raise ApiError(400, "context is not supported here; /api/chat takes a conversation.", param="context")
    reply = _Reply(name, body, in_chat=False)
    if not body.prompt and not body.suffix:
        return JSONResponse(reply.loaded())
    prompt, suffix = body.prompt or "", body.suffix
    generation: Generation | ChatGeneration
    if suffix or body.raw:
        params, service = _params(body), chat.service
        if suffix:
            fim = infill_of(service)
            params = replace(params, stop_token_ids=fim.ends)

            def read() -> list[TokenPrompt]:
                return [fim.prompt(service, prompt, suffix, max_tokens=params.max_tokens)]

        else:

            def read() -> list[TokenPrompt]:
                return [service.read(prompt)]

        generation = await service.start(read, params, stream=bool(body.stream))
    else:
        messages = [{"role": "user", "content": prompt}]
        if body.system:
            messages.insert(0, {"role": "system", "content": body.system})
        generation = await _converse(chat, body, messages)
    return await _answer(request, reply, generation)


@router.post("/api/chat")
async def converse(request: Request, body: ChatRequest) -> Response:
    """Answers a conversation."""
    model = served(request)
    reply = _Reply(_check_model(model.service, body.model), body, in_chat=True)
    if not body.messages:
        return JSONResponse(reply.loaded())
    messages = [_message(message) for message in body.messages]
    return await _answer(request, reply, await _converse(model, body, messages, body.tools))


async def _converse(
    chat: Chat,
    body: GenerationBody,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
) -> ChatGeneration:
    variables: dict[str, Any] = {}
    if body.think is not None:
        if body.think and chat.reasoning_format is None:
            raise ApiError(400, f"{body.model!r} does not support thinking.", param="think")
        variables["enable_thinking"] = bool(body.think)
        if isinstance(body.think, str):
            variables["reasoning_effort"] = body.think
    conversation = Conversation(
        messages=messages,
        params=_params(body),
        tools=tools or (),
        include_reasoning=body.think is not False,
        template_kwargs=variables,
    )
    return await chat.start(conversation, stream=bool(body.stream))


def _params(body: GenerationBody) -> SamplingParams:
    options = body.options or Options.model_validate({})
    refuse(options, NEUTRAL_OPTIONS)
    most = options.num_predict
    text_format: StructuredOutputsParams | None = None
    try:
        if body.format == "json":
            text_format = StructuredOutputsParams(json_object=True)
        elif isinstance(body.format, dict):
            text_format = constraint(None, body.format)
        return sampling_params(
            options,
            _DEFAULTS,
            max_tokens=None if most is None or most <= 0 else most,
            repetition_penalty=options.repeat_penalty,
            structured_outputs=text_format,
        )
    except HexadError as error:
        raise api_error(error) from error


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message in OpenAI's form."""
    written = dict(message)
    if written.pop("images", None):
        raise ApiError(400, "images are not supported: this model takes text only.", param="messages")
    if thinking := written.pop("thinking", None):
        written["reasoning_content"] = thinking
    if name := written.pop("tool_name", None):
        written["name"] = name
    written.setdefault("content", "")
    return written


async def _answer(request: Request, reply: _Reply, generation: Generation | ChatGeneration) -> Response:
    if reply.stream:
        return EventStream(_lines(reply, generation), media_type="application/x-ndjson")
    return JSONResponse(await unless_gone(request, _whole(reply, generation)))


async def _whole(reply: _Reply, generation: Generation | ChatGeneration) -> dict[str, Any]:
    with contextlib.closing(generation):
        ((output, one, delta),) = [piece async for piece in _pieces(generation)]
    message = ChatMessage()
    message.add(delta)
    return reply.last(output, one, len(one.token_ids), message)


async def _lines(reply: _Reply, generation: Generation | ChatGeneration) -> AsyncIterator[bytes]:
    calls, count = ChatMessage(), 0
    with contextlib.closing(generation):
        try:
            async for output, one, delta in _pieces(generation):
                count += len(one.token_ids)
                calls.add(Delta(tool_calls=delta.tool_calls))
                if delta.content or delta.reasoning:
                    yield reply.piece(delta)
                if one.finished:  # calls are told whole
                    yield encode(reply.last(output, one, count, calls)) + b"\n"
        except ApiError as error:
            yield encode(error_body(error)) + b"\n"


async def _pieces(
    generation: Generation | ChatGeneration,
) -> AsyncIterator[tuple[RequestOutput, CompletionOutput, Delta]]:
    """What is new of the one continuation, and of its message."""
    if isinstance(generation, ChatGeneration):
        async for output, ((one, delta),) in generation:
            yield output, one, delta
    else:
        async for _, output in generation:
            (one,) = output.outputs
            yield output, one, Delta(content=one.text)


class _Reply:
    """Writes the answers to one request. in_chat: as messages."""

    def __init__(self, model: str, body: GenerationBody, *, in_chat: bool) -> None:
        self.stream = bool(body.stream)
        self._model = model
        self._in_chat = in_chat
        self._begin = f'{{"model":{quoted(model)},"created_at":"'

    def piece(self, delta: Delta) -> bytes:
        """A line with what is new of a text."""
        thinking = f',"thinking":{quoted(delta.reasoning)}' if delta.reasoning else ""
        content = quoted(delta.content)
        if self._in_chat:
            said = f'"message":{{"role":"assistant","content":{content}{thinking}}}'
        else:
            said = f'"response":{content}{thinking}'
        return f'{self._begin}{_now()}",{said},"done":false}}\n'.encode()

    def last(
        self, output: RequestOutput, one: CompletionOutput, count: int, message: ChatMessage
    ) -> dict[str, Any]:
        """The line that ends an answer, or all of one that is not streamed. count: tokens of it."""
        times = Timings.of(output, count)
        return {
            **self._said(message),
            "done_reason": finish_reason(one),
            "total_duration": _nanoseconds(times.total),
            "load_duration": 0,
            "prompt_eval_count": len(output.prompt_token_ids),
            "prompt_eval_duration": _nanoseconds(times.prompt),
            "eval_count": count,
            "eval_duration": _nanoseconds(times.generation),
        }

    def loaded(self) -> dict[str, Any]:
        """The answer to a request that asks for nothing but the model, which is there."""
        return {**self._said(ChatMessage()), "done_reason": "load"}

    def _said(self, message: ChatMessage) -> dict[str, Any]:
        said: dict[str, Any] = {"thinking": message.reasoning} if message.reasoning else {}
        if message.tool_calls:
            said["tool_calls"] = [
                {"function": {"index": i, "name": call.name, "arguments": _arguments(call.arguments)}}
                for i, call in enumerate(message.tool_calls)
            ]
        if self._in_chat:
            said = {"message": {"role": "assistant", "content": message.content, **said}}
        else:
            said = {"response": message.content, **said}
        return {"model": self._model, "created_at": _now(), **said, "done": True}


def _arguments(text: str) -> dict[str, Any]:
    """A call's arguments as an object; what is none, a model's mistake, in an object by itself."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    return {"arguments": text}


def _now() -> str:
    return _time(time.time())


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _nanoseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e9))


@router.get("/api/version")
async def version() -> Response:
    """The Ollama whose API this is."""
    return JSONResponse({"version": VERSION})


@router.get("/api/tags")
async def tags(request: Request) -> Response:
    """The models that there are: the one that is served, by each of its names."""
    service = served(request).service
    model = await asyncio.to_thread(_described, service)
    return JSONResponse({"models": [_listed(service, name, model) for name in service.names]})


@router.get("/api/ps")
async def running(request: Request) -> Response:
    """The models that are loaded: the same. They stay for ever."""
    service = served(request).service
    model = await asyncio.to_thread(_described, service)
    more = {
        "expires_at": "9999-12-31T23:59:59Z",
        "size_vram": 0,
        "context_length": service.max_model_len,
    }
    return JSONResponse({"models": [{**_listed(service, name, model), **more} for name in service.names]})


@router.post("/api/show")
async def show(request: Request, body: ShowRequest) -> Response:
    """What is known of a model."""
    chat = served(request)
    service = chat.service
    given = body.model or body.name
    if given is None:
        raise ApiError(400, "model is missing.", param="model")
    name = _check_model(service, given)
    model = await asyncio.to_thread(_described, service)
    family = model["details"]["family"]
    config = service.llm.checkpoint.config
    template = service.tokenizer.chat_template
    can = {
        "completion": True,
        "tools": template is not None,
        "thinking": chat.reasoning_format is not None,
        "insert": FillInTheMiddle.find(service.tokenizer) is not None,
    }
    return JSONResponse(
        {
            "modelfile": f"FROM {name}",
            "parameters": f"num_ctx {service.max_model_len}",
            "template": service.settings.chat_template or (template.text if template is not None else ""),
            "details": model["details"],
            "model_info": {
                "general.architecture": family,
                "general.parameter_count": model["parameters"],
                f"{family}.context_length": service.max_model_len,
                f"{family}.embedding_length": config.get("hidden_size"),
                f"{family}.block_count": config.get("num_hidden_layers"),
                f"{family}.feed_forward_length": config.get("intermediate_size"),
                f"{family}.attention.head_count": config.get("num_attention_heads"),
                f"{family}.attention.head_count_kv": config.get("num_key_value_heads"),
                f"{family}.vocab_size": config.get("vocab_size"),
            },
            "capabilities": [name for name, is_so in can.items() if is_so],
            "modified_at": model["modified_at"],
        }
    )


def _check_model(service: Service, given: str) -> str:
    """The name to answer with; "latest" need not be said. Raises ApiError 404."""
    for name in (given, given.removesuffix(":latest"), f"{given}:latest"):
        if name in service.names:
            return given
    raise ApiError(404, f"model {given[:200]!r} not found", param="model")


def _described(service: Service) -> dict[str, Any]:
    """The model by what its file says. It takes a while."""
    checkpoint = service.llm.checkpoint
    parameters, stored = 0, Counter[str]()
    for weight in checkpoint.weights.values():
        parameters += math.prod(weight.shape)
        stored[weight.format.name] += weight.nbytes
    family = str(checkpoint.config["model_type"])
    try:
        modified = checkpoint.path.stat().st_mtime
    except OSError:  # it was opened long ago
        modified = service.created
    size = f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.2f}M"
    return {
        "parameters": parameters,
        "size": stored.total(),
        "modified_at": _time(modified),
        "details": {
            "parent_model": "",
            "format": "gguf" if checkpoint.path.suffix == ".gguf" else "safetensors",
            "family": family,
            "families": [family],
            "parameter_size": size,
            "quantization_level": stored.most_common(1)[0][0],
        },
    }


def _listed(service: Service, name: str, model: Mapping[str, Any]) -> dict[str, Any]:
    identity = f"{service.names[0]} {model['size']} {model['modified_at']}"
    tagged = name if ":" in name.rpartition("/")[2] else f"{name}:latest"
    return {
        "name": tagged,
        "model": tagged,
        "modified_at": model["modified_at"],
        "size": model["size"],
        "digest": hashlib.sha256(identity.encode()).hexdigest(),  # of the name, not of what is in the file
        "details": model["details"],
    }


@router.post("/api/embed")
async def embed(request: Request, body: EmbedRequest) -> Response:
    """The embeddings of texts."""
    begin = time.monotonic()
    service = served(request).service
    name = _check_model(service, body.model)
    texts = [body.input] if isinstance(body.input, str) else body.input
    if not texts:
        return JSONResponse({"model": name, "embeddings": []})
    cut = body.truncate is not False

    def read() -> list[TokenPrompt]:
        most = service.max_prompt_chars
        prompts = [service.read(text[:most] if cut else text) for text in texts]
        return (
            [prompt._replace(token_ids=prompt.token_ids[: service.max_model_len]) for prompt in prompts]
            if cut
            else prompts
        )

    outputs = await unless_gone(request, service.embed(read, PoolingParams()))
    return JSONResponse(
        {
            "model": name,
            "embeddings": [_shortened(output.outputs.embedding, body.dimensions) for output in outputs],
            "total_duration": _nanoseconds(time.monotonic() - begin),
            "load_duration": 0,
            "prompt_eval_count": sum(len(output.prompt_token_ids) for output in outputs),
        }
    )


@router.post("/api/embeddings")
async def embeddings(request: Request, body: OldEmbeddingRequest) -> Response:
    """The embedding of a text, by the older name."""
    service = served(request).service
    _check_model(service, body.model)
    (output,) = await unless_gone(
        request, service.embed(lambda: [service.read(body.prompt)], PoolingParams())
    )
    return JSONResponse({"embedding": output.outputs.embedding})


def _shortened(vector: list[float], dimensions: int | None) -> list[float]:
    if dimensions is None or dimensions >= len(vector):
        return vector
    length = math.hypot(*vector[:dimensions]) or 1.0
    return [value / length for value in vector[:dimensions]]
