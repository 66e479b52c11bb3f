"""OpenAI's embeddings."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from hexad.outputs import EmbeddingRequestOutput
from hexad.params import PoolingParams
from hexad.prompts import TokenPrompt, prompt_list
from hexad.server.chat import served
from hexad.server.errors import ApiError
from hexad.server.http import JSONResponse, unless_gone
from hexad.server.sampling import Body
from hexad.server.service import Service

router = APIRouter()

MAX_INPUTS = 2048
"""Most inputs of one request, as at OpenAI."""


class EmbeddingsRequest(Body):
    """POST /v1/embeddings. pooling, normalize: as in PoolingParams. The rest is as in /v1/completions."""

    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = None
    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = True
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    priority: int = 0
    user: str | None = None


@router.post("/v1/embeddings")
async def embeddings(request: Request, body: EmbeddingsRequest) -> Response:
    """The embeddings of texts, or of lists of token ids."""
    service = served(request).service
    name = service.check_model(body.model)
    if body.dimensions is not None:
        raise ApiError(
            400,
            f"dimensions must be left out, not {body.dimensions}: the model was not trained to have its "
            "embeddings cut (matryoshka representations).",
            param="dimensions",
        )
    inputs = prompt_list(body.input)
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise ApiError(400, f"input must have 1 to {MAX_INPUTS} entries, not {len(inputs)}.", param="input")
    outputs = await unless_gone(request, _embed(service, body, inputs))
    tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return JSONResponse(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": _written(output.outputs.embedding, body)}
                for i, output in enumerate(outputs)
            ],
            "model": name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


async def _embed(
    service: Service, body: EmbeddingsRequest, inputs: Sequence[Any]
) -> list[EmbeddingRequestOutput]:
    """As many at a time as one request may have."""
    params = PoolingParams(pooling=body.pooling, normalize=body.normalize)
    add = body.add_special_tokens is not False
    most = service.max_model_len if body.truncate_prompt_tokens == -1 else body.truncate_prompt_tokens
    outputs: list[EmbeddingRequestOutput] = []
    for begin in range(0, len(inputs), service.settings.max_n):
        chunk = inputs[begin : begin + service.settings.max_n]

        def read(chunk: Sequence[Any] = chunk) -> list[TokenPrompt]:
            prompts = [service.read(prompt, add_special=add) for prompt in chunk]
            return [prompt._replace(token_ids=prompt.token_ids[:most]) for prompt in prompts]

        try:
            outputs += await service.embed(read, params, priority=body.priority)
        except ApiError as error:
            error.param = error.param or ("input" if error.status == 400 else None)
            raise
    return outputs


def _written(embedding: Sequence[float], body: EmbeddingsRequest) -> str | Sequence[float]:
    if body.encoding_format == "base64":
        return base64.b64encode(struct.pack(f"<{len(embedding)}f", *embedding)).decode()
    return embedding
