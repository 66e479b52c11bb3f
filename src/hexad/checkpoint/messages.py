"""Conversations in the one form that chat templates know: plain JSON values, with texts as contents.

What OpenAI's API allows besides is brought into that form as vLLM does it: parts of a content are joined with
newlines, a content of None is "", arguments of a tool call that are JSON text become an object.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hexad.checks import shown
from hexad.errors import PromptError

MAX_DEPTH = 64
"""How deep the values in a message, a tool or a variable may nest."""

MAX_BITS = 1024
"""Widest integer in them, and widest that a template may compute."""


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of messages; see `ChatTemplate.render`. Raises PromptError naming what is malformed."""
    if not isinstance(messages, list | tuple) or not messages:
        raise PromptError(
            "messages must be a non-empty list of {'role': …, 'content': …}, not "
            + ("an empty one." if isinstance(messages, list | tuple) else f"{type(messages).__name__}.")
        )
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def plain_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Copies of tools; None where there are none."""
    if not tools:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise PromptError(
            f"tools must be a list of JSON objects that describe functions, not {shown(tools)}."
        )
    copies: list[dict[str, Any]] = plain(tools, "tools")
    return copies


def plain(value: Any, where: str, depth: int = MAX_DEPTH) -> Any:
    """A copy of a JSON value, made of dict, list, str, int, float, bool and None.

    Raises PromptError, which says `where`, for anything else in it.
    """
    if value is None or isinstance(value, str | int | float):
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise PromptError(f"{where} must not be an integer of more than {MAX_BITS:,} bits.")
        return value
    if not depth:
        raise PromptError(f"{where} nests more than {MAX_DEPTH} deep.")
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]", depth - 1) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise PromptError(f"{where} must have strings as keys, not {shown(key)}.")
        return {key: plain(item, f"{where}[{shown(key)}]", depth - 1) for key, item in value.items()}
    raise PromptError(f"{where} must be a value that JSON has, not {type(value).__name__}.")


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise PromptError(f"{where} must have 'role' and 'content', not be {type(message).__name__}.")
    copy: dict[str, Any] = plain(message, where)
    role, calls = copy.get("role"), copy.pop("tool_calls", None)
    if not isinstance(role, str):
        raise PromptError(f"{where}['role'] must be a string, not {shown(role)}.")
    if calls:  # templates ask whether there is the key, so an empty list is none
        if not isinstance(calls, list):
            raise PromptError(f"{where}['tool_calls'] must be a list, not {shown(calls)}.")
        copy["tool_calls"] = [_tool_call(call, f"{where}['tool_calls'][{i}]") for i, call in enumerate(calls)]
    content = copy.get("content")
    if content is None and role == "assistant" and calls:
        content = ""
    copy["content"] = _text(content, f"{where}['content']")
    return copy


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise PromptError(f"{where} must be a string or a list of text parts, not {shown(content)}.")
    for i, part in enumerate(content):
        if not isinstance(part, dict):
            raise PromptError(
                f"{where}[{i}] must be a string in {{'type': 'text', 'text': …}}, not {shown(part)}."
            )
        if part.get("type") != "text":
            raise PromptError(
                f"{where}[{i}] is a part of type {shown(part.get('type'))}; this model takes only 'text'."
            )
        if not isinstance(part.get("text"), str):
            raise PromptError(f"{where}[{i}]['text'] must be a string, not {shown(part.get('text'))}.")
    return "\n".join(part["text"] for part in content)


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise PromptError(f"{where} must have a 'function' with a 'name', not be {shown(call)}.")
    arguments = function.get("arguments")
    where += "['function']['arguments']"
    if isinstance(arguments, str) and arguments:
        try:
            arguments = plain(json.loads(arguments), where)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{where} must be a JSON object, and is no JSON: {error}.") from error
    if arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, dict):
        raise PromptError(f"{where} must be a JSON object, not {shown(arguments)}.")
    return {**call, "function": {**function, "arguments": arguments}}
