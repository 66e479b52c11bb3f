"""Conversations: from messages and tools to a prompt, and from generated text to a message's parts.

In no API's form: OpenAI's, Anthropic's, Ollama's and the Responses are written from the same pieces.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.requests import Request

from hexad.checkpoint.messages import plain_messages
from hexad.engine.async_engine import Params
from hexad.errors import HexadError, PromptError
from hexad.outputs import CompletionOutput, RequestOutput
from hexad.params import SamplingParams
from hexad.prompts import TokenPrompt
from hexad.server.errors import ApiError, api_error
from hexad.server.parsers.deltas import Delta
from hexad.server.parsers.formats import TOOL_FORMATS, ToolFormat, detect_tool_format
from hexad.server.parsers.parser import MessageParser
from hexad.server.parsers.reasoning import THINK, ReasoningFormat, detect_reasoning_format
from hexad.server.service import Generation, Service


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A conversation to be continued.

    messages, tools: as OpenAI writes them. tool_choice: "auto", "none", "required", or {"name": …} for a
    certain one. include_reasoning: False leaves it out. length_penalty: not None has params.n beams searched,
    which cannot be streamed. The rest is as in AsyncLLM.chat.
    """

    messages: Sequence[Mapping[str, Any]]
    params: SamplingParams
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str | Mapping[str, str] = "auto"
    parallel_tool_calls: bool = True
    include_reasoning: bool = True
    length_penalty: float | None = None
    chat_template: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    cache_salt: str | None = None
    priority: int = 0


