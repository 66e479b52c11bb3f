"""The bodies of llama-server's own API."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from hexad.server.dialects import CommonFields
from hexad.server.sampling import Body


class CompletionFields(CommonFields):
    """What /completion and /infill have in common.

    n_predict: -1: to the end of the context. n_cmpl: continuations of each prompt. n_probs: report the
    logprobs of so many tokens. samplers: names in order, or a letter for each. logit_bias: [[token id or
    text, bias or false], …], or the same as an object. response_fields: what to answer with; of "a/b" b.
    """

    model: str | None = None
    n_predict: int | None = Field(None, ge=-2)
    max_tokens: int | None = Field(None, ge=-2)
    n_cmpl: int | None = None
    n: int | None = None
    stream: bool | None = False
    repeat_penalty: float | None = None
    dry_sequence_breakers: list[str] | None = None
    ignore_eos: bool | None = None
    grammar: str | None = None
    json_schema: Any = None
    logit_bias: list[Any] | dict[str, Any] | None = None
    n_probs: int | None = None
    samplers: list[str] | str | None = None
    cache_prompt: bool | None = None
    return_tokens: bool | None = False
    timings_per_token: bool | None = False
    response_fields: list[str] | None = None
    # Not done here; see NEUTRAL.
    post_sampling_probs: bool | None = None
    min_keep: int | None = None
    n_indent: int | None = None
    t_max_predict_ms: int | None = None
    lora: list[Any] | None = None
    adaptive_target: float | None = None
    multimodal_data: list[Any] | None = None


NEUTRAL: dict[str, list[Any]] = {
    "post_sampling_probs": [False],
    "min_keep": [0, 1],
    "n_indent": [0],
    "t_max_predict_ms": [0, -1],
    "lora": [[]],
    "adaptive_target": [-1],
    "multimodal_data": [[]],
}


class CompletionRequest(CompletionFields):
    """POST /completion. prompt: text, token ids, both mixed, or a list of these."""

    prompt: str | list[Any] | dict[str, Any]


class InfillFile(Body):
    """Another file for the model to see."""

    text: str
    filename: str | None = None


class InfillRequest(CompletionFields):
    """POST /infill. prompt: what the middle begins with."""

    input_prefix: str
    input_suffix: str
    input_extra: list[InfillFile] | None = None
    prompt: str | None = None


class EmbeddingRequest(Body):
    """POST /embedding. content (or input): as CompletionRequest.prompt. embd_normalize: -1: not at all, 0: by
    the largest, 1: by the sum, 2: by the Euclidean norm, p: by the p-norm."""

    model: str | None = None
    content: str | list[Any] | None = None
    input: str | list[Any] | None = None
    embd_normalize: int = Field(2, ge=-1, le=64)


class TemplateRequest(Body):
    """POST /apply-template."""

    model: str | None = None
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizeRequest(Body):
    """POST /tokenize. llama-server's has content, vLLM's has prompt or messages."""

    model: str | None = None
    content: str | None = None
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]
