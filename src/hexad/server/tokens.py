"""/tokenize and /detokenize, which llama-server and vLLM both have: the body's fields say whose is meant."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from hexad.errors import HexadError
from hexad.params import SamplingParams
from hexad.server.chat import Chat, ChatRequest, served
from hexad.server.errors import ApiError, api_error
from hexad.server.http import JSONResponse
from hexad.server.llama_schemas import DetokenizeRequest, TokenizeRequest
from hexad.server.service import Service

router = APIRouter(tags=["tokens"])


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """The tokens of a text (llama-server's `content`, vLLM's `prompt`) or of a conversation (`messages`)."""
    chat = served(request)
    chat.service.check_model(body.model)
    given = [name for name in ("content", "prompt", "messages") if getattr(body, name) is not None]
    if len(given) != 1:
        raise ApiError(
            400, f"Give one of content, prompt and messages, not {' and '.join(given) or 'none'}.",
            param=given[-1] if given else "prompt",
        )  # fmt: skip
    answer = _tokenized if body.content is not None else _tokenized_for_vllm
    try:
        return JSONResponse(await asyncio.to_thread(answer, chat, body))
    except HexadError as error:
        raise api_error(error) from error


def _tokenized(chat: Chat, body: TokenizeRequest) -> dict[str, Any]:
    service, content = chat.service, body.content
    assert content is not None
    service.check_length(len(content))
    special = map(service.tokenizer.token_text, service.tokenizer.special_ids)
    if not body.parse_special and any(token in content for token in special):
        raise ApiError(
            400, "content has special tokens in it, which are parsed here: parse_special must be true.",
            param="parse_special",
        )  # fmt: skip
    ids = service.tokenizer.encode(content, add_special=body.add_special)
    if not body.with_pieces:
        return {"tokens": ids}
    return {"tokens": [{"id": i, "piece": _piece(service, i)} for i in ids]}


def _piece(service: Service, token_id: int) -> str | list[int]:
    piece = service.tokenizer.token_bytes(token_id)
    try:
        return piece.decode()
    except UnicodeDecodeError:  # part of a character
        return list(piece)


def _tokenized_for_vllm(chat: Chat, body: TokenizeRequest) -> dict[str, Any]:
    service = chat.service
    if body.messages is None:
        assert body.prompt is not None
        ids = service.read(body.prompt, add_special=body.add_special_tokens is not False).token_ids
    else:
        prompt = chat.prompt(
            ChatRequest(
                messages=body.messages,
                params=SamplingParams(),
                tools=body.tools or (),
                chat_template=body.chat_template,
                add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
                continue_final_message=body.continue_final_message,
                template_kwargs=body.chat_template_kwargs or {},
            )
        )
        ids = prompt.token_ids
        if body.add_special_tokens:
            ids = service.tokenizer.encode(prompt.text or "")
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [service.tokenizer.token_text(i) for i in ids]
    return answer


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """The text of tokens: `content` is llama-server's answer, `prompt` vLLM's."""
    service = served(request).service
    service.check_model(body.model)
    tokenizer = service.tokenizer
    wrong = next((i for i in body.tokens if not 0 <= i < tokenizer.vocab_size), None)
    if wrong is not None:
        raise ApiError(
            400, f"tokens must be of the vocabulary, from 0 to {tokenizer.vocab_size - 1}, not {wrong}.",
            param="tokens",
        )  # fmt: skip
    text = tokenizer.decode(body.tokens, skip_special=False)
    return JSONResponse({"content": text, "prompt": text})