@dataclass(slots=True)
class ToolCall:
    """A call the model makes. arguments: JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class ChatMessage:
    """What the model said, whole."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        """Takes the next piece."""
        self.content += delta.content
        self.reasoning += delta.reasoning
        for piece in delta.tool_calls:
            if piece.name is not None:
                self.tool_calls.append(ToolCall(piece.id or "", piece.name, ""))
            self.tool_calls[-1].arguments += piece.arguments


class Chat:
    """How conversations are held with the model of a service.

    tool_format, reasoning_format: how it writes calls and thoughts; by its chat template, unless the settings
    name them.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        settings, tokenizer = service.settings, service.tokenizer
        template = tokenizer.chat_template
        self._template = settings.chat_template or (template.text if template else "")
        special_tokens = set(map(tokenizer.token_text, tokenizer.special_ids))
        self.tool_format: ToolFormat = (
            detect_tool_format(self._template, special_tokens)
            if settings.tool_call_parser == "auto"
            else TOOL_FORMATS[settings.tool_call_parser]
        )
        self.reasoning_format: ReasoningFormat | None = (
            detect_reasoning_format(self._template)
            if settings.reasoning_parser == "auto"
            else _REASONING_FORMATS[settings.reasoning_parser]
        )

    async def start(self, request: ChatRequest, *, stream: bool) -> ChatGeneration:
        """Queues a conversation. Raises ApiError."""
        try:
            names = [tool_name(tool) for tool in request.tools]
            params = self._params(request, names)
        except HexadError as error:
            raise api_error(error) from error
        generation = await self.service.start(
            lambda: [self.prompt(request)],
            params,
            stream=stream,
            priority=request.priority,
            adapt=lambda prompt, params: self._constrained(request, prompt, params),
        )
        return ChatGeneration(self, request, names, generation)

    async def count(self, request: ChatRequest) -> int:
        """How many tokens a conversation is. Raises ApiError."""
        try:
            prompt = await asyncio.to_thread(self.prompt, request)
        except HexadError as error:
            raise api_error(error) from error
        return len(prompt.token_ids)

    def prompt(self, request: ChatRequest) -> TokenPrompt:
        """The conversation in the model's chat template. Raises PromptError, TokenizerError."""
        tools = [] if request.tool_choice == "none" else list(request.tools)
        messages = list(request.messages)
        chat_template = request.chat_template or self.service.settings.chat_template
        self.service.check_length(_characters(messages) + _characters(tools))
        template = chat_template or self._template
        if "developer" not in template:  # OpenAI's newer name for it
            messages = [
                {**message, "role": "system"}
                if isinstance(message, Mapping) and message.get("role") == "developer"
                else message
                for message in messages
            ]
        if "tools" not in template and (tools or any(_is_about_tools(m) for m in messages)):
            messages = self._written_out(messages, tools, request.tool_choice)
            tools = []
        prompt = self.service.prompts.chat(
            messages,
            tools=tools or None,
            chat_template=chat_template,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            variables=request.template_kwargs,
        )
        return prompt._replace(cache_salt=request.cache_salt)

    def _params(self, request: ChatRequest, names: Sequence[str]) -> SamplingParams:
        """Params as far as they do not depend on the prompt. Raises ApiError."""
        params, choice, tools = request.params, request.tool_choice, request.tools
        reasoning = self.reasoning_format
        if (tools and choice != "none" and self.tool_format.needs_special_tokens) or (
            reasoning is not None and reasoning.needs_special_tokens
        ):
            params = replace(params, skip_special_tokens=False)
        if choice in ("auto", "none"):
            return params
        if request.length_penalty is not None:
            message = "tool_choice must be 'auto' or 'none' in a beam search: beams take no grammar."
            raise ApiError(400, message, param="tool_choice")
        if params.structured_outputs is not None:
            raise ApiError(
                400,
                "A tool_choice that forces a call and a format for the answer exclude each other.",
                param="tool_choice",
            )
        if not isinstance(choice, str) and choice["name"] not in names:
            raise ApiError(
                400,
                f"tool_choice names {choice['name']!r}; the tools are {', '.join(names) or 'none'}.",
                param="tool_choice",
            )
        return params

    def _constrained(self, request: ChatRequest, prompt: TokenPrompt, params: SamplingParams) -> Params:
        """Params with the grammar that makes the model call, where it was told to, or keeps its calls to the
        schemas, where these are strict; or for beams."""
        choice, tools, parallel = request.tool_choice, request.tools, request.parallel_tool_calls
        opened = self.in_reasoning(prompt)
        constraint = None
        if choice == "auto":
            if params.structured_outputs is None and any(map(_is_strict, tools)):
                constraint = self.tool_format.auto_constraint(
                    tools, parallel, reasoning=self.reasoning_format, starts_in_reasoning=opened
                )
        elif choice != "none":
            constraint = self.tool_format.constraint(
                tools,
                choice if isinstance(choice, str) else choice["name"],
                parallel,
                reasoning=self.reasoning_format,
                starts_in_reasoning=opened,
            )
        if constraint is not None:
            params = replace(params, structured_outputs=constraint)
        if request.length_penalty is not None:
            return self.service.beam_search(prompt, params, request.length_penalty)
        return params

    def in_reasoning(self, prompt: TokenPrompt) -> bool:
        """Whether a prompt ends inside reasoning."""
        return self.reasoning_format is not None and self.reasoning_format.is_opened_by(prompt.text or "")

    def _written_out(
        self,
        messages: list[Mapping[str, Any]],
        tools: list[Mapping[str, Any]],
        choice: str | Mapping[str, str],
    ) -> list[Mapping[str, Any]]:
        """Messages for a template that knows nothing of tools: all about these becomes text."""
        written: list[Mapping[str, Any]] = []
        for message in plain_messages(messages):
            content = message["content"]
            if message["role"] == "tool":
                content = f"<tool_response>\n{content}\n</tool_response>"
                written.append({"role": "user", "content": content})
            elif "tool_calls" in message:
                calls = map(_written_call, message.pop("tool_calls"))
                written.append({**message, "content": "\n".join([*([content] if content else []), *calls])})
            else:
                written.append(message)
        if tools:
            text = self.tool_format.instructions(tools, choice if isinstance(choice, str) else choice["name"])
            first = written[0]
            if first["role"] == "system":
                written[0] = {**first, "content": f"{first['content']}\n\n{text}"}
            else:
                written.insert(0, {"role": "system", "content": text})
        return written


