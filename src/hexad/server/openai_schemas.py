"""The bodies of OpenAI's API, with vLLM's extensions."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from hexad.server.sampling import Body, SamplingFields


class StreamOptions(Body):
    """include_usage: the last event has the usage. continuous_usage_stats: every event has it."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationBody(SamplingFields):
    """What completions and chat have in common.

    return_token_ids: answer with the token ids, too. return_tokens_as_token_ids: name tokens "token_id:…" in
    logprobs. truncate_prompt_tokens: keep so many tokens of the prompt, the last ones unless truncation_side
    is "right"; -1: as many as fit. use_beam_search: the n best beams, by length_penalty, instead of drawing.
    """

    model: str | None = None
    max_tokens: int | None = Field(None, ge=0)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    prompt_logprobs: int | None = Field(None, ge=-1)
    add_special_tokens: bool | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    truncation_side: Literal["left", "right"] | None = None
    priority: int = 0
    cache_salt: str | None = Field(None, min_length=1)
    request_id: str | None = None
    user: str | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0


class CompletionRequest(GenerationBody):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0)
    echo: bool | None = False
    suffix: str | None = None
    best_of: int | None = None


class ChatCompletionRequest(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    echo: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool = True
    modalities: list[str] | None = None
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None
