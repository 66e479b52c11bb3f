"""The bodies of Anthropic's Messages API, with hexad's sampling parameters beyond it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from hexad.server.sampling import Body, SamplingFields


class ToolChoice(Body):
    """name: the tool's, with type "tool"."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = False


class Thinking(Body):
    """budget_tokens: most tokens of reasoning. display: "omitted" leaves the reasoning out."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = Field(None, ge=0)
    display: str | None = None


class OutputConfig(Body):
    """effort: for the chat template. format: a JSON schema that the answer matches."""

    effort: str | None = None
    format: dict[str, Any] | None = None


class CountTokensRequest(Body):
    """POST /v1/messages/count_tokens."""

    model: str
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountTokensRequest, SamplingFields):
    """POST /v1/messages. output_format: what is output_config.format by now."""

    max_tokens: int = Field(ge=1)
    stream: bool | None = False
    stop_sequences: list[str] | None = None
    output_format: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