_REASONING_FORMATS: Mapping[str, ReasoningFormat | None] = {"think": THINK, "none": None}


class ChatGeneration:
    """The continuations of one conversation: read them once, by `async for` or `collect`."""

    def __init__(
        self,
        chat: Chat,
        request: ChatRequest,
        names: Sequence[str],
        generation: Generation,
    ) -> None:
        self.generation = generation
        self.service = chat.service
        self.prompt = generation.prompts[0]
        self._request = request
        self._parsers: list[MessageParser] | None = None
        tools = bool(names) and request.tool_choice != "none"
        if tools or chat.reasoning_format is not None:
            self._parsers = [
                MessageParser(
                    tools=chat.tool_format if tools else None,
                    reasoning=chat.reasoning_format,
                    starts_in_reasoning=chat.in_reasoning(self.prompt),
                    tool_names=names,
                )
                for _ in range(request.params.n)
            ]

    def finish_reason(self, completion: CompletionOutput) -> str | None:
        """OpenAI's, "tool_calls" for one that ended with calls."""
        reason = completion.finish_reason
        if reason == "stop" and self._parsers and self._parsers[completion.index].made_tool_calls:
            return "tool_calls"
        return "stop" if reason == "repetition" else reason

    def __aiter__(self) -> ChatGeneration:
        return self

    async def __anext__(self) -> tuple[RequestOutput, list[tuple[CompletionOutput, Delta]]]:
        """(output, [(what is new of a continuation, the same text as its parts), …]). Raises ApiError."""
        _, output = await anext(self.generation)
        return output, [(completion, self.delta(completion)) for completion in output.outputs]

    async def collect(self) -> tuple[RequestOutput, list[ChatMessage]]:
        """The output and each continuation as a message. Raises ApiError."""
        (output,) = await self.generation.collect()
        messages = []
        for completion in output.outputs:
            message = ChatMessage()
            message.add(self.delta(completion))
            messages.append(message)
        return output, messages

    def close(self) -> None:
        """Cancels what has not ended."""
        self.generation.close()

    def delta(self, completion: CompletionOutput) -> Delta:
        """What is new of a continuation, told apart. Each output's is to be asked for once, in order."""
        if self._parsers is None:
            return Delta("", completion.text)
        parser = self._parsers[completion.index]
        message = parser.push(completion.text)
        if completion.finished and (rest := parser.finish()):
            message = Delta(
                message.reasoning + rest.reasoning,
                message.content + rest.content,
                message.tool_calls + rest.tool_calls,
            )
        if not self._request.include_reasoning and message.reasoning:
            message = replace(message, reasoning="")
        if not self._request.parallel_tool_calls and any(call.index for call in message.tool_calls):
            message = replace(message, tool_calls=tuple(c for c in message.tool_calls if not c.index))
        return message


def served(request: Request) -> Chat:
    """The model that an HTTP request is for."""
    chat: Chat | None = request.app.state.server.chat
    assert chat is not None  # the gate lets nobody in before
    return chat


def tool_name(tool: Mapping[str, Any]) -> str:
    """The name of a tool in OpenAI's form. Raises PromptError if it has none."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise PromptError("Each of tools must be {'type': 'function', 'function': {'name': …, …}}.")
    return name


def _is_strict(tool: Mapping[str, Any]) -> bool:
    return tool["function"].get("strict") is True


def _written_call(call: Mapping[str, Any]) -> str:
    function = call["function"]
    written = {"name": function["name"], "arguments": function["arguments"]}
    return f"<tool_call>\n{json.dumps(written, ensure_ascii=False)}\n</tool_call>"


def _is_about_tools(message: Any) -> bool:
    return isinstance(message, Mapping) and (message.get("role") == "tool" or bool(message.get("tool_calls")))


def _characters(value: Any) -> int:
    """At least so many characters are in a JSON value's texts."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list | tuple) else 0
