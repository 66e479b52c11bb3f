"""The body of OpenAI's Responses API, with vLLM's extensions."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from hexad.server.sampling import Body, SamplingFields


class TextOptions(Body):
    """format: as `response_format` of chat, without the "json_schema" around the schema."""

    format: dict[str, Any] | None = None


class ReasoningOptions(Body):
    """effort: for the chat template; "none" has it turn reasoning off, where it can."""

    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(SamplingFields):
    """POST /v1/responses.

    Of `include`, "message.output_text.logprobs" has a meaning here.
    """

    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    stream: bool | None = False
    store: bool | None = True
    background: bool | None = False
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[str] | None = None
    top_logprobs: int | None = Field(None, ge=0)
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = Field(None, min_length=1)
    priority: int = 0
